"""Paths in a 2-D task: where data lie, how paths pass a wall, and the shortest path that the data can form.

`layout` is the dictionary of a task's `layout` property. It holds bounds (x0, x1, y0, y1), walls as segments
((x, y), (x, y)), start, goal and goal_radius, in the units of the observation; a task with several goals also
has goals. Rows with a NaN (padding) are
ignored everywhere.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra


class ShortestPath(NamedTuple):
    """The shortest path through the data.

    steps: its length in steps at full pace. path: its positions [K, 2]. side: where it passes the wall,
    "under", "over" or "none".
    """

    steps: float
    path: np.ndarray
    side: str


def shortest_path(obs: ArrayLike, next_obs: ArrayLike, layout: dict, cells: int = 40) -> ShortestPath | None:
    """The shortest path from start to goal over cells that observed transitions connect; None if none exists.

    `obs` and `next_obs` are [N, 2]. The grid has `cells` cells per axis; a cell should not be much larger
    than a step.

    All positions in a cell count as one place. So the data of different episodes are stitched together
    there. If a wall cuts a cell, each side of the wall is a separate place. So nothing is stitched through a
    wall. The path may begin at any place near the start, and end at any place near the goal: within the
    diagonal of a cell plus the radius of the goal.

    An edge of the path does not cost one step, because cells may be larger than steps, and the data may be
    slower than possible. It costs the steps at full pace from the mean position of one place to the mean
    position of the other. This is the larger of |dx| and |dy|, since each has its own action, divided by the
    largest of these seen in one transition. The gaps at both ends are counted in the same way.

    So `steps` is the time that an agent at full pace needs along the places that the data connect. At any
    resolution it is exact to about one step. It is not a number of rows.
    """
    obs, next_obs = _rows(obs, next_obs)
    pace = np.abs(next_obs - obs).max(initial=0)
    if pace == 0:
        return None
    place, mean = _places(np.concatenate([obs, next_obs]), layout, cells)
    here, there = np.split(place, 2)
    # Of all rows that connect two places, the row nearest to their means represents the edge. It makes the
    # smoothest path.
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
        # An edge goes from mean to mean, unless that line could cross the end of a wall. Then it follows the
        # observed step, which did not cross the wall.
        crossed = (sides[edge[0]] != sides[edge[1]]).any()
        path += (
            [obs[[row_of[edge]]], next_obs[[row_of[edge]]], mean[[edge[1]]]] if crossed else [mean[[edge[1]]]]
        )
    path = np.concatenate(path)
    return ShortestPath(arrival, path, side(path, layout) if _is_single_wall(layout) else "none")


def side(path: ArrayLike, layout: dict) -> str:
    """How a path [K, 2] first passes the wall: "under" its lower end, "over" its upper end, "none" if never.

    Raises ValueError for a layout without exactly one upright wall.
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
    """The fractions of the paths that pass the wall "under" it, "over" it, or not ("none").

    `paths` is [E, T, 2] or a list of [T, 2]. Raises ValueError without paths.
    """
    sides = [side(path, layout) for path in paths]
    if not sides:
        raise ValueError("no paths to count crossings of")
    return {way: sides.count(way) / len(sides) for way in ("under", "over", "none")}


def visitation(obs: ArrayLike, layout: dict, cells: int = 40) -> np.ndarray:
    """Counts [cells, cells] of the positions `obs` [N, 2] on the grid, with x as the first axis.

    Positions out of bounds count in the nearest cell at the border.
    """
    (obs,) = _rows(obs)
    column, row = _cell(obs, layout, cells).T
    return np.bincount(column * cells + row, minlength=cells**2).reshape(cells, cells)


def _connect(here, there, mean, layout, cells, pace) -> tuple[list[int] | None, float]:
    """The places along the shortest path, and its steps; (None, inf) if there is no path."""
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
    # Diagonal moves make many paths equally long. A small share of the Euclidean distance selects the
    # straightest one, and keeps the weights above zero.
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
    """The place [N] of each point [N, 2], numbered from 0, and the mean point [places, 2] of each place.

    A place is a cell, or a part of a cell that the line through a wall cuts.
    """
    keys = np.concatenate([_cell(points, layout, cells), _sides(points, layout)], axis=1)
    _, place = np.unique(keys, axis=0, return_inverse=True)
    place = place.reshape(-1)
    count = np.bincount(place)
    return place, np.stack([np.bincount(place, points[:, axis]) / count for axis in (0, 1)], axis=1)


def _sides(points: np.ndarray, layout: dict) -> np.ndarray:
    """On which side of the line through each wall the points [N, 2] lie, as booleans [N, walls]."""
    (ax, ay), (bx, by) = np.float64(layout["walls"]).reshape(-1, 2, 2).transpose(1, 2, 0)
    return (bx - ax) * (points[:, 1:] - ay) - (by - ay) * (points[:, :1] - ax) > 0


def _cell(points: np.ndarray, layout: dict, cells: int) -> np.ndarray:
    """The column and row [N, 2] on the grid of each point [N, 2]."""
    if cells < 1:
        raise ValueError(f"a grid needs at least one cell per axis, got {cells}")
    x0, x1, y0, y1 = np.float64(layout["bounds"])
    return np.clip((points - (x0, y0)) / (x1 - x0, y1 - y0) * cells, 0, cells - 1).astype(int)


def _rows(*arrays: ArrayLike) -> tuple[np.ndarray, ...]:
    """The arrays [N, 2] as float64, without the rows that hold a NaN in any of the arrays."""
    arrays = tuple(np.asarray(a, np.float64) for a in arrays)
    if any(a.ndim != 2 or a.shape != (len(arrays[0]), 2) for a in arrays):
        raise ValueError(
            f"positions must be [N, 2] of one length, got {', '.join(str(a.shape) for a in arrays)}"
        )
    keep = ~np.isnan(np.concatenate(arrays, axis=1)).any(axis=1)
    return tuple(a[keep] for a in arrays)


def _is_single_wall(layout: dict) -> bool:
    walls = layout["walls"]
    return len(walls) == 1 and walls[0][0][0] == walls[0][1][0]
