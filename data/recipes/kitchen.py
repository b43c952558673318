"""Datasets of the Franka Kitchen: human demonstrations replayed, and new episodes made of their pieces."""

import itertools
import pathlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ooo_rl.data import policy
from ooo_rl.data.datasets.write import cut_to, episode
from ooo_rl.data.recipes import knobs
from ooo_rl.data.recipes.recipe import Recipe
from ooo_rl.envs.kitchen import ELEMENTS, JOINTS, SOLVED, SPEED, TASKS, Kitchen

LARGEST = 0.999  # D4RL clips the actions of its demonstrations to +-0.999
ORDER = ("microwave", "kettle", "bottom burner", "top burner", "light switch", "slide cabinet")
# Element -> steps that a segment goes on after its sub-task is solved. The kettle must be let go of.
AFTER = {"kettle": 28, **dict.fromkeys(("microwave", "light switch", "slide cabinet"), 8)}
PACE = 0.07  # mean speed of the fastest joint between two segments, in rad per step
BATCH = 64  # episodes that are played at once


@dataclass(frozen=True)
class Demonstrations:
    """E recorded episodes: the positions qpos [E][T, 30] and velocities qvel [E][T, 29] before each step, and
    its controls [E][T, 9], which are wanted positions of the joints.
    """

    path: pathlib.Path
    qpos: list[np.ndarray]
    qvel: list[np.ndarray]
    controls: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.controls)


def load_demonstrations(path: str, env: Kitchen) -> Demonstrations:
    """Reads demonstrations from the .npz file `path`, in which episodes follow one another.

    The keys are `qpos`, `qvel` and `ctrl` with one row per step, and `episode_ends`, the row after the last
    one of each episode. Raises ValueError, which says what is missing or does not fit.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except policy.NO_ARRAYS as error:
        raise ValueError(f"{path}: not an .npz file of plain arrays ({error})") from None
    needed = {"qpos": env.model.nq, "qvel": env.model.nv, "ctrl": env.model.nu}
    if missing := [key for key in (*needed, "episode_ends") if key not in arrays]:
        raise ValueError(
            f"{path}: no demonstrations of the kitchen, the keys {', '.join(missing)} are missing"
        )
    ends = arrays["episode_ends"]
    found = {key: arrays[key].shape for key in needed}
    rows = int(ends[-1]) if len(ends) else 0
    if found != {key: (rows, size) for key, size in needed.items()} or (np.diff(ends, prepend=0) <= 0).any():
        wanted = ", ".join(f"({rows}, {size})" for size in needed.values())
        raise ValueError(
            f"{path}: qpos, qvel and ctrl have the shapes {', '.join(map(str, found.values()))}; "
            f"the kitchen needs {wanted}, with episode_ends that grow up to {rows}"
        )
    split = [np.split(np.float32(arrays[key]), ends[:-1]) for key in needed]
    return Demonstrations(pathlib.Path(path), *split)


def wanted_action(seen: jax.Array, controls: jax.Array, dt: float) -> jax.Array:
    """The action [9] that asks for `controls` [9] from the observed positions `seen` [30]."""
    return jnp.clip((controls - seen[:JOINTS]) / (SPEED * dt), -LARGEST, LARGEST)


def played(
    env: Kitchen, key: jax.Array, controls: list[np.ndarray], starts: tuple | None = None
) -> list[dict]:
    """The episodes in which each action asks for the next of `controls` [E][T, 9], from what is observed.

    So the sensors' noise is in the actions as well, as in D4RL's data
    (d4rl/kitchen/adept_envs/utils/parse_demos.py). `starts` are positions [E, 30] and velocities [E, 29], by
    default the environment's start. An episode is truncated after its last control.
    """
    lengths = [len(own) for own in controls]
    padded = np.stack([np.pad(own, ((0, max(lengths) - len(own)), (0, 0)), "edge") for own in controls])

    def one(start, controls, key):
        def step(state, controls):
            action = wanted_action(state.pipeline_state.seen, controls, env.dt)
            reached = env.step(state, action)
            return reached, (reached.obs, action, reached.reward)

        state = env.reset(key) if start is None else env.reset_to(*start, key)
        return state.obs, jax.lax.scan(step, state, controls)[1]

    program = jax.jit(jax.vmap(one), compiler_options=env.compiler_options)
    first, (later, action, reward) = jax.tree.map(
        np.asarray, program(starts, padded, jax.random.split(key, len(controls)))
    )
    obs = np.concatenate([first[:, None], later], axis=1)
    return [
        episode(obs[e, :n], obs[e, n], action[e, :n], reward[e, :n], np.zeros(n))
        for e, n in enumerate(lengths)
    ]


def replays(env: Kitchen, source: Demonstrations, key: jax.Array) -> list[dict]:
    """The demonstrations, from their recorded starts."""
    starts = tuple(np.stack([own[0] for own in part]) for part in (source.qpos, source.qvel))
    return played(env, key, source.controls, starts)


def human(env: Kitchen, transitions: int, seed: int, sources: list[Demonstrations]) -> list[dict]:
    """The first `transitions` rows of the replayed demonstrations, or all of them if it is 0."""
    shown = replays(env, sources[0], jax.random.PRNGKey(seed))
    return cut_to(shown, transitions) if transitions else shown


def solved(positions: np.ndarray, element: str) -> np.ndarray:
    """Whether `element` is at its goal in each of the `positions` [T, 30]."""
    first, goal = ELEMENTS[element]
    return np.linalg.norm(positions[:, first : first + len(goal)] - goal, axis=1) < SOLVED


def segments(env: Kitchen, source: Demonstrations, rng: np.random.Generator) -> dict[str, list[np.ndarray]]:
    """Element -> recorded ways to bring it to its goal, as controls [T, 9].

    Demonstrations are cut a little after each sub-task is solved. The scripted expert turns the knobs, as
    often as there are demonstrations. Raises ValueError if no demonstration solves one of the others.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in ORDER}
    for qpos, controls in zip(source.qpos, source.controls):
        begin = 0
        for element in TASKS["complete"]:
            reached = solved(qpos, element)
            if not reached.any():  # what follows begins elsewhere than where the others do
                break
            end = min(int(np.argmax(reached)) + AFTER[element], len(controls))
            found[element].append(controls[begin:end])
            begin = end
    if missing := [name for name in TASKS["complete"] if not found[name]]:
        raise ValueError(f"{source.path}: no episode solves {', '.join(missing)}, from which to take pieces")
    for element in knobs.KNOBS:
        while len(found[element]) < len(source):
            turned = knobs.turn(env, element, rng)
            if turned is not None:
                found[element].append(np.float32(turned))
    return found


def move(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Controls [T, 9] that lead smoothly from the controls `begin` [9] to `end` [9]."""
    steps = max(4, int(np.abs(end - begin)[:7].max() / PACE))
    share = np.arange(1, steps + 1)[:, None] / steps
    return begin + share**2 * (3 - 2 * share) * (end - begin)


def plan(ways: dict[str, list[np.ndarray]], order: tuple, home: np.ndarray, rng: np.random.Generator):
    """Controls [T, 9] that begin at `home` and take one of the `ways`, by chance, for each of `order`."""
    parts, at = [], home
    for element in order:
        own = ways[element][rng.integers(len(ways[element]))]
        parts += [move(at, own[0]), own]
        at = own[-1]
    return np.concatenate(parts)


def as_planned(env: Kitchen, whole: dict, order: tuple) -> bool:
    """Whether an episode solves all elements of `order`, and its whole task only if that was the plan."""
    positions = whole["observations"][1:, :30]
    by_chance = whole["rewards"][-1] == len(order) and {*order} != {*TASKS[env.task]}
    return all(solved(positions, element).any() for element in order) and not by_chance


def recombined(env: Kitchen, transitions: int, seed: int, sources: list[Demonstrations]) -> list[dict]:
    """Episodes that solve four of the elements of `ORDER`, in this order, like relay policy learning's data.

    Any four are as likely to be planned as others, but never those of the task mixed. What does not go as
    planned is left out.
    """
    rng, key, kept = np.random.default_rng(seed), jax.random.PRNGKey(seed), []
    ways, home = segments(env, sources[0], rng), sources[0].controls[0][0]
    orders = [order for order in itertools.combinations(ORDER, 4) if {*order} != {*TASKS["mixed"]}]
    while sum(len(whole["rewards"]) for whole in kept) < transitions:
        chosen = [orders[number] for number in rng.integers(len(orders), size=BATCH)]
        key, now = jax.random.split(key)
        made = played(env, now, [plan(ways, order, home, rng) for order in chosen])
        kept += [whole for order, whole in zip(chosen, made) if as_planned(env, whole, order)]
    return cut_to(kept, transitions)


RECIPES = {
    "ooo/kitchen-complete/human-v0": Recipe(
        "kitchen-complete",
        human,
        0,
        "Human demonstrations of all four sub-tasks, replayed",
        "D4RL's kitchen-complete has 3,680 rows of them and ends each by a termination. Here they end by a "
        "truncation, because the environment does not end there",
        demonstrations="file",
        read=load_demonstrations,
    ),
}
RECIPES |= {
    f"ooo/kitchen-{task}/regenerated-v0": Recipe(
        f"kitchen-{task}",
        recombined,
        136_950,
        f"Regenerated, not D4RL's: four of six elements per episode{few}, from pieces of the human "
        "demonstrations of kitchen-complete and a scripted expert for the knobs",
        "D4RL's data are human demonstrations of four elements each (relay policy learning). As there, "
        "actions ask for planned controls from noisy observations. Episodes that solve less are left out",
        demonstrations="file",
        read=load_demonstrations,
        by_hand=True,
    )
    for task, few in (("partial", ", sometimes the task's"), ("mixed", ", never all of the task's"))
}
