"""Batched roll-outs for evaluation, entirely on the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ooo_rl.envs.base import Env


def rollout(
    env: Env,
    policy: Callable,
    key: jax.Array,
    num_episodes: int,
    record: bool = False,
    discount: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Plays E = `num_episodes` episodes in parallel.

    Each episode ends when it is done, or after `env.horizon` steps. `policy` maps observations [E, obs] to
    actions [E, act]. Returns arrays [E]: `success` (0/1, solved at any step), `return` (undiscounted) and
    `length` (steps); also `solved`, the largest number of solved sub-tasks, if the task counts them. With
    `record` it also returns `obs` [E, horizon + 1, obs]; after the end of an episode, its last observation
    is repeated.

    With a `discount` [] it also returns what a value of the start can be compared with: `discounted_return`
    and `discounted_length` (that of a reward of 1 at each step), both up to a termination, `terminated`
    (0/1), and the observations `first_obs` and `last_obs` [E, obs].
    """
    state = jax.vmap(env.reset)(jax.random.split(key, num_episodes))
    reached_once = [name for name in ("success", "solved") if name in state.metrics]
    discounted = () if discount is None else ("discounted_return", "discounted_length", "terminated")
    tally = {name: jnp.zeros(num_episodes) for name in (*reached_once, "return", "length", *discounted)}

    def step(carry, _):
        state, alive, tally = carry
        reached = jax.vmap(env.step)(state, policy(state.obs))
        counted = {
            **{name: jnp.maximum(tally[name], alive * reached.metrics[name]) for name in reached_once},
            "return": tally["return"] + alive * reached.reward,
            "length": tally["length"] + alive,
        }
        if discounted:
            weight = alive * (1 - tally["terminated"]) * discount ** tally["length"]
            counted["discounted_return"] = tally["discounted_return"] + weight * reached.reward
            counted["discounted_length"] = tally["discounted_length"] + weight
            counted["terminated"] = jnp.maximum(tally["terminated"], alive * reached.info["termination"])
        # A finished episode is frozen, so that its last observation is repeated.
        state = jax.tree.map(lambda new, old: jnp.where(_like(alive, new) > 0, new, old), reached, state)
        alive = alive * (1 - reached.done)
        return (state, alive, counted), state.obs if record else None

    first_obs = state.obs
    (state, _, tally), later_obs = jax.lax.scan(
        step, (state, jnp.ones(num_episodes), tally), None, env.horizon
    )
    if record:
        tally["obs"] = jnp.concatenate([first_obs[:, None], later_obs.swapaxes(0, 1)], axis=1)
    if discounted:
        tally |= {"first_obs": first_obs, "last_obs": state.obs}
    return tally


def _like(mask: jax.Array, array: jax.Array) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))
