"""The settings of a run, and the way to them from a command line, a call or a run's folder.

A script's `Args` inherits `Experiment`; its `Hyper`, the settings that are traced, inherits `Traced`. The
table `FAMILIES` in the script holds the paper's settings by environment family. A call such as
`Args(env="antmaze-umaze", expectile=0.8)` gives the settings in force: those named in the call, then the
table's for this environment, then the defaults. `parse` does the same with flags.
"""

import argparse
import dataclasses
import difflib
import json
import math
import pathlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import tyro
from flax import struct

from ooo_rl import envs
from ooo_rl.data.datasets import public
from ooo_rl.data.datasets.choices import kind
from ooo_rl.data.datasets.files import is_file
from ooo_rl.data.datasets.write import check_free, check_writable
from ooo_rl.data.errors import UsageError, guarded
from ooo_rl.data.modes import check_jax, check_xla_flags, use_all_cores, use_float32
from ooo_rl.data.recipes import library
from ooo_rl.data.runs import ends, processes, worlds
from ooo_rl.data.runs.bounds import (
    Fraction,
    NonNegative,
    Number,
    Positive,
    Seed,
    Size,
    Steps,
    With,
    check_bounds,
    flag,
    needs_of,
)
from ooo_rl.data.runs.online_change import RATIO, check_online_change, online_hyper, targets
from ooo_rl.data.runs.sweep import RunLabel, grid

__all__ = ["Experiment", "Traced", "UsageError", "launch"]  # what scripts use

FORMAT = 2  # of a run's folder and its checkpoints: what another one wrote is refused
DEFAULT_ENVS = {"continuous": "point-mass-wall", "discrete": "toy-maze"}  # by the method's kind of actions


class InForce(type):
    """The type of `Args` classes: a call fills in what it does not name.

    Traced settings are named like all others.
    """

    def __call__(cls, **named: Any) -> Any:
        if named.get("resume"):
            return _resumed(cls, named)
        known = {f.name for f in (*dataclasses.fields(cls), *dataclasses.fields(_hyper_type(cls)))}
        if unknown := sorted(set(named) - known):
            near = difflib.get_close_matches(unknown[0], sorted(known), n=3)
            raise UsageError(
                f"there is no setting {unknown[0]!r}; did you mean {', '.join(near) or 'another script'}?"
            )
        family = _family(cls, *(named.get(name, "auto") for name in ("env", "dataset", "online_steps")))
        if "hyper" in named:  # it says all of the traced settings
            family = {name: value for name, value in family.items() if name in cls.__dataclass_fields__}
        return cls.exactly(family | named)

    def exactly(cls, values: dict[str, Any]) -> Any:
        """The instance that has these values, traced ones among them, and defaults for the rest."""
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        fields = {f.name for f in dataclasses.fields(cls)}
        hyper = values.get("hyper") or _hyper_type(cls)()
        hyper = hyper.replace(**{k: v for k, v in values.items() if k not in fields})
        return super().__call__(**{k: v for k, v in values.items() if k in fields} | {"hyper": hyper})


@struct.dataclass
class Traced:
    """Settings that are traced, not compiled in: one value per run, so each can be swept in one program."""

    discount: Fraction = 0.99
    """discount factor"""
    reward_scale: NonNegative = 1.0
    """task rewards are multiplied by this"""
    reward_bias: Number = 0.0
    """and this is added"""


@dataclass(frozen=True)
class Experiment(metaclass=InForce):
    """The settings that every script has: what is run, on what, and what is kept of it."""

    actions: ClassVar[Literal["continuous", "discrete"]] = "continuous"
    """the kind of actions that the method is for; no setting, each script has its own"""
    # experiment
    env: str = "auto"
    """environment to act in, by name or as my_module:MyTask; auto: the point mass (discrete actions: the toy
    maze), or none if a dataset is named and there are no online steps"""
    num_seeds: Size = 5
    """seeds, trained side by side"""
    seed: Seed = 0
    """first seed"""
    runs_at_once: Steps = 0
    """runs (seeds x swept settings) that are on the devices at once, while the others wait in the host's
    memory; 0: all that there is room for"""
    init_from: str = ""
    """folder of a run to start from: what fits of its agents is taken, seed by seed"""
    eval_every: Steps = 0
    """steps of the phase between evaluations; 0: a quarter of each phase"""
    eval_episodes: Size = 20
    """episodes of each evaluation, with the mean action"""
    q_bias: bool = False
    """evaluate Q, too: eval/predicted_q, of the first actions of the episodes, and eval/q_bias, how far it is
    above the discounted return that followed"""
    eval_env: str = ""
    """evaluate in this Gymnasium environment (by id) instead of in --env"""
    checkpoint_every: Steps = 0
    """steps of the phase between checkpoints; 0: with each evaluation"""
    runs_dir: str = "runs"
    """folder that holds all runs"""
    name: str = ""
    """name of this run's folder; empty: the time it started"""
    resume: str = ""
    """folder of a run to go on with, from its last checkpoint; all other flags come from there"""
    physics: Literal["auto", "mjx", "mjx-warp", "mujoco"] = "auto"
    """physics engine, for environments that have one"""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """send metrics there as well as to metrics.csv"""
    sweep: tuple[str, ...] = ()
    """traced settings to sweep, e.g. discount=0.9,0.99 actor-lr=1e-4,3e-4: every combination with all seeds,
    in one program"""
    online_change: tuple[str, ...] = ()
    """settings that change as the online phase begins, traced ones and the share of offline rows, e.g.
    expectile=0.85 offline-ratio=0"""
    online_change_over: Annotated[Steps, With("online_change")] = 0
    """environment steps in which they get there, linearly; 0: at once"""
    max_q: Positive = 1000.0
    """a seed whose mean |Q-value| is beyond this many times the largest |reward| / (1 - discount) has
    diverged and is stopped; inf: no limit"""
    # data
    dataset: str = "auto"
    """Minari id, or a .hdf5 or .npz file; none: no offline data; own: the one made for the environment; auto:
    own if there are offline steps, else none"""
    clip_actions: Annotated[bool, With("dataset")] = False
    """clip dataset actions that lie outside [-1, 1] instead of refusing them"""
    action_low: Annotated[Number, With("dataset")] = 0.0
    """smallest action in the dataset's file, which becomes -1; 0 with --action-high 0: as the file says"""
    action_high: Annotated[Number, With("dataset")] = 0.0
    """largest action in the dataset's file, which becomes 1"""
    export: str = ""
    """write each seed's online experience as the Minari dataset EXPORT-seed<k>-v0, e.g. ooo/my-run"""
    # steps and rows
    offline_steps: Steps = 1_000_000
    """gradient steps on the dataset"""
    online_steps: Steps = 1_000_000
    """environment steps"""
    num_envs: Steps = 0
    """environments that act side by side, per seed; 0: 8, or more where MJX simulates them on a GPU, which
    steps 1,000 in the time of one"""
    utd_ratio: Annotated[Positive, With("online_steps")] = 1.0
    """gradient steps per environment step; num_envs * utd_ratio follow each step of all environments"""
    buffer_size: Annotated[Steps, With("online_steps")] = 0
    """online rows kept, a multiple of num_envs; 0: all"""
    batch_size: Size = 256
    """rows of a batch"""
    end_reward: Number = ends.AS_GIVEN
    """rows that pay at least this, before scaling, end the return, and no others do (inf: none); -inf: the
    data and the environment say where it ends"""


def launch(args_type: type, train: Callable[[Any], Any]) -> None:
    """A script's command: settings from the command line, then `train`.

    An error that the user can mend is one line. Started several times over, it is one experiment: see
    `processes`.
    """

    def main() -> None:
        check_xla_flags()
        use_float32()
        use_all_cores()
        processes.join()
        with processes.together():
            args = parse(args_type)
        train(args)

    guarded(main)


def parse(args_type: type, argv: list[str] | None = None) -> Any:
    """Settings of type `args_type` from the command line; `--help` shows what is in force.

    With `--resume` everything comes from the run's config.json, and a flag that says otherwise is an error.
    """
    argv = sys.argv[1:] if argv is None else argv
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("env", "dataset", "online_steps", "resume"):
        early.add_argument(flag(name), "--" + name, default="auto")  # as tyro does, it takes both spellings
    known, _ = early.parse_known_args(argv)
    if known.resume not in ("", "auto"):
        return _flags(args_type, argv, args_type(resume=known.resume))
    default = args_type.exactly(_family(args_type, known.env, known.dataset, known.online_steps))
    return resolved(_flags(args_type, argv, default))


def _flags(args_type: type, argv: list[str], default: Any) -> Any:
    """`default` with what the flags say; traced settings are flags like all others."""
    return tyro.cli(args_type, args=argv, default=default, config=(tyro.conf.OmitArgPrefixes,))


# --- what is in force ---


def _family(args_type: type, env: str, dataset: str, online_steps: int | str) -> dict[str, Any]:
    """The settings in the script's table for an environment, or for a dataset if there is no environment.

    The table's keys are prefixes of ids, or tuples of prefixes. A longer prefix wins over a shorter one, and
    of two alike the later one. The path of a file says nothing, unless the file has the name that D4RL gives
    to its own.
    """
    env = _env(args_type, env, dataset, online_steps)
    name = dataset if env == "none" else env
    table = getattr(sys.modules[args_type.__module__], "FAMILIES", {})
    if is_file(name):
        name = public.d4rl_id(name)
    words = [] if name.startswith(("/", "~", ".")) else [name, *name.split("/")]
    found: dict[str, Any] = {}
    if env != "none" and not envs.is_ours(env) and dataset == "auto":
        found["offline_steps"] = 0  # a user's own environment has no dataset of ours
    by_prefix = [
        (prefix, part) for key, part in table.items() for prefix in ((key,) if isinstance(key, str) else key)
    ]
    for prefix, part in sorted(by_prefix, key=lambda pair: len(pair[0])):
        if any(re.match(re.escape(prefix) + "(?![a-z0-9])", word.lower()) for word in words):
            found |= part
    return found


def _env(args_type: type, env: str, dataset: str, online_steps: int | str) -> str:
    """The environment that `--env auto` means."""
    if env not in ("", "auto"):
        return env
    offline_only = str(online_steps) == "0" and dataset not in ("", "auto", "none")
    return "none" if offline_only else DEFAULT_ENVS[args_type.actions]


def _hyper_type(args_type: type) -> type:
    return type(args_type.__dataclass_fields__["hyper"].default)


def resolved(args: Any) -> Any:
    """`args` with the environment and the dataset that "auto" means, checked."""
    check_jax()
    if args.resume:
        return args
    env = _env(type(args), args.env, args.dataset, args.online_steps)
    dataset = args.dataset
    if dataset == "own" or (dataset == "auto" and args.offline_steps):
        dataset = library.only_one_for(env)
    dataset = "none" if dataset == "auto" else dataset
    args = dataclasses.replace(args, env=env, dataset=dataset)
    if not args.num_envs and not worlds.are_cheap(env, args.physics):
        args = dataclasses.replace(args, num_envs=worlds.FEW)
    check(args)
    return args


# --- a run's own settings ---


def to_json(args: Any) -> dict:
    """The settings as plain dictionaries, for config.json."""
    return dataclasses.asdict(args, dict_factory=lambda pairs: {name: _plain(v) for name, v in pairs})


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: infinity, for which JSON has no number, becomes "inf" or "-inf"."""
    value = value.item() if isinstance(value, np.generic) else value
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def from_json(args_type: type, saved: dict) -> Any:
    """The inverse of `to_json`; settings that `args_type` does not know are an error."""
    unknown = set(saved) - {f.name for f in dataclasses.fields(args_type)}
    if unknown:
        raise UsageError(
            f"this run was made by another script or version: it has the settings "
            f"{', '.join(sorted(unknown))}"
        )
    hyper = _hyper_type(args_type)
    own, traced = _numbers(args_type, saved), _numbers(hyper, saved["hyper"])
    return args_type.exactly({**own, "hyper": hyper(**traced)})


def _numbers(kind: type, saved: dict) -> dict:
    """`saved` with "inf" and "-inf" read as numbers where the dataclass `kind` has a number."""
    reals = {f.name for f in dataclasses.fields(kind) if isinstance(f.default, float)}
    infinite = {name for name in reals & saved.keys() if saved[name] in ("inf", "-inf")}
    return {**saved, **{name: float(saved[name]) for name in infinite}}


def read_config(folder: str, what: str) -> dict:
    """The config.json of a run's folder; if it is unusable, a UsageError that begins with the flag `what`."""
    path = pathlib.Path(folder).expanduser() / "config.json"
    if not path.is_file():
        raise UsageError(f"{what} {folder}: no config.json there, so this is not a run's folder")
    try:
        config = json.loads(path.read_text())
        config["settings"]["hyper"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{what} {folder}: its config.json is damaged ({error})") from None
    if (found := config.get("format", 1)) != FORMAT:
        raise UsageError(
            f"{what} {folder}: a folder of format {found}, and this version reads format {FORMAT}; "
            f"go on with it in the version that made it (git commit {config.get('git_commit', 'unknown')})"
        )
    return config


def _resumed(args_type: type, named: dict[str, Any]) -> Any:
    """The settings of the run in `named["resume"]`; a UsageError if `named` says otherwise anywhere."""
    folder = named["resume"]
    config = read_config(folder, "--resume")
    try:
        saved = from_json(args_type, config["settings"])
        check_bounds(saved)
        check_bounds(saved.hyper)
    except (TypeError, ValueError, AttributeError, UsageError) as error:
        ours, theirs = pathlib.Path(sys.modules[args_type.__module__].__file__).stem, config.get("method")
        other = theirs and theirs != ours
        fault = f"it is a run of {theirs}, and this is {ours}" if other else "its config.json is damaged"
        raise UsageError(f"--resume {folder}: {fault} ({error})") from None
    ours, theirs = _flat(named), _flat(dataclasses.asdict(saved))
    differing = [k for k in ours if ours[k] != theirs.get(k) and k != "resume"]
    if differing:
        pairs = ", ".join(f"{k} is {theirs.get(k)} there and {ours[k]} here" for k in differing)
        raise UsageError(
            f"--resume {folder}: that run has other settings ({pairs}); drop these flags, or start a new run "
            "without --resume"
        )
    return args_type.exactly(
        {**{f.name: getattr(saved, f.name) for f in dataclasses.fields(saved)}, "resume": folder}
    )


OF_VALUES = {  # what gives a Q-value its meaning, and what a script that lacks the setting does
    "discount": None, "reward_scale": 1.0, "reward_bias": 0.0, "return_range": 0.0, "max_reward": 0.0,
    "end_reward": ends.AS_GIVEN,
}  # fmt: skip


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by name, the traced ones among the others."""
    hyper = settings.get("hyper", {})
    hyper = hyper if isinstance(hyper, dict) else dataclasses.asdict(hyper)
    return {**{k: v for k, v in settings.items() if k != "hyper"}, **hyper}


# --- checks ---


def check(args: Any) -> None:
    """Raises UsageError for the first setting with which no run can be made."""
    check_bounds(args)
    check_bounds(args.hyper)
    check_online_change(args)
    if getattr(args, "frozen_bonus", False) and args.intrinsic == "none":
        raise UsageError("--frozen-bonus needs a bonus to freeze: an --intrinsic other than none")
    check_retraining(args)
    if args.seed + args.num_seeds > 2**32:
        raise UsageError(
            f"--seed {args.seed} with --num-seeds {args.num_seeds} goes beyond 2^32 - 1, the largest seed"
        )
    if args.env != "none":
        try:
            discrete = envs.is_discrete(envs.make(args.env, args.physics))
        except ValueError as error:
            raise UsageError(f"--env {args.env}: {error}") from None
        if discrete != (args.actions == "discrete"):
            raise UsageError(
                f"--env {args.env} has {kind(discrete)} actions, and this method needs {args.actions} ones: "
                "take another environment or another method"
            )
    if args.offline_steps and args.dataset == "none":
        raise UsageError(
            f"--offline-steps {args.offline_steps} needs --dataset; {args.env} has none of its own"
        )
    usual = _family(type(args), args.env, args.dataset, args.online_steps)
    ratio, own = (getattr(of, RATIO, 0) for of in (args, type(args)))
    chosen = ratio > 0 and ratio != usual.get(RATIO, own)
    if chosen and args.dataset == "none":
        raise UsageError(f"--offline-ratio {ratio:g} needs --dataset, and it is none; name one, or use 0")
    if chosen and not round(ratio * args.batch_size):
        raise UsageError(f"--offline-ratio {ratio:g} of --batch-size {args.batch_size} is no row; use 0")
    if args.dataset == "none" and (new := targets(args).get(RATIO, 0)) > 0:
        raise UsageError(f"--online-change offline-ratio={new:g} needs --dataset, and it is none; name one")
    if args.env == "none" and args.online_steps:
        raise UsageError(
            f"--online-steps {args.online_steps} needs --env, the environment to act in; for none, "
            "--online-steps 0"
        )
    if args.num_envs:
        worlds.check_vector_steps(args)
    hyper, labels = grid(args)
    check_ranges(args, hyper)
    if args.export:
        if not args.online_steps or 0 < args.buffer_size < args.online_steps:
            raise UsageError(
                "--export needs online steps, and a buffer that holds all of them (--buffer-size 0)"
            )
        if args.end_reward != ends.AS_GIVEN:
            raise UsageError("--export writes the environment's own ends, and so needs --end-reward=-inf")
        check_writable()
        for label in labels:
            check_free(export_id(args, label))


def check_retraining(args: Any) -> None:
    """Raises UsageError for a setting of the third phase that could have no effect."""
    stops = getattr(args, "retrain_at", ())
    if stops and not args.retrain_steps:
        raise UsageError("--retrain-at needs --retrain-steps, the gradient steps of each retraining")
    if getattr(args, "warm_start", False) and len(set(stops)) < 2:
        raise UsageError("--warm-start needs two --retrain-at: an exploiter goes on from the one before")
    if getattr(args, "sync_explorer", False) and min(stops, default=args.online_steps) >= args.online_steps:
        raise UsageError("--sync-explorer needs a --retrain-at after which the explorer goes on")
    share, own = (getattr(of, "upsample", 0) for of in (args, type(args)))
    usual = _family(type(args), args.env, args.dataset, args.online_steps).get("upsample", own)
    if share and share != usual and not round(share * args.batch_size):
        raise UsageError(f"--upsample {share:g} of --batch-size {args.batch_size} is no row; take 0 for none")


def useless(args: Any) -> dict[str, With]:
    """Settings that somebody chose and that change nothing, with what each of them needs to act."""
    usual = type(args).exactly(_family(type(args), args.env, args.dataset, args.online_steps))
    ours, usual = _flat(vars(args)), _flat(vars(usual))
    needs = needs_of(type(args)) | needs_of(type(args.hyper))
    swept = {word.partition("=")[0].replace("-", "_") for word in args.sweep}
    chosen = (name for name in needs if ours[name] != usual[name] or name in swept)
    return {name: needs[name] for name in chosen if not needs[name].met_by(ours)}


def check_ranges(args: Any, hyper: Any) -> None:
    """Raises UsageError if a setting `x_min` is above `x_max` in a run of `hyper` [runs], early or late."""
    for now in (hyper, online_hyper(args, hyper, args.online_steps)):
        for name, low in vars(now).items():
            above = name.removesuffix("_min") + "_max"
            if name.endswith("_min") and (low > getattr(now, above)).any():
                raise UsageError(f"{flag(name)} is above {flag(above)}, so no value is within them")


def export_id(args: Any, label: RunLabel) -> str:
    """The Minari id under which `--export` writes one run's experience."""
    setting = "".join("-" + re.sub(r"[^\w-]", "_", word.replace("=", "-")) for word in label.setting.split())
    return f"{args.export}-seed{label.seed}{setting}-v0"


def other_values(folder: str, ours: Any, card: dict) -> list[str]:
    """What gives Q-values another meaning in the run in `folder`, as "name=theirs, here ours".

    These are settings, and where rewards are scaled by the data's, the data; `card` is of ours.
    """
    theirs, ours = _flat(read_config(folder, "--init-from")["settings"]), _flat(vars(ours))
    pairs = ((n, float(theirs.get(n, other)), float(ours.get(n, other))) for n, other in OF_VALUES.items())
    found = [f"{flag(name)[2:]}={old:g}, here {new:g}" for name, old, new in pairs if old != new]
    their_card = json.loads((pathlib.Path(folder).expanduser() / "dataset.json").read_text())
    for name, of in {"return_range": "return_quantiles", "max_reward": "reward_range"}.items():
        if theirs.get(name) and theirs[name] == ours.get(name) and of in card and of in their_card:
            (low, *_, high), (our_low, *_, our_high) = their_card[of], card[of]
            old, new = (high - low, our_high - our_low) if name == "return_range" else (high, our_high)
            if abs(old - new) > 0.01 * abs(old):  # data made anew differ in the last bits
                found.append(
                    f"{flag(name)[2:]} divides by {old:g}, here by {new:g}, since the data are others"
                )
    return found
