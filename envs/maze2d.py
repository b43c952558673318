"""Maze2D of D4RL (arXiv 2004.07219; d4rl/pointmaze/maze_model.py): a ball pushed through a maze, its MuJoCo physics written in JAX.

The model is two slide joints with damping, a force per axis, and walls of unit boxes with frictionless soft contacts. x runs along the
rows of the map and y along its columns. The box of cell (row, column) is centred at (row, column) - 0.2 in the coordinates of the
observation, because D4RL puts the body at (1.2, 1.2) and the boxes at (row + 1, column + 1); yet starts and the target are at
(row, column) itself. Sizes are in metres, kilogrammes and seconds.

Contacts are those of MuJoCo 2, as D4RL's data were made with it: steps agree with version 2.3.7 to 2e-13. Today the same XML gives other
ones. Two rules have changed, and with both undone MuJoCo 3.17.0 does the steps of this module:

* The margin of a contact was the larger of ball's and wall's, 0.002. Since 3.5.0 it is their sum: give the margin to one of them.
* Its softness was relative to 2 / (3 mass), the mean over three axes of what moves the ball. Since 3.0 it is 1 / mass,
  which changes the velocity after a bump by up to 0.15, rarely more: set body_invweight0.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from envs.base import State, Task

MAZES = {  # "#" wall, "O" empty, "G" goal: the maps of maze2d-{open-v0, umaze-v1, medium-v1, large-v1}
    "open": ("#######", "#OOOOO#", "#OOGOO#", "#OOOOO#", "#######"),
    "umaze": ("#####", "#GOO#", "###O#", "#OOO#", "#####"),
    "medium": ("########", "#OO##OO#", "#OO#OOO#", "##OOO###", "#OO#OOO#", "#O#OO#O#", "#OOO#OG#", "########"),
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
START_NOISE, START_SPEED = 0.1, 0.1  # half-width of the uniform noise on positions, standard deviation of velocities
CENTRE = -0.2  # from a cell's (row, column) to the centre of its box
MAX_SPEED = 5.0  # per axis, applied before each step

TIMESTEP, GEAR, DAMPING, MARGIN = 0.01, 100.0, 1.0, 0.002
RADIUS = 0.1
MASS = 1000 * 4 / 3 * math.pi * RADIUS**3
# MuJoCo's defaults: solref (time constant, damping ratio) and solimp (impedance at the margin, at full depth, and that depth).
TIME_CONSTANT, DAMPING_RATIO = 0.02, 1.0
SOFT, HARD, DEPTH = 0.9, 0.95, 0.001
STIFFNESS = 1 / (HARD * TIME_CONSTANT * DAMPING_RATIO) ** 2
DAMPER = 2 / (HARD * TIME_CONSTANT)
COMPLIANCE = 2 / (3 * MASS)
NEWTON_STEPS = 4  # three sufficed in each of a million random states


class Maze2D(Task):
    """State and observation are (x, y, vx, vy); an action in [-1, 1]^2 is a force of up to `GEAR` per axis.

    Rewards are "sparse" (1 at every step that ends within `GOAL_RADIUS` of the target) or "dense" (exp of minus the distance). Nothing
    terminates; `horizon` steps, by default D4RL's, truncate. Episodes start in any cell that is not a wall, the goal's among them.
    """

    def __init__(self, maze: str = "large", reward: str = "sparse", horizon: int | None = None):
        if maze not in MAZES or reward not in ("sparse", "dense"):
            raise ValueError(f"maze is one of {', '.join(MAZES)} (got {maze}); reward is sparse or dense (got {reward})")
        if horizon is not None and horizon < 1:
            raise ValueError(f"horizon must be positive, got {horizon}")
        self.maze, self.reward, self.horizon = maze, reward, horizon or HORIZONS[maze]
        grid = np.array([list(row) for row in MAZES[maze]])
        self.walls = grid == "#"  # [rows, columns] bool
        self.cells = np.argwhere(~self.walls)  # [n, 2] where episodes start
        self.goal = np.argwhere(grid == "G")[0]  # [2] cell, and the target's position as well
        # The four cells that meet at a corner, all a ball smaller than a cell can touch: [rows - 1, columns - 1, 4] bool.
        self.blocks = np.stack([self.walls[:-1, :-1], self.walls[:-1, 1:], self.walls[1:, :-1], self.walls[1:, 1:]], -1)

    def start(self, key: jax.Array) -> jax.Array:
        cell_key, noise_key, speed_key = jax.random.split(key, 3)
        cell = jax.random.choice(cell_key, jnp.asarray(self.cells, float))
        noise = jax.random.uniform(noise_key, (2,), float, -START_NOISE, START_NOISE)
        return jnp.concatenate([cell + noise, START_SPEED * jax.random.normal(speed_key, (2,), float)])

    def reset_to(self, qpos: jax.Array, qvel: jax.Array) -> State:
        return self.begin(jnp.concatenate([jnp.asarray(qpos, float), jnp.asarray(qvel, float)]))

    def advance(self, inner: jax.Array, action: jax.Array):
        position, velocity = inner[:2], jnp.clip(inner[2:], -MAX_SPEED, MAX_SPEED)
        free = (GEAR * action - DAMPING * velocity) / MASS
        acceleration = constrained(free, *contacts(position, velocity, self.blocks))
        # MuJoCo's Euler step takes the damping at the end of the step.
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
        """What a figure draws: bounds (x0, x1, y0, y1), wall outlines as segments, goal and its radius, in units of the observation."""
        low, high = CENTRE - 0.5, CENTRE + 0.5
        rows, columns = self.walls.shape
        across = np.argwhere(self.walls[:-1] != self.walls[1:])  # cells whose side towards the next row is an outline
        along = np.argwhere(self.walls[:, :-1] != self.walls[:, 1:])
        outlines = [((r + high, c + low), (r + high, c + high)) for r, c in across.tolist()]
        outlines += [((r + low, c + high), (r + high, c + high)) for r, c in along.tolist()]
        return {
            "bounds": (low, rows - 1 + high, low, columns - 1 + high),
            "walls": outlines,
            "start": None,
            "goal": tuple(self.goal.tolist()),
            "goal_radius": GOAL_RADIUS,
        }


def contacts(position: jax.Array, velocity: jax.Array, blocks: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The ball's contacts with the four cells that meet at the nearest corner.

    Returns (normals away from the walls [4, 2], the accelerations along them that the contacts ask for [4], and the weights of those
    wishes [4], 0 where there is no contact): MuJoCo's Jacobian, aref and 1/R.
    """
    corner = jnp.clip(jnp.floor(position - CENTRE), 0, np.array(blocks.shape[:2]) - 1)
    # From the centres of the boxes [4, 2], small numbers first: the stiffness would amplify what float32 rounds off.
    offset = (position - corner) - (CENTRE + np.array([[0, 0], [0, 1], [1, 0], [1, 1]]))
    beyond = jnp.abs(offset) - 0.5
    outside = jnp.maximum(beyond, 0)
    apart = jnp.linalg.norm(outside, axis=1)
    deepest = jnp.max(beyond, axis=1)
    inside = deepest <= 0  # of the ball's centre, which then leaves through the nearest side
    away = jnp.where(inside[:, None], beyond == deepest[:, None], outside / jnp.where(inside, 1, apart)[:, None])
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
    """The acceleration a [2] that minimises MASS |a - free|^2 + sum of weights * min(normals @ a - wanted, 0)^2, by Newton's method."""
    acceleration = free
    for _ in range(NEWTON_STEPS):
        pushing = weights * (normals @ acceleration < wanted)
        force = MASS * free + (pushing * wanted) @ normals
        xx = MASS + jnp.sum(pushing * normals[:, 0] ** 2)
        yy = MASS + jnp.sum(pushing * normals[:, 1] ** 2)
        xy = jnp.sum(pushing * normals[:, 0] * normals[:, 1])
        acceleration = jnp.stack([yy * force[0] - xy * force[1], xx * force[1] - xy * force[0]]) / (xx * yy - xy**2)
    return acceleration
