"""Datasets of an ant that is led through a maze."""

import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from brax.envs.base import Wrapper

from ooo_rl.data import policy
from ooo_rl.data.datasets.write import episode, without
from ooo_rl.data.recipes.episodes import record
from ooo_rl.data.recipes.recipe import Recipe
from ooo_rl.envs import antmaze, waypoints
from ooo_rl.envs.antmaze import AntAndGoal, AntMaze, canonical

# Made by train_policy.py; docs/antmaze.md has the command.
WALKER = pathlib.Path(__file__).parents[1] / "policies" / "ant_walk.npz"


HAND_PICKED = {  # the goals of D4RL's generation maps, as (row, column)
    "umaze": ((3, 1),), "medium": ((2, 6), (5, 1), (6, 5)),
    "large": ((1, 6), (3, 5), (3, 10), (5, 2), (7, 4), (7, 6), (7, 9)),
}  # fmt: skip


GOAL_MISSING = (((32.0, 24.0), 2.5),)  # the disc (centre, radius in m) that OOO removes from antmaze-large


def walks(env: AntMaze, transitions: int, seed: int, policies: list, kind: str = "diverse") -> list[dict]:
    """D4RL's antmaze data: an ant walks from cell to cell, with noise N(0, 0.2^2) on every action.

    An episode has 1000 steps. `kind` is "fixed" (from the start cell to the goal cell), "play" (random
    starts, hand-picked goals) or "diverse" (random starts and goals). The first of `policies` walks, or
    WALKER if there is none.

    As in D4RL, an ant stays near its goal until the end of the episode. Rewards and terminations are
    assigned afterwards, for one goal of the evaluation. Unlike in D4RL, that goal is drawn for each episode,
    as the evaluation of v2 draws it.
    """
    walker = policies[0] if policies else policy.load(WALKER)
    free = np.array([[mark != "#" for mark in row] for row in env.maze])
    table, cells = jnp.asarray(waypoints.shortest_paths(free)), np.argwhere(free)
    goals = jnp.asarray(
        cells
        if kind == "diverse"
        else HAND_PICKED[next(m for m in HAND_PICKED if antmaze.MAZES[m] == env.maze)]
    )
    starts = jnp.asarray(env.cells("R") if kind == "fixed" else cells)
    (row_start, col_start), *_ = env.cells("R")
    place = lambda cell: 4.0 * jnp.stack([cell[1] - col_start, cell[0] - row_start]).astype(float)  # noqa: E731
    # D4RL's quantisation: a cell begins at its centre. So the next waypoint is set once the ant is past the
    # middle of a cell.
    cell_of = lambda xy: (1 + jnp.maximum(xy[::-1], 1e-4) / 4.0).astype(jnp.int32)  # noqa: E731
    env.horizon = 1000

    def restart(key):
        start_key, goal_key, near_key, far_key, wide_key = jax.random.split(key, 5)
        state = env.start(near_key)
        shift = 0.0 if kind == "fixed" else jax.random.uniform(wide_key, (2,))
        xy = place(jax.random.choice(start_key, starts)) + shift
        qpos = state.body.qpos.at[:2].add(xy)
        far = jax.random.uniform(far_key, (2, 2))
        goal = place(jax.random.choice(goal_key, goals)) + far[0] + 0.5 * far[1]
        return env.begin(AntAndGoal(env.put(qpos, state.body.qvel), goal))

    def act(memory, state, key):
        body, goal = state.pipeline_state.body, state.pipeline_state.goal
        way_key, policy_key, noise_key = jax.random.split(key, 3)
        there = cell_of(goal)
        following = waypoints.next_cell(table, cell_of(body.qpos[:2]), there)
        waypoint = jnp.where(
            (following == there).all(), goal, place(following) + jax.random.uniform(way_key, (2,))
        )
        obs, to_joints = canonical(body.qpos[2:], body.qvel, waypoint - body.qpos[:2])
        action = to_joints(policy.forward(walker, obs, jax.random.normal(policy_key, (8,)), jnp))
        return jnp.clip(action + 0.2 * jax.random.normal(noise_key, (8,)), -1, 1), memory, jnp.bool_(False)

    endless = _Continuing(env)
    episodes = record(endless, lambda state, key: jnp.int32(0), act, transitions, seed, restart=restart)
    draw = jax.jit(jax.vmap(env.draw_goal))(jax.random.split(jax.random.PRNGKey(seed + 1), len(episodes)))
    return [relabelled(whole, goal, env.radius) for whole, goal in zip(episodes, np.asarray(draw))]


class _Continuing(Wrapper):
    """An AntMaze whose episodes do not end at the goal."""

    def step(self, state, action):
        reached = self.env.step(state, action)
        # At the goal, where the maze's own count begins anew, no episode ends here.
        elapsed = state.info["elapsed"] + 1
        late = jnp.float32(elapsed >= self.env.horizon)
        truncation = jnp.maximum(late, reached.info["broken"])
        return reached.replace(
            done=truncation,
            info={
                **reached.info,
                "termination": 0 * truncation,
                "truncation": truncation,
                "elapsed": elapsed,
            },
        )


def relabelled(whole: dict, goal: np.ndarray, radius: float) -> dict:
    """The walk `whole`, rewarded for reaching `goal` [2].

    A row that ends within `radius` of the goal has reward 1 and terminates. A reader of the dataset begins
    another episode after it. On disk the walk stays in one piece, as in D4RL's files. In the umaze an ant is
    at the goal hundreds of times in a walk, and Minari takes milliseconds, and 17 kB, for each piece.
    """
    obs = whole["observations"]
    reached = np.linalg.norm(obs[1:, :2] - goal, axis=1) <= radius
    return episode(obs[:-1], obs[-1], whole["actions"], reached.astype(np.float32), reached)


def goal_missing(env: AntMaze, transitions: int, seed: int, policies: list) -> list[dict]:
    """The data of antmaze-large-diverse without the rows that begin within 2.5 m of the goal's cell (OOO)."""
    return without(walks(env, transitions, seed, policies), GOAL_MISSING)


MAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
WALKERS = {"policies": (0, 1), "policy_sizes": (27, 8)}  # one policy file may replace WALKER

RECIPES = {
    f"ooo/antmaze-{name}/noisy-v0": Recipe(
        f"antmaze-{name}",
        partial(walks, kind=name.partition("-")[2] or "fixed"),
        1_000_000,
        "A walking ant led by waypoints, action noise 0.2 (D4RL)",
        **WALKERS,
    )
    for name in MAZES
} | {
    "ooo/antmaze-large-goal-missing/noisy-v0": Recipe(
        "antmaze-large-goal-missing",
        goal_missing,
        1_000_000,
        "antmaze-large-diverse with the goal cut out (OOO)",
        detail=f"disc {GOAL_MISSING}",
        **WALKERS,
    )
}
