"""The small record that stays of a run: docs/results/<comparison>-<task>-<run>.json.

It holds command, versions, hardware, what every seed reached in every phase, the evaluations on the way, and the
few metrics of training that a figure needs. The record of a run that was cut off says where.
"""

import csv
import json
import math
import pathlib

import numpy as np
import tables
from comparisons import MADE_BY

FOLDER = tables.REPO / "docs" / "results"
MEASURES = "normalized_score", "solved", "success", "return", "length", "q_bias"
LOGGED = "offline_share", "auroc"  # of training, where a method logs them


def path_of(comparison: str, task: str, run: str) -> pathlib.Path:
    return FOLDER / f"{comparison}-{task}-{run}.json"


def read(comparison: str, task: str, run: str) -> dict | None:
    """The record of a run; None if there is none."""
    path = path_of(comparison, task, run)
    return json.loads(path.read_text()) if path.exists() else None


def values(record: dict, phase: str, measure: str) -> np.ndarray | None:
    """What each seed reached at the end of a phase [seeds], NaN where it failed; None if it was not measured."""
    found = record["phases"].get(phase, {}).get(measure)
    return None if found is None else np.array([np.nan if v is None else v for v in found], float)


def keep(comparison: str, task: str, run: str, folder: pathlib.Path) -> None:
    """Writes the record of the run in `folder`: what a reader needs to judge it, and no more.

    Of a run that was cut off, the last evaluations count; `stopped` has their phase, step and the steps planned.
    """
    config = json.loads((folder / "config.json").read_text())
    rows = _rows(folder)
    curves = _curves(rows, {f"eval/{measure}" for measure in MEASURES})
    finished = folder / "result.json"
    result = json.loads(finished.read_text()) if finished.exists() else _cut_off(curves, config["settings"])
    by_script = f"algos/{config['method']}.py {' '.join(_what(config['command'].split()[1:], folder))}"
    record = {
        "command": f"python {MADE_BY.get((comparison, task, run), by_script)}",
        "dataset": _data(folder), "seeds": result["seeds"], "failed": result["failed"],
        "versions": config["versions"], "devices": config["devices"], "git_commit": config["git_commit"],
        "wall_seconds": result["wall_seconds"],
        "phases": result["phases"], "curves": curves,
    }  # fmt: skip
    record |= {"stopped": result["stopped"]} if "stopped" in result else {}
    logged = _curves(rows, set(LOGGED))
    record |= {"logged": logged} if logged else {}
    FOLDER.mkdir(exist_ok=True)
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(_rounded(value))}" for key, value in record.items())
    path_of(comparison, task, run).write_text(f"{{\n{lines}\n}}\n")


def _rows(folder: pathlib.Path) -> list[dict]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _curves(rows: list[dict], wanted: set[str]) -> dict:
    """phase -> metric -> step -> the value of each seed, None where it is not finite."""
    curves: dict = {}
    for row in rows:
        if row["metric"] in wanted:
            metric, value = row["metric"].removeprefix("eval/"), float(row["value"])
            by_step = curves.setdefault(row["phase"], {}).setdefault(metric, {})
            by_step.setdefault(row["step"], []).append(value if math.isfinite(value) else None)
    return curves


def _cut_off(curves: dict, settings: dict) -> dict:
    """What stands in the place of result.json where a run never wrote one.

    Drops evaluations from `curves` that not all seeds have.
    """
    for found in curves.values():
        for measure, by_step in found.items():
            found[measure] = {s: v for s, v in by_step.items() if len(v) == settings["num_seeds"]}
    last = {
        name: {measure: list(by_step.values())[-1] for measure, by_step in found.items()}
        for name, found in curves.items()
    }
    phase = list(curves)[-1]
    planned = {"offline": "offline_steps", "online": "online_steps", "retrained": "retrain_steps"}[phase]
    step = int(list(next(iter(curves[phase].values())))[-1])
    return {
        "seeds": [settings["seed"] + i for i in range(settings["num_seeds"])], "failed": {}, "wall_seconds": None,
        "phases": last, "stopped": {"phase": phase, "step": step, "planned": settings[planned]},
    }  # fmt: skip


def _rounded(value):
    """`value` with six significant digits in each of its numbers."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _data(folder: pathlib.Path) -> dict:
    """Which data a run learnt from; {} if from none."""
    card = json.loads((folder / "dataset.json").read_text())
    return (
        {key: card[key] for key in ("id", "transitions", "sha256") if key in card} if "sha256" in card else {}
    )


def _what(words: list[str], folder: pathlib.Path) -> list[str]:
    """The words of a command without the folder of runs, which is a place on one machine."""
    runs_dir = str(folder.parents[2])
    words = [w for before, w in zip(["", *words], words) if "--runs-dir" not in (before, w)]
    return [w.replace(runs_dir, "runs", 1) if w.startswith(runs_dir) else w for w in words]
