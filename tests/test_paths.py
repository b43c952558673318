"""Ways through data: ways found, refused and measured on data made by hand, where the answer can be counted
on paper."""

import numpy as np
import pytest

from ooo_rl.data.figures import paths
from ooo_rl.envs.point_mass_wall import STEP, PointMassWall

LAYOUT = PointMassWall().layout
START, GOAL = np.float64(LAYOUT["start"]), np.float64(LAYOUT["goal"])
UNDER = [START, (0.5, 0.05), GOAL]
OVER = [START, (0.3, 1.3), (0.7, 1.3), GOAL]


def walk(corners, pace=STEP):
    """Positions along straight lines, moving `pace` on the longer axis per step."""
    points = [np.float64(corners[0])]
    for corner in np.float64(corners[1:]):
        count = int(np.ceil(np.abs(corner - points[-1]).max() / pace - 1e-9))
        points += list(points[-1] + (corner - points[-1]) * np.arange(1, count + 1)[:, None] / count)
    return np.array(points)


def rows(*walks):
    return np.concatenate([w[:-1] for w in walks]), np.concatenate([w[1:] for w in walks])


@pytest.mark.parametrize("cells", [15, 40, 47, 150])
def test_steps_are_those_of_the_walk_at_any_resolution(cells):
    for corners, way in ((UNDER, "under"), (OVER, "over")):
        points = walk(corners)
        found = paths.shortest_path(*rows(points), LAYOUT, cells=cells)
        assert found.side == way == paths.side(points, LAYOUT)
        # The walk ends at the goal's centre, the task at its radius; cells that are larger cut corners.
        assert found.steps == pytest.approx(
            len(points) - 1 - LAYOUT["goal_radius"] / STEP, abs=1 if cells > 20 else 3
        )


def test_slow_data_cost_no_more_than_quick_data():
    slow, quick = walk(UNDER, STEP / 4), walk([(0.1, 1.0), (0.1 + STEP, 1.0)])
    found = paths.shortest_path(*rows(slow, quick), LAYOUT)
    # One length unit to the right at full pace, less the goal's radius: the slow rows' own number is four
    # times as high.
    assert found.steps == pytest.approx((1 - LAYOUT["goal_radius"]) / STEP, abs=1)


def test_the_shorter_of_two_ways_wins():
    both = paths.shortest_path(*rows(walk(OVER), walk(UNDER)), LAYOUT)
    over = paths.shortest_path(*rows(walk(OVER)), LAYOUT)
    assert both.side == "under" and over.side == "over" and both.steps < over.steps


def test_ways_are_stitched_from_parts_but_edges_have_a_direction():
    points = walk(OVER)
    half = len(points) // 2
    first, second = points[: half + 1], points[half:]
    assert paths.shortest_path(*rows(first, second), LAYOUT).side == "over"
    assert paths.shortest_path(*rows(first, second[::-1]), LAYOUT) is None
    assert paths.shortest_path(*rows(first), LAYOUT) is None


def test_data_that_are_not_connected_or_not_there_have_no_way():
    assert paths.shortest_path(*rows(walk([START, (0.4, 0.5)]), walk([(0.6, 0.5), GOAL])), LAYOUT) is None
    assert paths.shortest_path(np.empty((0, 2)), np.empty((0, 2)), LAYOUT) is None
    assert paths.shortest_path(np.tile(START, (9, 1)), np.tile(START, (9, 1)), LAYOUT) is None


@pytest.mark.parametrize("cells", [13, 37, 45])
def test_nothing_is_stitched_through_the_wall(cells):
    # Both parts come close to the wall, into one and the same cell wherever the wall runs inside a column of
    # cells.
    left, right = walk([START, (0.499, 0.5)]), walk([(0.501, 0.5), (0.8, 0.5), GOAL])
    assert paths.shortest_path(*rows(left, right), LAYOUT, cells=cells) is None


def test_a_move_that_the_wall_stopped_is_harmless():
    obs, next_obs = rows(walk(OVER), walk([START, (0.49, 0.5)]))
    stopped = np.array([[0.49, 0.5]])
    with_stop = paths.shortest_path(np.vstack([obs, stopped]), np.vstack([next_obs, stopped]), LAYOUT)
    assert with_stop.side == "over" and with_stop.steps == paths.shortest_path(obs, next_obs, LAYOUT).steps


def test_the_path_goes_round_the_end_of_the_wall():
    # All but one step in the cells beside the wall's lower end is above that end, so a line from mean to mean
    # would cut it.
    left, step, right = (
        walk([START, (0.49, 0.16)]),
        np.array([[0.49, 0.095], [0.51, 0.095]]),
        walk([(0.51, 0.16), GOAL]),
    )
    found = paths.shortest_path(*rows(left, step, right), LAYOUT, cells=20)
    assert found.side == "under"
    before = np.flatnonzero(found.path[:, 0] < 0.5)[-1]
    np.testing.assert_array_equal(found.path[before : before + 2], step)


def test_side_and_crossings():
    padded = np.full((60, 2), np.nan)
    padded[: len(walk(UNDER))] = walk(UNDER)
    stays = walk([START, (0.3, 0.9)])
    assert [paths.side(p, LAYOUT) for p in (padded, walk(OVER), stays, walk(OVER)[::-1], START[None])] == [
        "under",
        "over",
        "none",
        "over",
        "none",
    ]
    assert paths.crossings([padded, padded, walk(OVER), stays], LAYOUT) == {
        "under": 0.5,
        "over": 0.25,
        "none": 0.25,
    }
    assert paths.crossings(np.stack([padded, padded]), LAYOUT)["under"] == 1


def test_visitation_counts_every_position_once():
    points = np.random.default_rng(1).normal(0.5, 1, size=(500, 2))
    counts = paths.visitation(np.vstack([points, [np.nan, 0]]), LAYOUT, cells=7)
    naive = np.zeros((7, 7), int)
    x0, x1, y0, y1 = (float(b) for b in LAYOUT["bounds"])
    for x, y in points:
        naive[
            min(max(int((x - x0) / (x1 - x0) * 7), 0), 6), min(max(int((y - y0) / (y1 - y0) * 7), 0), 6)
        ] += 1
    np.testing.assert_array_equal(counts, naive)


def test_layouts_without_a_wall_have_ways_but_no_sides():
    bare = {**LAYOUT, "walls": []}
    found = paths.shortest_path(*rows(walk([START, GOAL])), bare)
    assert found.side == "none" and found.steps == pytest.approx(
        1 / STEP - LAYOUT["goal_radius"] / STEP, abs=1
    )
    with pytest.raises(ValueError, match="one upright wall"):
        paths.side(walk(UNDER), bare)


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"\[N, 2\]"):
        paths.shortest_path(np.zeros((3, 2)), np.zeros((4, 2)), LAYOUT)
    with pytest.raises(ValueError, match="one cell"):
        paths.visitation(np.zeros((3, 2)), LAYOUT, cells=0)
    with pytest.raises(ValueError, match="no paths"):
        paths.crossings([], LAYOUT)
