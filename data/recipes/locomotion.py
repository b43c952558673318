"""Datasets of the planar bodies and the ant."""

import itertools
from collections.abc import Callable

import numpy as np

from ooo_rl import envs
from ooo_rl.data.datasets.write import episode
from ooo_rl.data.recipes.episodes import actions_of, play
from ooo_rl.data.recipes.recipe import Recipe

BODIES = ("halfcheetah", "hopper", "walker2d", "ant")


def medium_expert(env: envs.Env, transitions: int, seed: int, policies: list) -> list[dict]:
    """Half of the rows come from the first policy, half from the second."""
    half = transitions // 2
    return play(env, half, seed, [], policies[0]) + play(env, transitions - half, seed + 1, [], policies[1])


def replay(env: envs.Env, transitions: int, seed: int, policies: list) -> list[dict]:
    """All transitions that SAC collects while it learns for `transitions` steps, but for broken steps.

    D4RL's medium-replay is made like this: it is the replay buffer of the run that gave the medium policy.
    """
    from ooo_rl.data.recipes import train_policy  # imported here: brax's trainers take seconds to import

    rows: list[tuple] = []
    train_policy.train(
        env, "sac", transitions, seed, keep=lambda *row: rows.append(tuple(np.array(field) for field in row))
    )
    return world_by_world(*(np.stack(column) for column in zip(*rows)))


def world_by_world(
    obs: np.ndarray, action: np.ndarray, reward: np.ndarray, next_obs: np.ndarray,
    ended: np.ndarray, over: np.ndarray, broken: np.ndarray,
) -> list[dict]:  # fmt: skip
    """The episodes of recorded steps, as `datasets.write.write_minari` takes them.

    Each array is [steps, worlds, ...]; the last three are flags: the step terminated, it was the last of its
    episode, its physics broke. A broken step is left out, because its next observation is not real; its
    episode ends before it. The last episode of a world is truncated where the recording ends.
    """
    episodes = []
    for w in range(obs.shape[1]):
        cuts = sorted({0, *(np.flatnonzero(over[:, w]) + 1).tolist(), len(over)})
        for a, cut in itertools.pairwise(cuts):
            b = cut - int(broken[cut - 1, w])
            if b > a:
                rows = (column[a:b, w] for column in (action, reward, ended))
                episodes.append(episode(obs[a:b, w], next_obs[b - 1, w], *rows))
    return episodes


def _played_by(kind: str) -> Callable[[list, list[dict]], str]:
    """The description of data that one policy played; `kind` is the policy's, with its article."""
    return lambda sources, episodes: f"{actions_of(sources[0])} of {kind} policy"


def _half_and_half(sources: list, episodes: list[dict]) -> str:
    """The description of what `medium_expert` made."""
    medium, expert = (actions_of(actor).lower() for actor in sources)
    return f"Half {medium} of a medium policy, half {expert} of an expert policy"


def _of_body(body: str) -> dict[str, Recipe]:
    """The recipes of one body, under D4RL's names."""
    random = Recipe(body, play, 1_000_000, "Uniform random actions")
    medium, expert = (
        Recipe(body, play, 1_000_000, _played_by(kind), policies=(1,)) for kind in ("a medium", "an expert")
    )
    both = Recipe(body, medium_expert, 2_000_000, _half_and_half, policies=(2,))
    learning = Recipe(body, replay, 200_000, "The replay buffer of brax's SAC as it learns", by_hand=True)
    return {
        f"ooo/{body}/random-v0": random,
        f"ooo/{body}/medium-v0": medium,
        f"ooo/{body}/expert-v0": expert,
        f"ooo/{body}/medium-expert-v0": both,
        f"ooo/{body}/medium-replay-v0": learning,
    }


RECIPES = {name: recipe for body in BODIES for name, recipe in _of_body(body).items()}
