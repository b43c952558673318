"""The environment contract: brax's functional API, with terminations and truncations told apart.

An environment is a pure pair `reset(key) -> State`, `step(state, action) -> State` (brax's `Env` and
`State`, so brax's trainers run on it), unbatched and vmappable, with actions in [-1, 1]. On top of brax we promise:

* `info["termination"]`, `info["truncation"]`: float32 0/1. Only a termination ends the return; after a truncation
  the value of the next observation still counts. `done` is their maximum.
* `info["broken"]`: float32 0/1, the physics gave a number that is not finite (or beyond `BROKEN`). The episode ends there with a
  truncation, and observation and reward are stand-ins (the previous one, and 0) that must not be learnt from.
* `metrics["success"]`: float32 0/1, whether the task is solved in this state (0 where a task has no such notion).
* `horizon`: steps after which an episode is truncated.
* `reset_to(qpos, qvel) -> State`: an episode that starts in the given state, for replay, tests and curricula.
"""

import contextlib
import io
from typing import Any

import jax
import jax.numpy as jnp

with contextlib.redirect_stdout(io.StringIO()):  # MJX prints there that its optional Warp engine is not installed
    from brax.envs.base import Env, State

__all__ = ["BROKEN", "Env", "State", "Task", "step_and_reset", "tally"]

BROKEN = 1e10  # MuJoCo's own bound (mjMAXVAL): an observation beyond it is the end of a simulation, not a state


class Task(Env):
    """One episode of a task: subclasses give `start`, `advance` and `observe`; time limit and broken physics are dealt with here."""

    horizon: int

    def start(self, key: jax.Array) -> Any:
        """The pytree an episode begins in, drawn with `key`."""
        raise NotImplementedError

    def advance(self, inner: Any, action: jax.Array) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        """One step: (next inner state, reward [], termination [] bool, success [] bool)."""
        raise NotImplementedError

    def observe(self, inner: Any) -> jax.Array:
        """Observation [observation_size] of an inner state."""
        raise NotImplementedError

    def reset(self, rng: jax.Array) -> State:
        return self.begin(self.start(rng))

    def reset_to(self, qpos: jax.Array, qvel: jax.Array) -> State:
        """The beginning of an episode in generalised positions `qpos` [nq] and velocities `qvel` [nv]."""
        raise NotImplementedError(f"{type(self).__name__} has no positions and velocities to be put into")

    def begin(self, inner: Any) -> State:
        """The beginning of an episode in a given inner state."""
        zero = jnp.zeros(())
        # `elapsed`, not `steps`: brax's EpisodeWrapper keeps a counter of its own under that name.
        info = {"termination": zero, "truncation": zero, "broken": zero, "elapsed": jnp.int32(0)}
        return State(inner, self.observe(inner), zero, zero, {"success": zero}, info)

    def step(self, state: State, action: jax.Array) -> State:
        inner, reward, termination, success = self.advance(state.pipeline_state, jnp.clip(action, -1.0, 1.0))
        obs, elapsed = self.observe(inner), state.info["elapsed"] + 1
        sound = (jnp.abs(obs) < BROKEN).all() & (jnp.abs(reward) < BROKEN)  # False for NaN as well
        as_number = lambda flag: jnp.asarray(flag, state.reward.dtype)  # noqa: E731
        termination = as_number(termination & sound)
        truncation = as_number((elapsed >= self.horizon) | ~sound) * (1 - termination)
        return state.replace(
            pipeline_state=inner,
            obs=jnp.where(sound, obs, state.obs),
            reward=jnp.where(sound, as_number(reward), 0.0),
            done=jnp.maximum(termination, truncation),
            metrics={**state.metrics, "success": as_number(success & sound)},
            info={**state.info, "termination": termination, "truncation": truncation, "broken": as_number(~sound), "elapsed": elapsed},
        )

    @property
    def backend(self) -> str:
        return "jax"


def step_and_reset(env: Env, state: State, action: jax.Array, key: jax.Array) -> tuple[State, State]:
    """Steps one environment and starts a new episode where the old one ended.

    Returns (state to act in next, state that was reached). The second keeps the true next observation, reward and
    ending of the step, for the buffer; the first is a fresh `env.reset(key)` if the episode is over. Unbatched: vmap it.
    """
    reached = env.step(state, action)
    fresh = env.reset(key)
    following = jax.tree.map(lambda new, old: jnp.where(reached.done > 0, new, old), fresh, reached)
    return following, reached


def tally(reached: State) -> dict[str, jax.Array]:
    """What one step of many worlds [n] came to, as metrics []: mean reward, episodes that ended, worlds at success, worlds that broke."""
    counts = {"episode_ends": reached.done, "successes": reached.metrics["success"], "broken_worlds": reached.info["broken"]}
    return {"reward": reached.reward.mean(), **{name: flags.sum() for name, flags in counts.items()}}
