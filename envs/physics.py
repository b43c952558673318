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
rounded between steps. Task code reads `qpos`, `qvel`, `place` and `moved`, and is the same for every engine.
"""

import importlib.util
import threading
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
    """

    qpos: jax.Array
    qvel: jax.Array
    place: jax.Array
    moved: jax.Array
    inner: Any


class Engine(Protocol):
    """What every engine offers, for one unbatched world."""

    model: mujoco.MjModel

    def begin(self, qpos: jax.Array, qvel: jax.Array) -> Body:
        """A world at rest in its history: no warm start, nothing moved yet."""

    def step(self, body: Body, ctrl: jax.Array) -> Body:
        """The world after `frame_skip` steps of the model's `timestep`, under constant controls `ctrl` [nu]."""


class PhysicsTask(Task):
    """A task whose inner state is, or holds, a `Body` of a MuJoCo model.

    `root` names the body whose frame is the `place` (x, y); None takes the first coordinate of qpos, as the planar bodies' rewards do.
    """

    def __init__(self, model: mujoco.MjModel, frame_skip: int, physics: str = "auto", root: str | None = None):
        self.engine = make_engine(physics, model, frame_skip, root)
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


def make_engine(physics: str, model: mujoco.MjModel, frame_skip: int, root: str | None = None) -> Engine:
    """The engine `physics`; auto is mjx on an accelerator and mujoco on a CPU, where it is 20 to 100 times as fast."""
    if physics not in ENGINES:
        raise ValueError(f"unknown physics {physics!r}; choose one of {', '.join(ENGINES)}")
    if physics == "auto":
        physics = "mujoco" if jax.default_backend() == "cpu" else "mjx"
    if physics == "mujoco":
        return CEngine(model, frame_skip, root)
    if physics == "mjx-warp" and importlib.util.find_spec("warp") is None:
        raise ValueError("the engine mjx-warp is not installed: pip install warp-lang==1.18.0 (it needs CUDA to be fast), or choose mjx")
    return MjxEngine(model, frame_skip, root, "warp" if physics == "mjx-warp" else "jax")


class MjxEngine:
    """MJX. Only positions, velocities and the solver's warm start are carried; the rest of its data follows from them at each step."""

    def __init__(self, model: mujoco.MjModel, frame_skip: int, root: str | None, impl: str):
        from mujoco import mjx

        self.model, self.frame_skip, self.mjx, self.impl = model, frame_skip, mjx, impl
        self.name = "mjx" if impl == "jax" else "mjx-warp"
        self.root = None if root is None else model.body(root).id
        with jax.ensure_compile_time_eval():  # an environment may be made while something else is traced
            self.device_model = mjx.put_model(model, impl=impl)
            self.blank = mjx.make_data(model, impl=impl)

    def begin(self, qpos: jax.Array, qvel: jax.Array) -> Body:
        place = qpos[: 1 if self.root is None else 2]
        return Body(qpos, qvel, place, jnp.zeros_like(place), jnp.zeros(self.model.nv, qvel.dtype))

    def step(self, body: Body, ctrl: jax.Array) -> Body:
        data = self.blank.replace(qpos=body.qpos, qvel=body.qvel, qacc_warmstart=body.inner, ctrl=ctrl.astype(body.qpos.dtype))
        # TF32 products corrupt contacts, so the physics is computed at full precision, and nothing else.
        with jax.default_matmul_precision("highest"), exact_contacts():
            data, _ = jax.lax.scan(lambda d, _: (self.mjx.step(self.device_model, d), None), data, None, self.frame_skip)
        place = data.qpos[:1] if self.root is None else data.xpos[self.root, :2]
        return Body(data.qpos, data.qvel, place, place - body.place, data.qacc_warmstart)


class CEngine:
    """C MuJoCo. `Body.inner` holds the float64 numbers (qpos, qvel, warm start, place) as uint32 words, low word first."""

    name = "mujoco"

    def __init__(self, model: mujoco.MjModel, frame_skip: int, root: str | None):
        # A diverging world must show: MuJoCo would put it back to its start without a word.
        model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        self.model, self.frame_skip = model, frame_skip
        self.root = None if root is None else model.body(root).id
        self.sizes = (model.nq, model.nv, model.nv, 1 if root is None else 2)
        self.batches: dict[int, Batch] = {}
        self.lock = threading.Lock()  # devices of one host share the batches

    def begin(self, qpos: jax.Array, qvel: jax.Array) -> Body:
        place = qpos[: self.sizes[3]]
        numbers = jnp.concatenate([qpos, qvel, jnp.zeros_like(qvel), place])
        return Body(qpos, qvel, place, jnp.zeros_like(place), _double_words(numbers))

    def step(self, body: Body, ctrl: jax.Array) -> Body:
        nq, nv, _, k = self.sizes
        seen = jax.ShapeDtypeStruct((nq + nv + 2 * k,), body.qpos.dtype)
        words = jax.ShapeDtypeStruct(body.inner.shape, jnp.uint32)
        # broadcast_all: every surrounding vmap adds an axis to one and the same call.
        inner, seen = jax.pure_callback(self._step, (words, seen), body.inner, ctrl, vmap_method="broadcast_all")
        return Body(*jnp.split(seen, [nq, nq + nv, nq + nv + k]), inner)

    def _step(self, words: jax.Array, ctrl: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        dtype, shape = ctrl.dtype, ctrl.shape[:-1]
        old = np.ascontiguousarray(np.asarray(words)).view(np.float64).reshape(-1, sum(self.sizes))
        ctrl = np.asarray(ctrl).reshape(len(old), -1)
        nq, nv, _, k = self.sizes
        with self.lock:
            if len(old) not in self.batches:
                self.batches[len(old)] = Batch(self.model, len(old))
            batch = self.batches[len(old)]
            batch.bind("qpos")[:], batch.bind("qvel")[:], batch.bind("qacc_warmstart")[:], start = np.split(
                old, [nq, nq + nv, nq + 2 * nv], 1
            )
            batch.bind("ctrl")[:] = ctrl
            xpos = None if self.root is None else batch.bind("xpos")
            lost = []
            try:
                batch.step(nstep=self.frame_skip)
            except SimulationError as error:
                lost = error.ids
            qpos, qvel = batch.bind("qpos"), batch.bind("qvel")
            place = qpos[:, :1] if xpos is None else xpos[:, self.root, :2]
            new = np.concatenate([qpos, qvel, batch.bind("qacc_warmstart"), place], 1)
        new[lost] = np.nan  # a world that MuJoCo gives up is a broken one, not an error of all others
        seen = np.concatenate([new[:, : nq + nv], new[:, -k:], new[:, -k:] - start], 1).astype(dtype)
        return new.view(np.uint32).reshape(*shape, -1), seen.reshape(*shape, -1)


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
