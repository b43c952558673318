"""What stands beside a setting: its bounds, with their check, and the setting without which it does nothing.

For example `expectile: Annotated[float, Bounds(above=0, below=1)] = 0.7`, or
`rnd_lr: Annotated[NonNegative, With("intrinsic", "rnd")] = 1e-4`.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from ooo_rl.data.errors import UsageError

KINDS = {
    int: (Integral, "a whole number"), float: (Real, "a number"), bool: (bool, "True or False"),
    str: (str, "a string"), tuple: (tuple, "a tuple"),
}  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """What a number must be, or each number of a tuple; `items` is the least length of a tuple."""

    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    items: int = 0
    whole: bool = False

    def broken_by(self, value: float) -> str:
        """What `value` fails to be, in words; empty if it is within the bounds. NaN is within none."""
        if math.isnan(value):
            return "a number"
        if value < self.at_least:
            return f"at least {self.at_least:g}"
        if value > self.at_most:
            return f"at most {self.at_most:g}"
        if value <= self.above > -math.inf:
            return f"above {self.above:g}"
        if value >= self.below < math.inf:
            return f"below {self.below:g}"
        if self.whole and value % 1 != 0:  # of infinity it is NaN
            return "a whole number"
        return ""


@dataclass(frozen=True)
class With:
    """The setting with which alone this one acts: it must be `value`, or if that is empty, be on."""

    setting: str
    value: str = ""

    def met_by(self, settings: dict[str, Any]) -> bool:
        found = settings[self.setting]
        return found == self.value if self.value else found not in (False, 0, "none", ())

    def __str__(self) -> str:
        return f"{flag(self.setting)} {self.value}".rstrip()


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def bounds_of(kind: type) -> dict[str, Bounds]:
    """The bounds that the fields of the dataclass `kind` declare."""
    return _declared(kind, Bounds)


def needs_of(kind: type) -> dict[str, With]:
    """What the fields of the dataclass `kind` declare that they act with alone."""
    return _declared(kind, With)


def _declared(kind: type, of: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    declared = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: part for name, parts in declared.items() for part in parts if isinstance(part, of)}


def check_bounds(settings: Any) -> None:
    """Raises UsageError for the first field of the dataclass `settings` that is out of its bounds.

    Or whose value is not of its kind: the command line gives such values alone, but a call can give any.
    """
    bounds = bounds_of(type(settings))
    for name, hint in get_type_hints(type(settings)).items():
        value, kind = getattr(settings, name), get_origin(hint) or hint
        if name in bounds:
            check_value(name, value, bounds[name])
        choices = get_args(hint) if kind is Literal else ()
        if choices and value not in choices:
            raise UsageError(f"{flag(name)} must be one of {', '.join(map(str, choices))}, not {value!r}")
        wanted, said = KINDS.get(kind, (object, ""))
        if not isinstance(value, wanted) or (kind is int and isinstance(value, bool)):
            raise UsageError(f"{flag(name)} must be {said}, not {value!r}")


def check_value(name: str, value: Any, bounds: Bounds) -> None:
    """Raises UsageError if `value`, a number or a tuple of numbers, is out of `bounds`."""
    numbers = value if isinstance(value, tuple) else (value,)
    if len(numbers) < bounds.items:
        raise UsageError(f"{flag(name)} needs at least {bounds.items} number{'s' * (bounds.items > 1)}")
    for number in numbers:
        if not isinstance(number, Real):
            raise UsageError(f"{flag(name)} must be a number, not {number!r}")
        if wanted := bounds.broken_by(number):
            shown = " ".join(map(str, numbers))
            raise UsageError(f"{flag(name)} must be {wanted}, not {shown}")


Number = Annotated[float, Bounds()]
Fraction = Annotated[float, Bounds(at_least=0, at_most=1)]
NonNegative = Annotated[float, Bounds(at_least=0)]
Positive = Annotated[float, Bounds(above=0)]
Steps = Annotated[int, Bounds(at_least=0)]
Seed = Annotated[int, Bounds(at_least=0, at_most=2**32 - 1)]
Size = Annotated[int, Bounds(at_least=1)]
Layers = Annotated[tuple[int, ...], Bounds(at_least=1, items=1)]
