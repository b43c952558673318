"""Two goals in four rooms: the toy maze of GDE (Figure 2), a task with discrete actions.

The paper ("Guided decoupled exploration for offline RL fine-tuning", section 3.1 and appendix B.4) gives the
start, the two goals and the cost of -1 per step; it does not give the map, its size, the actions or the
horizon. These constants are those of code that fits all that the paper says, though it is not the paper's own
(rnd/torch/envs/pointmass/pointmass2.py at fuyw/jrlzoo 3b66e4e).

Without noise, the left goal takes 16 steps, through one door, and the right one 34, through two.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ooo_rl.envs.base import Task
from ooo_rl.envs.maze2d import outlines

ROOMS = (  # the map as a figure shows it: "#" wall, "O" empty
    "OOOOOO#OOOO",
    "OOOOOO#OOOO",
    "OOOOOOOOOOO",
    "OOOOOO#OOOO",
    "OOOOOO#OOOO",
    "##O######O#",
    "OOOOO#OOOOO",
    "OOOOO#OOOOO",
    "OOOOO#OOOOO",
    "OOOOOOOOOOO",
    "OOOOO#OOOOO",
)
WALLS = np.array([list(row) for row in ROOMS]).T[:, ::-1] == "#"  # [11, 11] bool, by x and y
CELL = 2.0  # side of a cell; an action moves by 1
SIZE = CELL * len(WALLS)
START = np.float32([2, 2])
GOALS = np.float32([[2, 16], [20, 20]])  # left, right
GOAL_RADIUS = 2.0
MOVES = np.float32([[0, 0], [0, -1], [0, 1], [-1, 0], [1, 0]])  # stay, down, up, left, right
NOISE = 0.5  # standard deviation on each axis
SUBSTEPS = 10


class ToyMaze(Task):
    """Five actions: stay, down, up, left and right, each with noise N(0, `noise`^2) on both axes.

    The observation is the position (x, y) over the side of the map, so in [0, 1]^2. A move is made in ten
    parts, first along x and then along y in each; a part that would end in a wall or outside is left out. The
    reward is -1, and 0 at a goal. An episode terminates with success less than `GOAL_RADIUS` away from one of
    the goals, and is truncated after `horizon` steps. Raises ValueError for settings that do not exist.
    """

    discrete, observation_size, action_size = True, 2, len(MOVES)

    def __init__(self, horizon: int = 100, noise: float = NOISE):
        if horizon < 1 or noise < 0:
            raise ValueError(f"horizon must be positive and noise not negative, got {horizon} and {noise}")
        self.horizon, self.noise = horizon, noise

    def start(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(Position [2], key of the noise to come)."""
        return jnp.asarray(START), key

    def advance(self, inner: tuple[jax.Array, jax.Array], action: jax.Array):
        position, key = inner
        key, noise_key = jax.random.split(key)
        move = jnp.asarray(MOVES)[action] + self.noise * jax.random.normal(noise_key, (2,))
        position = walk(position, move)
        reached = (jnp.linalg.norm(position - GOALS, axis=1) < GOAL_RADIUS).any()
        return (position, key), jnp.float32(reached) - 1, reached, reached

    def observe(self, inner: tuple[jax.Array, jax.Array]) -> jax.Array:
        return inner[0] / SIZE

    @property
    def layout(self) -> dict:
        """What a figure draws: bounds (x0, x1, y0, y1), wall outlines as segments, start, goals and radius.

        All are in units of the observation. `goal` is the nearer one of the `goals`.
        """
        goals = [tuple(goal) for goal in (GOALS / SIZE).tolist()]
        return {
            "bounds": (0.0, 1.0, 0.0, 1.0),
            "walls": outlines(WALLS, size=CELL / SIZE),
            "start": tuple((START / SIZE).tolist()),
            "goal": goals[0],
            "goals": goals,
            "goal_radius": GOAL_RADIUS / SIZE,
        }


def walk(position: jax.Array, move: jax.Array) -> jax.Array:
    """Where a `move` [2] from `position` [2] ends, both in units of a step, with walls in the way."""

    def part(_, position):
        for axis in (0, 1):
            there = position.at[axis].add(move[axis] / SUBSTEPS)
            position = jnp.where(is_free(there), there, position)
        return position

    return jax.lax.fori_loop(0, SUBSTEPS, part, position)


def is_free(position: jax.Array) -> jax.Array:
    """Whether `position` [2] is inside the map and not in a wall, [] bool."""
    inside = ((position >= 0) & (position <= SIZE)).all()
    cell = jnp.clip((position // CELL).astype(jnp.int32), 0, len(WALLS) - 1)
    return inside & ~jnp.asarray(WALLS)[cell[0], cell[1]]
