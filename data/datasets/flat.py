"""Reads HDF5 and .npz files: D4RL's flat layout, complete episodes one after another, and RLDS's steps."""

import pathlib

import numpy as np

from ooo_rl.data.datasets import d4rl_rows, files, keys, public
from ooo_rl.data.datasets.validate import Raw, gaps
from ooo_rl.data.errors import DatasetError

COLUMNS = {  # of `Raw` -> the array that it is read from
    "obs": "observations", "action": "actions", "reward": "rewards", "next_obs": "next_observations",
}  # fmt: skip


def read(path: pathlib.Path) -> Raw:
    """The rows of a file. Only the arrays that are used are read."""
    with files.opened(path) as file:
        names, groups = files.names(file)
        found = keys.roles(names, path, groups)
        if "episode_lengths" in found:
            found.pop("is_last", None)
        arrays = {role: files.numbers(file[key], f"{path}: {key}") for role, key in found.items()}
    if "episode_lengths" in found:
        if len(arrays.get("next_observations", ())) != len(arrays["actions"]):
            arrays.pop("next_observations", None)
            found.pop("next_observations", None)
        raw = _whole_episodes(arrays, found, path)
    else:
        _check_rows(arrays, found, path, but=())
        ends = keys.ends(arrays, found, len(arrays["rewards"]), path)
        if "next_observations" in found:
            raw = _transitions(arrays, ends)
        elif not len(arrays["rewards"]):
            raise DatasetError(f"{path}: no transitions")
        else:
            layout = _steps if "is_last" in found else _followed_by_the_next
            raw = layout(arrays, found, ends, path, [*names, *groups])
        d4rl_rows.drop(raw, public.d4rl_id(str(path)), arrays["observations"], ends.truncation)
    raw.keys = {column: found[role] for column, role in COLUMNS.items() if role in found}
    raw.endless = path.name in public.ENDLESS and not raw.end[:-1].any()
    raw.notes += public.d4rl_notes(path) + keys.notes_on_names(found, names, groups)
    return raw


def _check_rows(arrays: dict, found: dict, path: pathlib.Path, but: tuple[str, ...]) -> None:
    """Raises DatasetError if an array has more or fewer rows than the rewards; those in `but` may."""
    n = len(arrays["rewards"])
    for role, array in arrays.items():
        if len(array) != n and role not in but:
            raise DatasetError(f"{path}: {found[role]} has {len(array)} rows, {found['rewards']} {n}")


def _transitions(arrays: dict, ends: keys.Ends) -> Raw:
    """Rows that hold their next observations.

    If the file does not say which rows are truncated, an episode ends where the next observation is not the
    next row's observation. So rows in no order are fine.
    """
    obs, next_obs = arrays["observations"], arrays["next_observations"]
    end, notes, ordered = ends.termination | ends.truncation, ends.notes, True
    end[-1:] = True
    if not ends.limits and obs.shape == next_obs.shape and obs.ndim == 2:
        goes_on = ~end  # a row at an end has no next row to follow, whatever the order
        cut = np.append(gaps(obs, next_obs), False) & goes_on
        end |= cut
        ordered = bool(cut.sum() <= goes_on.sum() / 2)
        if not ordered:
            notes.append(
                "the rows are in no order: what this card says of episodes is of single rows, and what a "
                "method computes from whole episodes, such as Monte-Carlo returns, means nothing"
            )
        elif cut.any():
            notes.append(
                "the file marks no time limits; an episode ends where the next observation is not the "
                f"observation of the next row ({cut.sum()} times)"
            )
    return Raw(
        obs, arrays["actions"], arrays["rewards"], next_obs, ends.termination, end, notes, ordered=ordered
    )


def _followed_by_the_next(
    arrays: dict, found: dict, ends: keys.Ends, path: pathlib.Path, names: list[str]
) -> Raw:
    """Rows whose next observation is the observation of the next row, until an episode ends.

    The next observation of a row at a timeout is unknown, and the row is dropped.
    """
    termination, n = ends.termination, len(ends.termination)
    end, obs, rows, notes = termination | ends.truncation, arrays["observations"], np.arange(n), []
    unmarked = not end.any()
    if unmarked and path.name not in public.ENDLESS:
        _refuse_unmarked(found, path, names)
    # The next observation of a terminated row is never used. At a timeout, or at the end of the file, it
    # is unknown.
    next_obs = np.concatenate([obs[1:], obs[-1:]])
    next_obs = np.where(termination.reshape(-1, *(1,) * (obs.ndim - 1)), obs, next_obs)
    known = termination | ~ends.truncation
    known[-1:] &= termination[-1:]
    dropped = n - known.sum()
    before_gap = np.concatenate([~known[1:], [False]]) & ~end
    end, rows = end | before_gap, rows[known]
    if dropped:
        notes.append(f"{dropped} rows at timeouts dropped: their next observations are not stored")
    if unmarked:
        notes.append("one run without resets, as D4RL made it")
    elif not (ends.limits or "dones" in found):
        notes.append("the file marks no time limits: if there were any, a row leads across each of them")
    columns = (obs, arrays["actions"], arrays["rewards"], next_obs, termination, end)
    return Raw(*(column[rows] for column in columns), notes + ends.notes, row=rows)


def _refuse_unmarked(found: dict, path: pathlib.Path, names: list[str]) -> None:
    marks = [found[role] for role in keys.FLAGS if role in found]
    fault = f"no row is marked in {' or '.join(marks)}" if marks else "no array marks ends of episodes"
    raise DatasetError(
        f"{path}: {fault}, so rows might lead from one episode into the next; store terminals and timeouts "
        "(for one endless episode, mark its last row), or next_observations; "
        f"found {keys.shown(names)}"
    )


def _steps(arrays: dict, found: dict, ends: keys.Ends, path: pathlib.Path, names: list[str]) -> Raw:
    """RLDS's steps. The last one of an episode holds its last observation, and no action or reward.

    is_terminal belongs to a step's own observation, so it says whether the row before terminated.
    """
    last = keys.flags(arrays["is_last"], f"{path}: {found['is_last']}")
    if (ends.termination & ~last).any():
        raise DatasetError(
            f"{path}: a terminal row is not is_last (row {(ends.termination & ~last).argmax()}); in RLDS's "
            "layout the terminal step is the last one. Store terminals and timeouts instead"
        )
    if not last.any():
        _refuse_unmarked(found, path, names)
    rows = np.flatnonzero(~last[:-1])
    obs = arrays["observations"]
    notes = [f"read as RLDS's steps: the {last.sum()} rows at is_last hold an observation and no action"]
    return Raw(
        obs[rows], arrays["actions"][rows], arrays["rewards"][rows], obs[rows + 1],
        ends.termination[rows + 1], last[rows + 1], notes + ends.notes, row=rows,
    )  # fmt: skip


def _whole_episodes(arrays: dict, found: dict, path: pathlib.Path) -> Raw:
    """Reads complete episodes that follow one another in the arrays.

    An episode of T actions has T + 1 observations, or T. With T, the next observation of its last row is
    unknown, unless there are next_observations, one for each action.
    """
    lengths = _lengths(arrays["episode_lengths"], path)
    n, num_obs = int(lengths.sum()), len(arrays["observations"])
    if len(arrays["actions"]) != n or len(arrays["rewards"]) != n:
        raise DatasetError(
            f"{path}: episode_lengths add up to {n}, but there are {len(arrays['actions'])} actions "
            f"and {len(arrays['rewards'])} rewards"
        )
    extra = (num_obs - n) // max(len(lengths), 1)
    if extra not in (0, 1) or num_obs != n + extra * len(lengths):
        raise DatasetError(
            f"{path}: {num_obs} observations for {n} actions in {len(lengths)} episodes; "
            "expected as many observations as actions, or one more per episode"
        )
    _check_rows(arrays, found, path, but=("observations", "episode_lengths"))
    ends = keys.ends(arrays, found, n, path)
    terminals = ends.termination
    starts = np.cumsum(lengths + extra) - (lengths + extra)
    following = arrays.get("next_observations")
    # The next observation of a terminated row is never used, so it may be missing.
    used = lengths if extra or following is not None else lengths - ~terminals[np.cumsum(lengths) - 1]
    first_row = np.cumsum(lengths) - lengths
    index = np.concatenate([np.arange(s, s + k) for s, k in zip(starts, used)]) if n else np.zeros(0, int)
    rows = np.concatenate([np.arange(s, s + k) for s, k in zip(first_row, used)]) if n else np.zeros(0, int)
    end = np.zeros(len(rows), bool)
    end[np.cumsum(used)[used > 0] - 1] = True
    obs = arrays["observations"]
    if following is None:
        next_obs = obs[np.minimum(index + 1, np.repeat(starts + lengths + extra - 1, used))]
    else:
        next_obs = following[rows]
    dropped = n - len(rows)
    notes = (
        [f"{dropped} last rows of episodes dropped: their next observations are not stored"]
        if dropped
        else []
    )
    action, reward = (arrays[key][rows] for key in ("actions", "rewards"))
    return Raw(obs[index], action, reward, next_obs, terminals[rows], end, notes + ends.notes, row=rows)


def _lengths(array: np.ndarray, path: pathlib.Path) -> np.ndarray:
    """The lengths of episodes [E] as whole numbers, all at least 1."""
    array = array.astype(np.float64)
    if array.ndim != 1 or not np.isfinite(array).all() or (array != np.round(array)).any():
        raise DatasetError(f"{path}: episode_lengths must be one row of whole numbers, one for each episode")
    if (array < 1).any():
        bad = (array < 1).argmax()
        raise DatasetError(f"{path}: episode {bad} has the length {array[bad]:g}; drop empty episodes")
    if (array > 2**40).any():
        raise DatasetError(f"{path}: episode {array.argmax()} has the length {array.max():g}")
    return array.astype(np.int64)
