"""The experience of a run on the device: offline rows shared by all seeds, and one preallocated ring of online rows per seed."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Transition:
    """Rows of experience; arrays [N, ...] of one length. `discount` is 0 where the episode terminated after the row, else 1."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    next_obs: jax.Array
    discount: jax.Array


def empty(example: Transition, capacity: int) -> Transition:
    """A ring of `capacity` zeroed rows like `example` (one row, no leading axis); row i of all ever added lies in slot i % capacity."""
    if capacity < 1:
        raise ValueError(f"a buffer needs room for at least one row, got capacity {capacity}")
    return jax.tree.map(lambda x: jnp.zeros((capacity, *jnp.shape(x)), jnp.result_type(x)), example)


def insert(ring: Transition, rows: Transition, added: jax.Array, broken: jax.Array | None = None) -> Transition:
    """Writes `rows` [n, ...] after the `added` [] rows that went in before, over the oldest ones once the ring is full.

    `added` comes from the caller's step counter, which vmapped seeds share: so the write stays one contiguous block for
    all seeds, in place, where a counter per seed would make it a scatter. A block never straddles the end: n must divide the capacity.
    In the place of a `broken` [n] row, which must not be learnt from, goes another row of the block, or if all are broken the one before.
    """
    capacity, n = size(ring), size(rows)
    if capacity % n:
        raise ValueError(f"a ring of {capacity} rows cannot take blocks of {n}: the capacity must be a multiple of the block")
    slot = added % capacity
    if broken is not None:
        sound = broken == 0
        source = jnp.where(sound, jnp.arange(n), jnp.argmax(sound))
        before = jax.tree.map(lambda old: jax.lax.dynamic_slice_in_dim(old, (slot - 1) % capacity, 1, axis=0), ring)
        rows = jax.tree.map(lambda new, last: jnp.where(sound.any(), new[source], last), rows, before)
    return jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=0), ring, rows)


def take(offline: Transition | None, ring: Transition | None, index: jax.Array) -> Transition:
    """Rows `index` [B] of the offline rows followed by the ring's slots; either may be None."""
    if offline is None or ring is None:
        return jax.tree.map(lambda x: x[index], ring if offline is None else offline)
    boundary = size(offline)

    def gather(old, new):
        from_offline = (index < boundary).reshape(-1, *(1,) * (old.ndim - 1))
        return jnp.where(from_offline, old[jnp.minimum(index, boundary - 1)], new[jnp.maximum(index - boundary, 0)])

    return jax.tree.map(gather, offline, ring)


def size(rows: Transition | None) -> int:
    """Number of rows (0 for None)."""
    return 0 if rows is None else jax.tree.leaves(rows)[0].shape[0]
