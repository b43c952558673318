"""GDE on CQL: the explorer's loss and step against NumPy; CQL's own step is that of cql.py."""

from functools import partial

import jax
import numpy as np
from numerics import adam_first_step, double, ensemble, forward, gradient, mostly_close, squashed
from test_gde_iql import divergence
from test_sac import ACT, BATCH, make

from ooo_rl.algos import cql, gde_cql

SETTINGS = {"actor_lr": 2e-2, "critic_lr": 3e-2, "alpha_lr": 1e-2, "target_rate": 0.1, "cql_weight": 0.5}


def test_the_explorers_step():
    """After CQL's step, on returns that are scaled already, with the fresh critics."""
    static, agent, batch = make(gde_cql, num_samples=2)
    rng, key, rho = np.random.default_rng(1), jax.random.PRNGKey(3), 0.7
    shift = lambda tree: jax.tree.map(lambda x: x + np.float32(0.3 * rng.normal(size=x.shape)), tree)  # noqa: E731
    explorer, teacher = agent.actor.replace(params=shift(agent.actor.params)), shift(agent.actor.params)
    step = jax.jit(partial(gde_cql.guided_update, static, gde_cql.Hyper(**SETTINGS, reward_scale=5.0)))
    (learnt, moved), metrics = step(agent, explorer, teacher, rho, batch, key)

    update_key, explorer_key = jax.random.split(key)
    theirs = jax.jit(partial(cql.update, static, cql.Hyper(**SETTINGS)))(agent, batch, update_key)[0]
    for ours, other in zip(jax.tree.leaves(learnt), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-6)

    noise, obs = np.float64(jax.random.normal(explorer_key, (BATCH, ACT))), np.float64(batch.obs)
    critic, own, teacher = map(double, (learnt.critic.params, explorer.params, teacher))

    def gaussian(params):
        mean, log_std = np.split(forward(params["params"]["MLP_0"], obs), 2, axis=-1)
        return mean, np.exp(np.clip(log_std - 1, -20, 2))

    def loss(params):
        q = ensemble(critic, obs, squashed(params, obs, noise)[0]).min(axis=0)
        return -q.mean() + rho * divergence(gaussian(teacher), gaussian(params)).mean()

    np.testing.assert_allclose(metrics["explorer_loss"], loss(own), rtol=1e-4)
    np.testing.assert_allclose(
        metrics["divergence"], divergence(gaussian(teacher), gaussian(own)).mean(), rtol=1e-4
    )
    mostly_close(moved.params, adam_first_step(own, gradient(loss, own), 2e-2))


def test_the_divergence_is_that_of_squashed_policies():
    """KL of the actions after tanh, by integration over the box, is KL before it."""
    teacher, explorer = (np.float64([0.2]), np.float64([-0.9])), (np.float64([-0.3]), np.float64([-0.5]))
    u = np.linspace(-8, 8, 100_001)
    action = np.tanh(u)

    def density(mean, log_std):
        std = np.exp(log_std)
        return np.exp(-0.5 * ((u - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi)) / (1 - action**2)

    p, q = density(*teacher), density(*explorer)
    inside = np.abs(action) < 1 - 1e-12
    expected = np.trapezoid((p * np.log(p / q))[inside], action[inside])
    np.testing.assert_allclose(gde_cql.divergence(teacher, explorer), expected, rtol=1e-3)
