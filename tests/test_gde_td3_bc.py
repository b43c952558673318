"""GDE on TD3+BC: the explorer's loss and step against NumPy, and what of TD3+BC goes into each of its policies."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from numerics import adam_first_step, double, ensemble, forward, gradient, mostly_close
from test_gde_iql import Clock, divergence
from test_sac import BATCH, random_rows, static_of

from ooo_rl.algos import gde_td3_bc, td3_bc
from ooo_rl.data.buffer import Transition
from ooo_rl.data.runs.session import Static

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

    def kl(params):
        return divergence((guide, 0.4), (action_of(params), 0.4)).mean()

    def loss(params):
        return -ensemble(critic, obs, action_of(params))[0].mean() + rho * kl(params)

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
    state = gde_td3_bc.State(agent, *[None] * 7)
    state = gde_td3_bc.decouple(static, state)
    expected = np.mean(batch.obs, axis=0)
    for actor in (state.explorer.params, state.teacher, state.tried):
        np.testing.assert_allclose(actor["statistics"]["Standardise_0"]["mean"], expected, atol=1e-6)


def clocks(**settings):
    """Two clocks side by side, whose trials are 10 of each 16 steps; all networks are random."""
    settings = {"num_envs": 2, "online_steps": 64, "trial_every": 32, "trial_steps": 20} | settings
    sizes = {"hidden": (4,), "critic_hidden": (4,), "batch_size": 4, "utd_ratio": 0.5}
    args = gde_td3_bc.Args.exactly(sizes | settings)
    nets = gde_td3_bc.make_nets(SimpleNamespace(args=args, action_size=1))
    one, scalar = jnp.zeros(1), jnp.float32(0)
    static = Static(args, Clock(), Transition(one, one, scalar, one, scalar), nets)
    return static, jax.jit(partial(gde_td3_bc.init_state, static, None))(jax.random.PRNGKey(0))


def test_who_plays_a_trial_does_not_learn_in_it():
    """Of 16 steps the first 10 are without noise, by the exploiter of the first one, which becomes the teacher."""
    static, state = clocks()
    hyper = gde_td3_bc.Hyper(actor_lr=0.05, policy_every=1.0)
    chunk = jax.jit(partial(gde_td3_bc.finetune_chunk, static, length=16, learns=True))
    later, metrics = chunk(state, hyper, None, None, jnp.int32(0))
    for params in (later.teacher, later.tried):
        jax.tree.map(np.testing.assert_array_equal, params, state.agent.actor.params)
    expected = gde_td3_bc.act(static.nets, state.agent.actor.params, later.ring.obs)
    np.testing.assert_allclose(later.ring.action[:20], expected[:20], rtol=1e-5, atol=1e-6)
    assert (np.abs(later.ring.action - expected)[20:32] > 1e-3).any()
    assert int(later.explorer.opt.count) == int(later.agent.actor.opt.count) == 16
    np.testing.assert_allclose([metrics["in_trial"], metrics["new_teacher"]], [10 / 16, 1 / 16], rtol=1e-6)
