"""Final scores of many policies side by side: a row per policy, a panel per task."""

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from ooo_rl.data.figures import aggregates
from ooo_rl.data.figures.style import COLORS, FAINT, INK, STYLE, save

ROW = 0.19  # inches for a policy
FRAME = 0.75  # inches for a panel's title, axis and label


@dataclass(frozen=True)
class Scores:
    """One panel: what each seed of each policy reached on a task.

    seeds: name of a policy -> its scores [seeds]; NaN for a seed that failed.
    measure: what a score is, for the axis.
    before: names of policies that others start from; these are drawn hollow, with a dashed line at their IQM.
    """

    title: str
    measure: str
    seeds: Mapping[str, ArrayLike]
    before: Sequence[str] = ()


def score_intervals(panels: Sequence[Scores], path: str | pathlib.Path) -> None:
    """Draws each policy's IQM over seeds with its 95 % bootstrap interval, and a small dot per seed.

    The best policy is at the top of its panel. Panels fill two columns, each in the shorter one. A policy
    whose seeds have all failed has a row without a mark. Writes one PNG to `path`. Raises ValueError without
    panels, or for a panel without policies.
    """
    if not panels or not all(panel.seeds for panel in panels):
        raise ValueError("score_intervals needs one or more panels, each with one or more policies")
    columns = _columns([ROW * len(panel.seeds) + FRAME for panel in panels])
    heights = [[ROW * len(panels[i].seeds) + FRAME for i in column] for column in columns]
    height = max(map(sum, heights))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.9 * len(columns), height + 0.35))
        for c, (column, tall) in enumerate(zip(columns, heights)):
            top = height
            for i, h in zip(column, tall):
                left, bottom = (c + 0.46) / len(columns), (top - h + 0.48 + 0.35) / (height + 0.35)
                size = 0.5 / len(columns), ROW * len(panels[i].seeds) / (height + 0.35)
                _panel(figure.add_axes((left, bottom, *size)), panels[i])
                top -= h
        mark = {"marker": "o", "color": COLORS[0], "linestyle": "", "markersize": 5}
        handles = [
            Line2D([], [], **mark, label="IQM and 95 % interval"),
            Line2D([], [], **{**mark, "markersize": 2}, alpha=0.5, label="one seed"),
        ]
        if any(panel.before for panel in panels):
            hollow = {"markerfacecolor": "white", "label": "before fine-tuning"}
            handles.append(Line2D([], [], **mark, **hollow))
        figure.legend(handles=handles, loc="lower center", ncols=len(handles))
        save(figure, path)


def _columns(heights: Sequence[float]) -> list[list[int]]:
    """The panels of one or two columns: each panel, in its order, goes to the one that is shorter so far."""
    if len(heights) == 1:
        return [[0]]
    columns: list[list[int]] = [[], []]
    for i in range(len(heights)):
        min(columns, key=lambda column: sum(heights[j] for j in column)).append(i)
    return columns


def _panel(ax: Axes, panel: Scores) -> None:
    """One row per policy, the best at the top."""
    found = {name: aggregates.summarise(np.asarray(x, float)) for name, x in panel.seeds.items()}
    names = sorted(found, key=lambda name: np.nan_to_num(found[name]["iqm"], nan=-np.inf))
    for y, name in enumerate(names):
        each, seeds = found[name], np.asarray(panel.seeds[name], float)
        face = "white" if name in panel.before else COLORS[0]
        ax.plot(seeds, np.full(len(seeds), y - 0.22), ".", color=COLORS[0], markersize=3, alpha=0.5)
        ax.hlines(y, each["low"], each["high"], color=COLORS[0], linewidth=1.6)
        ax.plot(each["iqm"], y, "o", color=COLORS[0], markerfacecolor=face, markersize=5)
        if name in panel.before:
            ax.axvline(each["iqm"], color=FAINT, linewidth=0.9, linestyle="--", zorder=0.5)
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(-0.6, len(names) - 0.4), xlabel=panel.measure)
    ax.set_title(panel.title, color=INK, loc="left", x=-0.5)  # over the names: titles may be long
    ax.tick_params(axis="y", length=0)
