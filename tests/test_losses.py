"""Every loss and the whole update, against plain NumPy in float64 with gradients by central differences."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import adam_first_step, double, ensemble, forward, gradient, mostly_close

from ooo_rl import envs
from ooo_rl.algos import iql, ooo_iql
from ooo_rl.data.buffer import Transition
from ooo_rl.data.learner import Moments, orthogonal
from ooo_rl.data.runs.session import Static

SCRIPTS = pytest.mark.parametrize("script", [iql, ooo_iql], ids=["iql", "ooo_iql"])
OBS, ACT, BATCH, HIDDEN = 3, 2, 16, (5, 4)
EXAMPLE = Transition(jnp.zeros(OBS), jnp.zeros(ACT), jnp.float32(0), jnp.zeros(OBS), jnp.float32(0))


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


def make(script, seed=0, **settings):
    bonus = {"intrinsic": "none"} if script is ooo_iql else {}
    args = script.Args.exactly({"hidden": HIDDEN} | bonus | settings)
    nets = script.make_nets(SimpleNamespace(args=args, env=None, action_size=ACT))
    agent = script.init_agent(nets, EXAMPLE, jax.random.PRNGKey(seed))
    # A target that differs from its critics, and biases that are not zero, so that a mix-up shows.
    noise = lambda x, k: 0.3 * jax.random.normal(jax.random.PRNGKey(k), x.shape)  # noqa: E731
    shift = lambda tree, k: jax.tree.map(lambda x: x + noise(x, k), tree)  # noqa: E731
    moved = {
        name: getattr(agent, name).replace(params=shift(getattr(agent, name).params, k))
        for name, k in (("value", 2), ("actor", 3))
    }
    agent = agent.replace(target_critic=shift(agent.critic.params, 1), **moved)
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
            script.value_loss(agent.value.params, nets, batch.obs, q, tau),
            expectile_loss(double(agent.value.params), batch.obs, q, tau),
            rtol=1e-5,
        )


@SCRIPTS
def test_actor_loss_caps_its_weights(script):
    nets, agent, batch, rng = make(script)
    adv = np.float32(rng.normal(size=BATCH))
    adv[0] = 50.0
    ours = script.actor_loss(
        agent.actor.params, nets, batch.obs, batch.action, adv, 3.0, jax.random.PRNGKey(0)
    )
    np.testing.assert_allclose(
        ours, weighted_cloning_loss(double(agent.actor.params), batch.obs, batch.action, adv, 3.0), rtol=1e-5
    )


@SCRIPTS
def test_critic_loss(script):
    nets, agent, batch, rng = make(script)
    target = np.float32(rng.normal(size=BATCH))
    ours = script.critic_loss(agent.critic.params, nets, batch.obs, batch.action, target)
    np.testing.assert_allclose(
        ours, bellman_loss(double(agent.critic.params), batch.obs, batch.action, target), rtol=1e-5
    )


NAMES = ("value", "actor", "critic", "target_critic")


def params_of(agent, name):
    part = getattr(agent, name)
    return getattr(part, "params", part)


def whole_update(agent, batch, hyper, bonus, low, high):
    """One update in NumPy: V, then the policy and the critics with the new V, then the targets."""
    before, batch = double({name: params_of(agent, name) for name in NAMES}), double(batch)
    q = np.clip(ensemble(before["target_critic"], batch.obs, batch.action).min(axis=0), low, high)
    value = adam_first_step(
        before["value"],
        gradient(lambda p: expectile_loss(p, batch.obs, q, hyper.expectile), before["value"]),
        hyper.value_lr,
    )
    adv = q - value_of(value, batch.obs)
    slope = gradient(
        lambda p: weighted_cloning_loss(p, batch.obs, batch.action, adv, hyper.temperature), before["actor"]
    )
    actor = adam_first_step(before["actor"], slope, hyper.actor_lr)
    reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target = (
        np.clip(reward + hyper.discount * batch.discount * value_of(value, batch.next_obs), low, high) + bonus
    )
    slope = gradient(lambda p: bellman_loss(p, batch.obs, batch.action, target), before["critic"])
    critic = adam_first_step(before["critic"], slope, hyper.critic_lr)
    slow = jax.tree.map(
        lambda new, old: hyper.target_rate * new + (1 - hyper.target_rate) * old,
        critic,
        before["target_critic"],
    )
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
        mostly_close(params_of(ours, name), theirs)


@pytest.mark.parametrize(("low", "high"), [(-np.inf, np.inf), (-0.5, 0.4)])
def test_update_of_ooo_iql(low, high):
    nets, agent, batch, rng = make(ooo_iql)
    hyper, bonus = ooo_iql.Hyper(**SETTINGS), np.float32(rng.uniform(0, 3, BATCH))
    ours, _ = ooo_iql.update(nets, hyper, agent, batch, bonus, (low, high), jax.random.PRNGKey(0))
    for name, theirs in whole_update(agent, batch, hyper, bonus, low, high).items():
        mostly_close(params_of(ours, name), theirs)


def test_moments_merge_like_one_pass():
    rng = np.random.default_rng(0)
    parts = [np.float32(rng.normal(3, 2, (n, 4))) for n in (5, 17, 3)]
    moments = Moments.fresh(4)
    for part in parts:
        moments = moments.update(part)
    rows = np.concatenate(parts)
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(moments.var, rows.var(axis=0), rtol=1e-3)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_rnd_is_the_prediction_error_over_its_deviation(variant):
    _, _, batch, _ = make(ooo_iql)
    args = ooo_iql.Args.exactly({"rnd_variant": variant, "intrinsic": "rnd"})
    static = Static(
        args, None, EXAMPLE, ooo_iql.make_nets(SimpleNamespace(args=args, env=None, action_size=ACT))
    )
    rnd = ooo_iql.init_bonus(static, None, jax.random.PRNGKey(0))
    errors = []
    for _ in range(3):
        rnd = ooo_iql.learn_rnd(static, rnd, batch, 1e-4)
        x = np.asarray(batch.obs if variant == "paper" else batch.next_obs, np.float64)
        x = np.clip((x - np.asarray(rnd.obs.mean)) / np.sqrt(np.asarray(rnd.obs.var)), -5, 5)
        predicted, fixed = (
            forward(double(params)["params"], x) for params in (rnd.predictor.params, rnd.target)
        )
        squared = (predicted - fixed) ** 2
        errors.append(squared.sum(axis=1) if variant == "paper" else squared.max(axis=1))
    np.testing.assert_allclose(
        ooo_iql.bonus(static, rnd, batch), errors[-1] / np.concatenate(errors).std(), rtol=2e-3
    )
    learn = jax.jit(lambda rnd: ooo_iql.learn_rnd(static, rnd, batch, 1e-3))
    for _ in range(200):
        rnd = learn(rnd)
    left = ooo_iql.rnd_errors(static, rnd.predictor.params, rnd, batch).mean()
    assert left < 0.2 * errors[0].mean() / (512 if variant == "paper" else 1)


def test_counts_are_those_of_a_dictionary():
    bins = (6, 3)
    env = envs.make("point-mass-wall")
    args = ooo_iql.Args.exactly({"intrinsic": "count", "count_bins": bins})
    static = Static(args, env, EXAMPLE, None)
    rng = np.random.default_rng(0)
    x0, x1, y0, y1 = env.layout["bounds"]
    rows = Transition(
        np.float32(rng.uniform([x0, y0], [x1, y1], (200, 2))),
        np.float32(rng.uniform(-1, 1, (200, 2))),
        *[None] * 3,
    )
    counts = {}

    def cell(row):
        x = [*rows.obs[row], *rows.action[row]]
        grid = [
            np.linspace(a, b, n)
            for a, b, n in zip((x0, y0, -1, -1), (x1, y1, 1, 1), (bins[0], bins[0], bins[1], bins[1]))
        ]
        return tuple(int(np.abs(points - v).argmin()) for points, v in zip(grid, x))

    for row in range(200):
        counts[cell(row)] = counts.get(cell(row), 0) + 1
    state = ooo_iql.init_bonus(static, rows, jax.random.PRNGKey(0))
    expected = [1 / np.sqrt(counts[cell(row)] + 1) for row in range(200)]
    np.testing.assert_allclose(ooo_iql.bonus(static, state, rows), expected, rtol=1e-5)
    assert len(set(expected)) > 2


@SCRIPTS
def test_dropout_is_in_the_policys_loss_alone(script):
    nets, agent, batch, _ = make(script, dropout=0.5)
    loss = lambda k: script.actor_loss(  # noqa: E731
        agent.actor.params,
        nets,
        batch.obs,
        batch.action,
        np.zeros(BATCH, np.float32),
        3.0,
        jax.random.PRNGKey(k),
    )
    assert loss(0) != loss(1), "the same units are left out"
    plain = make(script)[0]
    np.testing.assert_array_equal(*(script.act(net, agent.actor.params, batch.obs) for net in (nets, plain)))


@pytest.mark.parametrize("intrinsic", ["count", "rnd"])
def test_what_was_explored_is_remembered(intrinsic):
    """Each online row is counted once; RND's predictor learns at each gradient step."""
    env, two, scalar = envs.make("point-mass-wall"), jnp.zeros(2), jnp.float32(0)
    args = {
        "hidden": (2,),
        "num_envs": 4,
        "online_steps": 40,
        "utd_ratio": 0.25,
        "batch_size": 4,
        "intrinsic": intrinsic,
    }
    args = ooo_iql.Args.exactly(args | {"count_bins": (6, 3)})
    nets = ooo_iql.make_nets(SimpleNamespace(args=args, env=env, action_size=2))
    static = Static(args, env, Transition(two, two, scalar, two, scalar), nets)
    state = jax.jit(partial(ooo_iql.init_state, static, None))(jax.random.PRNGKey(0))
    after, _ = jax.jit(partial(ooo_iql.explore_chunk, static, length=10))(
        state, ooo_iql.Hyper(), None, jnp.int32(0)
    )
    assert after.bonus.sum() == 40 if intrinsic == "count" else after.bonus.predictor.opt.count == 10


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (16, 16), (8, 1)])
def test_orthogonal_matrices(shape):
    matrices = jax.vmap(lambda key: orthogonal(2.0)(key, shape))(jax.random.split(jax.random.PRNGKey(0), 5))
    for matrix in np.asarray(matrices):
        thin = matrix if shape[0] >= shape[1] else matrix.T
        np.testing.assert_allclose(thin.T @ thin, 4 * np.eye(min(shape)), atol=1e-5)
    assert np.abs(matrices[0] - matrices[1]).max() > 0.1
