"""Every loss and the whole update, against plain NumPy in float64 with gradients by central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import adam_first_step, double, ensemble, forward, gradient, mostly_close

import envs
from algos import iql, ooo_iql
from data.buffer import Transition
from data.program import orthogonal

SCRIPTS = pytest.mark.parametrize("script", [iql, ooo_iql], ids=["iql", "ooo_iql"])
OBS, ACT, BATCH, HIDDEN = 3, 2, 16, (5, 4)


def value_of(params, obs):
    return forward(params["params"]["MLP_0"], obs)[:, 0]


def log_prob_of(params, obs, action):
    mean = np.tanh(forward(params["params"]["MLP_0"], obs))
    log_std = np.clip(params["params"]["log_std"], -5, 2)
    return (-0.5 * ((action - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)).sum(axis=1)


def expectile_loss(params, obs, q, tau):
    diff = q - value_of(params, obs)
    return np.mean(np.where(diff > 0, tau, 1 - tau) * diff**2)


def weighted_cloning_loss(params, obs, action, adv, beta):
    return -np.mean(np.minimum(np.exp(beta * adv), 100) * log_prob_of(params, obs, action))


def bellman_loss(params, obs, action, target):
    return np.mean(((ensemble(params, obs, action) - target) ** 2).sum(axis=0))


def make(script, seed=0):
    nets = script.Nets(script.Actor(HIDDEN, ACT), script.Critic(HIDDEN), script.Value(HIDDEN))
    agent = script.init_agent(nets, OBS, jax.random.PRNGKey(seed))
    # A target that differs from its critics, and biases that are not zero, so that a mix-up shows.
    shift = lambda tree, k: jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.PRNGKey(k), x.shape), tree)  # noqa: E731
    agent = agent.replace(target_critic=shift(agent.critic, 1), value=shift(agent.value, 2), actor=shift(agent.actor, 3))
    rng = np.random.default_rng(seed)
    batch = Transition(
        *(np.float32(x) for x in (
            rng.normal(size=(BATCH, OBS)), rng.uniform(-1, 1, (BATCH, ACT)), rng.normal(size=BATCH),
            rng.normal(size=(BATCH, OBS)), rng.integers(0, 2, BATCH),
        ))
    )  # fmt: skip
    return nets, agent, batch, rng


@SCRIPTS
def test_value_loss(script):
    nets, agent, batch, rng = make(script)
    q = np.float32(rng.normal(size=BATCH))
    for tau in (0.5, 0.9):
        np.testing.assert_allclose(
            script.value_loss(agent.value, nets, batch.obs, q, tau), expectile_loss(double(agent.value), batch.obs, q, tau), rtol=1e-5
        )


@SCRIPTS
def test_actor_loss_caps_its_weights(script):
    nets, agent, batch, rng = make(script)
    adv = np.float32(rng.normal(size=BATCH))
    adv[0] = 50.0
    ours = script.actor_loss(agent.actor, nets, batch.obs, batch.action, adv, 3.0, jax.random.PRNGKey(0))
    np.testing.assert_allclose(ours, weighted_cloning_loss(double(agent.actor), batch.obs, batch.action, adv, 3.0), rtol=1e-5)


@SCRIPTS
def test_critic_loss(script):
    nets, agent, batch, rng = make(script)
    target = np.float32(rng.normal(size=BATCH))
    ours = script.critic_loss(agent.critic, nets, batch.obs, batch.action, target)
    np.testing.assert_allclose(ours, bellman_loss(double(agent.critic), batch.obs, batch.action, target), rtol=1e-5)


def whole_update(agent, batch, hyper, bonus, low, high):
    """One update in NumPy: V, then the policy and the critics with the new V, then the targets."""
    agent, batch = double(agent), double(batch)
    q = np.clip(ensemble(agent.target_critic, batch.obs, batch.action).min(axis=0), low, high)
    value = adam_first_step(agent.value, gradient(lambda p: expectile_loss(p, batch.obs, q, hyper.expectile), agent.value), hyper.value_lr)
    adv = q - value_of(value, batch.obs)
    slope = gradient(lambda p: weighted_cloning_loss(p, batch.obs, batch.action, adv, hyper.temperature), agent.actor)
    actor = adam_first_step(agent.actor, slope, hyper.actor_lr)
    reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target = np.clip(reward + hyper.discount * batch.discount * value_of(value, batch.next_obs), low, high) + bonus
    slope = gradient(lambda p: bellman_loss(p, batch.obs, batch.action, target), agent.critic)
    critic = adam_first_step(agent.critic, slope, hyper.critic_lr)
    slow = jax.tree.map(lambda new, old: hyper.target_rate * new + (1 - hyper.target_rate) * old, critic, agent.target_critic)
    return {"value": value, "actor": actor, "critic": critic, "target_critic": slow}


SETTINGS = {
    "value_lr": 1e-2,
    "actor_lr": 2e-2,
    "critic_lr": 3e-2,
    "target_rate": 0.1,
    "expectile": 0.8,
    "reward_scale": 2.0,
    "reward_bias": -1.0,
}


def test_update_of_iql():
    nets, agent, batch, _ = make(iql)
    hyper = iql.Hyper(**SETTINGS)
    ours, _ = iql.update(nets, hyper, agent, batch, jax.random.PRNGKey(0))
    for name, theirs in whole_update(agent, batch, hyper, 0.0, -np.inf, np.inf).items():
        mostly_close(getattr(ours, name), theirs)


@pytest.mark.parametrize(("low", "high"), [(-np.inf, np.inf), (-0.5, 0.4)])
def test_update_of_ooo_iql(low, high):
    nets, agent, batch, rng = make(ooo_iql)
    hyper, bonus = ooo_iql.Hyper(**SETTINGS), np.float32(rng.uniform(0, 3, BATCH))
    ours, _ = ooo_iql.update(nets, hyper, agent, batch, bonus, (low, high), jax.random.PRNGKey(0))
    for name, theirs in whole_update(agent, batch, hyper, bonus, low, high).items():
        mostly_close(getattr(ours, name), theirs)


def test_moments_merge_like_one_pass():
    rng = np.random.default_rng(0)
    parts = [np.float32(rng.normal(3, 2, (n, 4))) for n in (5, 17, 3)]
    moments = ooo_iql.Moments(jnp.zeros(4), jnp.ones(4), jnp.float32(1e-4))
    for part in parts:
        moments = moments.update(part)
    rows = np.concatenate(parts)
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(moments.var, rows.var(axis=0), rtol=1e-3)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_rnd_is_the_prediction_error_over_its_deviation(variant):
    _, _, batch, _ = make(ooo_iql)
    bonus = ooo_iql.RNDBonus(OBS, variant)
    state = bonus.init(jax.random.PRNGKey(0), None)
    errors = []
    for _ in range(3):
        state = bonus.learn(state, batch, 1e-4)
        x = np.asarray(batch.obs if variant == "paper" else batch.next_obs, np.float64)
        x = np.clip((x - np.asarray(state.obs.mean)) / np.sqrt(np.asarray(state.obs.var)), -5, 5)
        squared = (forward(double(state.predictor)["params"], x) - forward(double(state.target)["params"], x)) ** 2
        errors.append(squared.sum(axis=1) if variant == "paper" else squared.max(axis=1))
    np.testing.assert_allclose(bonus.reward(state, batch), errors[-1] / np.concatenate(errors).std(), rtol=2e-3)
    first = errors[0].mean()
    for _ in range(200):
        state = bonus.learn(state, batch, 1e-3)
    assert bonus.errors(state, batch).mean() < 0.2 * first / (512 if variant == "paper" else 1)


def test_counts_are_those_of_a_dictionary():
    bins = (6, 3)
    env = envs.make("point-mass-wall")
    bonus = ooo_iql.CountBonus(env, bins)
    rng = np.random.default_rng(0)
    x0, x1, y0, y1 = env.layout["bounds"]
    rows = Transition(np.float32(rng.uniform([x0, y0], [x1, y1], (200, 2))), np.float32(rng.uniform(-1, 1, (200, 2))), *[None] * 3)
    counts = {}

    def cell(row):
        x = [*rows.obs[row], *rows.action[row]]
        grid = [np.linspace(a, b, n) for a, b, n in zip((x0, y0, -1, -1), (x1, y1, 1, 1), (bins[0], bins[0], bins[1], bins[1]))]
        return tuple(int(np.abs(points - v).argmin()) for points, v in zip(grid, x))

    for row in range(200):
        counts[cell(row)] = counts.get(cell(row), 0) + 1
    state = bonus.init(jax.random.PRNGKey(0), rows)
    expected = [1 / np.sqrt(counts[cell(row)] + 1) for row in range(200)]
    np.testing.assert_allclose(bonus.reward(state, rows), expected, rtol=1e-5)
    assert len(set(expected)) > 2


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (16, 16), (8, 1)])
def test_orthogonal_matrices(shape):
    matrices = jax.vmap(lambda key: orthogonal(2.0)(key, shape))(jax.random.split(jax.random.PRNGKey(0), 5))
    for matrix in np.asarray(matrices):
        thin = matrix if shape[0] >= shape[1] else matrix.T
        np.testing.assert_allclose(thin.T @ thin, 4 * np.eye(min(shape)), atol=1e-5)
    assert np.abs(matrices[0] - matrices[1]).max() > 0.1
