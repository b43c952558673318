"""n-step returns: the discounted rewards of n steps that follow one another, read from a ring or a dataset.

Rows of one environment lie `stride` places apart: `num_envs` in a ring, 1 in a dataset of whole episodes. A
window of n steps ends early at the end of its episode, whether a termination or a truncation, and at the
newest row. A return over fewer steps is still correct: it bootstraps earlier.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ooo_rl.data import buffer
from ooo_rl.data.buffer import Transition, size
from ooo_rl.data.errors import UsageError


@struct.dataclass
class Linked(Transition):
    """Rows that tell where an episode is cut off: `last` [N] is 1 where none of its rows follows, else 0.

    After a termination nothing follows either way; its `discount` tells.
    """

    last: jax.Array


def linked(rows: Transition | None, last: jax.Array) -> Linked | None:
    """`rows` with the flags `last` [N]."""
    return rows and Linked(rows.obs, rows.action, rows.reward, rows.next_obs, rows.discount, last)


def insert(ring: Linked, rows: Transition, added: jax.Array, last: jax.Array, broken: jax.Array) -> Linked:
    """`buffer.insert` of `rows` [n, ...], one of each environment, of which some are the `last` [n] ones.

    In the place of a `broken` [n] row lies another environment's. It follows nothing there, so the row before
    it becomes a last one; and `last` must be 1 for the broken row itself, so that nothing follows it.
    """
    num_slots, n = size(ring), size(rows)
    ring = buffer.insert(ring, linked(rows, last), added, broken)
    before = (added - n) % num_slots
    flags = jnp.maximum(jax.lax.dynamic_slice_in_dim(ring.last, before, n), broken)
    flags = jax.lax.dynamic_update_slice_in_dim(ring.last, flags, before, axis=0)
    return ring.replace(last=jax.lax.dynamic_update_slice_in_dim(flags, last, added % num_slots, axis=0))


def n_step(hyper: Any, rows: Linked, index: jax.Array, added: jax.Array, stride: int, n: int) -> Transition:
    """The n-step returns from the rows `index` [...], as rows [...] for a one-step update.

    `added` [] is how many rows were inserted so far; `rows` holds the newest of them. For a window of m <= n
    steps the result has

    - reward: the sum of discount^k * reward_k over k < m. Rewards are the scaled ones,
      `hyper.reward_scale * reward + hyper.reward_bias`, so that no update may scale them again.
    - next_obs: what the last of the m steps reached.
    - discount: discount^(m - 1), or 0 after a termination. `hyper.discount * discount` is what the value of
      next_obs counts.
    """
    num_slots, steps = size(rows), jnp.arange(n)
    slot = (index[..., None] + stride * steps) % num_slots
    serial = added - 1 - (added - 1 - index) % num_slots  # the row's number among all that were ever inserted
    there = serial[..., None] + stride * steps < added
    goes_on = (rows.last[slot] == 0) & (rows.discount[slot] > 0)
    first = jnp.ones_like(goes_on[..., :1])
    inside = there & jnp.concatenate([first, goes_on[..., :-1]], axis=-1)
    inside = jnp.cumprod(inside, axis=-1)  # 1 up to the window's end, then 0

    reward = hyper.reward_scale * rows.reward[slot] + hyper.reward_bias
    total = jnp.sum(inside * hyper.discount**steps * reward, axis=-1)
    m = inside.sum(axis=-1)
    end = (index + stride * (m - 1)) % num_slots
    discount = hyper.discount ** (m - 1) * rows.discount[end]
    return Transition(rows.obs[index], rows.action[index], total, rows.next_obs[end], discount)


def check_share(args: Any, card: dict) -> None:
    """Raises UsageError if `--offline-ratio` asks for rows of a dataset that is in no order."""
    if args.offline_ratio and args.online_steps:
        check_order(card, args.n_steps)


def check_order(card: dict, n: int) -> None:
    """Raises UsageError if n-step returns of rows are asked for whose dataset's `card` says: in no order."""
    if n > 1 and card.get("ordered") is False:
        raise UsageError(
            f"--n-steps {n}: the rows of --dataset {card['id']} are in no order, so it is not known which "
            "ones follow a row; use --n-steps 1"
        )
