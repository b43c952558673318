"""A call of the host's Python from inside a compiled program, with NumPy's arrays."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback


def call(function: Callable, results: tuple[jax.ShapeDtypeStruct, ...], *arguments: jax.Array) -> tuple:
    """`function(*arguments)`, which has no side effect and returns a tuple of arrays as in `results`.

    Each surrounding `vmap` adds an axis in front to all arguments and results of this single call.

    On a CPU, `function` reads and writes the program's own memory. `jax.pure_callback` would first copy each
    argument to a device. From 100 kB on, a thread of JAX's pool has to do that. The calls of all devices can
    hold all threads of the pool, and would then wait for ever.
    """
    if jax.default_backend() != "cpu":
        return jax.pure_callback(function, results, *arguments, vmap_method="broadcast_all")

    def fill(_, outputs: tuple, *inputs: Any) -> None:
        for output, value in zip(outputs, function(*map(np.asarray, inputs)), strict=True):
            np.asarray(output)[...] = value

    return buffer_callback(fill, results, vmap_method="broadcast_all")(*arguments)
