"""CQL against plain NumPy in float64 with gradients by central differences; on probes; as SAC-ft's start."""

from functools import partial

import jax
import numpy as np
import pytest
from numerics import adam_first_step, double, ensemble, gradient, mostly_close, squashed
from probing import random_rows
from test_sac import ACT, BATCH, OBS, SETTINGS, make
from training import trained

from ooo_rl.algos import cql, sac
from ooo_rl.data.runs.checkpoint import load_agent
from ooo_rl.data.runs.sweep import grid

SAMPLES = 3
TRACED = {**SETTINGS, "cql_weight": 1.5, "lagrange_gap": 0.3}


def make_cql(script=cql, **flags):
    """`make` with few samples."""
    return make(script, num_samples=SAMPLES, **flags)


def samples(actor, obs, num, key):
    """`num` actions [num, B, A] of a squashed Gaussian at each observation, and their log densities."""
    noise = [np.float64(jax.random.normal(k, (len(obs), ACT))) for k in jax.random.split(key, num)]
    actions, log_prob = zip(*(squashed(actor, obs, n) for n in noise))
    return np.stack(actions), np.stack(log_prob)


def q_values(params, obs, actions):
    """[2, N, B] at `actions` [N, B, A]."""
    return np.stack([ensemble(params, obs, action) for action in actions], axis=1)


def log_sum_exp(x):
    top = x.max(axis=1, keepdims=True)
    return top[:, 0] + np.log(np.exp(x - top).sum(axis=1))


FREE = (-np.inf, np.inf)


class Reference:
    """Target and critic loss of CQL and its children, of one batch.

    `floor` [B] is Cal-QL's, `bonus` [B] and `bounds` are OOO's.
    """

    def __init__(
        self, args, hyper, agent, batch, key, floor=-np.inf, floor_uniform=False, bonus=0.0, bounds=FREE
    ):
        self.args, self.hyper, self.batch, self.floor = args, hyper, batch, np.broadcast_to(floor, BATCH)
        actor, n = agent.actor.params, args.num_samples
        next_key, candidate_key, self.actor_key = jax.random.split(key, 3)
        self.alpha = float(np.exp(agent.alpha.params))
        action, log_prob = samples(actor, batch.next_obs, n if args.max_target_backup else 1, next_key)
        entropy = getattr(hyper, "backup_entropy", 0.0) * self.alpha * log_prob
        next_q = q_values(agent.target_critic, batch.next_obs, action).min(axis=0)
        best = next_q.argmax(axis=0)  # whatever its entropy
        soft = (next_q - entropy)[best, np.arange(BATCH)]
        reward = hyper.reward_scale * batch.reward + hyper.reward_bias
        self.target = np.clip(reward + hyper.discount * batch.discount * soft, *bounds) + bonus
        uniform_key, here_key, next_key = jax.random.split(candidate_key, 3)
        uniform = np.float64(jax.random.uniform(uniform_key, (n, BATCH, ACT), minval=-1.0))
        here, there = samples(actor, batch.obs, n, here_key), samples(actor, batch.next_obs, n, next_key)
        free = np.full(BATCH, -np.inf)
        self.groups = [  # actions, their log density, the floor of their Q-values
            (uniform, np.log(0.25), self.floor if floor_uniform else free),
            (*here, self.floor),
            (*there, self.floor),
        ]
        if not args.importance_sampling:
            self.groups = [(a, 0.0, f) for a, _, f in [*self.groups, (batch.action[None], None, free)]]
        self.alpha_prime = float(np.exp(agent.alpha_prime.params)) if args.lagrange else 1.0

    def difference(self, params):
        """Mean of the clipped soft maximum less Q of the data, for each critic [2]."""
        terms = [np.maximum(q_values(params, self.batch.obs, a), f) - p for a, p, f in self.groups]
        own = ensemble(params, self.batch.obs, self.batch.action)
        clip = getattr(self.hyper, "diff_clip_min", -np.inf), getattr(self.hyper, "diff_clip_max", np.inf)
        return np.clip(log_sum_exp(np.concatenate(terms, axis=1)) - own, *clip).mean(axis=1)

    def bellman(self, params):
        error = ensemble(params, self.batch.obs, self.batch.action) - self.target
        return np.mean((error**2).sum(axis=0))

    def critic_loss(self, params):
        return self.bellman(params) + self.alpha_prime * self.hyper.cql_weight * self.difference(params).sum()

    def actor_loss(self, params, critic):
        noise = np.float64(jax.random.normal(self.actor_key, (BATCH, ACT)))
        action, log_prob = squashed(params, self.batch.obs, noise)
        return np.mean(self.alpha * log_prob - ensemble(critic, self.batch.obs, action).min(axis=0))


def check_moment(learner, slope):
    """Adam's first moment is a tenth of the first gradient: so its size is checked, and not only its sign."""
    same = partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4)
    jax.tree.map(lambda m, g: same(10 * m, g), learner.opt.mu, slope)


def check_update(reference, before, ours, metrics):
    """`ours` and `metrics` came from the agent `before` by the update that `reference` describes."""
    hyper, critic, actor = reference.hyper, before.critic.params, before.actor.params
    difference = reference.difference(critic).mean()
    np.testing.assert_allclose(metrics["critic_loss"], reference.bellman(critic), rtol=1e-4)
    np.testing.assert_allclose(metrics["conservative_loss"], difference, rtol=1e-4, atol=1e-5)
    slope = gradient(reference.critic_loss, critic)
    check_moment(ours.critic, slope)
    stepped = adam_first_step(critic, slope, hyper.critic_lr)
    mostly_close(ours.critic.params, stepped)
    slow = jax.tree.map(lambda new, old: 0.1 * new + 0.9 * old, stepped, before.target_critic)
    mostly_close(ours.target_critic, slow)
    loss = partial(reference.actor_loss, critic=double(ours.critic.params))
    np.testing.assert_allclose(metrics["actor_loss"], loss(actor), rtol=1e-4)
    slope = gradient(loss, actor)
    check_moment(ours.actor, slope)
    mostly_close(ours.actor.params, adam_first_step(actor, slope, hyper.actor_lr))
    moved = ours.alpha_prime.params - before.alpha_prime.params
    if reference.args.lagrange:
        excess = hyper.cql_weight * (difference - hyper.lagrange_gap)
        np.testing.assert_allclose(10 * ours.alpha_prime.opt.mu, -reference.alpha_prime * excess, rtol=1e-3)
        np.testing.assert_allclose(moved, hyper.critic_lr * np.sign(excess), rtol=1e-3)
    else:
        assert moved == 0
    entropy, moved = np.float64(metrics["entropy"]), ours.alpha.params - before.alpha.params
    np.testing.assert_allclose(moved, -1e-2 * np.sign(entropy + 0.5 * ACT), rtol=1e-3)


CASES = {  # flags, traced settings
    "lagrange": ({"lagrange": True}, {}),
    "max-entropy clipped": (
        {"importance_sampling": False, "max_target_backup": True},
        {"diff_clip_min": 2.5, "diff_clip_max": 4.5},
    ),
    "max-backup": ({"max_target_backup": True, "lagrange": True}, {}),
}


@pytest.mark.parametrize(("flags", "clips"), CASES.values(), ids=CASES)
def test_update_of_cql(flags, clips):
    static, agent, batch = make_cql(**flags)
    hyper, key = cql.Hyper(**TRACED, **clips), jax.random.PRNGKey(5)
    ours, metrics = jax.jit(partial(cql.update, static, hyper))(agent, batch, key)
    before = double(agent)
    reference = Reference(static.args, hyper, before, double(batch), key)
    if clips:
        free = Reference(static.args, cql.Hyper(**TRACED), before, double(batch), key)
        clipped = [each.difference(before.critic.params) for each in (free, reference)]
        assert not np.isclose(*clipped).any(), "nothing is clipped"
    check_update(reference, before, ours, metrics)


def test_the_soft_maximum_estimates_the_integral_over_actions():
    """With importance sampling each kind of candidates gives, on average, the integral of exp Q."""
    static, agent, batch = make(cql, num_samples=20_000)
    rows = jax.tree.map(lambda x: x[:2], batch)
    # A policy almost as wide as the actions: a narrow one would leave most of the integral to a few samples.
    layers = agent.actor.params["params"]["MLP_0"]
    last = {**layers["Dense_2"], "bias": np.float32([0.1, -0.2, 0.8, 0.8])}
    last["kernel"] = 0.1 * last["kernel"]
    actor = {"params": {"MLP_0": {**layers, "Dense_2": last}}}
    draw = jax.jit(partial(cql.draw_candidates, static))
    actions, log_density = map(np.float64, draw(actor, rows, jax.random.PRNGKey(0)))
    grid = np.linspace(-1, 1, 202)[:-1] + 1 / 201
    grid = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 1, 2).repeat(2, axis=1)
    for critic in range(2):
        params = jax.tree.map(lambda p, i=critic: p[i : i + 1], double(agent.critic.params))

        def q(at, params=params):
            return ensemble(params, np.broadcast_to(rows.obs, (*at.shape[:2], OBS)), at)[0]

        terms = np.exp(q(actions) - log_density).reshape(3, -1, 2).mean(axis=1)
        exact = np.exp(q(grid)).mean(axis=0) * 4
        np.testing.assert_allclose(terms, np.broadcast_to(exact, (3, 2)), rtol=0.03)


@pytest.mark.slow
def test_pessimism_is_where_the_data_are_not(tmp_path):
    """Data of half the actions: their Q-values stay, the others' sink, the more the larger the weight."""
    rows = np.load(random_rows(tmp_path / "all.npz", "probe-action-reward", 2_000))
    seen = rows["actions"][:, 0] < 0
    np.savez(tmp_path / "half.npz", **{name: rows[name][seen] for name in rows.files})
    args = {"env": "probe-action-reward", "offline_steps": 2_000, "online_steps": 0, "num_seeds": 2}
    args |= {"dataset": str(tmp_path / "half.npz"), "runs_dir": str(tmp_path), "name": "it"}
    run = trained(cql, whole=False, **args, sweep=("cql-weight=0,0.3",))
    at = {"obs": np.zeros((2, 1), np.float32), "action": np.float32([[-0.25], [0.9]])}
    agents, _ = run.ended["offline"]
    q = np.asarray(jax.vmap(partial(run.nets.critic.apply, **at))(agents.critic.params)).min(axis=1)
    np.testing.assert_allclose(q[:, 0], 1 - 0.75**2, atol=0.3)
    free, pessimistic = (q[:, 1] - q[:, 0]).reshape(2, 2)  # the runs of weight 0 come first
    assert (pessimistic < free - 0.5).all()


TINY = {
    "env": "probe-match-obs", "hidden": (8, 8), "critic_hidden": (8, 8), "num_seeds": 2, "batch_size": 16,
    "online_steps": 64, "num_envs": 8, "utd_ratio": 0.125, "eval_episodes": 1, "random_steps": 0,
    "name": "it",
}  # fmt: skip


def test_sac_ft_starts_from_the_agents_of_a_run(tmp_path, capsys):
    """And takes no networks of other sizes."""
    small = TINY | {"runs_dir": str(tmp_path)}
    data = {"dataset": random_rows(tmp_path / "rows.npz", "probe-match-obs", 100)}
    before = trained(cql, whole=False, **small | {"online_steps": 0}, **data, offline_steps=20, num_samples=2)
    saved, _ = before.ended["offline"]
    # Learning rates of 0: what SAC ends with is what it began with.
    start = dict.fromkeys(("actor_lr", "critic_lr", "alpha_lr", "target_rate"), 0)
    start |= {"init_from": str(before.result.folder)}
    agent, _ = trained(sac, whole=False, **small, **start).ended["online"]
    assert "(cql's agent): actor, critic, target_critic, alpha" in capsys.readouterr().out
    parts = lambda a: (a.actor.params, a.critic.params, a.target_critic, a.alpha.params)  # noqa: E731
    same = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(same, parts(agent), parts(saved))
    # Adam goes on.
    for name in ("actor", "critic", "alpha"):
        assert getattr(saved, name).opt.count.tolist() == [20, 20]
        assert getattr(agent, name).opt.count.tolist() == [28, 28]

    smaller = {"params": jax.tree.map(lambda x: x[:, :1], saved.critic.params)}
    like = agent.replace(
        critic=agent.critic.replace(**smaller), actor=jax.tree.map(np.zeros_like, agent.actor)
    )
    taken, said = load_agent(str(before.result.folder), grid(sac.Args(**small))[1], like)
    assert said.endswith(": actor, target_critic, alpha; begins anew: critic (of other shapes)")
    jax.tree.map(np.testing.assert_array_equal, (taken.actor, taken.critic), (saved.actor, like.critic))
