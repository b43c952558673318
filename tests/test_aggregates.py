"""Aggregates of scores: equal to naive computations, intervals that cover what they promise, and failed seeds
that never leak in."""

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ooo_rl.data.figures import aggregates

NAN = float("nan")
score_lists = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)


def middle_mean(values):
    values = sorted(v for v in values if v == v)
    cut = len(values) // 4
    kept = values[cut : len(values) - cut]
    return sum(kept) / len(kept)


@given(score_lists)
def test_iqm_is_the_mean_of_the_middle_half(values):
    assert aggregates.iqm(values) == pytest.approx(middle_mean(values))


def test_iqm_pools_tasks_drops_failed_seeds_and_follows_an_axis():
    x = np.random.default_rng(0).normal(size=(8, 5))
    assert aggregates.iqm(x) == pytest.approx(middle_mean(x.ravel()))
    np.testing.assert_allclose(aggregates.iqm(x, axis=1), [middle_mean(row) for row in x])
    x[3, 2], x[:, 4] = NAN, NAN
    assert aggregates.iqm(x) == pytest.approx(middle_mean(x.ravel()))
    columns = aggregates.iqm(x, axis=0)
    np.testing.assert_allclose(columns[:4], [middle_mean(x[:, k]) for k in range(4)])
    assert (
        np.isnan(columns[4])
        and np.isnan(aggregates.iqm([]))
        and aggregates.iqm(np.empty((0, 3)), axis=0).shape == (3,)
    )


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        low, high = aggregates.bootstrap_interval(rng.normal(3, 1, size=(20, 2)), resamples=300, seed=trial)
        hits += low <= 3 <= high
    assert 0.86 <= hits / 200 <= 0.99


def test_interval_resamples_within_tasks_only():
    # Tasks of very different level and no spread of their own: mixed between tasks, the interval would be
    # wide.
    assert aggregates.bootstrap_interval(np.tile([0.0, 100.0], (10, 1)), np.mean) == (50.0, 50.0)


def test_interval_of_the_mean_agrees_with_theory_and_with_itself():
    x = np.random.default_rng(2).normal(size=400)
    low, high = aggregates.bootstrap_interval(x, np.mean, confidence=0.9)
    assert (high - low) / 2 == pytest.approx(1.645 * x.std() / 20, rel=0.1)
    assert aggregates.bootstrap_interval(x, seed=3) == aggregates.bootstrap_interval(x, seed=3)


def test_intervals_without_spread_to_learn_from_are_nan():
    for scores in ([1.0], [[1.0, 2.0]], [NAN, 1.0], [NAN, NAN], []):
        assert np.isnan(aggregates.bootstrap_interval(scores)).all()
    assert np.isnan(aggregates.improvement_interval([1.0], [2.0])).all()


def test_failed_seeds_change_nothing():
    x = np.array([[1.0, 5.0], [2.0, 7.0], [4.0, 6.0]])
    with_failed = np.vstack([x, [NAN, NAN]])
    assert aggregates.summarise(with_failed) == aggregates.summarise(x)
    assert aggregates.probability_of_improvement(with_failed, x) == 0.5


@given(score_lists, score_lists)
def test_improvement_counts_pairs(x, y):
    wins = sum((a > b) + 0.5 * (a == b) for a in x for b in y) / (len(x) * len(y))
    assert aggregates.probability_of_improvement(x, y) == pytest.approx(wins)


def test_improvement_averages_tasks_and_lies_in_its_interval():
    rng = np.random.default_rng(4)
    x, y = rng.normal(0.7, 1, size=(12, 2)), rng.normal(size=(9, 2))
    chance = aggregates.probability_of_improvement(x, y)
    assert chance == pytest.approx(
        np.mean([aggregates.probability_of_improvement(x[:, k], y[:, k]) for k in range(2)])
    )
    low, high = aggregates.improvement_interval(x, y)
    assert 0 <= low < chance < high <= 1
    naive = []
    for _ in range(2000):
        draws = [(rng.choice(x[:, k], 12), rng.choice(y[:, k], 9)) for k in range(2)]
        naive.append(np.mean([np.mean(a[:, None] > b) for a, b in draws]))
    np.testing.assert_allclose((low, high), np.quantile(naive, [0.025, 0.975]), atol=0.03)


def test_regret_is_the_missed_area():
    assert aggregates.regret([0, 100], [80, 80], best=80) == 0
    assert aggregates.regret([0, 50, 100], [0, 0, 0], best=1) == 1
    assert aggregates.regret([0, 10, 40], [0.0, 1.0, 1.0], best=1) == pytest.approx(1 - 35 / 40)
    both = aggregates.regret([0, 10, 40], [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]], best=1)
    np.testing.assert_allclose(both, [5 / 40, 1])


@given(x=score_lists.filter(lambda x: 2 <= len(x) <= 4), y=score_lists.filter(lambda y: 2 <= len(y) <= 4))
def test_the_permutation_test_counts_all_ways_to_deal_scores_out(x, y):
    wins = lambda a, b: sum((i > j) + (i == j) / 2 for i in a for j in b)  # noqa: E731
    scores, ways = [*x, *y], [*itertools.combinations(range(len(x) + len(y)), len(x))]
    dealt = [([scores[i] for i in way], [s for i, s in enumerate(scores) if i not in way]) for way in ways]
    by_hand = sum(wins(*each) >= wins(x, y) for each in dealt) / len(ways)
    assert aggregates.permutation_p_value(x, y) == pytest.approx(by_hand)


def test_the_permutation_test_of_many_runs_ends_and_draws_the_same_deals_each_time():
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=20), rng.normal(size=20)
    start = time.monotonic()
    drawn = aggregates.permutation_p_value(x, y)
    assert time.monotonic() - start < 30  # 1 s on one core; all 10^11 deals would take weeks
    exact = stats.mannwhitneyu(x, y, alternative="greater", method="exact").pvalue
    assert 0.01 < exact < 0.5
    assert drawn != exact and abs(drawn - exact) < 5 * np.sqrt(exact * (1 - exact) / aggregates.DRAWN_DEALS)
    assert aggregates.permutation_p_value(x, y) == drawn
    assert aggregates.permutation_p_value(x + 9, y) == 1 / (aggregates.DRAWN_DEALS + 1)


@pytest.mark.parametrize("sizes", [(3, 3), (5, 8), (3, 30), (2, 60), (8, 8)])
def test_the_permutation_test_of_few_deals_is_exact(sizes):
    rng = np.random.default_rng(7)
    x, y = (rng.normal(size=n) for n in sizes)
    exact = stats.mannwhitneyu(x, y, alternative="greater", method="exact").pvalue
    assert aggregates.permutation_p_value(x, y) == pytest.approx(exact, rel=1e-12)


def test_up_to_a_million_deals_are_all_looked_at(monkeypatch):
    asked = []

    def permutation_test(*_, n_resamples, **__):
        asked.append(n_resamples)
        return SimpleNamespace(pvalue=0.5)

    monkeypatch.setattr(aggregates.stats, "permutation_test", permutation_test)
    for n, m in ((11, 11), (2, 1412), (11, 12), (2, 1413)):  # up to 998,991 deals; from 1,000,405 on
        aggregates.permutation_p_value(np.arange(n), np.arange(m))
    assert asked == [np.inf, np.inf, 100_000, 100_000]


def test_a_single_run_is_no_test():
    assert np.isnan(
        [aggregates.permutation_p_value(*pair) for pair in ([[3], [1, 2]], [[3, NAN], [1, 2]], [[], [1]])]
    ).all()


def test_summary():
    x = np.random.default_rng(5).normal(size=10)
    s = aggregates.summarise(x)
    assert s["n"] == 10 and s["mean"] == pytest.approx(x.mean()) and s["iqm"] == pytest.approx(middle_mean(x))
    assert s["sem"] == pytest.approx(x.std(ddof=1) / np.sqrt(10)) and s["low"] < s["iqm"] < s["high"]
    assert {type(v) for v in s.values()} <= {float, int}
    nothing = aggregates.summarise([NAN, NAN])
    assert nothing["n"] == 0 and np.isnan(nothing["mean"])
    one = aggregates.summarise([2.0])
    assert one["iqm"] == one["mean"] == 2 and np.isnan([one["sem"], one["low"], one["high"]]).all()


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: aggregates.summarise(np.zeros((2, 2, 2))), r"\(2, 2, 2\)"),
        (lambda: aggregates.bootstrap_interval([1.0, 2.0], confidence=95), "95"),
        (lambda: aggregates.probability_of_improvement(np.ones((2, 3)), np.ones((2, 4))), "same tasks"),
        (lambda: aggregates.regret([0, 0], [1, 1], 1), "increasing"),
        (lambda: aggregates.regret([0, 1], [1, 1, 1], 1), "one score per step"),
        (lambda: aggregates.regret([0, 1], [-3, -2], -1), "positive"),
    ],
)
def test_errors_say_what_is_wrong(call, word):
    with pytest.raises(ValueError, match=word):
        call()
