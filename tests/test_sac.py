"""SAC's losses and its whole update, against plain NumPy in float64 with gradients by central differences."""

import jax
import numpy as np
import pytest
from numerics import adam_first_step, double, ensemble, gradient, mostly_close, squashed

from algos import sac
from data.buffer import Transition

OBS, ACT, BATCH, HIDDEN = 3, 2, 16, (5, 4)
SETTINGS = {
    "actor_lr": 2e-2, "critic_lr": 3e-2, "alpha_lr": 1e-2, "target_rate": 0.1, "reward_scale": 2.0, "reward_bias": -1.0,
    "entropy_per_action": -0.5, "backup_entropy": 0.7,
}  # fmt: skip


def make(layer_norm=False, seed=0):
    nets = sac.Nets(sac.Actor(HIDDEN, ACT), sac.Critic(HIDDEN, 2, layer_norm))
    agent = sac.init_agent(nets, OBS, 0.3, jax.random.PRNGKey(seed))
    # A target that differs from its critics, and biases that are not zero, so that a mix-up shows.
    shift = lambda tree, k: jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.PRNGKey(k), x.shape), tree)  # noqa: E731
    agent = agent.replace(critic=shift(agent.critic, 0), target_critic=shift(agent.critic, 1), actor=shift(agent.actor, 3))
    rng = np.random.default_rng(seed)
    batch = Transition(
        *(np.float32(x) for x in (
            rng.normal(size=(BATCH, OBS)), rng.uniform(-1, 1, (BATCH, ACT)), rng.normal(size=BATCH),
            rng.normal(size=(BATCH, OBS)), rng.integers(0, 2, BATCH),
        ))
    )  # fmt: skip
    return nets, agent, batch


def noise_of(key):
    """What `sac.sample` draws with this key for a batch."""
    return np.float64(jax.random.normal(key, (BATCH, ACT)))


def test_density_is_that_of_a_histogram():
    """The log density of samples, against the share of them that falls into small boxes."""
    nets, agent, batch = make()
    obs = np.repeat(batch.obs[:1], 400_000, axis=0)
    action, log_prob = sac.sample(nets, agent.actor, obs, jax.random.PRNGKey(0))
    edges = np.linspace(-1, 1, 21)
    counts, *_ = np.histogram2d(*np.asarray(action).T, bins=(edges, edges))
    cells = tuple(np.clip(np.digitize(column, edges) - 1, 0, 19) for column in np.asarray(action).T)
    mean_density = np.zeros((20, 20))
    np.add.at(mean_density, cells, 1 / np.exp(np.float64(log_prob)))  # 1 / p averages to area / share over a box that is filled
    full = counts > 2000
    np.testing.assert_allclose(mean_density[full] / len(obs), 0.01, rtol=0.1)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_update_of_sac(layer_norm):
    nets, agent, batch = make(layer_norm)
    hyper, key = sac.Hyper(**SETTINGS), jax.random.PRNGKey(5)
    ours, metrics = sac.update(nets, hyper, agent, batch, key)
    next_key, actor_key = jax.random.split(key)
    agent, batch, alpha = double(agent), double(batch), float(np.exp(agent.log_alpha))

    next_action, next_log_prob = squashed(agent.actor, batch.next_obs, noise_of(next_key))
    next_v = ensemble(agent.target_critic, batch.next_obs, next_action).min(axis=0) - 0.7 * alpha * next_log_prob
    target = 2.0 * batch.reward - 1.0 + hyper.discount * batch.discount * next_v

    def bellman(params):
        return np.mean(((ensemble(params, batch.obs, batch.action) - target) ** 2).sum(axis=0))

    np.testing.assert_allclose(metrics["critic_loss"], bellman(agent.critic), rtol=1e-4)
    critic = adam_first_step(agent.critic, gradient(bellman, agent.critic), 3e-2)
    mostly_close(ours.critic, critic)
    mostly_close(ours.target_critic, jax.tree.map(lambda new, old: 0.1 * new + 0.9 * old, critic, agent.target_critic))

    def policy(params, critic=double(ours.critic)):
        action, log_prob = squashed(params, batch.obs, noise_of(actor_key))
        return np.mean(alpha * log_prob - ensemble(critic, batch.obs, action).min(axis=0))

    np.testing.assert_allclose(metrics["actor_loss"], policy(agent.actor), rtol=1e-4)
    mostly_close(ours.actor, adam_first_step(agent.actor, gradient(policy, agent.actor), 2e-2))
    entropy = -squashed(agent.actor, batch.obs, noise_of(actor_key))[1].mean()
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-4)
    # Entropy above its target of -0.5 per action lowers alpha, below it raises it.
    np.testing.assert_allclose(ours.log_alpha - agent.log_alpha, -1e-2 * np.sign(entropy + 0.5 * ACT), rtol=1e-3)
