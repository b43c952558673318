"""Environments by name.

`envs.make("antmaze-large-diverse")` builds one, `envs.names()` lists all, and `envs.register` adds your own.
"""

import difflib
from collections.abc import Callable
from functools import partial

from ooo_rl.envs import adroit, antmaze, kitchen, locomotion, maze2d, probes, users
from ooo_rl.envs.base import (
    Env,
    State,
    Task,
    is_discrete,
    random_actions,
    step_all,
    step_and_reset,
    tally,
)
from ooo_rl.envs.engines.physics import ENGINES
from ooo_rl.envs.point_mass_wall import PointMassWall
from ooo_rl.envs.toy_maze import ToyMaze

__all__ = [
    "ENGINES", "Env", "State", "Task", "is_discrete", "is_ours", "make", "names", "random_actions",
    "register", "step_all", "step_and_reset", "tally",
]  # fmt: skip

_JAX_TASKS = {  # written in JAX by hand, without a physics engine
    "point-mass-wall": PointMassWall,
    "point-mass-wall-sparse": partial(PointMassWall, reward="goal"),
    "probe-constant-reward": probes.ConstantReward,
    "probe-reward-is-obs": probes.RewardIsObs,
    "probe-delayed-reward": probes.DelayedReward,
    "probe-action-reward": probes.ActionReward,
    "probe-match-obs": probes.MatchObs,
    "probe-all": probes.AllProbes,
    "probe-all-discrete": probes.AllProbesDiscrete,
    **{f"maze2d-{maze}": partial(maze2d.Maze2D, maze) for maze in maze2d.MAZES},
    **{f"maze2d-{maze}-dense": partial(maze2d.Maze2D, maze, "dense") for maze in maze2d.MAZES},
    "maze2d-large-missing-data": partial(maze2d.Maze2D, "large"),
    "toy-maze": ToyMaze,
}
_ANTMAZES = {  # one name per dataset; the environments differ only by maze
    "umaze": ("umaze", "umaze-diverse"),
    "medium": ("medium-play", "medium-diverse"),
    "large": ("large-play", "large-diverse", "large-goal-missing"),
}
_BINARY = {"door": adroit.Door, "pen": adroit.Pen, "relocate": adroit.Relocate}
_D4RL_KITCHEN = {"reward": "new", "horizon": 280, "end_at_success": True}
_BODIES = {  # MuJoCo models: `physics` chooses the engine that simulates them
    "halfcheetah": locomotion.HalfCheetah,
    "halfcheetah-sparse": locomotion.HalfCheetahSparse,
    "hopper": locomotion.Hopper,
    "walker2d": locomotion.Walker2d,
    "ant": locomotion.Ant,
    "ant-sparse": locomotion.AntSparse,
    "ant-walk": antmaze.AntWalk,
    **{f"antmaze-{name}": partial(antmaze.AntMaze, maze) for maze, own in _ANTMAZES.items() for name in own},
    **{
        f"antmaze-{name}-v0": partial(antmaze.AntMaze, maze, "fixed")
        for maze, own in _ANTMAZES.items()
        for name in own
    },
    **{f"antmaze-{maze}-gymnasium": partial(antmaze.AntMaze, maze, ant="gymnasium") for maze in _ANTMAZES},
    "door": adroit.Door,
    "hammer": adroit.Hammer,
    "hammer-truncated-expert": adroit.Hammer,
    "pen": adroit.Pen,
    "relocate": adroit.Relocate,
    **{f"{name}-binary": partial(task, reward="binary") for name, task in _BINARY.items()},
    **{
        f"{name}-binary-ending": partial(task, reward="binary", end_at_success=True)
        for name, task in _BINARY.items()
    },
    **{f"kitchen-{task}": partial(kitchen.Kitchen, task) for task in kitchen.TASKS},
    **{f"kitchen-{task}-d4rl": partial(kitchen.Kitchen, task, **_D4RL_KITCHEN) for task in kitchen.TASKS},
}


_REGISTERED: dict[str, Callable[..., Env]] = {}  # what `register` added


def register(name: str, task: Callable[..., Env]) -> None:
    """Adds an environment under `name`, for `make` and for all scripts.

    `task` is a class, or a function that returns an environment. `make` calls it with its own settings, and
    with `physics` if `task` has a parameter of that name. Raises ValueError if the name is taken, empty, or
    holds a colon, slash or space.
    """
    if name in names():
        raise ValueError(f"an environment {name!r} exists already; choose another name")
    if not name or set(name) & set(":/ "):
        raise ValueError(
            f"{name!r} cannot be an environment's name: it is empty, or holds a colon, slash or space"
        )
    _REGISTERED[name] = task


def names() -> list[str]:
    """All names that `make` knows, sorted."""
    return sorted({**_JAX_TASKS, **_BODIES, **_REGISTERED})


def is_ours(name: str) -> bool:
    """Whether `name` is one of the environments that come with this package."""
    return name in _JAX_TASKS or name in _BODIES


def make(name: str, physics: str = "auto", **settings) -> Env:
    """Builds the environment `name`; `settings` go to its constructor.

    `name` is one of `names()`, or `my_package.my_module:MyTask`: a class or function that can be imported
    from the working directory. `physics` is one of `ENGINES`. Raises ValueError if there is no such
    environment (the message lists similar names), if `physics` is unknown or does not fit, or if an
    environment of your own does not keep the contract.
    """
    if physics not in ENGINES:
        raise ValueError(f"unknown physics {physics!r}; choose one of {', '.join(ENGINES)}")
    if name in _BODIES:
        return _BODIES[name](physics=physics, **settings)
    if ":" in name or name in _REGISTERED:
        task = _REGISTERED[name] if name in _REGISTERED else users.imported(name)
        return users.build(name, task, physics, settings)
    if name not in _JAX_TASKS:
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4) or names()
        raise ValueError(
            f"unknown environment {name!r}; did you mean {', '.join(near)}? All names: {', '.join(names())}"
        )
    if physics != "auto":
        raise ValueError(
            f"{name} is written in JAX and uses no physics engine; leave --physics auto, not {physics}"
        )
    return _JAX_TASKS[name](**settings)
