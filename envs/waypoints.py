"""Shortest ways through a maze, and the controller D4RL collected its maze2d data with (d4rl/pointmaze/waypoint_controller.py).

The table of shortest ways knows cells only, so it serves mazes of any cell size. The controller is of pure functions over a `Plan`.
"""

from collections import deque
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.maze2d import CENTRE

P_GAIN, D_GAIN = 10.0, 1.0
REACHED = 0.1
SPREAD = 0.2  # a waypoint lies up to this much before its (row, column) on either axis: between it and the middle of the cell
MOVES = ((0, -1), (0, 1), (-1, 0), (1, 0))  # of equally short ways D4RL takes the first in this order


def shortest_paths(free: np.ndarray) -> np.ndarray:
    """Table [rows, columns, rows, columns, 2] of the cell to enter next, by the cell one is in and the cell one wants to reach.

    `free` [rows, columns] is true where one can go. The goal follows itself, a cell with no way to the goal too; a wall
    cell leads to its best neighbour, for bodies whose position falls just inside a wall.
    """
    shape = free.shape
    here = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    table = np.broadcast_to(here[:, :, None, None], (*shape, *shape, 2)).astype(np.int32)
    for goal in map(tuple, np.argwhere(free)):
        distance = np.full(np.add(shape, 2), np.inf)  # with a border, so that every cell has four neighbours
        distance[goal[0] + 1, goal[1] + 1] = 0
        frontier = deque([goal])
        while frontier:
            row, column = frontier.popleft()
            for down, right in MOVES:
                r, c = row + down, column + right
                if 0 <= r < shape[0] and 0 <= c < shape[1] and free[r, c] and np.isinf(distance[r + 1, c + 1]):
                    distance[r + 1, c + 1] = distance[row + 1, column + 1] + 1
                    frontier.append((r, c))
        around = np.stack([distance[1 + d : 1 + d + shape[0], 1 + r : 1 + r + shape[1]] for d, r in MOVES])
        ahead = here + np.array(MOVES)[around.argmin(0)]
        moves = np.isfinite(around.min(0)) & (distance[1:-1, 1:-1] > 0)
        table[:, :, goal[0], goal[1]] = np.where(moves[..., None], ahead, here)
    return table


def next_cell(table: jax.Array, cell: jax.Array, goal_cell: jax.Array) -> jax.Array:
    """The cell [2] after `cell` on a shortest way to `goal_cell`."""
    return jnp.asarray(table)[cell[0], cell[1], goal_cell[0], goal_cell[1]]


class Plan(NamedTuple):
    goal: jax.Array  # [2] int32 cell to reach in the end
    cell: jax.Array  # [2] int32 cell to reach next
    waypoint: jax.Array  # [2] position in it to steer for


class WaypointController:
    """Steers a ball from cell to cell of the maze2d with these `walls` [rows, columns].

    D4RL's data add N(0, 0.5^2) to the actions and clip once more; that is left to the caller.
    One deviation: D4RL takes the cell of a position by rounding, which near two of its four walls gives the wall. Here it is the cell
    the ball is in. The two agree wherever D4RL plans after a reset or on arrival.
    """

    def __init__(self, walls: np.ndarray):
        self.table = shortest_paths(~walls)

    def plan(self, position: jax.Array, goal: jax.Array, key: jax.Array) -> Plan:
        """A plan from `position` [2] to the cell `goal` [2]; `key` places its first waypoint."""
        return self.towards(jnp.round(position - CENTRE).astype(jnp.int32), jnp.asarray(goal, jnp.int32), key)

    def act(self, plan: Plan, position: jax.Array, velocity: jax.Array, key: jax.Array) -> tuple[jax.Array, Plan]:
        """The action [2], and the plan for the next step; `key` places the next waypoint if this one is reached."""
        offset = plan.waypoint - position
        action = jnp.clip(P_GAIN * offset - D_GAIN * velocity, -1.0, 1.0)
        reached = jnp.linalg.norm(offset) < REACHED
        following = self.towards(plan.cell, plan.goal, key)
        return action, jax.tree.map(lambda new, old: jnp.where(reached, new, old), following, plan)

    def towards(self, cell: jax.Array, goal: jax.Array, key: jax.Array) -> Plan:
        """The plan of one who is in `cell`. The last waypoint is the goal itself, the others are spread."""
        following = next_cell(self.table, cell, goal)
        spread = jnp.where((following == goal).all(), 0.0, jax.random.uniform(key, (2,), float, 0.0, SPREAD))
        return Plan(goal, following, following - spread)
