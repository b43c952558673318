"""The pages of results, from the records alone: docs/results.md, docs/results/runs.md, a figure and a table.

The verdict on a claim comes from the chance that a seed of the one policy beats a seed of the other (Agarwal et
al. 2021). If the 95 % stratified-bootstrap interval of this chance is above one half, the claim is confirmed;
below, it is contradicted; else it is not confirmed. With three seeds this asks that nearly all pairs agree.
"""

import csv
from dataclasses import dataclass

import numpy as np
import records
import tables
from comparisons import BUDGETS, COMPARISONS

from ooo_rl.data.figures import aggregates
from ooo_rl.data.figures.scores import Scores, score_intervals

CLAIMS_PAGE = records.FOLDER.with_suffix(".md")
RUNS_PAGE = records.FOLDER / "runs.md"
SEEDS = records.FOLDER / "seeds.csv"
FIGURE = records.FOLDER.parent / "figures" / "results.png"
PAPERS = {"ooo": "OOO", "gde": "GDE", "o3f": "O3F", "off2onrl": "Off2OnRL", "num_envs": "num_envs"}
PHASES = "offline", "online", "retrained"


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


def scores(claim: Claim, policy: tuple[str, str]) -> np.ndarray | None:
    """What each seed of `policy` (run, phase) reached [seeds], NaN where it failed; None without a record."""
    record = records.read(claim.comparison, claim.task, policy[0])
    return record and records.values(record, policy[1], claim.measure)


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


def claims_page(claims: list[Claim]) -> str:
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
these have the paper's own. [All runs](results/runs.md) has each run's scores, regret, hardware and
command. A and B are the two policies that a claim compares, in this order: IQM over seeds, with the
95 % stratified-bootstrap interval. The chance is that of a seed of A to beat one of B. A claim is
confirmed, at this budget, if the interval of the chance lies above one half, and contradicted, at
this budget, if it lies below. With three seeds this asks that nearly all pairs agree, and says
nothing about how large the difference is.

![Scores of all runs, task by task](figures/results.png)

| paper | claim | task, measure | A | B | chance | verdict |
|---|---|---|---|---|---|---|
{rows}

Not tested yet, since a run is missing (`python tests/reproduction/claims.py` makes it):

| paper | claim | tasks |
|---|---|---|
{left}
"""


def recorded() -> dict[tuple[str, str], dict[str, dict]]:
    """(comparison, task) -> run -> its record, in the order of comparisons.py; without those that have none."""
    found = {
        key: {run: record for run in COMPARISONS[key[0]] if (record := records.read(*key, run))}
        for key in BUDGETS
    }
    return {key: runs for key, runs in found.items() if runs}


def measure_of(record: dict) -> str:
    """How a run is scored: with the normalised score, or where the task has none, the return."""
    measures = next(iter(record["phases"].values()))
    return next(name for name in ("normalized_score", "return") if name in measures)


def regret(record: dict) -> str:
    """The regret of the online phase, IQM and interval: a normalised score of 100 is best, or success."""
    measure, best = ("normalized_score", 100) if measure_of(record) == "normalized_score" else ("success", 1)
    curve = record["curves"].get("online", {}).get(measure, {})
    if len(curve) < 2 or len({*map(len, curve.values())}) > 1:
        return "-"
    return tables.cell(list(aggregates.regret([*map(int, curve)], np.transpose([*curve.values()]), best)))


def runs_page() -> str:
    """docs/results/runs.md."""
    parts = []
    for (comparison, task), runs in recorded().items():
        rows, first = [], next(iter(runs.values()))
        data = next((record["dataset"] for record in runs.values() if record["dataset"]), "none")
        for run, record in runs.items():
            measure, names = measure_of(record), COMPARISONS[comparison][run].rows
            shown = names.keys() & record["phases"].keys()
            cells = [
                tables.cell(list(records.values(record, phase, measure))) if phase in shown else "-"
                for phase in PHASES
            ]
            name = list(names.values())[-1]
            link = f"[{name}]({records.path_of(comparison, task, run).name})"
            seeds, device = len(record["seeds"]), ", ".join(record["devices"])
            rows.append(f"| {link} | {seeds} | {' | '.join(cells)} | {regret(record)} | {device} |")
        table, commands = "\n".join(rows), "\n".join(f"    {record['command']}" for record in runs.values())
        parts.append(f"""## {PAPERS[comparison]}: {task}

Scores: {measure_of(first).replace("_", " ")}. Data: `{data}`.

| run | seeds | offline | online | retrained | regret | devices |
|---|--:|---|---|---|---|---|
{table}

{commands}
""")
    return """# All recorded runs

This page is written by `python tests/reproduction/claims.py`, from the records beside it. A run's
name leads to its record: settings by its command, versions, hardware, what each seed reached, and
the evaluations on the way. `seeds.csv` has what each seed reached, as one table.

Scores are those at the end of a phase: IQM over seeds, with the 95 % stratified-bootstrap interval.
Regret is the part of the best score that the online phase missed, 1 - (average over time) / best,
where the best is a normalised score of 100, or on tasks without one a success rate of 1. It counts
from the phase's first evaluation on, and needs two. It is negative where scores pass 100.

""" + "\n".join(parts)


def panels() -> list[Scores]:
    """The figure's panels: one per comparison and task with two policies or more."""
    found = []
    for (comparison, task), runs in recorded().items():
        seeds, before = {}, []
        for run, record in runs.items():
            for phase, name in COMPARISONS[comparison][run].rows.items():
                if phase in record["phases"]:
                    seeds[name] = records.values(record, phase, measure_of(record))
                    before += [name] if phase == "offline" else []
        if len(seeds) > 1:
            measure = measure_of(next(iter(runs.values()))).replace("_", " ")
            found.append(Scores(f"{PAPERS[comparison]}: {task}", measure, seeds, before))
    return found


def seeds_csv() -> None:
    """Writes what each seed of each recorded run reached: one row per run, phase, measure and seed."""
    with SEEDS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["comparison", "task", "run", "phase", "measure", "seed", "value"])
        for key, runs in recorded().items():
            for run, record in runs.items():
                for phase, found in record["phases"].items():
                    for measure, values in found.items():
                        writer.writerows(
                            [*key, run, phase, measure, *pair] for pair in zip(record["seeds"], values)
                        )


def write(claims: list[Claim]) -> None:
    """Writes both pages, the figure and the table of seeds."""
    records.FOLDER.mkdir(exist_ok=True)
    seeds_csv()
    CLAIMS_PAGE.write_text(claims_page(claims))
    RUNS_PAGE.write_text(runs_page())
    score_intervals(panels(), FIGURE)
    for path in (CLAIMS_PAGE, RUNS_PAGE, FIGURE):
        print(path.relative_to(tables.REPO))
