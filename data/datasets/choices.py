"""Discrete actions in a dataset: whole numbers, from 0 to one less than there are choices."""

from collections.abc import Callable

import numpy as np

from ooo_rl.data.errors import DatasetError

MOST = 2**20  # choices; larger numbers are something else


def of_space(space: dict, where: str) -> tuple[int, int]:
    """(How many choices, the first one's number) of a space such as {"type": "Discrete", "n": 4, "start": 0}.

    Raises DatasetError, which begins with `where`, for a space that is damaged.
    """
    try:
        number, first = int(space["n"]), int(space.get("start", 0))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DatasetError(f"{where}: its action space is damaged ({error})") from None
    if not 1 <= number <= MOST:
        raise DatasetError(f"{where}: its action space has {number} choices; expected 1 to {MOST}")
    return number, first


def in_column(action: np.ndarray) -> int:
    """How many choices integer actions [N] or [N, 1] show; 0 if `action` is no such column."""
    one_column = action.ndim == 1 or (action.ndim == 2 and action.shape[1] == 1)
    if not one_column or action.dtype.kind not in "iu" or not action.size:
        return 0
    return max(0, int(action.max()) + 1)


def check(action: np.ndarray, number: int, where: Callable[[int], str]) -> None:
    """Raises DatasetError for the first of the actions [N] that is none of `number` choices."""
    bad = (action < 0) | (action >= min(number, MOST))
    if bad.any():
        raise DatasetError(
            f"{where(int(bad.argmax()))}: the action is {action[bad.argmax()]}; discrete actions are numbers "
            f"from 0 to {min(number, MOST) - 1}"
        )


def kind(discrete: bool) -> str:
    """The word for it."""
    return "discrete" if discrete else "continuous"
