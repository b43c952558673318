"""What may be said of scores over seeds: robust averages, their intervals, comparisons and regret.

The measures are those of Agarwal et al. 2021 (arXiv 2108.13264): interquartile mean, stratified bootstrap, probability of
improvement. Scores are [runs] or [runs, tasks]. NaN marks a run that failed; it is dropped from its task, so a method
that breaks on some seeds is judged by those that lived: report their number (`n`) beside the average.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


def iqm(x: ArrayLike, axis: int | None = None) -> float | np.ndarray:
    """Mean of the middle half of the scores: a quarter of them (rounded down) is cut off at each end.

    Over all runs and tasks together (a float), or along one axis (an array without it). Below four scores it is the mean. Without any, NaN.
    """
    x = np.asarray(x, np.float64)
    if axis is None:
        x = x[~np.isnan(x)]
        return float(stats.trim_mean(x, 0.25)) if x.size else np.nan
    if x.shape[axis] == 0 or np.isnan(x).any():  # each line along the axis then has a length of its own
        return np.apply_along_axis(iqm, axis, x) if x.shape[axis] else np.full(np.delete(x.shape, axis), np.nan)
    return stats.trim_mean(x, 0.25, axis)


def bootstrap_interval(
    scores: ArrayLike, statistic: Callable = iqm, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval (low, high) of a statistic of the pooled scores, drawing runs with replacement within each task.

    `statistic(x, axis=1)` maps resampled scores [resamples, runs x tasks] to [resamples]. Where no task has two runs that
    lived there is no spread to learn from, and the answer is (nan, nan) rather than an interval of no width.
    """
    _check_resampling(confidence, resamples)
    tasks = _by_task(scores)
    if all(len(task) < 2 for task in tasks):
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    drawn = [task[rng.integers(len(task), size=(resamples, len(task)))] for task in tasks]
    return _percentiles(statistic(np.concatenate(drawn, axis=1), axis=1), confidence)


def probability_of_improvement(x: ArrayLike, y: ArrayLike) -> float:
    """Chance that a random run of `x` scores higher than one of `y` on a random task; a tie counts half.

    Both [runs] or [runs, tasks] with the same tasks in the same order; the numbers of runs may differ. Tasks
    where either has no run that lived are left out; NaN if that leaves none.
    """
    # Mann and Whitney's U counts the pairs that x wins, which is all that is used of their test.
    chances = [stats.mannwhitneyu(a, b, method="asymptotic").statistic / (len(a) * len(b)) for a, b in _paired(x, y)]
    return float(np.mean(chances)) if chances else np.nan


def improvement_interval(x: ArrayLike, y: ArrayLike, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile interval (low, high) of `probability_of_improvement`, drawing the runs of both anew within each task.

    (nan, nan) where no task has two runs that lived of either.
    """
    _check_resampling(confidence, resamples)
    pairs = _paired(x, y)
    if all(len(a) < 2 and len(b) < 2 for a, b in pairs):
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    chances = []
    for a, b in pairs:
        wins = (np.sign(a[:, None] - b) + 1) / 2
        # How often each run was drawn says all about a resample: no array [resamples, runs, runs] is needed.
        of_a, of_b = (rng.multinomial(len(s), np.full(len(s), 1 / len(s)), size=resamples) / len(s) for s in (a, b))
        chances.append(((of_a @ wins) * of_b).sum(axis=1))
    return _percentiles(np.mean(chances, axis=0), confidence)


def regret(steps: ArrayLike, scores: ArrayLike, best: float) -> float | np.ndarray:
    """How much of the best score online learning has missed: 1 - (time average of score / best), as Cal-QL measures it (arXiv 2303.05479).

    0 for a run that was as good as `best` from its first step on, 1 for one that never scored. `steps` [points] are the
    environment steps of the evaluations, not necessarily even; `scores` is [..., points], the result [...], a float for one
    curve. Scores must count from 0 (a success rate, a normalised return), or the ratio means nothing.
    """
    steps, scores = np.asarray(steps, np.float64), np.asarray(scores, np.float64)
    if steps.ndim != 1 or len(steps) < 2 or np.any(np.diff(steps) <= 0):
        raise ValueError(f"regret needs two or more increasing steps [points], got {steps}")
    if scores.shape[-1:] != steps.shape:
        raise ValueError(f"regret needs one score per step: {len(steps)} steps, scores of shape {scores.shape}")
    if not best > 0:
        raise ValueError(f"the best score must be positive, got {best}: normalise negative returns first")
    missed = 1 - np.trapezoid(scores, steps, axis=-1) / ((steps[-1] - steps[0]) * best)
    return float(missed) if scores.ndim == 1 else missed


def summarise(x: ArrayLike) -> dict[str, float]:
    """IQM with its 95 % stratified-bootstrap interval (low, high), mean with its standard error, and the number of scores that are not NaN.

    `x` is [runs] or [runs, tasks]. The standard error is within tasks, too: with one task, the usual s / sqrt(n). NaN where undefined.
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
    """The scores of each task without the NaN; tasks where nothing is left are dropped unless kept for pairing."""
    scores = np.asarray(scores, np.float64)
    if scores.ndim not in (1, 2):
        raise ValueError(f"scores must be [runs] or [runs, tasks], got shape {scores.shape}")
    tasks = [task[~np.isnan(task)] for task in scores.reshape(len(scores), -1).T] if scores.size else []
    return [task for task in tasks if len(task) or keep_empty]


def _paired(x: ArrayLike, y: ArrayLike) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores of both, task by task, where both have any."""
    ours, theirs = _by_task(x, keep_empty=True), _by_task(y, keep_empty=True)
    if ours and theirs and len(ours) != len(theirs):
        raise ValueError(f"both must be scored on the same tasks, got {len(ours)} and {len(theirs)}")
    return [(a, b) for a, b in zip(ours, theirs) if len(a) and len(b)]


def _percentiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _check_resampling(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"confidence lies between 0 and 1 and resamples is positive, got {confidence} and {resamples}")
