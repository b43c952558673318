"""What four papers claim, and what came out here: runs what is missing, and writes docs/results.md.

    python tests/reproduction/claims.py                          # all that has a budget, most worth first
    python tests/reproduction/claims.py --only ooo-table1-kitchen
    python tests/reproduction/claims.py --only-page              # runs nothing

A claim says that one policy ends better than another, on a task. Its two runs are those of comparisons.py. What
is finished is not run again, and what was interrupted is resumed. Of each finished run a small record stays in
docs/results/: command, versions, hardware, what every seed reached in every phase, and the evaluations on the
way. The page is made from the records alone.

The verdict comes from the chance that a seed of the one policy beats a seed of the other (Agarwal et al. 2021).
If the 95 % stratified-bootstrap interval of this chance is above one half, the claim is confirmed; below, it is
contradicted; else it is not confirmed. With three seeds this asks that nearly all pairs agree.
"""

import csv
import json
import pathlib
import sys
from dataclasses import dataclass

import numpy as np
import tables
import tyro
from comparisons import BUDGETS

from ooo_rl.data.figures import aggregates

DOCS = tables.REPO / "docs"
RECORDS = DOCS / "results"
PAGE = DOCS / "results.md"
MEASURES = "normalized_score", "solved", "success", "return", "length", "q_bias"


@dataclass(frozen=True)
class Claim:
    """`says`, in a paper's `place`, that the policy `better` ends above `worse`; both are (run, phase)."""

    name: str
    place: str
    says: str
    comparison: str
    task: str
    better: tuple[str, str]
    worse: tuple[str, str]
    measure: str = "return"

    @property
    def runs(self) -> tuple[str, str]:
        return self.better[0], self.worse[0]


def on_all(name: str, tasks: dict[str, str], *rest) -> list[Claim]:
    """The same claim on several tasks, each with its measure."""
    place, says, comparison, better, worse = rest
    return [
        Claim(f"{name}-{task}", place, says, comparison, task, better, worse, m) for task, m in tasks.items()
    ]


WALL, MAZE, MAZE_FULL = "point-mass-wall", "maze2d-large-missing-data", "maze2d-large-missing-data-full"
KITCHEN, MIXED = "kitchen-complete", "kitchen-mixed"
CHEETAH, HOPPER, SCORE = "halfcheetah-medium", "hopper-medium", "normalized_score"
BODIES = {CHEETAH: SCORE, HOPPER: SCORE}
CLAIMS = [  # most worth per hour first
    *on_all("ooo-iql", {WALL: "return", MAZE: "return", KITCHEN: "solved"},
            "OOO, Tables 1 and 2", "OOO(IQL) ends above IQL", "ooo", ("ooo_iql", "retrained"), ("iql", "online")),
    *on_all("ooo-iql-bonus", {WALL: "return", MAZE: "return", KITCHEN: "solved"},
            "OOO, Figure 4", "retraining ends above IQL + bonus", "ooo",
            ("ooo_iql", "retrained"), ("ooo_iql", "online")),
    *on_all("iql-fine-tunes", {KITCHEN: "solved", MIXED: "solved"},
            "OOO, Table 1", "IQL is better after fine-tuning than before", "ooo",
            ("iql", "online"), ("iql", "offline")),
    *on_all("ooo-rlpd", {WALL: "return", MAZE: "return"},
            "OOO, Table 3", "OOO(RLPD) ends above RLPD", "ooo", ("ooo_rlpd", "retrained"), ("rlpd", "online")),
    *on_all("ooo-cal-ql", {WALL: "return", MAZE: "return"},
            "OOO, Table 2", "OOO(Cal-QL) ends above Cal-QL", "ooo", ("ooo_cal_ql", "retrained"), ("cal_ql", "online")),
    *on_all("ooo-pex", {WALL: "return", MAZE: "return"},
            "OOO, Table 2", "OOO(IQL) ends above PEX", "ooo", ("ooo_iql", "retrained"), ("pex", "online")),
    *[claim for run, says in {
        "iql": "GDE ends above IQL", "sac": "GDE ends above SAC from scratch", "awac": "GDE ends above AWAC",
        "jsrl": "GDE ends above JSRL", "pex": "GDE ends above PEX",
    }.items() for claim in on_all(
        f"gde-{run}", BODIES, "GDE, Table 2", says, "gde", ("gde", "online"), (run, "online"))],
    *on_all("gde-qdagger", {CHEETAH: SCORE},
            "GDE, Table 2", "GDE ends above QDagger", "gde", ("gde", "online"), ("qdagger", "online")),
    *on_all("gde-re-iql", {CHEETAH: SCORE},
            "GDE, Table 1", "ReIQL ends above OnIQL", "gde", ("re_iql", "online"), ("on_iql", "online")),
    *on_all("gde-on-iql", {HOPPER: SCORE},
            "GDE, Table 1", "OnIQL ends above ReIQL", "gde", ("on_iql", "online"), ("re_iql", "online")),
    *on_all("gde-bp-iql", BODIES,
            "GDE, Table 1", "OnIQL ends above BpIQL", "gde", ("on_iql", "online"), ("bp_iql", "online")),
    *on_all("gde-no-explorer", {CHEETAH: SCORE},
            "GDE, Table 4", "GDE ends above GDE without explorer",
            "gde", ("gde", "online"), ("gde_no_explorer", "online")),
    *on_all("gde-alone", {CHEETAH: SCORE},
            "GDE, Table 4", "GDE without exploiter ends above GDE",
            "gde", ("gde_no_exploiter", "online"), ("gde", "online")),
    *on_all("gde-no-exploiter", {HOPPER: SCORE},
            "GDE, Table 4", "GDE ends above GDE without exploiter",
            "gde", ("gde", "online"), ("gde_no_exploiter", "online")),
    *on_all("gde-no-teacher", {CHEETAH: SCORE},
            "GDE, Table 4", "GDE without teacher ends above GDE",
            "gde", ("gde_no_teacher", "online"), ("gde", "online")),
    *on_all("gde-filter", BODIES,
            "GDE, Table 5", "Filter ends above IQL", "gde", ("filter", "online"), ("iql", "online")),
    *on_all("gde-per", {HOPPER: SCORE},
            "GDE, Table 5", "IQL ends above PER", "gde", ("iql", "online"), ("per", "online")),
    *[claim for run, (place, says) in {
        "none": ("Figure 4", "O3F on IQL ends above fine-tuning without selection"),
        "noise": ("Figure 5", "O3F on IQL ends above noise without ranking"),
        "pre": ("Figure 4", "O3F on IQL is better after fine-tuning than before"),
    }.items() for claim in on_all(
        f"o3f-{run}", BODIES, f"O3F, {place}", says,
        "o3f", ("o3f", "online"), (run, "offline" if run == "pre" else "online"))],
    *on_all("o3f-lapo", {CHEETAH: SCORE},
            "O3F, Figure 5", "O3F on LAPO ends above noise without ranking",
            "o3f", ("o3f_lapo", "online"), ("noise_lapo", "online")),
    *on_all("o3f-bias", {CHEETAH: "q_bias"},
            "O3F, Figure 2", "Q is further above the return in SAC after CQL than in CQL",
            "o3f", ("sac_ft", "online"), ("cql", "online")),
    *[claim for run, (place, says) in {
        "sac_ft": ("Figure 3", "Off2OnRL ends above SAC-ft"),
        "sac": ("Figure 3", "Off2OnRL ends above SAC from scratch"),
        "pre": ("Figure 3", "Off2OnRL is better after fine-tuning than before"),
        "uniform": ("Figure 4c", "balanced replay ends above uniform replay"),
        "off2onrl_1": ("Figure 4d", "an ensemble of five ends above one agent"),
    }.items() for claim in on_all(
        f"off2onrl-{run}", BODIES, f"Off2OnRL, {place}", says,
        "off2onrl", ("off2onrl", "online"), (run, "offline" if run == "pre" else "online"))],
    *on_all("off2onrl-target", {CHEETAH: SCORE},
            "Off2OnRL, paper against code", "a target for each member ends above one for their mean",
            "off2onrl", ("off2onrl", "online"), ("mean_target", "online")),
    *on_all("cal-ql-floor", {KITCHEN: "solved"},
            "OOO, Figure 7", "Cal-QL with a floor for uniform actions ends above Cal-QL without it",
            "ooo", ("cal_ql", "online"), ("no_uniform_floor", "online")),
    # the paper's own budget, which asks for a GPU
    *on_all("full-iql-fine-tunes", {MAZE_FULL: "return"},
            "OOO, Table 2", "IQL is better after fine-tuning than before", "ooo",
            ("iql", "online"), ("iql", "offline")),
    *on_all("full-ooo-iql", {MAZE_FULL: "return"},
            "OOO, Table 2", "OOO(IQL) ends above IQL", "ooo", ("ooo_iql", "retrained"), ("iql", "online")),
    *on_all("full-ooo-td3", {MAZE_FULL: "return"},
            "OOO, Table 2", "TD3 + RND ends above OOO(IQL)", "ooo", ("td3", "online"), ("ooo_iql", "retrained")),
    *on_all("full-ooo-pex", {MAZE_FULL: "return"},
            "OOO, Table 2", "OOO(IQL) ends above PEX", "ooo", ("ooo_iql", "retrained"), ("pex", "online")),
]  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Runs what the claims need, keeps a record of each run, and writes the page."""

    only: tuple[str, ...] = ()
    """names of claims, or beginnings of names; by default all"""
    only_page: bool = False
    """run nothing; write the page from the records"""
    seeds: int = 3
    """seeds of each run"""
    runs_dir: pathlib.Path = pathlib.Path("runs")
    """folder of runs"""
    logs: pathlib.Path = pathlib.Path("comparison")
    """folder for what the runs print"""


def record_of(claim: Claim, run: str) -> pathlib.Path:
    return RECORDS / f"{claim.comparison}-{claim.task}-{run}.json"


def keep(claim: Claim, run: str, folder: pathlib.Path) -> None:
    """Writes the record of a finished run: what a reader needs to judge it, and no more."""
    result, config = (json.loads((folder / f"{name}.json").read_text()) for name in ("result", "config"))
    curves: dict = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            metric = row["metric"].removeprefix("eval/")
            if row["metric"].startswith("eval/") and metric in MEASURES:
                by_step = curves.setdefault(row["phase"], {}).setdefault(metric, {})
                by_step.setdefault(row["step"], []).append(float(row["value"]))
    record = {
        "command": f"python algos/{config['method']}.py {' '.join(what(config['command'].split()[1:], folder))}",
        "dataset": result["dataset"], "seeds": result["seeds"], "failed": result["failed"],
        "versions": config["versions"], "devices": config["devices"], "git_commit": config["git_commit"],
        "phases": result["phases"], "curves": curves,
    }  # fmt: skip
    RECORDS.mkdir(exist_ok=True)
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(rounded(value))}" for key, value in record.items())
    record_of(claim, run).write_text(f"{{\n{lines}\n}}\n")


def rounded(value):
    """`value` with six significant digits in each of its numbers."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def what(words: list[str], folder: pathlib.Path) -> list[str]:
    """The words of a command that say what is run; not those that say where, on one machine."""
    runs_dir, where = str(folder.parents[2]), {"--runs-dir", "--name"}
    words = [w for before, w in zip(["", *words], words) if not {before, w} & where]
    return [w.replace(runs_dir, "runs", 1) if w.startswith(runs_dir) else w for w in words]


def scores(claim: Claim, policy: tuple[str, str]) -> np.ndarray | None:
    """What each seed of `policy` (run, phase) reached [seeds], NaN where it failed; None without a record."""
    path = record_of(claim, policy[0])
    if not path.exists():
        return None
    values = json.loads(path.read_text())["phases"][policy[1]][claim.measure]
    return np.array([np.nan if v is None else v for v in values], float)


def verdict(better: np.ndarray, worse: np.ndarray) -> tuple[str, str]:
    """(The verdict, the chance that a seed of `better` beats one of `worse` with its interval.)"""
    chance = aggregates.probability_of_improvement(better, worse)
    low, high = aggregates.improvement_interval(better, worse)
    said = "confirmed" if low > 0.5 else "contradicted" if high < 0.5 else "not confirmed"
    return said, f"{chance:.2f} [{low:.2f}, {high:.2f}]"


def line(claim: Claim) -> str:
    """The row of a tested claim."""
    found = [scores(claim, policy) for policy in (claim.better, claim.worse)]
    said, chance = verdict(*found)
    cells = [claim.place, claim.says, f"{claim.task}, {claim.measure}", *map(tables.cell, map(list, found))]
    return f"| {' | '.join([*cells, chance, said])} |"


def page(claims: list[Claim]) -> str:
    """docs/results.md."""
    tested = [c for c in claims if all(scores(c, policy) is not None for policy in (c.better, c.worse))]
    rows = "\n".join(map(line, tested))
    missing: dict[tuple[str, str], list[str]] = {}
    for claim in claims:
        if claim not in tested:
            missing.setdefault((claim.place, claim.says), []).append(claim.task)
    left = "\n".join(f"| {place} | {says} | {', '.join(tasks)} |" for (place, says), tasks in missing.items())
    return f"""# What the papers claim, and what came out here

This page is written by `python tests/reproduction/claims.py`, from the records in `docs/results/`.
Budgets and networks are a small share of the papers', except for tasks whose name ends in `-full`:
these have the paper's own. Each record has its command and its hardware. A and B are the two
policies that a claim compares, in this order: IQM over seeds, with the 95 % stratified-bootstrap
interval. The chance is that of a seed of A to beat one of B. A claim is confirmed, at this budget,
if the interval of the chance lies above one half, and contradicted, at this budget, if it lies
below. With three seeds this asks that nearly all pairs agree, and says nothing about how large the
difference is.

| paper | claim | task, measure | A | B | chance | verdict |
|---|---|---|---|---|---|---|
{rows}

Not tested yet, since a run is missing (`python tests/reproduction/claims.py` makes it):

| paper | claim | tasks |
|---|---|---|
{left}

Each run has a record there, named after comparison, task and run. `seeds.csv`, beside them, has
what each seed reached.
"""


def seeds_csv(claims: list[Claim]) -> None:
    """Writes what each seed of each recorded run reached: one row per run, phase, measure and seed."""
    with (RECORDS / "seeds.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["comparison", "task", "run", "phase", "measure", "seed", "value"])
        done = {(c.comparison, c.task, run): record_of(c, run) for c in claims for run in c.runs}
        for key, path in sorted(done.items()):
            if path.exists():
                record = json.loads(path.read_text())
                for phase, found in record["phases"].items():
                    for measure, values in found.items():
                        writer.writerows(
                            [*key, phase, measure, s, v] for s, v in zip(record["seeds"], values)
                        )


def main() -> None:
    args = tyro.cli(Args)
    if unknown := [name for name in args.only if not any(c.name.startswith(name) for c in CLAIMS)]:
        raise SystemExit(f"error: --only {unknown[0]} is not one of {', '.join(c.name for c in CLAIMS)}")
    chosen = [c for c in CLAIMS if not args.only or c.name.startswith(args.only)]
    for claim in () if args.only_page else chosen:
        if (claim.comparison, claim.task) not in BUDGETS:
            sys.exit(f"error: {claim.name}: comparisons.py has no budget for {claim.task}")
        where = tables.Args(
            claim.comparison, claim.task, seeds=args.seeds, runs_dir=args.runs_dir, out=args.logs
        )
        for run in dict.fromkeys(claim.runs):
            if not record_of(claim, run).exists():
                tables.carry_out(where, run)
                folder = tables.folder_of(where, run)
                if (folder / "result.json").exists():
                    keep(claim, run, folder)
    RECORDS.mkdir(exist_ok=True)
    seeds_csv(CLAIMS)
    PAGE.write_text(page(CLAIMS))
    print(PAGE.relative_to(tables.REPO))


if __name__ == "__main__":
    main()
