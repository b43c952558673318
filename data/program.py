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


def for_runs(function: Callable, axes: tuple[int | None, ...]) -> Callable:
    """`jax.vmap(function, axes)`, in which a single run is not batched at all.

    An axis of length one costs time: RLPD's products of ten critics take twice as long with it on a CPU, and a `lax.cond` both ways.
    """

    def mapped(*arguments):
        runs = jax.tree.leaves([a for a, axis in zip(arguments, axes) if axis == 0])[0].shape[0]
        if runs > 1:
            return jax.vmap(function, in_axes=axes)(*arguments)
        alone = [a if axis is None else jax.tree.map(partial(jnp.squeeze, axis=0), a) for a, axis in zip(arguments, axes)]
        return jax.tree.map(lambda x: x[None], function(*alone))

    return mapped


class Compiled:
    """`function(*arguments, **static)`, written for one run, compiled for all of them.

    Every argument has a leading axis of runs, but for those whose position is in `shared`; results have it too. Arguments
    in `donate` give their memory to the results. Keyword arguments are compile-time constants: each new combination
    compiles once, ahead of time; `compile_seconds` and `run_seconds` add up what compiling and running took.
    """

    def __init__(self, function: Callable, mesh: Mesh, shared: tuple[int, ...] = (), donate: tuple[int, ...] = ()):
        self.function, self.mesh, self.shared, self.donate = function, mesh, shared, donate
        self.programs: dict = {}
        self.compile_seconds = self.run_seconds = 0.0

    def program(self, *arguments, **static):
        """The executable for arguments of these shapes: also tells its memory (`memory_analysis()`) and text."""
        key = tuple(sorted(static.items()))
        if key not in self.programs:
            began = time.perf_counter()
            axes = tuple(None if i in self.shared else 0 for i in range(len(arguments)))
            mapped = for_runs(partial(self.function, **static), axes)
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


def orthogonal(scale: float) -> Callable:
    """Flax initialiser: `scale` times a random (semi-)orthogonal matrix, as the polar factor of a Gaussian one.

    The usual initialiser takes the Q of a QR decomposition, with the same distribution; but several batched QRs in one
    program, which vmapped seeds make, can deadlock XLA's CPU thread pool (seen with jax 0.10.2 on two cores). Newton's
    iteration for the polar factor needs matrix products only. Its columns are orthonormal to about 1e-6.
    """

    def init(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
        tall, thin = max(shape), min(shape)
        # Divided by the largest singular value to be expected, all singular values lie where the iteration converges.
        start = jax.random.normal(key, (tall, thin), dtype) / (1.1 * (tall**0.5 + thin**0.5))
        product = partial(jnp.matmul, precision="highest")
        x = jax.lax.fori_loop(0, 40, lambda _, x: 1.5 * x - 0.5 * product(x, product(x.T, x)), start)
        return scale * (x if shape == (tall, thin) else x.T)

    return init
