"""D4RL's locomotion tasks (halfcheetah, hopper, walker2d, ant), and the sparse tasks of OOO's appendix.

The models are the XML files that Gymnasium ships. Rewards and terminations are those of Gym's v2 tasks, with
which D4RL's data were recorded; Gymnasium's v4 tasks agree with them. Two points about the models:

* Contact margins are halved (hopper, ant). Before MuJoCo 3.5, a contact used the larger margin of its two
  geoms; since 3.5 it uses their sum. All geoms of a model have the same margin, so half of it gives each pair
  the margin that it had when the data were recorded.
* The walker is `walker2d.xml`, not `walker2d_v5.xml`. Its right foot has a friction of 0.9, as in the data;
  v5 has 1.9.

The ant is observed without contact forces. Gym's v2 observed 84 of them, but all were 0 in D4RL's data, and
the loader drops them.
"""

import pathlib

import gymnasium
import jax
import jax.numpy as jnp
import mujoco
from flax import struct

from ooo_rl.envs.physics_task import Body, PhysicsTask

ASSETS = pathlib.Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"


def load_spec(file: str | pathlib.Path) -> mujoco.MjSpec:
    """Loads an editable model from Gymnasium's assets, or from a path.

    Raises ValueError, with MuJoCo's reason, if MuJoCo cannot load the file.
    """
    path = ASSETS / file
    try:
        return mujoco.MjSpec.from_file(str(path))
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: MuJoCo refuses this model ({reason}); if the file is Gymnasium's, reinstall gymnasium"
        ) from None


def compile_spec(spec: mujoco.MjSpec) -> mujoco.MjModel:
    """Compiles `spec`, with the contact margins that MuJoCo had before 3.5 (see the module docstring).

    Raises ValueError if the geoms of `spec` have different margins.
    """
    # `settotalmass` is deprecated: MuJoCo would write a warning into a file. So the mass is set afterwards.
    mass, spec.compiler.settotalmass = spec.compiler.settotalmass, -1.0
    model = spec.compile()
    if mass > 0:
        mujoco.mj_setTotalmass(model, mass)
        mujoco.mj_setConst(model, mujoco.MjData(model))
    if len(set(model.geom_margin)) > 1:
        raise ValueError(
            f"{spec.modelname}: its geoms have different contact margins, and halving them would not give "
            "each pair its margin before MuJoCo 3.5; give all geoms the same margin"
        )
    model.geom_margin *= 0.5
    return model


class Locomotion(PhysicsTask):
    """Run forward. Reward per step: speed along x in m/s + `alive` - `control_cost` * |action|^2.

    An episode terminates when `healthy` is false, and is truncated after 1000 steps.
    """

    file: str
    frame_skip: int
    root: str | None = None
    control_cost: float
    alive = 0.0
    noise: float  # half-width of the uniform noise on initial positions and velocities
    normal_velocities = False  # if True, initial velocities are 0.1 times a standard normal instead
    horizon = 1000

    def __init__(self, physics: str = "auto"):
        super().__init__(compile_spec(load_spec(self.file)), self.frame_skip, physics, self.root)

    def start(self, key: jax.Array) -> Body:
        position, velocity = jax.random.split(key)
        uniform = lambda key, size: jax.random.uniform(  # noqa: E731
            key, (size,), minval=-self.noise, maxval=self.noise
        )
        nq, nv = self.model.nq, self.model.nv
        qvel = 0.1 * jax.random.normal(velocity, (nv,)) if self.normal_velocities else uniform(velocity, nv)
        return self.put(jnp.asarray(self.model.qpos0) + uniform(position, nq), qvel)

    def advance(self, inner: Body, action: jax.Array):
        body = self.engine.step(inner, self.control(action))
        reward = body.moved[0] / self.dt + self.alive - self.control_cost * jnp.sum(action**2)
        return body, reward, ~self.healthy(body), jnp.bool_(False)

    def healthy(self, body: Body) -> jax.Array:
        """Whether the episode goes on [] bool."""
        return jnp.bool_(True)

    def observe(self, inner: Body) -> jax.Array:
        return jnp.concatenate([inner.qpos[1:], inner.qvel])

    @property
    def observation_size(self) -> int:
        return self.model.nq - 1 + self.model.nv


class HalfCheetah(Locomotion):
    """17 observations, 6 actions. Never terminates. Gym HalfCheetah-v2, Gymnasium v4 and v5."""

    file, frame_skip = "half_cheetah.xml", 5
    control_cost, noise, normal_velocities = 0.1, 0.1, True


class Hopper(Locomotion):
    """11 observations, 3 actions. A fall terminates the episode. Gym Hopper-v2, Gymnasium v4.

    The step of the fall still gets the reward `alive`.
    """

    file, frame_skip = "hopper.xml", 4
    control_cost, alive, noise = 1e-3, 1.0, 5e-3
    max_state = 100.0

    def healthy(self, body: Body) -> jax.Array:
        height, angle = body.qpos[1], body.qpos[2]
        bounded = (jnp.abs(body.qpos[2:]) < self.max_state).all() & (
            jnp.abs(body.qvel) < self.max_state
        ).all()
        return bounded & (height > 0.7) & (jnp.abs(angle) < 0.2)

    def observe(self, inner: Body) -> jax.Array:
        return jnp.concatenate([inner.qpos[1:], jnp.clip(inner.qvel, -10.0, 10.0)])


class Walker2d(Hopper):
    """17 observations, 6 actions. A fall terminates the episode. Gym Walker2d-v2, Gymnasium v4.

    Gymnasium's v5 has another right foot.
    """

    file, frame_skip = "walker2d.xml", 4

    def healthy(self, body: Body) -> jax.Array:
        height, angle = body.qpos[1], body.qpos[2]
        return (height > 0.8) & (height < 2.0) & (jnp.abs(angle) < 1.0)


class Ant(Locomotion):
    """27 observations, 8 actions. Gym Ant-v2, Gymnasium v4, both without contact forces.

    An episode terminates when the height of the torso leaves 0.2 to 1 m.
    """

    file, frame_skip, root = "ant.xml", 5, "torso"
    control_cost, alive, noise, normal_velocities = 0.5, 1.0, 0.1, True

    def healthy(self, body: Body) -> jax.Array:
        return (body.qpos[2] >= 0.2) & (body.qpos[2] <= 1.0)

    def observe(self, inner: Body) -> jax.Array:
        return jnp.concatenate([inner.qpos[2:], inner.qvel])

    @property
    def observation_size(self) -> int:
        return self.model.nq - 2 + self.model.nv


@struct.dataclass
class BodyAndOrigin:
    """A body, and the x coordinate [] in metres at which its episode began."""

    body: Body
    origin: jax.Array


class Sparse:
    """Mixin for sparse rewards. An episode never terminates.

    A step that ends more than `threshold` metres ahead of the start has reward 1 and is a success. Every
    other step has reward 0.
    """

    threshold: float

    def begin(self, inner: Body | BodyAndOrigin):
        return super().begin(BodyAndOrigin(inner, inner.place[0]) if isinstance(inner, Body) else inner)

    def advance(self, inner: BodyAndOrigin, action: jax.Array):
        body = self.engine.step(inner.body, self.control(action))
        far = body.place[0] - inner.origin > self.threshold
        return inner.replace(body=body), jnp.asarray(far, float), jnp.bool_(False), far

    def observe(self, inner: BodyAndOrigin) -> jax.Array:
        return super().observe(inner.body)


class HalfCheetahSparse(Sparse, HalfCheetah):
    """The sparse HalfCheetah of LOGO and OOO(RLPD). x is not observed: 17 observations."""

    threshold = 20.0


class AntSparse(Sparse, Ant):
    """The sparse Ant of OOO(RLPD). x is the first of 28 observations."""

    threshold = 10.0

    def observe(self, inner: BodyAndOrigin) -> jax.Array:
        return jnp.concatenate([inner.body.qpos[:1], super().observe(inner)])

    @property
    def observation_size(self) -> int:
        return super().observation_size + 1
