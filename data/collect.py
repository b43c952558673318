"""The behaviours that our datasets record: each function plays one in an environment and returns whole episodes.

All are called `(env, transitions, seed, policies) -> episodes`, as `datasets.write_minari` takes them. The recipes are D4RL's and OOO's;
where one had to be decided on or departed from, its function says so.
"""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import envs
from data import policy
from data.datasets import episode
from data.record import cut_to, piece, record
from envs import antmaze, maze2d, waypoints
from envs.antmaze import AntMaze, Errand, canonical
from envs.point_mass_wall import GOAL, STEP

WALKER = pathlib.Path(__file__).parent / "policies" / "ant_walk.npz"  # made by data/behaviour.py; docs/antmaze.md has the command

# --- point mass ---

# The paper's way-points are in a data file that was not published; these lead over the wall (top: y = 1.2 at x = 0.5) at a distance.
WAYPOINTS = np.float32([[0.0, 1.0], [0.3, 1.32], [0.7, 1.32], [1.0, 1.0], GOAL])
NOISE = 0.1  # standard deviation of the noise on the normalised action (OOO, App. B.1)


def over_the_wall(env: envs.Env, transitions: int, seed: int, policies: list) -> list[dict]:
    """Sub-optimal demonstrations of the point mass: by way-points over the wall, with noise on every action."""

    def step(carry, key):
        state, target = carry
        near = jnp.linalg.norm(jnp.asarray(WAYPOINTS)[target] - state.obs) < 1.5 * STEP
        target = jnp.minimum(target + near, len(WAYPOINTS) - 1)
        toward = jnp.clip((jnp.asarray(WAYPOINTS)[target] - state.obs) / STEP, -1, 1)
        action = jnp.clip(toward + NOISE * jax.random.normal(key, (2,)), -1, 1)
        reached = env.step(state, action)
        return (reached, target), (state.obs, action, reached.reward, reached.obs, reached.info["termination"], reached.done)

    def demonstration(key):
        start, steps = jax.random.split(key)
        return jax.lax.scan(step, (env.reset(start), jnp.int32(0)), jax.random.split(steps, env.horizon))[1]

    keys = jax.random.split(jax.random.PRNGKey(seed), max(100, transitions // 50))
    obs, action, reward, next_obs, termination, done = map(np.asarray, jax.jit(jax.vmap(demonstration))(keys))
    lengths = done.argmax(1) + 1
    episodes = [
        episode(obs[e, :n], next_obs[e, n - 1], action[e, :n], reward[e, :n], termination[e, :n] > 0) for e, n in enumerate(lengths)
    ]
    return cut_to(episodes, transitions) if transitions else episodes[:100]


# --- locomotion ---


def play(env: envs.Env, transitions: int, seed: int, policies: list, actor: dict | None = None) -> list[dict]:
    """Sampled actions of a policy, or uniform ones without one."""
    actor = actor or (policies[0] if policies else None)

    def act(memory, state, key):
        if actor is None:
            return jax.random.uniform(key, (env.action_size,), minval=-1.0, maxval=1.0), memory, jnp.bool_(False)
        noise = jax.random.normal(key, (env.action_size,)) if {"wS", "log_std"} & set(actor) else None
        return policy.forward(actor, state.obs, noise, jnp), memory, jnp.bool_(False)

    return record(env, lambda state, key: jnp.int32(0), act, transitions, seed)


def medium_expert(env: envs.Env, transitions: int, seed: int, policies: list) -> list[dict]:
    """Half of the rows by the first policy, half by the second."""
    half = transitions // 2
    return play(env, half, seed, [], policies[0]) + play(env, transitions - half, seed + 1, [], policies[1])


def replay(env: envs.Env, transitions: int, seed: int, policies: list) -> list[dict]:
    """All that SAC sees while it learns for `transitions` steps: D4RL's medium-replay is the replay buffer of its medium policy's run."""
    from data import behaviour  # here: brax's trainers take seconds to import

    rows: list[tuple] = []
    behaviour.train(env, "sac", transitions, seed, keep=lambda *row: rows.append(tuple(np.array(field) for field in row)))
    obs, action, reward, next_obs, ended, over = (np.stack(column) for column in zip(*rows))  # [steps, worlds, ...]
    episodes = []
    for w in range(obs.shape[1]):
        cuts = [0, *(np.flatnonzero(over[:, w]) + 1)]
        for a, b in itertools.pairwise(cuts):
            episodes.append(episode(obs[a:b, w], next_obs[b - 1, w], action[a:b, w], reward[a:b, w], ended[a:b, w]))
    return episodes


# --- maze2d ---


def noisy_waypoints(env: maze2d.Maze2D, transitions: int, seed: int, policies: list) -> list[dict]:
    """D4RL's maze2d data: one target after another without a new start, noise N(0, 0.5^2) on every action; an episode per target.

    D4RL makes one endless run; here 64 run side by side.
    """
    controller, endless = waypoints.WaypointController(env.walls), maze2d.Maze2D(env.maze, env.reward, horizon=np.iinfo(np.int32).max)
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


MISSING = (((7, 9), 1.5), ((1, 10), 1.5), ((1, 1), 2.0))  # centre and radius of what OOO takes out of maze2d-large


def missing_data(env: maze2d.Maze2D, transitions: int, seed: int, policies: list) -> list[dict]:
    """maze2d-large without the rows that begin near the goal and in two corners (OOO, section 5.2); the rest keeps its order in time."""
    return without(noisy_waypoints(env, transitions, seed, policies), MISSING)


def without(episodes: list[dict], discs: tuple) -> list[dict]:
    """The episodes without the rows whose position lies in one of `discs` (centre, radius); each stretch in between becomes an episode."""
    kept = []
    for whole in episodes:
        position = whole["observations"][:-1, :2]
        out = np.any([np.linalg.norm(position - np.array(centre), axis=1) <= radius for centre, radius in discs], axis=0)
        edges = np.flatnonzero(np.diff(np.concatenate([[True], out, [True]]).astype(np.int8)))
        kept += [piece(whole, a, b) for a, b in zip(edges[::2], edges[1::2])]
    return kept


# --- antmaze ---

HAND_PICKED = {  # the goals of D4RL's generation maps, as (row, column)
    "umaze": ((3, 1),), "medium": ((2, 6), (5, 1), (6, 5)), "large": ((1, 6), (3, 5), (3, 10), (5, 2), (7, 4), (7, 6), (7, 9)),
}  # fmt: skip
GOAL_MISSING = (((32.0, 24.0), 2.5),)


def walks(env: AntMaze, transitions: int, seed: int, policies: list, kind: str = "diverse") -> list[dict]:
    """D4RL's antmaze data: a walking ant led from cell to cell, noise N(0, 0.2^2) on every action, 1000 steps per episode.

    kind: "fixed" (start cell to goal cell), "play" (random starts, hand-picked goals) or "diverse" (random starts and goals). As in D4RL,
    an ant stays about its goal to the end of the episode, and rewards and terminations are assigned afterwards, for one goal of the
    evaluation; unlike there, that goal is drawn per episode, as the evaluation of v2 draws it.
    """
    walker = policies[0] if policies else policy.load(WALKER)
    free = np.array([[mark != "#" for mark in row] for row in env.maze])
    table, cells = jnp.asarray(waypoints.shortest_paths(free)), np.argwhere(free)
    goals = jnp.asarray(cells if kind == "diverse" else HAND_PICKED[next(m for m in HAND_PICKED if antmaze.MAZES[m] == env.maze)])
    starts = jnp.asarray(env.cells("R") if kind == "fixed" else cells)
    (row_start, col_start), *_ = env.cells("R")
    place = lambda cell: 4.0 * jnp.stack([cell[1] - col_start, cell[0] - row_start]).astype(float)  # noqa: E731
    # D4RL's own quantisation: a cell begins at its centre, so that the next waypoint is set once the ant is past the middle.
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
        return env.begin(Errand(env.put(qpos, state.body.qvel), goal))

    def act(memory, state, key):
        body, goal = state.pipeline_state.body, state.pipeline_state.goal
        way_key, policy_key, noise_key = jax.random.split(key, 3)
        there = cell_of(goal)
        following = waypoints.next_cell(table, cell_of(body.qpos[:2]), there)
        waypoint = jnp.where((following == there).all(), goal, place(following) + jax.random.uniform(way_key, (2,)))
        obs, to_joints = canonical(body.qpos[2:], body.qvel, waypoint - body.qpos[:2])
        action = to_joints(policy.forward(walker, obs, jax.random.normal(policy_key, (8,)), jnp))
        return jnp.clip(action + 0.2 * jax.random.normal(noise_key, (8,)), -1, 1), memory, jnp.bool_(False)

    endless = _Continuing(env)
    episodes = record(endless, lambda state, key: jnp.int32(0), act, transitions, seed, restart=restart)
    draw = jax.jit(jax.vmap(env.draw_goal))(jax.random.split(jax.random.PRNGKey(seed + 1), len(episodes)))
    return [part for whole, goal in zip(episodes, np.asarray(draw)) for part in relabelled(whole, goal, env.radius)]


class _Continuing:
    """An AntMaze whose episodes do not end at the goal."""

    def __init__(self, env: AntMaze):
        self.env, self.reset = env, env.reset

    def step(self, state, action):
        reached = self.env.step(state, action)
        late = jnp.float32(reached.info["elapsed"] >= self.env.horizon)
        truncation = jnp.maximum(late, reached.info["broken"])
        return reached.replace(done=truncation, info={**reached.info, "termination": 0 * truncation, "truncation": truncation})


def relabelled(whole: dict, goal: np.ndarray, radius: float) -> list[dict]:
    """The episode rewarded for `goal` [2]: a row that ends within `radius` of it has reward 1 and terminates; the next begins another."""
    reached = np.linalg.norm(whole["observations"][1:, :2] - goal, axis=1) <= radius
    rewarded = {**whole, "rewards": reached.astype(np.float32), "terminations": reached}
    ends = [0, *(np.flatnonzero(reached[:-1]) + 1), len(reached)]
    return [piece(rewarded, a, b) for a, b in itertools.pairwise(ends)]


def goal_missing(env: AntMaze, transitions: int, seed: int, policies: list) -> list[dict]:
    """antmaze-large-diverse without the rows that begin within 2.5 m of the goal's cell (OOO)."""
    return without(walks(env, transitions, seed, policies), GOAL_MISSING)
