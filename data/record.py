"""Plays a behaviour in many worlds at once and gives its experience back as whole episodes, for the dataset generators."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

import envs
from data.datasets import episode

CHUNK = 500  # steps of all worlds between two looks at the progress bar


def record(env: envs.Env, begin: Callable, act: Callable, transitions: int, seed: int, restart: Callable | None = None) -> list[dict]:
    """Episodes with `transitions` rows in all, as `datasets.write_minari` takes them; the last one is cut to fit.

    `begin(state, key) -> memory` is called where an episode starts, `act(memory, state, key) -> (action, memory, cut)` at each step of one
    world; `cut` ends the recorded episode, by a truncation, without a new start of the world. `restart(key) -> State` is where
    worlds start, by default `env.reset`. Only whole episodes are taken, in order of their ends, so that
    long ones are not missing; steps of broken physics, and the rest of their episodes, are not.
    """
    restart, worlds = restart or env.reset, max(1, min(64, transitions // 2000))

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
            episodes += _finished(jax.device_get(rows), open_rows)
            total = sum(len(episode["rewards"]) for episode in episodes)
            progress.update(bar, completed=min(total, transitions))
    return cut_to(episodes, transitions)


def piece(whole: dict[str, np.ndarray], a: int, b: int) -> dict[str, np.ndarray]:
    """Rows a to b of an episode as an episode of their own."""
    obs, action, reward, ended = (whole[name] for name in ("observations", "actions", "rewards", "terminations"))
    return episode(obs[a:b], obs[b], action[a:b], reward[a:b], ended[a:b])


def cut_to(episodes: list[dict], transitions: int) -> list[dict]:
    """The first `transitions` rows of `episodes`; one that is cut there ends with a truncation."""
    kept, room = [], transitions
    for whole in episodes:
        taken = min(room, len(whole["rewards"]))
        kept += [piece(whole, 0, taken)] if taken else []
        room -= taken
    return kept


def _finished(rows: tuple, open_rows: list[list[tuple]]) -> list[dict]:
    """The episodes that ended in `rows` [worlds, CHUNK, ...], in order of their ends; beginnings of others go to `open_rows`."""
    found = []
    for w, pieces in enumerate(open_rows):
        own = [field[w] for field in rows]
        begin = 0
        for last in np.flatnonzero(own[5]):
            pieces.append(tuple(field[begin : last + 1] for field in own))
            obs, action, reward, next_obs, ended, _, broken = (np.concatenate(column) for column in zip(*pieces))
            n = len(reward) - int(broken[-1])  # a broken step is the last of its episode, and its next observation a stand-in
            if n:
                found.append((last, w, episode(obs[:n], next_obs[n - 1], action[:n], reward[:n], ended[:n])))
            pieces.clear()
            begin = last + 1
        if begin < CHUNK:
            pieces.append(tuple(field[begin:] for field in own))
    return [whole for _, _, whole in sorted(found, key=lambda item: item[:2])]
