"""Metrics sent to TensorBoard or Weights & Biases as well."""

import csv
import importlib
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs.settings import to_json
from ooo_rl.data.runs.sweep import RunLabel

Tracker = Callable[[str, int, dict[str, Any]], None]  # (phase, step, metrics [runs])


def open_tracker(args: Any, folder: pathlib.Path, labels: list[RunLabel], task: str, run_id: str) -> Tracker:
    """The function that passes metrics on to the tracker of `--track`.

    A resumed run goes on in the same record. Nothing is written into `folder` before it exists.
    """
    if args.track == "none":
        return lambda phase, step, metrics: None
    if args.track == "tensorboard":
        return _tensorboard(folder, labels)
    return _wandb(args, folder, labels, task, run_id)


def check_tracker(track: str) -> None:
    """Raises UsageError if the package of the tracker is not installed."""
    try:
        if track != "none":
            importlib.import_module({"tensorboard": "tensorboardX"}.get(track, track))
    except ImportError as error:
        raise UsageError(
            f"--track {track}: {error.name} is not installed; pip install '.[tracking]'"
        ) from None


def _tensorboard(folder: pathlib.Path, labels: list[RunLabel]) -> Tracker:
    from tensorboardX import SummaryWriter

    names = [f"seed{label.seed}{label.setting and '_' + label.setting}" for label in labels]
    writers: list[Any] = []

    def track(phase, step, metrics):
        if not writers:
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            writers.extend(SummaryWriter(str(folder / "tensorboard" / name)) for name in names)
            _replay(folder / "metrics.csv", dict(zip(labels, writers)), (phase, step))
        for name, values in metrics.items():
            for writer, value in zip(writers, values):
                writer.add_scalar(f"{phase}/{name}", float(value), step)
        for writer in writers:
            writer.flush()

    return track


def _replay(metrics: pathlib.Path, writers: dict[RunLabel, Any], until: tuple[str, int]) -> None:
    """Writes what a resumed run had logged up to its checkpoint; its old events may reach beyond that."""
    with metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["phase"], int(row["step"])) == until:  # logged just now, and about to be tracked
                continue
            writer = writers[RunLabel(int(row["seed"]), row["setting"])]
            writer.add_scalar(f"{row['phase']}/{row['metric']}", float(row["value"]), int(row["step"]))


def _wandb(args: Any, folder: pathlib.Path, labels: list[RunLabel], task: str, run_id: str) -> Tracker:
    import wandb

    try:
        wandb.init(
            project="ooo-rl",
            id=run_id,
            resume="allow",
            name=folder.name,
            group=task,
            config=to_json(args),
            dir=str(pathlib.Path(args.runs_dir).expanduser()),
        )
    except Exception as error:  # of whatever kind: no login, no network, no such project
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(
            f"--track wandb: {reason}; log in by `wandb login`, or set WANDB_MODE=offline"
        ) from None

    defined = set()

    def track(phase, step, metrics):
        if phase not in defined:  # over the phase's own steps a chart shows no row twice after a resumption
            defined.add(phase)
            wandb.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        values = {
            f"{phase}/{name}/seed{label.seed}{label.setting and ' ' + label.setting}": float(value)
            for name, column in metrics.items()
            for label, value in zip(labels, column)
        }
        wandb.log({f"{phase}/step": step, **values})

    return track
