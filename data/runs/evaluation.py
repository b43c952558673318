"""Evaluates the policies of all runs at once, and what their critics predict.

They play on the device in `--env`, or on the host in the Gymnasium environment of `--eval-env`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ooo_rl.data.datasets.choices import kind
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs import processes
from ooo_rl.data.runs.program import RUNS, Compiled, place, real
from ooo_rl.envs.base import Env
from ooo_rl.envs.rollout import rollout

EVAL_SEED = 10_000  # of the first host episode: the same ones for every policy, phase and seed


def check_eval_env(args: Any, obs_size: int, action_size: int) -> None:
    """Raises UsageError unless a policy of these sizes can be played in `--eval-env`, where there is one."""
    if not args.eval_env:
        return
    from ooo_rl.envs import gymnasium_eval  # here: gymnasium_robotics, which it imports, prints advice

    try:
        *sizes, _, discrete = gymnasium_eval.check(args.eval_env)
    except ValueError as error:
        raise UsageError(f"--eval-env {args.eval_env}: {error}") from None
    if discrete != (args.actions == "discrete"):
        raise UsageError(
            f"--eval-env {args.eval_env} has {kind(discrete)} actions, and this method needs "
            f"{args.actions} ones"
        )
    if tuple(sizes) != (obs_size, action_size):
        raise UsageError(
            f"--eval-env {args.eval_env} has {sizes[0]} observations and {sizes[1]} actions, "
            f"the policy {obs_size} and {action_size}"
        )


def check_q_bias(args: Any, nets: Any) -> None:
    """Raises UsageError if `--q-bias` asks for what cannot be had, of a method with these networks."""
    if not args.q_bias:
        return
    if not hasattr(nets, "critic"):
        raise UsageError("--q-bias: this method has no critics, whose predictions could be compared")
    if args.eval_env or args.env == "none":
        raise UsageError("--q-bias plays in --env: name one, and leave out --eval-env")


def judge(tally: dict[str, Any], policy: Callable, value: Callable, hyper: Any) -> dict[str, Any]:
    """The tally of a roll-out with `predicted_q` [E] and `q_bias` [E], in place of what they come from.

    `value(obs, action)` is Q as predicted, in units of the scaled rewards. The first is that of the first
    action of each episode; the second is how far it is above the discounted return that followed. Where an
    episode was truncated, Q of its last observation stands for the rest.
    """
    tally = dict(tally)
    first, last = (value(obs, policy(obs)) for obs in (tally.pop("first_obs"), tally.pop("last_obs")))
    rest = hyper.discount ** tally["length"] * (1 - tally.pop("terminated")) * last
    scaled = hyper.reward_scale * tally.pop("discounted_return")
    followed = scaled + hyper.reward_bias * tally.pop("discounted_length") + rest
    return {**tally, "predicted_q": first, "q_bias": first - followed}


class Evaluator:
    """`evaluator(actors, keys)` plays `--eval-episodes` episodes with each policy's mean action.

    `act(actor, obs)` is one run's policy. `actors` are parameters with a leading axis of runs; `keys` are
    [runs, 2]. Returns success, return and length [runs, episodes], and solved if the task counts its parts.
    With `record` (in --env only) it also returns `obs` [runs, episodes, horizon + 1, obs]. Nothing compiles
    before the first call.
    """

    def __init__(self, args: Any, env: Env | None, act: Callable, mesh: Mesh, room: int | None = None):
        self.args, self.env = args, env
        self.act = Compiled(act, Mesh(processes.own_devices(mesh), ("runs",)), room=room)

        def play(actor, key, *, record):
            return rollout(env, lambda obs: act(actor, obs), key, args.eval_episodes, record)

        def play_and_judge(actor, critic, hyper, key, *, q_of, record):
            policy, value = partial(act, actor), partial(q_of, critic)
            tally = rollout(env, policy, key, args.eval_episodes, record, hyper.discount)
            return judge(tally, policy, value, hyper)

        options = getattr(env, "compiler_options", None)
        self.rollout = Compiled(play, mesh, room=room, options=options)
        self.judged = Compiled(play_and_judge, mesh, room=room, options=options)

    @property
    def possible(self) -> bool:
        """Whether there is an environment to evaluate in at all."""
        return bool(self.args.eval_env) or self.env is not None

    @property
    def has_map(self) -> bool:
        """Whether paths can be recorded and drawn: a 2-D task with a `layout`, evaluated on the device."""
        return not self.args.eval_env and hasattr(self.env, "layout")

    @staticmethod
    def paths(tally: dict[str, np.ndarray]) -> np.ndarray:
        """Positions [runs, episodes, steps, 2] of recorded episodes, NaN after each one's end."""
        position = np.array(tally["obs"][..., :2])
        position[np.arange(position.shape[2]) > tally["length"][..., None]] = np.nan
        return position

    def with_q(
        self, actors: Any, q_of: Callable, critics: Any, hyper: Any, keys: jax.Array, record: bool
    ) -> dict[str, Any]:
        """The same for `--q-bias`, with predicted_q and q_bias [runs, episodes] (see `judge`).

        `q_of(critic, obs, action)` is one run's Q [B]. critics: parameters [runs, ...]; hyper: traced
        settings [runs].
        """
        return self.judged(actors, critics, hyper, keys, q_of=q_of, record=record)

    def __call__(self, actors: Any, keys: jax.Array, record: bool = False) -> dict[str, Any]:
        if not self.args.eval_env:
            return self.rollout(actors, keys, record=record)
        if processes.are_several():  # each plays all episodes: none can then wait for another's step
            actors = place(real(actors, len(keys)), self.act.mesh, RUNS)
        places = NamedSharding(self.act.mesh, RUNS)
        num_policies = len(jax.tree.leaves(actors)[0])

        def act(obs: np.ndarray) -> np.ndarray:
            return np.asarray(self.act(actors, jax.device_put(np.float32(obs), places)))

        from ooo_rl.envs import gymnasium_eval

        return gymnasium_eval.evaluate(
            self.args.eval_env, act, self.args.eval_episodes, EVAL_SEED, num_policies
        )
