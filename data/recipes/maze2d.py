"""Datasets of a point in a maze."""

import jax
import jax.numpy as jnp
import numpy as np

from ooo_rl.data.datasets.write import without
from ooo_rl.data.recipes.episodes import record
from ooo_rl.data.recipes.recipe import Recipe
from ooo_rl.envs import maze2d, waypoints


def noisy_waypoints(env: maze2d.Maze2D, transitions: int, seed: int, policies: list) -> list[dict]:
    """D4RL's maze2d data: the point goes to one target after another, with noise N(0, 0.5^2) on every action.

    An episode ends at its target or after `env.horizon` steps. The next one goes on from there, without a
    new start. D4RL makes one endless run; here up to 64 runs go side by side.
    """
    controller, endless = (
        waypoints.WaypointController(env.walls),
        maze2d.Maze2D(env.maze, env.reward, horizon=np.iinfo(np.int32).max),
    )
    cells = jnp.asarray(env.cells)

    def begin(state, key):
        cell_key, plan_key = jax.random.split(key)
        goal = jax.random.choice(cell_key, cells)
        return controller.plan(state.obs[:2], goal, plan_key), jnp.int32(0)

    def act(memory, state, key):
        plan, steps = memory
        plan_key, noise_key = jax.random.split(key)
        action, plan = controller.act(plan, state.obs[:2], state.obs[2:], plan_key)
        arrived = jnp.linalg.norm(state.obs[:2] - plan.goal) < waypoints.REACHED
        action = jnp.clip(action + 0.5 * jax.random.normal(noise_key, (2,)), -1, 1)
        return action, (plan, steps + 1), arrived | (steps + 1 >= env.horizon)

    return record(endless, begin, act, transitions, seed)


# Centre and radius of the discs that OOO removes from maze2d-large.
MISSING = (((7, 9), 1.5), ((1, 10), 1.5), ((1, 1), 2.0))


def missing_data(env: maze2d.Maze2D, transitions: int, seed: int, policies: list) -> list[dict]:
    """maze2d-large without the rows that begin near the goal or in two corners (OOO, section 5.2).

    The other rows keep their order in time.
    """
    return without(noisy_waypoints(env, transitions, seed, policies), MISSING)


SIZES = {
    "open": 1_000_000,
    "umaze": 1_000_000,
    "medium": 2_000_000,
    "large": 4_000_000,
}  # D4RL's numbers of rows

RECIPES = {
    f"ooo/maze2d-{maze}{dense}/noisy-v0": Recipe(
        f"maze2d-{maze}{dense}", noisy_waypoints, rows, "Waypoint controller with action noise 0.5 (D4RL)"
    )
    for maze, rows in SIZES.items()
    for dense in ("", "-dense")
} | {
    "ooo/maze2d-large-missing-data/noisy-v0": Recipe(
        "maze2d-large-missing-data",
        missing_data,
        500_000,
        "maze2d-large with three regions cut out (OOO)",
        detail=f"discs {MISSING}",
    )
}
