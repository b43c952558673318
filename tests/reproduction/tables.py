"""The comparison of OOO's Tables 1 to 3, its ablations and two of its figures, in small: every method on one
task, with one budget.

    python tests/reproduction/tables.py --task point-mass-wall --out comparison
    python tests/reproduction/tables.py --task maze2d-large-missing-data --methods iql ooo_iql td3 --seeds 5

Each method is one run of its script, with the flags of `BUDGETS` here, alike within a family, and its own
settings for the rest. An OOO run gives two rows: its explorer is the base method with the bonus, its
exploiter is OOO. What is finished is not run again, and what was interrupted is resumed; so this can be
called again and again. Writes `<out>/<task>.md`, and figures of the bonus (Figure 3, left), of Q-values in
retraining (Figure 5c) and of success.
"""

import json
import pathlib
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import tyro

from ooo_rl.data.figures import aggregates
from ooo_rl.data.figures import curves as drawn

REPO = pathlib.Path(__file__).parents[2]
NAMES = {  # run -> (script, flags beyond the task's, what its phases are called in the table)
    "iql": ("iql", "IQL", {"offline": "IQL, offline", "online": "IQL"}),
    "ooo_iql": ("ooo_iql", "IQL IQL_RETRAIN", {"online": "IQL + bonus", "retrained": "OOO(IQL)"}),
    "pex": ("pex", "IQL", {"online": "PEX"}),
    "cql": ("cql", "CQL", {"offline": "CQL, offline", "online": "CQL"}),
    "sac_ft": ("sac", "SAC --init-from CQL_RUN --offline-steps 0 --random-steps 0", {"online": "SAC-ft (from CQL)"}),
    "cal_ql": ("cal_ql", "CQL", {"offline": "Cal-QL, offline", "online": "Cal-QL"}),
    "ooo_cal_ql": ("ooo_cal_ql", "CQL CQL_RETRAIN", {"online": "Cal-QL + RND", "retrained": "OOO(Cal-QL)"}),
    "rlpd": ("rlpd", "RLPD", {"online": "RLPD"}),
    "ooo_rlpd": ("ooo_rlpd", "RLPD RLPD_RETRAIN", {"online": "RLPD + RND", "retrained": "OOO(RLPD)"}),
    "td3": ("td3", "TD3 --intrinsic rnd TD3_RETRAIN", {"online": "TD3 + RND", "retrained": "TD3, retrained"}),
    # ablations of OOO(IQL)
    "frozen_bonus": ("ooo_iql", "IQL IQL_RETRAIN --frozen-bonus", {"retrained": "OOO(IQL), bonus kept (Fig. 3)"}),
    "no_upsampling": ("ooo_iql", "IQL IQL_RETRAIN --upsample 0", {"retrained": "OOO(IQL), no up-sampling (Fig. 11)"}),
    "no_bounds": ("ooo_iql", "IQL IQL_RETRAIN --no-bound-q", {"retrained": "OOO(IQL), Q unbounded"}),
    "warm_start": ("ooo_iql", "IQL IQL_RETRAIN HALVES --warm-start", {"retrained": "OOO(IQL), warm start (Fig. 13)"}),
    "sync": ("ooo_iql", "IQL IQL_RETRAIN HALVES --sync-explorer", {"online": "explorer, synchronised (Fig. 14)",
             "retrained": "OOO(IQL), synchronised (Fig. 14)"}),
}  # fmt: skip
BUDGETS = {  # task -> flags of every method, and what the words in capitals of NAMES stand for there
    "point-mass-wall": {
        "all": "--num-envs 48",
        **{f"{family}_RETRAIN": "--retrain-steps 24000" for family in ("IQL", "CQL", "RLPD", "TD3")},
        "HALVES": "--retrain-at 1440000 2880000",
        "IQL": "--online-steps 2880000",
        "CQL": "--online-steps 960000",
        "SAC": "--online-steps 960000",
        "RLPD": "--online-steps 480000 --utd-ratio 0.08333333333333333",
        "TD3": "--online-steps 480000 --utd-ratio 0.08333333333333333 --offline-ratio 0.5 "
               "--target-rate 0.02 --exploration-noise 0.5",
    },
    "maze2d-large-missing-data": {
        "all": "--num-envs 32",
        "IQL": "--online-steps 400000 --utd-ratio 0.0625 --hidden 128 128 --offline-steps 10000",
        "IQL_RETRAIN": "--retrain-steps 50000",
        "HALVES": "--retrain-at 200000 400000",
        "CQL": "--online-steps 200000 --utd-ratio 0.03125 --hidden 64 64 --critic-hidden 64 64 "
               "--num-samples 4 --offline-steps 5000",
        "CQL_RETRAIN": "--retrain-steps 10000",
        "SAC": "--online-steps 200000 --utd-ratio 0.03125 --hidden 64 64 --critic-hidden 64 64",
        "RLPD": "--online-steps 200000 --utd-ratio 0.0625 --hidden 128 128 --critic-hidden 128 128 --policy-every 1",
        "RLPD_RETRAIN": "--retrain-steps 25000",
        "TD3": "--online-steps 400000 --utd-ratio 0.0625 --hidden 128 128 --critic-hidden 128 128",
        "TD3_RETRAIN": "--retrain-steps 50000",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Runs all methods on one task and tabulates them."""

    task: str = "point-mass-wall"
    """task, one of BUDGETS"""
    methods: tuple[str, ...] = tuple(NAMES)
    """which runs, or scripts of algos/ that have no run here: with their settings for the task"""
    seeds: int = 3
    """seeds of each"""
    runs_dir: pathlib.Path = pathlib.Path("runs")
    """folder of runs"""
    out: pathlib.Path = pathlib.Path("comparison")
    """folder for the table and the figures"""
    only_table: bool = False
    """run nothing; tabulate what there is"""


def row_of(run: str) -> tuple[str, str, dict[str, str]]:
    """(script, flags, phase -> name in the table). A script that is not in NAMES has a row for each phase."""
    return NAMES.get(run, (run, "", {}))


def folder_of(args: Args, run: str) -> pathlib.Path:
    return args.runs_dir / row_of(run)[0] / args.task / f"table-{run}"


def command(args: Args, run: str) -> list[str]:
    """The command line of one run."""
    script, flags, _ = row_of(run)
    stand_for = {**BUDGETS[args.task], "CQL_RUN": str(folder_of(args, "cql"))}
    words = [w for word in f"all {flags}".split() for w in stand_for.get(word, word).split()]
    return [str(REPO / f"algos/{script}.py"), "--env", args.task, "--num-seeds", str(args.seeds), *words,
            "--runs-dir", str(args.runs_dir), "--name", f"table-{run}"]  # fmt: skip


def carry_out(args: Args, run: str) -> None:
    folder = folder_of(args, run)
    if (folder / "result.json").exists():
        return
    words = command(args, run)
    if (folder / "config.json").exists():
        words = [words[0], "--resume", str(folder)]
    print(time.strftime("%T"), *words, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"{args.task}-{run}.log").open("a") as log:
        code = subprocess.run(
            [sys.executable, *words], stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        print(f"  failed with exit code {code}: {log.name}", flush=True)


def cell(values: list) -> str:
    found = aggregates.summarise(np.array([np.nan if v is None else v for v in values], float))
    return (
        f"{found['iqm']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
        if np.isfinite(found["iqm"])
        else "diverged"
    )


def ways(crossings: list[dict] | None) -> str:
    """On which side of the wall most paths of each seed pass, such as "under, under, over"; none: they end
    before it.
    """
    return ", ".join(max(seed, key=seed.get) for seed in crossings) if crossings else "-"


def table(args: Args) -> str:
    """Markdown: one row per policy, IQM over seeds and 95 % interval."""
    lines = []
    for run in args.methods:
        path = folder_of(args, run) / "result.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        names = row_of(run)[2] or {phase: f"{run}, {phase}" for phase in result["phases"]}
        for phase, name in names.items():
            found = result["phases"].get(phase)
            if found:
                score = cell(found["normalized_score"]) if "normalized_score" in found else "-"
                cells = [name, *(cell(found[measure]) for measure in ("success", "return", "length")), score]
                cells += [ways(result.get("crossings", {}).get(phase)), f"{result['wall_seconds']:.0f}"]
                lines.append(f"| {' | '.join(cells)} |")
    head = "| policy | success | return | episode length | normalised score | way, by seed | run, s |\n"
    head += "|---|---|---|---|---|---|--:|"
    commands = "\n".join(
        f"    python algos/{' '.join(command(args, run)).split('algos/')[1]}" for run in args.methods
    )
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
    if args.task not in BUDGETS:
        raise SystemExit(f"error: --task {args.task} is not one of {', '.join(BUDGETS)}")
    scripts = {path.stem for path in (REPO / "algos").glob("*.py")} - {"__init__"}
    if unknown := set(args.methods) - NAMES.keys() - scripts:
        raise SystemExit(
            f"error: --methods {min(unknown)} is neither one of {', '.join(NAMES)} nor a script of algos/"
        )
    for run in () if args.only_table else args.methods:
        carry_out(args, run)
    args.out.mkdir(parents=True, exist_ok=True)
    text = table(args)
    (args.out / f"{args.task}.md").write_text(text)
    print(text)
    curves(
        args,
        ("ooo_iql", "ooo_cal_ql", "ooo_rlpd", "td3"),
        "bonus",
        ("offline", "online"),
        "exploration bonus",
    )
    curves(args, ("ooo_iql", "ooo_rlpd", "td3"), "q", ("retrained",), "Q-values")
    curves(
        args,
        tuple(NAMES)[: tuple(NAMES).index("frozen_bonus")],
        "eval/success",
        ("online", "retrained"),
        "success",
    )


if __name__ == "__main__":
    main()
