"""Turns the function of one run into one compiled program for all runs.

Runs are seeds and swept values. They are spread over the devices, those of all processes if there are
several (`processes`): each device holds equally many. On an accelerator a device computes its runs at once
(`vmap`). On a CPU each core is a device, and computes its runs in turn: more at once would only push one
another out of its caches. A run then has the same bits whatever runs are beside it. A function that calls
the host (the C engine) gets all runs of a device at once there too, because one call for many worlds costs
less than many calls.
"""

import inspect
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ooo_rl.data.modes import usual_promotion
from ooo_rl.data.runs import processes

# For a GPU: kernels that do not need one another run at once, and loops are part of CUDA graphs, also those
# that end when their data say so. XLA's defaults start all kernels in one order, and leave loops to the host.
GPU_OPTIONS = {
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    ),
    "xla_gpu_graph_min_graph_size": 1,
}

RUNS, EVERYWHERE = PartitionSpec("runs"), PartitionSpec()
SHARED = ("offline", "truncation", "added", "before")  # names of the arguments that are the same for all runs


def mesh_for(num_runs: int, devices: list | None = None) -> Mesh:
    """As many of the `devices` (all that are visible) as are needed, if each holds equally many runs.

    Each process has one of them at least, because all take part in every program.
    """
    devices = processes.in_turn(jax.devices() if devices is None else devices)
    per_device = math.ceil(num_runs / len(devices))
    needed = max(math.ceil(num_runs / per_device), len({device.process_index for device in devices}))
    return Mesh(devices[:needed], ("runs",))


def place(tree, mesh: Mesh, spec: PartitionSpec):
    """`tree` on the devices: RUNS splits its leading axis among them, EVERYWHERE gives each all of it.

    Where the devices do not divide the runs, copies of the last run fill what is left. `real` drops them.
    """
    if spec == RUNS:
        tree = jax.tree.map(lambda x: filled(x, mesh.size), tree)
    sharding = NamedSharding(mesh, spec)
    if not processes.are_several():
        return jax.device_put(tree, sharding)

    def part(x):  # each process has all of `x`, and gives its own devices what is theirs
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x  # it is in its place already
        return jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__)

    return jax.tree.map(part, tree)


def filled(x: jax.Array, size: int) -> jax.Array:
    """`x` with its last row repeated until `size` divides the number of rows."""
    missing, of = -len(x) % size, np if isinstance(x, np.ndarray) else jnp
    return of.concatenate([x, of.repeat(x[-1:], missing, axis=0)]) if missing else x


def real(tree, num_runs: int):
    """`tree` [places, ...] on the host, without the copies that fill the devices: [runs, ...].

    Of several processes each has all of it, so each must ask. An array at a time then passes, whole, through
    the memory of every device.
    """
    tree = jax.tree.map(processes.on_host, tree) if processes.are_several() else jax.device_get(tree)
    return jax.tree.map(lambda x: x[:num_runs], tree)


def at_once(function: Callable, axes: tuple[int | None, ...]) -> Callable:
    """`jax.vmap(function, axes)`, in which a single run is not batched at all.

    An axis of length one costs time. On a CPU, RLPD's products of ten critics take twice as long with it, and
    a `lax.cond` takes both ways.
    """

    def mapped(*arguments):
        if _count(arguments, axes) > 1:
            return jax.vmap(function, in_axes=axes)(*arguments)
        return jax.tree.map(lambda x: x[None], function(*_one(0, arguments, axes)))

    return mapped


def in_turn(function: Callable, axes: tuple[int | None, ...], keeps_state: bool) -> Callable:
    """Like `at_once`, one run after another.

    If it `keeps_state`, the first argument is a state that the function returns, alone or first. The new
    states then take the memory of the old ones.
    """

    def mapped(*arguments):
        runs = jnp.arange(_count(arguments, axes))
        if len(runs) == 1:
            return at_once(function, axes)(*arguments)
        if not keeps_state:
            return jax.lax.map(lambda r: function(*_one(r, arguments, axes)), runs)
        alone = False

        def turn(states, r):
            nonlocal alone
            results = function(*_one(r, (states, *arguments[1:]), axes))
            alone = jax.tree.structure(results) == jax.tree.structure(states)
            state, *others = (results,) if alone else results
            return jax.tree.map(lambda all_, new: all_.at[r].set(new), states, state), others

        states, others = jax.lax.scan(turn, arguments[0], runs)
        return states if alone else (states, *others)

    return mapped


def _count(arguments: Sequence, axes: tuple[int | None, ...]) -> int:
    return jax.tree.leaves([a for a, axis in zip(arguments, axes) if axis == 0])[0].shape[0]


def _rows(rows: slice, size: int, x: np.ndarray) -> np.ndarray:
    """These rows of `x`, filled up to `size`."""
    return filled(x[rows], size)


def _one(r: Any, arguments: tuple, axes: tuple[int | None, ...]) -> list:
    """The arguments of run `r`."""
    return [a if axis is None else jax.tree.map(lambda x: x[r], a) for a, axis in zip(arguments, axes)]


def traced(function: Callable, arguments: tuple, axes: tuple[int | None, ...]) -> tuple[Callable, bool]:
    """(`function`, traced for one run with such arguments, so that it is not traced again; whether it calls
    the host).
    """
    shapes = jax.eval_shape(lambda *a: _one(0, a, axes), *arguments)
    jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*shapes)
    flat, tree = jaxpr_as_fun(jaxpr), jax.tree.structure(out)
    return lambda *a: jax.tree.unflatten(tree, flat(*jax.tree.leaves(a))), _calls_host(jaxpr.jaxpr)


def _calls_host(jaxpr: Any) -> bool:
    """Whether `jaxpr`, or one within it, has a callback to Python."""
    for equation in jaxpr.eqns:
        parts = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        inner = [getattr(part, "jaxpr", part) for part in parts]
        if "callback" in equation.primitive.name or any(_calls_host(j) for j in inner if hasattr(j, "eqns")):
            return True
    return False


def compile_for(lowered: jax.stages.Lowered, platform: str) -> jax.stages.Compiled:
    """The executable; for a GPU with those of `GPU_OPTIONS` that XLA knows and XLA_FLAGS do not name."""
    told = os.environ.get("XLA_FLAGS", "")
    options = {} if platform == "cpu" else {k: v for k, v in GPU_OPTIONS.items() if k not in told}
    while True:
        try:
            return lowered.compile(compiler_options=options or None)
        except jax.errors.JaxRuntimeError as error:
            unknown = [name for name in options if name in str(error) and "INVALID_ARGUMENT" in str(error)]
            if not unknown:
                raise
            options = {name: value for name, value in options.items() if name not in unknown}


class Compiled:
    """`function(*arguments, **static)`, written for one run, compiled for all of them.

    Arguments are known by name. One whose name is in `shared` is the same for all runs; all others, and the
    results, have a leading axis of runs. A first argument called `state` gives its memory to the results.
    Keyword arguments are compile-time constants: each new combination compiles once, ahead of time;
    `compile_seconds` and `run_seconds` add up what compiling and running took. `options` are those of XLA's
    compiler. One keyword is the caller's own: `only` names the one field of the result that is wanted. Then
    the rest of it is neither computed nor held in memory.

    If there is `room` for fewer runs than are given, they take turns on the devices, so many at once. The
    results are then NumPy arrays on the host.
    """

    def __init__(
        self,
        function: Callable,
        mesh: Mesh,
        shared: tuple[str, ...] = SHARED,
        room: int | None = None,
        options: dict[str, Any] | None = None,
    ):
        self.function, self.mesh, self.shared, self.room = function, mesh, shared, room
        self.options = options
        self.names = [
            p.name for p in inspect.signature(function).parameters.values() if p.kind != p.KEYWORD_ONLY
        ]
        self.donated = (0,) if self.names[0] == "state" else ()
        self.programs: dict = {}
        self.compile_seconds = self.run_seconds = 0.0

    def program(self, *arguments, only: str = "", **static):
        """The executable for arguments of these shapes; it also tells its memory (`memory_analysis()`)."""
        key = (only, *sorted(static.items()))
        if key not in self.programs:
            began = time.perf_counter()
            axes = self._axes(arguments)
            function, specs = (
                partial(_field_of, self.function, only, static),
                tuple(EVERYWHERE if a is None else RUNS for a in axes),
            )
            if jax.config.jax_disable_jit:  # to step through with a debugger
                self.programs[key] = at_once(function, axes)
                return self.programs[key]
            with usual_promotion():
                mapped = self._for_runs(function, arguments, axes)
                sharded = jax.shard_map(
                    mapped, mesh=self.mesh, in_specs=specs, out_specs=RUNS, check_vma=False
                )
                program = jax.jit(sharded, donate_argnums=self.donated, compiler_options=self.options)
                lowered = program.lower(*arguments)
                self.programs[key] = compile_for(lowered, self.mesh.devices.flat[0].platform)
            self.compile_seconds += time.perf_counter() - began
        return self.programs[key]

    def _for_runs(self, function: Callable, arguments: tuple, axes: tuple[int | None, ...]) -> Callable:
        """`function` for all runs of a device, in the way that is fastest there."""
        if self.mesh.devices.flat[0].platform != "cpu":
            return at_once(function, axes)
        function, calls_host = traced(function, arguments, axes)
        return at_once(function, axes) if calls_host else in_turn(function, axes, bool(self.donated))

    def __call__(self, *arguments, **static):
        arguments = [
            place(jnp.int32(x), self.mesh, EVERYWHERE) if isinstance(x, int) else x for x in arguments
        ]
        if self.room and self.room < (num_runs := _count(arguments, self._axes(arguments))):
            return self._in_turns(arguments, static, num_runs)
        return self._run(arguments, static)

    def _axes(self, arguments: Sequence) -> tuple[int | None, ...]:
        return tuple(None if name in self.shared else 0 for name in self.names[: len(arguments)])

    def _in_turns(self, arguments: Sequence, static: dict, num_runs: int):
        """`room` runs, then the next ones. What there is of the others waits in the memory of the host."""
        axes, results = self._axes(arguments), None
        arguments = [
            a if axis is None else jax.tree.map(processes.on_host, a) for a, axis in zip(arguments, axes)
        ]
        for start in range(0, num_runs, self.room):
            rows = slice(start, min(start + self.room, num_runs))
            own = [
                a
                if axis is None
                else place(jax.tree.map(partial(_rows, rows, self.room), a), self.mesh, RUNS)
                for a, axis in zip(arguments, axes)
            ]
            found = real(self._run(own, static), rows.stop - start)
            if results is None:
                results = jax.tree.map(lambda x: np.empty((num_runs, *x.shape[1:]), x.dtype), found)
            jax.tree.map(lambda all_, new, rows=rows: all_.__setitem__(rows, new), results, found)
        return results

    def _run(self, arguments: Sequence, static: dict):
        program = self.program(*arguments, **static)
        began = time.perf_counter()
        with usual_promotion():
            results = jax.block_until_ready(program(*arguments))
        self.run_seconds += time.perf_counter() - began
        return results


def _field_of(function: Callable, only: str, static: dict, *arguments):
    """What `function` returns; of it one field, if `only` names one."""
    result = function(*arguments, **static)
    return getattr(result, only) if only else result


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
