"""The experience of a run on the device.

All seeds share the offline rows. Each seed has a preallocated ring buffer of online rows.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Transition:
    """Rows of experience: arrays [N, ...] of one length N.

    `discount` is 0 if the episode terminated after the row, else 1.
    """

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    next_obs: jax.Array
    discount: jax.Array


def empty(example: Transition, capacity: int) -> Transition:
    """A ring of `capacity` rows of zeros; each row is like `example`, which has no leading axis.

    Row i, counted over all rows ever inserted, lies in slot i % capacity.
    """
    if capacity < 1:
        raise ValueError(f"a buffer needs room for at least one row, got capacity {capacity}")
    return jax.tree.map(lambda x: jnp.zeros((capacity, *jnp.shape(x)), jnp.result_type(x)), example)


def insert(
    ring: Transition, rows: Transition, added: jax.Array, broken: jax.Array | None = None
) -> Transition:
    """Writes `rows` [n, ...] into the ring, after the `added` [] rows that were inserted before.

    Once the ring is full, new rows replace the oldest ones. A block of rows never crosses the end of the
    ring: n must divide the capacity.

    `added` comes from the caller's step counter, which all vmapped seeds share. So the write is one
    contiguous block for all seeds, in place. With one counter per seed it would become a scatter.

    Nothing may learn from a `broken` [n] row. The first sound row of the block replaces it. If all rows of
    the block are broken, the row before the block replaces them; the very first block has none, and then
    rows of zeros that end an episode stand there.
    """
    capacity, n = size(ring), size(rows)
    if capacity % n:
        raise ValueError(
            f"a ring of {capacity} rows cannot take blocks of {n}: "
            "the capacity must be a multiple of the block"
        )
    slot = added % capacity
    if broken is not None:
        sound = broken == 0
        source = jnp.where(sound, jnp.arange(n), jnp.argmax(sound))
        before = jax.tree.map(
            lambda old: jax.lax.dynamic_slice_in_dim(old, (slot - 1) % capacity, 1, axis=0), ring
        )
        rows = jax.tree.map(lambda new, last: jnp.where(sound.any(), new[source], last), rows, before)
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=0), ring, rows
    )


def take(offline: Transition | None, ring: Transition | None, index: jax.Array) -> Transition:
    """The rows with the numbers `index` [...], as arrays [..., *row].

    The numbers count the offline rows first and then the slots of the ring. One of the two may be None.
    """
    flat, boundary = index.reshape(-1), size(offline)

    def gather(old, new):
        from_offline = (flat < boundary).reshape(-1, *(1,) * (old.ndim - 1))
        return jnp.where(
            from_offline, old[jnp.minimum(flat, boundary - 1)], new[jnp.maximum(flat - boundary, 0)]
        )

    if offline is None or ring is None:
        rows = jax.tree.map(lambda x: x[flat], ring if offline is None else offline)
    else:
        rows = jax.tree.map(gather, offline, ring)
    return jax.tree.map(lambda x: x.reshape(*index.shape, *x.shape[1:]), rows)


def rewards(
    offline: Transition | None, ring: Transition | None, added: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The rewards [N] of the offline rows and of all slots of the ring, and a mask [N] of the slots in use.

    `added` [] is how many rows were inserted into the ring so far. Offline rows are always in use.
    """
    reward = jnp.concatenate([rows.reward for rows in (offline, ring) if rows is not None])
    return reward, jnp.arange(len(reward)) < size(offline) + jnp.minimum(added, size(ring))


def size(rows: Transition | None) -> int:
    """The number of rows; 0 for None."""
    return 0 if rows is None else jax.tree.leaves(rows)[0].shape[0]
