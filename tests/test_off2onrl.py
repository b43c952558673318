"""Off2OnRL against plain NumPy in float64: both updates, the density ratio, the priorities, the saved policy."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import adam_first_step, double, ensemble, forward, gradient, mostly_close, squashed
from probing import random_rows as probe_rows
from test_awac import Still
from test_cql import check_moment, log_sum_exp, q_values, samples
from test_run import rows_of
from test_sac import ACT, BATCH, OBS, SETTINGS, make, noise_of, random_rows
from training import trained

from ooo_rl.algos import off2onrl
from ooo_rl.data import policy, priorities

N, SAMPLES = 2, 3
HYPER = off2onrl.Hyper(**SETTINGS, cql_weight=1.5, ratio_lr=1e-2)


def make_ensemble(**flags):
    """`make` with members that differ in everything, alpha included, and a network for the ratio."""
    given = {"num_members": N, "num_samples": SAMPLES, "replay": "uniform"} | flags
    static, agent, batch = make(off2onrl, **given)
    rng = np.random.default_rng(1)
    ratio = jax.tree.map(lambda x: np.float32(0.7 * rng.normal(size=x.shape)), agent.ratio.params)
    alphas = np.log(np.float32([0.2, 0.5, 0.3][: static.args.num_members]))
    learners = {"alphas": agent.alphas.replace(params=alphas), "ratio": agent.ratio.replace(params=ratio)}
    return static, agent.replace(**learners), batch


def member(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


@pytest.mark.parametrize("max_target_backup", [False, True])
def test_pretraining_is_cql_for_each_member_alone(max_target_backup):
    static, agent, _ = make_ensemble(max_target_backup=max_target_backup)
    rng, key = np.random.default_rng(2), jax.random.PRNGKey(5)
    batches = [random_rows(rng, BATCH) for _ in range(N)]
    together = jax.tree.map(lambda *x: np.stack(x), *batches)
    ours, metrics = jax.jit(partial(off2onrl.pretrain_update, static, HYPER))(agent, together, key)
    critic_keys, actor_keys = jax.random.split(key, (2, N))
    differences, losses = [], []
    for i, batch in enumerate(map(double, batches)):
        actor, critic, target_critic = (
            double(member(part, i)) for part in (agent.actor.params, agent.critic.params, agent.target_critic)
        )
        keys = jax.random.split(critic_keys[i], 4)
        next_action, _ = samples(actor, batch.next_obs, SAMPLES if max_target_backup else 1, keys[0])
        next_v = q_values(target_critic, batch.next_obs, next_action).min(axis=0).max(axis=0)
        target = 2 * batch.reward - 1 + 0.99 * batch.discount * next_v
        uniform = np.float64(jax.random.uniform(keys[1], (SAMPLES, BATCH, ACT), minval=-1.0))
        groups = [(uniform, np.log(0.25))]
        groups += [
            samples(actor, obs, SAMPLES, k) for obs, k in ((batch.obs, keys[2]), (batch.next_obs, keys[3]))
        ]

        def difference(params, groups=groups, batch=batch):
            terms = np.concatenate([q_values(params, batch.obs, a) - p for a, p in groups], axis=1)
            return (log_sum_exp(terms) - ensemble(params, batch.obs, batch.action)).mean(axis=1)

        def loss(params, target=target, batch=batch, difference=difference):
            error = ensemble(params, batch.obs, batch.action) - target
            return np.mean((error**2).sum(axis=0)) + 1.5 * difference(params).sum()

        differences.append(difference(critic))
        slope = gradient(loss, critic)
        moment = SimpleNamespace(opt=SimpleNamespace(mu=member(ours.critic.opt.mu, i)))
        check_moment(moment, slope)
        mostly_close(member(ours.critic.params, i), adam_first_step(critic, slope, 3e-2))
        slow = jax.tree.map(
            lambda new, old: 0.1 * new + 0.9 * old, double(member(ours.critic.params, i)), target_critic
        )
        mostly_close(member(ours.target_critic, i), slow)

        def climb(params, i=i, batch=batch, critic=double(member(ours.critic.params, i))):
            action, log_prob = squashed(params, batch.obs, noise_of(actor_keys[i]))
            alpha = np.exp(np.float64(agent.alphas.params[i]))
            return np.mean(alpha * log_prob - ensemble(critic, batch.obs, action).min(axis=0))

        losses.append(climb(actor))
        mostly_close(member(ours.actor.params, i), adam_first_step(actor, gradient(climb, actor), 2e-2))
        entropy = -squashed(actor, batch.obs, noise_of(actor_keys[i]))[1].mean()
        moved = ours.alphas.params[i] - agent.alphas.params[i]
        np.testing.assert_allclose(moved, -1e-2 * np.sign(entropy + 0.5 * ACT), rtol=1e-3)
    np.testing.assert_allclose(metrics["conservative_loss"], np.mean(differences), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["actor_loss"], np.mean(losses), rtol=1e-4)


def drawn(actor, obs, key):
    """Actions and log densities of the Gaussian with the moments of the mixture, squashed."""
    heads = [np.split(forward(member(actor, i)["params"]["MLP_0"], obs), 2, axis=-1) for i in range(N)]
    means, stds = (
        np.stack([m for m, _ in heads]),
        np.exp(np.clip(np.stack([s for _, s in heads]) - 1, -20, 2)),
    )
    mean = means.mean(axis=0)
    std = np.sqrt((stds**2 + means**2).mean(axis=0) - mean**2)
    noise = noise_of(key)
    u = mean + std * noise
    density = -0.5 * noise**2 - np.log(std) - 0.5 * np.log(2 * np.pi) - np.log1p(-(np.tanh(u) ** 2))
    return np.tanh(u), density.sum(axis=-1)


def all_q(critic, obs, action):
    """Q-values [N, 2, B]."""
    return np.stack([ensemble(member(critic, i), obs, action) for i in range(N)])


@pytest.mark.parametrize("target", ["own", "mean"])
def test_online_update(target):
    static, agent, batch = make_ensemble(target=target)
    key = jax.random.PRNGKey(5)
    ours, metrics = jax.jit(partial(off2onrl.update, static, HYPER))(agent, batch, key)
    next_key, actor_key = jax.random.split(key)
    before, batch = double(agent), double(batch)
    actor, critic, alpha = before.actor.params, before.critic.params, 0.3

    next_action, next_log_prob = drawn(actor, batch.next_obs, next_key)
    least = all_q(before.target_critic, batch.next_obs, next_action).min(axis=1)
    soft = (least if target == "own" else least.mean(axis=0)) - 0.7 * alpha * next_log_prob
    y = 2 * batch.reward - 1 + 0.99 * batch.discount * soft

    def bellman(params):
        q = all_q(params, batch.obs, batch.action)
        error = q - y[:, None] if target == "own" else q.mean(axis=0) - y
        return (error**2).sum() / BATCH

    np.testing.assert_allclose(metrics["critic_loss"], bellman(critic), rtol=1e-4)
    slope = gradient(bellman, critic)
    check_moment(ours.critic, slope)
    mostly_close(ours.critic.params, adam_first_step(critic, slope, 3e-2))

    def climb(params, critic=double(ours.critic.params)):
        action, log_prob = drawn(params, batch.obs, actor_key)
        return np.mean(alpha * log_prob - all_q(critic, batch.obs, action).min(axis=1).mean(axis=0))

    np.testing.assert_allclose(metrics["actor_loss"], climb(actor), rtol=1e-4)
    slope = gradient(climb, actor)
    check_moment(ours.actor, slope)
    mostly_close(ours.actor.params, adam_first_step(actor, slope, 2e-2))
    entropy = -drawn(actor, batch.obs, actor_key)[1].mean()
    moved = ours.alpha.params - agent.alpha.params
    np.testing.assert_allclose(moved, -1e-2 * np.sign(entropy + 0.5 * ACT), rtol=1e-3)


def test_fitted_q_evaluation_takes_no_minimum():
    """Each of the four critics regresses on its own target."""
    static, agent, batch = make_ensemble()
    key = jax.random.PRNGKey(5)
    ours, _ = jax.jit(partial(off2onrl.evaluate_update, static, HYPER))(agent, batch, key)
    before, batch = double(agent), double(batch)
    action, _ = drawn(before.actor.params, batch.next_obs, key)
    y = 2 * batch.reward - 1 + 0.99 * batch.discount * all_q(before.target_critic, batch.next_obs, action)
    loss = lambda params: ((all_q(params, batch.obs, batch.action) - y) ** 2).sum() / BATCH  # noqa: E731
    check_moment(ours.critic, gradient(loss, before.critic.params))
    jax.tree.map(np.testing.assert_array_equal, ours.actor, agent.actor)


def test_the_mixture_of_equal_narrow_members_is_no_nan():
    """Its variance as a difference of squares would be negative after rounding."""
    static, agent, batch = make_ensemble(num_members=3)
    alike = jax.tree.map(lambda x: np.stack([x[0]] * 3), agent.actor.params)
    last = alike["params"]["MLP_0"]["Dense_2"]
    last["bias"] += np.float32([7, -7, -30, -30])  # means far from 0, the smallest deviations that there are
    mean, log_std = off2onrl.ensemble_policy(static.nets, alike, batch.obs)
    own = static.nets.actor.apply(member(alike, 0), batch.obs)
    np.testing.assert_allclose(mean, own[0], rtol=1e-5)
    assert np.isfinite(log_std).all() and (log_std < -10).all()


# --- balanced replay ---


def test_ratio_loss_is_the_papers():
    static, agent, old = make_ensemble()
    new, params = random_rows(np.random.default_rng(9), BATCH), double(agent.ratio.params)
    w = [
        np.exp(forward(params["params"]["MLP_0"], np.concatenate([rows.obs, rows.action], axis=1))[:, 0])
        for rows in map(double, (old, new))
    ]
    expected = -np.log(2 / (w[0] + 1)).mean() - np.log(2 * w[1] / (w[1] + 1)).mean()
    np.testing.assert_allclose(
        off2onrl.ratio_loss(agent.ratio.params, static.nets, old, new), expected, rtol=1e-5
    )


def test_the_ratio_of_two_gaussians():
    """N(1/2, 1) over N(-1/2, 1) is exp(x), whatever the action."""
    static, _, _ = make_ensemble(hidden=(32, 32))
    row = jax.tree.map(lambda x: x[0], random_rows(np.random.default_rng(0), 1, 1))
    ratio = off2onrl.Learner.create(static.nets.ratio.init(jax.random.PRNGKey(1), row.obs, row.action))

    def step(ratio, key):
        obs_key, action_key = jax.random.split(key)
        obs, action = jax.random.normal(obs_key, (2, 256, 1)), jax.random.uniform(action_key, (2, 256, ACT))
        old, new = (SimpleNamespace(obs=obs[i] + i - 0.5, action=action[i]) for i in (0, 1))
        _, ratio = ratio.descend(off2onrl.ratio_loss, 1e-3, static.nets, old, new)
        return ratio, None

    train = jax.jit(lambda ratio, keys: jax.lax.scan(step, ratio, keys)[0])
    ratio = train(ratio, jax.random.split(jax.random.PRNGKey(2), 2_000))
    x = np.linspace(-1.5, 1.5, 61, dtype=np.float32)[:, None]
    found = static.nets.ratio.apply(ratio.params, x, np.full((61, ACT), 0.5, np.float32))
    assert np.abs(found - x[:, 0]).max() < 0.35 and np.abs(found - x[:, 0]).mean() < 0.12


def test_priorities_are_the_normalised_power_of_the_ratio():
    """Clipped, and those of drawn rows alone change."""
    static, agent, batch = make_ensemble()
    hyper = HYPER.replace(ratio_lr=0.0, ratio_temperature=0.05)
    rng = np.random.default_rng(3)
    old, new = random_rows(rng, BATCH), random_rows(rng, BATCH)
    tree, index = priorities.create(jnp.full(40, 2.0)), np.arange(BATCH) + 7
    rebalance = jax.jit(partial(off2onrl.rebalance, static, hyper))
    _, tree, largest, _ = rebalance(agent, tree, index, batch, old, new)
    params = double(agent.ratio.params)["params"]["MLP_0"]
    power = [
        np.exp(forward(params, np.concatenate([rows.obs, rows.action], axis=1))[:, 0] / 0.05)
        for rows in map(double, (batch, old))
    ]
    expected = np.full(40, 2.0)
    expected[index] = np.clip(power[0] / power[1].mean(), 1e-3, 1e3)
    assert (expected == 1e-3).any() or (expected == 1e3).any(), "nothing is clipped"
    np.testing.assert_allclose(np.ravel(tree.levels[0])[:40], expected, rtol=1e-3)
    np.testing.assert_allclose(largest, expected[index].max(), rtol=1e-3)


def first_shares(replay, fraction):
    """Shares of offline rows in the first batches, with 64 online rows beside 30 offline ones."""
    flags = {"replay": replay, "num_envs": 4, "learning_starts": 60, "online_steps": 80, "batch_size": 4_000}
    static, agent, _ = make_ensemble(**flags)
    rows = jax.tree.map(jnp.asarray, random_rows(np.random.default_rng(0), 80))
    offline, hyper = jax.tree.map(lambda x: x[:30], rows), HYPER.replace(online_fraction=fraction)
    tree = priorities.create(jnp.float32(jnp.arange(30 + 80) < 30)) if replay == "balanced" else None
    state = off2onrl.State(agent, tree, jnp.float32(1), None, rows, jax.random.PRNGKey(0))
    state = off2onrl.begin_online(static, state, hyper, offline)
    if tree is not None:
        state = state.replace(priorities=priorities.update(tree, 30 + jnp.arange(64), state.newest))
    learn = jax.jit(partial(off2onrl.learn, static, hyper, offline, rows, 64))
    return float(learn(state, jax.random.PRNGKey(1))[1]["offline_share"])


@pytest.mark.parametrize(
    ("replay", "fraction", "share"),
    [("balanced", 0.75, 0.25), ("uniform", 0.5, 30 / 94), ("online", 0.5, 0.0)],
)
def test_share_of_offline_rows_at_the_beginning(replay, fraction, share):
    np.testing.assert_allclose(first_shares(replay, fraction), share, atol=0.03)


def test_new_rows_in_a_ring_that_wraps_around():
    """Three blocks of four rows go into a ring of two, behind five offline rows, each with its own priority."""
    flags = {"replay": "balanced", "num_envs": 4, "online_steps": 12, "buffer_size": 8}
    static, _, _ = make_ensemble(env=Still(), **flags)
    offline = jax.tree.map(jnp.asarray, random_rows(np.random.default_rng(0), 5))
    state = jax.jit(partial(off2onrl.init_state, static))(offline, jax.random.PRNGKey(0))
    chunk = jax.jit(partial(off2onrl.finetune_chunk, static, length=1, learns=False))
    for step in range(3):
        state, _ = chunk(state.replace(newest=jnp.float32(step + 2)), HYPER, offline, jnp.int32(4 * step))
    expected = [1] * 5 + [4] * 4 + [3] * 4
    np.testing.assert_array_equal(np.ravel(state.priorities.levels[0])[:13], expected)


def test_auroc_of_known_values(monkeypatch):
    """Q is minus the distance of the action from 1: 0.9 is better than 19 of 20 random actions."""
    monkeypatch.setattr(off2onrl, "ensemble_q", lambda nets, critic, obs, action: -jnp.abs(1 - action[:, 0]))
    rows = SimpleNamespace(obs=np.zeros((2_000, 1)), action=np.full((2_000, 1), 0.9))
    np.testing.assert_allclose(off2onrl.auroc(None, None, rows, jax.random.PRNGKey(0)), 0.95, atol=0.02)


def test_saved_policy_is_the_mean_of_the_ensembles(tmp_path):
    static, agent, batch = make_ensemble(num_members=3)
    policy.save(tmp_path / "policy.npz", off2onrl.export(agent.actor.params), algo="off2onrl")
    ours = policy.act(policy.load(tmp_path / "policy.npz"), batch.obs)
    np.testing.assert_allclose(ours, off2onrl.act(static.nets, agent.actor.params, batch.obs), atol=1e-5)
    assert policy.policy_sizes(policy.load(tmp_path / "policy.npz")) == (OBS, ACT)


def test_a_run_with_fitted_q_evaluation(tmp_path):
    """A single member; critics begin anew after CQL, and all three phases log."""
    run = trained(
        off2onrl, whole=False, env="probe-match-obs", num_seeds=1, hidden=(8,), critic_hidden=(8,), num_members=1,
        dataset=probe_rows(tmp_path / "rows.npz", "probe-match-obs", 100), offline_steps=8, fqe_steps=8,
        init_q="fqe", online_steps=32, num_envs=8, utd_ratio=0.125, learning_starts=8, batch_size=16,
        num_samples=2, eval_every=8, runs_dir=str(tmp_path), name="it",
    )  # fmt: skip
    counts = {phase: agent.critic.opt.count.item() for phase, (agent, _) in run.ended.items()}
    assert counts == {"offline": 8, "fqe": 8, "online": 3}
    logged = {(row["phase"], row["metric"]) for row in rows_of(run.result.folder)}
    assert {
        ("offline", "auroc"),
        ("fqe", "auroc"),
        ("online", "offline_share"),
        ("online", "ratio_loss"),
    } <= logged
