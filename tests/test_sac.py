"""SAC's losses and its whole update, against plain NumPy in float64 with gradients by central differences."""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from numerics import adam_first_step, double, ensemble, gradient, mostly_close, squashed

from ooo_rl.algos import sac
from ooo_rl.data.buffer import Transition
from ooo_rl.data.runs.session import Static

OBS, ACT, BATCH, HIDDEN = 3, 2, 16, (5, 4)
SETTINGS = {
    "actor_lr": 2e-2, "critic_lr": 3e-2, "alpha_lr": 1e-2, "target_rate": 0.1, "reward_scale": 2.0,
    "reward_bias": -1.0, "entropy_per_action": -0.5, "backup_entropy": 0.7,
}  # fmt: skip


def static_of(script, env=None, obs_size=OBS, action_size=ACT, **settings):
    """What the functions of `script` get first, for small networks."""
    alpha = {"init_alpha": 0.3} if hasattr(script.Args, "init_alpha") else {}
    args = script.Args.exactly({"hidden": HIDDEN, "critic_hidden": HIDDEN} | alpha | settings)
    nets = script.make_nets(SimpleNamespace(args=args, env=env, obs_size=obs_size, action_size=action_size))
    obs, action, scalar = np.zeros(obs_size, np.float32), np.zeros(action_size, np.float32), np.float32(0)
    return Static(args, env, Transition(obs, action, scalar, obs, scalar), nets)


def random_rows(rng, n, obs_size=OBS, action_size=ACT):
    parts = (
        rng.normal(size=(n, obs_size)), rng.uniform(-1, 1, (n, action_size)), rng.normal(size=n),
        rng.normal(size=(n, obs_size)), rng.integers(0, 2, n),
    )  # fmt: skip
    return Transition(*map(np.float32, parts))


def make(script=sac, **settings):
    """What the functions of `script` get first, a tiny agent, and a batch.

    The agent is of random numbers, for which nothing compiles. Its targets differ from its critics, and no
    bias is zero, so that a mix-up shows.
    """
    static, rng = static_of(script, **settings), np.random.default_rng(0)
    shapes = jax.eval_shape(partial(script.init_agent, static), jax.random.PRNGKey(0))
    fill = lambda tree: jax.tree.map(lambda x: np.float32(0.5 * rng.normal(size=x.shape)), tree)  # noqa: E731
    agent = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    agent = agent.replace(
        actor=agent.actor.replace(params=fill(shapes.actor.params)),
        critic=agent.critic.replace(params=fill(shapes.critic.params)),
        target_critic=fill(shapes.target_critic),
        alpha=agent.alpha.replace(params=np.log(np.float32(0.3))),
    )
    if hasattr(agent, "alpha_prime"):
        agent = agent.replace(alpha_prime=agent.alpha_prime.replace(params=np.float32(1)))
    return static, agent, random_rows(rng, BATCH)


def noise_of(key):
    """What `sac.sample` draws with this key for a batch."""
    return np.float64(jax.random.normal(key, (BATCH, ACT)))


def test_an_agent_begins_as_it_is_told():
    """Targets equal the critics, alpha is --init-alpha, actions are near 0 with deviations near 1/e."""
    static = static_of(sac)
    agent = jax.jit(partial(sac.init_agent, static))(jax.random.PRNGKey(0))
    jax.tree.map(np.testing.assert_array_equal, agent.target_critic, agent.critic.params)
    np.testing.assert_allclose(agent.alpha.params, np.log(0.3), rtol=1e-6)
    mean, log_std = static.nets.actor.apply(agent.actor.params, np.ones((1, OBS)))
    np.testing.assert_allclose([mean, log_std + 1], 0, atol=0.05)


def test_density_is_that_of_a_histogram():
    """The log density of samples, against the share of them that falls into small boxes."""
    static, agent, batch = make()
    obs = np.repeat(batch.obs[:1], 400_000, axis=0)
    draw = jax.jit(partial(sac.sample, static.nets))
    action, log_prob = draw(agent.actor.params, obs, jax.random.PRNGKey(0))
    edges = np.linspace(-1, 1, 21)
    counts, *_ = np.histogram2d(*np.asarray(action).T, bins=(edges, edges))
    cells = tuple(np.clip(np.digitize(column, edges) - 1, 0, 19) for column in np.asarray(action).T)
    mean_density = np.zeros((20, 20))
    # 1 / p averages to area / share over a box that is filled.
    np.add.at(mean_density, cells, 1 / np.exp(np.float64(log_prob)))
    full = counts > 2000
    assert full.sum() > 20
    np.testing.assert_allclose(mean_density[full] / len(obs), 0.01, rtol=0.1)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_update_of_sac(layer_norm):
    static, agent, batch = make(layer_norm=layer_norm)
    hyper, key = sac.Hyper(**SETTINGS), jax.random.PRNGKey(5)
    ours, metrics = jax.jit(partial(sac.update, static, hyper))(agent, batch, key)
    next_key, actor_key = jax.random.split(key)
    agent, batch = double(agent), double(batch)
    actor, alpha = agent.actor.params, float(np.exp(agent.alpha.params))

    next_action, next_log_prob = squashed(actor, batch.next_obs, noise_of(next_key))
    next_q = ensemble(agent.target_critic, batch.next_obs, next_action).min(axis=0)
    target = 2 * batch.reward - 1 + hyper.discount * batch.discount * (next_q - 0.7 * alpha * next_log_prob)

    def bellman(params):
        return np.mean(((ensemble(params, batch.obs, batch.action) - target) ** 2).sum(axis=0))

    np.testing.assert_allclose(metrics["critic_loss"], bellman(agent.critic.params), rtol=1e-4)
    critic = adam_first_step(agent.critic.params, gradient(bellman, agent.critic.params), 3e-2)
    mostly_close(ours.critic.params, critic)
    slow = jax.tree.map(lambda new, old: 0.1 * new + 0.9 * old, critic, agent.target_critic)
    mostly_close(ours.target_critic, slow)

    def policy(params, critic=double(ours.critic.params)):
        action, log_prob = squashed(params, batch.obs, noise_of(actor_key))
        return np.mean(alpha * log_prob - ensemble(critic, batch.obs, action).min(axis=0))

    np.testing.assert_allclose(metrics["actor_loss"], policy(actor), rtol=1e-4)
    mostly_close(ours.actor.params, adam_first_step(actor, gradient(policy, actor), 2e-2))
    entropy = -squashed(actor, batch.obs, noise_of(actor_key))[1].mean()
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-4)
    # Entropy above its target of -0.5 per action lowers alpha, below it raises it.
    moved = ours.alpha.params - agent.alpha.params
    np.testing.assert_allclose(moved, -1e-2 * np.sign(entropy + 0.5 * ACT), rtol=1e-3)
