"""Drops the rows of D4RL's files that are no step of the environment."""

import numpy as np

from ooo_rl.data.datasets import public
from ooo_rl.data.datasets.validate import Raw

FARTHEST = 2.0  # metres; in a step of 0.1 s an ant cannot go so far


def drop(raw: Raw, dataset_id: str, obs: np.ndarray, truncation: np.ndarray) -> None:
    """Drops from `raw` the rows that are known to be wrong in D4RL's file `dataset_id` ("": another file).

    `obs` [N, obs] and `truncation` [N] are those of all rows of the file. An episode ends before each row
    that is dropped, and a note has their number.
    """
    if not len(raw.reward) or raw.obs.ndim != 2 or raw.obs.shape != raw.next_obs.shape:
        return  # `validate` says what is wrong
    if public.FIRST_ANTMAZE.fullmatch(dataset_id):
        wrong = _jumps(raw)
        note = (
            f"rows dropped in which the ant moves farther than {FARTHEST:g} m: each leads across a reset "
            "that the file does not mark (D4RL's issues 77 and 146). The mended files are those of v2, "
            "whose names end in _fixed"
        )
    elif dataset_id.startswith("maze2d-"):
        wrong = _repeats(obs, truncation)[slice(None) if raw.row is None else raw.row]
        note = (
            "rows after timeouts dropped: each repeats the observation of the row before, but its action "
            "was taken one step later (D4RL's issue 204)"
        )
    else:
        return
    if not wrong.any():
        return
    raw.end = raw.end | np.append(wrong[1:], False)
    raw.row = np.arange(len(wrong)) if raw.row is None else raw.row
    for name in ("obs", "action", "reward", "next_obs", "termination", "end", "row"):
        setattr(raw, name, getattr(raw, name)[~wrong])
    raw.notes.append(f"{wrong.sum()} {note}")


def _jumps(raw: Raw) -> np.ndarray:
    """Where the position, the first two numbers, moves too far; bools. Terminated rows use no next one."""
    with np.errstate(over="ignore", invalid="ignore"):
        move = raw.next_obs[:, :2].astype(np.float64) - raw.obs[:, :2]
        return (np.linalg.norm(move, axis=1) > FARTHEST) & ~raw.termination


def _repeats(obs: np.ndarray, truncation: np.ndarray) -> np.ndarray:
    """Where a row follows a truncated one and has the same observation: bools [N]."""
    same = (obs[1:] == obs[:-1]).reshape(len(obs) - 1, -1).all(axis=1) if len(obs) > 1 else np.zeros(0, bool)
    return np.append(False, truncation[:-1] & same)
