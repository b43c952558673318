"""One MuJoCo model, several engines: MJX on the device, or C MuJoCo on the host's cores, behind two functions.

=========  =======================================================================================================
engine     where, and how exact
=========  =======================================================================================================
mjx        the device, in JAX's precision: float32, or float64 with JAX_ENABLE_X64; matrix products at full precision
mjx-warp   the device, by NVIDIA Warp (`pip install warp-lang`, CUDA); float32
mujoco     the host, in C, on all cores; float64, whatever JAX's precision
=========  =======================================================================================================

All are pure functions of a `Body`, so they vmap, scan and checkpoint alike. Behind `mujoco` stands one host call per step for
all worlds, however many `vmap`s surround it; its float64 state travels through JAX as raw 32-bit words, hence nothing is
rounded between steps. Task code reads `qpos`, `qvel`, `place` and `moved` (and `watched`, where its `Scene` names more), and is the
same for every engine.
"""

import importlib.util
import threading
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from flax import struct
from mujoco.batch import Batch, SimulationError

from envs.base import Task
from envs.contacts import exact_contacts

ENGINES = ("auto", "mjx", "mjx-warp", "mujoco")


@struct.dataclass
class Body:
    """The state of one world, as task code sees it.

    qpos [nq], qvel [nv]: generalised positions and velocities, MuJoCo's units (m, rad, s).
    place [k]: the root's position where the benchmark's rewards read it; moved [k]: how far it went in the last step, at the engine's
    own precision, which float32 positions far from the origin no longer give.
    inner: what the engine needs to go on exactly; no one else's business.
    scene [m], watched [w]: the numbers of this world that `Scene` names; None where a task has no scene. What is watched is of
    the same moment as `place`: the beginning of the last `timestep`, one integration stage behind qpos, as MuJoCo leaves it.
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
    """In what the worlds of one model differ, and what a task watches in them besides joints.

    varied: (field of the model, row) pairs, such as ("body_pos", 26): each world has its own values there, end to end in `Body.scene`.
    sites, bodies, sensors: names. `Body.watched` has the sites' positions [3] each, then the bodies' positions and quaternions [7] each,
    then the sensors' values.
    """

    varied: tuple[tuple[str, int], ...] = ()
    sites: tuple[str, ...] = ()
    bodies: tuple[str, ...] = ()
    sensors: tuple[str, ...] = ()

    def nominal(self, model: mujoco.MjModel) -> np.ndarray:
        """What the model itself has in the varied places [m]."""
        return np.concatenate([getattr(model, field)[row] for field, row in self.varied]) if self.varied else np.zeros(0)

    def rows(self, model: mujoco.MjModel) -> tuple[list[int], list[int], list[int]]:
        """Ids of the sites and bodies, and addresses of the sensors' values."""
        values = [np.arange(model.sensor(name).adr[0], model.sensor(name).adr[0] + model.sensor(name).dim[0]) for name in self.sensors]
        ids = [model.site(name).id for name in self.sites], [model.body(name).id for name in self.bodies]
        return *ids, [int(address) for sensor in values for address in sensor]

    def split(self, model: mujoco.MjModel, numbers: Any) -> list[tuple[str, int, Any]]:
        """(field, row, its values) of the numbers [..., m]."""
        sizes = [getattr(model, field).shape[1] for field, _ in self.varied]
        edges = np.cumsum([0, *sizes])
        return [(field, row, numbers[..., a:b]) for (field, row), a, b in zip(self.varied, edges, edges[1:])]


def alike(new: Any, old: Any) -> Any:
    """`new` in the types of `old`: under JAX_ENABLE_X64 MJX counts tendons with 64 bits after a step, and with 32 before."""
    return jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)


class Engine(Protocol):
    """What every engine offers, for one unbatched world."""

    model: mujoco.MjModel

    def begin(self, qpos: jax.Array, qvel: jax.Array, scene: jax.Array | None = None, watched: jax.Array | None = None) -> Body:
        """A world at rest in its history: no warm start, nothing moved yet.

        `scene` [m] is by default the model's own; `watched` [w] is computed where it is not given by who knows it already.
        """

    def step(self, body: Body, ctrl: jax.Array) -> Body:
        """The world after `frame_skip` steps of the model's `timestep`, under constant controls `ctrl` [nu]."""


class PhysicsTask(Task):
    """A task whose inner state is, or holds, a `Body` of a MuJoCo model.

    `root` names the body whose frame is the `place` (x, y); None takes the first coordinate of qpos, as the planar bodies' rewards do.
    """

    def __init__(
        self, model: mujoco.MjModel, frame_skip: int, physics: str = "auto", root: str | None = None, scene: Scene | None = None
    ):  # fmt: skip
        self.engine = make_engine(physics, model, frame_skip, root, scene)
        self.model, self.frame_skip = model, frame_skip
        self.dt = frame_skip * model.opt.timestep  # seconds of one environment step
        self.control_low, self.control_high = model.actuator_ctrlrange.T

    def control(self, action: jax.Array) -> jax.Array:
        """Actuator controls of an action in [-1, 1]: linear from bound to bound."""
        middle, half = (self.control_high + self.control_low) / 2, (self.control_high - self.control_low) / 2
        return jnp.asarray(middle) + jnp.asarray(half) * action

    def put(self, qpos: jax.Array, qvel: jax.Array) -> Body:
        """A body in the given state; the shapes are checked here, so that no engine meets wrong ones."""
        wanted = (self.model.nq,), (self.model.nv,)
        if (jnp.shape(qpos), jnp.shape(qvel)) != wanted:
            raise ValueError(
                f"{type(self).__name__} needs qpos {wanted[0]} and qvel {wanted[1]}, not {jnp.shape(qpos)} and {jnp.shape(qvel)}"
            )
        return self.engine.begin(jnp.asarray(qpos, float), jnp.asarray(qvel, float))

    def reset_to(self, qpos: jax.Array, qvel: jax.Array) -> Any:
        return self.begin(self.put(qpos, qvel))

    @property
    def action_size(self) -> int:
        return self.model.nu

    @property
    def backend(self) -> str:
        return self.engine.name


def resolve(physics: str) -> str:
    """The engine that `physics` means: auto is mjx on an accelerator and mujoco on a CPU, where it is 20 to 100 times as fast."""
    if physics not in ENGINES:
        raise ValueError(f"unknown physics {physics!r}; choose one of {', '.join(ENGINES)}")
    if physics == "auto":
        return "mujoco" if jax.default_backend() == "cpu" else "mjx"
    return physics


def make_engine(
    physics: str, model: mujoco.MjModel, frame_skip: int, root: str | None = None, scene: Scene | None = None
) -> Engine:  # fmt: skip
    """The engine `physics` (see `resolve`)."""
    physics = resolve(physics)
    if physics == "mujoco":
        return CEngine(model, frame_skip, root, scene)
    if physics == "mjx-warp" and importlib.util.find_spec("warp") is None:
        raise ValueError("the engine mjx-warp is not installed: pip install warp-lang==1.18.0 (it needs CUDA to be fast), or choose mjx")
    return MjxEngine(model, frame_skip, root, "warp" if physics == "mjx-warp" else "jax", scene)


class MjxEngine:
    """MJX. Only positions, velocities and the solver's warm start are carried; the rest of its data follows from them at each step."""

    def __init__(self, model: mujoco.MjModel, frame_skip: int, root: str | None, impl: str, scene: Scene | None = None):
        from mujoco import mjx

        self.model, self.frame_skip, self.mjx, self.impl, self.scene = model, frame_skip, mjx, impl, scene
        self.name = "mjx" if impl == "jax" else "mjx-warp"
        self.root = None if root is None else model.body(root).id
        with jax.ensure_compile_time_eval(), exact_contacts():  # an environment may be made while something else is traced
            self.device_model = mjx.put_model(model, impl=impl)
            self.blank = mjx.make_data(model, impl=impl)
        self.substep = mjx.step
        if impl == "jax" and model.opt.integrator == mujoco.mjtIntegrator.mjINT_EULER:
            from envs import euler, noslip

            self.substep = noslip.step if model.opt.noslip_iterations else euler.step  # MJX passes over this setting without a word

    def begin(self, qpos: jax.Array, qvel: jax.Array, scene: jax.Array | None = None, watched: jax.Array | None = None) -> Body:
        place = qpos[: 1 if self.root is None else 2]
        body = Body(qpos, qvel, place, jnp.zeros_like(place), jnp.zeros(self.model.nv, qvel.dtype))
        if self.scene is None:
            return body
        body = body.replace(scene=jnp.asarray(self.scene.nominal(self.model) if scene is None else scene, qpos.dtype))
        if watched is None:
            with jax.default_matmul_precision("highest"), exact_contacts():
                data = self.mjx.forward(self._world(body.scene), self.blank.replace(qpos=qpos, qvel=qvel))
            watched = self._watched(data)
        return body.replace(watched=jnp.asarray(watched, qpos.dtype))

    def step(self, body: Body, ctrl: jax.Array) -> Body:
        data = self.blank.replace(qpos=body.qpos, qvel=body.qvel, qacc_warmstart=body.inner, ctrl=ctrl.astype(body.qpos.dtype))
        world = self._world(body.scene)
        # TF32 products corrupt contacts, so the physics is computed at full precision, and nothing else.
        with jax.default_matmul_precision("highest"), exact_contacts():
            data, _ = jax.lax.scan(lambda d, _: (alike(self.substep(world, d), d), None), data, None, self.frame_skip)
        place = data.qpos[:1] if self.root is None else data.xpos[self.root, :2]
        after = Body(data.qpos, data.qvel, place, place - body.place, data.qacc_warmstart)
        return after if self.scene is None else after.replace(scene=body.scene, watched=self._watched(data))

    def _world(self, scene: jax.Array | None):
        """The model with one world's values in its varied places."""
        world = self.device_model
        for field, row, values in [] if scene is None else self.scene.split(self.model, scene):
            world = world.replace(**{field: getattr(world, field).at[row].set(values)})
        return world

    def _watched(self, data) -> jax.Array:
        sites, bodies, sensors = map(np.array, self.scene.rows(self.model))
        poses = [data.site_xpos[sites].reshape(-1)] if len(sites) else []
        poses += [jnp.concatenate([data.xpos[bodies], data.xquat[bodies]], 1).reshape(-1)] if len(bodies) else []
        return jnp.concatenate(poses + ([data.sensordata[sensors]] if len(sensors) else []))


class CEngine:
    """C MuJoCo. `Body.inner` holds the float64 numbers (qpos, qvel, warm start, place, scene) as uint32 words, low word first."""

    name = "mujoco"

    def __init__(self, model: mujoco.MjModel, frame_skip: int, root: str | None, scene: Scene | None = None):
        # A diverging world must show: MuJoCo would put it back to its start without a word.
        model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        self.model, self.frame_skip, self.scene = model, frame_skip, scene
        self.root = None if root is None else model.body(root).id
        self.sizes = (model.nq, model.nv, model.nv, 1 if root is None else 2, 0 if scene is None else len(scene.nominal(model)))
        rows = ((), (), ()) if scene is None else scene.rows(model)
        self.rows, self.num_watched = rows, 3 * len(rows[0]) + 7 * len(rows[1]) + len(rows[2])
        self.batches: dict[int, Batch] = {}
        self.lock = threading.Lock()  # devices of one host share the batches

    def begin(self, qpos: jax.Array, qvel: jax.Array, scene: jax.Array | None = None, watched: jax.Array | None = None) -> Body:
        place = qpos[: self.sizes[3]]
        numbers = jnp.concatenate([qpos, qvel, jnp.zeros_like(qvel), place])
        body = Body(qpos, qvel, place, jnp.zeros_like(place), _double_words(numbers))
        if self.scene is None:
            return body
        scene = jnp.asarray(self.scene.nominal(self.model) if scene is None else scene, qpos.dtype)
        words = jnp.concatenate([body.inner, _double_words(scene)])
        if watched is None:
            seen = jax.ShapeDtypeStruct((self.num_watched,), qpos.dtype)
            watched = jax.pure_callback(lambda words: self._look(words, qpos.dtype), seen, words, vmap_method="broadcast_all")
        return body.replace(inner=words, scene=scene, watched=jnp.asarray(watched, qpos.dtype))

    def step(self, body: Body, ctrl: jax.Array) -> Body:
        nq, nv, _, k, _ = self.sizes
        seen = jax.ShapeDtypeStruct((nq + nv + 2 * k + self.num_watched,), body.qpos.dtype)
        words = jax.ShapeDtypeStruct(body.inner.shape, jnp.uint32)
        # broadcast_all: every surrounding vmap adds an axis to one and the same call.
        inner, seen = jax.pure_callback(self._step, (words, seen), body.inner, ctrl, vmap_method="broadcast_all")
        qpos, qvel, place, moved, watched = jnp.split(seen, np.cumsum([nq, nv, k, k]))
        after = Body(qpos, qvel, place, moved, inner)
        return after if self.scene is None else after.replace(scene=body.scene, watched=watched)

    def _load(self, words: jax.Array) -> tuple[Batch, np.ndarray, np.ndarray]:
        """The batch for this many worlds, in the states that `words` tell; their places; and their numbers [n, .]."""
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
            self._watched(batch)  # what is bound before a call is there after it
            lost = []
            try:
                batch.step(nstep=self.frame_skip)
            except SimulationError as error:
                lost = error.ids
            qpos, qvel = batch.bind("qpos"), batch.bind("qvel")
            place = qpos[:, :1] if xpos is None else xpos[:, self.root, :2]
            new = np.concatenate([qpos, qvel, batch.bind("qacc_warmstart"), place, old[:, len(old[0]) - m :]], 1)
            watched = self._watched(batch)
        new[lost] = np.nan  # a world that MuJoCo gives up is a broken one, not an error of all others
        place = new[:, nq + 2 * nv :][:, :k]
        seen = np.concatenate([new[:, : nq + nv], place, place - start, watched], 1).astype(dtype)
        return new.view(np.uint32).reshape(*shape, -1), seen.reshape(*shape, -1)

    def _look(self, words: jax.Array, dtype) -> np.ndarray:
        """What is watched in the states of `words`, before any step."""
        with self.lock:
            batch, _, _ = self._load(words)
            self._watched(batch)
            batch.forward()
            return self._watched(batch).astype(dtype).reshape(*words.shape[:-1], -1)

    def _watched(self, batch: Batch) -> np.ndarray:
        sites, bodies, sensors = self.rows
        parts = [np.zeros((batch.nsim, 0))]
        parts += [batch.bind("site_xpos")[:, sites]] if sites else []
        parts += [np.concatenate([batch.bind("xpos")[:, bodies], batch.bind("xquat")[:, bodies]], 2)] if bodies else []
        parts += [batch.bind("sensordata")[:, sensors]] if sensors else []
        return np.concatenate([part.reshape(batch.nsim, -1) for part in parts], 1)


def _double_words(x: jax.Array) -> jax.Array:
    """The float64 values of `x` [n] as uint32 words [2 n], low word first, by its bits: JAX need not know float64 for it."""
    if x.dtype == jnp.float64:
        return jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign, exponent, mantissa = (bits >> 31) << 31, (bits >> 23) & 0xFF, bits & 0x7FFFFF
    # Exponents are biased by 127 and 1023; zeros (and float32's denormals, which count as zeros) and infinities keep theirs.
    wide = jnp.where(exponent == 0, 0, jnp.where(exponent == 255, 2047, exponent + 896))
    mantissa = jnp.where(exponent == 0, 0, mantissa)
    return jnp.stack([mantissa << 29, sign | (wide << 20) | (mantissa >> 3)], axis=-1).reshape(-1)
