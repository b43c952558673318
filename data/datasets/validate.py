"""Checks the rows of a file before anything learns from them, and makes flat arrays of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ooo_rl.data.buffer import Transition
from ooo_rl.data.datasets import action_box, choices, public
from ooo_rl.data.datasets.card import make_card
from ooo_rl.data.errors import DatasetError

# Official loaders clip actions to this bound, so that no policy has to reach the edge of the range.
LIMIT = 1 - 1e-5


# An action may lie this far outside [-1, 1], and next_obs may differ this much from the next row's obs.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Dataset:
    """N rows of experience in the order of time.

    transitions: float32 numpy arrays [N, ...]; discount is 0 if the episode terminated after the row, else 1.
    Discrete actions are int32 [N].

    episode: int32 [N], the number of the row's episode, counted from 0.

    truncation: bool [N], true in the last row of an episode that did not terminate.

    card: what is known about the dataset, in plain types for dataset.json.
    """

    transitions: Transition
    episode: np.ndarray
    truncation: np.ndarray
    card: dict

    @property
    def discrete(self) -> bool:
        """Whether actions are whole numbers."""
        return self.transitions.action.ndim == 1


@dataclass
class Raw:
    """The N rows of a file before validation; arrays [N, ...].

    `end` [N] marks the last rows of episodes. `notes` say what was dropped or flattened.
    """

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_obs: np.ndarray
    termination: np.ndarray
    end: np.ndarray
    notes: list[str]
    recipe: Any = None
    row: np.ndarray | None = None  # [N] row numbers in the file; None if all rows were kept
    ordered: bool = True  # whether rows follow one another in time
    box: action_box.Box | None = None  # the lowest and highest action, if known
    is_box: bool = False  # whether the file says that actions are continuous
    choices: int = 0  # how many discrete actions there are; 0: they are continuous
    dataset_id: str = ""  # the id that the file itself gives
    keys: dict[str, str] = field(default_factory=dict)  # column -> the array's name in the file, if known
    endless: bool = False  # whether the file is one run without ends: its return means nothing


def validate(
    raw: Raw, source: str, clip_out_of_range: bool, bounds: tuple[float, float] | None = None
) -> None:
    """Raises DatasetError for the first fault that makes `raw` unfit for learning.

    Discrete actions must be numbers of choices. Others are rescaled from their box to [-1, 1]; the box is
    that of `bounds` (lowest, highest), or the file's. An action outside [-1, 1] is then a fault, unless
    `clip_out_of_range` is set. Then a note says so, and `finish` clips the action.
    """
    if len(raw.reward) == 0:
        raise DatasetError(f"{source}: no transitions")
    if not (raw.is_box or raw.choices or action_box.of_flags(bounds, 1)):
        raw.choices = choices.in_column(raw.action)
        if not raw.choices:
            action_box.check_continuous(raw.action, source)
    _check_shapes(raw, source)
    episode, step = _episodes(raw.end)
    in_file = np.arange(len(raw.reward)) if raw.row is None else raw.row
    where = lambda row: f"{source}: episode {episode[row]}, step {step[row]} (row {in_file[row]})"  # noqa: E731
    _check_finite(raw, where)
    if raw.choices:
        choices.check(raw.action, raw.choices, where)
    else:
        raw.box = action_box.of_flags(bounds, raw.action.shape[1]) or raw.box
        if raw.box:
            raw.action, note = action_box.to_unit(raw.action, raw.box, source)
            raw.notes += [note] * bool(note)
        _check_actions(raw, where, clip_out_of_range)
    goes_on = ~raw.end[:-1]
    gap = gaps(raw.obs, raw.next_obs) & goes_on
    if gap.any():
        unordered = gap.sum() > goes_on.sum() / 2
        order = "; if the rows are in no order, leave out what marks time limits" if unordered else ""
        raise DatasetError(
            f"{where(gap.argmax())}: next_obs differs from the observation of the next row; "
            f"mark the end of an episode there, or correct the file{order}"
        )


def gaps(obs: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
    """Whether the next observation of a row is not the observation of the next row: bools [N - 1]."""
    floats = [x.dtype for x in (obs, next_obs) if x.dtype.kind == "f"]
    exact = min(floats, key=lambda kind: kind.itemsize, default=np.float64)  # the coarser of two has rounded
    with np.errstate(over="ignore", invalid="ignore"):
        difference = np.abs(np.asarray(next_obs[:-1], exact) - np.asarray(obs[1:], exact))
    return difference.max(axis=1, initial=0) > TOLERANCE


def _check_shapes(raw: Raw, source: str) -> None:
    """Raises DatasetError if the columns of `raw` do not belong together; makes floats of whole numbers."""
    n = len(raw.reward)
    for name, rank in (("obs", 2), ("action", 1 if raw.choices else 2), ("reward", 1), ("next_obs", 2)):
        array, key = getattr(raw, name), raw.keys.get(name, name)
        if array.ndim == 2 and array.shape[-1] == 1 and rank == 1:
            array = array[:, 0]
        if array.ndim == 1 and name == "action" and rank == 2:
            array = array[:, None]
        if array.ndim > 2 and name.endswith("obs"):
            raise DatasetError(
                f"{source}: {key} has the shape {array.shape[1:]} in each row; "
                "an observation must be a vector: images are not supported"
            )
        if array.ndim != rank or len(array) != n:
            raise DatasetError(
                f"{source}: {key} has shape {array.shape}; "
                f"expected {n} rows and {rank} dimension{'s' * (rank > 1)}"
            )
        if not array.size:
            raise DatasetError(f"{source}: {key} has shape {array.shape}, so its rows are empty")
        if name != "action" or not raw.choices:
            array = array if array.dtype.kind == "f" else array.astype(np.float64)
        setattr(raw, name, array)
    if raw.obs.shape != raw.next_obs.shape:
        raise DatasetError(
            f"{source}: observations are {raw.obs.shape[1:]}, next observations {raw.next_obs.shape[1:]}"
        )


def _check_finite(raw: Raw, where: Callable[[int], str]) -> None:
    """Raises DatasetError for a number that is not finite as a float32, which is what methods get."""
    for name in ("obs", "action", "reward", "next_obs"):
        with np.errstate(over="ignore"):
            array = np.asarray(getattr(raw, name), np.float32)
        bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if bad.any():
            row = bad.argmax()
            beyond = " in float32, it is too large" if np.isfinite(getattr(raw, name)[row]).all() else ""
            raise DatasetError(
                f"{where(row)}: {name} is not finite{beyond}, and {bad.sum() - 1} more rows are not; "
                "correct or drop the episode"
            )


def _check_actions(raw: Raw, where: Callable[[int], str], clip_out_of_range: bool) -> None:
    excess = np.abs(raw.action).max(axis=1) - 1
    if not (excess > TOLERANCE).any():
        return
    share = (np.abs(raw.action) > 1 + TOLERANCE).mean()
    if clip_out_of_range:
        raw.notes.append(
            f"{share:.2%} of action entries clipped to [-1, 1], from up to {1 + excess.max():.3g}"
        )
        return
    box = f", to which {action_box.shown(raw.box)} was rescaled" if raw.box else ""
    raise DatasetError(
        f"{where((excess > TOLERANCE).argmax())}: an action lies outside [-1, 1]{box}; "
        f"{share:.1%} of all entries do, by up to {excess.max():.3g}. "
        "Give the lowest and the highest action with --action-low and --action-high, or clip with "
        "--clip-actions"
    )


def drop_empty_forces(raw: Raw) -> None:
    """Drops an ant's contact forces from `raw` if they are zero in every row."""
    if public.empty_forces(raw.obs) and public.empty_forces(raw.next_obs):
        raw.obs, raw.next_obs = raw.obs[:, : -public.FORCES], raw.next_obs[:, : -public.FORCES]
        raw.notes.append(
            f"the last {public.FORCES} numbers of the observation dropped: "
            "an ant's contact forces, zero in every row"
        )


def _episodes(end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The episode number [N] and the step within the episode [N], from the flags `end` [N] of last rows."""
    first = np.concatenate([[True], end[:-1]])
    episode = np.cumsum(first) - 1
    return episode.astype(np.int32), np.arange(len(end)) - np.flatnonzero(first)[episode]


def finish(raw: Raw, name: str, source: str, clip_actions: float) -> Dataset:
    """The dataset of the validated rows, with its card; actions are clipped to +-`clip_actions`."""
    termination = raw.termination.astype(bool)
    raw.end[-1] = True
    raw.end |= termination
    columns = raw.obs, raw.action, raw.reward, raw.next_obs, 1 - termination
    rows = Transition(*(np.ascontiguousarray(column, np.float32) for column in columns))
    action = np.int32(raw.action) if raw.choices else np.clip(rows.action, -clip_actions, clip_actions)
    rows = rows.replace(action=action)
    episode, _ = _episodes(raw.end)
    truncation = raw.end & ~termination
    return Dataset(rows, episode, truncation, make_card(raw, rows, episode, truncation, name, source))


def check_fits(data: Dataset, obs_size: int, action_size: int, env: str, discrete: bool = False) -> None:
    """Raises DatasetError if the dataset's observations and actions are not of the kind and sizes given.

    `obs_size` and `action_size` are the sizes of the environment `env`. Of its discrete actions, the data may
    lack some.
    """
    if data.discrete != discrete:
        raise DatasetError(
            f"{data.card['id']} has {choices.kind(data.discrete)} actions, {env} has "
            f"{choices.kind(discrete)} ones: they do not belong together"
        )
    has = data.transitions.obs.shape[1], data.card["action_size"]
    if has[0] != obs_size or has[1] > action_size or (has[1] < action_size and not discrete):
        body = public.body(*has)
        raise DatasetError(
            f"{data.card['id']} has {has[0]} observations and {has[1]} actions, "
            f"{env} has {obs_size} and {action_size}: they do not belong together"
            f"{f'; data of this shape come from {body}' if body else ''}"
        )
