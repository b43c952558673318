"""How fast every method trains, phase by phase: one program for all seeds, against one jitted update per
Python step.

Each script of algos/ compiles its phases in its own `train`. We let it do so without a record on disk, and
keep each compiled phase with the state that it would have started from. *Ours* calls that program on and
on, a chunk of many updates of all seeds at a time. *The usual way* jits the same function for one seed and
one update, batch sampling and, online, a step of all environments included, and calls it from a Python loop
that fetches nothing; its seeds train one after another, so its rate does not depend on their number. Both
do the same arithmetic. To jit a script's `update` alone and to sample on the host, as people do, would be
slower: by CPU time 1.3 times for IQL and SAC. (In retraining, each call of the usual way also looks through
all rewards once, which ours does once per chunk; --rows is small for that reason.)

Networks, batches, environments and one update per step of all environments are alike in all methods; all
else is as each script has it. A table also tells whether twenty updates per environment step (RLPD) cost
more than twenty single ones. Compilation is part of no rate and is timed apart, without a cache. Repeats
alternate, so that a machine that others use too treats both alike; the table shows the best, the JSON file
all.

    python tests/benchmarks/methods.py --json out.json
    python tests/benchmarks/methods.py --methods iql sac --hidden 256 --seeds 16
    python tests/benchmarks/methods.py --methods off2onrl --change num_members=1 replay=uniform
"""

import ast
import contextlib
import importlib
import io
import json
import os
import pathlib
import statistics
import sys
import time
import traceback
from dataclasses import asdict, dataclass, fields
from functools import partial
from types import ModuleType
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from throughput import machine, turn

from ooo_rl.data.runs import session
from ooo_rl.data.runs.program import Compiled
from ooo_rl.data.runs.settings import DEFAULT_ENVS

ON_CPU = jax.default_backend() == "cpu"
ALGOS = pathlib.Path(__file__).parents[2] / "algos"
METHODS = tuple(sorted(path.stem for path in ALGOS.glob("*.py") if path.stem != "__init__"))
COMPILE_LIMIT = 60.0  # seconds, for one phase
MANY = 20  # updates per environment step, in RLPD


@dataclass(frozen=True)
class Args:
    """Speed and compile time of every method in every phase."""

    methods: tuple[str, ...] = METHODS
    """scripts of algos/"""
    seeds: tuple[int, ...] = (1, 4, 16) if ON_CPU else (1, 4, 16, 64)
    """seeds trained side by side"""
    hidden: tuple[int, ...] = (64,) if ON_CPU else (256,)
    """units of both hidden layers"""
    change: tuple[str, ...] = ()
    """settings of the scripts that are not their own, as name=value: what does a part of a method cost?"""
    env: str = "point-mass-wall"
    """environment to act in, and whose own dataset to learn from; discrete actions: the toy maze"""
    num_envs: int = 8
    """environments per seed, with one update after each step of all of them"""
    rows: int = 16_000
    """online rows that the buffer holds, a multiple of num_envs"""
    updates: int = 512 if ON_CPU else 4_096
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


class Kept(Compiled):
    """Compiled, keeping what it was first called with, and in which phase. Memory that the call gives away
    is copied.
    """

    compile_cpu_seconds = 0.0
    now = ""  # the phase that is under way

    def program(self, *arguments, **static):
        known, began = len(self.programs), time.process_time()
        program = super().program(*arguments, **static)
        self.compile_cpu_seconds += (time.process_time() - began) * (len(self.programs) > known)
        return program

    def __call__(self, *arguments, **static):
        if "length" in static and not hasattr(self, "first"):
            copied = [jax.tree.map(jnp.copy, x) if i in self.donated else x for i, x in enumerate(arguments)]
            self.first, self.phase = (copied, static), Kept.now
        return super().__call__(*arguments, **static)


class Rehearsal(session.Session):
    """Goes through the plan and leaves nothing on disk."""

    latest = None  # the last one made

    def begin(self, state, act):
        Rehearsal.latest = self
        return state

    def chunks(self):
        for chunk in self.plan:
            Kept.now = chunk.phase
            yield chunk

    def after(self, *_, **__):
        pass

    def conclude(self, *_, **__):
        pass


class Phase:
    """A compiled phase and what its first chunk was called with."""

    def __init__(self, program: Kept, name: str, env_steps: int, updates: int):
        (self.start, *self.rest), self.static = program.first
        self.program, self.name, self.env_steps, self.updates = (
            program,
            name,
            env_steps,
            updates,
        )  # the last two per iteration, of a seed

    def arguments(self, iterations: int) -> list:
        """What follows the state after so many iterations: online, the count of collected rows goes up."""
        return [np.int32(x + iterations * self.env_steps) if isinstance(x, int) else x for x in self.rest]

    def measure(self, seconds: float) -> float:
        """Seed-updates per second of chunk after chunk, from the first state on."""
        state, calls, length = (
            jax.block_until_ready(jax.tree.map(jnp.copy, self.start)),
            0,
            self.static["length"],
        )
        began = time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds or not calls:
            arguments = [int(x) if isinstance(x, np.int32) else x for x in self.arguments(calls * length)]
            state, metrics = self.program(state, *arguments, **self.static)
            calls += 1
            if np.any(np.asarray(metrics["nonfinite_at"]) >= 0):
                raise FloatingPointError(f"{self.name} diverged, so its speed means nothing")
        return calls * length * self.updates * len(metrics["nonfinite_at"]) / elapsed

    def check_that_it_learns(self) -> None:
        """Raises if a chunk leaves all critics as they were: a phase that waits for something has no speed.

        Where there is no critic, the policy is the network of Q-values.
        """
        state, _ = self.program(jax.tree.map(jnp.copy, self.start), *self.rest, **self.static)
        before = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(self.start)}
        learner = "critic" if any("critic" in name for name in before) else "actor"
        after = zip(before.items(), jax.tree.leaves(state))
        if not any(learner in name and np.any(old != new) for (name, old), new in after):
            raise RuntimeError(
                f"{self.name} makes no update in {self.static['length']} steps; which setting keeps it waiting?"
            )


class Usual:
    """The same function for one seed and one update, jitted and called from Python."""

    def __init__(self, phase: Phase):
        self.phase, program, home = phase, phase.program, jax.devices()[0]
        own = [
            x if name in program.shared else jax.tree.map(lambda leaf: leaf[0], x)
            for name, x in zip(program.names, (phase.start, *phase.rest))
        ]
        self.start, *self.rest = (x if isinstance(x, int) else jax.device_put(x, home) for x in own)
        # Not `phase.program`, which maps over seeds and devices: this is what jax.jit alone makes of one
        # update.
        self.step = jax.jit(
            partial(phase.program.function, **{**phase.static, "length": 1}),
            donate_argnums=phase.program.donated,
        )
        self.run(8)  # compiles

    def run(self, calls: int, state=None, done: int = 0):
        state = jax.tree.map(jnp.copy, self.start) if state is None else state
        for i in range(done, done + calls):
            rest = [np.int32(x + i * self.phase.env_steps) if isinstance(x, int) else x for x in self.rest]
            state, metrics = self.step(state, *rest)
        return jax.block_until_ready((state, metrics))

    def measure(self, seconds: float) -> float:
        """Updates per second; the loop waits for the device every 64 calls only."""
        (state, _), done = self.run(8), 8
        began, calls = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - began) < seconds or not calls:
            state, metrics = self.run(64, state, done + calls)
            calls += 64
            if metrics["nonfinite_at"] >= 0:
                raise FloatingPointError(
                    f"{self.phase.name}, the usual way: diverged, so its speed means nothing"
                )
        return calls * self.phase.updates / elapsed


def changed(pairs: tuple[str, ...]) -> dict[str, object]:
    """name=value, ... -> name: value; what is no literal of Python is a string."""
    found = {}
    for name, _, value in (pair.partition("=") for pair in pairs):
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def rehearse(script: ModuleType, args: Args, hidden: int, num_seeds: int, **changes) -> dict[str, Phase]:
    """Phase -> what the script's own `train` makes of it, compiled, for chunks of --updates."""
    settings = {
        "num_envs": args.num_envs,
        "utd_ratio": 1 / args.num_envs,
        "policy_every": 1,
        "retrain_policy_every": 1,
    } | changes
    per_step = round(settings["num_envs"] * settings["utd_ratio"])
    length = max(args.updates // num_seeds, 16)
    length = -(-length // settings["policy_every"]) * settings["policy_every"]  # blocks of updates are whole
    steps = -(-length // per_step)
    env = args.env if script.Args.actions == "continuous" else DEFAULT_ENVS[script.Args.actions]
    settings = {
        "env": env, "num_seeds": num_seeds, "hidden": (hidden, hidden), "critic_hidden": (hidden, hidden),
        "buffer_size": args.rows,
        "offline_steps": length, "online_steps": steps * settings["num_envs"], "retrain_steps": length,
        "random_steps": 0,
        "learning_starts": 0, "eval_every": 10**9, "checkpoint_every": 10**9, **settings, **changed(args.change),
    }  # fmt: skip
    known = {field.name for kind in (script.Args, script.Hyper) for field in fields(kind)}
    if unknown := changed(args.change).keys() - known:
        raise ValueError(f"{script.__name__} has no setting {min(unknown)!r}, which --change names")
    settings = {name: value for name, value in settings.items() if name in known}
    patches = mock.patch.object(script, "Session", Rehearsal), mock.patch.object(session, "Compiled", Kept)
    with patches[0], patches[1], contextlib.redirect_stdout(io.StringIO()):
        script.train(script.Args(**settings))
    programs = {p.phase: p for p in Rehearsal.latest.programs if hasattr(p, "first")}
    online = {"online": (settings["num_envs"], per_step)}
    phases = {
        name: Phase(p, f"{script.__name__}, {name}", *online.get(name, (0, 1)))
        for name, p in programs.items()
    }
    for phase in phases.values():
        phase.check_that_it_learns()
    return phases


def spread(rates: list[float]) -> dict:
    return {"best": max(rates), "median": statistics.median(rates), "all": rates}


def compilation(phase: Phase) -> dict[str, float]:
    """Seconds by the clock, which others on the machine lengthen, and by the processor, on all its cores."""
    return {
        "compile_seconds": phase.program.compile_seconds,
        "compile_cpu_seconds": phase.program.compile_cpu_seconds,
    }


def measure(script: ModuleType, args: Args, hidden: int) -> list[dict]:
    """One row per phase and number of seeds."""
    ours = {n: rehearse(script, args, hidden, n) for n in args.seeds}
    single = ours[1] if 1 in ours else rehearse(script, args, hidden, 1)
    rows = []
    for name, phase in single.items():
        usual, rates, theirs = Usual(phase), {n: [] for n in args.seeds}, []
        with turn(args.lock):
            for _ in range(args.repeats):
                for n in args.seeds:
                    rates[n].append(ours[n][name].measure(args.seconds))
                theirs.append(usual.measure(args.seconds))
        for n in args.seeds:
            row = {"method": script.__name__.split(".")[-1], "phase": name, "hidden": hidden, "seeds": n}
            row |= {"length": ours[n][name].static["length"], "devices": ours[n][name].program.mesh.size}
            row |= {
                "seed_updates_per_second": spread(rates[n]),
                "usual_seed_updates_per_second": spread(theirs),
            }
            row |= {
                "ratio": max(rates[n]) / max(theirs),
                "ratio_of_medians": statistics.median(rates[n]) / statistics.median(theirs),
            }
            rows.append(row | compilation(ours[n][name]))
    return rows


def takes_many(script: ModuleType) -> bool:
    """Whether the script makes many updates after each environment step, in blocks."""
    return script.Args.utd_ratio >= MANY and hasattr(script.Args, "policy_every")


def measure_many(script: ModuleType, args: Args, hidden: int) -> list[dict]:
    """Online with one environment: updates per second at MANY per environment step, and at one, ours and the
    usual way.
    """
    rows = []
    for n in args.seeds:
        rehearsed = partial(rehearse, script, args, hidden, n, num_envs=1, offline_steps=0, retrain_steps=0)
        block = rehearsed(utd_ratio=float(MANY), policy_every=MANY)["online"]
        ones = rehearsed(utd_ratio=1.0)["online"]
        usual, rates = Usual(ones), {"block": [], "single": [], "usual": []}
        with turn(args.lock):
            for _ in range(args.repeats):
                for name, contestant in (("block", block), ("single", ones), ("usual", usual)):
                    rates[name].append(contestant.measure(args.seconds))
        row = {
            "method": script.__name__.split(".")[-1],
            "hidden": hidden,
            "seeds": n,
            "updates_per_step": MANY,
        }
        row |= {f"{name}_seed_updates_per_second": spread(found) for name, found in rates.items()}
        rows.append(
            row | {"cost_in_singles": MANY * max(rates["single"]) / max(rates["block"])} | compilation(block)
        )
    return rows


def show(console: Console, rows: list[dict]) -> None:
    table = Table(title=f"{rows[0]['method']}: updates/s of all seeds")
    for name in ("phase", "hidden", "seeds", "ours", "usual way", "ratio", "compile s", "of CPU time"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for i, row in enumerate(rows):
        ours, theirs, compiling = (
            row["seed_updates_per_second"],
            row["usual_seed_updates_per_second"],
            row["compile_seconds"],
        )
        cells = [
            row["phase"],
            row["hidden"],
            row["seeds"],
            f"{ours['best']:,.0f}",
            f"{theirs['best']:,.0f}",
            f"{row['ratio']:.2f}",
        ]
        late = (
            f"{compiling:.1f}"
            if compiling <= COMPILE_LIMIT
            else f"[bold red]{compiling:.1f} > {COMPILE_LIMIT:g}[/]"
        )
        table.add_row(
            *map(str, cells),
            late,
            f"{row['compile_cpu_seconds']:.1f}",
            end_section=i + 1 == len(rows) or rows[i + 1]["phase"] != row["phase"],
        )
    console.print(table)


def show_many(console: Console, rows: list[dict]) -> None:
    table = Table(
        title=f"{rows[0]['method']}: updates/s online, one environment, {MANY} per step against single ones"
    )
    for name in (
        "hidden",
        "seeds",
        f"{MANY} per step",
        "single",
        "single, usual way",
        f"{MANY} cost as many as",
        "compile s",
        "of CPU time",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        rates = [
            f"{row[f'{name}_seed_updates_per_second']['best']:,.0f}" for name in ("block", "single", "usual")
        ]
        costs = (f"{row[name]:.1f}" for name in ("cost_in_singles", "compile_seconds", "compile_cpu_seconds"))
        table.add_row(str(row["hidden"]), str(row["seeds"]), *rates, *costs)
    console.print(table)


def main() -> None:
    args, began = tyro.cli(Args), time.perf_counter()
    console = Console() if sys.stdout.isatty() else Console(width=140)
    if unknown := set(args.methods) - set(METHODS):
        console.print(f"error: no algos/{min(unknown)}.py; there are {', '.join(METHODS)}", markup=False)
        raise SystemExit(2)
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are of a first run
    here, command = machine(), " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    device = f"{here['devices']} x {here['device']} ({here['backend']})"
    console.print(f"{device}; host {here['cpu']}, {here['cores']} cores; jax {here['jax']}", highlight=False)
    result, failed = (
        {"command": command, "settings": asdict(args), "machine": here, "rows": [], "many": []},
        [],
    )
    for method in args.methods:
        try:
            script = importlib.import_module(f"ooo_rl.algos.{method}")
            for hidden in args.hidden:
                with console.status(f"{method}, {hidden} units"):
                    result["rows"] += (rows := measure(script, args, hidden))
                    many = measure_many(script, args, hidden) if takes_many(script) else []
                    result["many"] += many
                show(console, rows)
                if many:
                    show_many(console, many)
        except Exception:  # the others are measured all the same
            traceback.print_exc()
            failed.append(method)
        if args.json:
            pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    slow = [row for row in result["rows"] + result["many"] if row["compile_seconds"] > COMPILE_LIMIT]
    console.print(
        f"programs that took more than {COMPILE_LIMIT:g} s to compile: {len(slow)} of "
        f"{len(result['rows'] + result['many'])}"
    )
    console.print(f"{command}: {time.perf_counter() - began:.0f} s", highlight=False)
    if failed:
        console.print(f"error: could not measure {', '.join(failed)}", markup=False)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
