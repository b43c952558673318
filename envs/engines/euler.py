"""A step of MJX with Euler's integrator that does not hang on a CPU with many worlds.

XLA's CPU client starts every operation as soon as its inputs are ready. jaxlib's LAPACK calls spread a large
batch over XLA's threads, and wait for the results inside one of these threads. `mjx.step` factorises the
damped mass matrix while its solver factorises the Hessian. With 2,048 halfcheetahs on two cores, each of the
two calls held one thread and waited for the other for ever (mujoco-mjx 3.17, jaxlib 0.10.2). Here the second
call starts only after the first.
"""

import jax
import jax.numpy as jnp
from mujoco import mjx


def step(m: mjx.Model, d: mjx.Data) -> mjx.Data:
    """`mjx.step` of a model with Euler's integrator."""
    d = mjx.forward(m, d)
    return mjx.euler(m, wait_for(d.qacc, d))


def wait_for(done: jax.Array, d: mjx.Data) -> mjx.Data:
    """Makes the matrices of `d` depend on the accelerations `done` [nv], so that these are computed first.

    The values of the matrices do not change. `optimization_barrier` does not help, because XLA's CPU
    compiler drops it too early. If the first acceleration is NaN, the matrices become NaN. That world is
    broken anyway.
    """
    wait = jnp.where(jnp.isnan(done[0]), jnp.nan, 0.0).astype(done.dtype)
    return d.tree_replace({f"_impl.{name}": getattr(d._impl, name) + wait for name in ("M", "qLD", "efc_J")})
