"""The folder of a run: who made it and how, its metrics, and the lock that makes it one process's own."""

import csv
import json
import math
import os
import pathlib
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import numpy as np

from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs import settings
from ooo_rl.data.runs.sweep import RunLabel

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

LONGEST_NAME = 200  # bytes; file systems take 255, and a temporary name is a little longer
COLUMNS = ("phase", "step", "seed", "setting", "metric", "value")
PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "brax", "mujoco", "mujoco-mjx", "minari", "orbax-checkpoint", "numpy",
)  # fmt: skip


class RunFolder:
    """`<runs_dir>/<method>/<task>/<name>/`, written so that a run killed at any moment can go on.

    Files: `config.json`, `dataset.json` (the card), `metrics.csv` (tidy: phase, step, seed, setting, metric,
    value), `checkpoints/`, `paths.npz`, and at the end `result.json` and what the report adds. The folder is
    locked for as long as this object, or its process, lives.
    """

    def __init__(self, path: pathlib.Path, labels: list[RunLabel]):
        self.path, self.labels = path, labels
        self.lock = _locked(path)
        self.metrics = (path / "metrics.csv").open("a", newline="")
        self.paths: dict[str, np.ndarray] = {}  # phase -> [runs, episodes, steps, 2], for the map

    def log(self, phase: str, step: int, metrics: dict[str, Any]) -> None:
        """Appends one row per metric and run; values are [runs]."""
        write = csv.writer(self.metrics)
        for name, values in metrics.items():
            write.writerows(
                (phase, step, label.seed, label.setting, name, repr(float(v)))
                for label, v in zip(self.labels, values)
            )
        self.metrics.flush()

    def keep_paths(self, phase: str, paths: np.ndarray) -> None:
        """Keeps a phase's paths [runs, episodes, steps, 2] for the map, in `paths.npz`."""
        self.paths[phase] = paths
        temporary = self.path / "paths.tmp.npz"
        np.savez_compressed(temporary, **self.paths)
        os.replace(temporary, self.path / "paths.npz")

    def go_back(self, metrics_bytes: int | None, phases: dict) -> None:
        """Forgets what was logged after a checkpoint, since it will be computed and written once more.

        `metrics_bytes` is the size of metrics.csv at the checkpoint, None for its first line alone.
        """
        size = len(",".join(COLUMNS)) + 2 if metrics_bytes is None else metrics_bytes
        if (found := os.fstat(self.metrics.fileno()).st_size) < size:
            raise UsageError(
                f"{self.path}/metrics.csv has {found} bytes, and had {size} at the checkpoint: put it back, "
                "or start a new run"
            )
        self.metrics.truncate(size)
        self.metrics.seek(0, os.SEEK_END)
        if (self.path / "paths.npz").exists():
            with np.load(self.path / "paths.npz") as paths:
                self.paths = {phase: paths[phase] for phase in phases if phase in paths}

    def synced(self) -> int:
        """The size of metrics.csv in bytes, all of them on the disk."""
        os.fsync(self.metrics.fileno())
        return self.metrics.tell()

    def files(self) -> list[str]:
        """The files in the folder, without the lock and the checkpoints."""
        inside = (p.relative_to(self.path) for p in self.path.rglob("*") if p.is_file())
        return sorted(str(p) for p in inside if "checkpoints" not in p.parts and p.name != "lock")

    def close(self) -> None:
        """Gives the folder up: another process may write into it."""
        self.metrics.close()
        if self.lock:
            self.lock.close()


class NoFolder(RunFolder):
    """The folder as it is to the processes that do not write it."""

    def __init__(self, path: pathlib.Path, labels: list[RunLabel]):
        self.path, self.labels, self.paths = path, labels, {}

    def log(self, phase: str, step: int, metrics: dict[str, Any]) -> None:
        pass

    def keep_paths(self, phase: str, paths: np.ndarray) -> None:
        pass

    def go_back(self, metrics_bytes: int | None, phases: dict) -> None:
        pass

    def synced(self) -> int:
        return 0

    def close(self) -> None:
        pass


def task_of(args: Any) -> str:
    """The name of what a run learns, in a form that one folder can have."""
    name = args.env if args.env != "none" else (args.eval_env or pathlib.PurePath(args.dataset).stem)
    return name.replace(":", ".").replace("/", ".")


def place_of(method: str, args: Any) -> pathlib.Path:
    """Where the folder of a new run is to be; a UsageError if a folder is there, or none can be made."""
    parent = pathlib.Path(args.runs_dir).expanduser() / method / task_of(args)
    name = args.name or time.strftime("%Y%m%d-%H%M%S")
    try:
        if not args.name:  # another run may have begun in the same second
            taken = {p.name for p in parent.glob(f"{name}*")}
            name = next(
                n for i in range(1, len(taken) + 2) if (n := name if i == 1 else f"{name}-{i}") not in taken
            )
        path = parent / name
        if len(os.fsencode(name)) > LONGEST_NAME:
            raise UsageError(
                f"--name {name[:20]}...: has more than {LONGEST_NAME} bytes; choose a shorter one"
            )
        if path.exists():
            raise _collision(path)
        above = next(p for p in path.absolute().parents if p.exists())
    except OSError as error:
        raise _cannot_make(args, error.strerror) from None
    if not above.is_dir():
        raise _cannot_make(args, f"{above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise _cannot_make(args, f"{above} cannot be written")
    return path


def create(path: pathlib.Path, method: str, args: Any, card: dict, command: str, run_id: str) -> None:
    """Makes the folder of a new run, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        try:
            write_json(temporary / "dataset.json", card)
            with (temporary / "metrics.csv").open("w", newline="") as file:
                csv.writer(file).writerow(COLUMNS)
            write_json(temporary / "config.json", {
                "format": settings.FORMAT,
                "method": method,
                "id": run_id,
                "settings": settings.to_json(args),
                "command": command,
                "git_commit": _git_commit(),
                "versions": versions(),
                "devices": [_named(device) for device in jax.devices()],
            })  # fmt: skip
            if path.exists():
                raise _collision(path)
            os.rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        there = os.path.exists(path)  # unlike path.exists, it never raises
        raise (_collision(path) if there else _cannot_make(args, error.strerror)) from None


def _collision(path: pathlib.Path) -> UsageError:
    advice = f", or go on with it by --resume {path}" if (path / "config.json").exists() else ""
    try:
        _locked(path)
    except UsageError:
        advice = "; a living process is writing there"
    return UsageError(f"{path} exists already: choose another --name{advice}")


def _cannot_make(args: Any, reason: str | None) -> UsageError:
    return UsageError(
        f"--runs-dir {args.runs_dir}: cannot make a folder there ({reason}); name one that can be written"
    )


def _locked(path: pathlib.Path) -> Any:
    """The open lock file of a run's folder; a UsageError if another living process holds it.

    The lock goes with the process, however it ends, so a killed run can be resumed at once.
    """
    if fcntl is None or not (path / "config.json").exists():
        return None
    try:
        file = (path / "lock").open("a+")
    except OSError as error:
        raise UsageError(f"{path}: its lock file cannot be opened ({error.strerror})") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        whose = file.read()
        file.close()
        who = "another process is at work on this run; wait for its end, or stop it"
        if whose == str(os.getpid()):
            who = "this Python has the run open still, from a call that an error has ended; restart it"
        raise UsageError(f"{path}: {who}, then --resume {path}") from None
    except OSError:  # a file system without locks
        return file
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes `content` to `path` whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def finite_or_none(value: float) -> float | None:
    """A number that JSON can hold."""
    return float(value) if math.isfinite(value) else None


def numbers(values: Any) -> np.ndarray:
    """The inverse of `finite_or_none` for several values: float64, NaN for None."""
    return np.array([math.nan if v is None else v for v in values], np.float64)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages on which a run's numbers depend."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _named(device: jax.Device) -> str:
    """Its place, and what it is if that says more: "cuda:0 (NVIDIA H100 80GB HBM3)"."""
    return str(device) if device.device_kind == device.platform else f"{device} ({device.device_kind})"


def _git_commit() -> str:
    """The commit of the code, with "-dirty" if files differ from it; needs a checkout and a git program."""
    here = pathlib.Path(__file__).parent
    try:
        describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        command = ["git", "--no-optional-locks", *describe]
        asked = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return asked.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
