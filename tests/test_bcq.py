"""BCQ's losses and its whole update against plain NumPy in float64; what the policy chooses; its file."""

from functools import partial

import jax
import numpy as np
import pytest
from numerics import adam_first_step, double, ensemble, forward, gradient, mostly_close
from test_cql import check_moment
from test_sac import ACT, BATCH, HIDDEN, OBS, random_rows, static_of

from ooo_rl.algos import bcq
from ooo_rl.data import policy

HYPER = bcq.Hyper(
    actor_lr=2e-2, critic_lr=3e-2, vae_lr=1e-2, target_rate=0.1, phi=0.3, least_weight=0.6, reward_scale=2.0,
    reward_bias=-1.0,
)  # fmt: skip
CANDIDATES = 16


@pytest.fixture(scope="module")
def made():
    """The static part of a run, an agent of random numbers whose targets are its own, and a batch."""
    static = static_of(bcq, vae_hidden=HIDDEN, target_candidates=3, act_candidates=CANDIDATES)
    shapes, rng = (
        jax.eval_shape(partial(bcq.init_agent, static), jax.random.PRNGKey(0)),
        np.random.default_rng(0),
    )
    fill = lambda tree: jax.tree.map(lambda x: np.float32(0.5 * rng.normal(size=x.shape)), tree)  # noqa: E731
    agent = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    learners = {name: getattr(agent, name) for name in ("actor", "critic", "vae")}
    learners = {name: part.replace(params=fill(part.params)) for name, part in learners.items()}
    targets = {"target_actor": fill(shapes.target_actor), "target_critic": fill(shapes.target_critic)}
    return static, agent.replace(**learners, **targets), random_rows(rng, BATCH)


def network(params, *parts):
    return forward(params["params"]["MLP_0"], np.concatenate(parts, axis=-1))


def latents(key, *places):
    return np.clip(np.float64(jax.random.normal(key, (*places, 2 * ACT))), -0.5, 0.5)


def moved(actor, obs, action):
    return np.clip(action + 0.3 * np.tanh(network(actor, obs, action)), -1, 1)


def test_update(made):
    static, agent, batch = made
    key = jax.random.PRNGKey(5)
    ours, metrics = jax.jit(partial(bcq.update, static, HYPER))(agent, batch, key)
    vae_key, next_key, actor_key = jax.random.split(key, 3)
    before, batch = double(agent), double(batch)

    def vae(params):
        mean, log_std = np.split(network(params["encoder"], batch.obs, batch.action), 2, axis=-1)
        log_std = np.clip(log_std, -4, 15)
        latent = mean + np.exp(log_std) * np.float64(jax.random.normal(vae_key, mean.shape))
        error = np.tanh(network(params["decoder"], batch.obs, latent)) - batch.action
        return np.mean(error**2) - 0.25 * np.mean(1 + 2 * log_std - mean**2 - np.exp(2 * log_std))

    np.testing.assert_allclose(metrics["vae_loss"], vae(before.vae.params), rtol=1e-4)
    slope = gradient(vae, before.vae.params)
    check_moment(ours.vae, slope)
    mostly_close(ours.vae.params, adam_first_step(before.vae.params, slope, 1e-2))

    decoder = double(ours.vae.params)["decoder"]
    obs = np.stack([batch.next_obs] * 3)
    action = moved(before.target_actor, obs, np.tanh(network(decoder, obs, latents(next_key, 3, BATCH))))
    q = np.stack([ensemble(before.target_critic, *pair) for pair in zip(obs, action)], axis=1)  # [2, 3, B]
    mixed = (0.6 * q.min(axis=0) + 0.4 * q.max(axis=0)).max(axis=0)
    target = 2 * batch.reward - 1 + 0.99 * batch.discount * mixed

    def bellman(params):
        return np.mean(((ensemble(params, batch.obs, batch.action) - target) ** 2).sum(axis=0))

    np.testing.assert_allclose(metrics["critic_loss"], bellman(before.critic.params), rtol=1e-4)
    slope = gradient(bellman, before.critic.params)
    check_moment(ours.critic, slope)
    mostly_close(ours.critic.params, adam_first_step(before.critic.params, slope, 3e-2))

    critic = double(ours.critic.params)
    own = np.tanh(network(decoder, batch.obs, latents(actor_key, 1, BATCH)[0]))
    climb = lambda params: -ensemble(critic, batch.obs, moved(params, batch.obs, own))[0].mean()  # noqa: E731
    np.testing.assert_allclose(metrics["actor_loss"], climb(before.actor.params), rtol=1e-4)
    slope = gradient(climb, before.actor.params)
    check_moment(ours.actor, slope)
    mostly_close(ours.actor.params, adam_first_step(before.actor.params, slope, 2e-2))
    for new, old, slow in (
        (ours.actor.params, before.target_actor, ours.target_actor),
        (ours.critic.params, before.target_critic, ours.target_critic),
    ):
        mostly_close(slow, jax.tree.map(lambda n, o: 0.1 * n + 0.9 * o, double(new), old))


@pytest.mark.parametrize("sampled", [False, True])
def test_the_candidate_with_the_largest_first_q_is_chosen(made, sampled):
    static, agent, batch = made
    key = jax.random.PRNGKey(3) if sampled else None
    ours = np.asarray(bcq.act(static.nets, bcq.acting(agent, HYPER), batch.obs, key))
    before, obs = double(agent), np.stack([np.float64(batch.obs)] * CANDIDATES)
    if sampled:
        latent = latents(key, CANDIDATES, BATCH)
    else:  # the same for all states
        latent = np.broadcast_to(latents(jax.random.PRNGKey(0), CANDIDATES, 1), (CANDIDATES, BATCH, 2 * ACT))
    action = moved(before.actor.params, obs, np.tanh(network(before.vae.params["decoder"], obs, latent)))
    q = np.stack([ensemble(before.critic.params, *pair)[0] for pair in zip(obs, action)])
    best = q.argmax(axis=0)
    assert len({*best}) > 1, "always the same candidate"
    np.testing.assert_allclose(ours, action[best, np.arange(BATCH)], atol=1e-5)


def test_the_saved_policy_chooses_as_it_does(made, tmp_path):
    static, agent, batch = made
    actor = bcq.acting(agent, jax.tree.map(np.float32, HYPER))
    policy.save(tmp_path / "policy.npz", bcq.export(static, actor), algo="bcq")
    saved = policy.load(tmp_path / "policy.npz")
    expected = bcq.act(static.nets, actor, batch.obs)
    np.testing.assert_allclose(policy.act(saved, batch.obs), expected, atol=1e-5)
    samples = policy.act(saved, batch.obs, np.random.default_rng(0))
    assert policy.policy_sizes(saved) == (OBS, ACT) and np.abs(samples - expected).max() > 1e-3
