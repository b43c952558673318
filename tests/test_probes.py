"""Both scripts solve the five probes, whose values and best actions are known by hand, offline and online."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from algos import iql, ooo_iql
from data import buffer
from data.buffer import Transition
from data.program import EVERYWHERE, RUNS, Compiled, mesh_for, place

SEEDS, STEPS, DISCOUNT = 3, 2_000, 0.9
PROBES = [name for name in envs.names() if name.startswith("probe-")]
KNOWN = {  # observations; their values under the best actions; the best actions, None where all are as good
    "probe-constant-reward": ([0.0], [1.0], None),
    "probe-reward-is-obs": ([-1.0, 1.0], [-1.0, 1.0], None),
    "probe-delayed-reward": ([0.0, 1.0], [DISCOUNT, 1.0], None),
    "probe-action-reward": ([0.0], [1.0], [0.5]),
    "probe-match-obs": ([-0.5, 0.5], [1.0, 1.0], [-0.5, 0.5]),
}


def settings(script, name, **changes):
    hyper = script.Hyper(
        discount=DISCOUNT, actor_lr=3e-3, critic_lr=3e-3, value_lr=3e-3, target_rate=0.05, expectile=0.98, temperature=20.0
    )
    return dataclasses.replace(script.Args(), env=name, num_seeds=SEEDS, hidden=(32, 32), batch_size=64, hyper=hyper, **changes)


def random_data(name, episodes=1_000):
    """Rows of uniformly random actions."""
    env = envs.make(name)

    def step(carry, key):
        state, act_key = carry, key
        action_key, reset_key = jax.random.split(act_key)
        action = jax.random.uniform(action_key, (1,), minval=-1, maxval=1)
        following, reached = envs.step_and_reset(env, state, action, reset_key)
        return following, Transition(state.obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])

    start = env.reset(jax.random.PRNGKey(0))
    return jax.jit(lambda: jax.lax.scan(step, start, jax.random.split(jax.random.PRNGKey(1), episodes))[1])()


def check(script, name, args, agents, actors_known=True):
    """Values and mean actions of every seed, against those known."""
    obs, values, actions = KNOWN[name]
    setup = script.make_setup(args, None)
    obs = jnp.float32(obs)[:, None]
    for seed in range(SEEDS):
        agent = jax.tree.map(lambda x, seed=seed: x[seed], agents)
        np.testing.assert_allclose(setup.nets.value.apply(agent.value, obs), values, atol=0.12)
        if actions is not None and actors_known:
            np.testing.assert_allclose(script.act(setup.nets, agent.actor, obs)[:, 0], actions, atol=0.2)


def build(script, args, name, offline):
    setup, mesh = script.make_setup(args, offline), mesh_for(SEEDS)
    keys = place(jnp.stack([jax.random.PRNGKey(seed) for seed in range(SEEDS)]), mesh, RUNS)
    hyper = place(jax.tree.map(lambda x: jnp.full(SEEDS, x, jnp.float32), args.hyper), mesh, RUNS)
    shared = (0,) if script is ooo_iql else ()
    initialise = Compiled(partial(script.init_state, setup), mesh, shared=shared)
    state = initialise(*((offline, keys) if script is ooo_iql else (keys,)))
    return setup, mesh, hyper, state


@pytest.mark.parametrize("name", PROBES)
def test_iql_offline(name):
    args, offline = settings(iql, name, online_steps=0, offline_steps=STEPS, actor_decay="none"), random_data(name)
    setup, mesh, hyper, state = build(iql, args, name, offline)
    pretrain = Compiled(partial(iql.pretrain_chunk, setup), mesh, shared=(2,), donate=(0,))
    state, _ = pretrain(state, hyper, place(offline, mesh, EVERYWHERE), length=STEPS)
    check(iql, name, args, state.agent)


@pytest.mark.parametrize("name", PROBES)
def test_iql_online(name):
    args = settings(iql, name, online_steps=8 * STEPS, offline_steps=0, num_envs=8, utd_ratio=0.125)
    setup, mesh, hyper, state = build(iql, args, name, None)
    finetune = Compiled(partial(iql.finetune_chunk, setup), mesh, shared=(2, 3), donate=(0,))
    state, metrics = finetune(state, hyper, None, 0, length=STEPS)
    check(iql, name, args, state.agent)
    assert (np.asarray(metrics["nonfinite_at"]) == -1).all()


@pytest.mark.parametrize("name", PROBES)
def test_ooo_iql_offline_and_online(name):
    """One run through all phases without bonus: the explorer solves the probe online, the exploiter on the explorer's rows alone."""
    args = settings(ooo_iql, name, online_steps=8 * STEPS, num_envs=8, utd_ratio=0.125, intrinsic="none", retrain_steps=STEPS)
    setup, mesh, hyper, state = build(ooo_iql, args, name, None)
    explore = Compiled(partial(ooo_iql.explore_chunk, setup), mesh, shared=(2, 3), donate=(0,))
    retrain = Compiled(partial(ooo_iql.retrain_chunk, setup), mesh, shared=(2, 3), donate=(0,))
    state, _ = explore(state, hyper, None, 0, length=STEPS)
    check(ooo_iql, name, args, state.explorer)
    state, _ = retrain(state, hyper, None, 8 * STEPS, length=STEPS)
    check(ooo_iql, name, args, state.exploiter)


@pytest.mark.parametrize("name", PROBES)
def test_ooo_iql_purely_offline(name):
    offline = random_data(name)
    args = settings(ooo_iql, name, online_steps=0, intrinsic="none", retrain_steps=STEPS, offline_steps=STEPS)
    setup, mesh, hyper, state = build(ooo_iql, args, name, offline)
    offline = place(offline, mesh, EVERYWHERE)
    pretrain = Compiled(partial(ooo_iql.pretrain_chunk, setup), mesh, shared=(2,), donate=(0,))
    retrain = Compiled(partial(ooo_iql.retrain_chunk, setup), mesh, shared=(2, 3), donate=(0,))
    state, _ = pretrain(state, hyper, offline, length=STEPS)
    check(ooo_iql, name, args, state.explorer)
    state, _ = retrain(state, hyper, offline, 0, length=STEPS)
    check(ooo_iql, name, args, state.exploiter)
    assert buffer.size(state.ring) == 0
