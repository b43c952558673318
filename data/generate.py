"""Makes the datasets that are ours to make, as Minari datasets in our own namespace `ooo/`.

    python data/generate.py maze2d-large --transitions 1000000
    python data/generate.py hopper-medium --policy hopper_medium.npz --transitions 200000

Recipes are D4RL's and OOO's; what had to be decided is said at each one, and goes into the dataset's metadata with seed, versions and behaviour.
"""

import difflib
import math
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import envs
from data import cli, datasets, policy
from data.record import record
from envs import maze2d, waypoints
from envs.antmaze import AntMaze, Errand, canonical
from envs.point_mass_wall import GOAL, STEP

WALKER = pathlib.Path(__file__).parent / "policies" / "ant_walk.npz"  # made by: data/behaviour.py (docs/antmaze.md has the command)
BODIES = ("halfcheetah", "hopper", "walker2d", "ant")
NUM_POLICIES = {"random": 0, "medium": 1, "expert": 1, "medium-expert": 2}  # `--policy` files that a locomotion dataset takes


@dataclass(frozen=True)
class Recipe:
    """How to make one dataset: its environment, its episodes, its default size, and what the metadata say of it."""

    env: str
    episodes: Callable[..., list[dict]]  # (environment, transitions, seed, policies) -> episodes
    transitions: int
    description: str
    num_policies: int = 0
    recipe: str = ""


# --- point mass ---

# The paper's way-points are in a data file that was not published; these lead over the wall (top: y = 1.2 at x = 0.5) at a distance.
WAYPOINTS = np.float32([[0.0, 1.0], [0.3, 1.32], [0.7, 1.32], [1.0, 1.0], GOAL])
NOISE = 0.1  # standard deviation of the noise on the normalised action (OOO, App. B.1)


def over_the_wall(env: envs.Env, transitions: int, seed: int, policies: list) -> list[dict]:
    """Sub-optimal demonstrations of the point mass: by way-points over the wall, with noise on every action."""

    def act(target, state, key):
        near = jnp.linalg.norm(jnp.asarray(WAYPOINTS)[target] - state.obs) < 1.5 * STEP
        target = jnp.minimum(target + near, len(WAYPOINTS) - 1)
        toward = jnp.clip((jnp.asarray(WAYPOINTS)[target] - state.obs) / STEP, -1, 1)
        return jnp.clip(toward + NOISE * jax.random.normal(key, (2,)), -1, 1), target, jnp.bool_(False)

    return record(env, lambda state, key: jnp.int32(0), act, transitions, seed, worlds=100)


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
        for a, b in zip(cuts[:-1], cuts[1:]):
            terminations = ended[a:b, w] > 0
            truncations = np.zeros(b - a, bool)
            truncations[-1] = not terminations[-1]
            episodes.append({
                "observations": np.concatenate([obs[a:b, w], next_obs[b - 1 : b, w]]), "actions": action[a:b, w], "rewards": reward[a:b, w],
                "terminations": terminations, "truncations": truncations,
            })  # fmt: skip
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
    for episode in episodes:
        position = episode["observations"][:-1, :2]
        out = np.any([np.linalg.norm(position - np.array(centre), axis=1) <= radius for centre, radius in discs], axis=0)
        edges = np.flatnonzero(np.diff(np.concatenate([[True], out, [True]]).astype(np.int8)))
        for a, b in zip(edges[::2], edges[1::2]):
            piece = {name: values[a : b + (name == "observations")] for name, values in episode.items()}
            truncations = np.zeros(b - a, bool)
            truncations[-1] = not piece["terminations"][-1]
            kept.append({**piece, "truncations": truncations})
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
    goals = jnp.asarray(cells if kind == "diverse" else HAND_PICKED[next(m for m in HAND_PICKED if envs.antmaze.MAZES[m] == env.maze)])
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
    return [piece for episode, goal in zip(episodes, np.asarray(draw)) for piece in relabelled(episode, goal, env.radius)]


class _Continuing:
    """An AntMaze whose episodes do not end at the goal."""

    def __init__(self, env: AntMaze):
        self.env, self.reset = env, env.reset

    def step(self, state, action):
        reached = self.env.step(state, action)
        late = jnp.float32(reached.info["elapsed"] >= self.env.horizon)
        truncation = jnp.maximum(late, reached.info["broken"])
        return reached.replace(done=truncation, info={**reached.info, "termination": 0 * truncation, "truncation": truncation})


def relabelled(episode: dict, goal: np.ndarray, radius: float) -> list[dict]:
    """The episode with the reward and terminations of `goal` [2]: a row that ends within `radius` of it has reward 1 and ends an episode."""
    reached = np.linalg.norm(episode["observations"][1:, :2] - goal, axis=1) <= radius
    ends = [0, *(np.flatnonzero(reached[:-1]) + 1), len(reached)]
    pieces = []
    for a, b in zip(ends[:-1], ends[1:]):
        truncations = np.zeros(b - a, bool)
        truncations[-1] = not reached[b - 1]
        pieces.append({
            "observations": episode["observations"][a : b + 1], "actions": episode["actions"][a:b],
            "rewards": reached[a:b].astype(np.float32), "terminations": reached[a:b], "truncations": truncations,
        })  # fmt: skip
    return pieces


def goal_missing(env: AntMaze, transitions: int, seed: int, policies: list) -> list[dict]:
    """antmaze-large-diverse without the rows that begin within 2.5 m of the goal's cell (OOO)."""
    return without(walks(env, transitions, seed, policies), GOAL_MISSING)


# --- the recipes ---


def _recipes() -> dict[str, Recipe]:
    found = {
        f"ooo/{name}/over-v0": Recipe(name, over_the_wall, 6_700, "Noisy demonstrations over the wall (OOO, section 5.1)",
                                      recipe=f"way-points {WAYPOINTS.tolist()}, action noise {NOISE}")
        for name in ("point-mass-wall", "point-mass-wall-sparse")
    }  # fmt: skip
    for body in BODIES:
        for kind, count in NUM_POLICIES.items():
            how = medium_expert if count == 2 else play
            about = {0: "Uniform random actions", 1: f"Sampled actions of a {kind} policy", 2: "Half medium, half expert policy"}[count]
            found[f"ooo/{body}/{kind}-v0"] = Recipe(body, how, 1_000_000 * max(count, 1), about, count)
        found[f"ooo/{body}/medium-replay-v0"] = Recipe(body, replay, 200_000, "The replay buffer of brax's SAC as it learns")
    for maze, size in (("open", 1_000_000), ("umaze", 1_000_000), ("medium", 2_000_000), ("large", 4_000_000)):
        for dense in ("", "-dense"):
            name = f"maze2d-{maze}{dense}"
            found[f"ooo/{name}/noisy-v0"] = Recipe(name, noisy_waypoints, size, "Waypoint controller with action noise 0.5 (D4RL)")
    found["ooo/maze2d-large-missing-data/noisy-v0"] = Recipe(
        "maze2d-large-missing-data", missing_data, 500_000, "maze2d-large with three regions cut out (OOO)", recipe=f"discs {MISSING}"
    )
    for name in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"):
        kind = name.partition("-")[2] or "fixed"
        found[f"ooo/antmaze-{name}/noisy-v0"] = Recipe(
            f"antmaze-{name}", partial(walks, kind=kind), 1_000_000, "A walking ant led by waypoints, action noise 0.2 (D4RL)"
        )
    found["ooo/antmaze-large-goal-missing/noisy-v0"] = Recipe(
        "antmaze-large-goal-missing", goal_missing, 1_000_000, "antmaze-large-diverse with the goal cut out (OOO)", recipe=f"disc {GOAL_MISSING}"
    )
    return found


RECIPES = _recipes()
GENERATED = {name: recipe for name, recipe in RECIPES.items() if not recipe.num_policies}  # these are made on first use


def own_id(name: str) -> str:
    """Our id for `name`: an id of ours itself, or a short name such as `hopper-medium`, `maze2d-large` or `antmaze-large-play`."""
    short = {key.removeprefix("ooo/").removesuffix("-v0").replace("/", "-"): key for key in RECIPES}
    short |= {recipe.env: key for key, recipe in RECIPES.items() if recipe.env not in BODIES}
    if name in RECIPES or name in short:
        return short.get(name, name)
    near = difflib.get_close_matches(name, [*short, *RECIPES], n=3) or list(RECIPES)
    raise cli.UsageError(f"unknown dataset {name!r}; did you mean {', '.join(near)}? All: {', '.join(RECIPES)}")


def make(
    name: str, dataset_id: str = "", transitions: int = 0, seed: int = 0, policies: tuple[str, ...] = (), physics: str = "auto"
) -> None:  # fmt: skip
    """Generates the dataset `name` (an id of ours) and writes it under `dataset_id`, or `name`; whole or not at all."""
    chosen = RECIPES[name]
    datasets.check_free(dataset_id or name)
    datasets.check_writable()
    env = envs.make(chosen.env, physics)
    loaded = [policy.load(path) for path in policies]
    expected = (27, 8) if chosen.env.startswith("antmaze") else (env.observation_size, env.action_size)
    for path, actor in zip(policies, loaded):
        if policy.policy_sizes(actor) != expected:
            raise cli.UsageError(
                f"--policy {path}: takes {policy.policy_sizes(actor)[0]} observations and gives {policy.policy_sizes(actor)[1]} actions; "
                f"{name} needs {expected[0]} and {expected[1]}"
            )
    episodes = chosen.episodes(env, transitions or chosen.transitions, seed, loaded)
    behaviour = [f"{path.name} ({', '.join(str(actor[k]) for k in ('algo', 'source') if k in actor)})" for path, actor in zip(map(pathlib.Path, policies), loaded)]
    recipe = {
        "made_by": f"data/generate.py {name}", "how": chosen.description, "detail": chosen.recipe, "env": chosen.env, "engine": env.backend,
        "seed": seed, "transitions": sum(len(e["rewards"]) for e in episodes), "behaviour": behaviour or "built in",
        "versions": {package: version(package) for package in ("jax", "mujoco", "gymnasium", "brax")},
    }  # fmt: skip
    datasets.write_minari(dataset_id or name, episodes, description=chosen.description, recipe=recipe)


@dataclass(frozen=True)
class Args:
    """Makes one of our datasets. Loading one by its id makes it too, with these defaults, where no policy is needed."""

    dataset: Annotated[str, tyro.conf.Positional]
    """which one, e.g. maze2d-large, antmaze-large-diverse, hopper-medium or ooo/hopper/medium-v0"""
    transitions: int = 0
    """rows before any are cut out; 0: D4RL's number"""
    policy: tuple[str, ...] = ()
    """behaviour policies (.npz): one for medium and expert, two for medium-expert; a walker (optional) for antmaze"""
    id: str = ""
    """write it under this id instead"""
    seed: int = 0
    """seed of everything random"""
    physics: str = "auto"
    """engine, for bodies that have one"""


def main() -> None:
    args = tyro.cli(Args)
    name = own_id(args.dataset)
    recipe = RECIPES[name]
    needed = recipe.num_policies
    if len(args.policy) != needed and not (recipe.env.startswith("antmaze") and len(args.policy) == 1):
        hint = "; data/behaviour.py trains one" if needed else ""
        raise cli.UsageError(f"{name} takes {needed} --policy files, not {len(args.policy)}{hint}")
    if args.transitions < 0 or args.seed < 0:
        raise cli.UsageError(f"--transitions and --seed must be at least 0, not {args.transitions} and {args.seed}")
    try:
        make(name, args.id, args.transitions, args.seed, args.policy, args.physics)
    except datasets.DatasetError:
        raise
    except ValueError as error:
        raise cli.UsageError(str(error)) from None
    datasets.print_card(datasets.load(args.id or name).card)


if __name__ == "__main__":
    cli.guarded(main)
