"""Datasets of the Franka Kitchen: human demonstrations, replayed."""

import pathlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ooo_rl.data.datasets.write import cut_to, episode
from ooo_rl.data.recipes.recipe import Recipe
from ooo_rl.envs.kitchen import JOINTS, SPEED, Kitchen

LARGEST = 0.999  # D4RL clips the actions of its demonstrations to +-0.999


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
    except (OSError, ValueError, EOFError) as error:
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


def replays(env: Kitchen, source: Demonstrations, key: jax.Array) -> list[dict]:
    """D4RL's way from a demonstration to data (d4rl/kitchen/adept_envs/utils/parse_demos.py).

    Each episode begins in its recorded state. Each action asks for the recorded controls, from what is
    observed: so the noise is in the actions as well. The episode ends with the last control.
    """
    lengths = [len(own) for own in source.controls]
    controls = np.stack(
        [np.pad(own, ((0, max(lengths) - len(own)), (0, 0)), "edge") for own in source.controls]
    )

    def one(qpos, qvel, controls, key):
        def step(state, controls):
            action = wanted_action(state.pipeline_state.seen, controls, env.dt)
            reached = env.step(state, action)
            return reached, (reached.obs, action, reached.reward)

        state = env.reset_to(qpos, qvel, key)
        return state.obs, jax.lax.scan(step, state, controls)[1]

    starts = [np.stack([own[0] for own in part]) for part in (source.qpos, source.qvel)]
    program = jax.jit(jax.vmap(one), compiler_options=env.compiler_options)
    first, (later, action, reward) = jax.tree.map(
        np.asarray, program(*starts, controls, jax.random.split(key, len(source)))
    )
    obs = np.concatenate([first[:, None], later], axis=1)
    return [
        episode(obs[e, :n], obs[e, n], action[e, :n], reward[e, :n], np.zeros(n))
        for e, n in enumerate(lengths)
    ]


def human(env: Kitchen, transitions: int, seed: int, sources: list[Demonstrations]) -> list[dict]:
    """The first `transitions` rows of the replayed demonstrations, or all of them if it is 0."""
    played = replays(env, sources[0], jax.random.PRNGKey(seed))
    return cut_to(played, transitions) if transitions else played


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
