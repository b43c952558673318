"""How fast IQL trains, offline and online, against the usual way of writing it (usual_way.py), on whatever
device JAX finds.

Our phases are `iql.pretrain_chunk` and `iql.finetune_chunk`, compiled and called as the script does: all
seeds in one program. The usual way trains its seeds one after another, so its rate does not depend on their
number and is measured with one. Both do the same work: offline 17 observations, 6 actions and 100,000
random rows; online the point mass with 8 environments and no offline rows; networks, batch size and updates
per step alike. On a CPU a third contestant takes all seeds at once on one device: our program without what
`data/runs/program.py` does for CPUs. Compilation is not part of any rate. Repeats of all alternate, so that
a machine that others use too treats them alike; the table shows the best, the JSON file all.

    python tests/benchmarks/throughput.py --json out.json
    python tests/benchmarks/throughput.py --hidden 256 --seeds 16
"""

import contextlib
import json
import os
import pathlib
import platform
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import tyro
import usual_way
from rich.console import Console
from rich.table import Table

from ooo_rl import envs
from ooo_rl.algos import iql
from ooo_rl.data.buffer import Transition
from ooo_rl.data.modes import use_all_cores
from ooo_rl.data.runs.program import EVERYWHERE, RUNS, Compiled, at_once, mesh_for, place
from ooo_rl.data.runs.session import Static
from ooo_rl.data.runs.sweep import grid

OBS, ACTION, ROWS, NUM_ENVS, RING = 17, 6, 100_000, 8, 100_000
PHASES = {"offline": None, "online, utd 1/8": 0.125, "online, utd 1": 1.0}  # updates per environment step

if __name__ == "__main__":
    use_all_cores()  # as the scripts do, before JAX is asked for its devices


@dataclass(frozen=True)
class Args:
    """Throughput of IQL, ours against the usual way."""

    hidden: tuple[int, ...] = (64, 256)
    """units of both hidden layers"""
    seeds: tuple[int, ...] = (1, 4, 16) if jax.default_backend() == "cpu" else (1, 4, 16, 64)
    """seeds trained side by side"""
    updates: int = 512 if jax.default_backend() == "cpu" else 4_096
    """updates, of all seeds together, in one call of our program, at least 16 of each seed; calls are
    repeated to fill --seconds
    """
    seconds: float = 0.5
    """least length of one measurement"""
    repeats: int = 3
    """measurements of each rate"""
    lock: str = ""
    """file that several benchmarks name which run side by side: they compile at once and measure in turns"""
    json: str = ""
    """write settings, machine and all measurements to this file"""


@contextlib.contextmanager
def turn(lock: str):
    """Waits until no other process is within a `turn` of the same file; without a name, does not wait."""
    if not lock:
        yield
        return
    import fcntl  # not on Windows

    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


class AtOnce(Compiled):
    """All runs of a device at once, on a CPU too."""

    def _for_runs(self, function, arguments, axes):
        return at_once(function, axes)


class Ours:
    """One phase of IQL for `num_seeds` seeds, compiled; `measure` goes on training and returns seed-updates
    per second. With `plain`, all seeds are taken at once, on one device.
    """

    def __init__(
        self,
        hidden: int,
        num_seeds: int,
        utd_ratio: float | None,
        updates: int,
        offline: Transition,
        plain: bool = False,
    ):
        compiled = AtOnce if plain else Compiled
        shared = {"hidden": (hidden, hidden), "num_seeds": num_seeds}
        if utd_ratio is None:
            args, per_step = iql.Args(env="none", dataset="rows.npz", online_steps=0, **shared), 1
        else:
            online = {"num_envs": NUM_ENVS, "utd_ratio": utd_ratio, "buffer_size": RING}
            args = iql.Args(env="point-mass-wall", dataset="none", offline_steps=0, **online, **shared)
            per_step = round(NUM_ENVS * utd_ratio)
        env = envs.make(args.env) if utd_ratio is not None else None
        obs_size, action_size = (env.observation_size, env.action_size) if env else (OBS, ACTION)
        obs, action, scalar = jnp.zeros(obs_size), jnp.zeros(action_size), jnp.float32(0)
        nets = iql.make_nets(SimpleNamespace(args=args, env=env, action_size=action_size))
        static = Static(args, env, Transition(obs, action, scalar, obs, scalar), nets)
        self.mesh = mesh_for(num_seeds, jax.devices()[:1] if plain else None)
        hyper, labels = grid(args)
        keys = place(jnp.stack([jax.random.PRNGKey(label.seed) for label in labels]), self.mesh, RUNS)
        self.state = compiled(partial(iql.init_state, static), self.mesh)(keys)
        self.hyper, self.online = place(hyper, self.mesh, RUNS), utd_ratio is not None
        self.offline = None if self.online else place(offline, self.mesh, EVERYWHERE)
        chunk = iql.finetune_chunk if self.online else iql.pretrain_chunk
        self.program = compiled(partial(chunk, static), self.mesh)
        self.length = max(updates // num_seeds, 16) // per_step
        self.updates_per_call, self.collected = num_seeds * self.length * per_step, 0
        self.call()  # compiles

    def call(self) -> None:
        arguments = (self.state, self.hyper, self.offline) + ((self.collected,) if self.online else ())
        self.state, metrics = self.program(*arguments, length=self.length)
        self.collected += NUM_ENVS * self.length
        if np.any(np.asarray(metrics["nonfinite_at"]) >= 0):
            raise FloatingPointError("training diverged, so its speed means nothing")

    def measure(self, seconds: float) -> float:
        calls, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            self.call()
            calls += 1
        return calls * self.updates_per_call / elapsed

    def memory(self) -> dict[str, int]:
        """Bytes: what the program holds while it runs, and the most that process and device (GPUs only) have
        held so far.
        """
        (program,) = self.program.programs.values()
        plan = program.memory_analysis()
        held = (
            plan.argument_size_in_bytes
            + plan.temp_size_in_bytes
            + plan.output_size_in_bytes
            - plan.alias_size_in_bytes
        )
        device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        return {
            "program": held,
            "process_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "device_peak": device,
        }


def usual(hidden: int, utd_ratio: float | None, updates: int) -> dict:
    """One measurement of the usual way."""
    if utd_ratio is None:
        return usual_way.measure_offline(hidden, 1, OBS, ACTION, updates, ROWS)
    rounds = max(round(updates / (NUM_ENVS * utd_ratio)), 1)
    return usual_way.measure_online(hidden, 1, NUM_ENVS, rounds * NUM_ENVS, utd_ratio)


def compare(args: Args, hidden: int, phase: str, offline: Transition, ceiling: float) -> list[dict]:
    """One row per number of seeds."""
    utd_ratio = PHASES[phase]
    ours = {n: Ours(hidden, n, utd_ratio, args.updates, offline) for n in args.seeds}
    memory = {n: program.memory() for n, program in ours.items()}
    plain, on_cpu = {}, jax.default_backend() == "cpu"
    if on_cpu:
        plain = {n: Ours(hidden, n, utd_ratio, args.updates, offline, plain=True) for n in args.seeds}
    flops = usual_way.iql_flops(hidden, *((OBS, ACTION) if utd_ratio is None else (2, 2)))
    updates = round(
        args.seconds * min(1000, 0.2 * ceiling / flops)
    )  # of the usual way: about what it does in args.seconds
    rates, plain_rates, theirs = {n: [] for n in args.seeds}, {n: [] for n in args.seeds}, []
    with turn(args.lock):
        for _ in range(args.repeats):
            for n, program in ours.items():
                rates[n].append(program.measure(args.seconds))
                if on_cpu:
                    plain_rates[n].append(plain[n].measure(args.seconds))
            theirs.append(usual(hidden, utd_ratio, updates))
    usual_rates = [run["seed_updates_per_second"] for run in theirs]
    rows = []
    for n in args.seeds:
        best, usual_best = max(rates[n]), max(usual_rates)
        row = {
            "phase": phase,
            "hidden": hidden,
            "seeds": n,
            "devices": ours[n].mesh.size,
            "updates_per_call": ours[n].updates_per_call,
        }
        row |= {
            "seed_updates_per_second": {"best": best, "median": statistics.median(rates[n]), "all": rates[n]}
        }
        row |= {
            "usual_seed_updates_per_second": {
                "best": usual_best,
                "median": statistics.median(usual_rates),
                "all": usual_rates,
            }
        }
        row |= {
            "ratio": best / usual_best,
            "ratio_of_medians": statistics.median(rates[n]) / statistics.median(usual_rates),
        }
        if on_cpu:
            row |= {"at_once_seed_updates_per_second": {"best": max(plain_rates[n]), "all": plain_rates[n]}}
            row |= {"ratio_to_at_once": best / max(plain_rates[n])}
        if utd_ratio is not None:
            row |= {
                "env_steps_per_second": best / utd_ratio,
                "usual_env_steps_per_second": usual_best / utd_ratio,
            }
        row |= {
            "compile_seconds": ours[n].program.compile_seconds,
            "usual_compile_seconds": min(run["compile_seconds"] for run in theirs),
        }
        row |= {"memory_bytes": memory[n], "share_of_ceiling": best * flops / ceiling}
        rows.append(row)
    return rows


def machine() -> dict:
    """What the numbers depend on, besides the code."""
    cpu = pathlib.Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    device = jax.devices()[0]
    return {
        "backend": jax.default_backend(), "device": device.device_kind, "devices": jax.device_count(),
        "cpu": (names or [platform.processor()])[0], "cores": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
        "python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }  # fmt: skip


def show(console: Console, rows: list[dict]) -> None:
    """The rows of one phase."""
    table = Table(title=rows[0]["phase"])
    for name in (
        "hidden",
        "seeds",
        "updates/s",
        "at once",
        "ratio",
        "usual",
        "ratio",
        "env steps/s",
        "usual",
        "ratio",
        "compile s",
        "memory MB",
        "of ceiling",
    ):
        table.add_column(name, justify="right")
    for i, row in enumerate(rows):
        steps = [
            f"{row[key]:,.0f}" for key in ("env_steps_per_second", "usual_env_steps_per_second") if key in row
        ]
        steps = [*steps, f"{row['ratio']:.2f}"] if steps else ["", "", ""]
        ours, theirs = row["seed_updates_per_second"]["best"], row["usual_seed_updates_per_second"]["best"]
        memory = max(row["memory_bytes"]["program"], row["memory_bytes"]["device_peak"]) / 1e6
        plain = row.get("at_once_seed_updates_per_second")
        plain = [f"{plain['best']:,.0f}", f"{row['ratio_to_at_once']:.2f}"] if plain else ["", ""]
        cells = [
            row["hidden"],
            row["seeds"],
            f"{ours:,.0f}",
            *plain,
            f"{theirs:,.0f}",
            f"{row['ratio']:.2f}",
            *steps,
        ]
        cells += [f"{row['compile_seconds']:.1f}", f"{memory:,.1f}", f"{row['share_of_ceiling']:.1%}"]
        table.add_row(
            *map(str, cells), end_section=i + 1 == len(rows) or rows[i + 1]["hidden"] != row["hidden"]
        )
    console.print(table)


def main() -> None:
    args, began = tyro.cli(Args), time.perf_counter()
    console = Console() if sys.stdout.isatty() else Console(width=140)
    here, command = machine(), " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    versions = ", ".join(f"{name} {here[name]}" for name in ("jax", "jaxlib", "numpy", "python"))
    device = f"{here['devices']} x {here['device']} ({here['backend']})"
    console.print(f"{device}; host {here['cpu']}, {here['cores']} cores; {versions}", highlight=False)
    ceiling = max(usual_way.matmul_ceiling(hidden) for hidden in args.hidden)
    console.print(
        f"fastest float32 matrix product of one device: {ceiling / 1e9:,.1f} GFLOP/s", highlight=False
    )

    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.uniform(-1, 1, shape).astype(np.float32)  # noqa: E731
    offline = Transition(
        draw(ROWS, OBS), draw(ROWS, ACTION), draw(ROWS), draw(ROWS, OBS), np.ones(ROWS, np.float32)
    )
    result = {
        "command": command,
        "settings": vars(args),
        "machine": here,
        "ceiling_flops": ceiling,
        "rows": [],
    }
    for phase in PHASES:
        with console.status(phase):
            rows = [row for hidden in args.hidden for row in compare(args, hidden, phase, offline, ceiling)]
        show(console, rows)
        result["rows"] += rows
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    peak = result["rows"][-1]["memory_bytes"]["process_peak"]
    console.print(
        f"updates/s: of all seeds, best of {args.repeats}. The process held {peak / 1e6:,.0f} MB at most.",
        highlight=False,
    )
    console.print(f"{command}: {time.perf_counter() - began:.0f} s", highlight=False)


if __name__ == "__main__":
    main()
