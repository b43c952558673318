"""The environment contract: brax's functional API, with separate flags for termination and truncation.

An environment has two pure functions, `reset(key) -> State` and `step(state, action) -> State`. `Env` and
`State` are brax's. It is unbatched and can be vmapped. An action is a vector [action_size] in [-1, 1], or one
whole number if the environment is `discrete`. brax's trainers run on it, wrapped by `Restarting` of
data/recipes/train_policy.py: brax's own wrapper would call a time limit a termination.
In addition to brax's contract:

* `info["termination"]`, `info["truncation"]`: float32 0/1. Only a termination ends the return; after a
  truncation, the value of the next observation still counts. `done` is the maximum of the two (but see
  `--end-reward`, which can end a return within an episode).
* `info["broken"]`: float32 0/1, whether the action or the physics gave a number that is not finite, or the
  physics one beyond `BROKEN`. The episode is truncated there. Its last observation and reward are
  placeholders (the previous observation, and 0), and no learner may train on them.
* `metrics["success"]`: float32 0/1, whether the task is solved in this state (0 if it defines no success).
* `discrete`: whether an action is one of the numbers 0, 1 ... `action_size` - 1, int32 []. An environment
  without this attribute is continuous.
* `metrics["solved"]`, where a task has several parts: float32, how many of them are solved so far.
* `horizon`: number of steps after which an episode is truncated.
* `compiler_options`: options of XLA's compiler for programs that step the environment; mostly none.
* `reset_to(qpos, qvel) -> State`: starts an episode in a given state, for replay, tests and curricula.
"""

import contextlib
import io
from typing import Any

import jax
import jax.numpy as jnp

# brax's import prints that MJX's optional Warp engine is missing.
with contextlib.redirect_stdout(io.StringIO()):
    from brax.envs.base import Env, State

__all__ = [
    "BROKEN", "Env", "State", "Task", "is_discrete", "random_actions", "step_all", "step_and_reset", "tally",
]  # fmt: skip

BROKEN = 1e10  # MuJoCo's own bound (mjMAXVAL): a simulation with numbers beyond it has diverged


class Task(Env):
    """Base class of our environments, which handles the time limit and broken physics.

    Subclasses define `start`, `advance` and `observe`. The inner state is any pytree, `State.pipeline_state`.
    """

    horizon: int
    discrete = False

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Options for `jax.jit(compiler_options=...)`."""
        return {}

    def start(self, key: jax.Array) -> Any:
        """Draws the inner state in which an episode begins."""
        raise NotImplementedError

    def advance(self, inner: Any, action: jax.Array) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        """One step. Returns (next inner state, reward [], termination [] bool, success [] bool)."""
        raise NotImplementedError

    def observe(self, inner: Any) -> jax.Array:
        """The observation [observation_size] of an inner state."""
        raise NotImplementedError

    def reset(self, rng: jax.Array) -> State:
        return self.begin(self.start(rng))

    def reset_to(self, qpos: jax.Array, qvel: jax.Array) -> State:
        """Starts an episode at generalised positions `qpos` [nq] and velocities `qvel` [nv].

        Raises NotImplementedError if the task has no such state.
        """
        raise NotImplementedError(f"{type(self).__name__} has no positions and velocities to set; use reset")

    def begin(self, inner: Any) -> State:
        """Starts an episode in the given inner state."""
        zero = jnp.zeros(())
        # Steps of the running episode; 0 after its end, so that a reset which leaves `info` alone, as brax's
        # does, starts a new count. The name is `elapsed`, because brax has a counter of its own, `steps`.
        info = {"termination": zero, "truncation": zero, "broken": zero, "elapsed": jnp.int32(0)}
        return State(inner, self.observe(inner), zero, zero, {"success": zero}, info)

    def step(self, state: State, action: jax.Array) -> State:
        action = action if self.discrete else jnp.clip(action, -1.0, 1.0)
        inner, reward, termination, success = self.advance(state.pipeline_state, action)
        obs, elapsed = self.observe(inner), state.info["elapsed"] + 1
        sound = (jnp.abs(obs) < BROKEN).all() & (jnp.abs(reward) < BROKEN)  # False for NaN, too
        sound &= jnp.isfinite(action).all()  # C MuJoCo would take no action in place of such a one
        as_number = lambda flag: jnp.asarray(flag, state.reward.dtype)  # noqa: E731
        termination, success = jnp.asarray(termination, bool), jnp.asarray(success, bool)
        termination = as_number(termination & sound)
        truncation = as_number((elapsed >= self.horizon) | ~sound) * (1 - termination)
        done = jnp.maximum(termination, truncation)
        return state.replace(
            pipeline_state=inner,
            obs=jnp.where(sound, obs, state.obs),
            reward=jnp.where(sound, as_number(reward), 0.0),
            done=done,
            metrics={**state.metrics, "success": as_number(success & sound)},
            info={
                **state.info,
                "termination": termination,
                "truncation": truncation,
                "broken": as_number(~sound),
                "elapsed": jnp.where(done > 0, 0, elapsed),
            },
        )

    @property
    def backend(self) -> str:
        return "jax"


def is_discrete(env: Any) -> bool:
    """Whether the environment's actions are whole numbers, not vectors."""
    return bool(getattr(env, "discrete", False))


def random_actions(env: Env, key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    """Uniformly random actions: vectors [*shape, action_size], or numbers [*shape] if `env` is discrete."""
    if is_discrete(env):
        return jax.random.randint(key, shape, 0, env.action_size)
    return jax.random.uniform(key, (*shape, env.action_size), minval=-1.0, maxval=1.0)


def step_and_reset(env: Env, state: State, action: jax.Array, key: jax.Array) -> tuple[State, State]:
    """Steps one environment, and starts a new episode if the old one ended.

    Returns (state to act in next, state that was reached). The second is for the buffer: it keeps the true
    next observation, the reward and the flags of the step. The first is the same state, or a fresh
    `env.reset(key)` if the episode ended. The function is unbatched; `step_all` is its batched form.
    """
    reached = env.step(state, action)
    fresh = env.reset(key)
    following = jax.tree.map(lambda new, old: jnp.where(reached.done > 0, new, old), fresh, reached)
    return following, reached


def step_all(env: Env, states: State, actions: jax.Array, key: jax.Array) -> tuple[State, State]:
    """`step_and_reset` of n environments in parallel: `states` has leading axis n, `actions` too."""
    keys = jax.random.split(key, actions.shape[0])
    return jax.vmap(lambda state, action, key: step_and_reset(env, state, action, key))(states, actions, keys)


def tally(reached: State) -> dict[str, jax.Array]:
    """Metrics [] of one step of n environments, from the states `reached` in it [n].

    They are the mean reward, and how many environments ended an episode, are at a success, or have broken
    physics.
    """
    counts = {
        "episode_ends": reached.done,
        "successes": reached.metrics["success"],
        "broken_worlds": reached.info["broken"],
    }
    return {"reward": reached.reward.mean(), **{name: flags.sum() for name, flags in counts.items()}}
