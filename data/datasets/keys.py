"""The names that files give to the arrays of a dataset, and what their flags say about ends of episodes."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np

from ooo_rl.data.datasets.files import printable
from ooo_rl.data.errors import DatasetError

# D4RL's name -> other names of the same array. Of two that are both there, the earlier one is read.
SYNONYMS = {
    "observations": ("observation", "obs", "states", "state"),
    "actions": ("action", "acts"),
    "rewards": ("reward", "rews"),
    "next_observations": ("next_observation", "next_obs", "next_states", "next_state"),
    "terminals": ("terminal", "terminations", "termination", "terminated", "is_terminal"),
    "timeouts": ("timeout", "truncations", "truncation", "truncated"),
    "masks": (),  # not discounts, which may hold the discount factor
    "is_last": (),
    "dones": ("done", "dones_float"),
    "episode_lengths": (),
}
NEEDED = ("observations", "actions", "rewards")
FLAGS = ("terminals", "timeouts", "masks", "is_last", "dones")
KEPT_APART = ("infos", "metadata")  # groups of D4RL's files that nobody misses


def roles(arrays: Iterable[str], path: object, groups: Collection[str] = ()) -> dict[str, str]:
    """D4RL's names of the arrays that are there -> the names that the file gives them.

    `arrays` and `groups` are the names at the top level of the file.

    Raises DatasetError if an array is missing that every dataset needs, or if two arrays hold the same flags.
    """
    arrays, found = list(arrays), {}
    for role, others in SYNONYMS.items():
        there = [key for key in (role, *others) if key in arrays]
        if len(there) > 1 and role in FLAGS:
            raise DatasetError(f"{path}: {' and '.join(there)} are names of the same flags; keep one of them")
        if there:
            found[role] = there[0]
    for role in NEEDED:
        if role not in found:
            there = [shown(arrays)] * bool(arrays) + [f"groups: {shown(groups)}"] * bool(groups)
            said = f"{path}: no array {role!r}; found {', and '.join(there) or 'nothing'}"
            advice = "; the arrays must stand at the top level of the file, one row for each step"
            raise DatasetError(said + advice * bool(groups))
    return found


def shown(keys: Iterable[str]) -> str:
    """Names for a message; of very many, the first."""
    keys = sorted(printable(key) for key in keys)
    return ", ".join(keys[:30]) + (f" and {len(keys) - 30} more" if len(keys) > 30 else "")


def notes_on_names(found: dict[str, str], arrays: Iterable[str], groups: Iterable[str]) -> list[str]:
    """Which arrays have other names than D4RL's, and which arrays and groups of the file are not used."""
    renamed = [f"{key} as {role}" for role, key in found.items() if key != role]
    unused = {*arrays} - {*found.values()} | {*groups} - {*KEPT_APART}
    return [f"read {', '.join(renamed)}"] * bool(renamed) + [f"not used: {shown(unused)}"] * bool(unused)


def flags(array: np.ndarray, where: str) -> np.ndarray:
    """The flags [N] as bools. Raises DatasetError, which begins with `where`, if one is neither 0 nor 1."""
    if array.size != len(array):
        raise DatasetError(f"{where} has shape {array.shape}; expected one flag for each row")
    array = array.reshape(-1)
    bad = (array != 0) & (array != 1)  # true for nan as well
    if bad.any():
        row = bad.argmax()
        raise DatasetError(f"{where} holds {array[row]} (row {row}); a flag is True or False, 1 or 0")
    return array == 1


class Ends(NamedTuple):
    """How the episodes of a file end.

    termination, truncation: bools [N]. limits: whether the file says anywhere which rows are truncated.
    """

    termination: np.ndarray
    truncation: np.ndarray
    limits: bool
    notes: list[str]


def ends(arrays: dict[str, np.ndarray], found: dict[str, str], n: int, path: object) -> Ends:
    """The ends of episodes in a file of `n` rows, from all the flags that it has.

    `arrays` and `found` have D4RL's names as keys. Raises DatasetError if two arrays tell other terminations.
    """
    meaning = {"masks": " (0 where the task ended, else 1)"}
    known = {
        role: flags(arrays[role], f"{path}: {found[role]}{meaning.get(role, '')}")
        for role in FLAGS
        if role in arrays
    }
    limits, notes = "timeouts" in known, []
    if "masks" in known:
        known["terminals"] = _terminals_of_masks(known, found, path)
        notes.append(f"{found['masks']} read as terminations where it is 0")
    none = np.zeros(n, bool)
    termination, truncation = known.get("terminals", none), known.get("timeouts", none)
    if "dones" in known:
        key, done = found["dones"], known["dones"]
        if "terminals" in known and limits:
            notes.append(f"{key} not used, since the file has terminations and truncations")
        elif "terminals" in known:
            truncation, limits = done & ~termination, True
            notes.append(f"{key} without a termination read as truncations")
        elif limits:
            termination = done & ~truncation
            notes.append(f"{key} without a truncation read as terminations")
        else:
            termination = done
            notes.append(
                f"{key} read as terminations: after these rows nothing is bootstrapped; "
                "if some are only time limits, store those as timeouts"
            )
    elif "terminals" not in known:
        notes.append("no terminations in the file: every end of an episode read as a truncation")
    if "is_last" in known:
        truncation, limits = truncation | (known["is_last"] & ~termination), True
    return Ends(termination, truncation, limits, notes)


def _terminals_of_masks(known: dict[str, np.ndarray], found: dict[str, str], path: object) -> np.ndarray:
    """Terminations [N] from the masks of jaxrl and IQL, which are 0 where the task ended and 1 elsewhere."""
    ended = ~known["masks"]
    differ = known.get("terminals", ended) != ended
    if differ.any():
        raise DatasetError(
            f"{path}: {found['terminals']} and {found['masks']} disagree (row {differ.argmax()}): a row "
            f"terminates where {found['masks']} is 0, and there alone; keep one of them. If "
            f"{found['terminals']} marks every end of an episode, name it dones"
        )
    return ended
