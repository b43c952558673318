"""MuJoCo's no-slip solver for MJX, which has none. It keeps objects that friction holds from slipping slowly.

MuJoCo's constraints are soft, and so is friction. Therefore an object held by friction slips slowly. A model
that sets `noslip_iterations` asks for a second solve. In it all forces except friction keep their values
from the first solve, and friction (in joints, and along the tangents of contacts) is as hard as its bounds
allow. C sweeps over the friction forces, one after another. This module uses Newton's method on the same
convex problem, in the space of accelerations. That is a dozen large operations; C's method would be
thousands of small ones on a device.
"""

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco import mjx
from mujoco.mjx._src import forward, sensor, smooth, solver, support

from ooo_rl.envs.engines import cholesky
from ooo_rl.envs.engines.euler import wait_for

# The softness of friction, relative to the inverse inertia it acts on. C has 0, the first solve about 0.1.
SOFTNESS = 1e-4
# With 10, in float32, the hammer's nail slid out again by up to 1 mm/s, and the episode lost its success.
ITERATIONS = 20
HALVINGS = 16  # of the interval that contains the best length of a Newton step


def step(m: mjx.Model, d: mjx.Data) -> mjx.Data:
    """`mjx.step` with the second solve, for models with Euler's integrator and pyramidal friction cones."""
    d = sensor.sensor_pos(m, forward.fwd_position(m, d))
    d = sensor.sensor_vel(m, forward.fwd_velocity(m, d))
    d = forward.fwd_acceleration(m, forward.fwd_actuation(m, d))
    d = solver.solve(m, d)
    first = d.qacc
    d = sensor.sensor_acc(m, hold(m, wait_for(first, d)))
    # The warm start must be the result of the first solve, because the next first solve begins with it.
    return mjx.euler(m, wait_for(d.qacc, d)).replace(qacc_warmstart=first)


def hold(m: mjx.Model, d: mjx.Data) -> mjx.Data:
    """The second solve: `d` after MJX's solver, with accelerations and constraint forces of hard friction."""
    rows, target, bound, force = friction(d)
    # `moved`: the accelerations that a unit force along each row causes.
    mass, moved = support.full_m(m, d), jax.vmap(lambda row: smooth.solve_m(m, d, row))(rows)
    soft = jnp.maximum(SOFTNESS * jnp.sum(rows * moved, 1), mujoco.mjMINVAL)
    qacc, alone = d.qacc, d.qacc - force @ moved  # `alone`: the accelerations without any friction

    def forces(slip):
        return -jnp.clip(slip / soft, -bound, bound)

    def newton(qacc, _):
        slip = rows @ qacc - target
        stiff = jnp.where(jnp.abs(slip) < soft * bound, 1 / soft, 0.0)
        pull = mass @ (qacc - alone)
        way = -cholesky.solve(cholesky.factor(mass + (rows.T * stiff) @ rows), pull - rows.T @ forces(slip))
        faster, pulled, curved = rows @ way, way @ pull, way @ mass @ way
        # The slope of the cost along the step. It never decreases with t.
        slope = lambda t: pulled + t * curved - forces(slip + t * faster) @ faster  # noqa: E731

        def halve(bounds, _):
            middle = (bounds[0] + bounds[1]) / 2
            return jnp.where(
                slope(middle) < 0, jnp.stack([middle, bounds[1]]), jnp.stack([bounds[0], middle])
            ), None

        bounds, _ = jax.lax.scan(halve, jnp.array([0.0, 1.0], qacc.dtype), None, HALVINGS)
        return qacc + jnp.where(slope(1.0) < 0, 1.0, bounds.mean()) * way, None

    qacc, _ = jax.lax.scan(newton, qacc, None, ITERATIONS)
    return d.replace(qacc=qacc, qfrc_constraint=mass @ qacc - d.qfrc_smooth)


def friction(d: mjx.Data) -> tuple[jax.Array, ...]:
    """All friction as k forces along rows of a Jacobian.

    Returns (rows [k, nv], the accelerations [k] along them at which nothing slips, bounds [k] of the forces,
    forces [k] of the first solve). Two opposite edges of a friction pyramid share the normal force: friction
    is the difference of their forces, divided by two, and its bound is their mean.
    """
    impl = d._impl
    joints = slice(impl.ne, impl.ne + impl.nf)
    first = [a + 2 * i for a, dim in zip(impl.contact.efc_address, impl.contact.dim) for i in range(dim - 1)]
    one, other = np.array(first, int), np.array(first, int) + 1
    press, pull = (
        (impl.efc_force[one] + impl.efc_force[other]) / 2,
        (impl.efc_force[one] - impl.efc_force[other]) / 2,
    )
    return (
        jnp.concatenate([impl.efc_J[joints], impl.efc_J[one] - impl.efc_J[other]]),
        jnp.concatenate([impl.efc_aref[joints], impl.efc_aref[one] - impl.efc_aref[other]]),
        jnp.concatenate([impl.efc_frictionloss[joints], press]),
        jnp.concatenate([impl.efc_force[joints], pull]),
    )
