"""O3F on LAPO: blocks of critic steps whose targets ask a subset, against NumPy; what is played online."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import double, mostly_close
from test_awac import Still
from test_lapo import (
    BATCH,
    EXTREMES,
    LATENT,
    SETTINGS,
    action_of,
    check_critic_and_value,
    check_vae_and_policy,
    make,
    q_of,
    slow,
    v_of,
)
from test_losses import ACT
from test_o3f_iql import prefers_the_first

from ooo_rl.algos import o3f_lapo
from ooo_rl.data.errors import UsageError


def subsets_of(key, num):
    """Which of five critics each of `num` targets asks: the first two of a shuffled ensemble."""
    return [np.asarray(jax.random.permutation(k, 5))[:2] for k in jax.random.split(key, num)]


def test_update():
    """Of one batch: the critics' step, then those of CVAE and policy."""
    static, agent, batch = make(o3f_lapo)
    hyper, key = o3f_lapo.Hyper(**SETTINGS, value_min=-0.12, value_max=-0.08), jax.random.PRNGKey(5)
    update = jax.jit(partial(o3f_lapo.update, static, hyper))
    ours, metrics = update(agent, jax.tree.map(lambda x: x[None], batch), EXTREMES, key)
    critic_key, subset_key, vae_key = jax.random.split(key, 3)
    subset, later = subsets_of(subset_key, 2)
    agent, batch = double(agent), double(batch)
    obs, reward = batch.obs, 2 * batch.reward - 1

    def aimed(critic, subset, obs, noise=0.0):
        q = q_of(critic, obs, action_of(agent.target_actor, obs, noise))
        assert len(q) == 5
        return 0.7 * q[subset].min(axis=0) + 0.3 * q[subset].max(axis=0)

    noise = 0.6 * np.float64(jax.random.normal(critic_key, (1, BATCH, LATENT)))[0]
    free = aimed(agent.target_critic, subset, obs, np.clip(noise, -0.5, 0.5))
    target_v = np.clip(free, -0.12, -0.08)
    assert 0 < (target_v != free).mean() < 1, "bounds that bound nothing, or all"
    critic = check_critic_and_value(ours, metrics, agent, batch, target_v)
    mostly_close(ours.target_critic["params"], slow(critic, agent.target_critic["params"]))

    next_q = aimed(double(ours.target_critic), later, batch.next_obs)
    adv = reward + 0.99 * batch.discount * next_q - v_of(double(ours.value.params), obs)
    np.testing.assert_allclose(metrics["adv"], adv.mean(), rtol=1e-3)
    drawn = np.float64(jax.random.normal(vae_key, (BATCH, LATENT)))
    check_vae_and_policy(ours, metrics, agent, batch, adv, drawn)


def test_a_block_is_its_steps_one_after_another():
    static, agent, batch = make(o3f_lapo)
    hyper, key = o3f_lapo.Hyper(**SETTINGS | {"latent_noise": 0.0}), jax.random.PRNGKey(0)
    order = np.random.default_rng(2).permutation(3 * BATCH) % BATCH
    batches = jax.tree.map(lambda x: x[order].reshape(3, BATCH, *x.shape[1:]), batch)
    subsets = np.array([[0, 1], [4, 2], [3, 0]])
    fit = jax.jit(
        lambda agent, *given: o3f_lapo.fit_critics(static, hyper, agent, *given, (-9.0, 9.0), key)[0]
    )
    whole, alone = fit(agent, batches, subsets), agent
    for i in range(3):
        alone = fit(alone, jax.tree.map(lambda x, i=i: x[i : i + 1], batches), subsets[i : i + 1])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), whole, alone)
    other = fit(agent, batches, np.full_like(subsets, 3))
    values = (jax.tree.leaves(one.value.params["params"])[0] for one in (whole, other))
    assert np.abs(np.subtract(*values)).max() > 1e-4, "the subset decides nothing"


def test_each_step_of_a_block_has_noise_of_its_own():
    static, agent, batch = make(o3f_lapo)
    hyper, key = o3f_lapo.Hyper(**SETTINGS | {"critic_lr": 0.0, "target_rate": 0.0}), jax.random.PRNGKey(0)
    twice, subsets = jax.tree.map(lambda x: np.stack([x, x]), batch), np.array([[0, 1], [0, 1]])
    fit = jax.jit(lambda *given: o3f_lapo.fit_critics(static, hyper, *given, (-9.0, 9.0), key)[1][1])
    noise = np.clip(0.6 * np.float64(jax.random.normal(key, (2, BATCH, LATENT))), -0.5, 0.5)
    old, obs = double(agent), np.float64(batch.obs)
    q = [q_of(old.target_critic, obs, action_of(old.target_actor, obs, own))[:2] for own in noise]
    target = [0.7 * one.min(axis=0) + 0.3 * one.max(axis=0) for one in q]
    errors = [((v_of(old.value.params, obs) - one) ** 2).mean() for one in target]
    assert abs(errors[0] - errors[1]) > 3e-4 * errors[0]
    np.testing.assert_allclose(fit(agent, twice, subsets), np.mean(errors), rtol=1e-5)


@pytest.mark.parametrize(("candidates", "mean"), [(100, 0.5), (1, 0.0)])
def test_what_is_played_and_stored_online(candidates, mean):
    """The best of 100 normal numbers is 2.5 standard deviations above their mean; one alone is noise."""
    static, agent, _ = make(
        o3f_lapo, env=Still(), hidden=(2,), num_envs=400, online_steps=400, utd_ratio=1 / 400, policy_every=1,
        batch_size=4, candidates=candidates,
    )  # fmt: skip
    nets = {name: getattr(agent, name).params for name in ("actor", "critic")}
    plain = {name: {"mean": jnp.zeros(len(s["mean"])), "std": jnp.ones(len(s["std"]))}
             for name, s in nets["actor"]["statistics"].items()}  # fmt: skip
    still = {"params": jax.tree.map(jnp.zeros_like, nets["actor"]["params"]), "statistics": plain}
    critic = prefers_the_first({"params": nets["critic"]["params"]}) | {"statistics": plain}
    agent = agent.replace(actor=agent.actor.replace(params=still), critic=agent.critic.replace(params=critic))
    online = o3f_lapo.start_online(static, jax.random.PRNGKey(0))
    state = o3f_lapo.State(agent, jnp.array([9.0, -9.0]), *online, jax.random.PRNGKey(1))
    chunk = jax.jit(partial(o3f_lapo.finetune_chunk, static, length=1))
    state, metrics = chunk(state, o3f_lapo.Hyper(candidate_std=0.2), None, jnp.int32(0))
    action = state.ring.action
    assert action.shape == (400, ACT)
    np.testing.assert_allclose(action.mean(axis=0), [mean, 0], atol=0.04)
    np.testing.assert_allclose(metrics["gain"], mean, atol=0.04)
    np.testing.assert_allclose(state.extremes, [action[:, 0].min(), action[:, 0].max()], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_subset": 6}, "--target-subset 6 is more than the --ensemble of 5"),
        ({"policy_every": 3}, "--policy-every 3 must divide num_envs \\* utd_ratio, 160"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(changes, message):
    args = o3f_lapo.Args.exactly({"env": "hopper", "num_envs": 8} | changes)
    with pytest.raises(UsageError, match=message):
        o3f_lapo.make_plan(args)
