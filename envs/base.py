"""The environment contract: brax's functional API, with terminations and truncations told apart.

An environment is a pure pair `reset(key) -> State`, `step(state, action) -> State` (brax's `Env` and
`State`, so brax's trainers run on it), unbatched and vmappable, with actions in [-1, 1]. On top of brax we promise:

* `info["termination"]`, `info["truncation"]`: float32 0/1. Only a termination ends the return; after a truncation
  the value of the next observation still counts. `done` is their maximum.
* `metrics["success"]`: float32 0/1, whether the task is solved in this state (0 where a task has no such notion).
* `horizon`: steps after which an episode is truncated.
"""

import contextlib
import io
from typing import Any

import jax
import jax.numpy as jnp

with contextlib.redirect_stdout(io.StringIO()):  # MJX prints there that its optional Warp engine is not installed
    from brax.envs.base import Env, State

__all__ = ["Env", "State", "Task", "step_and_reset"]


class Task(Env):
    """An environment written in JAX by hand: subclasses give `start`, `advance` and `observe`; the time limit is kept here."""

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
        inner, zero = self.start(rng), jnp.float32(0)
        # `elapsed`, not `steps`: brax's EpisodeWrapper keeps a counter of its own under that name.
        info = {"termination": zero, "truncation": zero, "elapsed": jnp.int32(0)}
        return State(inner, self.observe(inner), zero, zero, {"success": zero}, info)

    def step(self, state: State, action: jax.Array) -> State:
        inner, reward, termination, success = self.advance(state.pipeline_state, jnp.clip(action, -1.0, 1.0))
        elapsed = state.info["elapsed"] + 1
        termination = jnp.float32(termination)
        truncation = jnp.float32(elapsed >= self.horizon) * (1 - termination)
        return state.replace(
            pipeline_state=inner,
            obs=self.observe(inner),
            reward=jnp.float32(reward),
            done=jnp.maximum(termination, truncation),
            metrics={**state.metrics, "success": jnp.float32(success)},
            info={**state.info, "termination": termination, "truncation": truncation, "elapsed": elapsed},
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
