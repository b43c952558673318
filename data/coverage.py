"""What the visited transitions of a 2-D task connect: where data lie, and the shortest way that could be stitched from them.

`layout` is the dictionary of a task's `layout` property: bounds (x0, x1, y0, y1), walls as segments ((x, y), (x, y)), start,
goal and goal_radius, in the units of the observation. Rows that hold a NaN (padding) are ignored everywhere.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra


class ShortestPath(NamedTuple):
    """`steps` at full pace, the `path` [K, 2] through the places, and the `side` on which it passes the wall ("under", "over", "none")."""

    steps: float
    path: np.ndarray
    side: str


def shortest_path(obs: ArrayLike, next_obs: ArrayLike, layout: dict, cells: int = 40) -> ShortestPath | None:
    """The shortest way from start to goal over cells joined by an observed transition; None if the data do not connect them.

    `obs`, `next_obs` [N, 2]; `cells` per axis, best not much larger than a step. All positions of a cell count as one place,
    so the data of different episodes are stitched there; a cell that a wall cuts is one place on each side, so nothing is stitched
    through the wall. A way may begin and end at places within a cell's diagonal plus the goal's radius of the start and the goal.

    An edge costs not one step, since cells may be larger than steps and data slower than need be, but the steps it takes at full
    pace, from the mean position of the one place to that of the other: the larger of |dx| and |dy|, as each has an action of
    its own, over the largest seen in one transition. The gaps at both ends cost the same way. So `steps` is how long an agent at full
    pace would need along the places that the data connect, to about a step at any resolution; not a count of rows.
    """
    obs, next_obs = _rows(obs, next_obs)
    pace = np.abs(next_obs - obs).max(initial=0)
    if pace == 0:
        return None
    place, mean = _places(np.concatenate([obs, next_obs]), layout, cells)
    here, there = np.split(place, 2)
    # Of all rows that join two places, the one nearest to their means stands for the edge: it makes the smoothest path.
    detour = np.linalg.norm(obs - mean[here], axis=1) + np.linalg.norm(next_obs - mean[there], axis=1)
    order = np.lexsort((detour, there, here))
    order = order[here[order] != there[order]]
    _, first = np.unique(here[order] * len(mean) + there[order], return_index=True)
    row = order[first]
    nodes, arrival = _connect(here[row], there[row], mean, layout, cells, pace)
    if nodes is None:
        return None
    edges = [*itertools.pairwise(nodes)]
    row_of = dict(zip(zip(here[row], there[row]), row))
    sides = _sides(mean, layout)
    path = [mean[nodes[:1]]]
    for edge in edges:
        # From mean to mean, unless that could cut the end of a wall: there, by the observed step, which did not.
        crossed = (sides[edge[0]] != sides[edge[1]]).any()
        path += [obs[[row_of[edge]]], next_obs[[row_of[edge]]], mean[[edge[1]]]] if crossed else [mean[[edge[1]]]]
    path = np.concatenate(path)
    return ShortestPath(arrival, path, side(path, layout) if _is_single_wall(layout) else "none")


def side(path: ArrayLike, layout: dict) -> str:
    """The way a path [K, 2] first gets past the wall: "under" its lower end, "over" its upper end, "none" if it never does.

    For layouts with one upright wall; others are an error.
    """
    if not _is_single_wall(layout):
        raise ValueError(f"over and under are defined for one upright wall, got the walls {layout['walls']}")
    ((x, a), (_, b)), (path,) = layout["walls"][0], _rows(path)
    left = path[:, 0] < x
    at = np.flatnonzero(left[1:] != left[:-1])
    (x0, y0), (x1, y1) = path[at].T, path[at + 1].T
    height = y0 + (x - x0) / (x1 - x0) * (y1 - y0)
    passed = height[(height < min(a, b)) | (height > max(a, b))]
    if len(passed) == 0:
        return "none"
    return "under" if passed[0] < min(a, b) else "over"


def crossings(paths: Iterable[ArrayLike], layout: dict) -> dict[str, float]:
    """Fractions of the paths [E, T, 2], or of a list of [T, 2], that pass the wall "under", "over" or not ("none")."""
    sides = [side(path, layout) for path in paths]
    if not sides:
        raise ValueError("no paths to count crossings of")
    return {way: sides.count(way) / len(sides) for way in ("under", "over", "none")}


def visitation(obs: ArrayLike, layout: dict, cells: int = 40) -> np.ndarray:
    """Counts [cells, cells] of the positions `obs` [N, 2] on the grid, x first; positions out of bounds count at the border."""
    (obs,) = _rows(obs)
    column, row = _cell(obs, layout, cells).T
    return np.bincount(column * cells + row, minlength=cells**2).reshape(cells, cells)


def _connect(here, there, mean, layout, cells, pace) -> tuple[list[int] | None, float]:
    """Places along the shortest way and its steps; (None, inf) if there is none."""
    x0, x1, y0, y1 = layout["bounds"]
    reach = layout["goal_radius"] + np.hypot(x1 - x0, y1 - y0) / cells
    start, goal = np.float64(layout["start"]), np.float64(layout["goal"])
    first = np.flatnonzero(np.linalg.norm(mean - start, axis=1) <= reach)
    last = np.flatnonzero(np.linalg.norm(mean - goal, axis=1) <= reach)
    source, sink = len(mean), len(mean) + 1
    tail = np.concatenate([here, np.full(len(first), source), last])
    head = np.concatenate([there, first, np.full(len(last), sink)])
    points = np.concatenate([mean, [start, goal]])
    gap = np.abs(points[head] - points[tail])
    steps = np.maximum(gap.max(axis=1) - layout["goal_radius"] * (head == sink), 0) / pace
    # Diagonal moves make many ways equally long: a little of the plain distance picks the straightest, and keeps weights off zero.
    weight = steps + 1e-4 * np.linalg.norm(gap, axis=1) / pace + 1e-9
    graph = coo_array((weight, (tail, head)), shape=(len(points), len(points))).tocsr()
    distance, before = dijkstra(graph, indices=source, return_predecessors=True)
    if np.isinf(distance[sink]):
        return None, np.inf
    nodes = [sink]
    while nodes[-1] != source:
        nodes.append(int(before[nodes[-1]]))
    nodes.reverse()
    cost = dict(zip(zip(tail.tolist(), head.tolist()), steps))
    return nodes[1:-1], float(sum(cost[edge] for edge in itertools.pairwise(nodes)))


def _places(points: np.ndarray, layout: dict, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """The place of each point [N, 2], numbered from 0, and the mean point of each place: a cell, split where a wall's line cuts it."""
    keys = np.concatenate([_cell(points, layout, cells), _sides(points, layout)], axis=1)
    _, place = np.unique(keys, axis=0, return_inverse=True)
    place = place.reshape(-1)
    count = np.bincount(place)
    return place, np.stack([np.bincount(place, points[:, axis]) / count for axis in (0, 1)], axis=1)


def _sides(points: np.ndarray, layout: dict) -> np.ndarray:
    """On which side [N, walls] of the line through each wall the points [N, 2] lie."""
    (ax, ay), (bx, by) = np.float64(layout["walls"]).reshape(-1, 2, 2).transpose(1, 2, 0)
    return (bx - ax) * (points[:, 1:] - ay) - (by - ay) * (points[:, :1] - ax) > 0


def _cell(points: np.ndarray, layout: dict, cells: int) -> np.ndarray:
    """Column and row [N, 2] of each point on the grid."""
    if cells < 1:
        raise ValueError(f"a grid needs at least one cell per axis, got {cells}")
    x0, x1, y0, y1 = np.float64(layout["bounds"])
    return np.clip((points - (x0, y0)) / (x1 - x0, y1 - y0) * cells, 0, cells - 1).astype(int)


def _rows(*arrays: ArrayLike) -> tuple[np.ndarray, ...]:
    """The arrays [N, 2] in float64, without the rows that are NaN in any of them."""
    arrays = tuple(np.asarray(a, np.float64) for a in arrays)
    if any(a.ndim != 2 or a.shape != (len(arrays[0]), 2) for a in arrays):
        raise ValueError(f"positions must be [N, 2] of one length, got {', '.join(str(a.shape) for a in arrays)}")
    keep = ~np.isnan(np.concatenate(arrays, axis=1)).any(axis=1)
    return tuple(a[keep] for a in arrays)


def _is_single_wall(layout: dict) -> bool:
    walls = layout["walls"]
    return len(walls) == 1 and walls[0][0][0] == walls[0][1][0]
