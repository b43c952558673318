"""Turns the function of one run into one compiled program for all runs: vmapped over seeds and settings, sharded over devices."""

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RUNS, EVERYWHERE = PartitionSpec("runs"), PartitionSpec()


def mesh_for(num_runs: int) -> Mesh:
    """The visible devices in a row; only as many as divide `num_runs`, so that each holds as many runs as the others."""
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if num_runs % n == 0)
    return Mesh(devices[:count], ("runs",))


def place(tree, mesh: Mesh, spec: PartitionSpec):
    """`tree` on the devices: with RUNS its leading axis is split among them, with EVERYWHERE each holds it whole."""
    return jax.device_put(tree, NamedSharding(mesh, spec))


class Compiled:
    """`function(*arguments, **static)`, written for one run, compiled for all of them.

    Every argument has a leading axis of runs, but for those whose position is in `shared`; results have it too. Arguments
    in `donate` give their memory to the results. Keyword arguments are compile-time constants: each new combination
    compiles once, ahead of time; `compile_seconds` and `run_seconds` add up what compiling and running took.

    `in_turn` computes one run after the other on each device instead of vmapping. Initialisation needs it: batched QR
    decompositions (orthogonal initialisers) that run at the same time can deadlock XLA's CPU thread pool.
    """

    def __init__(self, function: Callable, mesh: Mesh, shared: tuple[int, ...] = (), donate: tuple[int, ...] = (), in_turn: bool = False):
        self.function, self.mesh, self.shared, self.donate, self.in_turn = function, mesh, shared, donate, in_turn
        self.programs: dict = {}
        self.compile_seconds = self.run_seconds = 0.0

    def program(self, *arguments, **static):
        """The executable for arguments of these shapes: also tells its memory (`memory_analysis()`) and text."""
        key = tuple(sorted(static.items()))
        if key not in self.programs:
            began = time.perf_counter()
            axes = tuple(None if i in self.shared else 0 for i in range(len(arguments)))
            function = partial(self.function, **static)
            mapped = partial(_in_turn, function, axes) if self.in_turn else jax.vmap(function, in_axes=axes)
            specs = tuple(EVERYWHERE if axis is None else RUNS for axis in axes)
            sharded = jax.shard_map(mapped, mesh=self.mesh, in_specs=specs, out_specs=RUNS, check_vma=False)
            self.programs[key] = jax.jit(sharded, donate_argnums=self.donate).lower(*arguments).compile()
            self.compile_seconds += time.perf_counter() - began
        return self.programs[key]

    def __call__(self, *arguments, **static):
        arguments = [place(jnp.int32(x), self.mesh, EVERYWHERE) if isinstance(x, int) else x for x in arguments]
        program = self.program(*arguments, **static)
        began = time.perf_counter()
        results = jax.block_until_ready(program(*arguments))
        self.run_seconds += time.perf_counter() - began
        return results


def _in_turn(function: Callable, axes: tuple, *arguments):
    mapped = [x for x, axis in zip(arguments, axes) if axis == 0]

    def one_run(own):
        own = iter(own)
        return function(*(next(own) if axis == 0 else x for x, axis in zip(arguments, axes)))

    return jax.lax.map(one_run, mapped)


def scan_mean(step: Callable, carry, length: int):
    """`lax.scan` of `step(carry) -> carry, metrics`, keeping the mean of each metric instead of one value per step.

    Also reports `nonfinite_at`: the first step one of whose metrics was NaN or infinite, -1 if none was.
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
