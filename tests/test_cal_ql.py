"""Cal-QL against plain NumPy, its returns against sums row by row, its floor."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import double
from test_cql import TRACED, Reference, check_update, make_cql
from test_sac import static_of

from ooo_rl.algos import cal_ql, cql, ooo_cal_ql
from ooo_rl.data import returns
from ooo_rl.data.buffer import Transition
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs.online_change import check_online_change
from ooo_rl.data.runs.sweep import grid
from ooo_rl.envs.base import Task

# --- losses and update ---

CASES = {  # flags, traced settings, keyword arguments of the reference
    "floor": ({"lagrange": True, "max_target_backup": False}, {}, {}),
    "bounds, uniform actions too": (
        {"calibrate_random": True},
        {"target_min": -1.0, "target_max": 0.5},
        {"bounds": (-1.0, 0.5)},
    ),
    "max-entropy, uniform actions too": ({"calibrate_random": True, "importance_sampling": False}, {}, {}),
}


@pytest.mark.parametrize(("flags", "traced", "expected"), CASES.values(), ids=CASES)
def test_update_of_cal_ql(flags, traced, expected):
    static, agent, batch = make_cql(cal_ql, **flags)
    hyper, key, args = cal_ql.Hyper(**TRACED, **traced), jax.random.PRNGKey(5), static.args
    floor = np.random.default_rng(1).normal(1.0, 2.0, len(batch.reward))
    floor[::4] = -np.inf
    rows = returns.with_returns(batch, np.float32(floor))
    ours, metrics = jax.jit(partial(cal_ql.update, static, hyper))(agent, rows, key)
    before = double(agent)
    reference = Reference(args, hyper, before, double(batch), key, floor, args.calibrate_random, **expected)
    check_update(reference, before, ours, metrics)
    without = Reference(args, hyper, before, double(batch), key)
    raised = [each.difference(before.critic.params) for each in (reference, without)]
    assert np.abs(raised[0] - raised[1]).min() > 0.05, "the floor raises nothing"
    assert 0.05 < metrics["raised"] < 0.95
    if expected:
        assert np.abs(without.target - reference.target).max() > 0.1, "the bounds hold nothing"


# --- returns ---


def returns_by_hand(reward, ends, discount, after):
    """Return of each row of one stream of rows; None: not known.

    `ends` [T] holds "" where the episode goes on, else how it ended; `after(t)` is the value that follows a
    truncated row.
    """
    result = [None] * len(reward)
    for t in range(len(reward)):
        total, factor = 0.0, 1.0
        for k in range(t, len(reward)):
            total, factor = total + factor * reward[k], factor * discount
            if ends[k]:
                follows = factor * after(k) if ends[k] == "truncation" else 0.0
                result[t] = None if ends[k] == "broken" else total + follows
                break
    return result


def bootstrap(mode, reward, discount, least):
    """`after` of `returns_by_hand`; `least(t)` is the least reward up to row t."""
    last = lambda t: reward[t] / (1 - discount)  # noqa: E731
    return {"zero": lambda t: 0.0, "last": last, "worst": lambda t: least(t) / (1 - discount)}[mode]


def random_ends(rng, length, horizon, kinds):
    """How each of `length` steps of one world ends its episode, "" where it does not."""
    ends, n = [], 0
    for _ in range(length):
        n += 1
        end = rng.choice(kinds) if rng.uniform() < 0.2 else "truncation" if n == horizon else ""
        ends.append(end)
        n = 0 if end else n
    return ends


MODES = pytest.mark.parametrize("mode", ["last", "worst", "zero"])


@MODES
def test_offline_returns_are_sums_to_the_end_of_each_episode(mode):
    rng, n = np.random.default_rng(0), 60
    ends = random_ends(rng, n, 12, ["termination", "truncation"])
    ends[-1] = ends[-1] or "truncation"
    raw, obs = np.float32(rng.normal(size=n)), np.zeros((n, 1), np.float32)
    discount = np.float32([end != "termination" for end in ends])
    rows = Transition(obs, obs, raw, obs, discount)
    truncation = np.array([end == "truncation" for end in ends])
    # Two runs of one program, with settings of their own.
    cases = [(0.9, 1, 0), (0.99, 10, -5)]
    names = ("discount", "reward_scale", "reward_bias")
    settings = {name: jnp.float32(column) for name, column in zip(names, zip(*cases))}

    def of_run(settings):
        return returns.offline_returns(cal_ql.Hyper(**settings), rows, truncation, mode)

    ours = jax.jit(jax.vmap(of_run))(settings)
    for run, (gamma, scale, bias) in enumerate(cases):
        reward = scale * np.float64(raw) + bias
        after = bootstrap(mode, reward, gamma, lambda t, r=reward: r.min())
        expected = returns_by_hand(reward, ends, gamma, after)
        np.testing.assert_allclose(ours[run], expected, rtol=1e-4, atol=1e-4)


def test_sparse_failures_are_worth_what_the_official_code_says():
    """A trajectory of rewards r_neg that is cut off is worth r_neg / (1 - discount) from its first row on."""
    reward, zeros = np.full(50, -1, np.float32), np.zeros((50, 1), np.float32)
    rows = Transition(zeros, zeros, reward, zeros, np.ones(50, np.float32))
    hyper, default = cal_ql.Hyper(reward_scale=10.0, reward_bias=-5.0), cal_ql.Args.exactly({}).mc_bootstrap
    ours = jax.jit(lambda: returns.offline_returns(hyper, rows, np.arange(50) == 49, default))()
    np.testing.assert_allclose(ours, -15 / 0.01, rtol=1e-4)


@MODES
@pytest.mark.parametrize("slots", [400, 40, 12], ids=["whole", "wraps", "shorter than an episode"])
def test_returns_are_written_when_an_episode_ends(mode, slots):
    """Every kind of end, side by side, step by step, in 4 worlds with episodes of up to 7 rows.

    `slots` rows fit into the ring.
    """
    rng, worlds, length, horizon, gamma = np.random.default_rng(3), 4, 100, 7, 0.9
    ends = [random_ends(rng, length, horizon, ["termination", "truncation", "broken"]) for _ in range(worlds)]
    raw = np.float32(rng.normal(size=(length, worlds)))
    where = lambda *kinds: np.float32(np.isin(np.array(ends).T, kinds))  # noqa: E731
    flags = {kind: where(kind) for kind in ("termination", "broken")}
    # Where it is 0, the episode goes on (--end-reward).
    flags["done"] = np.float32(rng.uniform(size=(length, worlds)) < 0.5)
    flags["truncation"] = where("truncation", "broken")
    raw -= 5 * flags["broken"]  # what a broken step is said to have earned must not count as the least reward
    hyper = cal_ql.Hyper(discount=gamma, reward_scale=2.0, reward_bias=-0.5)

    def step(carry, xs):
        mc_return, known, added = carry
        reward, flags = xs
        done = flags["truncation"] + flags["termination"] * flags["done"]
        reached = SimpleNamespace(reward=reward, done=done, info=flags)
        # As `buffer.insert` leaves it: the step's own rows are there, without a return.
        unknown = jax.lax.dynamic_update_slice(mc_return, jnp.full(worlds, -jnp.inf), (added % slots,))
        ring = returns.Rows(None, None, None, None, None, unknown)
        ring, known = known.record(hyper, ring, reached, added, mode)
        return (ring.mc_return, known, added + worlds), ring.mc_return

    so_far, rows = jnp.zeros((horizon, worlds)), jnp.zeros(worlds, jnp.int32)
    start = returns.Returns(None, so_far, rows, jnp.float32(0.1))
    xs = raw, {kind: jnp.array(f) for kind, f in flags.items()}
    history = np.asarray(jax.jit(lambda: jax.lax.scan(step, (jnp.zeros(slots), start, 0), xs)[1])())

    reward = 2 * np.float64(raw) - 0.5
    sound = np.where(flags["broken"] > 0, np.inf, reward)
    least = lambda t: min(0.1, sound[: t + 1].min())  # noqa: E731
    checked = {"known": 0, "open": 0, "broken": 0}
    for now in range(length):
        for e in range(worlds):
            after = bootstrap(mode, reward[:, e], gamma, least)
            expected = returns_by_hand(reward[: now + 1, e], ends[e][: now + 1], gamma, after)
            for t in range(max(0, now + 1 - slots // worlds), now + 1):
                ours = history[now, (t * worlds + e) % slots]
                if expected[t] is None:
                    assert ours == -np.inf
                else:
                    np.testing.assert_allclose(ours, expected[t], rtol=1e-4, atol=1e-4)
                kind = next((end for end in ends[e][t : now + 1] if end), "open")
                checked[kind if kind in checked else "known"] += 1
    assert min(checked.values()) > 50


class Drift(Task):
    """A number that wanders: the episode terminates beyond 1, and is cut off after 9 steps.

    Rewards are the numbers.
    """

    horizon, observation_size, action_size = 9, 1, 1

    def start(self, key):
        return jax.random.uniform(key, (1,), minval=-0.5, maxval=0.5)

    def advance(self, inner, action):
        inner = 1.1 * inner + 0.3 * action
        return inner, inner[0], jnp.abs(inner[0]) > 1, jnp.bool_(False)

    def observe(self, inner):
        return inner


def drifting(slots, *lengths):
    """State after chunks of these lengths of one agent that never changes, with `slots` rows in the ring."""
    static = static_of(
        cal_ql, Drift(), 1, 1, online_steps=600, buffer_size=slots, offline_steps=0, num_envs=3,
        utd_ratio=1 / 3, batch_size=4, hidden=(4,), critic_hidden=(4,), num_samples=1,
    )  # fmt: skip
    hyper = cal_ql.Hyper(discount=0.9, actor_lr=0.0, critic_lr=0.0, alpha_lr=0.0)
    state, added = jax.jit(partial(cal_ql.init_state, static))(hyper, None, None, jax.random.PRNGKey(1)), 0
    run = jax.jit(partial(cal_ql.finetune_chunk, static, learns=True), static_argnames="length")
    for length in lengths:
        state, metrics = run(state, hyper, None, jnp.int32(added), length=length)
        assert metrics["nonfinite_at"] == -1
        added += 3 * length
    return jax.device_get(state)


def test_online_rows_of_an_environment_get_their_returns():
    """Through `finetune_chunk`, over a border of chunks, and with a ring that wraps around."""
    whole = drifting(600, 50, 50)
    reward, ring = np.float64(whole.ring.reward[:300]).reshape(100, 3), whole.ring
    # Where an episode goes on, the next row begins in this one's end; the same number may be rounded twice.
    over = (np.abs(ring.next_obs[:297] - ring.obs[3:300]) > 1e-5).any(axis=1).reshape(99, 3)
    terminated = ring.discount[:300].reshape(100, 3) == 0
    counts = {"termination": 0, "truncation": 0, "": 0}
    for e in range(3):
        cut = [t < 99 and over[t, e] for t in range(100)]
        ends = ["termination" if terminated[t, e] else "truncation" if cut[t] else "" for t in range(100)]
        if whole.returns.rows[e] == 0 and not ends[-1]:
            ends[-1] = "truncation"
        expected = returns_by_hand(reward[:, e], ends, 0.9, lambda t, e=e: reward[t, e] / 0.1)
        for t, value in enumerate(expected):
            ours = ring.mc_return[3 * t + e]
            assert ours == -np.inf if value is None else abs(ours - value) < 1e-4
        counts = {kind: n + ends.count(kind) for kind, n in counts.items()}
    assert min(counts.values()) > 5, "some way for an episode to end is not among them"
    jax.tree.map(np.testing.assert_array_equal, drifting(600, 100), whole)
    wrapped = drifting(60, 50, 50).ring
    slots = np.arange(240, 300) % 60
    for name in ("obs", "mc_return"):
        np.testing.assert_array_equal(getattr(wrapped, name)[slots], getattr(whole.ring, name)[240:300])


# --- what it learns ---


def test_what_lies_below_the_floor_is_pushed_no_further():
    """There the soft maximum has no slope: the data's own Q is left. Without a floor the loss is CQL's."""
    static, agent, batch = make_cql(cal_ql)
    nets, critic, n = static.nets, agent.critic.params, len(batch.obs)
    candidates = np.float32(np.random.default_rng(2).uniform(-1, 1, (6, *batch.action.shape)))
    given = nets, batch.obs, batch.action, candidates, np.zeros((6, n), np.float32)
    clip = -np.inf, np.inf
    same = lambda a, b: jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), a, b)  # noqa: E731

    @jax.jit
    def slopes(critic, floor):
        own = lambda p: -nets.critic.apply(p, batch.obs, batch.action).mean(axis=-1).sum()  # noqa: E731
        floored = lambda p: cal_ql.conservative_loss(p, *given, floor, clip)[0].sum()  # noqa: E731
        free = lambda p: cql.conservative_loss(p, *given, clip).sum()  # noqa: E731
        return [jax.grad(loss)(critic) for loss in (own, floored, free)]

    own, floored, _ = slopes(critic, np.full((6, n), 1e3, np.float32))
    same(floored, own)
    _, floored, free = slopes(critic, np.full((6, n), -np.inf, np.float32))
    same(floored, free)
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(free), jax.tree.leaves(own))) > 0.1


@pytest.mark.parametrize("method", [cal_ql, ooo_cal_ql])
def test_what_offline_returns_depend_on_cannot_change_online(method):
    def args(change):
        return method.Args(env="probe-all", dataset="none", online_change=(change,))

    for change in ("discount=0.5", "reward-scale=2", "reward-bias=1"):
        with pytest.raises(UsageError, match=f"--online-change {change}: the returns of offline rows hold"):
            check_online_change(args(change))
    check_online_change(args("cql-weight=1"))


def test_what_has_no_returns_is_refused():
    def session(ordered=True, **flags):
        args = static_of(cal_ql, sweep=("discount=0.9,1",), **flags).args
        return SimpleNamespace(args=args, hyper=grid(args)[0], card={"id": "mine", "ordered": ordered})

    with pytest.raises(UsageError, match="--mc-bootstrap last needs a --discount below 1"):
        returns.check_returns(session())
    returns.check_returns(session(mc_bootstrap="zero"))
    with pytest.raises(UsageError, match="--dataset mine: its rows are in no order"):
        returns.check_returns(session(ordered=False, mc_bootstrap="zero"))
