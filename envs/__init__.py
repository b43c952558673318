"""Environments by name: `envs.make("point-mass-wall")`, `envs.names()`."""

import difflib
from functools import partial

from envs import probes
from envs.base import Env, State, Task, step_and_reset
from envs.point_mass_wall import PointMassWall

__all__ = ["ENGINES", "Env", "State", "Task", "make", "names", "step_and_reset"]

ENGINES = ("auto", "mjx", "mjx-warp", "mujoco")
_JAX_TASKS = {  # computed in JAX by hand: no physics engine behind them
    "point-mass-wall": PointMassWall,
    "point-mass-wall-sparse": partial(PointMassWall, reward="goal"),
    "probe-constant-reward": probes.ConstantReward,
    "probe-reward-is-obs": probes.RewardIsObs,
    "probe-delayed-reward": probes.DelayedReward,
    "probe-action-reward": probes.ActionReward,
    "probe-match-obs": probes.MatchObs,
}


def names() -> list[str]:
    """Every name that `make` knows."""
    return sorted(_JAX_TASKS)


def make(name: str, physics: str = "auto", **settings) -> Env:
    """The environment `name`; `settings` go to its constructor. Raises ValueError, with the near names, if there is none."""
    if name not in _JAX_TASKS:
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4) or names()
        raise ValueError(f"unknown environment {name!r}; did you mean {', '.join(near)}? All: {', '.join(names())}")
    if physics not in ENGINES:
        raise ValueError(f"unknown physics {physics!r}; choose one of {', '.join(ENGINES)}")
    if physics != "auto":
        raise ValueError(f"{name} is computed in JAX by hand and has no engine to choose; leave --physics auto, not {physics}")
    return _JAX_TASKS[name](**settings)
