"""GDE on TD3+BC: the explorer's loss and step against NumPy, and what of TD3+BC goes into each of its policies."""

from functools import partial

import jax
import numpy as np
from numerics import adam_first_step, double, ensemble, forward, gradient, mostly_close
from test_gde_iql import divergence
from test_sac import ACT, BATCH, OBS, random_rows, static_of

from ooo_rl.algos import gde_td3_bc, td3_bc

SETTINGS = {"actor_lr": 2e-2, "critic_lr": 3e-2, "alpha": 1.7, "exploration_noise": 0.4, "target_rate": 0.1}


def make():
    """What the functions get first, an agent, an explorer, a teacher, all different, and a batch."""
    static, rng = static_of(gde_td3_bc), np.random.default_rng(0)
    batch = random_rows(rng, BATCH)
    agent = jax.jit(partial(gde_td3_bc.init_agent, static, batch))(jax.random.PRNGKey(0))

    def like(net):
        params = jax.tree.map(lambda x: np.float32(0.5 * rng.normal(size=x.shape)), net["params"])
        return {**net, "params": params}

    explorer = agent.actor.replace(params=like(agent.actor.params))
    return static, agent, explorer, like(agent.actor.params), batch


def step_of(static, **changes):
    return jax.jit(partial(gde_td3_bc.guided_update, static, gde_td3_bc.Hyper(**SETTINGS | changes)))


def test_the_explorers_step():
    """TD3+BC's step is that of td3_bc.py; then the explorer's, with the fresh critics, by NumPy."""
    static, agent, explorer, teacher, batch = make()
    key, rho = jax.random.PRNGKey(3), 0.7
    given = agent, explorer, teacher, rho, batch, key
    (learnt, moved), metrics = step_of(static, policy_every=1.0, reward_scale=5.0)(*given)
    hyper = td3_bc.Hyper(**SETTINGS, policy_every=1.0)
    theirs = jax.jit(partial(td3_bc.update, static, hyper))(td3_bc.Agent(**vars(agent)), batch, key)[0]
    for ours, other in zip(jax.tree.leaves(learnt), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-6)

    scale, critic = double(explorer.params["statistics"]["Standardise_0"]), double(learnt.critic.params)
    obs = (np.float64(batch.obs) - scale["mean"]) / scale["std"]
    own, guide = double(explorer.params), np.tanh(forward(double(teacher)["params"]["MLP_0"], obs))
    action_of = lambda params: np.tanh(forward(params["params"]["MLP_0"], obs))  # noqa: E731
    weight = 1.7 / np.abs(ensemble(critic, obs, action_of(own))[0]).mean()

    def kl(params):
        return divergence((guide, 0.4), (action_of(params), 0.4)).mean()

    def loss(params):
        return -weight * ensemble(critic, obs, action_of(params))[0].mean() + rho * kl(params)

    np.testing.assert_allclose(metrics["explorer_loss"], loss(own), rtol=1e-4)
    np.testing.assert_allclose(metrics["divergence"], kl(own), rtol=1e-4)
    slope = gradient(lambda params: loss({"params": params}), own["params"])
    mostly_close(moved.params["params"], adam_first_step(own["params"], slope, 2e-2))
    jax.tree.map(np.testing.assert_array_equal, moved.params["statistics"], explorer.params["statistics"])


def test_the_explorer_moves_when_policies_do():
    static, agent, explorer, teacher, batch = make()
    step, moves = step_of(static, policy_every=2.0), []
    for key in jax.random.split(jax.random.PRNGKey(0), 4):
        (agent, after), _ = step(agent, explorer, teacher, 0.3, batch, key)
        moves.append(bool((after.params["params"]["MLP_0"]["Dense_0"]["kernel"]
                           != explorer.params["params"]["MLP_0"]["Dense_0"]["kernel"]).any()))  # fmt: skip
        explorer = after
    assert moves == [False, True, False, True] and int(explorer.opt.count) == 2


def test_all_policies_hold_the_statistics_of_the_data():
    static, agent, *_, batch = make()
    state = gde_td3_bc.State(agent, None, None, None, None, None, None)
    state = gde_td3_bc.decouple(static, state)
    expected = np.mean(batch.obs, axis=0)
    assert expected.shape == (OBS,) and ACT == 2
    for actor in (state.explorer.params, state.teacher):
        np.testing.assert_allclose(actor["statistics"]["Standardise_0"]["mean"], expected, atol=1e-6)
