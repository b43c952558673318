"""Figures: written, of the promised size, and showing the data they were given; their looks are for people to
judge."""

import csv
import itertools
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from ooo_rl.data.buffer import Transition
from ooo_rl.data.figures import aggregates, curves, intervals, maps, style
from ooo_rl.data.runs import report
from ooo_rl.data.runs.health import Health
from ooo_rl.data.runs.sweep import RunLabel
from ooo_rl.envs.point_mass_wall import PointMassWall

LAYOUT = PointMassWall().layout


def record(seeds, settings=("",), phases=("offline", "online", "retrained"), points=4):
    rng = np.random.default_rng(0)
    keys = [(p, 100 * i, k, s) for p in phases for i in range(points) for k in range(seeds) for s in settings]
    return [
        {
            "phase": p,
            "step": t,
            "seed": k,
            "setting": s,
            "metric": "eval/return",
            "value": rng.normal(t / 100),
        }
        for p, t, k, s in keys
    ]


def panels(count):
    rng = np.random.default_rng(1)
    paths = np.cumsum(rng.normal(0, 0.02, size=(7, 50, 2)), axis=1) + np.float64(LAYOUT["start"])
    paths[:3, 30:] = np.nan
    full = maps.Panel(
        "all",
        paths.reshape(-1, 2),
        paths,
        paths[3],
        "a note that is long enough to need a second line at this width",
    )
    return [
        full,
        maps.Panel("nothing"),
        maps.Panel("list", paths=list(paths)),
        maps.Panel("visits", paths[0]),
        full,
    ][:count]


def ink(path):
    """Share of pixels that are not white; also checks that nothing else is amiss with the file."""
    image = imread(path)[..., :3]
    assert image.shape[0] >= 300 and image.shape[1] >= 300
    return np.mean(image.min(axis=-1) < 0.95)


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they were saved, for a look inside."""
    kept = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))[1])
    return kept


@pytest.mark.parametrize(
    "seeds, settings, points",
    [(1, ("",), 4), (20, ("",), 4), (3, tuple("abcdefghi"), 2), (5, ("a", "b"), 1), (1, ("",), 1)],
)
def test_learning_curves_are_drawn(tmp_path, seeds, settings, points):
    curves.learning_curves(
        record(seeds, settings, points=points), tmp_path / "new" / "curves.png", title="title"
    )
    assert ink(tmp_path / "new" / "curves.png") > 0.01


def test_learning_curves_show_the_statistics(tmp_path, drawn):
    rows = record(6, phases=("retrained", "offline"))
    rows.append({**rows[0], "value": 7.0})  # a run that was resumed writes the same step again
    rows.append({**rows[0], "seed": 9, "value": np.nan})
    write(tmp_path / "metrics.csv", rows)
    units = {"retrained": "gradient steps", "online": "environment steps"}
    path = tmp_path / "curves.png"
    curves.learning_curves(tmp_path / "metrics.csv", path, metric="eval/return", units=units)
    right, left = drawn[0].axes
    assert (right.get_title(), left.get_title()) == ("retrained", "offline")  # in the order of time
    assert (right.get_xlabel(), left.get_xlabel()) == ("gradient steps", "steps")
    values = [7.0] + [r["value"] for r in rows[1:6]]
    assert right.lines[-1].get_ydata()[0] == pytest.approx(aggregates.iqm(values))
    band = right.collections[0].get_paths()[0].vertices
    low, high = aggregates.bootstrap_interval(values)
    at_start = band[band[:, 0] == 0, 1]
    assert at_start.min() == pytest.approx(low) and at_start.max() == pytest.approx(high)


def test_a_metric_that_is_not_there_is_an_error_that_names_the_others(tmp_path):
    with pytest.raises(ValueError, match="eval/return"):
        curves.learning_curves(record(1), tmp_path / "curves.png", metric="success")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_maps_are_drawn_whole(tmp_path, drawn, count):
    maps.figure_2d(tmp_path / "map.png", LAYOUT, panels(count))
    assert ink(tmp_path / "map.png") > 0.02 and len(drawn[0].axes) == count
    drawn[0].draw_without_rendering()  # saving has left positions in the pixels of another resolution
    frame = drawn[0].bbox
    for words in (
        drawn[0].legends[0],
        *(ax.title for ax in drawn[0].axes),
        *(ax.xaxis.label for ax in drawn[0].axes),
    ):
        box = words.get_window_extent()
        assert (
            box.x0 >= frame.x0 - 1
            and box.x1 <= frame.x1 + 1
            and box.y0 >= frame.y0 - 1
            and box.y1 <= frame.y1 + 1
        )
    with pytest.raises(ValueError, match="no panels"):
        maps.figure_2d(tmp_path / "map.png", LAYOUT, [])


def test_a_map_shows_what_the_panel_holds(tmp_path, drawn):
    panel = panels(1)[0]
    maps.figure_2d(tmp_path / "map.png", LAYOUT, [panel])
    (ax,) = drawn[0].axes
    assert np.ma.sum(ax.images[0].get_array()) == np.isfinite(panel.visits[:, 0]).sum()
    lines = [np.transpose(line.get_data()) for line in ax.lines]
    for expected in (LAYOUT["walls"][0], panel.paths[6], panel.shortest):
        assert any(line.shape == np.shape(expected) and np.allclose(line, expected) for line in lines)


def test_framework_is_drawn_with_and_without_maps(tmp_path, drawn):
    maps.framework(tmp_path / "plain.png")
    maps.framework(tmp_path / "full.png", LAYOUT, [panels(1)[0], None, panels(1)[0]], rows=(1_000, 2_000))
    assert ink(tmp_path / "plain.png") > 0.05 and ink(tmp_path / "full.png") > 0.05
    assert len(drawn[1].axes) == 3 and "2,000" in " ".join(t.get_text() for t in drawn[1].axes[0].texts)
    with pytest.raises(ValueError, match="up to 3"):
        maps.framework(tmp_path / "full.png", LAYOUT, panels(5))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_scores_are_drawn_best_first(tmp_path, drawn, count):
    long = "a name that is as long as the longest of our results"
    policies = {"low": [1, 2, 3], "failed": [np.nan] * 3, "high": [7, np.nan, 9], long: [4, 4, 4]}
    shown = [intervals.ScorePanel(f"task {i}", "return", policies, [long]) for i in range(count)]
    intervals.score_intervals(shown, tmp_path / "scores.png")
    assert np.mean(imread(tmp_path / "scores.png")[..., :3].min(axis=-1) < 0.95) > 0.005
    assert len(drawn[0].axes) == count
    for ax in drawn[0].axes:
        assert [label.get_text() for label in ax.get_yticklabels()] == ["failed", "low", long, "high"]
        (hollow,) = (line for line in ax.lines if line.get_markerfacecolor() == "white")
        np.testing.assert_array_equal(hollow.get_xydata(), [(4, 2)] * 3)
        bars = [bar.get_segments()[0] for bar in ax.collections]
        np.testing.assert_allclose(bars[3], [(7, 3), (9, 3)])  # two seeds: from the one to the other
    drawn[0].draw_without_rendering()
    boxes = [ax.get_tightbbox() for ax in drawn[0].axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    frame = drawn[0].bbox
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and box.y1 <= frame.y1 for box in boxes)


@pytest.mark.parametrize("panels", [[], [intervals.ScorePanel("task", "return", {})]])
def test_no_scores_are_an_error(tmp_path, panels):
    with pytest.raises(ValueError, match="one or more"):
        intervals.score_intervals(panels, tmp_path / "scores.png")


def test_drawing_leaves_the_settings_of_matplotlib_alone(tmp_path):
    before = dict(mpl.rcParams)
    maps.figure_2d(tmp_path / "map.png", LAYOUT, panels(2))
    assert dict(mpl.rcParams) == before


# --- Q-values ---


def q_record(values):
    """Rows of "q": `values` maps (phase, seed, setting) to its values at steps 100, 200 ..., in the order of
    time."""
    rows = []
    for phase in dict.fromkeys(phase for phase, *_ in values):
        for i in range(max(len(v) for key, v in values.items() if key[0] == phase)):
            for (where, seed, setting), run in values.items():
                if where == phase and i < len(run):
                    row = {
                        "phase": phase,
                        "step": 100 * (i + 1),
                        "seed": seed,
                        "setting": setting,
                        "value": run[i],
                    }
                    rows += [{**row, "metric": "critic_loss", "value": 1.0}, {**row, "metric": "q"}]
    return rows


def thick(ax):
    return [line for line in ax.lines if line.get_linewidth() == 1.8]


def crosses(ax):
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if line.get_marker() == "X"]


def test_q_of_a_healthy_run_is_its_seeds_and_their_mean(tmp_path, drawn):
    rows = q_record(
        {
            ("offline", 0, ""): [10, 20, 30],
            ("offline", 1, ""): [20, 30, 50],
            ("online", 0, ""): [40],
            ("online", 1, ""): [60],
        }
    )
    curves.q_curves(rows, tmp_path / "new" / "q.png", limit=1e5, title="title")
    assert ink(tmp_path / "new" / "q.png") > 0.01
    left, right = drawn[0].axes
    assert (left.get_title(), right.get_title(), left.get_yscale()) == ("offline", "online", "symlog")
    (mean,) = thick(left)
    np.testing.assert_allclose(mean.get_ydata(), [15, 25, 40])
    assert sorted(tuple(line.get_ydata()) for line in left.lines if line is not mean) == [
        (10, 20, 30),
        (20, 30, 50),
    ]
    assert thick(right)[0].get_ydata() == [50] and not crosses(left) and not drawn[0].legends
    assert left.yaxis.get_transform().linthresh == 100  # most of it lies in the linear part


def test_a_diverged_seed_ends_in_a_cross_and_leaves_the_mean(tmp_path, drawn):
    first, later = [-10, -11, -12, -13], [-14, -15]
    values = {
        ("offline", 0, ""): first,
        ("offline", 1, ""): [-10, -5e3, -2e7, np.nan],
        ("offline", 2, ""): [-10, -10, np.nan, np.nan],
    }
    values |= {("online", 0, ""): later, ("online", 1, ""): [np.nan, -1e30], ("online", 2, ""): later}
    stopped = {(1, ""): ("offline", 300), (2, ""): ("offline", 300)}
    curves.q_curves(q_record(values), tmp_path / "q.png", stopped, 1e5)
    left, right = drawn[0].axes
    np.testing.assert_allclose(thick(left)[0].get_ydata(), [-10, -5021 / 3, -12, -13])
    assert crosses(left) == [
        (300, -1e6),
        (300, 1.0),
    ]  # ten times the limit; the upper edge, in parts of the axes
    assert not crosses(right)
    np.testing.assert_allclose(
        thick(right)[0].get_ydata(), later
    )  # what a stopped run logs later is not drawn
    assert [tuple(line.get_ydata()) for line in left.lines if line.get_linestyle() == "--"] == [(-1e5, -1e5)]
    assert [text.get_text() for text in drawn[0].legends[0].texts] == ["stopped", "--max-q: 100000"]
    low, high = left.get_ylim()
    assert -1e7 < low < -1e6 and high < 1e3


@pytest.mark.parametrize(
    "top, limit, lines", [(900.0, 1e4, 0), (1_100.0, 1e4, 1), (1_100.0, np.inf, 0), (-1_100.0, 1e4, 1)]
)
def test_the_limit_is_drawn_where_the_values_come_near_it(tmp_path, drawn, top, limit, lines):
    curves.q_curves(q_record({("retrained", 0, ""): [1, top]}), tmp_path / "q.png", limit=limit)
    found = [line.get_ydata()[0] for line in drawn[0].axes[0].lines if line.get_linestyle() == "--"]
    assert found == [np.sign(top) * limit] * lines and len(drawn[0].legends) == lines


def test_q_of_settings_and_of_no_values_at_all(tmp_path, drawn):
    settings = {
        ("online", seed, f"discount={d}"): [d * 10 + seed, d * 20, d * 1e9]
        for seed in (0, 1)
        for d in (0.9, 1.0)
    }
    curves.q_curves(q_record(settings), tmp_path / "q.png", {(1, "discount=1.0"): ("online", 200)})
    (ax,) = drawn[0].axes
    means = {line.get_color(): line.get_ydata() for line in thick(ax)}
    np.testing.assert_allclose(means[style.COLORS[0]], [9.5, 18, 0.9e9])
    np.testing.assert_allclose(means[style.COLORS[1]], [10.5, 20, 1e9])
    assert crosses(ax) == [(200, 20)]
    assert [text.get_text() for text in drawn[0].legends[0].texts] == [
        "discount=0.9",
        "discount=1.0",
        "stopped",
    ]
    curves.q_curves(q_record({("online", 0, ""): [np.nan]}), tmp_path / "nan.png", {(0, ""): ("online", 100)})
    assert crosses(drawn[1].axes[0]) == [(100, 1.0)]
    with pytest.raises(ValueError, match="no rows of 'q'"):
        curves.q_curves(record(1), tmp_path / "q.png")


def test_a_dataset_that_another_run_wrote_is_not_taken_for_this_ones(tmp_path, monkeypatch):
    """After a resumption: a run's own dataset is not written twice, whatever its folder is called from there."""
    written = []
    monkeypatch.setattr(report.write, "export_experience", lambda dataset, *_, **__: written.append(dataset))
    args = SimpleNamespace(export="ooo/x", resume="it", actions="continuous", num_envs=2)
    session = SimpleNamespace(
        args=args, labels=[RunLabel(0, "")], health=SimpleNamespace(failed={}), method="iql", task="it", action_size=2,
        env=SimpleNamespace(horizon=4), folder=SimpleNamespace(path=tmp_path / "iql" / "hopper" / "mine"),
    )  # fmt: skip
    ring = Transition(*(np.zeros((1, 4, 2)) for _ in range(5)))
    monkeypatch.setattr(report.write, "exists", lambda _: True)
    for recipe, again in ((None, 1), ("runs/iql/hopper/other", 1), ("../runs/iql/hopper/mine", 0)):
        monkeypatch.setattr(report.write, "recipe_of", lambda _, recipe=recipe: recipe)
        written.clear()
        report.export_experience(session, ring, 4)
        assert len(written) == again, recipe


def test_a_run_draws_its_q_values_and_knows_which_seeds_were_stopped(tmp_path, drawn):
    """`report` reads phase and step out of the words of `Health.find_broken`."""
    labels = [RunLabel(seed, setting) for setting in ("discount=0.9", "discount=0.99") for seed in (3, 4)]
    session = SimpleNamespace(
        folder=None, path=tmp_path, method="iql", task="it", labels=labels, num_runs=4, phases={}, plan=[], env=None,
        data=None, health=Health(labels, np.array([0.9, 0.9, 0.9, 1.0]), 50, 10.0),
    )  # fmt: skip
    health, hyper = session.health, SimpleNamespace(reward_scale=np.full(4, 0.5), reward_bias=np.zeros(4))
    health.note_rewards(hyper, -2.0, 1.0)
    health.note_ring(hyper, Transition(None, None, np.array([[0.0, -1.5]] * 4), None, None))
    assert health.largest_reward == [1.0] * 4
    assert health.q_limit(3) == pytest.approx(500.0)  # without discount: episodes of 50 steps
    assert health.q_limit(0) == pytest.approx(100.0)  # 10 times the largest reward, 1, over 1 - discount
    chunk = SimpleNamespace(phase="retrained@160", start=100, length=100)
    metrics = {"q": np.array([5.0, -500.0, np.nan, 7.0]), "nonfinite_at": np.array([-1, -1, 20, -1])}
    assert health.find_broken(chunk, metrics, {"w": np.ones((4, 2))}) == [1, 2]
    explorer = {"w": np.array([[1.0], [1.0], [1.0], [np.inf]])}
    fine = metrics | {"q": np.zeros(4), "nonfinite_at": np.full(4, -1)}
    assert health.find_broken(chunk, fine, {"w": np.ones((4, 2))}, {"explorer": explorer}) == [3]
    assert (
        health.failed.pop(3) == "retrained@160, step 200: not finite since step 200: parameter explorer['w']"
    )
    assert report.stops(session) == {
        (4, "discount=0.9"): ("retrained@160", 200),
        (3, "discount=0.99"): ("retrained@160", 200),
    }
    rows = q_record(
        {(p, *label): [5, q] for p in ("offline", "retrained@160") for label, q in zip(labels, metrics["q"])}
    )
    for name, kept in (("with", rows), ("without", [row for row in rows if row["metric"] != "q"])):
        session.folder = SimpleNamespace(path=tmp_path / name, paths={})
        session.folder.path.mkdir()
        write(session.folder.path / "metrics.csv", kept)
        assert report.draw(session, None, 0, ()) == {}
        assert (session.folder.path / "figures" / "q.png").exists() == (name == "with")
    assert [len(crosses(ax)) for ax in drawn[0].axes] == [0, 2]


def test_a_map_of_a_ring_that_forgot_says_so(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report.maps, "figure_2d", lambda path, layout, panels: drawn.extend(panels))
    rows = np.zeros((2, 8, 2), np.float32)
    for task, wanted in (
        (PointMassWall(), "of the last 8 of 20 online rows of 2 runs"),
        (None, "the last 8 of 20"),
    ):
        layout = task.layout if task else {**PointMassWall().layout, "walls": []}
        folder = SimpleNamespace(path=tmp_path, paths={})
        session = SimpleNamespace(env=SimpleNamespace(layout=layout), folder=folder, labels=[0, 1])
        for collected in (8, 20):
            report._draw_maps(session, None, Transition(rows, None, None, rows, None), collected, ())
            assert ("the last" in drawn[-1].note) == (collected == 20)
        assert wanted in drawn[-1].note.replace("in the data and", "of")


def test_each_run_has_a_shortest_path_of_its_own():
    layout = PointMassWall().layout
    corners = np.float32([layout["start"], (0.5, 0.0), layout["goal"]])
    way = np.concatenate([np.linspace(a, b, 40, dtype=np.float32) for a, b in itertools.pairwise(corners)])
    still = np.tile(corners[:1], (len(way), 1))
    none = np.zeros((2, len(way) - 1), np.float32)
    both = np.stack([still, way])
    online = Transition(both[:, :-1], none, none, both[:, 1:], none)
    assert report._shortest(None, online, 0, layout) is None
    assert report._shortest(None, online, 1, layout).side == "under"
