"""The four Adroit tasks of D4RL: a hand opens a door, hammers in a nail, turns a pen, or carries a ball.

The hand has 24 joints, and its arm up to six. Actuators control joint positions; a step takes 0.01 s. The
models are the XML files of gymnasium-robotics. Rewards, horizons, terminations and starts are D4RL's
(d4rl/hand_manipulation_suite at 89141a6); the binary variants follow mj_envs. gymnasium-robotics 1.2.1 to
1.4.2 differs from D4RL, but these differences do not affect this module: in three rewards the palm's
distance has the wrong sign, the pen's episodes never terminate and have 200 steps, and states cannot be
restored.

`model` chooses the model to simulate, on every engine that supports it:

=======  ==================================================================================================
shipped  the XML file without changes
d4rl     the contact margins with which D4RL's data were recorded. Before MuJoCo 3.5, the margin of a pair
         was the larger one of its two geoms; since 3.5 it is their sum. With 0.25 mm on every geom, each
         pair has its old 0.5 mm
mjx      d4rl, with the changes that MJX needs: see `for_mjx`
auto     mjx on MJX's engines, d4rl on the C engine
=======  ==================================================================================================

In all of them the constructor sets the gains of the actuators, as D4RL's does. As in D4RL, joint angles in
observations and rewards are current, but positions of bodies and sites are 2 ms old: they belong to the
beginning of the last physics step.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from ooo_rl.envs import robotics
from ooo_rl.envs.physics_task import Body, PhysicsTask, Scene, resolve

MODELS = ("auto", "shipped", "d4rl", "mjx")
REWARDS = ("dense", "binary")
MARGIN = 0.00025  # contact margin of every geom, in metres
# On MJX, for each contact dimension (condim). Experts' episodes have up to 16 at once, random ones more.
MAX_CONTACTS = 16


def load_model(file: str, kind: str) -> mujoco.MjModel:
    """Loads the model in `file` as `kind`, which is any of `MODELS` except "auto".

    Raises ValueError if gymnasium-robotics is not installed, or if MuJoCo cannot load its file.
    """
    model = robotics.load_model(f"adroit_hand/{file}", for_mjx if kind == "mjx" else None)
    for name, gain in (("A_WRJ1", 10), ("A_WRJ0", 10)) + tuple((name, 1) for name in fingers(model)):
        row = model.actuator(name).id
        model.actuator_gainprm[row, :3], model.actuator_biasprm[row, :3] = (gain, 0, 0), (0, -gain, 0)
    if kind != "shipped":
        model.geom_margin[:] = MARGIN
    return model


def for_mjx(spec: mujoco.MjSpec) -> None:
    """Makes the changes that MJX needs. They do not show in experts' episodes (measurements: docs/adroit.md).

    * The nail's head, a disc, becomes a box of the same area and thickness, and its shaft a capsule. The
      reason is that MJX's contacts between two cylinders do not agree with C's. All other cylinders stay as
      they are (envs/engines/cylinders.py).
    * Only geoms that the task needs may touch: see `touch`. Of the hand's 19 pairs for contact with itself,
      one is removed, thumb and palm, because it takes long to compile.
    * For each contact dimension (condim), at most `MAX_CONTACTS` contacts count, the deepest ones.
    * Where a cylinder lies on a box, C makes one contact, not two. Only the C engine reads this flag.
    * Only the sensor that is observed stays, the nail's. It measures the contact inside a disc that is a
      little smaller than the nail's head. MJX does not support a disc here, so it becomes a box around the
      disc.
    """
    for geom in spec.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_CYLINDER and geom.parent.name == "nail":
            radius, half = geom.size[:2]
            disc = radius > half
            geom.type = mujoco.mjtGeom.mjGEOM_BOX if disc else mujoco.mjtGeom.mjGEOM_CAPSULE
            geom.size = (
                [radius * np.pi**0.5 / 2, radius * np.pi**0.5 / 2, half]
                if disc
                else [radius, half - radius, 0]
            )
        geom.contype, geom.conaffinity = touch(geom, spec.modelname)
    for pair in list(spec.pairs):
        if {pair.geomname1, pair.geomname2} == {"C_palm0", "C_thdistal"}:
            spec.delete(pair)
    for sensor in list(spec.sensors):
        if sensor.name != "S_nail":
            spec.delete(sensor)
            continue
        site = spec.site(sensor.objname)
        site.type, site.size = mujoco.mjtGeom.mjGEOM_BOX, [site.size[0], *site.size[:2]]
    spec.add_numeric(name="max_contact_points", data=[MAX_CONTACTS], size=1)
    spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_MULTICCD


FINGERS, PALM, THING, BOLT = 1, 2, 4, 8  # collision bits: the groups of geoms that may touch


def touch(geom: mujoco.MjsGeom, model: str) -> tuple[int, int]:
    """(contype, conaffinity) of a geom: the group it belongs to, and the groups that it touches.

    Some pairs never touch in an expert's episode and would cost MJX much time. They are left out:

    * the palm against table, door and board, all of which are boxes
    * door, board and nail against the table
    * the pen task's hand against the table, which it cannot reach
    * everything except the object itself against the floor

    Geoms that are not physical are left out as well: the drawn target of the pen, and two cubes of 2 mm
    inside the thumb.
    """
    name, body = geom.name, geom.parent.name
    if (not geom.contype and not geom.conaffinity) or name in ("V_thbase", "V_thhub") or body == "target":
        return 0, 0
    if name.startswith("C_"):
        return PALM if geom.type == mujoco.mjtGeom.mjGEOM_BOX else FINGERS, 0
    task = next(task for task in ("door", "hammer", "pen", "relocate") if task in model)
    if body == "Object":
        return THING, FINGERS | PALM
    if task == "door":
        bolt = BOLT if body == "frame" else 0  # the latch's bolt locks the door to the frame
        hand = FINGERS if geom.type == mujoco.mjtGeom.mjGEOM_BOX else FINGERS | PALM
        is_bolt = body == "latch" and geom.type == mujoco.mjtGeom.mjGEOM_CAPSULE
        return BOLT if is_bolt else 0, 0 if name == "ground" else hand | bolt
    return 0, THING | (FINGERS if body == "table" and task != "pen" else 0)


def fingers(model: mujoco.MjModel) -> list[str]:
    """The names of the actuators of fingers and thumb."""
    names = [model.actuator(row).name for row in range(model.nu)]
    return names[names.index("A_FFJ3") : names.index("A_THJ0") + 1]


class Hand(PhysicsTask):
    """Base class of the four tasks.

    Each episode draws a `scene` [m]: the positions of things, or the direction in which the pen must point.

    `reward` is "dense", or "binary": success - 1. With the binary reward, episodes do not terminate. With
    `end_at_success`, an episode terminates at its first success, as in Cal-QL's sampler. `model` is one of
    `MODELS`. Raises ValueError for settings that do not exist.
    """

    file: str
    horizon = 200
    sizes: tuple[int, int]  # of observation and scene
    low: tuple[float, ...]  # bounds of the uniform distribution of scenes
    high: tuple[float, ...]
    demonstrated: ClassVar[tuple[str, ...]]  # names of the scene's parts in DAPG's demonstrations
    # A camera: the point (x, y, z) it looks at and its distance in metres, azimuth and elevation in degrees.
    view = (0.0, -0.15, 0.15, 1.1, 120.0, -25.0)
    held = 25  # for DAPG and D4RL, an episode is a success if more steps than this are

    def __init__(
        self, physics: str = "auto", model: str = "auto", reward: str = "dense", end_at_success: bool = False
    ):
        for name, value, known in (("model", model, MODELS), ("reward", reward, REWARDS)):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}")
        kind = ("d4rl" if resolve(physics) == "mujoco" else "mjx") if model == "auto" else model
        self.reward, self.end_at_success = reward, end_at_success
        loaded = load_model(self.file, kind)
        super().__init__(loaded, 5, physics, scene=self.scene(loaded))
        self._probe()

    def scene(self, model: mujoco.MjModel) -> Scene:
        """What varies between episodes, and what is watched."""
        raise NotImplementedError

    def judge(self, body: Body) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns (dense reward [], success [] bool, whether the episode has failed for good [] bool)."""
        raise NotImplementedError

    def _probe(self) -> None:
        """Measures how the watched values at the start depend on the scene, and stores it in `rest`.

        What is fixed to the scene moves with it, and nothing else does. So positions depend on it linearly.
        """
        watching, data = self.engine.scene, mujoco.MjData(self.model)
        nominal = watching.nominal(self.model)

        def look(scene: np.ndarray) -> np.ndarray:
            for field, row, values in watching.split(self.model, scene):
                getattr(self.model, field)[row] = values
            mujoco.mj_forward(self.model, data)
            sites, bodies, sensors = watching.rows(self.model)
            poses = np.concatenate([data.xpos[bodies], data.xquat[bodies]], 1)
            return np.concatenate([data.site_xpos[sites].ravel(), poses.ravel(), data.sensordata[sensors]])

        base = look(nominal)
        self.rest = base, np.stack([look(nominal + unit) - base for unit in np.eye(len(nominal))], 1), nominal
        look(nominal)

    def at_rest(self, scene: jax.Array) -> jax.Array:
        """The watched values [w] when all joints are at 0. So no start needs to ask the engine for them."""
        base, slope, nominal = map(jnp.asarray, self.rest)
        return base + slope @ (scene - nominal)

    def draw(self, key: jax.Array) -> jax.Array:
        """Draws the scene [m] of an episode."""
        return jax.random.uniform(
            key, (len(self.low),), minval=jnp.asarray(self.low, float), maxval=jnp.asarray(self.high, float)
        )

    def start(self, key: jax.Array) -> Body:
        scene = self.draw(key)
        return self.engine.begin(
            jnp.zeros(self.model.nq), jnp.zeros(self.model.nv), scene, self.at_rest(scene)
        )

    def reset_to(self, qpos: jax.Array, qvel: jax.Array, scene: jax.Array | None = None):
        """As in `PhysicsTask`, with a `scene` [m], by default the model's own.

        Joints and scene have the same meaning as in D4RL. Raises ValueError for wrong shapes.
        """
        body = self.put(qpos, qvel)
        if scene is None:
            return self.begin(body)
        if jnp.shape(scene) != (self.sizes[1],):
            raise ValueError(
                f"{type(self).__name__} needs a scene {(self.sizes[1],)}, not {jnp.shape(scene)}"
            )
        return self.begin(self.engine.begin(body.qpos, body.qvel, jnp.asarray(scene, float)))

    def advance(self, inner: Body, action: jax.Array):
        body = self.engine.step(inner, self.control(action))
        dense, success, failed = self.judge(body)
        reward = dense if self.reward == "dense" else success - 1.0
        ended = (failed & (self.reward == "dense")) | (success & self.end_at_success)
        return body, reward, ended, success

    def points(self, body: Body) -> jax.Array:
        """The positions [n, 3] of the watched sites, in the order of `Scene.sites`."""
        sites = len(self.engine.scene.sites)
        return body.watched[: 3 * sites].reshape(sites, 3)

    def object(self, body: Body) -> tuple[jax.Array, jax.Array]:
        """The position [3] and quaternion [4] of the object that the hand moves."""
        begin = 3 * len(self.engine.scene.sites)
        return body.watched[begin : begin + 3], body.watched[begin + 3 : begin + 7]

    @property
    def observation_size(self) -> int:
        return self.sizes[0]


class Door(Hand):
    """Turn the latch and open the door: 39 observations, 28 actions.

    Success: the hinge is at 1.35 rad or more. Scene: the position [3] of the door's frame.
    """

    file, sizes = "adroit_door.xml", (39, 3)
    low, high = (-0.3, 0.25, 0.252), (-0.2, 0.35, 0.35)
    demonstrated = ("door_body_pos",)

    def scene(self, model: mujoco.MjModel) -> Scene:
        return Scene((("body_pos", model.body("frame").id),), sites=("S_grasp", "S_handle"))

    def judge(self, body: Body):
        (palm, handle), hinge = self.points(body), body.qpos[-2]
        reward = -0.1 * distance(palm, handle) - 0.1 * (hinge - 1.57) ** 2 - 1e-5 * jnp.sum(body.qvel**2)
        reward += 2.0 * (hinge > 0.2) + 8.0 * (hinge > 1.0) + 10.0 * (hinge > 1.35)
        return reward, hinge >= 1.35, jnp.bool_(False)

    def observe(self, inner: Body) -> jax.Array:
        (palm, handle), qpos = self.points(inner), inner.qpos
        hinge, latch = qpos[-2:-1], qpos[-1:]
        is_open = jnp.where(hinge > 1.0, 1.0, -1.0)
        return jnp.concatenate([qpos[1:-2], latch, hinge, palm, handle, palm - handle, is_open])


class Hammer(Hand):
    """Take the hammer and drive in the nail: 46 observations, 26 actions.

    Success: the nail is within 1 cm of its goal. Scene: the position [3] of the board.
    """

    file, sizes = "adroit_hammer.xml", (46, 3)
    low, high = (0.05, 0.0, 0.1), (0.05, 0.0, 0.25)
    demonstrated = ("board_pos",)
    view = (0.0, -0.15, 0.2, 0.7, 60.0, -25.0)

    def scene(self, model: mujoco.MjModel) -> Scene:
        board = ("body_pos", model.body("nail_board").id)
        return Scene(
            (board,),
            sites=("S_grasp", "tool", "S_target", "nail_goal"),
            bodies=("Object",),
            sensors=("S_nail",),
        )

    def judge(self, body: Body):
        (palm, tool, nail, goal), (hammer, _) = self.points(body), self.object(body)
        left = distance(nail, goal)
        reward = (
            -0.1 * distance(palm, hammer)
            - distance(tool, nail)
            - 10.0 * left
            - 0.01 * jnp.sqrt(jnp.sum(body.qvel**2))
        )
        reward += 2.0 * ((hammer[2] > 0.04) & (tool[2] > 0.04)) + 25.0 * (left < 0.02) + 75.0 * (left < 0.01)
        return reward, left < 0.01, jnp.bool_(False)

    def observe(self, inner: Body) -> jax.Array:
        (palm, _, nail, _), (hammer, turned) = self.points(inner), self.object(inner)
        force = jnp.clip(inner.watched[-1:], -1.0, 1.0)
        return jnp.concatenate(
            [inner.qpos[:-6], jnp.clip(inner.qvel[-6:], -1.0, 1.0), palm, hammer, euler(turned), nail, force]
        )


class Pen(Hand):
    """Turn the pen in the hand until it is parallel to the target: 45 observations, 24 actions.

    Success: the pen is within 7.5 cm of its place above the palm, and the cosine of its angle to the target
    is above 0.95. With the dense reward, an episode terminates when the pen drops. Scene: the quaternion [4]
    of the target.
    """

    file, sizes, horizon, held = "adroit_pen.xml", (45, 4), 100, 20
    low, high = (-1.0, -1.0), (1.0, 1.0)  # bounds of the target's first two Euler angles, in radians
    demonstrated = ("desired_orien",)
    view = (0.0, -0.15, 0.25, 0.55, 60.0, -30.0)

    def scene(self, model: mujoco.MjModel) -> Scene:
        target = ("body_quat", model.body("target").id)
        sites = ("object_top", "object_bottom", "target_top", "target_bottom", "eps_ball")
        return Scene((target,), sites=sites, bodies=("Object",))

    def draw(self, key: jax.Array) -> jax.Array:
        a, b = super().draw(key) / 2
        return jnp.stack(
            [
                jnp.cos(a) * jnp.cos(b),
                jnp.sin(a) * jnp.cos(b),
                jnp.cos(a) * jnp.sin(b),
                jnp.sin(a) * jnp.sin(b),
            ]
        )

    def at_rest(self, scene: jax.Array) -> jax.Array:
        base, (w, x, y, z) = jnp.asarray(self.rest[0]), scene / jnp.linalg.norm(scene)
        # The direction of the target's z axis.
        axis = jnp.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)])
        middle, half = jnp.asarray(self.model.body("target").pos), self.model.site("target_top").pos[2]
        return base.at[6:9].set(middle + half * axis).at[9:12].set(middle - half * axis)

    def look(self, body: Body) -> tuple[jax.Array, ...]:
        """The pen's position, its offset from its place, its direction and the target direction, [3] each."""
        (top, bottom, target_top, target_bottom, place), (pen, _) = self.points(body), self.object(body)
        length = 2 * self.model.site("object_top").pos[2]
        return pen, pen - place, (top - bottom) / length, (target_top - target_bottom) / length

    def judge(self, body: Body):
        pen, offset, direction, wanted = self.look(body)
        away, alike = jnp.sqrt(jnp.sum(offset**2)), jnp.sum(direction * wanted)
        near, dropped = away < 0.075, pen[2] < 0.075
        reward = alike - away + 10.0 * (near & (alike > 0.9)) + 50.0 * (near & (alike > 0.95)) - 5.0 * dropped
        return reward, near & (alike > 0.95), dropped

    def observe(self, inner: Body) -> jax.Array:
        pen, offset, direction, wanted = self.look(inner)
        return jnp.concatenate(
            [inner.qpos[:-6], pen, inner.qvel[-6:], direction, wanted, offset, direction - wanted]
        )


class Relocate(Hand):
    """Carry the ball to the target: 39 observations, 30 actions.

    Success: the ball is within 10 cm of the target. Scene: the positions of ball and target [6].
    """

    file, sizes = "adroit_relocate.xml", (39, 6)
    low, high = (-0.15, -0.15, 0.035, -0.2, -0.2, 0.15), (0.15, 0.3, 0.035, 0.2, 0.2, 0.35)
    demonstrated = ("obj_pos", "target_pos")
    view = (0.0, -0.1, 0.15, 0.8, 210.0, -25.0)

    def scene(self, model: mujoco.MjModel) -> Scene:
        varied = ("body_pos", model.body("Object").id), ("site_pos", model.site("target").id)
        return Scene(varied, sites=("S_grasp", "target"), bodies=("Object",))

    def judge(self, body: Body):
        (palm, target), (ball, _) = self.points(body), self.object(body)
        left = distance(ball, target)
        reward = -0.1 * distance(palm, ball) + 10.0 * (left < 0.1) + 20.0 * (left < 0.05)
        lifted = 1.0 - 0.5 * distance(palm, target) - 0.5 * left
        return reward + jnp.where(ball[2] > 0.04, lifted, 0.0), left < 0.1, jnp.bool_(False)

    def observe(self, inner: Body) -> jax.Array:
        (palm, target), (ball, _) = self.points(inner), self.object(inner)
        return jnp.concatenate([inner.qpos[:-6], palm - ball, palm - target, ball - target])


def distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """The Euclidean distance [] of two points [3]."""
    return jnp.sqrt(jnp.sum((a - b) ** 2))


def euler(quaternion: jax.Array) -> jax.Array:
    """A rotation (w, x, y, z) as the three angles [3], in radians, with which D4RL observes the hammer.

    They are angles about x, y and z. The body turns about z first, then about y, then about x, all fixed
    axes.
    """
    w, x, y, z = quaternion
    # Rows of the rotation matrix.
    first = jnp.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)])
    second = jnp.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)])
    across = jnp.sqrt((1 - 2 * (x * x + y * y)) ** 2 + second[2] ** 2)
    # If the angle about y is 90 degrees, the other two cannot be told apart, and the one about x is set to 0.
    regular = across > 4 * jnp.finfo(quaternion.dtype).eps
    about_x = jnp.where(regular, -jnp.arctan2(second[2], 1 - 2 * (x * x + y * y)), 0.0)
    about_z = jnp.where(regular, -jnp.arctan2(first[1], first[0]), jnp.arctan2(second[0], second[1]))
    return jnp.stack([about_x, jnp.arctan2(first[2], across), about_z])
