"""The pictures of a run: learning curves over seeds, what was visited in a 2-D task, and the three phases as a diagram.

Every function writes one PNG at 160 dots per inch to `path` (its folder is made where it is missing) and keeps no state. Colours
are those of Okabe and Ito (2008), told apart by readers with any of the common colour deficiencies.
"""

import csv
import math
import pathlib
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from data import coverage, statistics

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")  # where there are more lines than colours
INK, FAINT, PAPER = "#222222", "#8A8A8A", "#F4F5F7"
DENSITY = LinearSegmentedColormap.from_list("density", ["#E8EDF3", "#A9BACD", "#4C6480"])
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
    "axes.edgecolor": FAINT, "axes.linewidth": 0.8, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.6,
    "xtick.major.size": 3, "ytick.major.size": 3, "xtick.major.width": 0.8, "ytick.major.width": 0.8, "legend.frameon": False,
    "lines.solid_capstyle": "round", "lines.solid_joinstyle": "round", "figure.facecolor": "white", "savefig.dpi": 160,
}  # fmt: skip
PHASES = {"offline": "gradient steps", "online": "environment steps", "retrained": "gradient steps"}
STAGES = (
    ("1  pre-train offline", "a first policy from the data,\nalready drawn to novelty", COLORS[0]),
    ("2  explore online, optimistically", "seek reward and novelty;\nwhat is found stays in the pool", COLORS[1]),
    ("3  retrain from scratch, pessimistically", "a fresh policy from all data,\nfree of the bonus", COLORS[2]),
)


@dataclass(frozen=True)
class Panel:
    """What one panel of a 2-D task shows; anything left None is not drawn.

    visits: positions [N, 2], drawn as a log-scaled density. paths: one coloured line per policy, [E, T, 2] or a list of
    [T, 2], NaN where an episode is over. shortest: positions [K, 2], dashed (`coverage.ShortestPath.path`). note: a line under the panel.
    """

    title: str
    visits: ArrayLike | None = None
    paths: Iterable[ArrayLike] | None = None
    shortest: ArrayLike | None = None
    note: str = ""


def learning_curves(rows: Sequence[dict] | str | pathlib.Path, path: str | pathlib.Path, metric: str = "return", title: str = "") -> None:
    """One panel per phase: IQM over seeds, its 95 % stratified-bootstrap band, and a thin line per seed; one colour per setting.

    `rows` is the tidy record of a run, dictionaries or the path of its metrics.csv: phase, step, seed, setting (optional), metric,
    value. `metric` also finds `eval/<metric>`. Of a value recorded twice the later counts; NaN is left out. With one
    seed, or one that lived, there is no band. ValueError if nothing was recorded under that name.
    """
    series, settings = _series(read(rows), metric)
    with mpl.rc_context(STYLE):
        figure, axes = _panels(series)
        for ax, runs in zip(axes, series.values()):
            _phase(ax, runs, settings)
        axes[0].set_ylabel(metric.removeprefix("eval/"))
        _finish(figure, settings, title)
        _save(figure, path)


def q_curves(
    rows: Sequence[dict] | str | pathlib.Path,
    path: str | pathlib.Path,
    stopped: Mapping[tuple[int, str], tuple[str, int]] | None = None,
    limit: float = math.inf,
    title: str = "",
) -> None:
    """Mean Q-values, to see divergence with: one panel per phase, a thin line per seed and a thick one for the mean over seeds.

    `rows` as in `learning_curves`, in the order of time, with the metric "q". `stopped` maps (seed, setting) to the (phase, step) at
    which that run was given up: there its line ends in a cross, at the upper edge where the value is not a number, and the mean goes on
    without it. The axis is linear as far as most values reach and logarithmic beyond, so that an explosion fits in and the rest keeps
    its shape. `limit` (--max-q) is drawn where a value comes within a tenth of it; values beyond ten times it are drawn there.
    """
    stopped = stopped or {}
    series, settings = _series(_until_stopped(read(rows), stopped), "q")
    values = np.array([v for found in series.values() for runs in found.values() for run in runs.values() for v in run.values()])
    finite = values[np.isfinite(values)]
    edge = min(np.abs(finite).max(initial=1.0), 10 * limit)
    with mpl.rc_context(STYLE):
        figure, axes = _panels(series)
        _symlog(axes[0], finite, edge)
        for ax, (phase, found) in zip(axes, series.items()):
            for setting, runs in found.items():
                ends = {seed: step for (seed, name), (where, step) in stopped.items() if (name, where) == (setting, phase)}
                _q_lines(ax, runs, ends, edge, *_line_style(settings.index(setting)))
            _step_axis(ax, sorted({step for runs in found.values() for run in runs.values() for step in run}))
            for sign in (1, -1):
                if (sign * values > limit / 10).any():
                    ax.axhline(sign * limit, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
        axes[0].set_ylabel("mean Q-value")
        marks = [Line2D([], [], color=INK, linestyle="", marker="X", markersize=6, markeredgewidth=0, label="stopped")] if stopped else []
        if (np.abs(values) > limit / 10).any():
            marks.append(Line2D([], [], color=INK, linewidth=0.8, linestyle=(0, (4, 2)), label=f"--max-q {limit:g}"))
        _finish(figure, settings, title, marks)
        _save(figure, path)


def read(rows: Sequence[dict] | str | pathlib.Path) -> Sequence[dict]:
    """The rows of a metrics.csv, whose path is given; rows as they are."""
    if isinstance(rows, str | pathlib.Path):
        with open(rows, newline="") as file:
            return list(csv.DictReader(file))
    return rows


def figure_2d(path: str | pathlib.Path, layout: dict, panels: Sequence[Panel]) -> None:
    """A row of panels over the map of a 2-D task (`layout` as in `data.coverage`), in the form of the OOO paper's Figure 2."""
    if not panels:
        raise ValueError("no panels to draw")
    x0, x1, y0, y1 = layout["bounds"]
    width, count = 2.3, len(panels)
    notes = ["\n".join(textwrap.fill(line, 43) for line in panel.note.splitlines()) for panel in panels]
    handles, columns = _map_legend(panels, layout["start"] is not None), {1: 2, 2: 3}.get(count, 6)
    words = 0.45 + 0.14 * max(note.count("\n") + 1 for note in notes) + 0.19 * -(-len(handles) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width * count + 0.2, width * (y1 - y0) / (x1 - x0) + words), layout="constrained")
        for ax, panel, note in zip(figure.subplots(1, count, squeeze=False)[0], panels, notes):
            draw_panel(ax, layout, panel)
            ax.set_title(panel.title)
            ax.set_xlabel(note, fontsize=7.5)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=1.6, columnspacing=1.4)
        _save(figure, path)


def draw_panel(ax: Axes, layout: dict, panel: Panel, cells: int = 60) -> None:
    """Draws the map and the content of `panel`, without its words, into an existing axes; densities have `cells` per axis."""
    x0, x1, y0, y1 = (float(b) for b in layout["bounds"])
    if panel.visits is not None:
        counts = coverage.visitation(panel.visits, layout, cells).T
        norm = LogNorm(1, max(counts.max(), 10))
        ax.imshow(np.ma.masked_equal(counts, 0), DENSITY, norm, origin="lower", extent=(x0, x1, y0, y1), interpolation="nearest")
    for wall in layout["walls"]:
        ax.plot(*np.transpose(wall), color=INK, linewidth=4 if len(layout["walls"]) == 1 else 1.5, solid_capstyle="butt", zorder=3)
    ax.add_patch(Circle(layout["goal"], layout["goal_radius"], facecolor="#F0E442", edgecolor=INK, linewidth=0.8, zorder=4))
    for i, line in enumerate([] if panel.paths is None else panel.paths):
        ax.plot(*np.transpose(line), color=COLORS[i % 6], linewidth=1.3, alpha=0.85, zorder=5)
    if panel.shortest is not None:
        halo = [withStroke(linewidth=3, foreground="white")]
        ax.plot(*np.transpose(panel.shortest), color="black", linewidth=1.4, linestyle=(0, (3, 1.5)), path_effects=halo, zorder=6)
    if layout["start"] is not None:  # else an episode starts anywhere
        ax.plot(*layout["start"], "o", markersize=6, color="white", markeredgecolor=INK, zorder=7)
    ax.plot(*layout["goal"], "*", markersize=8, color=INK, markeredgewidth=0, zorder=7)
    ax.set(xlim=(x0, x1), ylim=(y0, y1), aspect="equal", xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set(visible=True, color="#C8C8C8")


def framework(
    path: str | pathlib.Path,
    layout: dict | None = None,
    panels: Sequence[Panel | None] = (),
    rows: tuple[int, int] | None = None,
) -> None:
    """The three phases as boxes over the pool of data that grows beneath them.

    `panels` (with `layout`) puts a small map in each box, None for an empty one; `rows` are the numbers of offline and online
    transitions, written on the pool. The words are those of `STAGES`.
    """
    if len(panels) > len(STAGES) or (panels and layout is None):
        raise ValueError(f"a framework takes up to {len(STAGES)} panels, and their layout; got {len(panels)}")
    inset = 2.1 if any(panels) else 0.0
    width, height, bottom = 9.0, 2.6 + inset, 0.15  # data units are inches
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, width), ylim=(bottom, bottom + height))
        ax.axis("off")
        for i, (name, words, color) in enumerate(STAGES):
            left = 0.15 + 3.0 * i
            _box(ax, left, 1.5, 2.7, 1.1 + inset, color)
            ax.text(left + 1.35, 2.35 + inset, name, ha="center", va="center", weight="bold", fontsize=8.3, color=color)
            ax.text(left + 1.35, 1.75, words, ha="center", va="center", fontsize=8.5, linespacing=1.3)
            if i < len(panels) and panels[i] is not None:
                small = figure.add_axes(((left + 0.3) / width, (2.05 - bottom) / height, 2.1 / width, inset / height))
                draw_panel(small, layout, panels[i], cells=40)
            if i:
                _arrow(ax, (left - 0.28, 2.05 + inset / 2), (left - 0.02, 2.05 + inset / 2), INK)
        _pool(ax, rows)
        _save(figure, path)


def _series(rows: Iterable[dict], metric: str) -> tuple[dict[str, dict[str, dict[int, dict[int, float]]]], list[str]]:
    """(phase -> setting -> seed -> step -> value of `metric`, the phases in their order; all settings)."""
    series: dict[str, dict[str, dict[int, dict[int, float]]]] = {}
    rows = list(rows)
    for row in rows:
        if row["metric"] in (metric, f"eval/{metric}"):
            runs = series.setdefault(row["phase"], {}).setdefault(row.get("setting") or "", {})
            runs.setdefault(int(row["seed"]), {})[int(row["step"])] = float(row["value"])
    if not series:
        raise ValueError(f"no rows of {metric!r}; there are {', '.join(sorted({row['metric'] for row in rows})) or 'none at all'}")
    phases = sorted(series, key=lambda phase: [*PHASES, phase].index(phase))
    settings = list(dict.fromkeys(setting for phase in phases for setting in series[phase]))
    return {phase: series[phase] for phase in phases}, settings


def _panels(phases: Iterable[str]) -> tuple[Figure, Sequence[Axes]]:
    """A row of axes, one per phase, over one range of values."""
    phases = list(phases)
    figure = Figure(figsize=(max(2.6 * len(phases) + 0.6, 3.6), 2.7), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08)  # inches: room for the last tick's label
    axes = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for ax, phase in zip(axes, phases):
        ax.set(title=phase, xlabel=PHASES.get(phase, "steps"))
    return figure, axes


def _finish(figure: Figure, settings: list[str], title: str, marks: Sequence[Line2D] = ()) -> None:
    """The title, and a legend where there is anything to tell apart."""
    handles = []
    if settings != [""]:
        styles = [(*_line_style(i), setting or "default") for i, setting in enumerate(settings)]
        handles = [Line2D([], [], color=color, linestyle=dash, linewidth=1.8, label=name) for color, dash, name in styles]
    handles += marks
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4))
    if title:
        figure.suptitle(title, fontsize=11)


def _phase(ax: Axes, series: dict[str, dict[int, dict[int, float]]], settings: list[str]) -> None:
    """The curves of one phase: `series` maps setting -> seed -> step -> value."""
    steps = sorted({step for runs in series.values() for run in runs.values() for step in run})
    lines = sum(len(runs) for runs in series.values())
    for i, (setting, runs) in enumerate(series.items()):
        # Results of one single evaluation stand side by side, as dots with bars: there is no line to see, and no time to read off.
        shift = (i - (len(series) - 1) / 2) * 0.2 if len(steps) == 1 else None
        _curve(ax, runs, *_line_style(settings.index(setting)), max(0.12, 0.4 - 0.01 * lines), shift)
    _step_axis(ax, steps)


def _step_axis(ax: Axes, steps: Sequence[int]) -> None:
    if len(steps) == 1:
        ax.set(xlim=(steps[0] - 1, steps[0] + 1), xticks=steps)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def _until_stopped(rows: Iterable[dict], stopped: Mapping[tuple[int, str], tuple[str, int]]) -> Iterable[dict]:
    """The rows of "q", those of a stopped run up to its end: what it logged later means nothing."""
    over = set()
    for row in rows:
        run = int(row["seed"]), row.get("setting") or ""
        if row["metric"] == "q" and run not in over:
            yield row
            if stopped.get(run) == (row["phase"], int(row["step"])):
                over.add(run)


def _q_lines(ax: Axes, runs: dict[int, dict[int, float]], ends: dict[int, int], edge: float, color: str, dash: str) -> None:
    """One setting in one phase: a line per seed, cut off at +-`edge`, and the mean; `ends` maps stopped seeds to their last steps."""
    steps = np.array(sorted({step for run in runs.values() for step in run}))
    values = np.array([[run.get(step, np.nan) for step in steps] for run in runs.values()])
    dot = {"marker": "o", "markersize": 5, "markeredgewidth": 0} if len(steps) == 1 else {}
    for seed, run in zip(runs, np.clip(values, -edge, edge)):
        known = ~np.isnan(run)
        ax.plot(steps[known], run[known], color=color, linewidth=0.7, alpha=0.5, linestyle=dash, **dot)
        if seed in ends:
            last = run[steps == ends[seed]][0]
            y, scale = (1.0, ax.get_xaxis_transform()) if np.isnan(last) else (last, ax.transData)
            ax.plot(ends[seed], y, "X", color=INK, markersize=6, markeredgewidth=0, clip_on=False, zorder=5, transform=scale)
    alive = np.array([[step != ends.get(seed) for step in steps] for seed in runs]) & np.isfinite(values)
    there = alive.any(axis=0)
    mean = np.where(alive, values, 0.0).sum(axis=0)[there] / alive.sum(axis=0)[there]
    ax.plot(steps[there], mean, color=color, linewidth=1.8, linestyle=dash, zorder=3, **dot)


def _symlog(ax: Axes, values: np.ndarray, edge: float) -> None:
    """The values' axis: linear up to the power of ten beyond twice their median size, then logarithmic."""
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
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: thousands(y) if abs(y) >= 1000 else f"{y:g}".replace("-", "\N{MINUS SIGN}")))


def _curve(ax: Axes, runs: dict[int, dict[int, float]], color: str, dash: str, alpha: float, shift: float | None) -> None:
    """One setting in one phase, a line; or, where `shift` is given, dots that far from their only step."""
    steps = np.array(sorted({step for run in runs.values() for step in run}))
    values = np.array([[run.get(step, np.nan) for step in steps] for run in runs.values()])
    middle = statistics.iqm(values, axis=0)
    low, high = np.transpose([statistics.bootstrap_interval(column) for column in values.T])
    if shift is not None:
        if len(runs) > 1:
            ax.plot(np.full(len(runs), steps[0] + shift + 0.06), values[:, 0], ".", color=color, markersize=4, alpha=0.5, markeredgewidth=0)
        ax.vlines(steps + shift, low, high, color=color, linewidth=1.6)
        ax.plot(steps + shift, middle, "o", color=color, markersize=5)
        return
    ax.fill_between(steps, low, high, color=color, alpha=0.22, linewidth=0)
    for run in values if len(runs) > 1 else ():
        ax.plot(steps, run, color=color, linewidth=0.5, alpha=alpha, linestyle=dash)
    ax.plot(steps, middle, color=color, linewidth=1.8, linestyle=dash, zorder=3)


def _line_style(i: int) -> tuple[str, str]:
    return COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)]


def _map_legend(panels: Sequence[Panel], starts: bool = True) -> list[Line2D]:
    """Handles of what occurs in the panels, in the order in which they are read."""
    handles = [
        Line2D([], [], color=INK, linewidth=4, label="wall"),
        *([Line2D([], [], color="none", marker="o", markersize=6, markerfacecolor="white", markeredgecolor=INK, label="start")] * starts),
        Line2D([], [], color="none", marker="*", markersize=9, markerfacecolor=INK, markeredgewidth=0, label="goal"),
    ]
    if any(panel.visits is not None for panel in panels):
        square = {"marker": "s", "markersize": 7, "markerfacecolor": DENSITY(0.5), "markeredgewidth": 0}
        handles.append(Line2D([], [], color="none", label="visited (log scale)", **square))
    if any(panel.paths is not None for panel in panels):
        handles.append(Line2D([], [], color=COLORS[0], linewidth=1.3, label="policies, one per seed"))
    if any(panel.shortest is not None for panel in panels):
        handles.append(Line2D([], [], color="black", linewidth=1.4, linestyle=(0, (3, 1.5)), label="shortest path in the data"))
    return handles


def _pool(ax: Axes, rows: tuple[int, int] | None) -> None:
    """The data under the boxes of `framework`: what each phase reads (up) and adds (down)."""
    offline, online = ("offline data", "online data") if rows is None else (f"offline data  {rows[0]:,}", f"online data  {rows[1]:,}")
    ax.add_patch(Rectangle((0.15, 0.3), 8.7, 0.3, facecolor=STAGES[0][2], alpha=0.3, linewidth=0))
    ax.fill([3.15, 5.85, 8.85, 8.85, 3.15], [0.6, 0.95, 0.95, 0.6, 0.6], color=STAGES[1][2], alpha=0.3, linewidth=0)
    ax.text(0.3, 0.45, offline, va="center", fontsize=8.5)
    ax.text(8.7, 0.775, online, va="center", ha="right", fontsize=8.5)
    for x, low, (_, _, color) in zip((1.5, 4.35, 7.5), (0.6, 0.76, 0.95), STAGES):
        _arrow(ax, (x, low), (x, 1.5), color)
    _arrow(ax, (4.65, 1.5), (4.65, 0.8), STAGES[1][2])
    for x, words, align in [
        (1.6, "learns from it", "left"),
        (4.25, "learns", "right"),
        (4.75, "acts, and adds", "left"),
        (7.6, "learns from all", "left"),
    ]:
        ax.text(x, 1.2, words, va="center", ha=align, fontsize=8)


def _box(ax: Axes, x: float, y: float, width: float, height: float, color: str) -> None:
    style = "round,pad=0,rounding_size=0.1"
    ax.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=PAPER, edgecolor=color, linewidth=1.4))


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0, color=color, linewidth=1.4))


def _save(figure: Figure, path: str | pathlib.Path) -> None:
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
