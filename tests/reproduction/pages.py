"""The pages of results, from the records alone: docs/results.md, two longer ones, two figures and a table.

The verdict on a claim comes from the chance that a seed of the one policy beats a seed of the other (Agarwal et
al. 2021), by an exact permutation test. With three seeds each all pairs have to agree. The bootstrap interval of
the chance is shown, but no verdict comes from it: with three seeds it is too narrow.
"""

import csv
import io
import pathlib
import textwrap
from dataclasses import dataclass

import numpy as np
import records
import tables
from comparisons import BUDGETS, COMPARISONS

from ooo_rl.data.figures import aggregates, curves
from ooo_rl.data.figures.intervals import ScorePanel, score_intervals

CLAIMS_PAGE = records.FOLDER.with_suffix(".md")
DETAILS_PAGE = records.FOLDER / "claims.md"
RUNS_PAGE = records.FOLDER / "runs.md"
SEEDS = records.FOLDER / "seeds.csv"
FIGURE = records.FOLDER.parent / "figures" / "results.png"
SHARES = FIGURE.with_name("off2onrl_share.png")
TITLES = {
    "ooo": "OOO", "gde": "GDE", "o3f": "O3F", "off2onrl": "Off2OnRL", "base": "Offline",
    "num_envs": "Number of environments",
}  # fmt: skip
PHASES = "offline", "online", "retrained"
LEVEL = 0.05  # of the test behind a verdict, on each side
VERDICTS = "confirmed", "not confirmed", "contradicted", "not tested"
# written by hand: read it again when a verdict changes
IN_SHORT = """## In short

* **OOO.** Retraining from scratch makes a good policy of a poor explorer's rows. On
  `maze2d-large-missing-data` it ends above the explorer, above IQL and above PEX. At the paper's
  own budget it ends far above the explorer, too, but IQL without a bonus then learns this maze
  by itself, and ends higher on average ([OOO(IQL)](ooo_iql.md#results)).
* **GDE.** On halfcheetah it ends below IQL after two fifths of the paper's online steps, and above
  it after all of them, which begin with better offline policies. There an explorer without a
  teacher crashes first and then ends above IQL, too, as in the paper; on walker2d it crashes and
  does not come back. In the U of AntMaze GDE ends above IQL, and without its teacher it loses the
  goal in every seed. Hopper and walker2d have the smaller budget alone, and GDE is not shown to be
  above IQL there ([GDE](gde_iql.md#results)).
* **O3F.** On halfcheetah O3F on IQL, noise and the policy's own actions end in the paper's order,
  close together. On walker2d the choice among candidates does harm ([O3F](o3f_iql.md#results)).
* **Off2OnRL.** On halfcheetah, from short offline training, it loses much at first. From the
  paper's own agents, or after the paper's online steps, it improves on its offline policies in
  every seed ([Off2OnRL](off2onrl.md#results)).
* **Small budgets favour caution.** Where a paper is contradicted, what ends higher is in about half
  of the claims a policy that stays near the data: IQL, AWAC or BCQ-ft.
"""


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
    def section(self) -> str:
        """The part of the page that it belongs to."""
        if self.comparison == "num_envs":
            return "num_envs"
        return "defects" if self.place.endswith("'s code") else "papers"

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
    by_luck = [aggregates.permutation_p_value(*pair) for pair in ((better, worse), (worse, better))]
    said = "confirmed" if by_luck[0] <= LEVEL else "contradicted" if by_luck[1] <= LEVEL else "not confirmed"
    return said, f"{chance:.2f} [{low:.2f}, {high:.2f}]"


def values_of(claim: Claim) -> list[np.ndarray] | None:
    """What the seeds of both policies reached; None if a run is missing."""
    found = [scores(claim, policy) for policy in (claim.better, claim.worse)]
    return None if any(values is None for values in found) else found


def line(claim: Claim) -> str:
    """The row of a tested claim, with all that its verdict comes from."""
    found = values_of(claim)
    said, chance = verdict(*found)
    task = f"{claim.task}, {claim.measure.replace('normalized_', '')}"
    cells = [claim.place, claim.says, task, *map(tables.cell, map(list, found))]
    return f"| {' | '.join([*cells, chance, said])} |"


def short_table(claims: list[Claim]) -> str:
    """A row per claim, with its tasks in the columns of their verdicts."""
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for claim in claims:
        cells = rows.setdefault((claim.place, claim.says), {said: [] for said in VERDICTS})
        if found := values_of(claim):
            reached = [f"{aggregates.summarise(v)['iqm']:#.3g}".rstrip(".") for v in found]
            cells[verdict(*found)[0]].append(f"{claim.task} ({', '.join(reached)})")
        else:
            cells["not tested"].append(claim.task)
    head = f"| source | claim | {' | '.join(VERDICTS)} |\n{'|---' * (2 + len(VERDICTS))}|"
    lines = [
        f"| {place} | {says} | {' | '.join('; '.join(cells[said]) for said in VERDICTS)} |"
        for (place, says), cells in rows.items()
    ]
    return "\n".join([head, *lines])


def counts(claims: list[Claim]) -> str:
    """How many claims of each paper have which verdict, a task each."""
    of: dict[str, list[str]] = {}
    for claim in claims:
        found = values_of(claim)
        of.setdefault(claim.place.split(",")[0], []).append(verdict(*found)[0] if found else "not tested")
    head = f"| paper | {' | '.join(VERDICTS)} |\n|---{'|--:' * len(VERDICTS)}|"
    lines = [
        f"| {paper} | {' | '.join(str(said.count(each)) for each in VERDICTS)} |"
        for paper, said in of.items()
    ]
    return "\n".join([head, *lines])


def claims_page(claims: list[Claim]) -> str:
    """docs/results.md."""
    papers, defects, num_envs = (
        [c for c in claims if c.section == section] for section in ("papers", "defects", "num_envs")
    )
    return f"""# What the papers claim, and what came out here

This page is written by `python tests/reproduction/claims.py`, from the records in `docs/results/`.
Budgets and networks are a small share of the papers'. Tasks whose name ends in `-full` have the
paper's own budget and networks, those in `-steps` its budget and small networks, and those in
`-long` a larger share of it. `halfcheetah-official` begins with the agents of Off2OnRL's own code.
Three seeds each, if [all runs](results/runs.md) does not say
otherwise. Of a run that was cut off, the last evaluation counts; that page says which ones were.

{counts(papers)}

{IN_SHORT}
## How to read the table

A claim says that a policy A ends above a policy B. Each of its tasks stands in the column of its
verdict. In brackets is what A and B reached: IQM over seeds, in the claim's measure, which [all
verdicts](results/claims.md) names, with intervals. The verdict comes from the chance that a random
seed of A ends above a random seed of B, by an exact permutation test. If at most one in twenty ways
to deal the seeds' results out to A and B gives so large a chance, the claim is confirmed, at this
budget; if so small a one, contradicted, at this budget. With three seeds each, all nine pairs have
to agree. Nothing is said about how large the difference is. Of twenty claims about policies that
are alike, about one comes out as confirmed, and about one as contradicted. [All
runs](results/runs.md) has the commands.

{short_table(papers)}

## All scores

The best policy of each task is at the top. Tasks have axes of their own. The score is the
normalised one, and the return where a task has none; so a measure may differ from that of a claim.

![Scores of all runs, task by task](figures/results.png)

## Does it matter that defects of official codes are mended?

Each method's page names the defects that our script does not have. Here some are put back, one at a
time: a copy of the script is changed in one place and run, or a flag does it. [All
runs](results/runs.md) show what was changed.

{short_table(defects)}

## Does it cost anything that many environments act side by side?

`--num-envs` is our main lever on speed. Steps of the environment and updates are alike here. If one
environment ended above many, the many would cost something. "Not confirmed" says that no such
difference was seen with three seeds, and "contradicted" that many did better.

{short_table(num_envs)}

## What is not tested yet

`python tests/reproduction/claims.py` makes the runs that are missing. Tasks that end in `-full`
take days without a GPU and are made only by name, `--only full- --seeds 5`.
"""


def details_page(claims: list[Claim]) -> str:
    """docs/results/claims.md."""
    lines = "\n".join(line(claim) for claim in claims if values_of(claim))
    return f"""# All verdicts

This page is written by `python tests/reproduction/claims.py`, from the records beside it. The
[short form](../results.md) says what the verdicts mean.

A and B are the two policies that a claim compares, in this order: IQM over seeds, with the 95 %
stratified-bootstrap interval. The chance is the probability that a random seed of A ends above a
random seed of B, with such an interval. With three seeds these intervals are too narrow, so no
verdict comes from them. Some runs of A start from the agents of B, seed by seed; the test does not
use that.

| source | claim | task, measure | A | B | chance | verdict |
|---|---|---|---|---|---|---|
{lines}
"""


def recorded() -> dict[tuple[str, str], dict[str, dict]]:
    """(comparison, task) -> run -> its record, paper by paper; without those that have none."""
    found = {
        key: {run: record for run in COMPARISONS[key[0]] if (record := records.read(*key, run))}
        for key in sorted(BUDGETS, key=lambda key: list(TITLES).index(key[0]))
    }
    return {key: runs for key, runs in found.items() if runs}


def measure_of(record: dict) -> str:
    """How a run is scored: with the normalised score, or where the task has none, the return."""
    measured = {measure for found in record["phases"].values() for measure in found}
    return "normalized_score" if "normalized_score" in measured else "return"


def measure_name(record: dict) -> str:
    return measure_of(record).replace("normalized_score", "normalised score")


def regret(record: dict) -> str:
    """The regret of the online phase, IQM and interval: a normalised score of 100 is best, or success."""
    measure, best = ("normalized_score", 100) if measure_of(record) == "normalized_score" else ("success", 1)
    curve = record["curves"].get("online", {}).get(measure, {})
    if len(curve) < 2:
        return "-"
    points = np.array([*curve.values()], float).T  # [seeds, steps]; None becomes NaN
    return tables.cell(list(aggregates.regret([*map(int, curve)], points, best)))


def row(comparison: str, task: str, run: str, record: dict) -> str:
    """The row of a run: scores at the end of its phases, regret, seeds, devices."""
    names, measure = COMPARISONS[comparison][run].rows, measure_of(record)
    found = {phase: records.values(record, phase, measure) for phase in PHASES if phase in names}
    cells = [tables.cell(list(found[phase])) if found.get(phase) is not None else "-" for phase in PHASES]
    if stopped := record.get("stopped"):
        cells[PHASES.index(stopped["phase"])] += f" at step {stopped['step']:,} of {stopped['planned']:,}"
    name = [names[phase] for phase in PHASES if found.get(phase) is not None][-1]
    link = f"[{name}]({records.path_of(comparison, task, run).name})"
    seeds, failed = len(record["seeds"]), len(record["failed"])
    count = f"{seeds - failed} of {seeds}" if failed else f"{seeds}"
    return f"| {' | '.join([link, count, *cells, regret(record), '; '.join(record['devices'])])} |"


def data_of(runs: dict[str, dict]) -> str:
    """Which datasets the runs learnt from, and which runs learnt from which copy where a dataset has several."""
    found: dict[str, dict] = {}
    copies: dict[str, dict[str, list[str]]] = {}
    for run, record in runs.items():
        if card := record["dataset"]:
            found[card["id"]] = found.get(card["id"], {}) | card
            copies.setdefault(card["id"], {}).setdefault(card.get("sha256", "not recorded"), []).append(run)
    said = []
    for name, card in found.items():
        rows = f", {card['transitions']:,} rows" if "transitions" in card else ""
        known = copies[name].keys() - {"not recorded"}
        differing = copies[name].items() if len(known) > 1 else ()
        made = "; ".join(f"{sha}: {', '.join(of)}" for sha, of in differing)
        said.append(f"`{name}`{rows}" + (f" (copies, by their sha256: {made})" if made else ""))
    return "; ".join(said) or "none"


def runs_page() -> str:
    """docs/results/runs.md."""
    parts = []
    for (comparison, task), runs in recorded().items():
        rows = "\n".join(row(comparison, task, run, record) for run, record in runs.items())
        commands = "\n".join(
            "    " + " ".join([record["command"], *tables.said(COMPARISONS[comparison][run])])
            for run, record in runs.items()
        )
        about = f"Scores: {measure_name(next(iter(runs.values())))}. Data: {data_of(runs)}."
        parts.append(f"""## {TITLES[comparison]}: {task}

{textwrap.fill(about, 100, break_on_hyphens=False)}

| run | seeds | offline | online | retrained | regret | devices |
|---|--:|---|---|---|---|---|
{rows}

{commands}
""")
    return """# All recorded runs

This page is written by `python tests/reproduction/claims.py`, from the records beside it. A run's
name leads to its record: the command, which has the settings; versions, devices and data; what each
seed reached, and the evaluations on the way. `seeds.csv` has what each seed reached, as one table.
A dataset that was made anew on another processor may differ in the last bits; where the runs of a
task learnt from several such copies, it is said which run learnt from which.

Scores are those at the end of a phase: IQM over seeds, with the 95 % stratified-bootstrap interval.
Regret is the part of the best score that the online phase missed, 1 - (average over time) / best,
where the best is a normalised score of 100, or on tasks without one a success rate of 1. It counts
from the phase's first evaluation on, and needs two. It is negative where scores pass 100, and above
1 where they are negative. For OOO it is the explorer's.

""" + "\n".join(parts)


def panels() -> list[ScorePanel]:
    """The figure's panels: one per comparison and task with two policies or more."""
    found = []
    for (comparison, task), runs in recorded().items():
        policies, before = {}, []
        for run, record in runs.items():
            for phase, name in COMPARISONS[comparison][run].rows.items():
                if (reached := records.values(record, phase, measure_of(record))) is not None:
                    policies[name] = reached
                    before += [name] if phase == "offline" else []
        if len(policies) > 1:
            measure = measure_name(next(iter(runs.values())))
            found.append(ScorePanel(f"{TITLES[comparison]}: {task}", measure, policies, before))
    return found


def shares() -> list[dict]:
    """The share of offline rows in Off2OnRL's batches, as rows of a figure: bodies are panels, data are settings."""
    rows = []
    for (comparison, task), runs in recorded().items():
        body, _, data = task.partition("-")
        logged = runs.get("off2onrl", {}).get("logged", {}) if comparison == "off2onrl" else {}
        for step, values in logged.get("online", {}).get("offline_share", {}).items():
            rows += [
                {"phase": body, "setting": data, "step": step, "seed": seed, "metric": "share of offline rows",
                 "value": value}
                for seed, value in enumerate(values)
            ]  # fmt: skip
    return rows


def seeds_csv() -> str:
    """What each seed of each recorded run reached: one row per run, phase, measure and seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["comparison", "task", "run", "phase", "measure", "seed", "value"])
    for key, runs in recorded().items():
        for run, record in runs.items():
            for phase, found in record["phases"].items():
                for measure, values in found.items():
                    writer.writerows(
                        [*key, run, phase, measure, *pair] for pair in zip(record["seeds"], values)
                    )
    return text.getvalue()


def texts(claims: list[Claim]) -> dict[pathlib.Path, str]:
    """What is written from the records, but for the figure."""
    return {
        CLAIMS_PAGE: claims_page(claims),
        DETAILS_PAGE: details_page(claims),
        RUNS_PAGE: runs_page(),
        SEEDS: seeds_csv(),
    }


def write(claims: list[Claim]) -> list[pathlib.Path]:
    """Writes the pages, the figure and the table of seeds; returns their paths."""
    records.FOLDER.mkdir(exist_ok=True)
    written = texts(claims)
    for path, text in written.items():
        path.write_text(text)
    score_intervals(panels(), FIGURE)
    if rows := shares():
        units = dict.fromkeys((row["phase"] for row in rows), "environment steps")
        curves.learning_curves(rows, SHARES, "share of offline rows", units=units)
    return [*written, FIGURE, *([SHARES] if rows else [])]
