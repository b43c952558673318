"""Five probe environments whose values and best actions are known by hand: each isolates one thing that a learner must get right.

The idea is Andy Jones's (andyljones.com/posts/rl-debugging.html) with continuous actions. A learner that
fails one of them is wrong in the part that the probe names; one that passes all five can be tried on a real task.
"""

import jax
import jax.numpy as jnp

from envs.base import Task


class Probe(Task):
    """An episode of one step in which nothing moves; subclasses redefine what differs."""

    horizon = 10  # never reached: every probe terminates after one or two steps

    def start(self, key: jax.Array) -> jax.Array:
        return jnp.zeros(1)

    def advance(self, inner: jax.Array, action: jax.Array):
        return inner, self.payoff(inner, action), jnp.bool_(True), self.payoff(inner, action) > 0

    def payoff(self, inner: jax.Array, action: jax.Array) -> jax.Array:
        """Reward [] of `action` in `inner`."""
        return jnp.float32(1)

    def observe(self, inner: jax.Array) -> jax.Array:
        return inner

    @property
    def observation_size(self) -> int:
        return 1

    @property
    def action_size(self) -> int:
        return 1


class ConstantReward(Probe):
    """Reward 1, always: V = Q = 1. Fails if the value loss or the optimiser is wrong."""


class RewardIsObs(Probe):
    """Observation -1 or +1, which is the reward: V(s) = s. Fails if a network ignores its input."""

    def start(self, key: jax.Array) -> jax.Array:
        return jax.random.rademacher(key, (1,), jnp.float32)

    def payoff(self, inner: jax.Array, action: jax.Array) -> jax.Array:
        return inner[0]


class DelayedReward(Probe):
    """Two steps, observations 0 then 1, reward 1 on the second: V(1) = 1, V(0) = discount. Fails if bootstrapping is wrong."""

    def advance(self, inner: jax.Array, action: jax.Array):
        second = inner[0] > 0.5
        return inner + 1, jnp.float32(second), second, second


class ActionReward(Probe):
    """Reward 1 - (a - 0.5)^2: the best action is 0.5. Fails if the policy ignores advantages."""

    def payoff(self, inner: jax.Array, action: jax.Array) -> jax.Array:
        return 1 - (action[0] - 0.5) ** 2


class MatchObs(Probe):
    """Observation s in {-0.5, +0.5}, reward 1 - (a - s)^2: the best action is s. Fails if values and policy mix up their rows."""

    def start(self, key: jax.Array) -> jax.Array:
        return 0.5 * jax.random.rademacher(key, (1,), jnp.float32)

    def payoff(self, inner: jax.Array, action: jax.Array) -> jax.Array:
        return 1 - (action[0] - inner[0]) ** 2
