"""RLPD against plain NumPy in float64, gradients by central differences; on probes; how it samples."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import adam_first_step, double, ensemble, forward, gradient, squashed
from probing import random_rows
from test_run import rows_of
from training import trained

from ooo_rl import envs
from ooo_rl.algos import ooo_rlpd, rlpd
from ooo_rl.data.buffer import Transition
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs.session import Static
from ooo_rl.data.runs.settings import parse

OBS, ACT, BATCH, HIDDEN, CRITICS, SUBSET, BLOCK = 3, 2, 16, (5, 4), 5, 2, 3
SETTINGS = {
    "actor_lr": 2e-2, "critic_lr": 3e-2, "alpha_lr": 1e-2, "target_rate": 0.1, "reward_scale": 2.0,
    "reward_bias": -1.0, "entropy_per_action": -0.5, "backup_entropy": 0.7,
}  # fmt: skip


def static_of(script, env=None, **settings):
    """What the functions of `script` get first; without an environment, sizes are OBS and ACT."""
    args, env = script.Args.exactly(settings), env and envs.make(env)
    sizes = (env.observation_size, env.action_size) if env else (OBS, ACT)
    nets = script.make_nets(SimpleNamespace(args=args, env=env, action_size=sizes[1]))
    obs, action, scalar = *map(jnp.zeros, sizes), jnp.float32(0)
    return Static(args, env, Transition(obs, action, scalar, obs, scalar), nets)


def make(block=BLOCK, layer_norm=True, critics=CRITICS, subset=SUBSET, script=rlpd):
    """Networks with a tiny agent, `block` batches, and a bonus for each row; RND is there, too.

    The agent is of random numbers, for which nothing compiles. Its targets differ from its critics, and no
    bias is zero, so that a mix-up shows.
    """
    settings = {"hidden": HIDDEN, "critic_hidden": HIDDEN, "ensemble": critics, "target_subset": subset}
    settings |= {"layer_norm": layer_norm, "intrinsic": "rnd", "rnd_units": 8}
    static, rng = static_of(script, **settings), np.random.default_rng(0)
    shapes = jax.eval_shape(partial(script.init_agent, static), jax.random.PRNGKey(0))
    fill = lambda tree, scale: jax.tree.map(lambda x: np.float32(scale * rng.normal(size=x.shape)), tree)  # noqa: E731
    agent = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    # A small policy, so that no action is so near to 1 that NumPy loses its log density.
    actor, critic = fill(shapes.actor.params, 0.4), fill(shapes.critic.params, 0.6)
    agent = agent.replace(
        actor=agent.actor.replace(params=actor),
        critic=agent.critic.replace(params=critic),
        target_critic=fill(shapes.target_critic, 0.6),
        alpha=agent.alpha.replace(params=np.log(np.float32(0.3))),
    )
    rows = (block, BATCH)
    batches = Transition(
        *(np.float32(x) for x in (
            rng.normal(size=(*rows, OBS)), rng.uniform(-1, 1, (*rows, ACT)), rng.normal(size=rows),
            rng.normal(size=(*rows, OBS)), rng.integers(0, 2, rows),
        ))
    )  # fmt: skip
    return static, agent, batches, np.float32(rng.uniform(0, 3, rows))


def subsets_of(nets, key, num):
    """Which target critics each of `num` critic steps asks: the first ones of a shuffled ensemble."""
    shuffled = (jax.random.permutation(k, nets.critic.num) for k in jax.random.split(key, num))
    return [np.asarray(critics)[: nets.target.num] for critics in shuffled]


class Adam:
    """Adam over several steps, in NumPy."""

    def __init__(self, params, rate):
        self.rate, self.steps = rate, 0
        self.first, self.second = (jax.tree.map(np.zeros_like, params) for _ in range(2))

    def step(self, params, grads):
        self.steps += 1
        self.first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, self.first, grads)
        self.second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, self.second, grads)
        first, second = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        scale = lambda m, v: (m / first) / (np.sqrt(v / second) + 1e-8)  # noqa: E731
        return jax.tree.map(lambda p, m, v: p - self.rate * scale(m, v), params, self.first, self.second)


def bellman(params, batch, target):
    return np.mean(((ensemble(params, batch.obs, batch.action) - target) ** 2).sum(axis=0))


def block_by_hand(nets, hyper, agent, batches, bonus, key, bounds=(-np.inf, np.inf)):
    """Critics, their targets, Adam, mean loss and mean target after a block of critic steps."""
    next_key, subset_key, _ = jax.random.split(key, 3)
    noise = np.float64(jax.random.normal(next_key, (*bonus.shape, ACT)))
    subsets = subsets_of(nets, subset_key, len(bonus))
    critic, slow, alpha = agent.critic.params, agent.target_critic, float(np.exp(agent.alpha.params))
    adam, losses, targets, rate = Adam(critic, hyper.critic_lr), [], [], hyper.target_rate
    for i, subset in enumerate(subsets):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        next_action, log_prob = squashed(agent.actor.params, batch.next_obs, noise[i])
        next_q = ensemble(slow, batch.next_obs, next_action)[subset].min(axis=0)
        reward, decay = hyper.reward_scale * batch.reward + hyper.reward_bias, hyper.discount * batch.discount
        entropy = -hyper.backup_entropy * alpha * log_prob
        target = np.clip(reward + decay * next_q, *bounds) + decay * entropy + bonus[i]
        losses.append(bellman(critic, batch, target))
        targets.append(target.mean())
        critic = adam.step(critic, gradient(partial(bellman, batch=batch, target=target), critic))
        slow = jax.tree.map(lambda new, old: rate * new + (1 - rate) * old, critic, slow)
    return critic, slow, adam, np.mean(losses), np.mean(targets)


def nearly(ours, theirs, rtol=2e-3, atol=2e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), ours, theirs)


def check_update(nets, hyper, before, batches, bonus, key, ours, metrics, bounds=(-np.inf, np.inf)):
    """`ours` and `metrics` came from the agent `before` by one block of RLPD."""
    before, batches = double(before), double(batches)
    critic, slow, adam, loss, q = block_by_hand(nets, hyper, before, batches, np.float64(bonus), key, bounds)
    # Each step of Adam is of 0.03, whatever the size of a gradient: that is what its moments tell.
    nearly(ours.critic.params, critic, atol=1e-3)
    nearly(ours.target_critic, slow, atol=3e-4)
    nearly(ours.critic.opt.mu, adam.first)
    np.testing.assert_allclose([metrics["critic_loss"], metrics["q"]], [loss, q], rtol=1e-3)

    alpha, obs = float(np.exp(before.alpha.params)), batches.obs[-1]
    noise = np.float64(jax.random.normal(jax.random.split(key, 3)[2], (BATCH, ACT)))

    def policy(params, critic=double(ours.critic.params)):
        action, log_prob = squashed(params, obs, noise)
        return np.mean(alpha * log_prob - ensemble(critic, obs, action).mean(axis=0))

    actor = before.actor.params
    np.testing.assert_allclose(metrics["actor_loss"], policy(actor), rtol=1e-4)
    slope = gradient(policy, actor)
    nearly(jax.tree.map(lambda m: 10 * m, ours.actor.opt.mu), slope)  # a tenth of the first gradient
    nearly(ours.actor.params, adam_first_step(actor, slope, hyper.actor_lr), atol=1e-3)
    entropy = -squashed(actor, obs, noise)[1].mean()
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-4)
    np.testing.assert_allclose(10 * ours.alpha.opt.mu, alpha * (entropy + 0.5 * ACT), rtol=1e-3)
    moved = ours.alpha.params - before.alpha.params
    np.testing.assert_allclose(moved, -1e-2 * np.sign(entropy + 0.5 * ACT), rtol=1e-3)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_update_of_rlpd(layer_norm):
    """Three critic steps on three batches with three subsets, then one of policy and alpha on the last."""
    static, agent, batches, bonus = make(layer_norm=layer_norm)
    nets, hyper, key = static.nets, rlpd.Hyper(**SETTINGS), jax.random.PRNGKey(5)
    ours, metrics = jax.jit(lambda agent: rlpd.update(nets, hyper, agent, batches, bonus, key))(agent)
    subsets = subsets_of(nets, jax.random.split(key, 3)[1], BLOCK)
    assert len({tuple(sorted(subset)) for subset in subsets}) > 1
    assert all(len(set(subset)) == SUBSET for subset in subsets)
    check_update(nets, hyper, agent, batches, bonus, key, ours, metrics)
    np.testing.assert_allclose(metrics["bonus"], bonus.mean(), rtol=1e-5)


def test_the_target_evaluates_only_its_subset():
    """Critics that are not numbers do not even reach the target if they are not drawn."""
    static, agent, batches, bonus = make(block=1)
    nets, key, slow = static.nets, jax.random.PRNGKey(5), agent.target_critic
    (subset,) = subsets_of(nets, jax.random.split(key, 3)[1], 1)
    others = [critic for critic in range(CRITICS) if critic not in subset]

    def poisoned(critics):
        spoilt = np.zeros(CRITICS, np.float32)
        spoilt[critics] = np.nan
        return jax.tree.map(lambda p: p + spoilt.reshape(-1, *[1] * (p.ndim - 1)), slow)

    step = jax.jit(lambda agent: rlpd.update(nets, rlpd.Hyper(), agent, batches, bonus, key)[1]["q"])
    assert step(agent) == step(agent.replace(target_critic=poisoned(others)))
    assert np.isnan(step(agent.replace(target_critic=poisoned(subset[:1]))))


def numbered(n, first):
    """`n` rows whose rewards are `first`, `first` + 1 ..."""
    reward, column = np.arange(first, first + n, dtype=np.float32), np.zeros((n, 1), np.float32)
    return Transition(column, column, reward, column, np.ones(n, np.float32))


@pytest.mark.parametrize(("ratio", "share"), [(0.5, 0.5), (0.25, 0.25), (-1.0, 20 / 50)])
def test_every_batch_has_its_share_of_offline_rows(ratio, share):
    key, rows = jax.random.PRNGKey(0), (numbered(20, 0), numbered(60, 1000))
    batches = rlpd.sample_batches(*rows, jnp.int32(30), ratio, (10, 5, 200), key)
    from_offline = np.asarray(batches.reward) < 1000
    assert batches.obs.shape == (10, 5, 200, 1)
    assert batches.reward.max() == 1029, "rows of the ring that were never filled"
    np.testing.assert_allclose(from_offline.mean(), share, atol=0.02)
    assert from_offline.sum(axis=-1).std() == 0 or ratio < 0


SCRIPTS = {"rlpd": (rlpd, rlpd.finetune_chunk), "ooo_rlpd": (ooo_rlpd, ooo_rlpd.explore_chunk)}


@pytest.mark.parametrize(("script", "chunk"), SCRIPTS.values(), ids=SCRIPTS)
def test_online_batches_are_drawn_as_set(monkeypatch, script, chunk):
    """The sampling gets the share of offline rows, the number of blocks, and the sizes of block and batch."""
    asked, sample_batches = [], script.sample_batches

    def record(offline, ring, added, ratio, shape, key):
        asked.append((ratio, shape))
        return sample_batches(offline, ring, added, ratio, shape, key)

    monkeypatch.setattr(script, "sample_batches", record)
    settings = {"num_envs": 8, "utd_ratio": 1.5, "policy_every": 4, "batch_size": BATCH, "online_steps": 80}
    static = static_of(script, "probe-match-obs", offline_ratio=0.25, **settings)
    state = jax.eval_shape(partial(script.init_state, static), jax.random.PRNGKey(0))
    given = state, script.Hyper(), numbered(20, 0), jnp.int32(0)
    jax.eval_shape(partial(chunk, static, length=2, learns=True), *given)
    assert set(asked) == {(0.25, (3, 4, BATCH))}


def test_offline_data_are_mixed_in_and_the_bonus_reaches_the_critics(tmp_path):
    """RND online, offline rows in every batch: the bonus falls as states get known, and lifts Q-values."""
    args = {"env": "probe-reward-is-obs", "num_seeds": 2, "rnd_units": 16, "rnd_lr": 1e-2}
    args |= {"intrinsic": "rnd", "utd_ratio": 0.25, "batch_size": 64}
    args |= {"online_steps": 800, "checkpoint_every": 400, "random_steps": 0, "runs_dir": str(tmp_path)}
    data = random_rows(tmp_path / "rows.npz", "probe-reward-is-obs", 1_000)
    run = trained(rlpd, whole=False, **args, dataset=data, name="it")
    value = {(r["metric"], r["step"], r["seed"]): float(r["value"]) for r in rows_of(run.result.folder)}
    for seed in "01":
        assert value["bonus", "400", seed] > value["bonus", "800", seed] > 0
        assert value["q", "400", seed] > 1.1, "the rewards of this probe are -1 and 1"


def test_the_bonus_is_that_of_the_whole_block():
    """RND learns once from all rows of a block, and each row gets its own bonus."""
    static, agent, batches, _ = make()
    memory = jax.jit(partial(rlpd.init_rnd, static))(jax.random.PRNGKey(0))
    hyper, key = rlpd.Hyper(**SETTINGS, intrinsic_coef=3.0), jax.random.PRNGKey(5)
    learn = jax.jit(partial(rlpd.optimistic_update, static, hyper))
    (ours, after), metrics = learn((agent, memory), (batches, key))
    assert int(after.predictor.opt.count) == 1
    rows = double(batches).obs.reshape(-1, OBS)
    x = np.clip((rows - rows.mean(axis=0)) / rows.std(axis=0), -5, 5)
    predicted, fixed = (forward(double(p)["params"], x) for p in (after.predictor.params, after.target))
    errors = ((predicted - fixed) ** 2).sum(axis=1)
    bonus = 3 * (errors / errors.std()).reshape(BLOCK, BATCH)
    check_update(static.nets, hyper, agent, batches, bonus, key, ours, metrics)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"target_subset": 11}, "--target-subset 11 is more than the --ensemble of 10"),
        ({"utd_ratio": 1.0, "num_envs": 8}, "--policy-every 20 must divide num_envs . utd_ratio, 8"),
    ],
)
def test_what_does_not_go_together_is_refused(flags, words):
    for script in (rlpd, ooo_rlpd):
        with pytest.raises(UsageError, match=words):
            script.make_plan(script.Args.exactly({"env": "point-mass-wall", **flags}))


def test_the_environments_own_data_are_found():
    wall = parse(rlpd.Args, ["--env", "point-mass-wall", "--offline-steps", "40"])
    assert (wall.dataset, wall.hyper.backup_entropy) == ("ooo/point-mass-wall/over-v0", 0)
    assert parse(rlpd.Args, ["--env", "probe-match-obs"]).dataset == "none"
    with pytest.raises(UsageError, match="needs --dataset"):
        parse(rlpd.Args, ["--env", "probe-match-obs", "--offline-steps", "20"])
