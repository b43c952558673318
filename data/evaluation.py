"""Evaluates all runs' policies at once: on the device in --env, or on the host in the Gymnasium environment of --eval-env."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data.cli import UsageError
from data.program import Compiled
from envs.base import Env
from envs.rollout import rollout

EVAL_SEED = 10_000  # of the first host episode: the same ones for every policy, phase and seed


class Evaluator:
    """`evaluator(actors, keys)` plays `--eval-episodes` episodes with each policy's mean action: success, return, length [runs, episodes].

    `act(actor, obs)` is one run's policy. `actors` are parameters with a leading axis of runs, `keys` [runs, 2]. With
    `record` (in --env only) also `obs` [runs, episodes, horizon + 1, obs], NaN after the end of an episode.
    Nothing compiles before the first call, but what does not fit together raises UsageError at once.
    """

    def __init__(self, args: Any, env: Env | None, act: Callable, mesh: Mesh, obs_size: int, action_size: int):
        self.args, self.env = args, env
        self.act = Compiled(act, mesh)
        self.rollout = Compiled(lambda actor, key, record: rollout(env, lambda obs: act(actor, obs), key, args.eval_episodes, record), mesh)
        if args.eval_env:
            from envs import gymnasium_eval

            self.gymnasium = gymnasium_eval
            try:
                sizes = gymnasium_eval.check(args.eval_env)[:2]
            except ValueError as error:
                raise UsageError(f"--eval-env {args.eval_env}: {error}") from None
            if sizes != (obs_size, action_size):
                raise UsageError(
                    f"--eval-env {args.eval_env} has {sizes[0]} observations and {sizes[1]} actions, "
                    f"the policy {obs_size} and {action_size}"
                )

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

    def __call__(self, actors: Any, keys: jax.Array, record: bool = False) -> dict[str, np.ndarray]:
        if not self.args.eval_env:
            return jax.device_get(self.rollout(actors, keys, record=record))
        place = keys.sharding

        def act(obs: np.ndarray) -> np.ndarray:
            return np.asarray(self.act(actors, jax.device_put(np.float32(obs), place)))

        return self.gymnasium.evaluate(self.args.eval_env, act, self.args.eval_episodes, EVAL_SEED, len(keys))
