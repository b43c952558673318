"""Shortest paths through a maze, and the controller with which D4RL collected its maze2d data.

The controller follows d4rl/pointmaze/waypoint_controller.py. It consists of pure functions of a `Plan`. The
table of shortest paths is in cells, so it works for mazes of any cell size.
"""

from collections import deque
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ooo_rl.envs.maze2d import CENTRE

P_GAIN, D_GAIN = 10.0, 1.0
REACHED = 0.1  # a waypoint counts as reached when it is nearer than this
# On each axis, a waypoint lies up to this much below its (row, column): between that and the cell's centre.
SPREAD = 0.2
MOVES = ((0, -1), (0, 1), (-1, 0), (1, 0))  # of several shortest paths, D4RL takes the first in this order


def shortest_paths(free: np.ndarray) -> np.ndarray:
    """The next cell on a shortest path, as a table [rows, columns, rows, columns, 2] of int32.

    The first two indices are the present cell, the next two the goal cell. `free` [rows, columns] is True
    for cells that are not walls. At the goal, the next cell is the goal itself. A cell without a path to the
    goal has itself as its next cell. A wall cell leads to its best neighbour, for bodies whose position is
    just inside a wall.
    """
    shape = free.shape
    here = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    table = np.broadcast_to(here[:, :, None, None], (*shape, *shape, 2)).astype(np.int32)
    for goal in map(tuple, np.argwhere(free)):
        distance = np.full(np.add(shape, 2), np.inf)  # with a border: every cell has four neighbours
        distance[goal[0] + 1, goal[1] + 1] = 0
        frontier = deque([goal])
        while frontier:
            row, column = frontier.popleft()
            for down, right in MOVES:
                r, c = row + down, column + right
                if (
                    0 <= r < shape[0]
                    and 0 <= c < shape[1]
                    and free[r, c]
                    and np.isinf(distance[r + 1, c + 1])
                ):
                    distance[r + 1, c + 1] = distance[row + 1, column + 1] + 1
                    frontier.append((r, c))
        around = np.stack([distance[1 + d : 1 + d + shape[0], 1 + r : 1 + r + shape[1]] for d, r in MOVES])
        ahead = here + np.array(MOVES)[around.argmin(0)]
        moves = np.isfinite(around.min(0)) & (distance[1:-1, 1:-1] > 0)
        table[:, :, goal[0], goal[1]] = np.where(moves[..., None], ahead, here)
    return table


def next_cell(table: jax.Array, cell: jax.Array, goal_cell: jax.Array) -> jax.Array:
    """The cell [2] after `cell` [2] on a shortest path to `goal_cell` [2]."""
    return jnp.asarray(table)[cell[0], cell[1], goal_cell[0], goal_cell[1]]


class Plan(NamedTuple):
    """Where the controller is heading."""

    goal: jax.Array  # [2] int32, the last cell
    cell: jax.Array  # [2] int32, the next cell
    waypoint: jax.Array  # [2] the position in the next cell to steer for


class WaypointController:
    """Steers a ball from cell to cell of a maze2d with `walls` [rows, columns] bool.

    For its data, D4RL added N(0, 0.5^2) to the actions and clipped them again. That is left to the caller.

    There is one deviation. D4RL rounds a position to find its cell, and gets a wall cell near two of the
    four walls. Here the cell is the one in which the ball is. The two agree at all places where D4RL makes a
    plan after a reset or when a waypoint is reached.
    """

    def __init__(self, walls: np.ndarray):
        self.table = shortest_paths(~walls)

    def plan(self, position: jax.Array, goal: jax.Array, key: jax.Array) -> Plan:
        """The plan from `position` [2] to the cell `goal` [2]; `key` places its first waypoint."""
        return self.towards(jnp.round(position - CENTRE).astype(jnp.int32), jnp.asarray(goal, jnp.int32), key)

    def act(
        self, plan: Plan, position: jax.Array, velocity: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Plan]:
        """Returns the action [2] in [-1, 1], and the plan for the next step.

        `key` places the next waypoint if this one is reached.
        """
        offset = plan.waypoint - position
        action = jnp.clip(P_GAIN * offset - D_GAIN * velocity, -1.0, 1.0)
        reached = jnp.linalg.norm(offset) < REACHED
        following = self.towards(plan.cell, plan.goal, key)
        return action, jax.tree.map(lambda new, old: jnp.where(reached, new, old), following, plan)

    def towards(self, cell: jax.Array, goal: jax.Array, key: jax.Array) -> Plan:
        """The plan from `cell` [2] to the cell `goal` [2].

        The last waypoint is exactly the (row, column) of the goal. All others are drawn up to `SPREAD` below
        theirs.
        """
        following = next_cell(self.table, cell, goal)
        spread = jnp.where((following == goal).all(), 0.0, jax.random.uniform(key, (2,), float, 0.0, SPREAD))
        return Plan(goal, following, following - spread)
