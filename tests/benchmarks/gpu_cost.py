"""What every compiled program would do on a GPU, found on a machine without one.

XLA compiles for a described card (tests/benchmarks/gpus) and writes down what it would have the card do. We
count this for each program of each method, and for a step of each body on MJX: launches, those outside CUDA
graphs, launches of graphs, times that the host waits, copies and memory. The counts are exact, but for loops
whose iterations depend on data; there --loops is assumed. The times are estimates.
docs/speed.md has the assumptions, the results, and how to install XLA's compiler for CUDA.

    python tests/benchmarks/gpu_cost.py --json out.json
    python tests/benchmarks/gpu_cost.py --methods iql --bodies --programs finetune_chunk --check
    python tests/benchmarks/gpu_cost.py --methods --bodies halfcheetah --worlds 64 1024 --card h200

With --check it also holds each step against tests/benchmarks/gpu_bounds.json: every rule whose pattern and
width fit a program. It fails if a number is beyond its bound. XLA_FLAGS are in force, as in a run.
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import gpu_programs  # before JAX, which it tells to stay on the CPU
import jax
import tyro
from gpu_programs import Card, Program
from gpu_thunks import COSTS, MEASURES
from methods import METHODS
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from throughput import machine

from ooo_rl import envs
from ooo_rl.data.errors import UsageError, guarded

BOUNDS = pathlib.Path(__file__).parent / "gpu_bounds.json"


@dataclass(frozen=True)
class Args:
    """Launches, CUDA graphs, host waits, copies and memory of every program, on a GPU that is not there."""

    card: str = "h100"
    """h100, h200, a100, or a file that describes another card"""
    methods: tuple[str, ...] = METHODS
    """scripts of algos/"""
    bodies: tuple[str, ...] | None = None
    """environments with a MuJoCo model of which to compile a step; by default one of each model"""
    programs: tuple[str, ...] = ("*",)
    """patterns: of a method's programs by function, such as *_chunk; a body's is called step"""
    seeds: tuple[int, ...] = (1, 16)
    """seeds side by side in a method's program"""
    worlds: tuple[int, ...] = (64,)
    """worlds side by side in a body's step"""
    env: str = "point-mass-wall"
    """environment of the methods; of those with discrete actions it is the toy maze"""
    hidden: tuple[int, ...] | None = None
    """units of the hidden layers of all networks; by default each script's own"""
    num_envs: int | None = None
    """environments per seed; by default each script's own number"""
    utd_ratio: float | None = None
    """updates per environment step; by default each script's own number"""
    loops: tuple[int, ...] = (4, 4)
    """assumed iterations of a loop that ends when its data say so, and of one inside it: Newton's, and the
    line search's, which makes five turns in each"""
    check: bool = False
    """fail if a program goes beyond the bounds in tests/benchmarks/gpu_bounds.json"""
    json: str = ""
    """write settings, assumptions and all counts to this file"""


def programs(args: Args, card: Card) -> Iterator[Program]:
    """All that the settings ask for."""
    phases = {
        "offline_steps": 100_000,
        "online_steps": 800_000,
        "retrain_steps": 100_000,
    }  # all that there are
    place = {"env": args.env, "physics": gpu_programs.physics_of(args.env)}
    own = {
        "hidden": args.hidden,
        "critic_hidden": args.hidden,
        "num_envs": args.num_envs,
        "utd_ratio": args.utd_ratio,
    }
    settings = phases | place | {name: value for name, value in own.items() if value is not None}
    asked = lambda name: any(fnmatch(name.partition("/")[2], pattern) for pattern in args.programs)  # noqa: E731
    for method, seeds in itertools.product(args.methods, args.seeds):
        for program in gpu_programs.of_method(method, card, seeds, **settings):
            if asked(program.name):
                yield program
    for body in gpu_programs.bodies() if args.bodies is None else args.bodies:
        for worlds in args.worlds if asked(f"{body}/step") else ():
            yield gpu_programs.of_body(body, card, worlds)


def measure(program: Program, card: Card, loops: tuple[int, ...]) -> dict[str, Any]:
    """The counts of a step, its times in microseconds, and what holds for the whole program; or the error."""
    start = {"program": program.name, "width": program.width}
    try:
        cost = gpu_programs.cost(program, card, loops)
    except Exception as error:  # the others are counted all the same
        traceback.print_exc()
        return start | {"error": f"{type(error).__name__}: {error}"}
    step = {measure: cost.step.get(measure, 0) for measure in MEASURES}
    times = {f"{bound}_us": round(1e6 * cost.step.get(bound, 0), 1) for bound in COSTS}
    whole = {"whole_launches": cost.whole.get("launches", 0), "whole_waits": cost.whole.get("waits", 0)}
    memory = {f"{part}_bytes": size for part, size in cost.memory.items()}
    rest = memory | {"compile_seconds": round(cost.seconds, 1)}
    return start | {"steps": cost.steps} | step | times | whole | rest


def beyond(found: dict, rules: list[dict]) -> list[str]:
    """In words: what a program has more of than the rules allow, or why it has not been compiled."""
    name, width, faults = found["program"], found["width"], []
    if "error" in found:
        return [f"{name} at width {width} was not compiled: {found['error'][:300]}"]
    for rule in rules:
        if fnmatch(name, rule["programs"]) and rule.get("width", width) == width:
            faults += [
                f"{name} at width {width}: {measure} {found[measure]:,} per step, at most {rule[measure]:,}"
                for measure in MEASURES
                if found[measure] > rule.get(measure, math.inf)
            ]
    return faults


def read_bounds(path: pathlib.Path) -> list[dict]:
    """The rules. Raises ValueError for one that bounds nothing, or something unknown."""
    rules = json.loads(path.read_text())
    for rule in rules:
        bounded = set(rule) - {"programs", "width", "why"}
        if "programs" not in rule or not bounded or bounded - set(MEASURES):
            raise ValueError(f"{path}: {rule} needs a pattern `programs` and some of {', '.join(MEASURES)}")
    return rules


def show(console: Console, rows: list[dict], card: str) -> None:
    table = Table(title=f"Per step of the main loop, compiled for {card}; times are estimates")
    counted = ("steps", *MEASURES[:-1])
    for name in ("program", "width", *counted, "copied kB", "estimated µs", "peak MB", "compile s"):
        table.add_column(name, justify="left" if name == "program" else "right")
    for found in rows:
        if "error" in found:
            table.add_row(escape(found["program"]), str(found["width"]), "[bold red]not compiled[/]")
            continue
        counts = [f"{found[name]:,}" for name in counted]
        times, peak = f"{found['low_us']:,.0f} - {found['high_us']:,.0f}", f"{found['peak_bytes'] / 1e6:,.1f}"
        more = (f"{found['copied_bytes'] / 1e3:,.1f}", times, peak, f"{found['compile_seconds']:.0f}")
        table.add_row(escape(found["program"]), str(found["width"]), *counts, *more)
    console.print(table)
    console.print(
        "width: seeds of a method, worlds of a body. outside: launches that no CUDA graph holds. waits: the host "
        "waits for the GPU.",
        highlight=False,
    )


def main() -> None:
    args, began = tyro.cli(Args), time.perf_counter()
    console = Console() if sys.stdout.isatty() else Console(width=150)
    if unknown := [*(set(args.methods) - set(METHODS)), *(set(args.bodies or ()) - set(envs.names()))]:
        raise UsageError(f"there is no method or environment {min(unknown)}")
    jax.config.update("jax_enable_compilation_cache", False)  # what comes out of a cache is not written down
    rules, card, faults = read_bounds(BOUNDS) if args.check else [], Card(args.card), []
    command = " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    assumed = {"costs_us": {name: dataclasses.asdict(costs) for name, costs in COSTS.items()}}
    assumed |= {
        "loops": args.loops,
        "options": card.options,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
    result = {"command": command, "card": card.name, "settings": dataclasses.asdict(args), "assumed": assumed}
    result |= {"machine": machine(), "rows": []}
    for program in programs(args, card):
        with console.status(f"{program.name}, {program.width}"):
            found = measure(program, card, args.loops)
        faults += beyond(found, rules)
        result["rows"].append(found)
        result["seconds"] = round(time.perf_counter() - began)
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    if not result["rows"]:
        raise UsageError(f"--programs {' '.join(args.programs)}: no program is called so")
    show(console, result["rows"], card.name)
    console.print(f"{command}: {time.perf_counter() - began:.0f} s", highlight=False)
    for fault in faults:
        console.print(f"error: {fault}", markup=False, soft_wrap=True, highlight=False)
    if args.check:
        console.print(f"{len(result['rows'])} programs checked, {len(faults)} faults", highlight=False)
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    guarded(main)
