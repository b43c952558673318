"""Batched roll-outs for evaluation, whole on the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from envs.base import Env


def rollout(env: Env, policy: Callable, key: jax.Array, num_episodes: int, record: bool = False) -> dict[str, jax.Array]:
    """Plays `num_episodes` episodes side by side, each until it is done or `env.horizon` is reached.

    `policy` maps observations [E, obs] to actions [E, act]. Returns, per episode [E]: `success` (solved at any step),
    `return` (undiscounted), `length`; with `record` also `obs` [E, horizon + 1, obs], which stays at
    its last value after the end of an episode.
    """
    state = jax.vmap(env.reset)(jax.random.split(key, num_episodes))
    tally = {name: jnp.zeros(num_episodes) for name in ("success", "return", "length")}

    def step(carry, _):
        state, alive, tally = carry
        reached = jax.vmap(env.step)(state, policy(state.obs))
        tally = {
            "success": jnp.maximum(tally["success"], alive * reached.metrics["success"]),
            "return": tally["return"] + alive * reached.reward,
            "length": tally["length"] + alive,
        }
        # A finished episode is frozen, so that its record ends where it ended.
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
