"""What all figures share: colours, fonts, line styles, and how a figure is saved."""

import pathlib

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

# Okabe and Ito (2008); readers with any of the common colour deficiencies can tell these colours apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


DASHES = ("-", "--", ":", "-.")  # tell lines apart when there are more lines than colours


INK, FAINT, PAPER = "#222222", "#8A8A8A", "#F4F5F7"


DENSITY = LinearSegmentedColormap.from_list("density", ["#E8EDF3", "#A9BACD", "#4C6480"])


STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
    "axes.edgecolor": FAINT, "axes.linewidth": 0.8, "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.6,
    "xtick.major.size": 3, "ytick.major.size": 3, "xtick.major.width": 0.8, "ytick.major.width": 0.8,
    "legend.frameon": False, "lines.solid_capstyle": "round", "lines.solid_joinstyle": "round",
    "figure.facecolor": "white", "savefig.dpi": 160,
}  # fmt: skip


def save(figure: Figure, path: str | pathlib.Path) -> None:
    """Writes `figure` to `path` as a PNG; makes the folder if it is missing."""
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
