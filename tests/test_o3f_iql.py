"""O3F on IQL: the update with five critics and the choice among candidates, against plain NumPy in float64."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import double, ensemble, mostly_close
from test_awac import Still
from test_losses import ACT, BATCH, EXAMPLE, HIDDEN, NAMES, OBS, SETTINGS, params_of, whole_update
from test_sac import random_rows

from ooo_rl.algos import o3f_iql
from ooo_rl.data.runs.session import Static


def make(env=None, **settings):
    """What the functions of o3f_iql.py get first, a tiny agent of random numbers, and a batch.

    Targets differ from the critics, and no bias is zero, so that a mix-up shows.
    """
    args = o3f_iql.Args.exactly({"hidden": HIDDEN} | settings)
    nets = o3f_iql.make_nets(SimpleNamespace(args=args, env=env, action_size=ACT))
    static, rng = Static(args, env, EXAMPLE, nets), np.random.default_rng(0)
    shapes = jax.eval_shape(partial(o3f_iql.init_agent, nets, EXAMPLE), jax.random.PRNGKey(0))
    fill = lambda tree: jax.tree.map(lambda x: np.float32(0.7 * rng.normal(size=x.shape)), tree)  # noqa: E731
    agent = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    learners = {name: getattr(agent, name) for name in ("actor", "critic", "value")}
    moved = {name: one.replace(params=fill(one.params)) for name, one in learners.items()}
    agent = agent.replace(target_critic=fill(shapes.target_critic), **moved)
    return static, agent, random_rows(rng, BATCH)


def test_update():
    """It is IQL's, with the least of five critics."""
    static, agent, batch = make()
    hyper = o3f_iql.Hyper(**SETTINGS)
    update = jax.jit(partial(o3f_iql.update, static.nets, hyper))
    ours, metrics = update(agent, batch, jax.random.PRNGKey(0))
    q = ensemble(double(agent.target_critic), batch.obs, batch.action)
    assert q.shape == (5, BATCH) and (q.min(axis=0) < q[:2].min(axis=0)).any(), "two would do"
    np.testing.assert_allclose(metrics["q"], q.min(axis=0).mean(), rtol=1e-4)
    theirs = whole_update(agent, batch, hyper, 0.0, -np.inf, np.inf)
    for name in NAMES:
        mostly_close(params_of(ours, name), theirs[name])


def test_candidates_lie_around_the_action_within_the_box():
    action = np.float32([[0.0, 0.9], [-0.5, 0.2], [0.3, 0.3]])
    draw = jax.jit(lambda key: o3f_iql.draw_candidates(action, 4_000, 0.2, key))
    found = draw(jax.random.PRNGKey(0))
    assert found.shape == (4_000, 3, 2) and np.abs(found).max() == 1
    z = np.array([-1.0, 0.0, 1.0])  # of a normal distribution, these are the quantiles
    expected = np.clip(action + 0.2 * z[:, None, None], -1, 1)
    np.testing.assert_allclose(np.quantile(found, [0.1587, 0.5, 0.8413], axis=0), expected, atol=0.02)


@pytest.mark.parametrize("omega", [0.0, 1.0, -1.0])
def test_the_best_candidate_is_that_of_a_plain_loop(omega):
    static, agent, batch = make()
    candidates = np.float32(np.random.default_rng(1).uniform(-1, 1, (20, BATCH, ACT)))
    choose = jax.jit(partial(o3f_iql.choose, static.nets))
    chosen, gain = choose(agent.critic.params, batch.obs, candidates, omega)
    critic, best, gains, by_mean = double(agent.critic.params), [], [], []
    for i, obs in enumerate(np.float64(batch.obs)):
        q = np.array([ensemble(critic, obs[None], np.float64(c)[None])[:, 0] for c in candidates[:, i]])
        score = [np.mean(own) + omega * np.std(own) for own in q]
        best.append(candidates[int(np.argmax(score)), i])
        gains.append(max(score) - np.mean(score))
        by_mean.append(int(np.argmax(score)) == int(np.argmax(q.mean(axis=1))))
    np.testing.assert_array_equal(chosen, best)
    np.testing.assert_allclose(gain, np.mean(gains), rtol=1e-4)
    assert np.all(by_mean) == (omega == 0), "the deviation of the critics decides nothing"


def prefers_the_first(critic):
    """Critics whose value is the first dimension of the action plus 5, whatever the observation."""
    zero = jax.tree.map(jnp.zeros_like, critic)
    layers = zero["params"]["VmapMLP_0"]
    layers["Dense_0"]["kernel"] = layers["Dense_0"]["kernel"].at[:, OBS, 0].set(1.0)
    layers["Dense_0"]["bias"] = layers["Dense_0"]["bias"].at[:, 0].set(5.0)
    layers["Dense_1"]["kernel"] = layers["Dense_1"]["kernel"].at[:, 0, 0].set(1.0)
    return zero


@pytest.mark.parametrize(("candidates", "mean"), [(100, 0.5), (1, 0.0)])
def test_what_is_played_and_stored_online(candidates, mean):
    """The best of 100 normal numbers is 2.5 standard deviations above their mean; one alone is noise."""
    static, agent, _ = make(
        env=Still(), hidden=(2,), num_envs=400, online_steps=400, utd_ratio=1 / 400, batch_size=4,
        candidates=candidates,
    )  # fmt: skip
    still = jax.tree.map(jnp.zeros_like, agent.actor.params)
    still["params"]["log_std"] -= 5.0  # a standard deviation of 0.007
    agent = agent.replace(
        actor=agent.actor.replace(params=still),
        critic=agent.critic.replace(params=prefers_the_first(agent.critic.params)),
    )
    online = o3f_iql.start_online(static, jax.random.PRNGKey(0))
    state = o3f_iql.State(agent, *online, jax.random.PRNGKey(1))
    chunk = jax.jit(partial(o3f_iql.finetune_chunk, static, length=1))
    state, metrics = chunk(state, o3f_iql.Hyper(candidate_std=0.2), None, jnp.int32(0))
    action = state.ring.action
    np.testing.assert_allclose(action.mean(axis=0), [mean, 0], atol=0.04)
    np.testing.assert_allclose(action[:, 1].std(), 0.2, atol=0.02)
    np.testing.assert_allclose(metrics["gain"], mean, atol=0.04)
    np.testing.assert_allclose(state.ring.reward, action[:, 0], atol=1e-6)
