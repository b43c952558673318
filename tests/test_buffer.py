"""The ring and the union with offline rows, against plain lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ooo_rl.data import buffer
from ooo_rl.data.buffer import Transition

insert, take = jax.jit(buffer.insert), jax.jit(buffer.take)


def rows_of(numbers):
    """Rows whose every entry, each of a type of its own, tells which row it is."""
    n = np.asarray(numbers)
    return Transition(
        np.float32(n)[:, None] * np.float32([1, 2]),
        np.int32(n)[:, None],
        np.float32(n),
        np.float16(n)[:, None] + np.float16(0.5),
        np.int8(n % 2),
    )


@settings(max_examples=40)
@given(  # few sizes, since each of their combinations is compiled
    block=st.sampled_from([1, 2, 4]),
    blocks=st.sampled_from([1, 2, 5]),
    inserts=st.integers(0, 13),
    offline=st.sampled_from([0, 1, 7]),
)
def test_like_a_list(block, blocks, inserts, offline):
    capacity = block * blocks
    example = jax.tree.map(lambda x: x[0], rows_of([0]))
    ring, reference, everything = buffer.empty(example, capacity), [0] * capacity, []
    for i in range(inserts):
        new = list(range(100 + i * block, 100 + (i + 1) * block))
        for k, row in enumerate(new):
            reference[(len(everything) + k) % capacity] = row
        ring = insert(ring, rows_of(new), jnp.int32(len(everything)))
        everything += new
    data = rows_of(range(1, offline + 1)) if offline else None
    union = list(range(1, offline + 1)) + reference
    filled = offline + min(len(everything), capacity)
    if filled == 0:
        return
    index = np.random.default_rng(0).integers(0, filled, 9)
    got, expected = take(data, ring, index), rows_of([union[i] for i in index])
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert sorted(everything[-capacity:]) == sorted(reference[: len(everything)])  # the newest rows are kept


def test_vmapped_rings_share_their_counter_and_nothing_else():
    example = jax.tree.map(lambda x: x[0], rows_of([0]))
    rings = jax.vmap(lambda _: buffer.empty(example, 4))(jnp.arange(3))
    insert_all = jax.jit(jax.vmap(buffer.insert, in_axes=(0, 0, None)))
    for step in range(3):
        new = jax.tree.map(
            lambda *x: np.stack(x),
            *[rows_of([100 * seed + 2 * step, 100 * seed + 2 * step + 1]) for seed in range(3)],
        )
        rings = insert_all(rings, new, jnp.int32(2 * step))
    for seed in range(3):
        np.testing.assert_array_equal(rings.reward[seed], 100 * seed + np.array([4, 5, 2, 3]))


def test_union_is_sampled_uniformly_and_offline_rows_stay():
    offline, ring = rows_of(range(30)), buffer.empty(jax.tree.map(lambda x: x[0], rows_of([0])), 8)
    for i in range(10):
        ring = insert(ring, rows_of(range(100 + 2 * i, 102 + 2 * i)), jnp.int32(2 * i))
    index = jax.random.randint(jax.random.PRNGKey(0), (38_000,), 0, 38)
    seen, counts = np.unique(np.asarray(take(offline, ring, index).reward), return_counts=True)
    assert seen.tolist() == [*range(30), *range(112, 120)]
    assert ((counts - 1000) ** 2 / 1000).sum() < 70  # chi-square with 37 degrees of freedom: p = 0.001


@pytest.mark.parametrize(("capacity", "block"), [(5, 2), (2, 4)])
def test_blocks_must_divide_the_ring(capacity, block):
    with pytest.raises(ValueError, match="multiple of the block"):
        buffer.insert(
            buffer.empty(jax.tree.map(lambda x: x[0], rows_of([0])), capacity),
            rows_of(range(block)),
            jnp.int32(0),
        )


def test_empty_ring_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        buffer.empty(jax.tree.map(lambda x: x[0], rows_of([0])), 0)
