"""Batched roll-outs for evaluation, entirely on the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ooo_rl.envs.base import Env


def rollout(
    env: Env, policy: Callable, key: jax.Array, num_episodes: int, record: bool = False
) -> dict[str, jax.Array]:
    """Plays E = `num_episodes` episodes in parallel.

    Each episode ends when it is done, or after `env.horizon` steps. `policy` maps observations [E, obs] to
    actions [E, act]. Returns arrays [E]: `success` (0/1, solved at any step), `return` (undiscounted) and
    `length` (steps); also `solved`, the largest number of solved sub-tasks, if the task counts them. With
    `record` it also returns `obs` [E, horizon + 1, obs]; after the end of an episode, its last observation
    is repeated.
    """
    state = jax.vmap(env.reset)(jax.random.split(key, num_episodes))
    reached_once = [name for name in ("success", "solved") if name in state.metrics]
    tally = {name: jnp.zeros(num_episodes) for name in (*reached_once, "return", "length")}

    def step(carry, _):
        state, alive, tally = carry
        reached = jax.vmap(env.step)(state, policy(state.obs))
        tally = {
            **{name: jnp.maximum(tally[name], alive * reached.metrics[name]) for name in reached_once},
            "return": tally["return"] + alive * reached.reward,
            "length": tally["length"] + alive,
        }
        # A finished episode is frozen, so that its last observation is repeated.
        state = jax.tree.map(lambda new, old: jnp.where(_like(alive, new) > 0, new, old), reached, state)
        alive = alive * (1 - reached.done)
        return (state, alive, tally), state.obs if record else None

    first_obs = state.obs
    (_, _, tally), later_obs = jax.lax.scan(step, (state, jnp.ones(num_episodes), tally), None, env.horizon)
    if record:
        tally["obs"] = jnp.concatenate([first_obs[:, None], later_obs.swapaxes(0, 1)], axis=1)
    return tally


def _like(mask: jax.Array, array: jax.Array) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))
