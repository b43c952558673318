"""From the command line to settings that can run: family defaults, sweeps, and one clear error for each bad flag."""

import argparse
import dataclasses
import difflib
import errno
import itertools
import json
import math
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import tyro

import envs
from data import datasets

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UsageError(ValueError):
    """A flag, dataset or folder that cannot be used; the message says what was wrong, where, and what to do."""


def guarded(main: Callable[[], None]) -> None:
    """Runs a script's `main`, turning the errors that a user can mend into one line on stderr and exit code 2."""
    try:
        main()
    except (UsageError, datasets.DatasetError) as error:
        _fail(error)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        _fail(f"no room left to write {error.filename or 'the run folder'} ({error.strerror}); free some, then go on with --resume")


def _fail(message) -> None:
    sys.stderr.write(f"error: {message}\n")  # in one piece: threads of a library may be writing there too
    raise SystemExit(2)


def parse(args_type: type, settings: dict[str, dict], argv: list[str] | None = None) -> Any:
    """Arguments of type `args_type` from the command line, over the defaults of the environment's family.

    `settings` maps prefixes of environment or dataset names to defaults of any field of the arguments or of their traced
    `hyper`; longer prefixes win over shorter ones and explicit flags over all. `--help` shows what is in force.
    With `--resume` everything comes from the run's config.json, and a flag that says otherwise is an error.
    """
    argv = sys.argv[1:] if argv is None else argv
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--env", "--dataset", "--online-steps", "--resume"):
        early.add_argument(flag, flag[:2] + flag[2:].replace("-", "_"), default="")  # as tyro does, it takes both spellings
    known, _ = early.parse_known_args(argv)
    if known.resume:
        return _parse_resumed(args_type, argv, known.resume)
    env = known.env
    if env in ("", "auto"):
        env = "none" if known.online_steps == "0" and known.dataset not in ("", "auto", "none") else "point-mass-wall"
    name = known.dataset if env == "none" else env
    args = tyro.cli(args_type, args=argv, default=_with_settings(args_type(), settings, name))
    dataset = args.dataset
    if dataset == "auto":
        dataset = datasets.own(env) if args.offline_steps else "none"
    args = dataclasses.replace(args, env=env, dataset=dataset)
    check(args)
    return args


def _with_settings(args: Any, settings: dict[str, dict], name: str) -> Any:
    """`args` with the defaults of every family whose prefix `name` has. A file is known by its folder's and own name."""
    words = [name, *pathlib.PurePath(name).parts, *pathlib.PurePath(name).stem.split("_")]
    for prefix in sorted(settings, key=len):
        if any(re.match(re.escape(prefix) + "(?![a-z0-9])", word.lower()) for word in words):
            traced = {f.name for f in dataclasses.fields(args.hyper)}
            changes = settings[prefix]
            hyper = args.hyper.replace(**{k: v for k, v in changes.items() if k in traced})
            args = dataclasses.replace(args, hyper=hyper, **{k: v for k, v in changes.items() if k not in traced})
    return args


def _parse_resumed(args_type: type, argv: list[str], folder: str) -> Any:
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise UsageError(f"--resume {folder}: no config.json there, so this is not a run's folder")
    try:
        settings = json.loads(path.read_text())["settings"]
    except (json.JSONDecodeError, KeyError) as error:
        raise UsageError(f"--resume {folder}: its config.json is damaged ({error})") from None
    saved = from_json(args_type, settings)
    asked = tyro.cli(args_type, args=argv, default=saved)
    saved = dataclasses.replace(saved, resume=folder)
    ours, theirs = _flat(asked), _flat(saved)
    differing = [k for k in ours if ours[k] != theirs[k] and k != "resume"]
    if differing:
        pairs = ", ".join(f"{k} is {theirs[k]} there and {ours[k]} here" for k in differing)
        raise UsageError(f"--resume {folder}: that run has other settings ({pairs}); drop these flags, or start a new run without --resume")
    return saved


def _flat(args: Any) -> dict:
    fields = dataclasses.asdict(args)
    return {**fields, **fields.pop("hyper")}


def to_json(args: Any) -> dict:
    """The settings as plain dictionaries, for config.json."""
    return dataclasses.asdict(args)


def from_json(args_type: type, saved: dict) -> Any:
    """The inverse of `to_json`; settings that `args_type` does not know are an error."""
    default = args_type()
    unknown = set(saved) - {f.name for f in dataclasses.fields(default)}
    if unknown:
        raise UsageError(f"this run was made by another script or version: it has the settings {', '.join(sorted(unknown))}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    return dataclasses.replace(default, **{**values, "hyper": default.hyper.replace(**saved["hyper"])})


def check(args: Any) -> None:
    """Raises UsageError for the first flag, of those that all scripts share, with which no run can be made."""
    for name, least in (
        ("num_seeds", 1), ("num_envs", 1), ("batch_size", 1), ("eval_episodes", 1), ("seed", 0), ("offline_steps", 0), ("online_steps", 0),
        ("retrain_steps", 0), ("eval_every", 0), ("checkpoint_every", 0), ("buffer_size", 0), ("upsample", 0), ("dropout", 0),
        ("random_steps", 0), ("ensemble", 1), ("target_subset", 1), ("num_samples", 1), ("policy_every", 1),
    ):  # fmt: skip
        value = getattr(args, name, least)
        if not value >= least:
            raise UsageError(f"{_flag(name)} must be at least {least}, not {value}")
    if getattr(args, "upsample", 0) > 1 or getattr(args, "dropout", 0) >= 1:
        raise UsageError("--upsample is a share of the batch, at most 1, and --dropout a rate below 1")
    if min(getattr(args, "count_bins", (1,))) < 1:
        raise UsageError(f"--count-bins must be at least 1 1, not {args.count_bins}")
    if args.env != "none":
        try:
            envs.make(args.env, args.physics)
        except ValueError as error:
            raise UsageError(f"--env {args.env}: {error}") from None
    if args.offline_steps == args.online_steps == getattr(args, "retrain_steps", 0) == 0:
        raise UsageError("nothing to do: --offline-steps, --online-steps and --retrain-steps are all 0")
    if args.offline_steps and args.dataset == "none":
        raise UsageError(f"--offline-steps {args.offline_steps} needs --dataset; {args.env} has none of its own")
    for name in ("hidden", "critic_hidden"):
        sizes = getattr(args, name, (1,))
        if min((*sizes, len(sizes))) < 1:
            raise UsageError(f"{_flag(name)} needs at least one layer of at least one unit, not {sizes}")
    if not args.max_q > 0:
        raise UsageError(f"--max-q must be above 0, not {args.max_q:g}; inf for no limit")
    if getattr(args, "offline_ratio", 0) > 1:
        raise UsageError(f"--offline-ratio is a share of the batch, at most 1, not {args.offline_ratio:g}")
    if not getattr(args, "init_alpha", 1) > 0:
        raise UsageError(f"--init-alpha must be above 0, not {args.init_alpha:g}")
    if args.env == "none" and args.online_steps:
        raise UsageError(f"--online-steps {args.online_steps} needs --env, the environment to act in; for none, --online-steps 0")
    updates = args.num_envs * args.utd_ratio
    if args.online_steps and (updates < 1 or updates != round(updates)):
        raise UsageError(
            f"--utd-ratio {args.utd_ratio} with --num-envs {args.num_envs} makes {updates:g} gradient steps per vector step; "
            "their product must be a whole number, at least 1"
        )
    for name, steps in [("online_steps", args.online_steps), ("buffer_size", args.buffer_size)] + [
        ("retrain_at", steps) for steps in getattr(args, "retrain_at", ())
    ]:
        if steps % args.num_envs:
            near = math.ceil(steps / args.num_envs) * args.num_envs
            raise UsageError(f"{_flag(name)} {steps} is not a multiple of --num-envs {args.num_envs}; the next one is {near}")
    for steps in getattr(args, "retrain_at", ()):
        if not 0 <= steps <= args.online_steps:
            raise UsageError(f"--retrain-at {steps} is outside 0 .. --online-steps {args.online_steps}")
    if getattr(args, "retrain_steps", 0) and args.dataset == "none" and min(args.retrain_at or (args.online_steps,)) == 0:
        raise UsageError("--retrain-steps before any online step needs --dataset: there is nothing to learn from yet")
    _, labels = grid(args)
    if args.export:
        if not args.online_steps or 0 < args.buffer_size < args.online_steps:
            raise UsageError("--export needs online steps, and a buffer that holds all of them (--buffer-size 0)")
        for label in labels:
            datasets.check_free(export_id(args, label))


def export_id(args: Any, label: "RunLabel") -> str:
    """The Minari id under which `--export` writes one run's experience."""
    setting = "".join("-" + re.sub(r"[^\w-]", "_", word.replace("=", "-")) for word in label.setting.split())
    return f"{args.export}-seed{label.seed}{setting}-v0"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def load_dataset(args: Any) -> Any:
    """The dataset of `args`, its card printed, checked to fit the environment; None for `--dataset none`."""
    if args.dataset == "none":
        return None
    data = datasets.load(args.dataset, clip_out_of_range=args.clip_actions)
    if args.env != "none":
        env = envs.make(args.env, args.physics)
        datasets.check_fits(data, env.observation_size, env.action_size, args.env)
    datasets.print_card(data.card)
    return data


def scale_returns(args: Any, hyper: Any, data: Any) -> Any:
    """`hyper` with its reward_scale such that the dataset's episode returns, best less worst, span `--return-range`."""
    if not args.return_range or data is None:
        return hyper
    worst, best = data.card["return_quantiles"][0], data.card["return_quantiles"][-1]
    if best <= worst:
        raise UsageError(f"--return-range {args.return_range:g}: every episode of {data.card['id']} has the return {best:g}; use 0")
    return hyper.replace(reward_scale=hyper.reward_scale * args.return_range / (best - worst))


class RunLabel(NamedTuple):
    """Which of the side-by-side runs this is: its seed, and the swept settings with their values."""

    seed: int
    setting: str


def grid(args: Any) -> tuple[Any, list[RunLabel]]:
    """The runs of one program: every combination of the swept settings, each with all seeds.

    Returns (`args.hyper` with a float32 array [runs] in each field, the labels of the runs, seeds varying fastest).
    """
    names = [f.name for f in dataclasses.fields(args.hyper)]
    swept = {}
    for item in args.sweep:
        name, _, values = item.partition("=")
        name = name.replace("-", "_")
        if name in swept:
            raise UsageError(f"--sweep {item}: {name.replace('_', '-')} is swept twice; list all its values in one")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3) or names
            raise UsageError(f"--sweep {item}: {name!r} is not a traced setting; did you mean {', '.join(near)}?")
        try:
            swept[name] = [float(v) for v in values.split(",")]
        except ValueError:
            raise UsageError(f"--sweep {item}: write NAME=NUMBER,NUMBER,...") from None
    combinations = [dict(zip(swept, values)) for values in itertools.product(*swept.values())]
    labels = [
        RunLabel(args.seed + k, " ".join(f"{name.replace('_', '-')}={value:g}" for name, value in combination.items()))
        for combination in combinations
        for k in range(args.num_seeds)
    ]
    column = {
        name: jnp.float32([c.get(name, getattr(args.hyper, name)) for c in combinations for _ in range(args.num_seeds)]) for name in names
    }
    return args.hyper.replace(**column), labels


class Chunk(NamedTuple):
    """A stretch of one phase that runs as one compiled call. Steps are gradient steps; online, environment steps."""

    phase: str
    start: int
    length: int
    evaluate: bool
    save: bool
    first: bool  # of its phase
    last: bool
    collected: int  # online rows, before the chunk


def chunks(args: Any, phase: str, start: int, end: int, collected: int = 0) -> list[Chunk]:
    """`phase` from step `start` to `end`, cut where an evaluation or a checkpoint is due and at the end."""
    if end <= start:
        return []
    block = args.num_envs if phase == "online" else 1
    cuts = {end: (True, True)}
    evaluate_every = args.eval_every or math.ceil((end - start) / 4)
    for every, mark in ((evaluate_every, (True, False)), (args.checkpoint_every or evaluate_every, (False, True))):
        for step in range(every * (start // every + 1), end, every):
            cut = min(math.ceil(step / block) * block, end)
            old = cuts.get(cut, (False, False))
            cuts[cut] = (old[0] or mark[0], old[1] or mark[1])
    edges = [start, *sorted(cuts)]
    return [
        Chunk(phase, a, b - a, *cuts[b], a == start, b == end, a if phase == "online" else collected) for a, b in itertools.pairwise(edges)
    ]
