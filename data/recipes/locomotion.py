"""Datasets of the planar bodies and the ant."""

import itertools

import numpy as np

from ooo_rl import envs
from ooo_rl.data.datasets.write import episode
from ooo_rl.data.recipes.episodes import play
from ooo_rl.data.recipes.recipe import Recipe

BODIES = ("halfcheetah", "hopper", "walker2d", "ant")


def medium_expert(env: envs.Env, transitions: int, seed: int, policies: list) -> list[dict]:
    """Half of the rows come from the first policy, half from the second."""
    half = transitions // 2
    return play(env, half, seed, [], policies[0]) + play(env, transitions - half, seed + 1, [], policies[1])


def replay(env: envs.Env, transitions: int, seed: int, policies: list) -> list[dict]:
    """All transitions that SAC collects while it learns for `transitions` steps.

    D4RL's medium-replay is made like this: it is the replay buffer of the run that gave the medium policy.
    """
    from ooo_rl.data.recipes import train_policy  # imported here: brax's trainers take seconds to import

    rows: list[tuple] = []
    train_policy.train(
        env, "sac", transitions, seed, keep=lambda *row: rows.append(tuple(np.array(field) for field in row))
    )
    # Each array is [steps, worlds, ...].
    obs, action, reward, next_obs, ended, over = (np.stack(column) for column in zip(*rows))
    episodes = []
    for w in range(obs.shape[1]):
        cuts = [0, *(np.flatnonzero(over[:, w]) + 1)]
        for a, b in itertools.pairwise(cuts):
            episodes.append(
                episode(obs[a:b, w], next_obs[b - 1, w], action[a:b, w], reward[a:b, w], ended[a:b, w])
            )
    return episodes


def _of_body(body: str) -> dict[str, Recipe]:
    """The recipes of one body, under D4RL's names."""
    random = Recipe(body, play, 1_000_000, "Uniform random actions")
    medium, expert = (
        Recipe(body, play, 1_000_000, f"Sampled actions of a {kind} policy", policies=(1,))
        for kind in ("medium", "expert")
    )
    both = Recipe(body, medium_expert, 2_000_000, "Half medium, half expert policy", policies=(2,))
    learning = Recipe(body, replay, 200_000, "The replay buffer of brax's SAC as it learns", by_hand=True)
    return {
        f"ooo/{body}/random-v0": random,
        f"ooo/{body}/medium-v0": medium,
        f"ooo/{body}/expert-v0": expert,
        f"ooo/{body}/medium-expert-v0": both,
        f"ooo/{body}/medium-replay-v0": learning,
    }


RECIPES = {name: recipe for body in BODIES for name, recipe in _of_body(body).items()}
