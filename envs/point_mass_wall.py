"""Point mass and wall, the didactic task of OOO (arXiv 2310.08558, section 5.1).

The data lead over a wall; the shorter way leads under it. The constants are those of the official code
(envs/point_mass_wall.py at MaxSobolMark/OOO b1424a2), whose class does not run as released. The paper and
that code differ. Each point in which they differ is a setting here:

=============  =======================  ======================================  ==========================
setting        paper                    official code                           default
=============  =======================  ======================================  ==========================
start_noise    N(0, 0.02^2)             U(-0.02, 0.02)                          "normal" (the paper's)
goal_radius    not stated               0.01, less than a third of a step       0.05, one full diagonal step
reward         +1 at the goal, else 0   training +1/0; evaluation 0/-1          "cost": 0 at the goal, else -1
horizon        not stated               150                                     150
=============  =======================  ======================================  ==========================

With "goal" rewards and a discount of 0.99, advantages are of order 0.01, and advantage-weighted regression is
nearly behaviour cloning. A cost of 1 per step makes advantages of order 1. The papers shift AntMaze's rewards
in the same way.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ooo_rl.envs.base import Task

STEP = 0.05 * 0.5**0.5  # displacement per axis of a full action; a full diagonal step covers 0.05
LOW, HIGH = np.float32([-0.25, -0.25]), np.float32([1.25, 1.45])
START, GOAL = np.float32([0.0, 0.5]), np.float32([1.0, 0.15])
WALL_X, WALL_BOTTOM, WALL_TOP = 0.5, 0.1, 1.2
NOISE = 0.02  # of starts: the standard deviation (normal) or the half-width (uniform)


class PointMassWall(Task):
    """State and observation are the position (x, y). An action in [-1, 1]^2 moves it by `action * STEP`.

    A move that would cross the wall leaves the mass where it is. An episode terminates with success when the
    mass is less than `goal_radius` away from the goal, and is truncated after `horizon` steps. Raises
    ValueError for settings that do not exist.
    """

    def __init__(
        self, goal_radius: float = 0.05, horizon: int = 150, start_noise: str = "normal", reward: str = "cost"
    ):
        if goal_radius <= 0 or horizon < 1:
            raise ValueError(f"goal_radius and horizon must be positive, got {goal_radius} and {horizon}")
        if start_noise not in ("normal", "uniform", "none") or reward not in ("cost", "goal"):
            raise ValueError(
                f"start_noise is normal, uniform or none (got {start_noise}); "
                f"reward is cost or goal (got {reward})"
            )
        self.goal_radius, self.horizon, self.start_noise, self.reward = (
            goal_radius,
            horizon,
            start_noise,
            reward,
        )

    def start(self, key: jax.Array) -> jax.Array:
        noise = {
            "normal": lambda: NOISE * jax.random.normal(key, (2,)),
            "uniform": lambda: jax.random.uniform(key, (2,), minval=-NOISE, maxval=NOISE),
            "none": lambda: jnp.zeros(2),
        }[self.start_noise]()
        return START + noise

    def advance(self, inner: jax.Array, action: jax.Array):
        target = jnp.clip(inner + action * STEP, LOW, HIGH)
        position = jnp.where(crosses_wall(inner, target), inner, target)
        reached = jnp.linalg.norm(position - GOAL) < self.goal_radius
        reward = jnp.float32(reached) - (1.0 if self.reward == "cost" else 0.0)
        return position, reward, reached, reached

    def observe(self, inner: jax.Array) -> jax.Array:
        return inner

    @property
    def observation_size(self) -> int:
        return 2

    @property
    def action_size(self) -> int:
        return 2

    @property
    def layout(self) -> dict:
        """What a figure draws: bounds (x0, x1, y0, y1), wall segments, start, goal and its radius.

        All are in units of the observation.
        """
        return {
            "bounds": (LOW[0], HIGH[0], LOW[1], HIGH[1]),
            "walls": [((WALL_X, WALL_BOTTOM), (WALL_X, WALL_TOP))],
            "start": tuple(START),
            "goal": tuple(GOAL),
            "goal_radius": self.goal_radius,
        }


def crosses_wall(start: jax.Array, end: jax.Array) -> jax.Array:
    """Whether the segment from `start` [2] to `end` [2] meets the wall, [] bool."""
    sides_differ = (start[0] < WALL_X) != (end[0] < WALL_X)
    run = jnp.where(sides_differ, end[0] - start[0], 1.0)
    height = start[1] + (WALL_X - start[0]) / run * (end[1] - start[1])
    return sides_differ & (height >= WALL_BOTTOM) & (height <= WALL_TOP)
