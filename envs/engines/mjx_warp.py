"""MJX on NVIDIA Warp: all worlds in one call, with room for all contacts that they can have.

Warp keeps the contacts of all worlds in one array, and drops those that find no room there. MJX cannot make
this array large enough, because it does not know how many worlds there will be: a `vmap` adds them later.
`Worlds` takes the simulation of one world through any number of `vmap`s to one call for all worlds, and
makes the array there, with the room that they can need at most (`room`).

`put_model` refuses what Warp cannot run, or would run wrongly.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

NAMES = ("PLANE", "SPHERE", "CAPSULE", "ELLIPSOID", "CYLINDER", "BOX", "MESH")
TYPES = PLANE, SPHERE, CAPSULE, ELLIPSOID, CYLINDER, BOX, MESH = tuple(
    int(getattr(mujoco.mjtGeom, f"mjGEOM_{name}")) for name in NAMES
)
EQUALITY_ROWS = {  # constraint rows of an equality, by type
    int(mujoco.mjtEq.mjEQ_CONNECT): 3,
    int(mujoco.mjtEq.mjEQ_WELD): 6,
    int(mujoco.mjtEq.mjEQ_JOINT): 1,
    int(mujoco.mjtEq.mjEQ_TENDON): 1,
}
# The bits of Warp's `overflow` for something that was dropped: constraint rows, their non-zeros, pairs of
# geoms, contacts, convex pairs. The other bits say that a solver used all its iterations, which is no fault.
DROPPED = 0b11111


def put_model(model: mujoco.MjModel, varied: tuple[tuple[str, int], ...] = ()) -> Any:
    """The model for Warp. `varied` is that of the task's `Scene`.

    Raises ValueError with the reason if Warp cannot run the model, or would not run it as C MuJoCo does.
    """
    reason = unfit(model, varied)
    if reason is None:
        from mujoco import mjx

        from ooo_rl.envs.engines import warp_contacts

        warp_contacts.replace_theirs()
        try:
            return mjx.put_model(model, impl="warp").tree_replace({"opt._impl.warn_overflow": DROPPED})
        except (NotImplementedError, ValueError) as error:
            reason = f"Warp says: {error}"
    raise ValueError(f"mjx-warp cannot run this model: {reason}; choose mjx or mujoco")


def unfit(model: mujoco.MjModel, varied: tuple[tuple[str, int], ...] = ()) -> str | None:
    """Why Warp cannot run `model` in this process, or None."""
    if jax.config.jax_enable_x64:
        return "Warp computes in float32, but JAX_ENABLE_X64 asks for float64"
    if jax.default_backend() not in ("cpu", "gpu"):
        return f"Warp runs on NVIDIA's GPUs and on CPUs, not on {jax.default_backend()}"
    if model.nflex or not set(model.geom_type.tolist()) <= set(TYPES):
        return "how many contacts a height field, distance field or flex can have is not known here"
    pairs = [frozenset(pair) for pair in zip(model.pair_geom1.tolist(), model.pair_geom2.tolist())]
    for pair in pairs:
        if pairs.count(pair) > 1:
            names = " and ".join(model.geom(geom).name or str(geom) for geom in sorted(pair))
            return f"it lists the pair of the geoms {names} more than once, C counts it as often, Warp once"
    for field, row in varied:
        above = model.geom_bodyid if field.startswith("body_") else np.arange(model.ngeom)
        own = _below(model, row) if field.startswith("body_") else [row] * field.startswith("geom_")
        touching = (model.geom_contype | model.geom_conaffinity) > 0
        if (np.isin(above, own) & _static(model) & touching).any():
            return f"worlds differ in {field}[{row}], but Warp has static geoms at one place in all worlds"
    return None


def most_contacts(first: int, second: int) -> int:
    """The largest number of contacts that Warp makes of two geoms of these types.

    Source: collision_primitive.py and collision_convex.py of the mujoco_warp in MJX 3.17.
    """
    pair = {first, second}
    if SPHERE in pair or pair == {PLANE, ELLIPSOID}:
        return 1
    if CAPSULE in pair and pair <= {PLANE, CAPSULE, BOX}:
        return 2
    return 8 if BOX in pair and pair <= {PLANE, BOX} else 4


def room(model: mujoco.MjModel, device_model: Any) -> tuple[int, int]:
    """The largest numbers of contacts and of constraint rows that a world of `model` can have.

    Every two geoms that may touch count, with all contacts that their types can have. But a moving geom
    counts only as many static geoms as it can reach at once.
    """
    geoms = np.asarray(device_model._impl.nxn_geom_pair_filtered).reshape(-1, 2)
    listed = np.asarray(device_model._impl.nxn_pairid_filtered).reshape(-1, 2)[:, 0]  # row of a <pair>, or -1
    dims = np.where(listed < 0, model.geom_condim[geoms].max(1), 0)
    dims[listed >= 0] = model.pair_dim[listed[listed >= 0]]
    elliptic = model.opt.cone == mujoco.mjtCone.mjCONE_ELLIPTIC
    contacts = np.array([most_contacts(*types) for types in model.geom_type[geoms].tolist()], int)
    rows = contacts * np.where(dims == 1, 1, dims if elliptic else 2 * (dims - 1))

    fixed = (_static(model) & (model.geom_type != PLANE))[geoms] & (listed < 0)[:, None]
    apart = ~fixed.any(1)
    most = np.array([contacts[apart].sum(), rows[apart].sum()])
    for moving in set(geoms[fixed[:, ::-1]].tolist()):
        own = (fixed[:, ::-1] & (geoms == moving)).any(1)
        most += reached(model, moving, geoms[own][fixed[own]]) * np.array(
            [contacts[own].max(), rows[own].max()]
        )
    other = sum(EQUALITY_ROWS[kind] for kind in model.eq_type.tolist())
    other += int((model.dof_frictionloss > 0).sum() + (model.tendon_frictionloss > 0).sum())
    other += 2 * int(model.jnt_limited.sum() + model.tendon_limited.sum())
    return max(int(most[0]), 1), max(int(most[1]) + other, 1)


def reached(model: mujoco.MjModel, moving: int, fixed: np.ndarray) -> int:
    """How many of the static geoms `fixed` [n] the geom `moving` can reach at once, wherever it is."""
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    turn, box = data.geom_xmat[fixed].reshape(-1, 3, 3), model.geom_aabb[fixed]
    centre = data.geom_xpos[fixed] + np.einsum("nij,nj->ni", turn, box[:, :3])
    half = np.einsum("nij,nj->ni", np.abs(turn), box[:, 3:])
    # Warp compares boxes around geoms. The corners of the moving one are within 3**0.5 times its radius.
    margin = (model.geom_margin + model.geom_gap)[[moving, *fixed]]
    half += 2 * model.geom_rbound[moving] + margin[0] + margin[1:, None]
    return deepest(centre - half, centre + half)


def deepest(low: np.ndarray, high: np.ndarray) -> int:
    """The largest number of boxes with the corners `low` and `high` [n, k] that share a point."""
    if low.shape[1] == 0:
        return len(low)
    over = [(low[:, 0] <= x) & (x <= high[:, 0]) for x in set(low[:, 0])]
    return max(deepest(low[some, 1:], high[some, 1:]) for some in over)


class Worlds:
    """Simulates all worlds of a model in one call, whatever `vmap`s surround it."""

    def __init__(self, model: mujoco.MjModel, device_model: Any):
        from mujoco import mjx

        self.contacts, self.rows = room(model, device_model)
        self.blank = mjx.make_data(model, impl="warp", naconmax=self.contacts, njmax=self.rows)

    def __call__(self, one: Callable, *inputs: Any) -> Any:
        """The results of `one` for one world; under `vmap`, for every world.

        `one(data, *inputs)` returns (results, data): it puts its inputs into MJX's data and simulates. The
        results are NaN in worlds for which there was no room at the end of a step. So they count as broken,
        and Warp prints what was too small. `room` is meant to exclude this.
        """
        together = jax.custom_batching.custom_vmap(partial(self._together, one))
        together.def_vmap(partial(_flatten, together))
        return jax.tree.map(lambda x: x[0], together(*jax.tree.map(lambda x: x[None], inputs)))

    def _together(self, one: Callable, *inputs: Any) -> Any:
        """The results of n worlds; all leaves of `inputs` begin with an axis of n."""
        data = self.data(len(jax.tree.leaves(inputs)[0]))

        def sound(*inputs):
            results, after = one(data, *inputs)
            dropped = after._impl.overflow & DROPPED
            return jax.tree.map(lambda x: jnp.where(dropped, jnp.nan, x), results)

        return jax.vmap(sound)(*inputs)

    def data(self, worlds: int) -> Any:
        """MJX's data of one world, with room for the contacts of `worlds` worlds."""
        shared = {
            f"_impl.{name}": jnp.tile(x, (worlds,) + (1,) * (x.ndim - 1))
            for name, x in vars(self.blank._impl).items()
            if name.startswith("contact__")
        }
        total = worlds * self.contacts
        return self.blank.tree_replace(shared | {"_impl.naconmax": total, "_impl.naccdmax": total})


def _static(model: mujoco.MjModel) -> np.ndarray:
    """Whether each geom [ngeom] is fixed to the world, and no mocap body carries it."""
    body = model.geom_bodyid
    return (model.body_weldid[body] == 0) & (model.body_mocapid[model.body_rootid[body]] < 0)


def _below(model: mujoco.MjModel, body: int) -> list[int]:
    """The ids of `body` and of all bodies that hang from it."""
    found = [body]
    for child in range(body + 1, model.nbody):  # a child comes after its parent
        if model.body_parentid[child] in found:
            found.append(child)
    return found


def _flatten(together: Callable, size: int, batched: Any, *inputs: Any) -> tuple[Any, Any]:
    """What `vmap` makes of `together`: its axis and the axis of worlds become one."""
    full = jax.tree.map(
        lambda x, b: x if b else jnp.broadcast_to(x, (size, *x.shape)), inputs, tuple(batched)
    )
    results = together(*jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), full))
    results = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
    return results, jax.tree.map(lambda _: True, results)
