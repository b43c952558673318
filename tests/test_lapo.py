"""LAPO's losses and its whole update, against plain NumPy in float64; its statistics, bounds and policy files."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import adam_first_step, double, ensemble, forward, gradient, mostly_close
from test_awac import Still
from test_losses import ACT, BATCH, EXAMPLE, OBS
from test_sac import random_rows

from ooo_rl.algos import lapo
from ooo_rl.data import policy
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs import settings
from ooo_rl.data.runs.session import Session, Static

HIDDEN, LATENT = (4, 3), 2 * ACT
SETTINGS = {
    "actor_lr": 2e-2, "critic_lr": 3e-2, "vae_lr": 1e-2, "target_rate": 0.1, "reward_scale": 2.0,
    "reward_bias": -1.0, "min_weight": 0.7, "advantage_weight": 0.8, "kl_weight": 0.3, "latent_noise": 0.6,
    "latent_noise_clip": 0.5,
}  # fmt: skip
EXTREMES = np.float32([-1, 1])


def make(script=lapo, env=None, **settings):
    """What the functions of `script` get first, a tiny agent of random numbers, and a batch.

    Targets differ from their networks, no bias is zero, and all networks have the same statistics.
    """
    args = script.Args.exactly({"hidden": HIDDEN} | settings)
    nets = script.make_nets(SimpleNamespace(args=args, env=env, action_size=ACT))
    static, rng = Static(args, env, EXAMPLE, nets), np.random.default_rng(0)
    batch = random_rows(rng, BATCH)
    shapes = jax.eval_shape(partial(script.init_agent, static, batch), jax.random.PRNGKey(0))
    scales = {
        name: {
            "mean": np.float32(0.3 * rng.normal(size=size)),
            "std": np.float32(rng.uniform(0.4, 1.5, size)),
        }
        for name, size in (("obs", OBS), ("action", ACT))
    }

    def network(like):
        params = jax.tree.map(lambda x: np.float32(0.6 * rng.normal(size=x.shape)), like["params"])
        return {"params": params, "statistics": {name: scales[name] for name in like["statistics"]}}

    agent = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    learners = {name: getattr(agent, name) for name in ("actor", "vae", "critic", "value")}
    made = {name: one.replace(params=network(getattr(shapes, name).params)) for name, one in learners.items()}
    targets = {name: network(getattr(shapes, name)) for name in ("target_actor", "target_critic")}
    return static, agent.replace(**made, **targets), batch


def standard(net, name, x):
    return (x - net["statistics"][name]["mean"]) / net["statistics"][name]["std"]


def action_of(actor, obs, noise=0.0, decoder=None):
    x, scale = standard(actor, "obs", obs), actor["statistics"]["action"]
    latent = 2 * np.tanh(forward(actor["params"]["policy"], x)) + noise
    decoder = decoder or actor["params"]["decoder"]
    return scale["mean"] + scale["std"] * forward(decoder, np.concatenate([x, latent], axis=-1))


def q_of(critic, obs, action):
    return ensemble(critic, standard(critic, "obs", obs), standard(critic, "action", action))


def v_of(value, obs):
    return forward(value["params"]["MLP_0"], standard(value, "obs", obs))[:, 0]


def vae_terms(vae, obs, action, noise):
    """Squared error and KL divergence, both [B]."""
    x, a = standard(vae, "obs", obs), standard(vae, "action", action)
    code = forward(vae["params"]["encoder"], np.concatenate([x, a], axis=-1))
    mean, std = code[:, :LATENT], np.exp(code[:, LATENT:] / 2)
    decoded = forward(vae["params"]["decoder"], np.concatenate([x, mean + std * noise], axis=-1))
    # Between normal distributions, dimension by dimension, of which the second is the standard one.
    kl = sum(-np.log(std[:, i]) + (std[:, i] ** 2 + mean[:, i] ** 2) / 2 - 0.5 for i in range(LATENT))
    return ((decoded - a) ** 2).sum(axis=1), kl


def stepped(loss, net, rate):
    """The parameters of `net` after Adam's first step down `loss(net)`; statistics stand still."""
    slope = gradient(lambda own: loss({**net, "params": own}), net["params"])
    return adam_first_step(net["params"], slope, rate)


def slow(new, old):
    return jax.tree.map(lambda new, old: 0.1 * new + 0.9 * old, new, old)


def check_critic_and_value(ours, metrics, agent, batch, target_v):
    """The steps of critics and value, the latter towards `target_v`; returns the critics' parameters."""
    obs, action, reward = batch.obs, batch.action, 2 * batch.reward - 1
    target_q = reward + 0.99 * batch.discount * v_of(agent.value.params, batch.next_obs)
    critic_error = lambda net: ((q_of(net, obs, action) - target_q) ** 2).sum(axis=0).mean()  # noqa: E731
    value_error = lambda net: ((v_of(net, obs) - target_v) ** 2).mean()  # noqa: E731
    np.testing.assert_allclose(metrics["critic_loss"], critic_error(agent.critic.params), rtol=1e-4)
    np.testing.assert_allclose(metrics["value_loss"], value_error(agent.value.params), rtol=1e-4)
    critic = stepped(critic_error, agent.critic.params, 3e-2)
    mostly_close(ours.critic.params["params"], critic)
    mostly_close(ours.value.params["params"], stepped(value_error, agent.value.params, 3e-2))
    return critic


def check_vae_and_policy(ours, metrics, agent, batch, adv, drawn):
    """The steps of CVAE and policy with the new critics, then that of the target policy; no statistics move."""
    obs, action = batch.obs, batch.action

    def vae_error(net):
        error, kl = vae_terms(net, obs, action, drawn)
        return (np.where(adv > 0, 0.8, 0.2) * (error + 0.3 * kl)).mean()

    np.testing.assert_allclose(metrics["vae_loss"], vae_error(agent.vae.params), rtol=1e-4)
    vae = stepped(vae_error, agent.vae.params, 1e-2)
    mostly_close(ours.vae.params["params"], vae)

    decoder, climbed = agent.actor.params["params"]["decoder"], double(ours.critic.params)
    policy_loss = lambda net: -q_of(climbed, obs, action_of(net, obs, decoder=decoder))[0].mean()  # noqa: E731
    np.testing.assert_allclose(metrics["actor_loss"], policy_loss(agent.actor.params), rtol=1e-4)
    own = stepped(policy_loss, agent.actor.params, 2e-2)["policy"]
    mostly_close(ours.actor.params["params"]["policy"], own)

    learnt = {"policy": own, "decoder": vae["decoder"]}
    mostly_close(ours.target_actor["params"], slow(learnt, agent.target_actor["params"]))
    acts_through = ours.actor.params["params"]["decoder"], ours.target_actor["params"]["decoder"]
    jax.tree.map(np.testing.assert_array_equal, *acts_through)
    for name in ("actor", "vae", "critic", "value", "target_actor", "target_critic"):
        before, after = (getattr(one, name) for one in (agent, ours))
        scales = (getattr(net, "params", net)["statistics"] for net in (before, after))
        jax.tree.map(np.testing.assert_array_equal, *scales)


def test_update():
    static, agent, batch = make()
    hyper, key = lapo.Hyper(**SETTINGS, value_min=-0.5, value_max=0.4), jax.random.PRNGKey(5)
    ours, metrics = jax.jit(partial(lapo.update, static, hyper))(agent, batch, EXTREMES, key)
    value_key, vae_key = jax.random.split(key)
    agent, batch = double(agent), double(batch)
    obs, reward = batch.obs, 2 * batch.reward - 1

    def aimed(obs, noise=0.0):
        q = q_of(agent.target_critic, obs, action_of(agent.target_actor, obs, noise))
        return 0.7 * q.min(axis=0) + 0.3 * q.max(axis=0)

    noise = 0.6 * np.float64(jax.random.normal(value_key, (BATCH, LATENT)))
    assert (np.abs(noise) > 0.5).any(), "a bound that bounds nothing"
    free = aimed(obs, np.clip(noise, -0.5, 0.5))
    target_v = np.clip(free, -0.5, 0.4)
    assert 0 < (target_v != free).mean() < 1, "bounds that bound nothing, or all"
    critic = check_critic_and_value(ours, metrics, agent, batch, target_v)

    adv = reward + 0.99 * batch.discount * aimed(batch.next_obs) - v_of(double(ours.value.params), obs)
    assert 0 < (adv > 0).mean() < 1
    np.testing.assert_allclose(metrics["adv"], adv.mean(), rtol=1e-3)
    drawn = np.float64(jax.random.normal(vae_key, (BATCH, LATENT)))
    check_vae_and_policy(ours, metrics, agent, batch, adv, drawn)
    mostly_close(ours.target_critic["params"], slow(critic, agent.target_critic["params"]))


def test_an_agent_begins_with_the_statistics_of_its_data():
    """The decoder of the policy is that of the CVAE; targets equal what they follow."""
    static, rng = make(hidden=(2,), online_steps=0)[0], np.random.default_rng(1)
    rows = random_rows(rng, 1000)
    rows = rows.replace(obs=np.float32(rows.obs * [0.1, 3, 0] + [5, 0, 0.1]))
    state = jax.jit(partial(lapo.init_state, static, rows))(jax.random.PRNGKey(0))
    agent = state.agent
    np.testing.assert_array_equal(state.extremes, [rows.reward.min(), rows.reward.max()])
    jax.tree.map(np.testing.assert_array_equal, agent.target_actor, agent.actor.params)
    jax.tree.map(np.testing.assert_array_equal, agent.target_critic, agent.critic.params)
    decoders = (net.params["params"]["decoder"] for net in (agent.actor, agent.vae))
    jax.tree.map(np.testing.assert_array_equal, *decoders)
    for net in (agent.actor, agent.vae, agent.critic, agent.value):
        for name, scale in net.params["statistics"].items():
            own = np.float64(getattr(rows, name))
            np.testing.assert_allclose(scale["mean"], own.mean(axis=0), atol=1e-5)
            expected = np.where(np.ptp(own, axis=0) == 0, 1, own.std(axis=0))
            np.testing.assert_allclose(scale["std"], expected, rtol=1e-4)


def test_bounds_of_values():
    """Rewards from -1 to 1 become -3 to 1; an episode may end, and the settings narrow the bounds."""

    def bounds(extremes, **more):
        hyper = lapo.Hyper(reward_scale=2.0, reward_bias=-1.0, discount=0.5, **more)
        return lapo.value_bounds(hyper, jnp.array(extremes))

    np.testing.assert_allclose(bounds([-1.0, 1.0]), [-6, 2])
    np.testing.assert_allclose(bounds([1.0, 2.0]), [1, 6], err_msg="after one more step it may be over")
    np.testing.assert_allclose(bounds([-1.0, 1.0], value_min=-4.0, value_max=3.0), [-4, 2])


def test_actions_and_the_saved_policy_that_numpy_runs(tmp_path):
    static, agent, batch = make()
    actor, key = agent.actor.params, jax.random.PRNGKey(3)
    free = action_of(double(actor), np.float64(batch.obs))
    own = np.clip(free, -1, 1)
    assert 0 < (own != free).mean() < 0.7
    np.testing.assert_allclose(lapo.act(static.nets, actor, batch.obs), own, atol=1e-5)
    noise = 0.4 * np.float64(jax.random.normal(key, own.shape))
    noisy = lapo.act(static.nets, actor, batch.obs, key, 0.4)
    np.testing.assert_allclose(noisy, np.clip(free + noise, -1, 1), atol=1e-5)
    policy.save(tmp_path / "policy.npz", lapo.export(static.nets, actor), algo="lapo")
    saved = policy.load(tmp_path / "policy.npz")
    assert policy.policy_sizes(saved) == (OBS, ACT)
    np.testing.assert_allclose(policy.act(saved, batch.obs), own, atol=1e-5)


def test_rewards_seen_online_move_the_bounds():
    """Those beyond the data's do; others, and those of broken worlds, do not."""
    static, agent, rows = make(
        env=Still(), hidden=(2,), num_envs=8, online_steps=32, utd_ratio=1 / 8, batch_size=4
    )
    online = lapo.start_online(static, jax.random.PRNGKey(0))
    state = lapo.State(agent, jnp.array([-9, 0.01]), *online, jax.random.PRNGKey(1))
    chunk = jax.jit(partial(lapo.finetune_chunk, static, length=4))
    after = chunk(state, lapo.Hyper(exploration_noise=0.3), rows, jnp.int32(0))[0]
    reward = np.asarray(after.ring.reward)
    assert reward.max() > 0.01
    np.testing.assert_allclose(after.extremes, [-9, reward.max()], rtol=1e-6)
    reward, broken = jnp.array([2.0, 0, 3, 9]), jnp.array([0.0, 1, 0, 1])
    np.testing.assert_array_equal(lapo.widened(jnp.array([5.0, 6]), reward, broken), [2, 6])


def test_the_largest_reward_of_the_data_is_scaled():
    card, args = {"id": "x", "reward_range": [-2.0, 4.0]}, SimpleNamespace(init_from="")

    def scaled(size, data="some"):
        given = SimpleNamespace(hyper=lapo.Hyper(reward_scale=3.0), card=card, data=data, args=args)
        return Session.scaled_to_max(given, size).reward_scale

    np.testing.assert_allclose([scaled(100), scaled(0), scaled(100, data=None)], [75, 3, 3])
    args.init_from = "runs/x"
    for size in (0, 1):  # without the data's rewards V would be clipped to the first ones of the environment
        with pytest.raises(UsageError, match="bounds of V with --init-from: name the --dataset of that run"):
            scaled(size, data=None)
    card["reward_range"] = [-1.0, 0.0]
    with pytest.raises(UsageError, match="--max-reward 1: the largest reward of x is 0; use 0"):
        scaled(1)


def test_bounds_that_exclude_one_another_are_refused():
    low, high = jnp.array([0.0, 1]), jnp.array([2.0, 2])
    args, hyper = lapo.Args(), lapo.Hyper(value_min=low, value_max=high)
    settings.check_ranges(args, hyper)
    late = lapo.Args(online_change=("value-max=0.5",))
    for given in [(args, hyper.replace(value_max=jnp.array([2.0, 0]))), (late, hyper)]:  # the second run's
        with pytest.raises(UsageError, match="--value-min is above --value-max"):
            settings.check_ranges(*given)
