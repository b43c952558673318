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

# inches
ROW = 0.19  # height of a policy
TITLE, LABEL = 0.27, 0.48  # above and below a panel's rows: its title; its ticks and measure
LETTER = 0.065  # width of a letter of a policy's name
AXIS, MARGIN = 3.0, 0.15  # width of a panel without names; space beside it
LEGEND = 0.35


@dataclass(frozen=True)
class ScorePanel:
    """One panel: what each seed of each policy reached on a task.

    policies: name of a policy -> the scores of its seeds [seeds]; NaN for a seed that failed.
    measure: what a score is, for the axis.
    before: names of the policies that others start from; they are drawn hollow.
    """

    title: str
    measure: str
    policies: Mapping[str, ArrayLike]
    before: Sequence[str] = ()

    @property
    def height(self) -> float:
        return ROW * len(self.policies) + TITLE + LABEL


def score_intervals(panels: Sequence[ScorePanel], path: str | pathlib.Path) -> None:
    """Draws the scores of each policy's seeds as dots, with their IQM and its 95 % bootstrap interval.

    The best policy is at the top of its panel. Panels fill two columns, each in the shorter one. A policy
    whose seeds have all failed has a row without a mark. Writes one PNG to `path`. Raises ValueError without
    panels, or for a panel without policies.
    """
    if not panels or not all(panel.policies for panel in panels):
        raise ValueError("score_intervals needs one or more panels, each with one or more policies")
    columns = _columns(panels)
    names = [LETTER * max(len(n) for panel in column for n in panel.policies) + MARGIN for column in columns]
    width = sum(names) + len(columns) * (AXIS + MARGIN)
    height = max(sum(panel.height for panel in column) for column in columns) + LEGEND
    with mpl.rc_context(STYLE):
        figure, left = Figure(figsize=(width, height)), 0.0
        for column, name in zip(columns, names):
            left, top = left + name, height
            for panel in column:
                top -= panel.height
                box = left, top + LABEL, AXIS, ROW * len(panel.policies)
                _panel(figure.add_axes(np.divide(box, (width, height) * 2)), panel, name - MARGIN)
            left += AXIS + MARGIN
        figure.legend(handles=_legend(panels), loc="lower center", ncols=4)
        save(figure, path)


def _columns(panels: Sequence[ScorePanel]) -> list[list[ScorePanel]]:
    """One or two columns of panels: each panel, in its order, goes to the column that is shorter so far."""
    columns: list[list[ScorePanel]] = [[] for _ in panels[:2]]
    for panel in panels:
        min(columns, key=lambda column: sum(other.height for other in column)).append(panel)
    return columns


def _panel(ax: Axes, panel: ScorePanel, names_width: float) -> None:
    """One row per policy, the best at the top. The title begins where names do: long ones have room."""
    found = {name: aggregates.summarise(np.asarray(x, float)) for name, x in panel.policies.items()}
    names = sorted(found, key=lambda name: np.nan_to_num(found[name]["iqm"], nan=-np.inf))
    for y, name in enumerate(names):
        each, seeds = found[name], np.asarray(panel.policies[name], float)
        face = "white" if name in panel.before else COLORS[0]
        ax.hlines(y, each["low"], each["high"], color=FAINT, linewidth=1.2)
        ax.plot(seeds, np.full(len(seeds), y), "o", color=COLORS[0], markerfacecolor=face, markersize=4)
        ax.plot(each["iqm"], y, "|", color=COLORS[1], markersize=11, markeredgewidth=1.8)
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(-0.6, len(names) - 0.4), xlabel=panel.measure)
    ax.set_title(panel.title, color=INK, loc="left", x=-names_width / AXIS)
    ax.tick_params(axis="y", length=0)


def _legend(panels: Sequence[ScorePanel]) -> list[Line2D]:
    dot = {"marker": "o", "color": COLORS[0], "linestyle": "", "markersize": 4}
    tick = {"marker": "|", "color": COLORS[1], "linestyle": "", "markersize": 11, "markeredgewidth": 1.8}
    hollow = [Line2D([], [], **dot, markerfacecolor="white", label="a seed, before fine-tuning")]
    return [
        Line2D([], [], **dot, label="a seed"),
        *(hollow if any(panel.before for panel in panels) else []),
        Line2D([], [], **tick, label="IQM"),
        Line2D([], [], color=FAINT, linewidth=1.2, label="95 % interval"),
    ]
