"""Plays a behaviour in many environments at once and returns its experience as complete episodes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from ooo_rl import envs
from ooo_rl.data import policy
from ooo_rl.data.datasets.write import cut_to, episode

CHUNK = 500  # steps of all worlds between two updates of the progress bar


def record(
    env: envs.Env,
    begin: Callable,
    act: Callable,
    transitions: int,
    seed: int,
    restart: Callable | None = None,
) -> list[dict]:
    """Plays episodes with `transitions` rows in all, as `datasets.write.write_minari` takes them.

    Up to 64 copies of the environment, the worlds, run side by side. `restart(key) -> State` starts a world;
    the default is `env.reset`. `begin(state, key) -> memory` is called where an episode starts. `act(memory,
    state, key) -> (action, memory, cut)` is called at each step of a world. `cut` ends the recorded episode
    with a truncation, but the world goes on.

    Only complete episodes are taken, in the order of their ends; the last one is cut to fit. Those still
    unfinished when there are enough rows are thrown away. These are more often long ones. So long episodes
    are under-represented, the more so the fewer rows each world plays (docs/locomotion.md has an example).
    A step of broken physics is left out; its episode ends before it.
    """
    restart, worlds = restart or env.reset, max(1, min(64, transitions // 2000))

    def step(carry, key):
        state, memory = carry
        act_key, start_key, begin_key = jax.random.split(key, 3)
        action, later, cut = act(memory, state, act_key)
        reached = env.step(state, action)
        over = reached.done > 0
        following = jax.tree.map(lambda new, old: jnp.where(over, new, old), restart(start_key), reached)
        memory = jax.tree.map(
            lambda new, old: jnp.where(over | cut, new, old), begin(following, begin_key), later
        )
        ended, broken = reached.info["termination"] > 0, reached.info["broken"] > 0
        row = state.obs, action, reached.reward, reached.obs, ended, over | cut, broken
        return (following, memory), row

    def start(key):
        start_key, begin_key = jax.random.split(key)
        state = restart(start_key)
        return state, begin(state, begin_key)

    run = jax.jit(
        jax.vmap(lambda carry, key: jax.lax.scan(step, carry, jax.random.split(key, CHUNK))),
        compiler_options=getattr(env, "compiler_options", None),
    )
    key = jax.random.PRNGKey(seed)
    carry = jax.jit(jax.vmap(start))(jax.random.split(jax.random.fold_in(key, 0), worlds))
    open_rows: list[list[tuple]] = [[] for _ in range(worlds)]
    episodes, total, chunk = [], 0, 0
    columns = BarColumn(), MofNCompleteColumn(), "transitions", TimeRemainingColumn()
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("", total=transitions)
        while total < transitions:
            chunk += 1
            carry, rows = run(carry, jax.random.split(jax.random.fold_in(key, chunk), worlds))
            episodes += _finished(jax.device_get(rows), open_rows)
            total = sum(len(episode["rewards"]) for episode in episodes)
            progress.update(bar, completed=min(total, transitions))
    return cut_to(episodes, transitions)


def _finished(rows: tuple, open_rows: list[list[tuple]]) -> list[dict]:
    """The episodes that ended in `rows` [worlds, CHUNK, ...], in the order of their ends.

    `open_rows` keeps the rows of unfinished episodes, one list per world, until the next call.
    """
    found = []
    for w, pieces in enumerate(open_rows):
        own = [field[w] for field in rows]
        begin = 0
        for last in np.flatnonzero(own[5]):
            pieces.append(tuple(field[begin : last + 1] for field in own))
            obs, action, reward, next_obs, ended, _, broken = (
                np.concatenate(column) for column in zip(*pieces)
            )
            # A broken step is the last one of its episode. Its next observation is not real, so the row is
            # dropped.
            n = len(reward) - int(broken[-1])
            if n:
                found.append((last, w, episode(obs[:n], next_obs[n - 1], action[:n], reward[:n], ended[:n])))
            pieces.clear()
            begin = last + 1
        if begin < CHUNK:
            pieces.append(tuple(field[begin:] for field in own))
    return [whole for _, _, whole in sorted(found, key=lambda item: item[:2])]


def is_sampled(actor: dict) -> bool:
    """Whether `play` samples the actions of `actor`. It plays the mean if the policy file has no noise."""
    return not {"wS", "log_std", "jax_sample"}.isdisjoint(actor)


def actions_of(actor: dict) -> str:
    """The first words of a description: which actions of the policy `actor` `play` takes."""
    return "Sampled actions" if is_sampled(actor) else "Mean actions"


def play(env: envs.Env, transitions: int, seed: int, policies: list, actor: dict | None = None) -> list[dict]:
    """Plays episodes with sampled actions of a policy, or with uniformly random actions if there is none.

    The policy is `actor`, or else the first of `policies`. A policy without noise acts by its mean
    (`is_sampled`).
    """
    actor = actor or (policies[0] if policies else None)

    def act(memory, state, key):
        if actor is None:
            return envs.random_actions(env, key), memory, jnp.bool_(False)
        noise = jax.random.normal(key, (env.action_size,)) if is_sampled(actor) else None
        return policy.forward(actor, state.obs, noise, jnp), memory, jnp.bool_(False)

    return record(env, lambda state, key: jnp.int32(0), act, transitions, seed)
