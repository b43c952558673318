"""MuJoCo's no-slip solver for MJX, which has none: what is held by friction stays where it is instead of creeping.

MuJoCo's constraints are soft, friction too, so that a thing held by it slides slowly. A model that sets `noslip_iterations` asks for a
second solve, in which all forces but friction stay as the first one found them, and friction (in joints, and in contacts along their
tangents) is as hard as its bounds allow. C makes sweeps over one friction force after the other. Here it is Newton's method on the same
convex problem in the space of accelerations: a dozen large operations, where a device would have to make thousands of small ones.
"""

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx
from mujoco.mjx._src import forward, sensor, smooth, solver, support

from envs.euler import after

SOFTNESS = 1e-4  # of friction, relative to the inverse inertia that it acts on; C has 0, the first solve about 0.1
ITERATIONS = 20  # with 10, in float32, the hammer's nail slid out again by up to 1 mm/s, and with it the episode's success
HALVINGS = 16  # of the interval in which the best length of a Newton step lies


def step(m: mjx.Model, d: mjx.Data) -> mjx.Data:
    """`mjx.step` of a model with Euler's integrator and pyramidal friction cones, with the second solve."""
    d = sensor.sensor_pos(m, forward.fwd_position(m, d))
    d = sensor.sensor_vel(m, forward.fwd_velocity(m, d))
    d = forward.fwd_acceleration(m, forward.fwd_actuation(m, d))
    d = solver.solve(m, d)
    first = d.qacc
    d = sensor.sensor_acc(m, hold(m, after(first, d)))
    return mjx.euler(m, after(d.qacc, d)).replace(qacc_warmstart=first)  # of the first solve, which begins with it


def hold(m: mjx.Model, d: mjx.Data) -> mjx.Data:
    """`d` after MJX's solver, with the accelerations and constraint forces of hard friction."""
    rows, target, bound, force = friction(d)
    mass, moved = support.full_m(m, d), jax.vmap(lambda row: smooth.solve_m(m, d, row))(rows)  # the latter by a unit force along each row
    soft = jnp.maximum(SOFTNESS * jnp.sum(rows * moved, 1), mujoco.mjMINVAL)
    qacc, alone = d.qacc, d.qacc - force @ moved  # what all other forces would make of it

    def forces(slip):
        return -jnp.clip(slip / soft, -bound, bound)

    def newton(qacc, _):
        slip = rows @ qacc - target
        stiff = jnp.where(jnp.abs(slip) < soft * bound, 1 / soft, 0.0)
        pull = mass @ (qacc - alone)
        way = -jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(mass + (rows.T * stiff) @ rows), pull - rows.T @ forces(slip))
        faster, pulled, curved = rows @ way, way @ pull, way @ mass @ way
        slope = lambda t: pulled + t * curved - forces(slip + t * faster) @ faster  # noqa: E731, of the cost along the way: it only grows

        def halve(bounds, _):
            middle = (bounds[0] + bounds[1]) / 2
            return jnp.where(slope(middle) < 0, jnp.stack([middle, bounds[1]]), jnp.stack([bounds[0], middle])), None

        bounds, _ = jax.lax.scan(halve, jnp.array([0.0, 1.0], qacc.dtype), None, HALVINGS)
        return qacc + jnp.where(slope(1.0) < 0, 1.0, bounds.mean()) * way, None

    qacc, _ = jax.lax.scan(newton, qacc, None, ITERATIONS)
    return d.replace(qacc=qacc, qfrc_constraint=mass @ qacc - d.qfrc_smooth)


def friction(d: mjx.Data) -> tuple[jax.Array, ...]:
    """Friction as forces along rows: (rows [k, nv], accelerations [k] at which each slips no more, bounds [k], forces [k] so far).

    A pyramid's two opposite edges share what presses them; friction is the difference, and at most all of it.
    """
    impl = d._impl
    joints = slice(impl.ne, impl.ne + impl.nf)
    first = [a + 2 * i for a, dim in zip(impl.contact.efc_address, impl.contact.dim) for i in range(dim - 1)]
    one, other = np.array(first, int), np.array(first, int) + 1
    press, pull = (impl.efc_force[one] + impl.efc_force[other]) / 2, (impl.efc_force[one] - impl.efc_force[other]) / 2
    return (
        jnp.concatenate([impl.efc_J[joints], impl.efc_J[one] - impl.efc_J[other]]),
        jnp.concatenate([impl.efc_aref[joints], impl.efc_aref[one] - impl.efc_aref[other]]),
        jnp.concatenate([impl.efc_frictionloss[joints], press]),
        jnp.concatenate([impl.efc_force[joints], pull]),
    )
