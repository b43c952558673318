"""AntMaze: an ant walks through D4RL's mazes to a goal that it does not observe.

Mazes, starts, goals, rewards and terminations are those of D4RL (d4rl/locomotion at 89141a6). Its versions
differ in when a goal is drawn: for every episode (v2, the default), or once (v0, `goal="fixed"`). There are
two ants:

============  =============================================  ===============================================
`ant`         "d4rl" (default): the ant of D4RL's data       "gymnasium": of gymnasium-robotics and Minari
============  =============================================  ===============================================
step, torque  0.1 s, up to 30 N m                            0.05 s, up to 150 N m
contacts      solimp 0.8 0.8 0.01                            MuJoCo's default
coordinates   origin in the start cell, y grows with rows    origin in the maze's centre, y falls with rows
start         start cell + U(-0.1, 0.1)                      start cell + U(-1, 1)
joints        U(-0.1, 0.1), velocities N(0, 0.1^2)           at rest, without noise
goal          goal cell + U(0, 1) + U(0, 0.5)                goal cell + U(-1, 1)
goal radius   0.5                                            0.45
============  =============================================  ===============================================

Lengths are in metres, and U is drawn per axis. An episode ends at its goal, in gymnasium-robotics only with
`continuing_task=False`. Both ants are built from Gymnasium's ant.xml, with two more
edits. Contact margins are halved (envs/locomotion.py says why). And MJX examines only the `MAX_PAIRS`
nearest geom pairs of each type for contact. Up to 7 pairs touched at once, and the farthest of them was the
14th nearest at most (docs/antmaze.md).
"""

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from flax import struct

from ooo_rl.envs.locomotion import compile_spec, load_spec
from ooo_rl.envs.physics_task import Body, PhysicsTask

MAZES = {  # D4RL's maps: # wall, R start, G goal of evaluation episodes
    "umaze": ("#####", "#R  #", "### #", "#G  #", "#####"),
    "medium": (
        "########",
        "#R ##  #",
        "#  #   #",
        "##   ###",
        "#  #   #",
        "# #  # #",
        "#   # G#",
        "########",
    ),
    "large": (
        "############",
        "#R   #     #",
        "# ## # # # #",
        "#      #   #",
        "# #### ### #",
        "#  # #     #",
        "## # # # ###",
        "#  #   # G #",
        "############",
    ),
}
HORIZON = {"umaze": 700, "medium": 1000, "large": 1000}
SCALE, WALL_HEIGHT = 4.0, 2.0  # width of a cell, and height of a wall, in metres
MAX_PAIRS = 16  # geom pairs of each type that MJX examines for contact


@struct.dataclass
class AntAndGoal:
    """The inner state of an episode: the ant, and its goal [2] (x, y) in metres."""

    body: Body
    goal: jax.Array


class AntMaze(PhysicsTask):
    """The observation [29] is qpos (x and y first) and qvel; actions are [8].

    When the ant comes within the goal's radius, the reward is 1 and the episode terminates with success. At
    all other steps the reward is 0. A fall does not end the episode. `goal` is "episode" or "fixed";
    `goal_seed` seeds the fixed goal. The other settings are in the module docstring. Raises ValueError for
    settings that do not exist.
    """

    def __init__(
        self,
        maze: str = "large",
        goal: str = "episode",
        ant: str = "d4rl",
        goal_seed: int = 0,
        physics: str = "auto",
    ):
        for name, value, known in (
            ("maze", maze, MAZES),
            ("goal", goal, ("episode", "fixed")),
            ("ant", ant, ("d4rl", "gymnasium")),
        ):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}")
        self.maze, self.ant, self.horizon = MAZES[maze], ant, HORIZON[maze]
        self.radius = 0.5 if ant == "d4rl" else 0.45
        super().__init__(self._model(), 5, physics, root="torso")
        self.fixed_goal = None if goal == "episode" else self.draw_goal(jax.random.PRNGKey(goal_seed))

    def _model(self) -> mujoco.MjModel:
        spec = d4rl_ant() if self.ant == "d4rl" else load_spec("ant.xml")
        half = np.array([SCALE, SCALE, WALL_HEIGHT]) / 2
        for row, col in self.cells("#"):
            wall = spec.worldbody.add_geom(
                name=f"block_{row}_{col}", type=mujoco.mjtGeom.mjGEOM_BOX, size=half
            )
            wall.pos = [*self.centre((row, col)), half[2]]
            wall.contype = wall.conaffinity = 1
            wall.rgba = [0.7, 0.5, 0.3, 1.0]
            wall.solimp = spec.geom("floor").solimp
        # MJX 3.17 finds a numeric's value by the numeric's id: it would read a value of `init_qpos` as
        # `max_geom_pairs`.
        spec.delete(spec.numeric("init_qpos"))  # unused
        spec.add_numeric(name="max_geom_pairs", data=[MAX_PAIRS], size=1)  # only MJX reads it
        return compile_spec(spec)

    def cells(self, kinds: str) -> list[tuple[int, int]]:
        """(row, column) of all cells whose mark in the map is one of `kinds`."""
        return [(r, c) for r, line in enumerate(self.maze) for c, mark in enumerate(line) if mark in kinds]

    def centre(self, cell: tuple[int, int]) -> np.ndarray:
        """The position (x, y) [..., 2] in metres of the centre of `cell` [..., 2] (row, column)."""
        row, col = np.asarray(cell)[..., 0], np.asarray(cell)[..., 1]
        if self.ant == "d4rl":
            ((row_start, col_start),) = self.cells("R")
            return SCALE * np.stack([col - col_start, row - row_start], -1)
        return SCALE * np.stack([col + 0.5 - len(self.maze[0]) / 2, len(self.maze) / 2 - row - 0.5], -1)

    def draw_goal(self, key: jax.Array) -> jax.Array:
        """Draws the goal [2] (x, y) of an evaluation episode, in metres."""
        centre, (first, second) = jnp.asarray(self.centre(self.cells("G")[0]), float), jax.random.split(key)
        if self.ant == "gymnasium":
            return centre + jax.random.uniform(first, (2,), minval=-1.0, maxval=1.0)
        return centre + jax.random.uniform(first, (2,)) + jax.random.uniform(second, (2,), maxval=0.5)

    def start(self, key: jax.Array) -> AntAndGoal:
        goal_key, place_key, position, velocity = jax.random.split(key, 4)
        qpos, start = jnp.asarray(self.model.qpos0), jnp.asarray(self.centre(self.cells("R")[0]), float)
        if self.ant == "gymnasium":  # at rest, anywhere in the middle of the cell
            place, qvel = jax.random.uniform(place_key, (2,), minval=-1.0, maxval=1.0), jnp.zeros(14)
        else:
            noise = jax.random.uniform(position, (15,), minval=-0.1, maxval=0.1)
            qpos, place, qvel = qpos + noise, noise[:2], 0.1 * jax.random.normal(velocity, (14,))
        goal = self.draw_goal(goal_key) if self.fixed_goal is None else self.fixed_goal
        return AntAndGoal(self.put(qpos.at[:2].set(start + place), qvel), goal)

    def reset_to(self, qpos: jax.Array, qvel: jax.Array, goal: jax.Array | None = None):
        """As in `PhysicsTask`, with a goal.

        `goal` [2] is (x, y) in metres. Its default is the centre of the region of evaluation goals.
        """
        if goal is None:
            goal = self.centre(self.cells("G")[0]) + (0.75 if self.ant == "d4rl" else 0.0)
        return self.begin(AntAndGoal(self.put(qpos, qvel), jnp.asarray(goal, float)))

    def advance(self, inner: AntAndGoal, action: jax.Array):
        body = self.engine.step(inner.body, self.control(action))
        reached = jnp.linalg.norm(body.qpos[:2] - inner.goal) <= self.radius
        return inner.replace(body=body), jnp.asarray(reached, float), reached, reached

    def observe(self, inner: AntAndGoal) -> jax.Array:
        return jnp.concatenate([inner.body.qpos, inner.body.qvel])

    @property
    def observation_size(self) -> int:
        return 29

    @property
    def layout(self) -> dict:
        """What a figure draws, in metres: bounds (x0, x1, y0, y1), walls, start, goal and its radius.

        Walls are the line segments between wall cells and free cells.
        """
        centres = self.centre(self.cells("#"))
        x, y = centres.T
        walls = []
        for row, col in self.cells("#"):
            for step in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                r, c = row + step[0], col + step[1]
                if (r, c) in self.cells(" RG"):
                    here, there = self.centre((row, col)), self.centre((r, c))
                    middle, along = (here + there) / 2, (there - here)[::-1] / 2
                    walls.append((tuple(middle - along), tuple(middle + along)))
        goal = self.centre(self.cells("G")[0]) + (0.75 if self.ant == "d4rl" else 0.0)
        return {
            "bounds": (x.min() - 2, x.max() + 2, y.min() - 2, y.max() + 2),
            "walls": walls,
            "start": tuple(self.centre(self.cells("R")[0])),
            "goal": tuple(goal),
            "goal_radius": self.radius,
        }


def d4rl_ant() -> mujoco.MjSpec:
    """Gymnasium's ant with the time step, motors and contact impedance of D4RL's.

    Source: d4rl/locomotion/assets/ant.xml.
    """
    spec = load_spec("ant.xml")
    spec.option.timestep = 0.02
    for motor in spec.actuators:
        motor.gear[0], motor.ctrlrange = 1.0, [-30.0, 30.0]
    for geom in spec.geoms:
        geom.solimp[:3] = [0.8, 0.8, 0.01]
    return spec


class AntWalk(PhysicsTask):
    """An ant on an open floor, to train a policy that walks straight ahead, towards +x.

    Observation [27] and action [8] are in the frame of `canonical`. Reward per step: speed along x in m/s +
    0.2 - 0.02 |action|^2. An episode terminates when the height of the torso leaves 0.3 to 1 m, and is
    truncated after 500 steps. `ant` is "d4rl" or "gymnasium".
    """

    horizon = 500

    def __init__(self, physics: str = "auto", ant: str = "d4rl"):
        super().__init__(
            compile_spec(d4rl_ant() if ant == "d4rl" else load_spec("ant.xml")), 5, physics, root="torso"
        )

    def start(self, key: jax.Array) -> Body:
        position, velocity, turn = jax.random.split(key, 3)
        qpos = jnp.asarray(self.model.qpos0) + jax.random.uniform(position, (15,), minval=-0.1, maxval=0.1)
        yaw = jax.random.uniform(turn, maxval=2 * jnp.pi)
        qpos = qpos.at[3:7].set(quaternion_product(yaw_quaternion(yaw), qpos[3:7]))
        return self.put(qpos, 0.1 * jax.random.normal(velocity, (14,)))

    def advance(self, inner: Body, action: jax.Array):
        _, to_joints = canonical(inner.qpos[2:], inner.qvel, jnp.array([1.0, 0.0]))
        action = to_joints(action)
        body = self.engine.step(inner, self.control(action))
        height = body.qpos[2]
        reward = body.moved[0] / self.dt + 0.2 - 0.02 * jnp.sum(action**2)
        return body, reward, (height < 0.3) | (height > 1.0), jnp.bool_(False)

    def observe(self, inner: Body) -> jax.Array:
        return canonical(inner.qpos[2:], inner.qvel, jnp.array([1.0, 0.0]))[0]

    @property
    def observation_size(self) -> int:
        return 27


def yaw_quaternion(angle: jax.Array) -> jax.Array:
    """The rotation by `angle` [] in radians about z, as a quaternion [4] (w, x, y, z)."""
    return jnp.stack([jnp.cos(angle / 2), 0.0 * angle, 0.0 * angle, jnp.sin(angle / 2)])


def quaternion_product(p: jax.Array, q: jax.Array) -> jax.Array:
    """The product pq [4] of two quaternions [4]: the rotation q, followed by the rotation p."""
    pw, pv, qw, qv = p[0], p[1:], q[0], q[1:]
    return jnp.concatenate([(pw * qw - pv @ qv)[None], pw * qv + qw * pv + jnp.cross(pv, qv)])


# (hip, ankle) of each leg. Two ankles have another sign, because not all ankles' axes point the same way.
LEG_SIGNS = np.float32([[1, 1], [1, -1], [1, -1], [1, 1]])
MOTOR_LEGS = np.array([3, 0, 1, 2])  # the leg of each pair of motors: the motors begin with the fourth leg


def canonical(pose: jax.Array, qvel: jax.Array, direction: jax.Array):
    """The ant's observation in a frame where `direction` [2] is +x and the nearest pair of legs is in front.

    `pose` [13] is qpos[2:], `qvel` is [14]. Returns (observation [27], a function that takes an action [8]
    in this frame to the action [8] for the real joints).

    Walking changes neither when the world is turned about z, nor when each leg takes the name of its
    neighbour. The frame uses both symmetries. So a policy has to learn only one gait in one direction, and
    the body is always within 45 degrees of that direction.
    """
    quaternion, joints = pose[1:5], pose[5:].reshape(4, 2)
    quaternion = quaternion / jnp.linalg.norm(quaternion)
    turned = quaternion_product(yaw_quaternion(-jnp.arctan2(direction[1], direction[0])), quaternion)
    yaw = jnp.arctan2(
        2 * (turned[0] * turned[3] + turned[1] * turned[2]), 1 - 2 * (turned[2] ** 2 + turned[3] ** 2)
    )
    quarter = jnp.round(yaw / (jnp.pi / 2)).astype(jnp.int32)  # quarter turns from +x to the body's heading
    back = -quarter * (jnp.pi / 2)
    turned = quaternion_product(turned, yaw_quaternion(back))
    turned = jnp.where(turned[0] < 0, -turned, turned)
    # Rename the legs: leg i of the new frame is leg i - quarter of the ant, counted counter-clockwise.
    signs = jnp.asarray(LEG_SIGNS)
    rename = lambda legs: jnp.roll(legs * signs, quarter, axis=0) * signs  # noqa: E731
    length = jnp.linalg.norm(direction) + 1e-9
    cos, sin = direction[0] / length, direction[1] / length
    velocity = jnp.array([cos * qvel[0] + sin * qvel[1], cos * qvel[1] - sin * qvel[0], qvel[2]])
    spin = jnp.array(
        [
            jnp.cos(back) * qvel[3] + jnp.sin(back) * qvel[4],
            jnp.cos(back) * qvel[4] - jnp.sin(back) * qvel[3],
            qvel[5],
        ]
    )
    obs = jnp.concatenate(
        [
            pose[:1],
            turned,
            rename(joints).reshape(-1),
            velocity,
            spin,
            rename(qvel[6:].reshape(4, 2)).reshape(-1),
        ]
    )

    def to_joints(action: jax.Array) -> jax.Array:
        legs = action.reshape(4, 2)[jnp.argsort(MOTOR_LEGS)] * signs
        return (jnp.roll(legs, -quarter, axis=0) * signs)[MOTOR_LEGS].reshape(-1)

    return obs, to_joints
