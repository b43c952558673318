"""CQL against plain NumPy in float64 with gradients by central differences, on the probes, and as what SAC-ft starts from."""

import dataclasses
import sys
from functools import partial

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from numerics import adam_first_step, double, ensemble, gradient, mostly_close, squashed
from probing import PROBES, STEPS, Probing, random_data, settings, value_of_mean_action

from algos import cql, sac
from data import cli
from data.buffer import Transition

OBS, ACT, BATCH, HIDDEN, SAMPLES = 3, 2, 16, (5, 4), 3
SETTINGS = {
    "actor_lr": 2e-2, "critic_lr": 3e-2, "alpha_lr": 1e-2, "target_rate": 0.1, "reward_scale": 2.0, "reward_bias": -1.0,
    "entropy_per_action": -0.5, "backup_entropy": 0.7, "cql_weight": 1.5, "lagrange_gap": 0.3,
}  # fmt: skip


def make(script=cql, **flags):
    """Settings of a tiny agent, its networks, the agent, and a batch."""
    args = dataclasses.replace(script.Args(), num_samples=SAMPLES, **flags)
    nets = script.Nets(script.Actor(HIDDEN, ACT), script.Critic(HIDDEN, 2, False))
    agent = script.init_agent(nets, OBS, 0.3, jax.random.PRNGKey(0))
    # A target that differs from its critics, and biases that are not zero, so that a mix-up shows.
    shift = lambda tree, k: jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.PRNGKey(k), x.shape), tree)  # noqa: E731
    agent = agent.replace(critic=shift(agent.critic, 0), target_critic=shift(agent.critic, 1), actor=shift(agent.actor, 3))
    rng = np.random.default_rng(0)
    batch = Transition(
        *(np.float32(x) for x in (
            rng.normal(size=(BATCH, OBS)), rng.uniform(-1, 1, (BATCH, ACT)), rng.normal(size=BATCH),
            rng.normal(size=(BATCH, OBS)), rng.integers(0, 2, BATCH),
        ))
    )  # fmt: skip
    return args, nets, agent, batch


def samples(actor, obs, num, key):
    """`num` actions [num, B, A] of a squashed Gaussian at each observation, and their log densities, one key each."""
    noise = [np.float64(jax.random.normal(k, (len(obs), ACT))) for k in jax.random.split(key, num)]
    actions, log_prob = zip(*(squashed(actor, obs, n) for n in noise))
    return np.stack(actions), np.stack(log_prob)


def q_values(params, obs, actions):
    """[2, N, B] at `actions` [N, B, A]."""
    return np.stack([ensemble(params, obs, action) for action in actions], axis=1)


def log_sum_exp(x):
    top = x.max(axis=1, keepdims=True)
    return top[:, 0] + np.log(np.exp(x - top).sum(axis=1))


class Reference:
    """Target and critic loss of CQL and its children, of one batch; `floor` [B] is Cal-QL's, `bonus` [B] and `bounds` are OOO's."""

    def __init__(self, args, hyper, agent, batch, key, floor=-np.inf, floor_uniform=False, bonus=0.0, bounds=(-np.inf, np.inf)):
        self.args, self.hyper, self.batch, self.floor = args, hyper, batch, np.broadcast_to(floor, BATCH)
        next_key, candidate_key, self.actor_key = jax.random.split(key, 3)
        self.alpha, n = float(np.exp(agent.log_alpha)), args.num_samples
        action, log_prob = samples(agent.actor, batch.next_obs, n if args.max_target_backup else 1, next_key)
        entropy = getattr(hyper, "backup_entropy", 0.0) * self.alpha * log_prob
        soft = q_values(agent.target_critic, batch.next_obs, action).min(axis=0) - entropy
        target = hyper.reward_scale * batch.reward + hyper.reward_bias + hyper.discount * batch.discount * soft.max(axis=0)
        self.target = np.clip(target, *bounds) + bonus
        uniform_key, here_key, next_key = jax.random.split(candidate_key, 3)
        uniform = np.float64(jax.random.uniform(uniform_key, (n, BATCH, ACT), minval=-1.0))
        here, next_ = samples(agent.actor, batch.obs, n, here_key), samples(agent.actor, batch.next_obs, n, next_key)
        free = np.full(BATCH, -np.inf)
        self.groups = [  # actions, their log density, the floor of their Q-values
            (uniform, np.log(0.25), self.floor if floor_uniform else free), (*here, self.floor), (*next_, self.floor),
        ]  # fmt: skip
        if not args.importance_sampling:
            self.groups = [(a, 0.0, f) for a, _, f in [*self.groups, (batch.action[None], None, free)]]
        self.alpha_prime = float(np.exp(agent.log_alpha_prime)) if args.lagrange else 1.0

    def difference(self, params):
        """Mean of the clipped soft maximum less Q of the data, for each critic [2]."""
        terms = [np.maximum(q_values(params, self.batch.obs, a), f) - p for a, p, f in self.groups]
        diff = log_sum_exp(np.concatenate(terms, axis=1)) - ensemble(params, self.batch.obs, self.batch.action)
        return np.clip(diff, getattr(self.hyper, "diff_clip_min", -np.inf), getattr(self.hyper, "diff_clip_max", np.inf)).mean(axis=1)

    def bellman(self, params):
        return np.mean(((ensemble(params, self.batch.obs, self.batch.action) - self.target) ** 2).sum(axis=0))

    def critic_loss(self, params):
        return self.bellman(params) + self.alpha_prime * self.hyper.cql_weight * self.difference(params).sum()

    def actor_loss(self, params, critic):
        action, log_prob = squashed(params, self.batch.obs, np.float64(jax.random.normal(self.actor_key, (BATCH, ACT))))
        return np.mean(self.alpha * log_prob - ensemble(critic, self.batch.obs, action).min(axis=0))


def check_update(reference, before, ours, metrics):
    """`ours` and `metrics` came from the agent `before` by the update that `reference` describes."""
    hyper = reference.hyper
    np.testing.assert_allclose(metrics["critic_loss"], reference.bellman(before.critic), rtol=1e-4)
    np.testing.assert_allclose(metrics["conservative_loss"], reference.difference(before.critic).mean(), rtol=1e-4, atol=1e-5)
    slope = gradient(reference.critic_loss, before.critic)
    # Adam's first moment is a tenth of the first gradient: so its size is checked, and not only its sign.
    jax.tree.map(lambda m, g: np.testing.assert_allclose(10 * m, g, rtol=2e-3, atol=2e-4), ours.critic_opt.mu, slope)
    critic = adam_first_step(before.critic, slope, hyper.critic_lr)
    mostly_close(ours.critic, critic)
    mostly_close(ours.target_critic, jax.tree.map(lambda new, old: 0.1 * new + 0.9 * old, critic, before.target_critic))
    np.testing.assert_allclose(metrics["actor_loss"], reference.actor_loss(before.actor, double(ours.critic)), rtol=1e-4)
    slope = gradient(lambda p: reference.actor_loss(p, double(ours.critic)), before.actor)
    jax.tree.map(lambda m, g: np.testing.assert_allclose(10 * m, g, rtol=2e-3, atol=2e-4), ours.actor_opt.mu, slope)
    mostly_close(ours.actor, adam_first_step(before.actor, slope, hyper.actor_lr))
    if reference.args.lagrange:
        excess = hyper.cql_weight * (reference.difference(before.critic).mean() - hyper.lagrange_gap)
        np.testing.assert_allclose(10 * ours.alpha_prime_opt.mu, -reference.alpha_prime * excess, rtol=1e-3)
        np.testing.assert_allclose(ours.log_alpha_prime - before.log_alpha_prime, hyper.critic_lr * np.sign(excess), rtol=1e-3)
    else:
        np.testing.assert_array_equal(ours.log_alpha_prime, np.float32(before.log_alpha_prime))
    entropy = np.float64(metrics["entropy"])
    np.testing.assert_allclose(ours.log_alpha - before.log_alpha, -1e-2 * np.sign(entropy + 0.5 * ACT), rtol=1e-3)


VARIANTS = [{"lagrange": True}, {"importance_sampling": False, "max_target_backup": True}, {"max_target_backup": True, "lagrange": True}]
CLIPS = [{}, {"diff_clip_min": 0.9, "diff_clip_max": 1.8}, {}]


@pytest.mark.parametrize(("flags", "clips"), zip(VARIANTS, CLIPS), ids=["lagrange", "max-entropy clipped", "max-backup"])
def test_update_of_cql(flags, clips):
    args, nets, agent, batch = make(**flags)
    hyper, key = cql.Hyper(**SETTINGS, **clips), jax.random.PRNGKey(5)
    ours, metrics = jax.jit(lambda agent: cql.update(args, nets, hyper, agent, batch, key))(agent)
    reference = Reference(args, hyper, double(agent), double(batch), key)
    if clips:
        free = Reference(args, cql.Hyper(**SETTINGS), double(agent), double(batch), key)
        assert not np.allclose(free.difference(double(agent).critic), reference.difference(double(agent).critic)), "nothing is clipped"
    check_update(reference, double(agent), ours, metrics)


def test_the_soft_maximum_estimates_the_integral_over_actions():
    """With importance sampling each kind of candidates gives, on average, the integral of exp Q: three times it, in all."""
    args, nets, agent, batch = make()
    args, rows = dataclasses.replace(args, num_samples=20_000), jax.tree.map(lambda x: x[:2], batch)
    # A policy almost as wide as the action space; that of a narrow one would leave most of the integral to a few samples.
    last = {**agent.actor["params"]["MLP_0"]["Dense_2"], "bias": np.float32([0.1, -0.2, 0.8, 0.8])}
    actor = {"params": {"MLP_0": {**agent.actor["params"]["MLP_0"], "Dense_2": last}}}
    actions, log_density = cql.draw_candidates(args, nets, actor, rows, jax.random.PRNGKey(0))
    grid = np.linspace(-1, 1, 202)[:-1] + 1 / 201
    grid = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 1, 2).repeat(2, axis=1)
    for critic in range(2):
        params = jax.tree.map(lambda p, i=critic: p[i : i + 1], double(agent.critic))
        obs = np.broadcast_to(rows.obs, (*actions.shape[:2], OBS))
        terms = np.exp(ensemble(params, obs, np.float64(actions))[0] - np.float64(log_density)).reshape(3, -1, 2).mean(axis=1)
        exact = np.exp(ensemble(params, np.broadcast_to(rows.obs, (*grid.shape[:2], OBS)), grid)[0]).mean(axis=0) * 4
        np.testing.assert_allclose(terms, np.broadcast_to(exact, (3, 2)), rtol=0.03)


PROBE = {"alpha_lr": 3e-3, "entropy_per_action": -3.0, "cql_weight": 0.01}


@pytest.mark.parametrize("name", PROBES)
def test_cql_offline(name):
    probing = Probing(cql, settings(cql, name, PROBE, online_steps=0, offline_steps=STEPS, num_samples=4), random_data(name))
    probing.run("pretrain", STEPS)
    probing.check(probing.state.agent, value_of_mean_action)


@pytest.mark.parametrize("name", PROBES)
def test_cql_online(name):
    online = {"online_steps": 8 * STEPS, "offline_steps": 0, "num_envs": 8, "utd_ratio": 0.125, "random_steps": 800, "num_samples": 4}
    probing = Probing(cql, settings(cql, name, PROBE, **online))
    probing.run("finetune", STEPS)
    probing.check(probing.state.agent, value_of_mean_action)


def test_pessimism_is_where_the_data_are_not():
    """Data of half the actions: their Q-values stay about right, those of the others sink, the more the larger the weight."""
    rows = random_data("probe-action-reward")
    seen = np.flatnonzero(np.asarray(rows.action[:, 0]) < 0)
    rows, sunk = jax.tree.map(lambda x: x[seen], rows), []
    for weight in (0.0, 0.3):
        flags = settings(cql, "probe-action-reward", {**PROBE, "cql_weight": weight}, online_steps=0, offline_steps=STEPS, num_samples=4)
        probing = Probing(cql, flags, rows)
        probing.run("pretrain", STEPS)
        at = {"obs": np.zeros((2, 1), np.float32), "action": np.float32([[-0.25], [0.9]])}
        q = np.asarray(jax.vmap(partial(probing.setup.nets.critic.apply, **at))(probing.state.agent.critic)).min(axis=1)
        np.testing.assert_allclose(q[:, 0], 1 - 0.75**2, atol=0.3)
        sunk.append(q[:, 1] - q[:, 0])
    assert (sunk[1] < sunk[0] - 0.5).all()


TINY = (
    "--env probe-match-obs --hidden 8 8 --critic-hidden 8 8 --num-seeds 2 --batch-size 16 --online-steps 64 --num-envs 8 --utd-ratio 0.125 "
    "--eval-episodes 1 --eval-every 1000"
)


def run(module, runs_dir, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *TINY.split(), *map(str, flags), "--name", "it", "--runs-dir", str(runs_dir)])
        module.main()
    return runs_dir / module.__name__.split(".")[-1] / "probe-match-obs" / "it"


def agents_of(folder):
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]["agent"]


def test_sac_ft_starts_from_the_agents_of_a_run(tmp_path):
    """And only from networks of the same sizes."""
    rows = random_data("probe-match-obs", 100)
    names = {"observations": rows.obs, "actions": rows.action, "rewards": rows.reward, "terminals": 1 - rows.discount}
    np.savez(tmp_path / "rows.npz", **names)
    folder = run(cql, tmp_path, "--offline-steps", 20, "--num-samples", 2, "--dataset", tmp_path / "rows.npz")
    saved = agents_of(folder)
    # Learning rates of 0: what SAC ends with is what it began with.
    still = ["--actor-lr", 0, "--critic-lr", 0, "--alpha-lr", 0, "--target-rate", 0, "--random-steps", 0, "--pretrained", folder]
    agent = agents_of(run(sac, tmp_path, *still))
    for name in ("actor", "critic", "target_critic", "log_alpha"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), agent[name], saved[name])
    assert saved["critic_opt"]["count"].tolist() == [28, 28] and agent["critic_opt"]["count"].tolist() == [36, 36]  # Adam goes on
    with pytest.raises(cli.UsageError, match="other shapes"):
        run(sac, tmp_path / "other", *still, "--critic-hidden", 8)
