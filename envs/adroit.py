"""The four hands of D4RL and of the papers: open a door, drive in a nail, turn a pen, carry a ball (Adroit).

A hand of 24 joints on an arm of up to six, position control, 0.01 s per step. Models are the XML files of gymnasium-robotics; rewards,
horizons, endings and starts are D4RL's (d4rl/hand_manipulation_suite at 89141a6; mj_envs for the binary variants). What
gymnasium-robotics 1.2.1 to 1.4.2 has otherwise does not reach us: the sign of the palm's distance in three rewards, a pen that never
ends and plays 200 steps, and states that cannot be put back.

`model` chooses what is simulated, on any engine that can:

==========  ======================================================================================================================
shipped     the XML file to the letter
d4rl        contact margins as when D4RL's data were recorded: since MuJoCo 3.5 the margins of two geoms add up, where the larger one
            counted. 0.25 mm on every geom give each pair its old 0.5 mm
mjx         d4rl, and what MJX needs: see `for_mjx`
auto        mjx on MJX's engines, d4rl on the C engine
==========  ======================================================================================================================

Positions in observations and rewards are those of the last physics step's beginning (2 ms old), while joints are current, as in D4RL.
"""

import importlib.util
import pathlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from envs.physics import Body, PhysicsTask, Scene, resolve

MODELS = ("auto", "shipped", "d4rl", "mjx")
REWARDS = ("dense", "binary")
MARGIN = 0.00025  # of every geom, in metres
MAX_CONTACTS = 16  # of a kind, on MJX; experts' episodes have up to 16 at once, random ones more


def assets() -> pathlib.Path:
    """Where gymnasium-robotics keeps the models; it is not imported, for what it prints then."""
    found = importlib.util.find_spec("gymnasium_robotics")
    if found is None or found.origin is None:
        raise ValueError("the hands need the models of gymnasium-robotics, which is not installed: pip install '.[robotics]'")
    return pathlib.Path(found.origin).parent / "envs" / "assets" / "adroit_hand"


def load_model(file: str, kind: str) -> mujoco.MjModel:
    """The model in `file`, as `kind` (one of `MODELS`, but auto) has it."""
    path = assets() / file
    try:
        spec = mujoco.MjSpec.from_file(str(path))
        if kind == "mjx":
            for_mjx(spec)
        model = spec.compile()
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: MuJoCo refuses this model ({reason}); reinstall gymnasium-robotics") from None
    for name, gain in (("A_WRJ1", 10), ("A_WRJ0", 10)) + tuple((name, 1) for name in fingers(model)):
        row = model.actuator(name).id
        model.actuator_gainprm[row, :3], model.actuator_biasprm[row, :3] = (gain, 0, 0), (0, -gain, 0)
    if kind != "shipped":
        model.geom_margin[:] = MARGIN
    return model


def for_mjx(spec: mujoco.MjSpec) -> None:
    """What MJX needs of a model, and nothing that an expert's episodes would show (docs/adroit.md has the measurements).

    * The nail's head, a disc, is a box of the same area and thickness, and its shaft a capsule: MJX has no contacts of two cylinders that
      agree with C. All other cylinders stay (envs/cylinders.py).
    * Only what the task needs may touch: see `touch`. One of the hand's 19 pairs with itself goes, thumb and palm, for its compile time.
    * At most `MAX_CONTACTS` contacts of a kind (as many directions of friction) count, the deepest ones.
    * Where a cylinder lies on a box, C makes one contact, not two (a flag that only the C engine reads).
    * Of the sensors those stay that are observed. The nail's feels what happens inside a disc a little smaller than its head; MJX knows
      no discs there, hence a box around it.
    """
    for geom in spec.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_CYLINDER and geom.parent.name == "nail":
            radius, half = geom.size[:2]
            disc = radius > half
            geom.type = mujoco.mjtGeom.mjGEOM_BOX if disc else mujoco.mjtGeom.mjGEOM_CAPSULE
            geom.size = [radius * np.pi**0.5 / 2, radius * np.pi**0.5 / 2, half] if disc else [radius, half - radius, 0]
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


FINGERS, PALM, THING, BOLT = 1, 2, 4, 8  # bits of what touches what


def touch(geom: mujoco.MjsGeom, model: str) -> tuple[int, int]:
    """(contype, conaffinity) of a geom: what it is, and what of the hand and of other things it touches.

    Left out is what never happens in an expert's episode and would cost MJX much: palm against table, door and board (boxes all), door and
    board and nail against the table, the hand of the pen against the table, which it cannot reach, anything but the thing itself against
    the floor; and what is no body at all: the drawn target of the pen, and two cubes of 2 mm inside the thumb.
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
        bolt = BOLT if body == "frame" else 0  # the latch's bolt holds the door by the frame
        hand = FINGERS if geom.type == mujoco.mjtGeom.mjGEOM_BOX else FINGERS | PALM
        is_bolt = body == "latch" and geom.type == mujoco.mjtGeom.mjGEOM_CAPSULE
        return BOLT if is_bolt else 0, 0 if name == "ground" else hand | bolt
    return 0, THING | (FINGERS if body == "table" and task != "pen" else 0)


def fingers(model: mujoco.MjModel) -> list[str]:
    """Names of the actuators of fingers and thumb."""
    names = [model.actuator(row).name for row in range(model.nu)]
    return names[names.index("A_FFJ3") : names.index("A_THJ0") + 1]


class Hand(PhysicsTask):
    """What the four have in common. `scene` [m] is what an episode draws: where things stand, or which way the pen is to point.

    reward: "dense", or "binary": success - 1, which never ends an episode. `end_at_success` ends it with the first success instead, as
    Cal-QL's sampler did.
    """

    file: str
    horizon = 200
    sizes: tuple[int, int]  # of observations and scene
    low: tuple[float, ...]  # what scenes are drawn from
    high: tuple[float, ...]
    demonstrated: ClassVar[tuple[str, ...]]  # names of the scene's parts in DAPG's demonstrations
    view = (0.0, -0.15, 0.15, 1.1, 120.0, -25.0)  # of a camera: what it looks at, in metres, its distance, azimuth and elevation in degrees
    held = 25  # more successful steps than these make a successful episode for DAPG and D4RL

    def __init__(self, physics: str = "auto", model: str = "auto", reward: str = "dense", end_at_success: bool = False):
        for name, value, known in (("model", model, MODELS), ("reward", reward, REWARDS)):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}")
        kind = ("d4rl" if resolve(physics) == "mujoco" else "mjx") if model == "auto" else model
        self.reward, self.end_at_success = reward, end_at_success
        loaded = load_model(self.file, kind)
        super().__init__(loaded, 5, physics, scene=self.scene(loaded))
        self._probe()

    def scene(self, model: mujoco.MjModel) -> Scene:
        """What varies between episodes and what is watched."""
        raise NotImplementedError

    def judge(self, body: Body) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(dense reward [], success [] bool, whether the task has failed for good [] bool)."""
        raise NotImplementedError

    def _probe(self) -> None:
        """Finds what is watched at the start as a function of the scene: what stands still moves with it, the rest not at all."""
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
        """What is watched [w] while all joints are at 0: the engine need not be asked at every start."""
        base, slope, nominal = map(jnp.asarray, self.rest)
        return base + slope @ (scene - nominal)

    def draw(self, key: jax.Array) -> jax.Array:
        """The scene [m] of an episode."""
        return jax.random.uniform(key, (len(self.low),), minval=jnp.asarray(self.low, float), maxval=jnp.asarray(self.high, float))

    def start(self, key: jax.Array) -> Body:
        scene = self.draw(key)
        return self.engine.begin(jnp.zeros(self.model.nq), jnp.zeros(self.model.nv), scene, self.at_rest(scene))

    def reset_to(self, qpos: jax.Array, qvel: jax.Array, scene: jax.Array | None = None):
        """As for every body; `scene` [m] is by default the model's own. Joints and scene mean what they mean in D4RL."""
        body = self.put(qpos, qvel)
        if scene is None:
            return self.begin(body)
        if jnp.shape(scene) != (self.sizes[1],):
            raise ValueError(f"{type(self).__name__} needs a scene {(self.sizes[1],)}, not {jnp.shape(scene)}")
        return self.begin(self.engine.begin(body.qpos, body.qvel, jnp.asarray(scene, float)))

    def advance(self, inner: Body, action: jax.Array):
        body = self.engine.step(inner, self.control(action))
        dense, success, failed = self.judge(body)
        reward = dense if self.reward == "dense" else success - 1.0
        ended = (failed & (self.reward == "dense")) | (success & self.end_at_success)
        return body, reward, ended, success

    def points(self, body: Body) -> jax.Array:
        """Positions [n, 3] of the watched sites, in their order."""
        sites = len(self.engine.scene.sites)
        return body.watched[: 3 * sites].reshape(sites, 3)

    def object(self, body: Body) -> tuple[jax.Array, jax.Array]:
        """Position [3] and quaternion [4] of the thing that the hand moves."""
        begin = 3 * len(self.engine.scene.sites)
        return body.watched[begin : begin + 3], body.watched[begin + 3 : begin + 7]

    @property
    def observation_size(self) -> int:
        return self.sizes[0]


class Door(Hand):
    """Turn the latch and open the door: 39 observations, 28 actions. Success: the hinge at 1.35 rad or more. Scene: the frame's place."""

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
    """Take the hammer and drive the nail in: 46 observations, 26 actions. Success: the nail within 1 cm. Scene: the board's place."""

    file, sizes = "adroit_hammer.xml", (46, 3)
    low, high = (0.05, 0.0, 0.1), (0.05, 0.0, 0.25)
    demonstrated = ("board_pos",)
    view = (0.0, -0.15, 0.2, 0.7, 60.0, -25.0)

    def scene(self, model: mujoco.MjModel) -> Scene:
        board = ("body_pos", model.body("nail_board").id)
        return Scene((board,), sites=("S_grasp", "tool", "S_target", "nail_goal"), bodies=("Object",), sensors=("S_nail",))

    def judge(self, body: Body):
        (palm, tool, nail, goal), (hammer, _) = self.points(body), self.object(body)
        left = distance(nail, goal)
        reward = -0.1 * distance(palm, hammer) - distance(tool, nail) - 10.0 * left - 0.01 * jnp.sqrt(jnp.sum(body.qvel**2))
        reward += 2.0 * ((hammer[2] > 0.04) & (tool[2] > 0.04)) + 25.0 * (left < 0.02) + 75.0 * (left < 0.01)
        return reward, left < 0.01, jnp.bool_(False)

    def observe(self, inner: Body) -> jax.Array:
        (palm, _, nail, _), (hammer, turned) = self.points(inner), self.object(inner)
        force = jnp.clip(inner.watched[-1:], -1.0, 1.0)
        return jnp.concatenate([inner.qpos[:-6], jnp.clip(inner.qvel[-6:], -1.0, 1.0), palm, hammer, euler(turned), nail, force])


class Pen(Hand):
    """Turn the pen in the hand until it is parallel to the target: 45 observations, 24 actions. Scene: the target's quaternion.

    Success: the pen within 7.5 cm of its place above the palm, the cosine of its angle to the target above 0.95. With the dense reward an
    episode ends when the pen drops.
    """

    file, sizes, horizon, held = "adroit_pen.xml", (45, 4), 100, 20
    low, high = (-1.0, -1.0), (1.0, 1.0)  # of the target's first two Euler angles
    demonstrated = ("desired_orien",)
    view = (0.0, -0.15, 0.25, 0.55, 60.0, -30.0)

    def scene(self, model: mujoco.MjModel) -> Scene:
        target = ("body_quat", model.body("target").id)
        sites = ("object_top", "object_bottom", "target_top", "target_bottom", "eps_ball")
        return Scene((target,), sites=sites, bodies=("Object",))

    def draw(self, key: jax.Array) -> jax.Array:
        a, b = super().draw(key) / 2
        return jnp.stack([jnp.cos(a) * jnp.cos(b), jnp.sin(a) * jnp.cos(b), jnp.cos(a) * jnp.sin(b), jnp.sin(a) * jnp.sin(b)])

    def at_rest(self, scene: jax.Array) -> jax.Array:
        base, (w, x, y, z) = jnp.asarray(self.rest[0]), scene / jnp.linalg.norm(scene)
        axis = jnp.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)])  # where the target's z axis points
        middle, half = jnp.asarray(self.model.body("target").pos), self.model.site("target_top").pos[2]
        return base.at[6:9].set(middle + half * axis).at[9:12].set(middle - half * axis)

    def look(self, body: Body) -> tuple[jax.Array, ...]:
        """The pen's position, the way to its place, its direction and the wanted one, [3] each."""
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
        return jnp.concatenate([inner.qpos[:-6], pen, inner.qvel[-6:], direction, wanted, offset, direction - wanted])


class Relocate(Hand):
    """Carry the ball to the target: 39 observations, 30 actions. Success: within 10 cm. Scene: the places of ball and target."""

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
    return jnp.sqrt(jnp.sum((a - b) ** 2))


def euler(quaternion: jax.Array) -> jax.Array:
    """A rotation (w, x, y, z) as the three angles [3] in which D4RL observes the hammer: about z, then y, then x, in turned axes."""
    w, x, y, z = quaternion
    first = jnp.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)])  # rows of the rotation's matrix
    second = jnp.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)])
    across = jnp.sqrt((1 - 2 * (x * x + y * y)) ** 2 + second[2] ** 2)
    # Where the middle angle is a right one the other two are not told apart, and the first is taken for 0.
    regular = across > 4 * jnp.finfo(quaternion.dtype).eps
    about_x = jnp.where(regular, -jnp.arctan2(second[2], 1 - 2 * (x * x + y * y)), 0.0)
    about_z = jnp.where(regular, -jnp.arctan2(first[1], first[0]), jnp.arctan2(second[0], second[1]))
    return jnp.stack([about_x, jnp.arctan2(first[2], across), about_z])
