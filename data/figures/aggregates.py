"""Statistics of scores over seeds: robust averages, their intervals, comparisons and regret.

The interquartile mean, the stratified bootstrap and the probability of improvement are from Agarwal et al.
2021 (arXiv 2108.13264). Scores are [runs] or [runs, tasks].

NaN marks a failed run. The run is dropped from its task. So a method that fails on some seeds is judged by
its other seeds: report their number (`n`) beside the average.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

# A permutation test tries all deals of the scores up to this number (11 runs against 11).
EXACT_DEALS = 1_000_000
DRAWN_DEALS = 100_000  # deals that it draws where there are more


def iqm(x: ArrayLike, axis: int | None = None) -> float | np.ndarray:
    """Interquartile mean: the mean of the scores without a quarter of them (rounded down) at each end.

    Without `axis` it is taken over all runs and tasks together, and is a float. With `axis` it is an array
    without that axis. For fewer than four scores it is the mean; for no scores it is NaN.
    """
    x = np.asarray(x, np.float64)
    if axis is None:
        x = x[~np.isnan(x)]
        return float(stats.trim_mean(x, 0.25)) if x.size else np.nan
    if x.shape[axis] == 0 or np.isnan(x).any():  # then lines along the axis differ in their number of scores
        return (
            np.apply_along_axis(iqm, axis, x) if x.shape[axis] else np.full(np.delete(x.shape, axis), np.nan)
        )
    return stats.trim_mean(x, 0.25, axis)


def bootstrap_interval(
    scores: ArrayLike,
    statistic: Callable = iqm,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Stratified-bootstrap percentile interval (low, high) of a statistic of the pooled scores.

    Runs are drawn with replacement within each task. `statistic(x, axis=1)` maps resampled scores
    [resamples, runs x tasks] to [resamples].

    If no task has two runs that did not fail, the spread is unknown. The result is then (nan, nan), and not
    an interval of zero width.
    """
    _check_resampling(confidence, resamples)
    tasks = _by_task(scores)
    if all(len(task) < 2 for task in tasks):
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    drawn = [task[rng.integers(len(task), size=(resamples, len(task)))] for task in tasks]
    return _percentiles(statistic(np.concatenate(drawn, axis=1), axis=1), confidence)


def probability_of_improvement(x: ArrayLike, y: ArrayLike) -> float:
    """Probability that a random run of `x` scores higher than a random run of `y` on a random task.

    A tie counts half. Both are [runs] or [runs, tasks], with the same tasks in the same order. The numbers
    of runs may differ. A task is left out if all runs of `x` or all runs of `y` failed there. If no task is
    left, the result is NaN.
    """
    # Mann and Whitney's U counts the pairs that x wins. Nothing else of their test is used.
    chances = [
        stats.mannwhitneyu(a, b, method="asymptotic").statistic / (len(a) * len(b)) for a, b in _paired(x, y)
    ]
    return float(np.mean(chances)) if chances else np.nan


def improvement_interval(
    x: ArrayLike, y: ArrayLike, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Stratified-bootstrap percentile interval (low, high) of `probability_of_improvement`.

    The runs of both methods are drawn with replacement within each task. The result is (nan, nan) if neither
    method has a task with two runs that did not fail.
    """
    _check_resampling(confidence, resamples)
    pairs = _paired(x, y)
    if all(len(a) < 2 and len(b) < 2 for a, b in pairs):
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    chances = []
    for a, b in pairs:
        wins = (np.sign(a[:, None] - b) + 1) / 2
        # How often each run was drawn determines a resample. So no array [resamples, runs, runs] is needed.
        of_a, of_b = (
            rng.multinomial(len(s), np.full(len(s), 1 / len(s)), size=resamples) / len(s) for s in (a, b)
        )
        chances.append(((of_a @ wins) * of_b).sum(axis=1))
    return _percentiles(np.mean(chances, axis=0), confidence)


def permutation_p_value(x: ArrayLike, y: ArrayLike) -> float:
    """How often chance alone gives so large a `probability_of_improvement` of `x` [runs] over `y` [runs].

    It is the share of the ways to deal all scores out to two methods with these numbers of runs: a
    permutation test, one-sided. With three runs each it is 1/20 at least. NaN if fewer than two runs of a
    method did not fail.

    The test is exact up to 1,000,000 ways, so up to 11 runs against 11. Beyond, it looks at 100,000 ways that
    are drawn at random, and at the observed one. The draw is the same each time. A share of 0.05 then has a
    standard error of 0.0007, and none is below 1/100,001.
    """
    pairs = _paired(x, y)
    if not pairs or min(map(len, pairs[0])) < 2:
        return np.nan
    wins = lambda a, b, axis: stats.mannwhitneyu(a, b, axis=axis, method="asymptotic").statistic  # noqa: E731
    sizes = [len(scores) for scores in pairs[0]]
    exact = math.comb(sum(sizes), sizes[0]) <= EXACT_DEALS
    tested = stats.permutation_test(
        pairs[0],
        wins,
        batch=10_000,
        n_resamples=np.inf if exact else DRAWN_DEALS,
        alternative="greater",
        random_state=np.random.default_rng(0),  # `rng`, its newer name, is unknown to scipy 1.14
    )
    return float(tested.pvalue)


def regret(steps: ArrayLike, scores: ArrayLike, best: float) -> float | np.ndarray:
    """The part of the best score that online learning missed: 1 - (time average of the score) / best.

    This is Cal-QL's cumulative regret (arXiv 2303.05479). It is 0 for a run that scores `best` from its
    first step on, and 1 for a run that never scores.

    `steps` [points] are the environment steps of the evaluations; their distances may differ. `scores` is
    [..., points]. The result is [...], or a float for one curve. Scores must count from 0, like a success
    rate or a normalised return; otherwise the ratio has no meaning. Raises ValueError for steps that do not
    increase, shapes that do not match, or a `best` that is not positive.
    """
    steps, scores = np.asarray(steps, np.float64), np.asarray(scores, np.float64)
    if steps.ndim != 1 or len(steps) < 2 or np.any(np.diff(steps) <= 0):
        raise ValueError(f"regret needs two or more increasing steps [points], got {steps}")
    if scores.shape[-1:] != steps.shape:
        raise ValueError(
            f"regret needs one score per step: {len(steps)} steps, scores of shape {scores.shape}"
        )
    if not best > 0:
        raise ValueError(f"the best score must be positive, got {best}: normalise negative returns first")
    missed = 1 - np.trapezoid(scores, steps, axis=-1) / ((steps[-1] - steps[0]) * best)
    return float(missed) if scores.ndim == 1 else missed


def summarise(x: ArrayLike) -> dict[str, float]:
    """The IQM with its 95 % stratified-bootstrap interval, the mean with its standard error, and the count.

    `x` is [runs] or [runs, tasks]. The keys are iqm, low, high, mean, sem and n, the number of scores that
    are not NaN. The standard error also comes from the spread within tasks; for one task it is the usual s /
    sqrt(n). Undefined values are NaN.
    """
    tasks, (low, high) = _by_task(x), bootstrap_interval(x)
    pooled = np.concatenate(tasks) if tasks else np.empty(0)
    spread = [len(task) * np.var(task, ddof=1) if len(task) > 1 else np.nan for task in tasks]
    return {
        "iqm": iqm(pooled),
        "low": low,
        "high": high,
        "mean": float(pooled.mean()) if pooled.size else np.nan,
        "sem": float(np.sqrt(np.sum(spread)) / pooled.size) if pooled.size else np.nan,
        "n": pooled.size,
    }


def _by_task(scores: ArrayLike, keep_empty: bool = False) -> list[np.ndarray]:
    """The scores of each task without NaN. Tasks without scores are dropped, unless `keep_empty`."""
    scores = np.asarray(scores, np.float64)
    if scores.ndim not in (1, 2):
        raise ValueError(f"scores must be [runs] or [runs, tasks], got shape {scores.shape}")
    tasks = [task[~np.isnan(task)] for task in scores.reshape(len(scores), -1).T] if scores.size else []
    return [task for task in tasks if len(task) or keep_empty]


def _paired(x: ArrayLike, y: ArrayLike) -> list[tuple[np.ndarray, np.ndarray]]:
    """The scores of both, task by task, for the tasks in which both have scores."""
    ours, theirs = _by_task(x, keep_empty=True), _by_task(y, keep_empty=True)
    if ours and theirs and len(ours) != len(theirs):
        raise ValueError(f"both must be scored on the same tasks, got {len(ours)} and {len(theirs)}")
    return [(a, b) for a, b in zip(ours, theirs) if len(a) and len(b)]


def _percentiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _check_resampling(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            "confidence must lie between 0 and 1, and resamples must be positive, "
            f"got {confidence} and {resamples}"
        )
