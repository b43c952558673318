"""Figures: written, of the promised size, and showing the data they were given; their looks are for people to judge."""

import csv

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from data import figures, statistics
from envs.point_mass_wall import PointMassWall

LAYOUT = PointMassWall().layout


def record(seeds, settings=("",), phases=("offline", "online", "retrained"), points=4):
    rng = np.random.default_rng(0)
    keys = [(p, 100 * i, k, s) for p in phases for i in range(points) for k in range(seeds) for s in settings]
    return [{"phase": p, "step": t, "seed": k, "setting": s, "metric": "eval/return", "value": rng.normal(t / 100)} for p, t, k, s in keys]


def panels(count):
    rng = np.random.default_rng(1)
    paths = np.cumsum(rng.normal(0, 0.02, size=(7, 50, 2)), axis=1) + np.float64(LAYOUT["start"])
    paths[:3, 30:] = np.nan
    full = figures.Panel("all", paths.reshape(-1, 2), paths, paths[3], "a note that is long enough to need a second line at this width")
    return [full, figures.Panel("nothing"), figures.Panel("list", paths=list(paths)), figures.Panel("visits", paths[0]), full][:count]


def ink(path):
    """Share of pixels that are not white; also checks that nothing else is amiss with the file."""
    image = imread(path)[..., :3]
    assert image.shape[0] >= 300 and image.shape[1] >= 300
    return np.mean(image.min(axis=-1) < 0.95)


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they were saved, for a look inside."""
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))[1])
    return kept


@pytest.mark.parametrize(
    "seeds, settings, points", [(1, ("",), 4), (20, ("",), 4), (3, tuple("abcdefghi"), 2), (5, ("a", "b"), 1), (1, ("",), 1)]
)
def test_learning_curves_are_drawn(tmp_path, seeds, settings, points):
    figures.learning_curves(record(seeds, settings, points=points), tmp_path / "new" / "curves.png", title="title")
    assert ink(tmp_path / "new" / "curves.png") > 0.01


def test_learning_curves_show_the_statistics(tmp_path, drawn):
    rows = record(6, phases=("retrained", "offline"))
    rows.append({**rows[0], "value": 7.0})  # a run that was resumed writes the same step again
    rows.append({**rows[0], "seed": 9, "value": np.nan})
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    figures.learning_curves(tmp_path / "metrics.csv", tmp_path / "curves.png", metric="eval/return")
    left, right = drawn[0].axes
    assert (left.get_title(), right.get_title()) == ("offline", "retrained")
    assert left.get_xlabel() == right.get_xlabel() == "gradient steps"
    values = [7.0] + [r["value"] for r in rows[1:6]]
    assert right.lines[-1].get_ydata()[0] == pytest.approx(statistics.iqm(values))
    band = right.collections[0].get_paths()[0].vertices
    low, high = statistics.bootstrap_interval(values)
    at_start = band[band[:, 0] == 0, 1]
    assert at_start.min() == pytest.approx(low) and at_start.max() == pytest.approx(high)


def test_a_metric_that_is_not_there_is_an_error_that_names_the_others(tmp_path):
    with pytest.raises(ValueError, match="eval/return"):
        figures.learning_curves(record(1), tmp_path / "curves.png", metric="success")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_maps_are_drawn_whole(tmp_path, drawn, count):
    figures.figure_2d(tmp_path / "map.png", LAYOUT, panels(count))
    assert ink(tmp_path / "map.png") > 0.02 and len(drawn[0].axes) == count
    drawn[0].draw_without_rendering()  # saving has left positions in the pixels of another resolution
    frame = drawn[0].bbox
    for words in (drawn[0].legends[0], *(ax.title for ax in drawn[0].axes), *(ax.xaxis.label for ax in drawn[0].axes)):
        box = words.get_window_extent()
        assert box.x0 >= frame.x0 - 1 and box.x1 <= frame.x1 + 1 and box.y0 >= frame.y0 - 1 and box.y1 <= frame.y1 + 1
    with pytest.raises(ValueError, match="no panels"):
        figures.figure_2d(tmp_path / "map.png", LAYOUT, [])


def test_a_map_shows_what_the_panel_holds(tmp_path, drawn):
    panel = panels(1)[0]
    figures.figure_2d(tmp_path / "map.png", LAYOUT, [panel])
    (ax,) = drawn[0].axes
    assert np.ma.sum(ax.images[0].get_array()) == np.isfinite(panel.visits[:, 0]).sum()
    lines = [np.transpose(line.get_data()) for line in ax.lines]
    for expected in (LAYOUT["walls"][0], panel.paths[6], panel.shortest):
        assert any(line.shape == np.shape(expected) and np.allclose(line, expected) for line in lines)


def test_framework_is_drawn_with_and_without_maps(tmp_path, drawn):
    figures.framework(tmp_path / "plain.png")
    figures.framework(tmp_path / "full.png", LAYOUT, [panels(1)[0], None, panels(1)[0]], rows=(1_000, 2_000))
    assert ink(tmp_path / "plain.png") > 0.05 and ink(tmp_path / "full.png") > 0.05
    assert len(drawn[1].axes) == 3 and "2,000" in " ".join(t.get_text() for t in drawn[1].axes[0].texts)
    with pytest.raises(ValueError, match="up to 3"):
        figures.framework(tmp_path / "full.png", LAYOUT, panels(5))


def test_drawing_leaves_the_settings_of_matplotlib_alone(tmp_path):
    before = dict(mpl.rcParams)
    figures.figure_2d(tmp_path / "map.png", LAYOUT, panels(2))
    assert dict(mpl.rcParams) == before
