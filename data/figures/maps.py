"""Maps of a 2-D task with visited positions and paths of policies, and a diagram of the three phases."""

import pathlib
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike

from ooo_rl.data.figures import paths
from ooo_rl.data.figures.style import COLORS, DENSITY, INK, PAPER, STYLE, save

STAGES = (
    ("1  pre-train offline", "a first policy from the data,\nalready drawn to novelty", COLORS[0]),
    (
        "2  explore online, optimistically",
        "seek reward and novelty;\nwhat is found stays in the pool",
        COLORS[1],
    ),
    (
        "3  retrain from scratch, pessimistically",
        "a fresh policy from all data,\nfree of the bonus",
        COLORS[2],
    ),
)


@dataclass(frozen=True)
class Panel:
    """What one panel of a 2-D task shows. Nothing is drawn for a field that is None.

    visits: positions [N, 2], drawn as a density on a log scale.

    paths: one coloured line per policy, [E, T, 2] or a list of [T, 2]; NaN after the end of an episode.

    shortest: positions [K, 2], drawn as a dashed line (`paths.ShortestPath.path`).

    note: text under the panel.
    """

    title: str
    visits: ArrayLike | None = None
    paths: Iterable[ArrayLike] | None = None
    shortest: ArrayLike | None = None
    note: str = ""


def figure_2d(path: str | pathlib.Path, layout: dict, panels: Sequence[Panel]) -> None:
    """Draws a row of panels over the map of a 2-D task to the file `path`, like Figure 2 of the OOO paper.

    `layout` is as in `data.figures.paths`. Raises ValueError without panels.
    """
    if not panels:
        raise ValueError("no panels to draw")
    x0, x1, y0, y1 = layout["bounds"]
    width, count = 2.3, len(panels)
    notes = ["\n".join(textwrap.fill(line, 43) for line in panel.note.splitlines()) for panel in panels]
    handles, columns = _map_legend(panels, layout["start"] is not None), {1: 2, 2: 3}.get(count, 6)
    words = 0.45 + 0.14 * max(note.count("\n") + 1 for note in notes) + 0.19 * -(-len(handles) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(width * count + 0.2, width * (y1 - y0) / (x1 - x0) + words), layout="constrained"
        )
        for ax, panel, note in zip(figure.subplots(1, count, squeeze=False)[0], panels, notes):
            draw_panel(ax, layout, panel)
            ax.set_title(panel.title)
            ax.set_xlabel(note, fontsize=7.5)
        figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, handlelength=1.6, columnspacing=1.4
        )
        save(figure, path)


def draw_panel(ax: Axes, layout: dict, panel: Panel, cells: int = 60) -> None:
    """Draws the map and the content of `panel`, without its title and note, into `ax`.

    A density has `cells` cells per axis.
    """
    x0, x1, y0, y1 = (float(b) for b in layout["bounds"])
    if panel.visits is not None:
        counts = paths.visitation(panel.visits, layout, cells).T
        norm = LogNorm(1, max(counts.max(), 10))
        ax.imshow(
            np.ma.masked_equal(counts, 0),
            DENSITY,
            norm,
            origin="lower",
            extent=(x0, x1, y0, y1),
            interpolation="nearest",
        )
    for wall in layout["walls"]:
        ax.plot(
            *np.transpose(wall),
            color=INK,
            linewidth=4 if len(layout["walls"]) == 1 else 1.5,
            solid_capstyle="butt",
            zorder=3,
        )
    goals = layout.get("goals", [layout["goal"]])
    for goal in goals:
        colors = {"facecolor": "#F0E442", "edgecolor": INK}
        ax.add_patch(Circle(goal, layout["goal_radius"], **colors, linewidth=0.8, zorder=4))
    for i, line in enumerate([] if panel.paths is None else panel.paths):
        ax.plot(*np.transpose(line), color=COLORS[i % 6], linewidth=1.3, alpha=0.85, zorder=5)
    if panel.shortest is not None:
        halo = [withStroke(linewidth=3, foreground="white")]
        ax.plot(
            *np.transpose(panel.shortest),
            color="black",
            linewidth=1.4,
            linestyle=(0, (3, 1.5)),
            path_effects=halo,
            zorder=6,
        )
    if layout["start"] is not None:  # else episodes start anywhere
        ax.plot(*layout["start"], "o", markersize=6, color="white", markeredgecolor=INK, zorder=7)
    ax.plot(*np.transpose(goals), "*", markersize=8, color=INK, markeredgewidth=0, zorder=7)
    ax.set(xlim=(x0, x1), ylim=(y0, y1), aspect="equal", xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set(visible=True, color="#C8C8C8")


def framework(
    path: str | pathlib.Path,
    layout: dict | None = None,
    panels: Sequence[Panel | None] = (),
    rows: tuple[int, int] | None = None,
) -> None:
    """Draws the three phases as boxes to the file `path`, over the pool of data that grows beneath them.

    `panels` (with `layout`) puts a small map into each box; None leaves a box without a map. `rows` are the
    numbers of offline and online transitions, which are written on the pool. The text in the boxes is in
    `STAGES`. Raises ValueError for more panels than boxes, or for panels without a layout.
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
            ax.text(
                left + 1.35,
                2.35 + inset,
                name,
                ha="center",
                va="center",
                weight="bold",
                fontsize=8.3,
                color=color,
            )
            ax.text(left + 1.35, 1.75, words, ha="center", va="center", fontsize=8.5, linespacing=1.3)
            if i < len(panels) and panels[i] is not None:
                small = figure.add_axes(
                    ((left + 0.3) / width, (2.05 - bottom) / height, 2.1 / width, inset / height)
                )
                draw_panel(small, layout, panels[i], cells=40)
            if i:
                _arrow(ax, (left - 0.28, 2.05 + inset / 2), (left - 0.02, 2.05 + inset / 2), INK)
        _pool(ax, rows)
        save(figure, path)


def _map_legend(panels: Sequence[Panel], starts: bool = True) -> list[Line2D]:
    """Legend handles for what occurs in the panels, in the order of reading."""
    handles = [
        Line2D([], [], color=INK, linewidth=4, label="wall"),
        *(
            [
                Line2D(
                    [],
                    [],
                    color="none",
                    marker="o",
                    markersize=6,
                    markerfacecolor="white",
                    markeredgecolor=INK,
                    label="start",
                )
            ]
            * starts
        ),
        Line2D(
            [],
            [],
            color="none",
            marker="*",
            markersize=9,
            markerfacecolor=INK,
            markeredgewidth=0,
            label="goal",
        ),
    ]
    if any(panel.visits is not None for panel in panels):
        square = {"marker": "s", "markersize": 7, "markerfacecolor": DENSITY(0.5), "markeredgewidth": 0}
        handles.append(Line2D([], [], color="none", label="visited (log scale)", **square))
    if any(panel.paths is not None for panel in panels):
        handles.append(Line2D([], [], color=COLORS[0], linewidth=1.3, label="policies, one per seed"))
    if any(panel.shortest is not None for panel in panels):
        handles.append(
            Line2D(
                [],
                [],
                color="black",
                linewidth=1.4,
                linestyle=(0, (3, 1.5)),
                label="shortest path in the data",
            )
        )
    return handles


def _pool(ax: Axes, rows: tuple[int, int] | None) -> None:
    """Draws the data under the boxes of `framework`.

    An arrow points up where a phase reads data, and down where it adds data.
    """
    offline, online = (
        ("offline data", "online data")
        if rows is None
        else (f"offline data  {rows[0]:,}", f"online data  {rows[1]:,}")
    )
    ax.add_patch(Rectangle((0.15, 0.3), 8.7, 0.3, facecolor=STAGES[0][2], alpha=0.3, linewidth=0))
    ax.fill(
        [3.15, 5.85, 8.85, 8.85, 3.15],
        [0.6, 0.95, 0.95, 0.6, 0.6],
        color=STAGES[1][2],
        alpha=0.3,
        linewidth=0,
    )
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
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, style, facecolor=PAPER, edgecolor=color, linewidth=1.4)
    )


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0, color=color, linewidth=1.4
        )
    )
