"""Maze2D of D4RL: a force pushes a ball through a maze. Its MuJoCo physics is written in JAX.

Source: arXiv 2004.07219, and d4rl/pointmaze/maze_model.py. The model has two slide joints with damping, a
force per axis, and walls of unit boxes with frictionless soft contacts. Units are metres, kilograms and
seconds.

x grows with the row of the map, and y with the column. In the coordinates of the
observation, the box of cell (row, column) is centred at (row, column) - 0.2, because D4RL puts the body at
(1.2, 1.2) and the boxes at (row + 1, column + 1). But starts and the target are at (row, column) itself.

Contacts are those of MuJoCo 2, with which D4RL's data were made: steps agree with version 2.3.7 to 2e-13, as
long as the ball's centre is outside the walls. In newer versions the same XML gives other contacts, because
two rules have changed. With both changes undone, MuJoCo 3.17.0 makes the same steps as this module:

* The margin of a contact was the larger one of the ball's and the wall's, 0.002. Since 3.5.0 it is their
  sum. To undo this, give the margin to only one of the two.
* The softness of a contact was relative to 2 / (3 mass): the mean of the inverse masses on three axes, of
  which the ball can move along two. Since 3.0 it is relative to 1 / mass. This changes the velocity after a
  bump by up to 0.15, rarely by more. To undo it, set `body_invweight0`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ooo_rl.envs.base import State, Task

MAZES = {  # maps of maze2d-{open-v0, umaze-v1, medium-v1, large-v1}: "#" wall, "O" empty, "G" goal
    "open": ("#######", "#OOOOO#", "#OOGOO#", "#OOOOO#", "#######"),
    "umaze": ("#####", "#GOO#", "###O#", "#OOO#", "#####"),
    "medium": (
        "########",
        "#OO##OO#",
        "#OO#OOO#",
        "##OOO###",
        "#OO#OOO#",
        "#O#OO#O#",
        "#OOO#OG#",
        "########",
    ),
    "large": (
        "############",
        "#OOOO#OOOOO#",
        "#O##O#O#O#O#",
        "#OOOOOO#OOO#",
        "#O####O###O#",
        "#OO#O#OOOOO#",
        "##O#O#O#O###",
        "#OO#OOO#OGO#",
        "############",
    ),
}
HORIZONS = {"open": 150, "umaze": 300, "medium": 600, "large": 800}  # d4rl/pointmaze/__init__.py
GOAL_RADIUS = 0.5
# Of initial states: half-width of the uniform noise on positions, and standard deviation of velocities.
START_NOISE, START_SPEED = 0.1, 0.1
CENTRE = -0.2  # from a cell's (row, column) to the centre of its box
MAX_SPEED = 5.0  # per axis; velocities are clipped to it before each step

TIMESTEP, GEAR, DAMPING, MARGIN = 0.01, 100.0, 1.0, 0.002
RADIUS = 0.1
MASS = 1000 * 4 / 3 * math.pi * RADIUS**3
# MuJoCo's default contact parameters. solref: time constant and damping ratio.
# solimp: impedance at the margin, impedance at full depth, and that depth.
TIME_CONSTANT, DAMPING_RATIO = 0.02, 1.0
SOFT, HARD, DEPTH = 0.9, 0.95, 0.001
STIFFNESS = 1 / (HARD * TIME_CONSTANT * DAMPING_RATIO) ** 2
DAMPER = 2 / (HARD * TIME_CONSTANT)
COMPLIANCE = 2 / (3 * MASS)
NEWTON_STEPS = 4  # 3 were enough in each of a million random states


class Maze2D(Task):
    """State and observation are (x, y, vx, vy). An action in [-1, 1]^2 is a force of up to `GEAR` per axis.

    The "sparse" reward is 1 at every step that ends within `GOAL_RADIUS` of the target, else 0. The "dense"
    reward is exp(-distance). Episodes never terminate. They are truncated after `horizon` steps, by default
    D4RL's. They start in any cell that is not a wall, the goal cell included. Raises ValueError for settings
    that do not exist.
    """

    def __init__(self, maze: str = "large", reward: str = "sparse", horizon: int | None = None):
        if maze not in MAZES or reward not in ("sparse", "dense"):
            raise ValueError(
                f"maze is one of {', '.join(MAZES)} (got {maze}); reward is sparse or dense (got {reward})"
            )
        if horizon is not None and horizon < 1:
            raise ValueError(f"horizon must be positive, got {horizon}")
        self.maze, self.reward, self.horizon = maze, reward, horizon or HORIZONS[maze]
        grid = np.array([list(row) for row in MAZES[maze]])
        self.walls = grid == "#"  # [rows, columns] bool
        self.cells = np.argwhere(~self.walls)  # [n, 2] where episodes start
        self.goal = np.argwhere(grid == "G")[0]  # [2] the goal's cell, which is the target's position as well
        # For each corner, whether the four cells that meet there are walls: [rows - 1, columns - 1, 4] bool.
        # The ball is smaller than a cell, so it can touch no others.
        self.blocks = np.stack(
            [self.walls[:-1, :-1], self.walls[:-1, 1:], self.walls[1:, :-1], self.walls[1:, 1:]], -1
        )

    def start(self, key: jax.Array) -> jax.Array:
        cell_key, noise_key, speed_key = jax.random.split(key, 3)
        cell = jax.random.choice(cell_key, jnp.asarray(self.cells, float))
        noise = jax.random.uniform(noise_key, (2,), float, -START_NOISE, START_NOISE)
        return jnp.concatenate([cell + noise, START_SPEED * jax.random.normal(speed_key, (2,), float)])

    def reset_to(self, qpos: jax.Array, qvel: jax.Array) -> State:
        if jnp.shape(qpos) != (2,) or jnp.shape(qvel) != (2,):
            raise ValueError(f"needs qpos (2,) and qvel (2,), not {jnp.shape(qpos)} and {jnp.shape(qvel)}")
        return self.begin(jnp.concatenate([jnp.asarray(qpos, float), jnp.asarray(qvel, float)]))

    def advance(self, inner: jax.Array, action: jax.Array):
        position, velocity = inner[:2], jnp.clip(inner[2:], -MAX_SPEED, MAX_SPEED)
        free = (GEAR * action - DAMPING * velocity) / MASS
        acceleration = constrained(free, *contacts(position, velocity, self.blocks))
        # MuJoCo's Euler integrator computes the damping force with the velocity at the end of the step.
        velocity = velocity + TIMESTEP * MASS / (MASS + TIMESTEP * DAMPING) * acceleration
        position = position + TIMESTEP * velocity
        distance = jnp.linalg.norm(position - self.goal)
        success = distance <= GOAL_RADIUS
        reward = jnp.where(success, 1.0, 0.0) if self.reward == "sparse" else jnp.exp(-distance)
        return jnp.concatenate([position, velocity]), reward, jnp.bool_(False), success

    def observe(self, inner: jax.Array) -> jax.Array:
        return inner

    @property
    def observation_size(self) -> int:
        return 4

    @property
    def action_size(self) -> int:
        return 2

    @property
    def layout(self) -> dict:
        """What a figure draws: bounds (x0, x1, y0, y1), wall outlines as segments, goal and its radius.

        All are in units of the observation. There is no fixed start.
        """
        low, (rows, columns) = CENTRE - 0.5, self.walls.shape
        return {
            "bounds": (low, low + rows, low, low + columns),
            "walls": outlines(self.walls, low),
            "start": None,
            "goal": tuple(self.goal.tolist()),
            "goal_radius": GOAL_RADIUS,
        }


def outlines(walls: np.ndarray, low: float = 0.0, size: float = 1.0) -> list[tuple]:
    """The lines ((x, y), (x, y)) between free cells and `walls` [rows, columns] bool.

    The cells are squares of side `size`; the first one's corner is at (low, low).
    """
    at = lambda row, column: (low + size * row, low + size * column)  # noqa: E731
    # Cells with a line towards the next row, and cells with one towards the next column.
    across = np.argwhere(walls[:-1] != walls[1:]).tolist()
    along = np.argwhere(walls[:, :-1] != walls[:, 1:]).tolist()
    lines = [(at(r + 1, c), at(r + 1, c + 1)) for r, c in across]
    return lines + [(at(r, c + 1), at(r + 1, c + 1)) for r, c in along]


def contacts(
    position: jax.Array, velocity: jax.Array, blocks: np.ndarray
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The ball's contacts with the four cells that meet at the nearest corner.

    Returns (normals [4, 2] that point away from the walls, accelerations [4] along them that the contacts
    demand, weights [4] of these demands, 0 without contact). In MuJoCo's terms they are the Jacobian, aref
    and 1/R.
    """
    corner = jnp.clip(jnp.floor(position - CENTRE), 0, np.array(blocks.shape[:2]) - 1)
    # Offsets from the boxes' centres [4, 2]. The corner is subtracted first, which leaves small numbers: the
    # stiffness would amplify float32's rounding errors of large ones.
    offset = (position - corner) - (CENTRE + np.array([[0, 0], [0, 1], [1, 0], [1, 1]]))
    beyond = jnp.abs(offset) - 0.5
    outside = jnp.maximum(beyond, 0)
    apart = jnp.linalg.norm(outside, axis=1)
    deepest = jnp.max(beyond, axis=1)
    inside = deepest <= 0  # the ball's centre is in the box, and leaves through the nearest side
    away = jnp.where(
        inside[:, None], beyond == deepest[:, None], outside / jnp.where(inside, 1, apart)[:, None]
    )
    normals = jnp.where(offset < 0, -away, away)
    gap = jnp.where(inside, deepest, apart) - RADIUS - MARGIN

    depth = jnp.minimum(jnp.abs(gap) / DEPTH, 1)
    ramp = jnp.where(depth < 0.5, 2 * depth**2, 1 - 2 * (1 - depth) ** 2)
    impedance = SOFT + (HARD - SOFT) * ramp
    wanted = -DAMPER * (normals @ velocity) - STIFFNESS * impedance * gap
    row, column = corner.astype(jnp.int32)
    touching = jnp.asarray(blocks)[row, column] & (gap < 0)
    return normals, wanted, jnp.where(touching, impedance / ((1 - impedance) * COMPLIANCE), 0)


def constrained(free: jax.Array, normals: jax.Array, wanted: jax.Array, weights: jax.Array) -> jax.Array:
    """The ball's acceleration [2] under the contacts, by Newton's method.

    It is the a that minimises MASS |a - free|^2 + sum of weights * min(normals @ a - wanted, 0)^2, where
    `free` [2] is the acceleration without contacts. The other arguments come from `contacts`.
    """
    acceleration = free
    for _ in range(NEWTON_STEPS):
        pushing = weights * (normals @ acceleration < wanted)
        force = MASS * free + (pushing * wanted) @ normals
        xx = MASS + jnp.sum(pushing * normals[:, 0] ** 2)
        yy = MASS + jnp.sum(pushing * normals[:, 1] ** 2)
        xy = jnp.sum(pushing * normals[:, 0] * normals[:, 1])
        acceleration = jnp.stack([yy * force[0] - xy * force[1], xx * force[1] - xy * force[0]]) / (
            xx * yy - xy**2
        )
    return acceleration
