"""Plays a behaviour in many worlds at once and gives its experience back as whole episodes, for the dataset generators."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

import envs

CHUNK = 500  # steps of all worlds between two looks at the progress bar


def record(
    env: envs.Env, begin: Callable, act: Callable, transitions: int, seed: int, worlds: int = 64, restart: Callable | None = None
) -> list[dict]:  # fmt: skip
    """Episodes with `transitions` rows in all, as `datasets.write_minari` takes them; the last one is cut to fit.

    `begin(state, key) -> memory` is called where an episode starts, `act(memory, state, key) -> (action, memory, cut)` at each step of one
    world; `cut` ends the recorded episode, by a truncation, without a new start of the world. `restart(key) -> State` is where
    worlds start, by default `env.reset`. Only whole episodes are taken, in order of their ends, so that
    long ones are not missing; steps of broken physics, and the rest of their episodes, are not.
    """
    restart = restart or env.reset

    def step(carry, key):
        state, memory = carry
        act_key, start_key, begin_key = jax.random.split(key, 3)
        action, later, cut = act(memory, state, act_key)
        reached = env.step(state, action)
        over = reached.done > 0
        following = jax.tree.map(lambda new, old: jnp.where(over, new, old), restart(start_key), reached)
        memory = jax.tree.map(lambda new, old: jnp.where(over | cut, new, old), begin(following, begin_key), later)
        ended, broken = reached.info["termination"] > 0, reached.info["broken"] > 0
        return (following, memory), (state.obs, action, reached.reward, reached.obs, ended, over | cut, broken)

    def start(key):
        start_key, begin_key = jax.random.split(key)
        state = restart(start_key)
        return state, begin(state, begin_key)

    run = jax.jit(jax.vmap(lambda carry, key: jax.lax.scan(step, carry, jax.random.split(key, CHUNK))))
    key = jax.random.PRNGKey(seed)
    carry = jax.jit(jax.vmap(start))(jax.random.split(jax.random.fold_in(key, 0), worlds))
    open_rows: list[list[tuple]] = [[] for _ in range(worlds)]
    episodes, total, chunk, columns = [], 0, 0, (BarColumn(), MofNCompleteColumn(), "transitions", TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("", total=transitions)
        while total < transitions:
            chunk += 1
            carry, rows = run(carry, jax.random.split(jax.random.fold_in(key, chunk), worlds))
            finished = _finished(jax.device_get(rows), open_rows)
            for episode in finished:
                episode = _cut(episode, transitions - total)
                total += len(episode["rewards"])
                episodes.append(episode)
                if total == transitions:
                    break
            progress.update(bar, completed=total)
    return episodes


def _finished(rows: tuple, open_rows: list[list[tuple]]) -> list[dict]:
    """The episodes that ended in `rows` [worlds, CHUNK, ...], in order of their ends; beginnings of others go to `open_rows`."""
    found = []
    for w, pieces in enumerate(open_rows):
        own = [field[w] for field in rows]
        begin = 0
        for last in np.flatnonzero(own[5]):
            pieces.append(tuple(field[begin : last + 1] for field in own))
            found.append((last, w, _whole(pieces)))
            pieces.clear()
            begin = last + 1
        if begin < CHUNK:
            pieces.append(tuple(field[begin:] for field in own))
    return [episode for _, _, episode in sorted(found, key=lambda item: item[:2]) if len(episode["rewards"])]


def _whole(pieces: list[tuple]) -> dict[str, np.ndarray]:
    obs, action, reward, next_obs, ended, _, broken = (np.concatenate(column) for column in zip(*pieces))
    n = len(reward) - int(broken[-1])  # a step of broken physics is the last of its episode, and its next observation a stand-in
    truncations = np.zeros(n, bool)
    truncations[n - 1 :] = not ended[n - 1 : n].any()
    return {
        "observations": np.concatenate([obs[:n], next_obs[n - 1 : n]]), "actions": action[:n], "rewards": reward[:n],
        "terminations": ended[:n], "truncations": truncations,
    }  # fmt: skip


def _cut(episode: dict[str, np.ndarray], limit: int) -> dict[str, np.ndarray]:
    """The first `limit` rows of an episode; what is cut off counts as a truncation."""
    if len(episode["rewards"]) <= limit:
        return episode
    short = {name: values[: limit + (name == "observations")].copy() for name, values in episode.items()}
    short["truncations"][-1] = True
    return short
