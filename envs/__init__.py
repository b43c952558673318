"""Environments by name: `envs.make("antmaze-large-diverse")`, `envs.names()`."""

import difflib
from functools import partial

from envs import adroit, antmaze, locomotion, maze2d, probes
from envs.base import Env, State, Task, step_and_reset, tally
from envs.physics import ENGINES
from envs.point_mass_wall import PointMassWall

__all__ = ["ENGINES", "Env", "State", "Task", "make", "names", "step_and_reset", "tally"]

_JAX_TASKS = {  # computed in JAX by hand: no physics engine behind them
    "point-mass-wall": PointMassWall,
    "point-mass-wall-sparse": partial(PointMassWall, reward="goal"),
    "probe-constant-reward": probes.ConstantReward,
    "probe-reward-is-obs": probes.RewardIsObs,
    "probe-delayed-reward": probes.DelayedReward,
    "probe-action-reward": probes.ActionReward,
    "probe-match-obs": probes.MatchObs,
    **{f"maze2d-{maze}": partial(maze2d.Maze2D, maze) for maze in maze2d.MAZES},
    **{f"maze2d-{maze}-dense": partial(maze2d.Maze2D, maze, "dense") for maze in maze2d.MAZES},
    "maze2d-large-missing-data": partial(maze2d.Maze2D, "large"),
}
_ANTMAZES = {  # the names tell datasets apart; environments differ by maze alone
    "umaze": ("umaze", "umaze-diverse"),
    "medium": ("medium-play", "medium-diverse"),
    "large": ("large-play", "large-diverse", "large-goal-missing"),
}
_BINARY = {"door": adroit.Door, "pen": adroit.Pen, "relocate": adroit.Relocate}
_BODIES = {  # models of MuJoCo: one of several engines moves them
    "halfcheetah": locomotion.HalfCheetah,
    "halfcheetah-sparse": locomotion.HalfCheetahSparse,
    "hopper": locomotion.Hopper,
    "walker2d": locomotion.Walker2d,
    "ant": locomotion.Ant,
    "ant-sparse": locomotion.AntSparse,
    "ant-walk": antmaze.AntWalk,
    **{f"antmaze-{name}": partial(antmaze.AntMaze, maze) for maze, own in _ANTMAZES.items() for name in own},
    **{f"antmaze-{name}-v0": partial(antmaze.AntMaze, maze, "fixed") for maze, own in _ANTMAZES.items() for name in own},
    **{f"antmaze-{maze}-gymnasium": partial(antmaze.AntMaze, maze, ant="gymnasium") for maze in _ANTMAZES},
    "door": adroit.Door,
    "hammer": adroit.Hammer,
    "hammer-truncated-expert": adroit.Hammer,
    "pen": adroit.Pen,
    "relocate": adroit.Relocate,
    **{f"{name}-binary": partial(task, reward="binary") for name, task in _BINARY.items()},
    **{f"{name}-binary-ending": partial(task, reward="binary", end_at_success=True) for name, task in _BINARY.items()},
}


def names() -> list[str]:
    """Every name that `make` knows."""
    return sorted({**_JAX_TASKS, **_BODIES})


def make(name: str, physics: str = "auto", **settings) -> Env:
    """The environment `name`; `settings` go to its constructor. Raises ValueError, with the near names, if there is none."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4) or names()
        raise ValueError(f"unknown environment {name!r}; did you mean {', '.join(near)}? All: {', '.join(names())}")
    if physics not in ENGINES:
        raise ValueError(f"unknown physics {physics!r}; choose one of {', '.join(ENGINES)}")
    if name in _BODIES:
        return _BODIES[name](physics=physics, **settings)
    if physics != "auto":
        raise ValueError(f"{name} is computed in JAX by hand and has no engine to choose; leave --physics auto, not {physics}")
    return _JAX_TASKS[name](**settings)
