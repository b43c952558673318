"""What prioritised sampling costs beside uniform sampling, and why the tree has the width that it has.

A step draws a batch, gathers its rows and gives them new priorities; a uniform one draws and gathers. The
contestants: trees of several widths, where 2 is the classical sum tree, and a cumulative sum over all
priorities, made anew for each batch. Seeds are vmapped. Repeats take turns, and the best of each counts; on a
CPU, the least CPU time, which other jobs disturb less.

    python tests/benchmarks/priorities.py
    PYTHONPATH=cuda_compiler python tests/benchmarks/priorities.py --card h100 --seeds 1 16

With --card nothing runs: the second command counts what a step would do on that GPU, as gpu_cost.py does.
"""

import sys
import time
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from ooo_rl.data import buffer, priorities
from ooo_rl.data.buffer import Transition
from ooo_rl.data.runs.program import EVERYWHERE, RUNS, Compiled


@dataclass(frozen=True)
class Args:
    """Prioritised sampling against uniform sampling."""

    rows: tuple[int, ...] = (100_000, 1_250_000)
    """rows that can be drawn"""
    seeds: tuple[int, ...] = (1, 4)
    """seeds side by side, each with priorities of its own"""
    widths: tuple[int, ...] = (2, 16, 64, 128)
    """widths of trees"""
    batch_size: int = 256
    """rows of a batch"""
    steps: int = 200
    """batches in one call"""
    repeats: int = 5
    """calls of each contestant"""
    card: str = ""
    """count for this GPU instead of running here"""


def uniform(key, tree, batch_size):
    return jax.random.randint(key, (batch_size,), 0, tree.size), lambda new: tree


def cumulative(key, tree, batch_size):
    reach = jnp.cumsum(tree)
    index = jnp.searchsorted(reach, reach[-1] * jax.random.uniform(key, (batch_size,)), side="right")
    return index, lambda new: tree.at[index].set(new)


def by_tree(key, tree, batch_size):
    index = priorities.draw(tree, (batch_size,), key)
    return index, lambda new: priorities.update(tree, index, new)


def chunk(way, batch_size, state, rows, *, length):
    """`length` steps; new priorities come from the rows, so nothing can be left out."""

    def step(carry, _):
        tree, key = carry
        key, own = jax.random.split(key)
        index, refreshed = way(own, tree, batch_size)
        batch = buffer.take(rows, None, index)
        new = jnp.abs(batch.reward) + 0.1
        return (refreshed(new), key), sum(x.mean() for x in jax.tree.leaves(batch))

    return jax.lax.scan(step, state, None, length)


def contestants(args: Args, num_rows: int):
    """Name -> (way of sampling, a function that makes the priorities of one seed)."""
    flat = lambda: jnp.ones(num_rows)  # noqa: E731
    found = {"uniform": (uniform, flat), "cumulative sum": (cumulative, flat)}

    def tree(width):
        return priorities.create(jnp.ones(num_rows), width)

    return found | {f"tree of width {w}": (by_tree, partial(tree, w)) for w in args.widths}


def start(make, seeds: int):
    keys = jax.random.split(jax.random.PRNGKey(0), seeds)
    return jax.vmap(lambda key: (make(), key))(keys)


def rows_of(num_rows: int) -> Transition:
    ones = partial(jnp.ones, dtype=jnp.float32)
    reward = jnp.linspace(0, 1, num_rows)
    return Transition(ones((num_rows, 17)), ones((num_rows, 6)), reward, ones((num_rows, 17)), ones(num_rows))


def times(args: Args, num_rows: int, seeds: int) -> dict[str, float]:
    """Microseconds per step of one seed."""
    rows, ways, best = rows_of(num_rows), contestants(args, num_rows), {}
    programs, clock = {}, time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    for name, (way, make) in ways.items():
        mapped = jax.vmap(partial(chunk, way, args.batch_size, length=args.steps), in_axes=(0, None))
        state = start(make, seeds)
        program = jax.jit(mapped, donate_argnums=0).lower(state, rows).compile()
        programs[name] = [program, state]
    for _ in range(args.repeats + 1):  # the first one warms up
        for name, (program, state) in programs.items():
            began = clock()
            state, _ = jax.block_until_ready(program(state, rows))
            best.setdefault(name, []).append(clock() - began)
            programs[name][1] = state
    return {name: 1e6 * min(took[1:]) / args.steps / seeds for name, took in best.items()}


def counts(args: Args, num_rows: int, seeds: int, card) -> dict[str, dict]:
    """What a step of all seeds would do on a GPU."""
    import gpu_programs

    found = {}
    for name, (way, make) in contestants(args, num_rows).items():

        def steps(state, offline, *, length, way=way):
            return chunk(way, args.batch_size, state, offline, length=length)

        state = gpu_programs.shapes(jax.eval_shape(partial(start, make, seeds)), card.mesh, RUNS)
        rows = gpu_programs.shapes(jax.eval_shape(partial(rows_of, num_rows)), card.mesh, EVERYWHERE)
        program = gpu_programs.Program(
            name, seeds, Compiled(steps, card.mesh), [state, rows], {"length": args.steps}, args.steps
        )
        found[name] = gpu_programs.cost(program, card, (4, 4)).step
    return found


def main() -> None:
    args, console = tyro.cli(Args), Console()
    card = None
    if args.card:
        jax.config.update("jax_platforms", "cpu")
        from gpu_programs import Card  # which needs XLA's compiler for CUDA

        card = Card(args.card)
    for num_rows in args.rows:
        for seeds in args.seeds:
            table = Table(
                title=f"{num_rows:,} rows, {seeds} seed{'s' * (seeds > 1)}, batch {args.batch_size}"
            )
            if card:
                for column in ("way", "launches", "copies", "waits", "µs, low", "µs, high"):
                    table.add_column(column, justify="right")
                for name, step in counts(args, num_rows, seeds, card).items():
                    whole = [f"{step.get(column, 0):,}" for column in ("launches", "copies", "waits")]
                    micro = [f"{1e6 * step.get(bound, 0):,.1f}" for bound in ("low", "high")]
                    table.add_row(name, *whole, *micro)
            else:
                for column in ("way", "µs per batch and seed", "to uniform"):
                    table.add_column(column, justify="right")
                found = times(args, num_rows, seeds)
                for name, micro in found.items():
                    table.add_row(name, f"{micro:,.1f}", f"{micro / found['uniform']:.2f}")
            console.print(table)
    console.print(" ".join(["python", *sys.argv]), highlight=False)


if __name__ == "__main__":
    main()
