"""Side-by-side runs: every combination of the swept values, each with all seeds."""

import dataclasses
import difflib
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs.bounds import bounds_of, check_value, flag


class RunLabel(NamedTuple):
    """Which of the side-by-side runs this is: its seed, and the swept settings with their values."""

    seed: int
    setting: str


def grid(args: Any) -> tuple[Any, list[RunLabel]]:
    """The runs of one program: every combination of the swept values, each with all seeds.

    Returns (`args.hyper` with a float32 array [runs] in each field, the labels of the runs). Seeds vary
    fastest.
    """
    names = [f.name for f in dataclasses.fields(args.hyper)]
    swept = _swept_values(args, names)
    combinations = [dict(zip(swept, values)) for values in itertools.product(*swept.values())]
    labels = [
        RunLabel(
            args.seed + k, " ".join(f"{name.replace('_', '-')}={_text(value)}" for name, value in c.items())
        )
        for c in combinations
        for k in range(args.num_seeds)
    ]
    column = {
        name: jnp.float32(
            [c.get(name, getattr(args.hyper, name)) for c in combinations for _ in range(args.num_seeds)]
        )
        for name in names
    }
    return args.hyper.replace(**column), labels


def _text(value: float) -> str:
    """A number as short as can be without rounding: 5, 0.7, 1e-05."""
    return repr(value).removesuffix(".0")


def _swept_values(args: Any, names: list[str]) -> dict[str, list[float]]:
    """Setting -> values, from the words of `--sweep`."""
    swept: dict[str, list[float]] = {}
    bounds = bounds_of(type(args.hyper))
    for item in args.sweep:
        name, _, values = item.partition("=")
        name = name.replace("-", "_")
        if name in swept:
            raise UsageError(
                f"--sweep {item}: {name.replace('_', '-')} is swept twice; list all its values in one"
            )
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3) or names
            near = ", ".join(flag(one)[2:] for one in near)
            fault = f"is not a traced setting; did you mean {near}?"
            if hasattr(args, name):
                fault = "is fixed when the program compiles, so it cannot be swept; "
                fault += f"what can be swept is {near}"
            raise UsageError(f"--sweep {item}: {flag(name)[2:]} {fault}")
        try:
            swept[name] = [float(v) for v in values.split(",")]
        except ValueError:
            raise UsageError(f"--sweep {item}: write NAME=NUMBER,NUMBER,...") from None
        for value in swept[name]:
            if name in bounds:
                check_value(name, value, bounds[name])
        if len(set(map(np.float32, swept[name]))) < len(swept[name]):
            raise UsageError(
                f"--sweep {item}: two of the values are the same number in float32; list each once"
            )
    return swept
