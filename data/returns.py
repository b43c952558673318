"""Returns: the discounted rewards from each row to the end of its episode, known once that has ended.

Rewards are the scaled ones, `hyper.reward_scale * reward + hyper.reward_bias`. No data tell what follows a
truncation, so `bootstrap` says what is taken. "last": the row's reward, for ever. "worst": the least reward
seen so far, for ever. "zero": nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ooo_rl.data.buffer import Transition, size
from ooo_rl.data.errors import UsageError
from ooo_rl.envs.base import State


@struct.dataclass
class Rows(Transition):
    """Rows with the return of each; -inf where it is not known."""

    mc_return: jax.Array


def with_returns(rows: Transition | None, mc_return: jax.Array) -> Rows | None:
    """`rows` with these returns [N]. All runs share the offline rows; returns depend on a run's settings."""
    return rows and Rows(rows.obs, rows.action, rows.reward, rows.next_obs, rows.discount, mc_return)


def without_returns(rows: Transition | None) -> Rows | None:
    """`rows` whose returns are not known."""
    return with_returns(rows, jnp.full(size(rows), -jnp.inf))


def offline_returns(hyper: Any, offline: Transition, truncation: jax.Array, bootstrap: str) -> jax.Array:
    """The return [N] of each row of whole episodes, one after the other, some ended by a `truncation` [N]."""
    reward = hyper.reward_scale * offline.reward + hyper.reward_bias
    own = reward + hyper.discount * value_after(hyper, reward, truncation, reward.min(), bootstrap)
    decay = hyper.discount * offline.discount * (1 - truncation)
    join = lambda later, row: (row[0] + row[1] * later[0], row[1] * later[1])  # noqa: E731
    return jax.lax.associative_scan(join, (own, decay), reverse=True)[0]


def value_after(hyper: Any, reward: jax.Array, truncation: jax.Array, least: jax.Array, bootstrap: str):
    """What is taken to follow rows of this scaled `reward` [...]: something after a `truncation` only."""
    if bootstrap == "zero":
        return jnp.zeros_like(reward)
    return truncation * (reward if bootstrap == "last" else least) / (1 - hyper.discount)


def check_returns(session: Any) -> None:
    """Raises UsageError if the returns of a run's rows cannot be known: by its settings, or by its data."""
    args, card = session.args, session.card
    if args.mc_bootstrap != "zero" and (session.hyper.discount >= 1).any():
        raise UsageError(f"--mc-bootstrap {args.mc_bootstrap} needs a --discount below 1; else use zero")
    if card.get("ordered") is False:
        raise UsageError(
            f"--dataset {card['id']}: its rows are in no order, so the return of an episode cannot be known; "
            "learn from it with algos/cql.py or algos/iql.py"
        )


@struct.dataclass
class Returns:
    """What a run knows of returns, beside those in its ring.

    offline [N]: those of the offline rows. so_far [horizon, n]: discounted rewards since each row of the
    running episodes of n environments. rows [n]: how many rows these have. least []: the least reward seen.
    """

    offline: jax.Array | None
    so_far: jax.Array | None
    rows: jax.Array | None
    least: jax.Array

    @classmethod
    def start(cls, static: Any, hyper: Any, offline: Transition | None, truncation, bootstrap: str):
        """Before the first step."""
        known, so_far, rows, least = None, None, None, jnp.float32(jnp.inf)
        if offline is not None:
            known = offline_returns(hyper, offline, truncation, bootstrap)
            least = jnp.min(hyper.reward_scale * offline.reward + hyper.reward_bias)
        if static.args.online_steps:
            n = static.args.num_envs
            so_far, rows = jnp.zeros((static.env.horizon, n)), jnp.zeros(n, jnp.int32)
        return cls(known, so_far, rows, least)

    def record(self, hyper: Any, ring: Rows, reached: State, added, bootstrap: str) -> tuple[Rows, "Returns"]:
        """Credits a step to all rows whose returns go on, and writes those returns that it ended.

        A return ends with its episode, or with a termination within it (see --end-reward). The step's own
        rows are in the ring already; `added` [] were there before. The rows of a world that broke never get a
        return.
        """
        num_slots, (horizon, n) = size(ring), self.so_far.shape
        reward = hyper.reward_scale * reached.reward + hyper.reward_bias
        broken, truncation = reached.info["broken"] > 0, reached.info["truncation"]
        ended = (reached.done > 0) | (reached.info["termination"] > 0)
        least = jnp.minimum(self.least, jnp.min(reward, where=~broken, initial=jnp.inf))
        age = self.rows - jnp.arange(horizon)[:, None]  # of each row of the episode; negative: still to come
        faded = hyper.discount ** jnp.maximum(age, 0)
        so_far = jnp.where(age > 0, self.so_far, 0.0) + jnp.where(age >= 0, faded * reward, 0.0)
        whole = so_far + faded * hyper.discount * value_after(hyper, reward, truncation, least, bootstrap)
        kept = (age >= 0) & (age < num_slots // n)  # newer rows have taken the places of older ones
        slot = (added + jnp.arange(n) - age * n) % num_slots
        slot = jnp.where(kept & ended & ~broken, slot, num_slots)
        ring = ring.replace(mc_return=ring.mc_return.at[slot].set(whole, mode="drop"))
        return ring, Returns(self.offline, so_far, jnp.where(ended, 0, self.rows + 1), least)
