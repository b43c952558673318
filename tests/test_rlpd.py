"""RLPD against plain NumPy in float64 with gradients by central differences, on the probes; its subsets and mixing."""

import dataclasses
import json
import pathlib
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import adam_first_step, double, ensemble, forward, gradient, squashed
from probing import PROBES, STEPS, Probing, random_data, settings, value_of_mean_action

from algos import rlpd
from data import buffer, cli
from data.buffer import Transition

OBS, ACT, BATCH, HIDDEN, CRITICS, SUBSET, BLOCK = 3, 2, 16, (5, 4), 5, 2, 3
SETTINGS = {
    "actor_lr": 2e-2, "critic_lr": 3e-2, "alpha_lr": 1e-2, "target_rate": 0.1, "reward_scale": 2.0, "reward_bias": -1.0,
    "entropy_per_action": -0.5, "backup_entropy": 0.7,
}  # fmt: skip


def make(block=BLOCK, layer_norm=True, critics=CRITICS, subset=SUBSET, script=rlpd):
    """A tiny agent and its networks, `block` batches, and a bonus for each row."""
    nets = script.Nets(script.Actor(HIDDEN, ACT), *(script.Critic(HIDDEN, num, layer_norm) for num in (critics, subset)))
    agent = script.init_agent(nets, OBS, 0.3, jax.random.PRNGKey(0))
    # A target that differs from its critics, and biases that are not zero, so that a mix-up shows.
    shift = lambda tree, k: jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.PRNGKey(k), x.shape), tree)  # noqa: E731
    small = jax.tree.map(lambda x: 0.5 * x, agent.actor)  # so that no action is so near to 1 that NumPy loses its log density
    agent = agent.replace(critic=shift(agent.critic, 0), target_critic=shift(agent.critic, 1), actor=shift(small, 3))
    rng = np.random.default_rng(0)
    rows = (block, BATCH)
    batches = Transition(
        *(np.float32(x) for x in (
            rng.normal(size=(*rows, OBS)), rng.uniform(-1, 1, (*rows, ACT)), rng.normal(size=rows),
            rng.normal(size=(*rows, OBS)), rng.integers(0, 2, rows),
        ))
    )  # fmt: skip
    return nets, agent, batches, np.float32(rng.uniform(0, 3, rows))


def subsets_of(nets, key, num):
    """Which target critics each of `num` critic steps asks: the first ones of a shuffled ensemble."""
    return [np.asarray(jax.random.permutation(k, nets.critic.num))[: nets.target.num] for k in jax.random.split(key, num)]


class Adam:
    """Adam over several steps, in NumPy."""

    def __init__(self, params, rate):
        self.rate, self.steps = rate, 0
        self.first, self.second = (jax.tree.map(np.zeros_like, params) for _ in range(2))

    def step(self, params, grads):
        self.steps += 1
        self.first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, self.first, grads)
        self.second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, self.second, grads)
        scale = lambda m, v: (m / (1 - 0.9**self.steps)) / (np.sqrt(v / (1 - 0.999**self.steps)) + 1e-8)  # noqa: E731
        return jax.tree.map(lambda p, m, v: p - self.rate * scale(m, v), params, self.first, self.second)


def bellman(params, batch, target):
    return np.mean(((ensemble(params, batch.obs, batch.action) - target) ** 2).sum(axis=0))


def block_by_hand(nets, hyper, agent, batches, bonus, key, bounds=(-np.inf, np.inf)):
    """Critics, their targets, Adam's moments, losses and mean target of one block of critic steps, one batch after the other."""
    next_key, subset_key, _ = jax.random.split(key, 3)
    noise = np.float64(jax.random.normal(next_key, (*bonus.shape, ACT)))
    subsets = subsets_of(nets, subset_key, len(bonus))
    critic, slow, alpha = agent.critic, agent.target_critic, float(np.exp(agent.log_alpha))
    adam, losses, targets = Adam(critic, hyper.critic_lr), [], []
    for i, subset in enumerate(subsets):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        next_action, log_prob = squashed(agent.actor, batch.next_obs, noise[i])
        next_q = ensemble(slow, batch.next_obs, next_action)[subset].min(axis=0)
        next_v = next_q - hyper.backup_entropy * alpha * log_prob
        reward = hyper.reward_scale * batch.reward + hyper.reward_bias
        target = np.clip(reward + hyper.discount * batch.discount * next_v, *bounds) + bonus[i]
        losses.append(bellman(critic, batch, target))
        targets.append(target.mean())
        critic = adam.step(critic, gradient(partial(bellman, batch=batch, target=target), critic))
        slow = jax.tree.map(lambda new, old: hyper.target_rate * new + (1 - hyper.target_rate) * old, critic, slow)
    return critic, slow, adam, np.mean(losses), np.mean(targets)


def nearly(ours, theirs, rtol=2e-3, atol=2e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), ours, theirs)


def check_update(nets, hyper, before, batches, bonus, key, ours, metrics, bounds=(-np.inf, np.inf)):
    """`ours` and `metrics` came from the agent `before` by one block of RLPD."""
    before, batches = double(before), double(batches)
    critic, slow, adam, loss, q = block_by_hand(nets, hyper, before, batches, np.float64(bonus), key, bounds)
    nearly(ours.critic, critic, atol=1e-3)  # Adam's steps are of 0.03 each, whatever the size of a gradient: its moments below tell that
    nearly(ours.target_critic, slow, atol=3e-4)
    nearly(ours.critic_opt.mu, adam.first)
    np.testing.assert_allclose([metrics["critic_loss"], metrics["q"]], [loss, q], rtol=1e-3)

    alpha, obs = float(np.exp(before.log_alpha)), batches.obs[-1]
    noise = np.float64(jax.random.normal(jax.random.split(key, 3)[2], (BATCH, ACT)))

    def policy(params, critic=double(ours.critic)):
        action, log_prob = squashed(params, obs, noise)
        return np.mean(alpha * log_prob - ensemble(critic, obs, action).mean(axis=0))

    np.testing.assert_allclose(metrics["actor_loss"], policy(before.actor), rtol=1e-4)
    slope = gradient(policy, before.actor)
    nearly(jax.tree.map(lambda m: 10 * m, ours.actor_opt.mu), slope)  # a tenth of the first gradient
    nearly(ours.actor, adam_first_step(before.actor, slope, hyper.actor_lr), atol=1e-3)
    entropy = -squashed(before.actor, obs, noise)[1].mean()
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-4)
    np.testing.assert_allclose(10 * ours.alpha_opt.mu, entropy + 0.5 * ACT, rtol=1e-3)
    np.testing.assert_allclose(ours.log_alpha - before.log_alpha, -1e-2 * np.sign(entropy + 0.5 * ACT), rtol=1e-3)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_update_of_rlpd(layer_norm):
    """Three critic steps on three batches with three subsets, then one step of policy and alpha on the last batch."""
    nets, agent, batches, bonus = make(layer_norm=layer_norm)
    hyper, key = rlpd.Hyper(**SETTINGS), jax.random.PRNGKey(5)
    ours, metrics = jax.jit(lambda agent: rlpd.update(nets, hyper, agent, batches, bonus, key))(agent)
    subsets = subsets_of(nets, jax.random.split(key, 3)[1], BLOCK)
    assert len({tuple(sorted(subset)) for subset in subsets}) > 1 and all(len(set(subset)) == SUBSET for subset in subsets)
    check_update(nets, hyper, agent, batches, bonus, key, ours, metrics)
    np.testing.assert_allclose(metrics["bonus"], bonus.mean(), rtol=1e-5)


def test_the_target_evaluates_only_its_subset():
    """An ensemble with some critics at infinity: their values do not even reach the target when they are not drawn."""
    nets, agent, batches, bonus = make(block=1)
    key = jax.random.PRNGKey(5)
    (subset,) = subsets_of(nets, jax.random.split(key, 3)[1], 1)
    poisoned = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan).at[subset].set(p[subset]), agent.target_critic)
    step = jax.jit(lambda agent: rlpd.update(nets, rlpd.Hyper(), agent, batches, bonus, key)[1]["q"])
    assert step(agent) == step(agent.replace(target_critic=poisoned))
    assert np.isnan(step(agent.replace(target_critic=jax.tree.map(lambda p: p.at[subset[0]].set(jnp.nan), agent.target_critic))))


def numbered(n, first):
    """`n` rows whose rewards are `first`, `first` + 1 ..."""
    reward = np.arange(first, first + n, dtype=np.float32)
    return Transition(
        np.zeros((n, 1), np.float32), np.zeros((n, 1), np.float32), reward, np.zeros((n, 1), np.float32), np.ones(n, np.float32)
    )


@pytest.mark.parametrize(("ratio", "share"), [(0.5, 0.5), (0.25, 0.25), (-1.0, 20 / 50)])
def test_every_batch_has_its_share_of_offline_rows(ratio, share):
    args = dataclasses.replace(rlpd.Args(), batch_size=200, offline_ratio=ratio)
    batches = rlpd.sample_batches(args, numbered(20, 0), numbered(60, 1000), jnp.int32(30), 50, jax.random.PRNGKey(0))
    from_offline = np.asarray(batches.reward) < 1000
    assert batches.obs.shape == (50, 200, 1) and batches.reward.max() == 1029, "rows of the ring that were never filled"
    np.testing.assert_allclose(from_offline.mean(), share, atol=0.02)
    assert from_offline.sum(axis=1).std() == 0 or ratio < 0


def probe(name, offline=None, **flags):
    """RLPD on a probe: 5 critics, a policy step after every 2 critic steps."""
    hyper = {"alpha_lr": 3e-3, "entropy_per_action": -3.0, "backup_entropy": 0.0, "rnd_lr": 1e-2}
    small = {"ensemble": CRITICS, "target_subset": SUBSET, "policy_every": 2, "dataset": "none", "offline_steps": 0, "num_envs": 8}
    return Probing(rlpd, settings(rlpd, name, hyper, **{**small, **flags}), offline)


@pytest.mark.parametrize("name", PROBES)
def test_online(name):
    probing = probe(name, online_steps=8 * STEPS, utd_ratio=0.25, random_steps=800)
    probing.run("finetune", STEPS)
    probing.check(probing.state.agent, value_of_mean_action)


@pytest.mark.parametrize("name", PROBES)
def test_offline(name):
    probing = probe(name, random_data(name), online_steps=0, offline_steps=2 * STEPS)
    probing.run("pretrain", 2 * STEPS)
    probing.check(probing.state.agent, value_of_mean_action)
    assert buffer.size(probing.state.ring) == 0


def test_offline_data_are_mixed_in_and_the_bonus_reaches_the_critics():
    """RND online with offline rows in every batch: the bonus is there and finite, it falls as states get known, and it lifts Q-values."""
    flags = {"intrinsic": "rnd", "rnd_units": 16, "random_steps": 0, "utd_ratio": 0.25, "online_steps": 8 * STEPS}
    probing = probe("probe-reward-is-obs", random_data("probe-reward-is-obs"), **flags)
    first, second = (jax.device_get(probing.run("finetune", 50)) for _ in range(2))
    assert (first["bonus"] > 0).all() and (second["bonus"] < first["bonus"]).all()
    assert (first["q"] > 1.1).all(), "the rewards of this probe are -1 and 1"


def test_the_bonus_is_that_of_the_whole_block():
    """RND learns once from all rows of a block, and each row gets its own bonus."""
    nets, agent, batches, _ = make()
    bonus = rlpd.RNDBonus(OBS, "paper", 8)
    novelty = bonus.init(jax.random.PRNGKey(0), None)
    setup = rlpd.Setup(rlpd.Args(), None, nets, bonus, OBS)
    hyper, key = rlpd.Hyper(**SETTINGS, intrinsic_coef=3.0), jax.random.PRNGKey(5)
    (ours, after), metrics = jax.jit(partial(rlpd.explore_update, setup, hyper))((agent, novelty), (batches, key))
    assert int(after.opt.count) == 1
    rows = double(batches).obs.reshape(-1, OBS)
    x = np.clip((rows - rows.mean(axis=0)) / rows.std(axis=0), -5, 5)
    errors = ((forward(double(after.predictor)["params"], x) - forward(double(after.target)["params"], x)) ** 2).sum(axis=1)
    check_update(nets, hyper, agent, batches, 3 * (errors / errors.std()).reshape(BLOCK, BATCH), key, ours, metrics)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"target_subset": 11}, "--target-subset 11 is more than the --ensemble of 10"),
        ({"utd_ratio": 1.0, "num_envs": 8}, "--policy-every 20 must divide num_envs . utd_ratio, 8"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, words):
    with pytest.raises(cli.UsageError, match=words):
        rlpd.make_setup(dataclasses.replace(rlpd.Args(), env="point-mass-wall", **flags), None)


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["rlpd.py", *map(str, flags)])
    cli.guarded(rlpd.main)


TINY = (
    "--num-seeds 2 --hidden 8 --critic-hidden 8 --batch-size 16 --ensemble 3 --num-envs 4 --utd-ratio 1 --policy-every 2 "
    "--online-steps 80 --random-steps 16 --eval-episodes 1 --name it"
)


def test_a_run_from_the_command_line(monkeypatch, tmp_path):
    """Offline, then online with RND: the environment's own data are found, and all is written that should be."""
    flags = ["--env", "point-mass-wall", *TINY.split(), "--offline-steps", 40, "--intrinsic", "rnd", "--rnd-variant", "code"]
    run(monkeypatch, *flags, "--runs-dir", tmp_path)
    folder = pathlib.Path(tmp_path) / "rlpd" / "point-mass-wall" / "it"
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert settings["dataset"] == "ooo/point-mass-wall/over-v0" and settings["hyper"]["backup_entropy"] == 0
    result = json.loads((folder / "result.json").read_text())
    assert result["phases"]["online"]["length"] and not result["failed"]
    bonus = [line for line in (folder / "metrics.csv").read_text().splitlines() if ",bonus," in line and line.startswith("online")]
    assert float(bonus[-1].split(",")[-1]) > 0
    before = (folder / "metrics.csv").read_bytes()
    monkeypatch.setattr(sys, "argv", ["rlpd.py", "--resume", str(folder)])
    cli.guarded(rlpd.main)
    assert (folder / "metrics.csv").read_bytes() == before


def test_an_environment_without_data_is_learnt_online(monkeypatch, capsys, tmp_path):
    run(monkeypatch, "--env", "probe-match-obs", *TINY.split(), "--runs-dir", tmp_path)
    assert json.loads((tmp_path / "rlpd" / "probe-match-obs" / "it" / "config.json").read_text())["settings"]["dataset"] == "none"
    with pytest.raises(SystemExit):
        run(monkeypatch, "--env", "probe-match-obs", *TINY.split(), "--offline-steps", 20, "--runs-dir", tmp_path / "refused")
    assert "needs --dataset" in capsys.readouterr().err
