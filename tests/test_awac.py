"""AWAC's losses and its whole update, against plain NumPy in float64 with gradients by central differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import adam_first_step, double, ensemble, forward, gradient, mostly_close
from test_sac import ACT, BATCH, OBS, random_rows, static_of

from ooo_rl import envs
from ooo_rl.algos import awac
from ooo_rl.data import policy

SETTINGS = {
    "actor_lr": 2e-2, "critic_lr": 3e-2, "target_rate": 0.1, "reward_scale": 2.0, "reward_bias": -1.0,
    "beta": 0.3, "weight_decay": 0.4,
}  # fmt: skip


def make(env=None, **settings):
    """What the functions of awac.py get first, a tiny agent of random numbers, and a batch.

    Targets differ from the critics, and no bias is zero, so that a mix-up shows.
    """
    static, rng = static_of(awac, env, **settings), np.random.default_rng(0)
    shapes = jax.eval_shape(partial(awac.init_agent, static), jax.random.PRNGKey(0))
    fill = lambda tree: jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), tree)  # noqa: E731
    agent = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    agent = agent.replace(
        actor=agent.actor.replace(params=fill(shapes.actor.params)),
        critic=agent.critic.replace(params=fill(shapes.critic.params)),
        target_critic=fill(shapes.target_critic),
    )
    return static, agent, random_rows(rng, BATCH)


def policy_of(actor, obs):
    """Mean [B, A] and log standard deviation [A]."""
    logits = actor["params"]["log_std_logits"]
    return np.tanh(forward(actor["params"]["MLP_0"], obs)), -6 + 6 / (1 + np.exp(-logits))


def sample_of(actor, obs, key):
    mean, log_std = policy_of(actor, obs)
    return mean + np.exp(log_std) * np.float64(jax.random.normal(key, mean.shape))


@pytest.mark.parametrize(
    ("value_action", "max_advantage", "target_max"), [("sample", np.inf, np.inf), ("mean", 0.2, 0.5)]
)
def test_update(value_action, max_advantage, target_max):
    static, agent, batch = make(value_action=value_action)
    hyper = awac.Hyper(**SETTINGS, max_advantage=max_advantage, target_max=target_max)
    key = jax.random.PRNGKey(5)
    ours, metrics = jax.jit(partial(awac.update, static, hyper))(agent, batch, key)
    next_key, value_key = jax.random.split(key)
    agent, batch = double(agent), double(batch)
    actor, obs = agent.actor.params, batch.obs

    next_q = ensemble(agent.target_critic, batch.next_obs, sample_of(actor, batch.next_obs, next_key))
    free = 2 * batch.reward - 1 + 0.99 * batch.discount * next_q.min(axis=0)
    target = np.minimum(free, target_max)
    assert (target < free).any() == (target_max < np.inf), "a bound that bounds nothing"

    def bellman(params):
        return np.mean(((ensemble(params, obs, batch.action) - target) ** 2).sum(axis=0))

    np.testing.assert_allclose(metrics["critic_loss"], bellman(agent.critic.params), rtol=1e-4)
    critic = adam_first_step(agent.critic.params, gradient(bellman, agent.critic.params), 3e-2)
    mostly_close(ours.critic.params, critic)
    slow = jax.tree.map(lambda new, old: 0.1 * new + 0.9 * old, critic, agent.target_critic)
    mostly_close(ours.target_critic, slow)

    new = double(ours.critic.params)
    own = policy_of(actor, obs)[0] if value_action == "mean" else sample_of(actor, obs, value_key)
    score = ensemble(new, obs, batch.action).min(axis=0) - ensemble(new, obs, own).min(axis=0)
    np.testing.assert_allclose(metrics["adv"], score.mean(), rtol=1e-3, atol=1e-5)
    assert (score > max_advantage).any() == (max_advantage < np.inf), "a bound that bounds nothing"
    weight = np.exp(np.minimum(score, max_advantage) / 0.3)
    weight = BATCH * weight / weight.sum()

    def imitation(params):
        mean, log_std = policy_of(params, obs)
        z = (batch.action - mean) / np.exp(log_std)
        log_prob = (-0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi)).sum(axis=1)
        return -np.mean(weight * log_prob) + 0.2 * sum((p**2).sum() for p in jax.tree.leaves(params))

    np.testing.assert_allclose(metrics["actor_loss"], imitation(actor), rtol=1e-4)
    mostly_close(ours.actor.params, adam_first_step(actor, gradient(imitation, actor), 2e-2))


def test_an_agent_begins_as_it_is_told():
    """Targets equal the critics; actions are near 0 with a standard deviation of exp(-3)."""
    static = static_of(awac)
    agent = jax.jit(partial(awac.init_agent, static))(jax.random.PRNGKey(0))
    jax.tree.map(np.testing.assert_array_equal, agent.target_critic, agent.critic.params)
    mean, log_std = static.nets.actor.apply(agent.actor.params, np.ones((1, OBS)))
    np.testing.assert_allclose(mean, 0, atol=0.05)
    np.testing.assert_allclose(log_std, -3)


def test_saved_policy_is_that_of_act(tmp_path):
    static, agent, batch = make()
    policy.save(tmp_path / "policy.npz", awac.export(agent.actor.params), algo="awac")
    saved, actor = policy.load(tmp_path / "policy.npz"), double(agent.actor.params)
    mean, log_std = policy_of(actor, batch.obs)
    np.testing.assert_allclose(awac.act(static.nets, agent.actor.params, batch.obs), mean, atol=1e-5)
    np.testing.assert_allclose(policy.act(saved, batch.obs), mean, atol=1e-5)
    np.testing.assert_allclose(saved["log_std"], log_std, atol=1e-5)


class Still(envs.Task):
    """Nothing moves; the reward is the action as the environment got it."""

    horizon, observation_size, action_size = 9, OBS, ACT

    def start(self, key):
        return jnp.zeros(OBS)

    def advance(self, inner, action):
        return inner, action[0], jnp.bool_(False), jnp.bool_(False)

    def observe(self, inner):
        return inner


def test_online_rows_hold_samples_as_they_were_drawn():
    """The environment gets them clipped; what is imitated and valued is the sample itself."""
    static, agent, _ = make(env=Still(), num_envs=64, online_steps=64)
    wide = jax.tree.map(jnp.zeros_like, agent.actor.params)
    wide["params"]["log_std_logits"] += 9.0  # a standard deviation of 1
    agent = agent.replace(actor=agent.actor.replace(params=wide))
    state = awac.State(agent, *awac.start_online(static, jax.random.PRNGKey(0)), jax.random.PRNGKey(1))
    step = jax.jit(partial(awac.finetune_chunk, static, length=1, learns=False))
    rows = step(state, awac.Hyper(), None, jnp.int32(0))[0].ring
    assert np.abs(rows.action).max() > 1.2
    np.testing.assert_allclose(rows.action.std(), 1, atol=0.3)
    np.testing.assert_allclose(rows.reward, np.clip(rows.action[:, 0], -1, 1), atol=1e-6)
