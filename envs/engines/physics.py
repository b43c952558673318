"""Several engines for one MuJoCo model: MJX on the device, or C MuJoCo on the host's cores.

========  =================================================================================================
engine    place and precision
========  =================================================================================================
mjx       the device; JAX's precision: float32, or float64 with JAX_ENABLE_X64; full-precision products
mjx-warp  the device, through NVIDIA Warp (`pip install warp-lang`, CUDA); float32
mujoco    the host, in C, on all cores; float64, whatever JAX's precision
========  =================================================================================================

Every engine has two pure functions, `begin` and `step`, over a `Body`. So all of them work under `vmap` and
`scan`, and in checkpoints. A step of `mujoco` is one host call for all worlds, no matter how many `vmap`s
surround it. Its float64 state goes through JAX as 32-bit words, so nothing is rounded between steps. Task
code is the same for every engine. It reads `qpos`, `qvel`, `place` and `moved`, and `watched` if its `Scene`
names more.
"""

import contextlib
import importlib.util
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from flax import struct
from mujoco.batch import Batch, SimulationError

from ooo_rl.envs.engines import host, mjx_warp
from ooo_rl.envs.engines.contacts import exact_contacts
from ooo_rl.envs.engines.solver import lean_solver

ENGINES = ("auto", "mjx", "mjx-warp", "mujoco")


@struct.dataclass
class Body:
    """The state of one world, as task code sees it.

    qpos [nq], qvel [nv]: generalised positions and velocities, in MuJoCo's units (m, rad, s).

    place [k]: the root's position in metres, as the benchmark's rewards read it; x (k = 1), or x and y (k =
    2).

    moved [k]: the root's displacement in the last step, in metres. It has the engine's own precision. Far
    from the origin, a difference of float32 positions would be less precise.

    inner: what the engine needs to continue exactly. Only the engine reads it.

    scene [m], watched [w]: the numbers that `Scene` names, in this world. Both are None if the task has no
    scene. Watched values belong to the beginning of the last `timestep`, where MuJoCo leaves them, one
    integration stage before qpos. So does `place` if the task has a root body.
    """

    qpos: jax.Array
    qvel: jax.Array
    place: jax.Array
    moved: jax.Array
    inner: Any
    scene: Any = None
    watched: Any = None


@dataclass(frozen=True)
class Scene:
    """How the worlds of one model differ, and what a task observes in them besides joints.

    varied: pairs (field of the model, row), such as ("body_pos", 26). Each world has its own values there;
    `Body.scene` is their concatenation.

    sites, bodies, sensors: names. `Body.watched` concatenates the sites' positions [3] each, the bodies'
    positions and quaternions [7] each, and the sensors' values.
    """

    varied: tuple[tuple[str, int], ...] = ()
    sites: tuple[str, ...] = ()
    bodies: tuple[str, ...] = ()
    sensors: tuple[str, ...] = ()

    def nominal(self, model: mujoco.MjModel) -> np.ndarray:
        """The model's own values [m] in the varied places."""
        return (
            np.concatenate([getattr(model, field)[row] for field, row in self.varied])
            if self.varied
            else np.zeros(0)
        )

    def rows(self, model: mujoco.MjModel) -> tuple[list[int], list[int], list[int]]:
        """The ids of the sites and of the bodies, and the addresses of the sensors' values."""
        values = [
            np.arange(model.sensor(name).adr[0], model.sensor(name).adr[0] + model.sensor(name).dim[0])
            for name in self.sensors
        ]
        ids = [model.site(name).id for name in self.sites], [model.body(name).id for name in self.bodies]
        return *ids, [int(address) for sensor in values for address in sensor]

    def split(self, model: mujoco.MjModel, numbers: Any) -> list[tuple[str, int, Any]]:
        """Splits `numbers` [..., m] into (field, row, values), one for each pair of `varied`."""
        sizes = [getattr(model, field).shape[1] for field, _ in self.varied]
        edges = np.cumsum([0, *sizes])
        return [(field, row, numbers[..., a:b]) for (field, row), a, b in zip(self.varied, edges, edges[1:])]


def cast_like(new: Any, old: Any) -> Any:
    """`new` with the dtypes of `old`, for `scan`.

    With JAX_ENABLE_X64, MJX's count of tendons has 32 bits before a step and 64 bits after it.
    """
    return jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)


class Engine(Protocol):
    """The interface of every engine, for one unbatched world."""

    model: mujoco.MjModel

    def begin(
        self,
        qpos: jax.Array,
        qvel: jax.Array,
        scene: jax.Array | None = None,
        watched: jax.Array | None = None,
    ) -> Body:
        """A new world at `qpos` [nq], `qvel` [nv]. It has no warm start, and `moved` is 0.

        `scene` [m] is the model's own by default. The engine computes `watched` [w] unless it is given.
        """

    def step(self, body: Body, ctrl: jax.Array) -> Body:
        """The world after `frame_skip` steps of the model's `timestep`. Controls `ctrl` [nu] are constant."""


def resolve(physics: str) -> str:
    """The name of the engine that `physics` means. Raises ValueError for unknown names.

    "auto" is mjx on an accelerator, and mujoco on a CPU, where it is 20 to 100 times as fast as mjx.
    """
    if physics not in ENGINES:
        raise ValueError(f"unknown physics {physics!r}; choose one of {', '.join(ENGINES)}")
    if physics == "auto":
        return "mujoco" if jax.default_backend() == "cpu" else "mjx"
    return physics


def make_engine(
    physics: str, model: mujoco.MjModel, frame_skip: int, root: str | None = None, scene: Scene | None = None
) -> Engine:
    """Builds the engine `physics` (see `resolve`).

    Raises ValueError if it is unknown or not installed, or if it cannot carry the state of `model`. `root`
    names the body whose position (x, y) is `Body.place`; with None, `place` is qpos[:1].
    """
    physics = resolve(physics)
    if model.na:
        raise ValueError(
            f"the model has {model.na} actuator activations (filters, muscles, integrated set-points), a "
            "part of its state that no engine here carries; give its actuators no dynamics"
        )
    if physics == "mujoco":
        return CEngine(model, frame_skip, root, scene)
    if physics == "mjx-warp" and importlib.util.find_spec("warp") is None:
        raise ValueError(
            "the engine mjx-warp is not installed: pip install warp-lang==1.18.0 (it needs CUDA to be fast), "
            "or choose mjx"
        )
    return MjxEngine(model, frame_skip, root, "warp" if physics == "mjx-warp" else "jax", scene)


@contextlib.contextmanager
def our_mjx() -> Iterator[None]:
    """While a function is traced: MJX with C's contacts, a solver that ends early, and exact products."""
    # TF32 products corrupt contacts. So the physics, and nothing else, is computed at full precision.
    with jax.default_matmul_precision("highest"), exact_contacts(), lean_solver():
        yield


class MjxEngine:
    """MJX. `Body.inner` is the solver's warm start [nv].

    Positions, velocities and the warm start are enough: each step computes the rest of MJX's data from them.
    """

    def __init__(
        self, model: mujoco.MjModel, frame_skip: int, root: str | None, impl: str, scene: Scene | None = None
    ):
        from mujoco import mjx

        self.model, self.frame_skip, self.mjx, self.impl, self.scene = model, frame_skip, mjx, impl, scene
        self.name = "mjx" if impl == "jax" else "mjx-warp"
        self.root = None if root is None else model.body(root).id
        # `ensure_compile_time_eval`, because an environment may be made while a function is traced.
        with jax.ensure_compile_time_eval(), exact_contacts():
            if impl == "warp":
                self.device_model = mjx_warp.put_model(model, () if scene is None else scene.varied)
                self.run = mjx_warp.Worlds(model, self.device_model)
            else:
                self.device_model, blank = mjx.put_model(model, impl=impl), mjx.make_data(model, impl=impl)
                self.run = lambda one, *inputs: one(blank, *inputs)[0]
        self.substep = mjx.step
        if impl == "jax" and model.opt.integrator == mujoco.mjtIntegrator.mjINT_EULER:
            from ooo_rl.envs.engines import euler, noslip

            # MJX ignores `noslip_iterations` without a warning.
            self.substep = noslip.step if model.opt.noslip_iterations else euler.step

    def begin(
        self,
        qpos: jax.Array,
        qvel: jax.Array,
        scene: jax.Array | None = None,
        watched: jax.Array | None = None,
    ) -> Body:
        place = qpos[: 1 if self.root is None else 2]
        body = Body(qpos, qvel, place, jnp.zeros_like(place), jnp.zeros(self.model.nv, qvel.dtype))
        if self.scene is None:
            return body
        body = body.replace(
            scene=jnp.asarray(self.scene.nominal(self.model) if scene is None else scene, qpos.dtype)
        )
        if watched is None:
            watched = self.run(self._look, qpos, qvel, body.scene)
        return body.replace(watched=jnp.asarray(watched, qpos.dtype))

    def step(self, body: Body, ctrl: jax.Array) -> Body:
        ctrl = ctrl.astype(body.qpos.dtype)
        qpos, qvel, warmstart, place, watched = self.run(
            self._steps, body.qpos, body.qvel, body.inner, ctrl, body.scene
        )
        return Body(qpos, qvel, place, place - body.place, warmstart, body.scene, watched)

    def _steps(self, data, qpos, qvel, warmstart, ctrl, scene):
        """`frame_skip` steps of one world: ((qpos, qvel, warm start, place, watched), MJX's data)."""
        data = data.replace(qpos=qpos, qvel=qvel, qacc_warmstart=warmstart, ctrl=ctrl)
        world = self._world(scene)
        with our_mjx():
            data, _ = jax.lax.scan(
                lambda d, _: (cast_like(self.substep(world, d), d), None), data, None, self.frame_skip
            )
        place = data.qpos[:1] if self.root is None else data.xpos[self.root, :2]
        watched = None if scene is None else self._watched(data)
        return (data.qpos, data.qvel, data.qacc_warmstart, place, watched), data

    def _look(self, data, qpos, qvel, scene):
        """(The watched values of one world before any step, MJX's data)."""
        with our_mjx():
            data = self.mjx.forward(self._world(scene), data.replace(qpos=qpos, qvel=qvel))
        return self._watched(data), data

    def _world(self, scene: jax.Array | None):
        """The model, with the values `scene` [m] of one world in its varied places."""
        world = self.device_model
        for field, row, values in [] if scene is None else self.scene.split(self.model, scene):
            world = world.replace(**{field: getattr(world, field).at[row].set(values)})
        return world

    def _watched(self, data) -> jax.Array:
        sites, bodies, sensors = map(np.array, self.scene.rows(self.model))
        poses = [data.site_xpos[sites].reshape(-1)] if len(sites) else []
        poses += (
            [jnp.concatenate([data.xpos[bodies], data.xquat[bodies]], 1).reshape(-1)] if len(bodies) else []
        )
        return jnp.concatenate(poses + ([data.sensordata[sensors]] if len(sensors) else []))


class CEngine:
    """C MuJoCo. `Body.inner` is its float64 state as uint32 words, low word first.

    The state consists of qpos, qvel, warm start, place and scene, in this order.
    """

    name = "mujoco"

    def __init__(self, model: mujoco.MjModel, frame_skip: int, root: str | None, scene: Scene | None = None):
        # MuJoCo would reset a diverging world without a warning. Divergence must be seen.
        model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        self.model, self.frame_skip, self.scene = model, frame_skip, scene
        self.root = None if root is None else model.body(root).id
        self.sizes = (
            model.nq,
            model.nv,
            model.nv,
            1 if root is None else 2,
            0 if scene is None else len(scene.nominal(model)),
        )
        rows = ((), (), ()) if scene is None else scene.rows(model)
        self.rows, self.num_watched = rows, 3 * len(rows[0]) + 7 * len(rows[1]) + len(rows[2])
        self.batches: dict[int, Batch] = {}
        self.lock = threading.Lock()  # all devices of a host share the batches

    def begin(
        self,
        qpos: jax.Array,
        qvel: jax.Array,
        scene: jax.Array | None = None,
        watched: jax.Array | None = None,
    ) -> Body:
        place = qpos[: self.sizes[3]]
        numbers = jnp.concatenate([qpos, qvel, jnp.zeros_like(qvel), place])
        body = Body(qpos, qvel, place, jnp.zeros_like(place), _double_words(numbers))
        if self.scene is None:
            return body
        scene = jnp.asarray(self.scene.nominal(self.model) if scene is None else scene, qpos.dtype)
        words = jnp.concatenate([body.inner, _double_words(scene)])
        if watched is None:
            seen = jax.ShapeDtypeStruct((self.num_watched,), qpos.dtype)
            (watched,) = host.call(lambda words: (self._look(words, qpos.dtype),), (seen,), words)
        return body.replace(inner=words, scene=scene, watched=jnp.asarray(watched, qpos.dtype))

    def step(self, body: Body, ctrl: jax.Array) -> Body:
        nq, nv, _, k, _ = self.sizes
        seen = jax.ShapeDtypeStruct((nq + nv + 2 * k + self.num_watched,), body.qpos.dtype)
        words = jax.ShapeDtypeStruct(body.inner.shape, jnp.uint32)
        inner, seen = host.call(self._step, (words, seen), body.inner, ctrl)
        qpos, qvel, place, moved, watched = jnp.split(seen, np.cumsum([nq, nv, k, k]))
        after = Body(qpos, qvel, place, moved, inner)
        return after if self.scene is None else after.replace(scene=body.scene, watched=watched)

    def _load(self, words: jax.Array) -> tuple[Batch, np.ndarray, np.ndarray]:
        """Loads the states of n worlds, given as `words`, into a batch of n worlds.

        Returns (the batch, the worlds' places [n, k], their states as float64 [n, .]).
        """
        numbers = np.ascontiguousarray(np.asarray(words)).view(np.float64).reshape(-1, sum(self.sizes))
        if len(numbers) not in self.batches:
            self.batches[len(numbers)] = Batch(self.model, len(numbers))
        batch = self.batches[len(numbers)]
        qpos, qvel, warmstart, place, scene = np.split(numbers, np.cumsum(self.sizes)[:-1], 1)
        batch.bind("qpos")[:], batch.bind("qvel")[:], batch.bind("qacc_warmstart")[:] = qpos, qvel, warmstart
        for field, row, values in [] if self.scene is None else self.scene.split(self.model, scene):
            batch.expand(field)[:, row] = values
        return batch, place, numbers

    def _step(self, words: jax.Array, ctrl: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        dtype, shape = ctrl.dtype, ctrl.shape[:-1]
        nq, nv, _, k, m = self.sizes
        with self.lock:
            batch, start, old = self._load(words)
            batch.bind("ctrl")[:] = np.asarray(ctrl).reshape(len(old), -1)
            xpos = None if self.root is None else batch.bind("xpos")
            self._watched(batch)  # arrays must be bound before a step, to be filled by it
            lost = []
            try:
                batch.step(nstep=self.frame_skip)
            except SimulationError as error:
                lost = error.ids
            qpos, qvel = batch.bind("qpos"), batch.bind("qvel")
            place = qpos[:, :1] if xpos is None else xpos[:, self.root, :2]
            new = np.concatenate(
                [qpos, qvel, batch.bind("qacc_warmstart"), place, old[:, len(old[0]) - m :]], 1
            )
            watched = self._watched(batch)
        new[lost] = np.nan  # a world that MuJoCo gives up is broken; the others go on
        place = new[:, nq + 2 * nv :][:, :k]
        seen = np.concatenate([new[:, : nq + nv], place, place - start, watched], 1).astype(dtype)
        return new.view(np.uint32).reshape(*shape, -1), seen.reshape(*shape, -1)

    def _look(self, words: jax.Array, dtype) -> np.ndarray:
        """The watched values of the states `words`, before any step."""
        with self.lock:
            batch, _, _ = self._load(words)
            self._watched(batch)
            batch.forward()
            return self._watched(batch).astype(dtype).reshape(*words.shape[:-1], -1)

    def _watched(self, batch: Batch) -> np.ndarray:
        sites, bodies, sensors = self.rows
        parts = [np.zeros((batch.nsim, 0))]
        parts += [batch.bind("site_xpos")[:, sites]] if sites else []
        parts += (
            [np.concatenate([batch.bind("xpos")[:, bodies], batch.bind("xquat")[:, bodies]], 2)]
            if bodies
            else []
        )
        parts += [batch.bind("sensordata")[:, sensors]] if sensors else []
        return np.concatenate([part.reshape(batch.nsim, -1) for part in parts], 1)


def _double_words(x: jax.Array) -> jax.Array:
    """The values of `x` [n] in float64, as uint32 words [2 n], low word first.

    The words are computed from the bits of `x`, so JAX_ENABLE_X64 is not needed.
    """
    if x.dtype == jnp.float64:
        return jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign, exponent, mantissa = (bits >> 31) << 31, (bits >> 23) & 0xFF, bits & 0x7FFFFF
    # The biases of the exponents are 127 and 1023. Zeros and infinities keep their special exponents.
    # float32's denormals count as zeros.
    wide = jnp.where(exponent == 0, 0, jnp.where(exponent == 255, 2047, exponent + 896))
    mantissa = jnp.where(exponent == 0, 0, mantissa)
    return jnp.stack([mantissa << 29, sign | (wide << 20) | (mantissa >> 3)], axis=-1).reshape(-1)
