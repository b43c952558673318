"""Prioritised sampling on the device: rows are drawn in proportion to their priorities, from a tree of sums.

The lowest level has one priority per row, and each entry of a level is the sum of a whole block of `width`
entries of the level below. The highest level is one block. A draw goes down: in each block it chooses an
entry in proportion to its sum, and goes on in the block below that entry. It reads one block per level,
however many rows there are; with a width of 16 six levels hold 16 million rows.

Every sum is computed anew from its block and never corrected by a difference, so rounding does not add up.
Each level draws a random number of its own: a single one has no bits left to tell small priorities apart.
"""

import jax
import jax.numpy as jnp
from flax import struct

WIDTH = 16  # docs/speed.md compares it with others, and with a cumulative sum over all rows


@struct.dataclass
class Priorities:
    """Priorities of rows, all at least 0, and their sums.

    levels: arrays [blocks, width], the lowest first. Row i is entry i of the lowest one, blocks one after
    another; entries beyond the rows are 0.
    """

    levels: tuple[jax.Array, ...]


LARGEST = 1e30  # of a priority: sums of so many stay finite


def create(priority: jax.Array, width: int = WIDTH) -> Priorities:
    """Priorities of rows that have those in `priority` [N], none below 0; 0 for rows that are not there yet.

    Raises ValueError unless there is a row, and a width of at least 2.
    """
    if len(priority) < 1 or width < 2:
        raise ValueError(f"priorities need at least 1 row and a width of 2, got {len(priority)} and {width}")
    levels, entries = [], priority
    while not levels or len(entries) > 1:
        levels.append(jnp.pad(entries, (0, -len(entries) % width)).reshape(-1, width))
        entries = levels[-1].sum(axis=1)
    return Priorities(tuple(levels))


def update(priorities: Priorities, index: jax.Array, priority: jax.Array | float) -> Priorities:
    """`priorities` after the rows `index` [...] have got new ones, `priority` [...] or one number for all.

    A priority that is not above 0 becomes 0, NaN included, and one above `LARGEST` becomes that. A row may be
    named more than once; then the largest of its new priorities counts, whatever the device.
    """
    lowest, *above = priorities.levels
    width, index = lowest.shape[1], index.reshape(-1)
    new = jnp.broadcast_to(priority, index.shape) if jnp.ndim(priority) == 0 else priority.reshape(-1)
    block, entry = index // width, index % width
    levels = [
        lowest.at[block, entry]
        .set(0.0)
        .at[block, entry]
        .max(jnp.where(new > 0, jnp.minimum(new, LARGEST), 0.0))
    ]
    for level in above:
        total = levels[-1][block].sum(axis=1)  # equal for all rows of a block, so their order is no matter
        block, entry = block // width, block % width
        levels.append(level.at[block, entry].set(total))
    return Priorities(tuple(levels))


def draw(priorities: Priorities, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    """Numbers [*shape] of rows, each drawn by itself: a row of priority p with probability p / (sum of all).

    A row of priority 0 is never drawn. At least one priority must be above 0.
    """
    index = jnp.zeros(shape, jnp.int32)
    numbers = jax.random.uniform(key, (len(priorities.levels), *shape))
    for level, number in zip(reversed(priorities.levels), numbers):
        index = index * level.shape[1] + _choose(level[index], number)
    return index


def _choose(weights: jax.Array, number: jax.Array) -> jax.Array:
    """An entry [...] of each block of `weights` [..., width], by `number` [...], uniform in [0, 1)."""
    # The sums of an entry and all before it, as a product, which is faster here than JAX's cumsum.
    before = jnp.triu(jnp.ones((weights.shape[-1],) * 2))
    # Sums of different order round differently, so that an entry of weight 0 could seem to have a share.
    reach = jnp.where(weights > 0, jnp.matmul(weights, before, precision="highest"), 0.0)
    return jnp.argmax(reach > number[..., None] * reach.max(axis=-1, keepdims=True), axis=-1)


def probability(priorities: Priorities, index: jax.Array) -> jax.Array:
    """The probability [...] of each of the rows `index` [...] in a draw: what importance weights need."""
    lowest, highest = priorities.levels[0], priorities.levels[-1]
    return lowest[index // lowest.shape[1], index % lowest.shape[1]] / highest.sum()
