"""The box that a dataset's actions come from. Methods learn in [-1, 1], so actions are rescaled to it."""

from typing import Any

import numpy as np

from ooo_rl.data.errors import DatasetError

Box = tuple[np.ndarray, np.ndarray]  # lowest and highest action [act], float64


def of_space(space: Any, where: str) -> Box | None:
    """The box of an action space in Minari's words, such as {"type": "Box", "low": [-1], "high": [1], ...}.

    None if it has a bound that is not finite, so that nothing can be rescaled. Raises DatasetError, which
    begins with `where`, for a space that is not a box of vectors.
    """
    kind = space.get("type") if isinstance(space, dict) else space
    if kind != "Box":
        raise DatasetError(
            f"{where}: its action space is {kind}; methods need actions that are each one vector of numbers "
            "(a Box), or one whole number (Discrete)"
        )
    try:
        low, high = (np.array(space[key], space["dtype"]).astype(np.float64) for key in ("low", "high"))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DatasetError(f"{where}: its action space is damaged ({error})") from None
    if low.ndim != 1 or low.shape != high.shape:
        raise DatasetError(
            f"{where}: its action space has bounds of the shapes {low.shape} and {high.shape}; these methods "
            "need one vector of numbers for an action"
        )
    return (low, high) if np.isfinite([low, high]).all() else None


def of_flags(bounds: tuple[float, float] | None, action_size: int) -> Box | None:
    """The box with the same bounds in every dimension; None for None and (0, 0), as the file says."""
    if bounds is None or tuple(bounds) == (0, 0):
        return None
    if not (np.isfinite(bounds).all() and bounds[0] < bounds[1]):
        raise DatasetError(
            f"--action-low {bounds[0]:g} and --action-high {bounds[1]:g}: the lowest action must be smaller "
            "than the highest, and both finite"
        )
    return np.full(action_size, bounds[0], np.float64), np.full(action_size, bounds[1], np.float64)


def check_continuous(action: np.ndarray, where: str) -> None:
    """Raises DatasetError if `action` [N] or [N, 1], whose box is unknown, looks like numbers of choices."""
    one_column = action.ndim == 1 or (action.ndim == 2 and action.shape[1] == 1)
    whole = action.dtype.kind in "iub" or (action.size and (action == np.round(action)).all())
    if one_column and whole and (action.dtype.kind != "f" or (action.min() >= 0 and action.max() >= 1)):
        raise DatasetError(
            f"{where}: its actions are whole numbers in one column, which look like discrete actions, but "
            "are not integers. If they are discrete, store them as integers; if they are continuous, give "
            "--action-low and --action-high"
        )


def to_unit(action: np.ndarray, box: Box, where: str) -> tuple[np.ndarray, str]:
    """The actions [N, act] mapped linearly from `box` to [-1, 1], and a note that says so, or "".

    This is the inverse of what an evaluation in Gymnasium does with a policy's actions.
    """
    low, high = box
    if low.shape != action.shape[1:]:
        raise DatasetError(f"{where}: its actions have {action.shape[1]} numbers, their space {low.size}")
    if (low >= high).any():
        raise DatasetError(
            f"{where}: number {(low >= high).argmax()} of its action space has no room between its bounds"
        )
    if (low == -1).all() and (high == 1).all():
        return action, ""
    return 2 * (action - low) / (high - low) - 1, f"actions rescaled from {shown(box)} to [-1, 1]"


def shown(box: Box) -> str:
    """The box for a message: [-0.4, 0.4], or its bounds for each number where they differ."""
    low, high = map(plain, box)
    if isinstance(low, list) or isinstance(high, list):
        return f"[{', '.join(f'{x:g}' for x in box[0])}] to [{', '.join(f'{x:g}' for x in box[1])}]"
    return f"[{low:g}, {high:g}]"


def plain(bounds: np.ndarray) -> float | list[float]:
    """Bounds [act] for the card: one number if all are equal."""
    return float(bounds[0]) if len({*bounds.tolist()}) == 1 else bounds.tolist()
