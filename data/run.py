"""The record of a run on disk: its folder, settings, metrics, progress, checkpoints and results."""

import csv
import dataclasses
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data import cli, statistics
from data.program import Compiled
from data.scores import normalized_score

COLUMNS = ("phase", "step", "seed", "setting", "metric", "value")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "brax", "mujoco", "mujoco-mjx", "minari", "orbax-checkpoint", "numpy")


class Run:
    """One folder `<runs_dir>/<method>/<task>/<name>/`, written so that a run killed at any moment goes on to the same bits.

    Files: `config.json`, `dataset.json` (the card), `metrics.csv` (tidy: phase, step, seed, setting, metric, value),
    `checkpoints/`, and at the end `result.json` and what the script adds. `labels` names the side-by-side runs, [runs].
    """

    def __init__(self, method: str, args: Any, labels: list[cli.RunLabel], card: dict | None):
        self.method, self.args, self.labels = method, args, labels
        self.task = args.env if args.env != "none" else (args.eval_env or pathlib.PurePath(args.dataset).stem)
        self.card = card or {"id": "none"}
        self.phases: dict[str, dict[str, list]] = {}
        self.paths: dict[str, np.ndarray] = {}
        self.failed: dict[int, str] = {}
        self.programs: dict[str, Compiled] = {}
        self.before = dict.fromkeys(("wall", "updates", "env_steps", "broken_worlds", "run", "online", "compile"), 0.0)  # a resumption
        self.updates = self.env_steps = self.broken_worlds = 0
        self.began = time.perf_counter()
        self.folder = pathlib.Path(args.resume) if args.resume else self._create()
        self.metrics = (self.folder / "metrics.csv").open("a", newline="")
        self.console = Console()
        self.trackers = _trackers(args.track, self)
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager((self.folder / "checkpoints").absolute(), options=options)

    def _create(self) -> pathlib.Path:
        folder = pathlib.Path(self.args.runs_dir) / self.method / self.task / (self.args.name or time.strftime("%Y%m%d-%H%M%S"))
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise cli.UsageError(f"{folder} exists already: choose another --name, or go on with it by --resume {folder}") from None
        except (NotADirectoryError, PermissionError) as error:
            raise cli.UsageError(f"--runs-dir {self.args.runs_dir}: cannot make a folder there ({error.strerror})") from None
        write_json(folder / "dataset.json", self.card)
        with (folder / "metrics.csv").open("w", newline="") as file:
            csv.writer(file).writerow(COLUMNS)
        # Last: a folder with settings is one that can be resumed.
        write_json(folder / "config.json", {
            "method": self.method,
            "settings": cli.to_json(self.args),
            "command": " ".join(sys.argv),
            "git_commit": _git_commit(),
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
            "devices": [str(d) for d in jax.devices()],
        })  # fmt: skip
        return folder

    # --- while it runs ---

    def progress(self, plan: list[cli.Chunk], done: int):
        """Yields (position after the chunk, chunk) for the rest of the plan, behind a progress bar where there is a terminal."""
        columns = (
            TextColumn("{task.description:>9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as self.bar:
            for i, chunk in enumerate(plan[done:], start=done + 1):
                if chunk.first or i == done + 1:
                    ends = [c.start + c.length for c in plan[i - 1 :] if c.phase == chunk.phase and c.last]
                    self.row = self.bar.add_task(chunk.phase, total=ends[0], completed=chunk.start, note="compiling")
                yield i, chunk
                self.bar.update(self.row, completed=chunk.start + chunk.length)

    def log(self, phase: str, step: int, metrics: dict[str, Any]) -> None:
        """Appends one row per metric and run; values are [runs]."""
        metrics = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
        write = csv.writer(self.metrics)
        for name, values in metrics.items():
            write.writerows((phase, step, label.seed, label.setting, name, repr(float(v))) for label, v in zip(self.labels, values))
        self.metrics.flush()
        for tracker in self.trackers:
            tracker(phase, step, metrics)

    def evaluated(self, phase: str, step: int, tally: dict[str, Any]) -> None:
        """Logs an evaluation, arrays [runs, episodes], and keeps it as the phase's result so far."""
        result = {
            name: [_finite_or_none(v) for v in np.asarray(tally[name], np.float64).mean(axis=1)] for name in ("success", "return", "length")
        }
        score = normalized_score(self.args.eval_env or self.args.env, np.asarray(tally["return"], np.float64).mean(axis=1))
        if score is not None:
            result["normalized_score"] = [_finite_or_none(v) for v in np.atleast_1d(score)]
        result = {name: [None if r in self.failed else v for r, v in enumerate(values)] for name, values in result.items()}
        self.phases[phase] = result
        self.log(phase, step, {f"eval/{name}": [math.nan if v is None else v for v in values] for name, values in result.items()})
        note = "  ".join(f"{name} {statistics.summarise(_numbers(result[name]))['iqm']:.2f}" for name in ("success", "return", "length"))
        self.bar.update(self.row, note=note)
        if not self.console.is_terminal:
            print(f"{phase:>9} {step:>9,}  {note}", flush=True)

    def keep_paths(self, phase: str, paths: np.ndarray) -> None:
        """Keeps a phase's paths [runs, episodes, steps, 2] for the map, in `paths.npz`."""
        self.paths[phase] = paths
        temporary = self.folder / "paths.tmp.npz"
        np.savez_compressed(temporary, **self.paths)
        os.replace(temporary, self.folder / "paths.npz")

    def find_broken(self, chunk: cli.Chunk, metrics: dict[str, Any], parameters: Any) -> list[int]:
        """Notes and returns the runs that broke in `chunk`: metrics [runs] or `parameters` [runs, ...] not finite, or q past --max-q."""
        bad = [[name for name, v in metrics.items() if not np.isfinite(v[r])] for r in range(len(self.labels))]
        for path, ok in jax.tree_util.tree_leaves_with_path(jax.device_get(_finite_leaves(parameters))):
            for r in np.flatnonzero(~ok):
                bad[r].append(f"parameter {jax.tree_util.keystr(path)}")
        end = chunk.start + chunk.length
        new = []
        for r, names in enumerate(bad):
            where, q = f"{chunk.phase}, step {end}", abs(float(metrics["q"][r])) if "q" in metrics else 0.0
            if r in self.failed or not (names or q > self.args.max_q):
                continue
            if names:
                first = int(metrics["nonfinite_at"][r])
                since = f"step {end}" if first < 0 else f"iteration {first} after step {chunk.start}"
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                self.failed[r] = f"{where}: not finite since {since}: {', '.join(names[:8])}{more}"
            else:
                self.failed[r] = f"{where}: diverged, the mean Q-value is {metrics['q'][r]:.3g}, beyond --max-q {self.args.max_q:g}"
            label = f"seed {self.labels[r].seed} {self.labels[r].setting}".strip()
            print(f"{label} stopped in {self.failed[r]}", file=sys.stderr, flush=True)
            new.append(r)
        return new

    def after(self, chunk: cli.Chunk, metrics: dict, agent: Any, state: Any, position: int, evaluate: Any, keys: jax.Array) -> None:
        """What is due after each chunk: log, look for broken runs, evaluate, and save a checkpoint, which thus holds all before it.

        `agent` has the parameters to check, and the policy to evaluate as `agent.actor`; `keys` [runs, 2] are the runs' first keys.
        """
        step, num_runs = chunk.start + chunk.length, len(self.labels)
        online = chunk.phase == "online"
        self.updates += num_runs * round(chunk.length * (self.args.utd_ratio if online else 1))
        self.env_steps += num_runs * chunk.length * online
        self.log(chunk.phase, step, {name: value for name, value in metrics.items() if name != "nonfinite_at"})
        if broken := self.find_broken(chunk, jax.device_get(metrics), agent):
            with ocp.StandardCheckpointer() as checkpointer:  # for inspection; the run itself goes on
                checkpointer.save((self.folder / f"broken_{chunk.phase}_{step}").absolute(), state, force=True)
            if len(self.failed) == num_runs:
                raise cli.UsageError(
                    f"every seed broke, the last in {self.failed[broken[-1]]}; lower the learning rates or look into {self.folder}"
                )
        if online:
            self._count_broken_worlds(step, np.asarray(metrics["broken_worlds"]) * (chunk.length / self.args.num_envs))
        if chunk.evaluate and evaluate.possible:
            # Apart from the keys of training; the same starts for every phase and step.
            tally = evaluate(agent.actor, jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys), record=chunk.last and evaluate.has_map)
            self.evaluated(chunk.phase, step, tally)
            if chunk.last and evaluate.has_map:
                self.keep_paths(chunk.phase, evaluate.paths(tally))
        if chunk.save:
            self.save(position, state)

    def _count_broken_worlds(self, step: int, lost: np.ndarray) -> None:
        """Adds up and reports worlds [runs] that went non-finite; those of a stopped run, whose actions are not finite, say nothing."""
        lost = sum(n for r, n in enumerate(lost) if r not in self.failed)
        if lost:
            self.broken_worlds += round(float(lost))
            print(f"online, step {step}: {lost:.0f} worlds broke and were started anew; the broken steps are not stored", file=sys.stderr)

    # --- checkpoints ---

    def save(self, position: int, state: Any) -> None:
        """Writes a checkpoint after `position` chunks of the plan, whole or not at all; the one before goes once it is there."""
        os.fsync(self.metrics.fileno())
        host = {
            "position": position, "metrics_bytes": self.metrics.tell(), "phases": self.phases,
            "failed": {str(r): text for r, text in self.failed.items()}, "clock": self.clock(),
        }  # fmt: skip
        try:
            self.manager.save(
                position, args=ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host)), force=True
            )
        except Exception as error:
            if not _is_disk_full(error):
                raise
            raise cli.UsageError(
                f"no room left for a checkpoint in {self.folder}; the one before it is whole: free some, then --resume {self.folder}"
            ) from error

    def restore(self, state: Any) -> tuple[int, Any]:
        """(position, state) of the last checkpoint, or (0, `state`) if there is none yet; `state` gives shapes and places."""
        position = self.manager.latest_step() if self.args.resume else None
        if position is None:
            self._truncate(len(",".join(COLUMNS)) + 2)
            return 0, state
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        try:
            saved = self.manager.restore(
                position, args=ocp.args.Composite(state=ocp.args.StandardRestore(template), host=ocp.args.JsonRestore())
            )
        except (ValueError, KeyError, FileNotFoundError) as error:
            reason = str(error).splitlines()[0][:300]
            raise cli.UsageError(f"--resume {self.folder}: the checkpoint does not fit these settings, or is damaged ({reason})") from None
        host = saved["host"]
        self._truncate(host["metrics_bytes"])
        self.phases, self.before = host["phases"], self.before | host["clock"]
        self.failed = {int(r): text for r, text in host["failed"].items()}
        if (self.folder / "paths.npz").exists():
            with np.load(self.folder / "paths.npz") as paths:
                self.paths = {phase: paths[phase] for phase in self.phases if phase in paths}
        return host["position"], saved["state"]

    def _truncate(self, size: int) -> None:
        # Rows logged after the checkpoint will be computed, and written, once more.
        self.metrics.truncate(size)
        self.metrics.seek(0, os.SEEK_END)

    # --- the end ---

    def clock(self) -> dict[str, float]:
        """Seconds and work so far, those before a resumption included; work counts all side-by-side runs."""
        programs = self.programs.values()
        now = {
            "wall": time.perf_counter() - self.began, "updates": self.updates, "env_steps": self.env_steps,
            "broken_worlds": self.broken_worlds,
            "run": sum(p.run_seconds for p in programs), "compile": sum(p.compile_seconds for p in programs),
            "online": self.programs["online"].run_seconds if "online" in self.programs else 0.0,
        }  # fmt: skip
        return {name: value + self.before[name] for name, value in now.items()}

    def finish(self, extra: dict | None = None) -> dict:
        """Writes result.json, prints the closing table and returns the result."""
        clock = self.clock()
        rows = {
            setting: [i for i, label in enumerate(self.labels) if label.setting == setting]
            for setting in dict.fromkeys(label.setting for label in self.labels)
        }
        result = {
            "method": self.method, "env": self.args.env, "eval_env": self.args.eval_env or self.args.env,
            "dataset": self.card["id"], "num_seeds": self.args.num_seeds,
            "seeds": [label.seed for label in self.labels],
            "phases": {**{name: {} for name in ("offline", "online", "retrained")}, **self.phases},
            "failed": {str(r): text for r, text in self.failed.items()},
            "broken_worlds": int(clock["broken_worlds"]),
            "wall_seconds": clock["wall"],
            "seed_updates_per_second": clock["updates"] / max(clock["run"], 1e-9),
            "env_steps_per_second": clock["env_steps"] / max(clock["online"], 1e-9),
            "compile_seconds": clock["compile"],
            **(extra or {}),
        }  # fmt: skip
        if self.args.sweep:
            result["settings"] = [
                {
                    "setting": setting,
                    "phases": {p: {m: [v[i] for i in index] for m, v in found.items()} for p, found in self.phases.items()},
                }
                for setting, index in rows.items()
            ]
        write_json(self.folder / "result.json", result)
        self.console.print(self.table(rows))
        return result

    def table(self, rows: dict[str, list[int]]) -> Table:
        """Phase x measure: IQM over seeds and its 95 % stratified-bootstrap interval."""
        table = Table(title=f"{self.method} on {self.task}: IQM over {self.args.num_seeds} seeds [95 % interval]")
        measures = list(dict.fromkeys(m for found in self.phases.values() for m in found))
        for column in (["setting"] if self.args.sweep else []) + ["phase", *measures]:
            table.add_column(column, overflow="fold")
        for setting, index in rows.items():
            for phase, found in self.phases.items():
                cells = []
                for measure in measures:
                    s = statistics.summarise(_numbers(found[measure][i] for i in index))
                    cells.append(f"{s['iqm']:.2f} [{s['low']:.2f}, {s['high']:.2f}]" if math.isfinite(s["low"]) else f"{s['iqm']:.2f}")
                table.add_row(*([setting] if self.args.sweep else []), phase, *cells)
        return table

    def close(self) -> None:
        """Lists what the run has written."""
        self.metrics.close()
        self.manager.close()
        files = sorted(p for p in self.folder.rglob("*") if p.is_file() and "checkpoints" not in p.relative_to(self.folder).parts)
        self.console.print(
            f"wrote {self.folder}/: " + ", ".join(str(p.relative_to(self.folder)) for p in files), soft_wrap=True, highlight=False
        )


def load_agents(folder: str, labels: list[cli.RunLabel], like: Any) -> Any:
    """The agents in the last checkpoint of the run in `folder`, the one of each label's seed, as numpy arrays [runs, ...].

    `like` has the shapes of one agent, and the fields to take. What does not fit raises UsageError.
    """
    flag = f"--pretrained {folder}"
    try:
        config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise cli.UsageError(f"{flag}: not a run's folder, or damaged ({error})") from None
    settings = config["settings"]
    if settings["sweep"]:
        raise cli.UsageError(f"{flag}: that run swept {', '.join(settings['sweep'])}; start from one with a single setting")
    seeds = range(settings["seed"], settings["seed"] + settings["num_seeds"])
    if missing := sorted({label.seed for label in labels} - set(seeds)):
        raise cli.UsageError(f"{flag}: that run has the seeds {seeds[0]} to {seeds[-1]}, not {', '.join(map(str, missing))}")
    with ocp.CheckpointManager((pathlib.Path(folder) / "checkpoints").absolute()) as manager:
        if manager.latest_step() is None:
            raise cli.UsageError(f"{flag}: there is no checkpoint yet")
        saved = manager.restore(manager.latest_step(), args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    if "agent" not in saved:
        raise cli.UsageError(f"{flag}: a run of {config['method']}.py has no agent of this kind; name one of cql.py or cal_ql.py")
    rows = np.array([seeds.index(label.seed) for label in labels])
    found = {}
    for field in dataclasses.fields(like):
        shapes, arrays = getattr(like, field.name), jax.tree.leaves(saved["agent"].get(field.name))
        if [x.shape[1:] for x in arrays] != [x.shape for x in jax.tree.leaves(shapes)]:
            raise cli.UsageError(
                f"{flag}: the {field.name} there has other shapes; --hidden and --critic-hidden must be as in its config.json, "
                f"{settings['hidden']} and {settings.get('critic_hidden')}, and the task of the same sizes"
            )
        found[field.name] = jax.tree.unflatten(jax.tree.structure(shapes), [np.asarray(x)[rows] for x in arrays])
    return like.replace(**found)


@jax.jit
def _finite_leaves(tree):
    return jax.tree.map(lambda x: jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1), tree)


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes `content` to `path` whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def _numbers(values) -> np.ndarray:
    return np.array([math.nan if v is None else v for v in values], np.float64)


def _finite_or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _is_disk_full(error: BaseException) -> bool:
    text = str(error)
    return getattr(error, "errno", None) in cli.DISK_FULL or any(
        sign in text for sign in ("No space left", "File too large", "quota exceeded")
    )


def _git_commit() -> str:
    here = pathlib.Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _trackers(kind: str, run: Run) -> list:
    """Functions (phase, step, metrics) that pass metrics on to the tracker of `--track`."""
    if kind == "none":
        return []
    try:
        if kind == "tensorboard":
            from tensorboardX import SummaryWriter

            writers = [
                SummaryWriter(str(run.folder / "tensorboard" / f"seed{label.seed}{label.setting and '_' + label.setting}"))
                for label in run.labels
            ]

            def track(phase, step, metrics):
                for name, values in metrics.items():
                    for writer, value in zip(writers, values):
                        writer.add_scalar(f"{phase}/{name}", float(value), step)
                for writer in writers:
                    writer.flush()
        else:
            import wandb

            wandb.init(project="ooo-rl", name=run.folder.name, group=run.task, config=cli.to_json(run.args), dir=str(run.folder))

            def track(phase, step, metrics):
                values = {f"{phase}/{n}/seed{label.seed}": float(v) for n, vs in metrics.items() for label, v in zip(run.labels, vs)}
                wandb.log({f"{phase}/step": step, **values})
    except ImportError as error:
        raise cli.UsageError(f"--track {kind}: {error.name} is not installed; pip install '.[tracking]'") from None
    return [track]
