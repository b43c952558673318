"""Prioritised sampling against plain NumPy: updates, frequencies, the ring's blocks, and rows that are not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ooo_rl.data import priorities
from ooo_rl.data.priorities import Priorities

update = jax.jit(priorities.update)
draw = jax.jit(priorities.draw, static_argnums=1)
SIZES = [
    (1, 2),
    (5, 2),
    (8, 2),
    (9, 3),
    (130, 8),
]  # rows, width: full trees, ragged ones, one to seven levels


def lowest(tree, num_rows):
    """The priorities of the rows; also checks every sum against its block, and that nothing lies beyond."""
    entries = [np.asarray(level).reshape(-1) for level in tree.levels]
    for below, above in zip(tree.levels, entries[1:]):
        np.testing.assert_allclose(above[: len(below)], np.float64(below).sum(axis=1), rtol=1e-6)
        assert not above[len(below) :].any()
    assert not entries[0][num_rows:].any() and len(tree.levels[-1]) == 1
    return entries[0][:num_rows]


@settings(max_examples=40, deadline=None)
@given(
    size=st.sampled_from(SIZES),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([1.0, 1e-3, 1e6]),  # priorities that differ by up to twelve orders of magnitude
)
def test_updates_are_those_of_an_array(size, seed, spread):
    """Each update names rows several times, and has priorities that are negative, zero, NaN or infinite."""
    num_rows, width = size
    rng, expected = np.random.default_rng(seed), np.zeros(num_rows, np.float32)
    tree = priorities.create(jnp.zeros(num_rows), width)
    for _ in range(4):
        index = rng.integers(0, num_rows, 6)
        new = np.float32(rng.choice([-1.0, 0.0, np.nan, np.inf, 1.0, spread], 6) * rng.uniform(0.5, 1.5, 6))
        tree = update(tree, index.reshape(2, 3), new.reshape(2, 3))
        expected[index] = 0
        np.maximum.at(expected, index, np.nan_to_num(np.maximum(new, 0), nan=0.0, posinf=priorities.LARGEST))
        np.testing.assert_array_equal(lowest(tree, num_rows), expected)
    if expected.any():
        drawn = np.asarray(draw(tree, (64,), jax.random.PRNGKey(seed % 1000)))
        assert ((drawn >= 0) & (drawn < num_rows)).all() and (expected[drawn] > 0).all()
        share = priorities.probability(tree, jnp.arange(num_rows))
        np.testing.assert_allclose(share, expected / np.float64(expected).sum(), rtol=1e-5)


@pytest.mark.parametrize(("num_rows", "width"), [(7, 2), (130, 8), (300, 128)])
def test_frequencies_are_the_shares_of_the_priorities(num_rows, width):
    """A chi-square of all rows, a tenth of which cannot be drawn, and one of which has half of the whole."""
    rng, n = np.random.default_rng(0), 400_000
    priority = np.float32(rng.exponential(size=num_rows) + 0.02)
    priority[rng.random(num_rows) < 0.1] = 0
    priority[3] = priority.sum()
    tree = priorities.create(priority, width)
    np.testing.assert_array_equal(lowest(tree, num_rows), priority)
    drawn = draw(tree, (n // 4, 4), jax.random.PRNGKey(1))
    counts = np.bincount(np.asarray(drawn).reshape(-1), minlength=num_rows)
    expected = n * np.float64(priority) / np.float64(priority).sum()
    there = priority > 0
    assert counts[~there].sum() == 0 and counts.sum() == n
    surprise = (((counts - expected)[there]) ** 2 / expected[there]).sum()
    freedom = there.sum() - 1
    assert abs(surprise - freedom) < 4 * (2 * freedom) ** 0.5


def test_the_blocks_of_a_ring_that_wraps_around():
    """Vmapped seeds insert blocks at one shared place, and each has priorities of its own."""
    seeds, offline, ring, block = 3, 5, 8, 4
    insert = jax.jit(jax.vmap(priorities.update, in_axes=(0, None, 0)))
    tree = jax.tree.map(
        lambda x: np.stack([x] * seeds), priorities.create(np.zeros(offline + ring, np.float32), 2)
    )
    expected = np.zeros((seeds, offline + ring), np.float32)
    for step in range(5):
        index = offline + (step * block) % ring + np.arange(block)
        new = np.float32(np.arange(1, seeds + 1) * (step + 1))
        tree, expected[:, index] = insert(tree, index, new), new[:, None]
        for seed in range(seeds):
            one = jax.tree.map(lambda x, s=seed: x[s], tree)
            np.testing.assert_array_equal(lowest(one, offline + ring), expected[seed])
    keys = jax.random.split(jax.random.PRNGKey(0), seeds)
    drawn = np.asarray(jax.jit(jax.vmap(lambda one, key: priorities.draw(one, (500,), key)))(tree, keys))
    assert drawn.min() == offline and drawn.max() == offline + ring - 1, (
        "rows without a priority are not there"
    )


def test_what_cannot_be_drawn_from_is_refused():
    for num_rows, width in ((0, 128), (10, 1)):
        with pytest.raises(ValueError, match=f"at least 1 row and a width of 2, got {num_rows} and {width}"):
            priorities.create(np.zeros(num_rows), width)


def test_a_million_rows_are_six_levels():
    shapes = jax.eval_shape(lambda: priorities.create(jnp.zeros(1_250_000)))
    assert isinstance(shapes, Priorities)
    assert [x.shape for x in shapes.levels] == [(n, 16) for n in (78_125, 4_883, 306, 20, 2, 1)]
