"""DQN's and discrete CQL's losses and the whole update, against plain NumPy in float64, and how DQN explores."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import adam_first_step, double, forward, gradient, mostly_close

from ooo_rl import envs
from ooo_rl.algos import dqn
from ooo_rl.data import policy
from ooo_rl.data.buffer import Transition
from ooo_rl.data.runs.session import Static

OBS, ACTIONS, BATCH = 3, 4, 16
SETTINGS = {
    "lr": 2e-2, "target_rate": 0.1, "reward_scale": 2.0, "reward_bias": -1.0, "cql_weight": 0.7, "rnd_lr": 3e-2,
    "intrinsic_coef": 0.6,
}  # fmt: skip


def static_of(env=None, **settings):
    args = dqn.Args(env="none", hidden=(5, 4), **settings)
    nets = dqn.make_nets(SimpleNamespace(args=args, action_size=env.action_size if env else ACTIONS))
    obs, scalar = jnp.zeros(env.observation_size if env else OBS), jnp.float32(0)
    example = Transition(obs, jnp.int32(0), scalar, obs, scalar)
    return Static(args, env, example, nets)


def random_rows(rng, n=BATCH):
    return Transition(
        obs=np.float32(rng.normal(size=(n, OBS))),
        action=rng.integers(0, ACTIONS, n).astype(np.int32),
        reward=np.float32(rng.normal(size=n)),
        next_obs=np.float32(rng.normal(size=(n, OBS))),
        discount=np.float32(rng.integers(0, 2, n)),
    )


def make(**settings):
    """What the functions of dqn.py get first, a tiny agent and RND of random numbers, and a batch.

    Targets differ from the networks, and no bias is zero, so that a mix-up shows.
    """
    static, rng = static_of(**settings), np.random.default_rng(0)
    fill = lambda tree: jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), tree)  # noqa: E731
    zero = lambda tree: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)  # noqa: E731
    agent, rnd = (
        jax.eval_shape(partial(f, static), jax.random.PRNGKey(0)) for f in (dqn.init_agent, dqn.init_rnd)
    )
    agent = zero(agent).replace(
        actor=zero(agent.actor).replace(params=fill(agent.actor.params)), target=fill(agent.target)
    )
    rnd = zero(rnd).replace(
        predictor=zero(rnd.predictor).replace(params=fill(rnd.predictor.params)), target=fill(rnd.target)
    )
    return static, agent, rnd, random_rows(rng)


def q_of(params, obs):
    return forward(params["params"]["MLP_0"], obs)


def check_update(ours, metrics, agent, batch, bonus, choose):
    """`choose` gives the values of next actions by which the target's is chosen."""
    rows = np.arange(BATCH)
    next_q = q_of(agent.target, batch.next_obs)[rows, choose.argmax(axis=1)]
    target = 2 * batch.reward - 1 + bonus + 0.99 * batch.discount * next_q

    def losses(params):
        q = q_of(params, batch.obs)
        chosen = q[rows, batch.action]
        return np.mean((chosen - target) ** 2), np.mean(np.log(np.exp(q).sum(axis=1)) - chosen)

    total = lambda params: losses(params) @ np.array([1, 0.7])  # noqa: E731
    bellman, diff = losses(agent.actor.params)
    np.testing.assert_allclose(metrics["bellman_loss"], bellman, rtol=1e-4)
    np.testing.assert_allclose(metrics["conservative_loss"], diff, rtol=1e-4)
    np.testing.assert_allclose(metrics["q"], target.mean(), rtol=1e-4)
    actor = adam_first_step(agent.actor.params, gradient(total, agent.actor.params), 2e-2)
    mostly_close(ours.actor.params, actor)
    mostly_close(ours.target, jax.tree.map(lambda new, old: 0.1 * new + 0.9 * old, actor, agent.target))


@pytest.mark.parametrize("is_double", [False, True])
def test_update(is_double):
    static, agent, _, batch = make(double=is_double)
    bonus = np.random.default_rng(1).normal(size=BATCH)
    ours, metrics = jax.jit(partial(dqn.update, static, dqn.Hyper(**SETTINGS)))(
        agent, batch, np.float32(bonus)
    )
    agent, batch = double(agent), batch.replace(obs=double(batch.obs), next_obs=double(batch.next_obs))
    by_target, by_network = (q_of(p, batch.next_obs) for p in (agent.target, agent.actor.params))
    assert (by_target.argmax(1) != by_network.argmax(1)).any(), "both choose alike"
    check_update(ours, metrics, agent, batch, bonus, by_network if is_double else by_target)


def test_the_bonus_is_rnds_error_standardised_and_its_predictor_learns():
    static, agent, rnd, batch = make(intrinsic="rnd")
    (ours, learnt), metrics = jax.jit(partial(dqn.learn, static, dqn.Hyper(**SETTINGS)))((agent, rnd), batch)
    agent, rnd = double(agent), double(rnd)
    batch = batch.replace(obs=double(batch.obs), next_obs=double(batch.next_obs))
    net = lambda params: forward(params["params"], batch.next_obs)  # noqa: E731
    error_of = lambda params: ((net(params) - net(rnd.target)) ** 2).sum(axis=1)  # noqa: E731
    error = error_of(rnd.predictor.params)
    bonus = 0.6 * (error - error.mean()) / error.std()
    check_update(ours, metrics, agent, batch, bonus, q_of(agent.target, batch.next_obs))
    np.testing.assert_allclose(metrics["rnd_error"], error.mean(), rtol=1e-4)
    grads = gradient(lambda params: error_of(params).mean(), rnd.predictor.params)
    mostly_close(learnt.predictor.params, adam_first_step(rnd.predictor.params, grads, 3e-2))


def test_without_a_bonus_nothing_is_added():
    static, agent, _, batch = make()
    hyper = dqn.Hyper(**SETTINGS)
    (ours, nothing), _ = jax.jit(partial(dqn.learn, static, hyper))((agent, ()), batch)
    theirs, _ = jax.jit(partial(dqn.update, static, hyper))(agent, batch, jnp.zeros(BATCH))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert nothing == ()


def test_actions_are_random_as_often_as_epsilon_says():
    env = envs.make("toy-maze")
    static = static_of(env)
    agent = dqn.init_agent(static, jax.random.PRNGKey(0))
    obs = np.float32(np.random.default_rng(0).uniform(size=(20_000, 2)))
    best = dqn.act(static.nets, agent.actor.params, obs)
    explore = jax.jit(partial(dqn.explore, static, agent.actor.params, obs))
    for epsilon in (0.0, 0.2, 1.0):
        action = explore(jnp.float32(epsilon), jax.random.PRNGKey(1))
        assert action.dtype == jnp.int32 and action.min() >= 0 and action.max() < 5
        assert (action != best).mean() == pytest.approx(0.8 * epsilon, abs=0.01)  # one of five is the best


@pytest.mark.parametrize(
    ("offline_steps", "source", "random"), [(0, "", 1.0), (100, "", 0.0), (0, "runs/x", 0.0)]
)
def test_before_it_learns_only_a_fresh_network_acts_at_random(offline_steps, source, random):
    """In the idle steps; epsilon is 0."""
    env = envs.make("toy-maze")
    static = static_of(env, online_steps=800, num_envs=8)
    args = dataclasses.replace(static.args, offline_steps=offline_steps, init_from=source)
    static = static._replace(args=args)
    state = dqn.init_state(static, jax.random.PRNGKey(0))
    chunk = partial(dqn.finetune_chunk, static, length=100, learns=False)
    after, _ = jax.jit(chunk)(state, dqn.Hyper(epsilon=0.0), None, jnp.int32(0))
    best = dqn.act(static.nets, state.agent.actor.params, after.ring.obs)
    assert (after.ring.action != best).mean() == pytest.approx(0.8 * random, abs=0.05)
    jax.tree.map(np.testing.assert_array_equal, after.agent, state.agent)


def test_rnd_learns_online_too():
    steps = {"online_steps": 16, "num_envs": 8, "batch_size": 8, "utd_ratio": 1 / 8}
    static = static_of(envs.make("toy-maze"), **steps, intrinsic="rnd")
    state = dqn.init_state(static, jax.random.PRNGKey(0))
    chunk = jax.jit(partial(dqn.finetune_chunk, static, length=2, learns=True))
    after, metrics = chunk(state, dqn.Hyper(), None, jnp.int32(0))
    assert after.rnd.predictor.opt.count == 2 and metrics["rnd_error"] > 0


def test_each_phase_has_its_own_rate_and_weight(monkeypatch):
    """Offline the first ones, online the others."""
    env, seen = envs.make("toy-maze"), []

    def record(static, hyper, agent, batch, bonus):
        seen.append((float(hyper.lr), float(hyper.cql_weight)))
        return agent, {"q": bonus.mean()}

    monkeypatch.setattr(dqn, "update", record)
    static = static_of(env, online_steps=64, num_envs=8, batch_size=8)
    state = dqn.init_state(static, jax.random.PRNGKey(0))
    hyper = dqn.Hyper(lr=0.1, cql_weight=2.0, online_lr=0.3, online_cql_weight=4.0)
    rows = jax.tree.map(lambda x: jnp.zeros((8, *jnp.shape(x)), x.dtype), static.example)
    jax.eval_shape(lambda s: dqn.pretrain_chunk(static, s, hyper, rows, length=1), state)
    chunk = partial(dqn.finetune_chunk, static, length=1, learns=True)
    jax.eval_shape(lambda s: chunk(s, hyper, rows, jnp.int32(0)), state)
    assert set(seen) == {(0.1, 2.0), (0.3, 4.0)}


def test_saved_policy_is_that_of_act(tmp_path):
    static, agent, _, batch = make()
    policy.save(tmp_path / "policy.npz", dqn.export(agent.actor.params), algo="dqn")
    saved = policy.load(tmp_path / "policy.npz")
    wanted = q_of(double(agent.actor.params), batch.obs).argmax(axis=1)
    np.testing.assert_array_equal(dqn.act(static.nets, agent.actor.params, batch.obs), wanted)
    np.testing.assert_array_equal(policy.act(saved, batch.obs), wanted)
    assert policy.is_discrete(saved) and policy.policy_sizes(saved) == (OBS, ACTIONS)
    assert policy.act(saved, batch.obs[0]).shape == ()
    with pytest.raises(ValueError, match="no standard deviation to sample with"):
        policy.act(saved, batch.obs, np.random.default_rng(0))
