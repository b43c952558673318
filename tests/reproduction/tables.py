"""A paper's comparison in small: every method on one task, with one budget, as one table.

    python tests/reproduction/tables.py --task point-mass-wall --out comparison
    python tests/reproduction/tables.py --task maze2d-large-missing-data --methods iql ooo_iql td3 --seeds 5
    python tests/reproduction/tables.py --comparison gde --task hopper-medium

Which runs a comparison has, and their budgets, is in comparisons.py. Each is one run of a script, with its own
settings for all else. An OOO run gives two rows: its explorer is the base method with the bonus, its exploiter
is OOO. What is finished is not run again, and what was interrupted is resumed; so this can be called again and
again. Writes `<out>/<task>.md`, and figures of the bonus (OOO's Figure 3, left), of Q-values in retraining
(Figure 5c) and of success.
"""

import json
import pathlib
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import tyro
from comparisons import BUDGETS, COMPARISONS, MADE_BY, Run, runs_of, sources, words_of

from ooo_rl.data.figures import aggregates
from ooo_rl.data.figures import curves as drawn

REPO = pathlib.Path(__file__).parents[2]


@dataclass(frozen=True)
class Args:
    """Runs all methods on one task and tabulates them."""

    comparison: str = "ooo"
    """which paper's, one of COMPARISONS"""
    task: str = "point-mass-wall"
    """task, one that has BUDGETS"""
    methods: tuple[str, ...] = ()
    """which runs, or scripts of algos/ that have no run here: with their settings for the task; by default
    all runs that have a budget for the task"""
    seeds: int = 3
    """seeds of each"""
    runs_dir: pathlib.Path = pathlib.Path("runs")
    """folder of runs"""
    out: pathlib.Path = pathlib.Path("comparison")
    """folder for the table and the figures"""
    only_table: bool = False
    """run nothing; tabulate what there is"""


def run_of(args: Args, name: str) -> Run:
    """The run of this name, or that of a script with its own settings."""
    return COMPARISONS[args.comparison].get(name, Run(name))


def env_of(args: Args) -> str:
    """The environment of the task."""
    return BUDGETS[args.comparison, args.task].get("ENV", args.task)


def name_of(args: Args, run: str) -> str:
    return f"{args.comparison}-{args.task}-{run}"


def folder_of(args: Args, run: str) -> pathlib.Path:
    return args.runs_dir / run_of(args, run).script / env_of(args) / name_of(args, run)


def script_of(args: Args, run: str) -> pathlib.Path:
    """The script of a run, or where its changed copy is."""
    found = run_of(args, run)
    folder = args.runs_dir / "changed" / name_of(args, run) if found.changes else REPO / "algos"
    return folder / f"{found.script}.py"


def changed(run: Run) -> str:
    """The script of `run` with its changes made; each must fit one place."""
    text = (REPO / f"algos/{run.script}.py").read_text()
    for ours, theirs in run.changes:
        if text.count(ours) != 1:
            raise ValueError(
                f"algos/{run.script}.py has {ours!r} {text.count(ours)} times; a change needs it once"
            )
        text = text.replace(ours, theirs)
    return text


def command(args: Args, run: str) -> list[str]:
    """The command line of one run."""
    words = words_of(args.comparison, args.task, run, lambda other: folder_of(args, other))
    script = str(script_of(args, run))
    return [script, "--env", env_of(args), "--num-seeds", str(args.seeds), *words,
            "--runs-dir", str(args.runs_dir), "--name", name_of(args, run)]  # fmt: skip


def carry_out(args: Args, run: str) -> None:
    """Runs what is missing of a run, and first of those that it starts from."""
    folder = folder_of(args, run)
    if (folder / "result.json").exists():
        return
    if maker := MADE_BY.get((args.comparison, args.task, run)):
        maker = f"python {maker} --runs-dir {args.runs_dir} --seeds {args.seeds}"
        raise SystemExit(f"error: {name_of(args, run)} is not there; make it first: {maker}")
    for source in sources(args.comparison, run):
        carry_out(args, source)
    words = command(args, run)
    if (folder / "config.json").exists():
        words = [words[0], "--resume", str(folder)]
    print(time.strftime("%T"), *words, flush=True)
    if run_of(args, run).changes:
        script_of(args, run).parent.mkdir(parents=True, exist_ok=True)
        script_of(args, run).write_text(changed(run_of(args, run)))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"{name_of(args, run)}.log").open("a") as log:
        code = subprocess.run(
            [sys.executable, *words], stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        print(f"  failed with exit code {code}: {log.name}", flush=True)


def cell(values: list) -> str:
    """IQM and 95 % interval; one seed has no interval."""
    found = aggregates.summarise(np.array([np.nan if v is None else v for v in values], float))
    if not np.isfinite(found["iqm"]):
        return "diverged"
    interval = f" [{found['low']:.2f}, {found['high']:.2f}]" if np.isfinite(found["low"]) else ""
    return f"{found['iqm']:.2f}{interval}"


def ways(crossings: list[dict] | None) -> str:
    """On which side of the wall most paths of each seed pass, such as "under, under, over"; none: they end
    before it.
    """
    return ", ".join(max(seed, key=seed.get) for seed in crossings) if crossings else "-"


def shown(args: Args, run: str) -> str:
    """The command of a run, as one types it; a change is said after it."""
    if maker := MADE_BY.get((args.comparison, args.task, run)):
        return f"python {maker}"
    script, *words = command(args, run)
    return " ".join(["python", f"algos/{pathlib.Path(script).name}", *words, *said(run_of(args, run))])


def said(run: Run) -> list[str]:
    """What a command line says of the changes in its script: nothing, or a comment."""
    return [f"# with {theirs!r} in place of {ours!r}" for ours, theirs in run.changes]


def table(args: Args) -> str:
    """Markdown: one row per policy, IQM over seeds and 95 % interval."""
    lines = []
    for run in args.methods:
        path = folder_of(args, run) / "result.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        names = run_of(args, run).rows or {phase: f"{run}, {phase}" for phase in result["phases"]}
        for phase, name in names.items():
            found = result["phases"].get(phase)
            if found:
                score = cell(found["normalized_score"]) if "normalized_score" in found else "-"
                cells = [name, *(cell(found[measure]) for measure in ("success", "return", "length")), score]
                cells += [ways(result.get("crossings", {}).get(phase)), f"{result['wall_seconds']:.0f}"]
                lines.append(f"| {' | '.join(cells)} |")
    head = "| policy | success | return | episode length | normalised score | way, by seed | run, s |\n"
    head += "|---|---|---|---|---|---|--:|"
    commands = "\n".join(f"    {shown(args, run)}" for run in args.methods)
    return f"{head}\n" + "\n".join(lines) + f"\n\nCommands:\n\n{commands}\n"


def curves(args: Args, runs: tuple[str, ...], metric: str, phases: tuple[str, ...], title: str) -> None:
    """Draws `<out>/<task>-<metric>.png`, a colour per run."""
    rows = []
    for run in runs:
        metrics = folder_of(args, run) / "metrics.csv"
        if metrics.exists():
            rows += [
                {**row, "setting": run}
                for row in drawn.read(metrics)
                if row["phase"] in phases and row["metric"] == metric
            ]
    if rows:
        path = args.out / f"{args.task}-{metric.removeprefix('eval/')}.png"
        drawn.learning_curves(rows, path, metric=metric, title=f"{title}: {args.task}")


def main() -> None:
    args = tyro.cli(Args)
    if args.comparison not in COMPARISONS:
        raise SystemExit(f"error: --comparison {args.comparison} is not one of {', '.join(COMPARISONS)}")
    tasks = [task for comparison, task in BUDGETS if comparison == args.comparison]
    if args.task not in tasks:
        raise SystemExit(f"error: --task {args.task} is not one of {', '.join(tasks)}")
    runs = runs_of(args.comparison, args.task)
    scripts = {path.stem for path in (REPO / "algos").glob("*.py")} - {"__init__"}
    if unknown := set(args.methods) - set(runs) - (scripts - COMPARISONS[args.comparison].keys()):
        raise SystemExit(
            f"error: --methods {min(unknown)} is neither one of {', '.join(runs)}, which have a budget for "
            f"{args.task}, nor a script of algos/ that is no run of this comparison"
        )
    args = replace(args, methods=args.methods or tuple(runs))
    for run in () if args.only_table else args.methods:
        carry_out(args, run)
    args.out.mkdir(parents=True, exist_ok=True)
    text = table(args)
    (args.out / f"{args.task}.md").write_text(text)
    print(text)
    if args.comparison == "ooo":
        bonus = "ooo_iql", "ooo_cal_ql", "ooo_rlpd", "td3"
        curves(args, bonus, "bonus", ("offline", "online"), "exploration bonus")
        curves(args, ("ooo_iql", "ooo_rlpd", "td3"), "q", ("retrained",), "Q-values")
    whole = tuple(run for run in args.methods if "online" in (run_of(args, run).rows or {"online": ""}))
    curves(args, whole, "eval/success", ("online", "retrained"), "success")
    curves(args, whole, "eval/return", ("online",), "return")


if __name__ == "__main__":
    main()
