"""The small record that stays of a finished run: docs/results/<comparison>-<task>-<run>.json.

It holds command, versions, hardware, what every seed reached in every phase, and the evaluations on the way.
"""

import csv
import json
import pathlib

import numpy as np
import tables

FOLDER = tables.REPO / "docs" / "results"
MEASURES = "normalized_score", "solved", "success", "return", "length", "q_bias"


def path_of(comparison: str, task: str, run: str) -> pathlib.Path:
    return FOLDER / f"{comparison}-{task}-{run}.json"


def read(comparison: str, task: str, run: str) -> dict | None:
    """The record of a run; None if there is none."""
    path = path_of(comparison, task, run)
    return json.loads(path.read_text()) if path.exists() else None


def values(record: dict, phase: str, measure: str) -> np.ndarray:
    """What each seed reached at the end of a phase [seeds], NaN where it failed."""
    return np.array([np.nan if v is None else v for v in record["phases"][phase][measure]], float)


def keep(comparison: str, task: str, run: str, folder: pathlib.Path) -> None:
    """Writes the record of the finished run in `folder`: what a reader needs to judge it, and no more."""
    result, config = (json.loads((folder / f"{name}.json").read_text()) for name in ("result", "config"))
    curves: dict = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            metric = row["metric"].removeprefix("eval/")
            if row["metric"].startswith("eval/") and metric in MEASURES:
                by_step = curves.setdefault(row["phase"], {}).setdefault(metric, {})
                by_step.setdefault(row["step"], []).append(float(row["value"]))
    record = {
        "command": f"python algos/{config['method']}.py {' '.join(_what(config['command'].split()[1:], folder))}",
        "dataset": result["dataset"], "seeds": result["seeds"], "failed": result["failed"],
        "versions": config["versions"], "devices": config["devices"], "git_commit": config["git_commit"],
        "phases": result["phases"], "curves": curves,
    }  # fmt: skip
    FOLDER.mkdir(exist_ok=True)
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(_rounded(value))}" for key, value in record.items())
    path_of(comparison, task, run).write_text(f"{{\n{lines}\n}}\n")


def _rounded(value):
    """`value` with six significant digits in each of its numbers."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _what(words: list[str], folder: pathlib.Path) -> list[str]:
    """The words of a command that say what is run; not those that say where, on one machine."""
    runs_dir, where = str(folder.parents[2]), {"--runs-dir", "--name"}
    words = [w for before, w in zip(["", *words], words) if not {before, w} & where]
    return [w.replace(runs_dir, "runs", 1) if w.startswith(runs_dir) else w for w in words]
