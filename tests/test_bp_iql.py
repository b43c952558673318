"""BpIQL: the prior's density against numbers, Lambda's step against NumPy, who acts, and the actions before rows."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import adam_first_step, double, ensemble, forward, gradient, mostly_close
from test_jsrl import Clock
from test_losses import ACT, BATCH, SETTINGS, params_of, whole_update
from test_losses import make as random_agent
from test_sac import random_rows

from ooo_rl.algos import bp_iql
from ooo_rl.data.buffer import Transition
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs.session import Static

KEY = jax.random.PRNGKey(0)


def fill(tree, scale=0.5):
    """Random numbers, also where a network begins with 0."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: np.float32(scale * rng.normal(size=x.shape)), tree)


def prior_of(action_size, blocks, scale):
    """A flow of random numbers."""
    prior = bp_iql.Prior(action_size, blocks, (6, 6))
    none = np.zeros((1, action_size), np.float32)
    return prior, fill(jax.eval_shape(prior.init, KEY, none, none), scale)


# --- the prior ---


@pytest.mark.parametrize("action_size", [1, 3])
def test_density_is_that_of_the_actions_it_generates(action_size):
    """By the change of variables, with the Jacobian of the way from noise to actions."""
    prior, params = prior_of(action_size, 5, 0.8)
    rng = np.random.default_rng(0)
    noise, last = np.float32(rng.normal(size=(2, 20, action_size)))
    generate = partial(prior.apply, params, method="generate")
    actions = jax.jit(generate)(noise, last)
    jacobian = jax.jit(jax.vmap(jax.jacfwd(generate)))(noise, last)
    volume = np.linalg.slogdet(np.float64(jacobian))[1]
    expected = (-0.5 * np.float64(noise) ** 2 - 0.5 * np.log(2 * np.pi)).sum(axis=-1) - volume
    assert np.ptp(volume) > 0.1, "a flow that stretches nothing shows nothing"
    density = jax.jit(prior.apply)(params, actions, last)
    np.testing.assert_allclose(density, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("action_size", [1, 2])
def test_density_adds_up_to_one(action_size):
    prior, params = prior_of(action_size, 4, 0.5)
    last, points = np.full(action_size, 0.7, np.float32), 600
    sides = [np.linspace(-25, 25, points, dtype=np.float32)] * action_size
    grid = np.stack(np.meshgrid(*sides), axis=-1)
    density = np.exp(np.float64(jax.jit(prior.apply)(params, grid, np.broadcast_to(last, grid.shape))))
    np.testing.assert_allclose(density.sum() * (50 / (points - 1)) ** action_size, 1, rtol=1e-3)


def test_prior_learns_how_actions_follow_one_another():
    """Data in which an action is -0.8 times the last one, with a deviation of 0.2."""
    prior = bp_iql.Prior(2, 4, (16, 16))
    rng = np.random.default_rng(0)
    last = np.float32(rng.uniform(-1, 1, (2, 4_000, 2)))
    rows, unseen = zip(np.float32(-0.8 * last + 0.2 * rng.normal(size=last.shape)), last)
    nets = SimpleNamespace(prior=prior)
    learner = bp_iql.Learner.create(prior.init(KEY, *rows))
    learn = lambda learner, _: learner.descend(bp_iql.prior_loss, 1e-2, nets, *rows)[::-1]  # noqa: E731
    learner, losses = jax.jit(lambda start: jax.lax.scan(learn, start, None, 300))(learner)
    unit = 0.5 * (rows[0] ** 2).sum(axis=1).mean() + np.log(2 * np.pi)
    np.testing.assert_allclose(losses[0], unit, rtol=1e-4)  # it begins as a standard normal
    best = 2 * (np.log(0.2) + 0.5 * np.log(2 * np.pi * np.e))
    np.testing.assert_allclose(bp_iql.prior_loss(learner.params, nets, *unseen), best, atol=0.15)
    given = np.tile(np.float32([0.5, -0.9]), (2_000, 1))
    drawn = bp_iql.propose(nets, learner.params, given, KEY)
    np.testing.assert_allclose(drawn.mean(axis=0), [-0.4, 0.72], atol=0.05)
    np.testing.assert_allclose(drawn.std(axis=0), 0.2, atol=0.04)


def test_the_action_before_each_row():
    rng, n = np.random.default_rng(0), 60
    action = np.float32(rng.normal(size=(n, 2)))
    terminated, truncated = rng.random((2, n)) < 0.15
    truncated &= ~terminated
    none = np.zeros((n, 1), np.float32)
    rows = Transition(none, action, none[:, 0], none, np.float32(~terminated))
    expected, last = [], np.zeros(2)
    for one, over in zip(action, terminated | truncated):
        expected.append(last)
        last = np.zeros(2) if over else one
    ours = jax.jit(bp_iql.with_last_actions)(rows, truncated)
    np.testing.assert_array_equal(ours.last_action, np.float32(expected))
    jax.tree.map(np.testing.assert_array_equal, [*vars(rows).values()], [*vars(ours).values()][:-1])


def test_rows_in_no_order_are_refused():
    args = SimpleNamespace(offline_learns="all", offline_steps=1, init_from="")
    with pytest.raises(UsageError, match=r"--dataset mine\.npz: its rows are in no order"):
        bp_iql.check_prior(SimpleNamespace(args=args, card={"id": "mine.npz", "ordered": False}))


def test_a_prior_or_a_policy_that_learns_nothing_offline_is_named():
    said = []
    given = {"card": {}, "console": SimpleNamespace(print=said.append)}
    for settings, message in [
        ({"offline_learns": "all", "offline_steps": 1, "init_from": ""}, None),
        ({"offline_learns": "prior", "offline_steps": 1, "init_from": "runs/x"}, None),
        (
            {"offline_learns": "all", "offline_steps": 0, "init_from": "runs/x"},
            "the prior learns nothing offline",
        ),
    ]:
        bp_iql.check_prior(SimpleNamespace(args=SimpleNamespace(**settings), **given))
        assert bool(said) == bool(message) and (not message or said[0].startswith(message))
    args = SimpleNamespace(offline_learns="prior", offline_steps=1, init_from="")
    with pytest.raises(UsageError, match="--offline-learns prior needs --init-from"):
        bp_iql.check_prior(SimpleNamespace(args=args, **given))


# --- learning and acting ---


@pytest.fixture(scope="module")
def made():
    """Networks, an agent, and a batch."""
    nets, agent, batch, rng = random_agent(bp_iql, prior_hidden=(6, 6))
    agent = agent.replace(
        prior=agent.prior.replace(params=fill(agent.prior.params)),
        mixing=agent.mixing.replace(params=fill(agent.mixing.params)),
    )
    return nets, agent, bp_iql.Rows(**vars(batch), last_action=np.float32(rng.uniform(-1, 1, (BATCH, ACT))))


def test_update_is_that_of_iql(made):
    nets, agent, batch = made
    hyper = bp_iql.Hyper(**SETTINGS)
    ours, _ = jax.jit(partial(bp_iql.update, nets, hyper))(agent, batch, KEY)
    for name, theirs in whole_update(agent, batch, hyper, 0.0, -np.inf, np.inf).items():
        mostly_close(params_of(ours, name), theirs)
    jax.tree.map(np.testing.assert_array_equal, (ours.prior, ours.mixing), (agent.prior, agent.mixing))


def share_of(params, obs):
    """Lambda [B]."""
    hidden, last = np.maximum(forward(params["params"]["MLP_0"], obs), 0), params["params"]["Dense_0"]
    return 1 / (1 + np.exp(-np.log(0.95 / 0.05) - (hidden @ last["kernel"] + last["bias"])[:, 0]))


def test_step_of_lambda(made):
    nets, agent, batch = made
    learn = jax.jit(partial(bp_iql.learn_mixing, nets, bp_iql.Hyper(mixing_lr=2e-2)))
    ours, metrics = learn(agent, batch, KEY)
    prior_key, policy_key = jax.random.split(KEY)
    proposed = bp_iql.propose(nets, agent.prior.params, batch.last_action, prior_key)
    own = bp_iql.act(nets, agent.actor.params, batch.obs, policy_key)
    critic, mixing, batch, proposed, own = double(
        (agent.critic.params, agent.mixing.params, batch, proposed, own)
    )
    gain = ensemble(critic, batch.obs, proposed).min(axis=0) - ensemble(critic, batch.obs, own).min(axis=0)
    assert (gain > 0).any() and (gain < 0).any()
    np.testing.assert_allclose(metrics["prior_gain"], gain.mean(), rtol=1e-4)
    slope = gradient(lambda params: -np.mean(share_of(params, batch.obs) * gain), mixing)
    mostly_close(ours.mixing.params, adam_first_step(mixing, slope, 2e-2))
    jax.tree.map(np.testing.assert_array_equal, ours.replace(mixing=0), agent.replace(mixing=0))


def test_the_prior_acts_as_often_as_lambda_says(made):
    nets, agent, batch = made
    agent = agent.replace(mixing=agent.mixing.replace(params=fill(agent.mixing.params, 1.5)))
    keys = jax.random.split(KEY, 2_000)

    @jax.jit
    @jax.vmap
    def play(key):
        prior_key, policy_key, _ = jax.random.split(key, 3)
        proposed = bp_iql.propose(nets, agent.prior.params, batch.last_action, prior_key)
        own = bp_iql.act(nets, agent.actor.params, batch.obs, policy_key)
        return *bp_iql.behave(nets, agent, batch.obs, batch.last_action, key), proposed, own

    action, share, proposed, own = play(keys)
    expected = share_of(double(agent.mixing.params), np.float64(batch.obs))
    np.testing.assert_allclose(share[0], expected, rtol=1e-4)
    from_prior = (action == proposed).all(axis=-1)
    np.testing.assert_array_equal(action, np.where(from_prior[..., None], proposed, own))
    telling = (proposed != own).any(axis=-1)  # both may be clipped to one corner
    assert np.ptp(expected) > 0.3 and telling.sum(axis=0).min() > 1_000
    found = np.mean(from_prior, axis=0, where=telling)
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / 1_000**0.5)


def make(**settings):
    """What the functions of bp_iql.py get first, and a state: four environments of 4 or 6 steps an episode."""
    small = {"hidden": (2,), "prior_hidden": (2,), "num_envs": 4, "online_steps": 96, "batch_size": 8}
    args = bp_iql.Args.exactly(small | settings)
    nets = bp_iql.make_nets(SimpleNamespace(args=args, action_size=1))
    one, scalar = jnp.zeros(1), jnp.float32(0)
    static = Static(args, Clock(), Transition(one, one, scalar, one, scalar), nets)
    return static, jax.jit(partial(bp_iql.init_state, static))(KEY)


def test_online_rows_know_the_action_before_them():
    """A chunk goes on where the last one ended."""
    static, state = make()
    chunk = jax.jit(partial(bp_iql.finetune_chunk, static, length=12, learns=False))
    for added in (0, 48):
        state, metrics = chunk(state, bp_iql.Hyper(), None, None, jnp.int32(added))
    ring = jax.tree.map(lambda x: np.asarray(x).reshape(24, 4, -1), state.ring)
    begins = np.concatenate([np.ones((1, 4, 1), bool), ring.next_obs[:-1] >= 6])
    before = np.concatenate([np.zeros((1, 4, 1)), ring.action[:-1]])
    np.testing.assert_array_equal(ring.last_action, np.where(begins, 0, before))
    assert begins.sum() > 8 and np.abs(before).max() > 0.1
    np.testing.assert_allclose(metrics["prior_share"], 0.95, rtol=1e-5)


def test_the_prior_may_learn_alone():
    static, state = make(offline_learns="prior")
    rng = np.random.default_rng(0)
    rows = random_rows(rng, 40, obs_size=1, action_size=1)
    chunk = jax.jit(partial(bp_iql.pretrain_chunk, static, length=3))
    after, metrics = chunk(state, bp_iql.Hyper(), rows, np.zeros(40, bool), 0)
    assert metrics.keys() == {"prior_loss", "nonfinite_at"} and after.agent.prior.opt.count == 3
    same = jax.tree.map(lambda x, y: bool((x == y).all()), after.agent, state.agent)
    assert all(jax.tree.leaves(same.replace(prior=True))) and not all(jax.tree.leaves(same.prior))
