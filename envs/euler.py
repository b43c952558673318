"""A step of MJX with Euler's integrator that ends on a CPU with many worlds, too.

XLA's CPU client starts every operation whose inputs are there, and jaxlib's LAPACK calls spread a large batch over XLA's threads and wait
for them in one of these. `mjx.step` factorises the damped mass matrix while its solver factorises the Hessian: with 2,048 halfcheetahs on
two cores each call held a thread and waited for the other for ever (mujoco-mjx 3.17, jaxlib 0.10.2). Here one follows the other.
"""

import jax
import jax.numpy as jnp
from mujoco import mjx


def step(m: mjx.Model, d: mjx.Data) -> mjx.Data:
    """`mjx.step` of a model with Euler's integrator."""
    d = mjx.forward(m, d)
    return mjx.euler(m, after(d.qacc, d))


def after(done: jax.Array, d: mjx.Data) -> mjx.Data:
    """`d`, of which no matrix can be had before the accelerations `done` [nv] are there.

    XLA's CPU compiler drops `optimization_barrier` too early for that. An acceleration that is no number spreads: that world is broken
    anyhow.
    """
    wait = jnp.where(jnp.isnan(done[0]), jnp.nan, 0.0).astype(done.dtype)
    return d.tree_replace({f"_impl.{name}": getattr(d._impl, name) + wait for name in ("M", "qLD", "efc_J")})
