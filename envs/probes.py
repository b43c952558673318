"""Five probe environments, whose values and best actions can be computed by hand.

Each one isolates one thing that a learner must get right. The idea is Andy Jones's
(andyljones.com/posts/rl-debugging.html), here with continuous actions. A learner that fails a probe is wrong
in the part that the probe names. A learner that passes all five can be tried on a real task. `AllProbes` asks
all five questions in one run, and `AllProbesDiscrete` asks them of a learner with discrete actions.
"""

import jax
import jax.numpy as jnp

from ooo_rl.envs.base import Task


class Probe(Task):
    """An episode of one step in which nothing moves, with reward 1. Subclasses change one thing each."""

    horizon = 10  # never reached: every probe terminates after one or two steps

    def start(self, key: jax.Array) -> jax.Array:
        return jnp.zeros(1)

    def advance(self, inner: jax.Array, action: jax.Array):
        return inner, self.payoff(inner, action), jnp.bool_(True), self.payoff(inner, action) > 0

    def payoff(self, inner: jax.Array, action: jax.Array) -> jax.Array:
        """The reward [] of `action` in the inner state `inner`."""
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
    """The reward is always 1: V = Q = 1. Fails if the value loss or the optimiser is wrong."""


class RewardIsObs(Probe):
    """The observation is -1 or +1, and so is the reward: V(s) = s. Fails if a network ignores its input."""

    def start(self, key: jax.Array) -> jax.Array:
        return jax.random.rademacher(key, (1,), jnp.float32)

    def payoff(self, inner: jax.Array, action: jax.Array) -> jax.Array:
        return inner[0]


class DelayedReward(Probe):
    """Two steps with observations 0, then 1, and reward 1 on the second: V(1) = 1, V(0) = discount.

    Fails if bootstrapping is wrong.
    """

    def advance(self, inner: jax.Array, action: jax.Array):
        second = inner[0] > 0.5
        return inner + 1, jnp.float32(second), second, second


class ActionReward(Probe):
    """The reward is 1 - (a - 0.5)^2: the best action is 0.5. Fails if the policy ignores advantages."""

    def payoff(self, inner: jax.Array, action: jax.Array) -> jax.Array:
        return 1 - (action[0] - 0.5) ** 2


class MatchObs(Probe):
    """The observation s is -0.5 or +0.5, the reward 1 - (a - s)^2: the best action is s.

    Fails if the losses mix up the rows of a batch.
    """

    def start(self, key: jax.Array) -> jax.Array:
        return 0.5 * jax.random.rademacher(key, (1,), jnp.float32)

    def payoff(self, inner: jax.Array, action: jax.Array) -> jax.Array:
        return 1 - (action[0] - inner[0]) ** 2


class AllProbes(Task):
    """Each episode plays one of the five; the observation is the probe's own and, one-hot, which one it is.

    So one run of a learner answers for all five.
    """

    horizon = 10
    probes = (ConstantReward(), RewardIsObs(), DelayedReward(), ActionReward(), MatchObs())
    observation_size, action_size = 1 + len(probes), 1

    def start(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(Number of the probe [], its own state [1])."""
        which_key, start_key = jax.random.split(key)
        which = jax.random.randint(which_key, (), 0, len(self.probes))
        return which, jax.lax.switch(which, [probe.start for probe in self.probes], start_key)

    def advance(self, inner: tuple[jax.Array, jax.Array], action: jax.Array):
        which, state = inner
        state, *outcome = jax.lax.switch(which, [probe.advance for probe in self.probes], state, action)
        return (which, state), *outcome

    def observe(self, inner: tuple[jax.Array, jax.Array]) -> jax.Array:
        which, state = inner
        return jnp.concatenate([state, jax.nn.one_hot(which, len(self.probes))])


class AllProbesDiscrete(AllProbes):
    """`AllProbes` with five actions: the number i stands for the action `LEVELS[i]`.

    The best actions are among them, so the values are the same.
    """

    LEVELS = (-1.0, -0.5, 0.0, 0.5, 1.0)
    discrete, action_size = True, len(LEVELS)

    def advance(self, inner: tuple[jax.Array, jax.Array], action: jax.Array):
        return super().advance(inner, jnp.array(self.LEVELS)[action][None])
