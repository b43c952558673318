"""Turns the function of one run into one compiled program for all runs.

The program is vmapped over seeds and swept values, and sharded over devices.
"""

import inspect
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ooo_rl.data.modes import usual_promotion

RUNS, EVERYWHERE = PartitionSpec("runs"), PartitionSpec()
SHARED = ("offline", "truncation", "added")  # names of the arguments that are the same for all runs


def mesh_for(num_runs: int) -> Mesh:
    """The visible devices in a row, as many as divide `num_runs`: all then hold the same number of runs."""
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if num_runs % n == 0)
    return Mesh(devices[:count], ("runs",))


def place(tree, mesh: Mesh, spec: PartitionSpec):
    """`tree` on the devices: RUNS splits its leading axis among them, EVERYWHERE gives each all of it."""
    return jax.device_put(tree, NamedSharding(mesh, spec))


def for_runs(function: Callable, axes: tuple[int | None, ...]) -> Callable:
    """`jax.vmap(function, axes)`, in which a single run is not batched at all.

    An axis of length one costs time. On a CPU, RLPD's products of ten critics take twice as long with it, and
    a `lax.cond` takes both ways.
    """

    def mapped(*arguments):
        runs = jax.tree.leaves([a for a, axis in zip(arguments, axes) if axis == 0])[0].shape[0]
        if runs > 1:
            return jax.vmap(function, in_axes=axes)(*arguments)
        alone = [
            a if axis is None else jax.tree.map(partial(jnp.squeeze, axis=0), a)
            for a, axis in zip(arguments, axes)
        ]
        return jax.tree.map(lambda x: x[None], function(*alone))

    return mapped


class Compiled:
    """`function(*arguments, **static)`, written for one run, compiled for all of them.

    Arguments are known by name. One whose name is in `shared` is the same for all runs; all others, and the
    results, have a leading axis of runs. A first argument called `state` gives its memory to the results.
    Keyword arguments are compile-time constants: each new combination compiles once, ahead of time;
    `compile_seconds` and `run_seconds` add up what compiling and running took.
    """

    def __init__(self, function: Callable, mesh: Mesh, shared: tuple[str, ...] = SHARED):
        self.function, self.mesh, self.shared = function, mesh, shared
        self.names = [
            p.name for p in inspect.signature(function).parameters.values() if p.kind != p.KEYWORD_ONLY
        ]
        self.donated = (0,) if self.names[0] == "state" else ()
        self.programs: dict = {}
        self.compile_seconds = self.run_seconds = 0.0

    def program(self, *arguments, **static):
        """The executable for arguments of these shapes; it also tells its memory (`memory_analysis()`)."""
        key = tuple(sorted(static.items()))
        if key not in self.programs:
            began = time.perf_counter()
            axes = tuple(None if name in self.shared else 0 for name in self.names[: len(arguments)])
            mapped = for_runs(partial(self.function, **static), axes)
            specs = tuple(EVERYWHERE if axis is None else RUNS for axis in axes)
            if jax.config.jax_disable_jit:  # to step through with a debugger
                self.programs[key] = mapped
                return mapped
            sharded = jax.shard_map(mapped, mesh=self.mesh, in_specs=specs, out_specs=RUNS, check_vma=False)
            with usual_promotion():
                self.programs[key] = jax.jit(sharded, donate_argnums=self.donated).lower(*arguments).compile()
            self.compile_seconds += time.perf_counter() - began
        return self.programs[key]

    def __call__(self, *arguments, **static):
        arguments = [
            place(jnp.int32(x), self.mesh, EVERYWHERE) if isinstance(x, int) else x for x in arguments
        ]
        program = self.program(*arguments, **static)
        began = time.perf_counter()
        with usual_promotion():
            results = jax.block_until_ready(program(*arguments))
        self.run_seconds += time.perf_counter() - began
        return results


def scan_mean(step: Callable, carry, length: int):
    """`lax.scan` of `step(carry) -> carry, metrics` that keeps only the mean of each metric over all steps.

    It also reports `nonfinite_at`: the first step in which a metric was NaN or infinite, or -1.
    """
    template = jax.eval_shape(step, carry)[1]
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), template)

    def body(state, i):
        carry, total, first_bad = state
        carry, metrics = step(carry)
        finite = jnp.isfinite(sum(jax.tree.leaves(metrics)))
        first_bad = jnp.where((first_bad < 0) & ~finite, i, first_bad)
        return (carry, jax.tree.map(jnp.add, total, metrics), first_bad), None

    (carry, total, first_bad), _ = jax.lax.scan(body, (carry, total, jnp.int32(-1)), jnp.arange(length))
    return carry, {**jax.tree.map(lambda x: x / length, total), "nonfinite_at": first_bad}
