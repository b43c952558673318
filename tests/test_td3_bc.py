"""TD3+BC's losses and its whole update, against plain NumPy in float64; and where the dataset's statistics go."""

from functools import partial
from itertools import pairwise

import jax
import numpy as np
from numerics import adam_first_step, double, ensemble, forward, gradient, mostly_close
from probing import random_rows as rows_of_probes
from test_sac import ACT, BATCH, OBS, random_rows, static_of
from training import trained

from ooo_rl.algos import td3_bc
from ooo_rl.data import policy

SETTINGS = {
    "actor_lr": 2e-2, "critic_lr": 3e-2, "target_rate": 0.1, "reward_scale": 2.0, "reward_bias": -1.0,
    "target_noise": 0.6, "target_noise_clip": 0.5, "alpha": 1.7,
}  # fmt: skip


def make():
    """What the functions of td3_bc.py get first, a tiny agent of random numbers, and a batch.

    Targets differ from their networks, no bias is zero, and all four networks have the same statistics.
    """
    static, rng = static_of(td3_bc), np.random.default_rng(0)
    batch = random_rows(rng, BATCH)
    shapes = jax.eval_shape(partial(td3_bc.init_agent, static, batch), jax.random.PRNGKey(0))
    scale = {"mean": np.float32(rng.normal(size=OBS)), "std": np.float32(rng.uniform(0.3, 2, OBS))}

    def network(like):
        params = jax.tree.map(lambda x: np.float32(0.5 * rng.normal(size=x.shape)), like["params"])
        return {"params": params, "statistics": {"Standardise_0": scale}}

    agent = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    agent = agent.replace(
        actor=agent.actor.replace(params=network(shapes.actor.params)),
        critic=agent.critic.replace(params=network(shapes.critic.params)),
        target_actor=network(shapes.target_actor),
        target_critic=network(shapes.target_critic),
    )
    return static, batch, scale, agent


def update(static, **changes):
    return jax.jit(partial(td3_bc.update, static, td3_bc.Hyper(**SETTINGS | changes)))


def action_of(actor, obs):
    """The policy's actions, for standardised observations."""
    return np.tanh(forward(actor["params"]["MLP_0"], obs))


def slow(new, old):
    return jax.tree.map(lambda new, old: 0.1 * new + 0.9 * old, new, old)


def check_step(ours, loss, params, rate):
    """Adam's first step down `loss`, of the parameters alone."""
    slope = gradient(lambda own: loss({"params": own}), params["params"])
    mostly_close(ours["params"], adam_first_step(params["params"], slope, rate))


def policy_loss(critic, obs, action, start):
    """The loss whose gradient the code takes: lambda is that of the parameters at the start."""
    weight = 1.7 / np.abs(ensemble(critic, obs, action_of(start, obs))[0]).mean()

    def loss(params):
        own = action_of(params, obs)
        return -weight * ensemble(critic, obs, own)[0].mean() + ((own - action) ** 2).mean()

    return loss


def test_update():
    static, batch, scale, agent = make()
    key = jax.random.PRNGKey(5)
    ours, metrics = update(static, policy_every=1.0)(agent, batch, key)
    agent, batch, scale = double(agent), double(batch), double(scale)
    obs, next_obs = ((x - scale["mean"]) / scale["std"] for x in (batch.obs, batch.next_obs))

    noise = 0.6 * np.float64(jax.random.normal(key, (BATCH, ACT)))
    free = action_of(agent.target_actor, next_obs) + np.clip(noise, -0.5, 0.5)
    assert (np.abs(noise) > 0.5).any() and (np.abs(free) > 1).any(), "bounds that bound nothing"
    next_q = ensemble(agent.target_critic, next_obs, np.clip(free, -1, 1)).min(axis=0)
    target = 2 * batch.reward - 1 + 0.99 * batch.discount * next_q

    def bellman(params):
        return np.mean(((ensemble(params, obs, batch.action) - target) ** 2).sum(axis=0))

    np.testing.assert_allclose(metrics["critic_loss"], bellman(agent.critic.params), rtol=1e-4)
    np.testing.assert_allclose(metrics["q"], target.mean(), rtol=1e-4)
    check_step(ours.critic.params, bellman, agent.critic.params, 3e-2)

    critic, start = double(ours.critic.params), agent.actor.params
    loss = policy_loss(critic, obs, batch.action, start)
    np.testing.assert_allclose(metrics["actor_loss"], loss(start), rtol=1e-4)
    check_step(ours.actor.params, loss, start, 2e-2)
    distance = ((action_of(start, obs) - batch.action) ** 2).mean()
    np.testing.assert_allclose(metrics["cloning_loss"], distance, rtol=1e-4)
    mostly_close(ours.target_critic["params"], slow(critic["params"], agent.target_critic["params"]))
    actor = double(ours.actor.params)
    mostly_close(ours.target_actor["params"], slow(actor["params"], agent.target_actor["params"]))


def test_only_the_critics_move_until_it_is_the_policys_turn_and_statistics_never_do():
    static, batch, scale, agent = make()
    step, seen = update(static, policy_every=3.0), [agent]
    for key in jax.random.split(jax.random.PRNGKey(1), 4):
        seen.append(step(seen[-1], batch, key)[0])

    def same(part):
        """Whether each update left `part(agent)` as it was."""
        pairs = [[jax.tree.leaves(part(agent)) for agent in pair] for pair in pairwise(seen)]
        return [all(bool((x == y).all()) for x, y in zip(*pair)) for pair in pairs]

    slow_parts = same(lambda agent: (agent.actor, agent.target_actor, agent.target_critic))
    assert slow_parts == [True, True, False, True]
    assert not any(same(lambda agent: agent.critic.params))
    last = seen[-1]
    for network in (last.actor.params, last.critic.params, last.target_actor, last.target_critic):
        jax.tree.map(np.testing.assert_array_equal, network["statistics"]["Standardise_0"], scale)


def test_without_weight_on_q_it_is_behaviour_cloning():
    static, batch, _, agent = make()
    moved, loss = update(static, policy_every=1.0, alpha=0.0), []
    for _ in range(30):
        agent, metrics = moved(agent, batch, jax.random.PRNGKey(0))
        loss.append(metrics)
    for metrics in loss:
        np.testing.assert_allclose(metrics["actor_loss"], metrics["cloning_loss"], rtol=1e-5)
    assert loss[-1]["cloning_loss"] < 0.7 * loss[0]["cloning_loss"]


def test_statistics_are_those_of_the_rows():
    """What never varies is shifted alone, even where its mean rounds."""
    rng = np.random.default_rng(1)
    obs = np.float32(rng.normal(3, (0.01, 2, 0), (5000, OBS)))
    obs[:, 2] = 0.1
    rows = random_rows(rng, 5000).replace(obs=obs)
    scale = jax.jit(td3_bc.statistics)(rows)["Standardise_0"]
    np.testing.assert_allclose(scale["mean"], obs.mean(axis=0, dtype=np.float64), rtol=1e-5)
    expected = [*(obs[:, :2].std(axis=0, dtype=np.float64) + 1e-3), 1]
    np.testing.assert_allclose(scale["std"], expected, rtol=1e-4)


def test_actions_and_the_saved_policy_that_numpy_runs_on_raw_observations(tmp_path):
    static, batch, scale, agent = make()
    actor, key = agent.actor.params, jax.random.PRNGKey(3)
    own = action_of(double(actor), (np.float64(batch.obs) - scale["mean"]) / scale["std"])
    np.testing.assert_allclose(td3_bc.act(static.nets, actor, batch.obs), own, atol=1e-5)
    noise = np.clip(0.8 * np.float64(jax.random.normal(key, own.shape)), -0.7, 0.7)
    noisy = td3_bc.act(static.nets, actor, batch.obs, key, 0.8, 0.7)
    np.testing.assert_allclose(noisy, np.clip(own + noise, -1, 1), atol=1e-5)
    policy.save(tmp_path / "policy.npz", td3_bc.export(actor), algo="td3_bc")
    saved = policy.load(tmp_path / "policy.npz")
    np.testing.assert_allclose(policy.act(saved, batch.obs), own, atol=1e-5)


def test_statistics_go_into_another_run_that_has_no_data(tmp_path):
    """And stay out where --no-normalize-obs says so."""
    path = rows_of_probes(tmp_path / "rows.npz", n=400)
    tiny = {
        "env": "probe-all", "num_seeds": 1, "hidden": (8,), "critic_hidden": (8,), "batch_size": 8,
        "num_envs": 4, "utd_ratio": 0.25, "runs_dir": str(tmp_path),
    }  # fmt: skip
    data = tiny | {"dataset": path, "offline_steps": 4, "online_steps": 0}
    first = trained(td3_bc, whole=False, **data, name="first")
    plain = trained(td3_bc, whole=False, **data, name="plain", normalize_obs=False)
    start = {"init_from": str(first.result.folder), "offline_steps": 0, "dataset": "none"}
    second = trained(td3_bc, whole=False, **tiny | start, online_steps=8, name="second")
    obs = np.load(path)["observations"]
    for run, phase, mean in ((first, "offline", obs.mean(axis=0)), (second, "online", obs.mean(axis=0)),
                             (plain, "offline", np.zeros(obs.shape[1]))):  # fmt: skip
        agent, actor = run.ended[phase]
        for network in (actor, agent.critic.params, agent.target_actor, agent.target_critic):
            found = network["statistics"]["Standardise_0"]["mean"][0]
            np.testing.assert_allclose(found, mean, atol=1e-5)
