"""Data of the toy maze: half-trained agents that go to the right goal or nowhere, and few good paths."""

import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ooo_rl import envs
from ooo_rl.data import policy
from ooo_rl.data.datasets.write import cut_to
from ooo_rl.data.errors import UsageError
from ooo_rl.data.recipes.episodes import record
from ooo_rl.data.recipes.recipe import Recipe

FOLDER = pathlib.Path(__file__).parents[1] / "policies"
# Half-trained networks of DQN and of DQN with RND. Their names say where they go, if they arrive.
SLOW = ("toy_maze_right1.npz", "toy_maze_right2.npz")
GOOD = ("toy_maze_left1.npz", "toy_maze_left2.npz")
GOOD_SHARE = 0.05  # of the rows
GOOD_RETURN = -30.0  # a good episode has at least this return, a slow one less


def checkpoints(env: envs.Env, transitions: int, seed: int, policies: list) -> list[dict]:
    """Slow episodes of two policies, then good ones of two others.

    Each episode is that of one policy, drawn at random, which takes its best actions. `policies` are these
    four, or none: then those are taken that come with the package.
    """
    actors = policies or [policy.load(FOLDER / name) for name in (*SLOW, *GOOD)]
    good = round(GOOD_SHARE * transitions)
    is_good = lambda episode: episode["rewards"].sum() >= GOOD_RETURN  # noqa: E731
    is_slow = lambda episode: not is_good(episode)  # noqa: E731
    return [
        *play_one_of(env, actors[: len(SLOW)], transitions - good, seed, is_slow),
        *play_one_of(env, actors[len(SLOW) :], good, seed + 1, is_good),
    ]


def play_one_of(env: envs.Env, actors: list, transitions: int, seed: int, keeps: Callable) -> list[dict]:
    """Complete episodes that `keeps` does not refuse, each of one of the policies, `transitions` rows in all.

    Raises UsageError if nearly all are refused.
    """

    def act(memory, state, key):
        actions = jnp.stack([policy.forward(actor, state.obs, None, jnp) for actor in actors])
        return actions[memory], memory, jnp.bool_(False)

    choose = lambda state, key: jax.random.randint(key, (), 0, len(actors))  # noqa: E731
    if not transitions:  # of so few rows the good paths have none
        return []
    for asked in (transitions * 4**times for times in range(4)):
        *complete, _ = record(env, choose, act, asked, seed)  # the last one is cut
        kept = [episode for episode in complete if keeps(episode)]
        if sum(len(episode["rewards"]) for episode in kept) >= transitions:
            return cut_to(kept, transitions)
    raise UsageError(f"of {asked} rows that the policies played, fewer than {transitions} are fit")


RECIPES = {
    "ooo/toy-maze/mixed-v0": Recipe(
        "toy-maze",
        checkpoints,
        50_000,
        "Half-trained DQN on the way to the right goal or lost, and few good paths to the left one (GDE)",
        detail=f"episodes of {', '.join(SLOW)} with a return below {GOOD_RETURN:g}; "
        f"{GOOD_SHARE:.0%} of the rows are from episodes of {', '.join(GOOD)} with at least that return",
        policies=(0, len(SLOW) + len(GOOD)),
    )
}
