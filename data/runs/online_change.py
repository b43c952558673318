"""Settings that change as the online phase begins, at once or linearly: `--online-change`.

Traced settings can change, and the share of offline rows in a batch. What changes is a function of the
environment steps so far. So it is the same whatever the chunks of a run are, and after a resumption.
"""

import dataclasses
import difflib
from typing import Any

import jax
import jax.numpy as jnp

from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs.bounds import bounds_of, check_value, flag

RATIO = "offline_ratio"  # the one setting that can change though no program traces it as it stands
ELSEWHERE = {  # traced settings that are not read while a method acts, and when they are
    **dict.fromkeys(("frozen_bonus_coef", "retrain_scale", "retrain_bias", "upsample_from"), "in retraining"),
    "prior_lr": "in the offline phase",
    "online_fraction": "as the online phase begins",
}


def online_hyper(args: Any, hyper: Any, added: jax.Array | int) -> Any:
    """The traced settings `hyper` after `added` [] environment steps online; of one run, or arrays [runs]."""
    names = [name for name in targets(args) if name != RATIO]
    return hyper.replace(**{name: _moved(args, name, getattr(hyper, name), added) for name in names})


def online_ratio(args: Any, added: jax.Array | int) -> float | jax.Array:
    """The share of offline rows after `added` [] environment steps; an array [] if it changes."""
    return _moved(args, RATIO, args.offline_ratio, added) if RATIO in targets(args) else args.offline_ratio


def _moved(args: Any, name: str, old: Any, added: Any) -> jax.Array:
    new = jnp.full_like(old, targets(args)[name], jnp.float32)
    if not args.online_change_over:
        return new
    share = jnp.minimum(added / args.online_change_over, 1.0)
    return (1 - share) * old + share * new


def targets(args: Any) -> dict[str, float]:
    """Setting -> the value it goes to, from the words of `--online-change`."""
    found = {}
    for item in args.online_change:
        name, _, value = item.partition("=")
        name = name.replace("-", "_")
        if name in found:
            raise UsageError(f"--online-change {item}: {name.replace('_', '-')} changes twice")
        try:
            found[name] = float(value)
        except ValueError:
            raise UsageError(f"--online-change {item}: write NAME=NUMBER") from None
    return found


def check_online_change(args: Any) -> None:
    """Raises UsageError for the first change that cannot be carried out."""
    traced = {f.name: getattr(args.hyper, f.name) for f in dataclasses.fields(args.hyper)}
    if hasattr(args, RATIO):
        traced[RATIO] = args.offline_ratio
    bounds = bounds_of(type(args)) | bounds_of(type(args.hyper))
    for name, new in targets(args).items():
        said = f"--online-change {name.replace('_', '-')}={new:g}"
        if name not in traced:
            near = ", ".join(difflib.get_close_matches(name, traced, n=3) or traced)
            known = "is fixed when the program compiles" if hasattr(args, name) else "is no setting"
            raise UsageError(f"{said}: {name} {known}; what can change is {near}")
        if name.removeprefix("online_") in traced.keys() - {name}:
            offline = flag(name.removeprefix("online_"))[2:]
            raise UsageError(f"{said}: {flag(name)} is where {offline} begins online; change {offline}")
        read = ELSEWHERE.get(name)
        if name == "cql_weight" and hasattr(args.hyper, "online_fraction"):  # Off2OnRL's: online it is SAC
            read = "in the offline phase"
        if read:
            raise UsageError(
                f"{said}: {flag(name)} has its effect {read}; give it the value that it is to have"
            )
        by_data = [other for other in ("return_range", "max_reward") if getattr(args, other, 0)]
        if name == "reward_scale" and by_data:
            raise UsageError(
                f"{said}: {flag(by_data[0])} scales by the data's rewards; it must be 0 for this"
            )
        if name in bounds:
            check_value(name, new, bounds[name])
        if hasattr(args, "mc_bootstrap") and name in ("discount", "reward_scale", "reward_bias"):
            raise UsageError(f"{said}: the returns of offline rows hold for one value only")
        if name == RATIO and hasattr(args, "n_steps"):
            raise UsageError(f"{said}: with n-step returns this share is fixed when the program compiles")
        if name == RATIO and min(new, args.offline_ratio) < 0:
            raise UsageError(f"{said}: a share below 0 means no share; set {flag(RATIO)} to begin with, too")
        if args.online_change_over:
            _check_between(said, traced[name], new, bounds.get(name))
    if args.online_change and not args.online_steps:
        raise UsageError("--online-change needs --online-steps, in which to change")
    if args.online_change_over and not args.online_change:
        raise UsageError(
            f"--online-change-over {args.online_change_over}: no --online-change says what changes"
        )


def _check_between(said: str, old: float, new: float, bounds: Any) -> None:
    """Raises UsageError unless all numbers between `old` and `new` can be had."""
    why = "is only defined for whole numbers" if bounds and bounds.whole else ""
    if not jnp.isfinite(jnp.array([old, new])).all():
        why = f"would go from {old:g} to {new:g}"
    if why:
        raise UsageError(f"{said}: it {why}, so it cannot change linearly; leave --online-change-over 0")
