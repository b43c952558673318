"""Curves of a run: the learning curves, and the Q-values, of all seeds.

Each function writes one PNG at 160 dots per inch to `path`, and makes its folder if it is missing. It keeps
no state. The colours are from Okabe and Ito (2008). Readers with any of the common colour deficiencies can
tell them apart.
"""

import csv
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ooo_rl.data.figures import aggregates
from ooo_rl.data.figures.style import COLORS, DASHES, INK, STYLE, save


def learning_curves(
    rows: Sequence[dict] | str | pathlib.Path,
    path: str | pathlib.Path,
    metric: str = "return",
    title: str = "",
    units: Mapping[str, str] | None = None,
) -> None:
    """Draws learning curves: one panel per phase, one colour per setting.

    A curve is the IQM over seeds, with its 95 % stratified-bootstrap band and a thin line per seed.

    `rows` is the tidy record of a run: dictionaries, or the path of its metrics.csv. The columns are phase,
    step, seed, setting (optional), metric and value. `metric` also finds `eval/<metric>`. `units` maps the
    name of a phase to what its steps count; the default is "steps".

    If a value was recorded twice, the later one counts. NaN is left out. There is no band if only one seed
    has values. Raises ValueError if nothing was recorded under the name `metric`.
    """
    series, settings = _series(read(rows), metric)
    with mpl.rc_context(STYLE):
        figure, axes = _panels(series, units)
        for ax, runs in zip(axes, series.values()):
            _phase(ax, runs, settings)
        axes[0].set_ylabel(metric.removeprefix("eval/"))
        _finish(figure, settings, title)
        save(figure, path)


def q_curves(
    rows: Sequence[dict] | str | pathlib.Path,
    path: str | pathlib.Path,
    stopped: Mapping[tuple[int, str], tuple[str, int]] | None = None,
    limit: float = math.inf,
    title: str = "",
    units: Mapping[str, str] | None = None,
) -> None:
    """Draws the mean Q-values, which show divergence: one panel per phase, one colour per setting.

    A thin line is a seed, a thick line is the mean over seeds. `rows` is as in `learning_curves`, in the
    order of time, with the metric "q".

    `stopped` maps (seed, setting) to the (phase, step) at which that run was stopped. There its line ends in
    a cross, and the mean goes on without it. If the value there is NaN, the cross is at the upper edge.

    The axis is linear up to where most values lie, and logarithmic beyond. So an explosion fits into the
    panel, and the other curves keep their shape. `limit` (--max-q) is drawn if a value exceeds a tenth of
    it. Values beyond ten times the limit are drawn at ten times the limit.
    """
    stopped = stopped or {}
    series, settings = _series(_until_stopped(read(rows), stopped), "q")
    all_runs = [run for found in series.values() for runs in found.values() for run in runs.values()]
    values = np.array([v for run in all_runs for v in run.values()])
    finite = values[np.isfinite(values)]
    edge = min(np.abs(finite).max(initial=1.0), 10 * limit)
    with mpl.rc_context(STYLE):
        figure, axes = _panels(series, units)
        _symlog(axes[0], finite, edge)
        for ax, (phase, found) in zip(axes, series.items()):
            for setting, runs in found.items():
                here = {run: step for run, (where, step) in stopped.items() if where == phase}
                ends = {seed: step for (seed, name), step in here.items() if name == setting}
                _q_lines(ax, runs, ends, edge, *_line_style(settings.index(setting)))
            _step_axis(ax, sorted({step for runs in found.values() for run in runs.values() for step in run}))
            for sign in (1, -1):
                if (sign * values > limit / 10).any():
                    ax.axhline(sign * limit, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
        axes[0].set_ylabel("mean Q-value")
        cross = {"linestyle": "", "marker": "X", "markersize": 6, "markeredgewidth": 0}
        marks = [Line2D([], [], color=INK, label="stopped", **cross)] if stopped else []
        if (np.abs(values) > limit / 10).any():
            dashed = {"linewidth": 0.8, "linestyle": (0, (4, 2))}
            marks.append(Line2D([], [], color=INK, label=f"--max-q: {limit:g}", **dashed))
        _finish(figure, settings, title, marks)
        save(figure, path)


def read(rows: Sequence[dict] | str | pathlib.Path) -> Sequence[dict]:
    """The rows of the metrics.csv at the path `rows`; if `rows` is not a path, `rows` itself."""
    if isinstance(rows, str | pathlib.Path):
        with open(rows, newline="") as file:
            return list(csv.DictReader(file))
    return rows


def _series(
    rows: Iterable[dict], metric: str
) -> tuple[dict[str, dict[str, dict[int, dict[int, float]]]], list[str]]:
    """The values of `metric` as phase -> setting -> seed -> step -> value, and a list of all settings.

    The phases are in the order of time.
    """
    series: dict[str, dict[str, dict[int, dict[int, float]]]] = {}
    rows = list(rows)
    for row in rows:
        if row["metric"] in (metric, f"eval/{metric}"):
            runs = series.setdefault(row["phase"], {}).setdefault(row.get("setting") or "", {})
            runs.setdefault(int(row["seed"]), {})[int(row["step"])] = float(row["value"])
    if not series:
        raise ValueError(
            f"no rows of {metric!r}; there are rows of "
            f"{', '.join(sorted({row['metric'] for row in rows})) or 'nothing at all'}"
        )
    return series, list(dict.fromkeys(setting for found in series.values() for setting in found))


def _panels(phases: Iterable[str], units: Mapping[str, str] | None) -> tuple[Figure, Sequence[Axes]]:
    """A figure with a row of axes, one per phase, that share one range of values."""
    phases = list(phases)
    figure = Figure(figsize=(max(2.6 * len(phases) + 0.6, 3.6), 2.7), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08)  # inches: room for the last tick's label
    axes = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for ax, phase in zip(axes, phases):
        ax.set(title=phase, xlabel=(units or {}).get(phase, "steps"))
    return figure, axes


def _finish(figure: Figure, settings: list[str], title: str, marks: Sequence[Line2D] = ()) -> None:
    """Adds the title, and a legend if there is anything to tell apart."""
    handles = []
    if settings != [""]:
        styles = [(*_line_style(i), setting or "default") for i, setting in enumerate(settings)]
        handles = [
            Line2D([], [], color=color, linestyle=dash, linewidth=1.8, label=name)
            for color, dash, name in styles
        ]
    handles += marks
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4))
    if title:
        figure.suptitle(title, fontsize=11)


def _phase(ax: Axes, series: dict[str, dict[int, dict[int, float]]], settings: list[str]) -> None:
    """Draws the curves of one phase; `series` maps setting -> seed -> step -> value."""
    steps = sorted({step for runs in series.values() for run in runs.values() for step in run})
    lines = sum(len(runs) for runs in series.values())
    for i, (setting, runs) in enumerate(series.items()):
        # The results of a single evaluation are dots with bars, side by side. One point makes no line, and
        # nobody has to read its step off the axis.
        shift = (i - (len(series) - 1) / 2) * 0.2 if len(steps) == 1 else None
        _curve(ax, runs, *_line_style(settings.index(setting)), max(0.12, 0.4 - 0.01 * lines), shift)
    _step_axis(ax, steps)


def _step_axis(ax: Axes, steps: Sequence[int]) -> None:
    if len(steps) == 1:
        ax.set(xlim=(steps[0] - 1, steps[0] + 1), xticks=steps)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def _until_stopped(
    rows: Iterable[dict], stopped: Mapping[tuple[int, str], tuple[str, int]]
) -> Iterable[dict]:
    """The rows of the metric "q"; of a stopped run, only those up to its stop. Later ones mean nothing."""
    over = set()
    for row in rows:
        run = int(row["seed"]), row.get("setting") or ""
        if row["metric"] == "q" and run not in over:
            yield row
            if stopped.get(run) == (row["phase"], int(row["step"])):
                over.add(run)


def _q_lines(
    ax: Axes, runs: dict[int, dict[int, float]], ends: dict[int, int], edge: float, color: str, dash: str
) -> None:
    """Draws one setting in one phase: a line per seed, cut off at +-`edge`, and the mean.

    `ends` maps stopped seeds to their last steps.
    """
    steps = np.array(sorted({step for run in runs.values() for step in run}))
    values = np.array([[run.get(step, np.nan) for step in steps] for run in runs.values()])
    dot = {"marker": "o", "markersize": 5, "markeredgewidth": 0} if len(steps) == 1 else {}
    for seed, run in zip(runs, np.clip(values, -edge, edge)):
        known = ~np.isnan(run)
        ax.plot(steps[known], run[known], color=color, linewidth=0.7, alpha=0.5, linestyle=dash, **dot)
        if seed in ends:
            last = run[steps == ends[seed]][0]
            y, scale = (1.0, ax.get_xaxis_transform()) if np.isnan(last) else (last, ax.transData)
            ax.plot(
                ends[seed],
                y,
                "X",
                color=INK,
                markersize=6,
                markeredgewidth=0,
                clip_on=False,
                zorder=5,
                transform=scale,
            )
    alive = np.array([[step != ends.get(seed) for step in steps] for seed in runs]) & np.isfinite(values)
    there = alive.any(axis=0)
    mean = np.where(alive, values, 0.0).sum(axis=0)[there] / alive.sum(axis=0)[there]
    ax.plot(steps[there], mean, color=color, linewidth=1.8, linestyle=dash, zorder=3, **dot)


def _symlog(ax: Axes, values: np.ndarray, edge: float) -> None:
    """Sets the axis of values: linear up to a power of ten, logarithmic beyond.

    This power of ten is the next one above twice the median absolute value.
    """
    linear = 10.0 ** math.ceil(math.log10(max(2 * np.median(np.abs(values)), 1.0))) if len(values) else 1.0
    ax.set_yscale("symlog", linthresh=linear, linscale=2)
    if edge <= linear:
        ax.yaxis.set_major_locator(MaxNLocator(5))
    else:
        decades = math.ceil(math.log10(edge / linear)) + 1
        ticks = [linear * 10.0**k for k in range(0, decades + 1, -(-decades // 4))]
        ax.yaxis.set_major_locator(FixedLocator([*(-t for t in ticks), 0.0, *ticks]))
    ax.yaxis.set_minor_locator(NullLocator())
    thousands = EngFormatter(sep="")
    ax.yaxis.set_major_formatter(
        FuncFormatter(
            lambda y, _: thousands(y) if abs(y) >= 1000 else f"{y:g}".replace("-", "\N{MINUS SIGN}")
        )
    )


def _curve(
    ax: Axes, runs: dict[int, dict[int, float]], color: str, dash: str, alpha: float, shift: float | None
) -> None:
    """Draws one setting in one phase: a line, or if `shift` is given, dots that far from their only step."""
    steps = np.array(sorted({step for run in runs.values() for step in run}))
    values = np.array([[run.get(step, np.nan) for step in steps] for run in runs.values()])
    middle = aggregates.iqm(values, axis=0)
    low, high = np.transpose([aggregates.bootstrap_interval(column) for column in values.T])
    if shift is not None:
        if len(runs) > 1:
            ax.plot(
                np.full(len(runs), steps[0] + shift + 0.06),
                values[:, 0],
                ".",
                color=color,
                markersize=4,
                alpha=0.5,
                markeredgewidth=0,
            )
        ax.vlines(steps + shift, low, high, color=color, linewidth=1.6)
        ax.plot(steps + shift, middle, "o", color=color, markersize=5)
        return
    ax.fill_between(steps, low, high, color=color, alpha=0.22, linewidth=0)
    for run in values if len(runs) > 1 else ():
        ax.plot(steps, run, color=color, linewidth=0.5, alpha=alpha, linestyle=dash)
    ax.plot(steps, middle, color=color, linewidth=1.8, linestyle=dash, zorder=3)


def _line_style(i: int) -> tuple[str, str]:
    return COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)]
