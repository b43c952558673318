"""Cal-QL: its losses and update against plain NumPy, its returns against sums row by row, its parts on the probes, and its resumption."""

import dataclasses
import os
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import double
from probing import PROBES, STEPS, Probing, random_data, settings, value_of_mean_action
from test_cql import SETTINGS, Reference, check_update, make

import envs
from algos import cal_ql, cql
from data import cli
from data import run as data_run
from data.buffer import Transition
from envs.base import Task

# --- losses and update ---

CASES = {  # flags, traced settings, keyword arguments of the reference
    "floor": ({"lagrange": True, "max_target_backup": False}, {}, {}),
    "bounds, uniform actions too": ({"calibrate_random": True}, {"target_min": -1.0, "target_max": 0.5}, {"bounds": (-1.0, 0.5)}),
    "max-entropy, uniform actions too": ({"calibrate_random": True, "importance_sampling": False}, {}, {}),
}


@pytest.mark.parametrize(("flags", "traced", "expected"), CASES.values(), ids=CASES)
def test_update_of_cal_ql(flags, traced, expected):
    args, nets, agent, batch = make(cal_ql, **flags)
    hyper, key = cal_ql.Hyper(**SETTINGS, **traced), jax.random.PRNGKey(5)
    floor = np.random.default_rng(1).normal(1.0, 2.0, len(batch.reward))
    floor[::4] = -np.inf
    rows = cal_ql.with_returns(batch, np.float32(floor))
    ours, metrics = jax.jit(lambda agent: cal_ql.update(args, nets, hyper, agent, rows, key))(agent)
    before = double(agent)
    reference = Reference(args, hyper, before, double(batch), key, floor, args.calibrate_random, **expected)
    check_update(reference, before, ours, metrics)
    without = Reference(args, hyper, before, double(batch), key)
    assert np.abs(without.difference(before.critic) - reference.difference(before.critic)).min() > 0.05, "the floor raises nothing"
    assert 0.05 < metrics["raised"] < 0.95
    if expected:
        assert np.abs(without.target - reference.target).max() > 0.1, "the bounds hold nothing"


# --- returns ---


def returns_by_hand(reward, ends, discount, after):
    """Return of each row of one stream of rows; `ends` [T] holds "" where the episode goes on, else how it ended; None: not known.

    `after(t)` is the value that follows a truncated row.
    """
    result = [None] * len(reward)
    for t in range(len(reward)):
        total, factor = 0.0, 1.0
        for k in range(t, len(reward)):
            total, factor = total + factor * reward[k], factor * discount
            if ends[k]:
                result[t] = None if ends[k] == "broken" else total + factor * (after(k) if ends[k] == "truncation" else 0.0)
                break
    return result


def bootstrap(mode, reward, discount, least):
    """`after` of `returns_by_hand`; `least(t)` is the least reward up to row t."""
    return {"zero": lambda t: 0.0, "last": lambda t: reward[t] / (1 - discount), "worst": lambda t: least(t) / (1 - discount)}[mode]


def random_ends(rng, length, horizon, kinds):
    """How each of `length` steps of one world ends its episode, "" where it does not; none lasts longer than `horizon`."""
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
    raw = np.float32(rng.normal(size=n))
    obs = np.zeros((n, 1), np.float32)
    discount = np.float32([end != "termination" for end in ends])
    rows, truncation = Transition(obs, obs, raw, obs, discount), np.array([end == "truncation" for end in ends])
    # Two runs of one program, with settings of their own.
    hyper = cal_ql.Hyper().replace(discount=jnp.float32([0.9, 0.99]), reward_scale=jnp.float32([1, 10]), reward_bias=jnp.float32([0, -5]))
    args = dataclasses.replace(cal_ql.Args(), mc_bootstrap=mode)
    axes = cal_ql.Hyper(**{f.name: 0 if f.name in ("discount", "reward_scale", "reward_bias") else None for f in dataclasses.fields(hyper)})
    ours = jax.jit(jax.vmap(lambda hyper: cal_ql.offline_returns(args, hyper, rows, truncation), in_axes=(axes,)))(hyper)
    for run, (gamma, scale, bias) in enumerate([(0.9, 1, 0), (0.99, 10, -5)]):
        reward = scale * np.float64(raw) + bias
        expected = returns_by_hand(reward, ends, gamma, bootstrap(mode, reward, gamma, lambda t, r=reward: r.min()))
        np.testing.assert_allclose(ours[run], expected, rtol=1e-4, atol=1e-4)


def test_sparse_failures_are_worth_what_the_official_code_says():
    """A trajectory of rewards r_neg that is cut off is worth r_neg / (1 - discount) from its first row on."""
    reward, zeros = np.full(50, -1, np.float32), np.zeros((50, 1), np.float32)
    rows, truncation = Transition(zeros, zeros, reward, zeros, np.ones(50, np.float32)), np.arange(50) == 49
    hyper = cal_ql.Hyper(reward_scale=10.0, reward_bias=-5.0)
    ours = cal_ql.offline_returns(cal_ql.Args(), hyper, rows, truncation)
    np.testing.assert_allclose(ours, -15 / 0.01, rtol=1e-4)


@MODES
@pytest.mark.parametrize("slots", [400, 40, 12], ids=["whole", "wraps", "shorter than an episode"])
def test_returns_are_written_when_an_episode_ends(mode, slots):
    """Every kind of end, side by side, step by step; `slots` rows fit into the ring, of 4 worlds with episodes of up to 7 rows."""
    rng, worlds, length, horizon, gamma = np.random.default_rng(3), 4, 100, 7, 0.9
    ends = [random_ends(rng, length, horizon, ["termination", "truncation", "broken"]) for _ in range(worlds)]
    raw = np.float32(rng.normal(size=(length, worlds)))
    flags = {kind: np.float32([[ends[e][t] == kind for e in range(worlds)] for t in range(length)]) for kind in ("termination", "broken")}
    flags["truncation"] = np.float32([[ends[e][t] in ("truncation", "broken") for e in range(worlds)] for t in range(length)])
    raw -= 5 * flags["broken"]  # what a broken step is said to have earned must not count as the least reward
    args = dataclasses.replace(cal_ql.Args(), mc_bootstrap=mode, num_envs=worlds)
    hyper = cal_ql.Hyper(discount=gamma, reward_scale=2.0, reward_bias=-0.5)

    def step(carry, xs):
        mc_return, episodes, added = carry
        reward, flags = xs
        done = flags["termination"] + flags["truncation"]
        reached = SimpleNamespace(reward=reward, done=done, info=flags)
        # As `buffer.insert` leaves it: the step's own rows are there, without a return.
        ring = cal_ql.Rows(None, None, None, None, None, jax.lax.dynamic_update_slice(mc_return, jnp.full(4, -jnp.inf), (added % slots,)))
        ring, episodes = cal_ql.record_returns(args, hyper, ring, episodes, reached, added)
        return (ring.mc_return, episodes, added + worlds), ring.mc_return

    start = cal_ql.Episodes(jnp.zeros((horizon, worlds)), jnp.zeros(worlds, jnp.int32), jnp.float32(0.1))
    xs = raw, {kind: jnp.array(f) for kind, f in flags.items()}
    history = np.asarray(jax.jit(lambda: jax.lax.scan(step, (jnp.zeros(slots), start, 0), xs)[1])())

    reward = 2 * np.float64(raw) - 0.5
    sound = np.where(flags["broken"] > 0, np.inf, reward)
    least = lambda t: min(0.1, sound[: t + 1].min())  # noqa: E731
    checked = {"known": 0, "open": 0, "broken": 0}
    for now in range(length):
        for e in range(worlds):
            expected = returns_by_hand(reward[: now + 1, e], ends[e][: now + 1], gamma, bootstrap(mode, reward[:, e], gamma, least))
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
    """A number that wanders: the episode terminates beyond 1, and is cut off after 9 steps. Rewards are the numbers."""

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
    hyper = cal_ql.Hyper(discount=0.9, actor_lr=0.0, critic_lr=0.0, alpha_lr=0.0)
    args = dataclasses.replace(
        cal_ql.Args(), env="probe-constant-reward", online_steps=600, buffer_size=slots, offline_steps=0, num_envs=3, utd_ratio=1 / 3,
        batch_size=4, hidden=(4,), critic_hidden=(4,), num_samples=1, hyper=hyper,
    )  # fmt: skip
    setup = cal_ql.make_setup(args, None)._replace(env=Drift())
    state, added = jax.jit(partial(cal_ql.init_state, setup))(hyper, None, None, jax.random.PRNGKey(1)), 0
    run = jax.jit(partial(cal_ql.finetune_chunk, setup), static_argnames="length")
    for length in lengths:
        state, metrics = run(state, hyper, None, jnp.int32(added), length=length)
        assert metrics["nonfinite_at"] == -1
        added += 3 * length
    return jax.device_get(state)


def test_online_rows_of_an_environment_get_their_returns():
    """Through `finetune_chunk`, over a border of chunks, and with a ring that wraps around."""
    whole = drifting(600, 50, 50)
    reward, ring = np.float64(whole.ring.reward[:300]).reshape(100, 3), whole.ring
    over = (np.abs(ring.next_obs[:297] - ring.obs[3:300]) > 1e-5).any(axis=1).reshape(99, 3)  # the same number may be rounded twice
    terminated, counts = ring.discount[:300].reshape(100, 3) == 0, {"termination": 0, "truncation": 0, "": 0}
    for e in range(3):
        ends = ["termination" if terminated[t, e] else "truncation" if t < 99 and over[t, e] else "" for t in range(100)]
        if whole.episodes.rows[e] == 0 and not ends[-1]:
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


class Script:
    """cal_ql as Probing knows scripts: no episode of its data was cut off."""

    def __getattr__(self, name):
        return getattr(cal_ql, name)

    @staticmethod
    def init_state(setup, hyper, offline, key):
        return cal_ql.init_state(setup, hyper, offline, offline and jnp.zeros(len(offline.reward)), key)


PROBE = {"alpha_lr": 3e-3, "entropy_per_action": -3.0, "cql_weight": 0.01}


@pytest.mark.parametrize("name", PROBES)
def test_cal_ql_offline(name):
    flags = settings(cal_ql, name, PROBE, online_steps=0, offline_steps=STEPS, num_samples=2, max_target_backup=False)
    probing = Probing(Script(), flags, random_data(name))
    probing.run("pretrain", STEPS)
    probing.check(probing.state.agent, value_of_mean_action)


@pytest.mark.parametrize("name", PROBES)
def test_cal_ql_online(name):
    online = {"online_steps": 8 * STEPS, "offline_steps": 0, "num_envs": 8, "utd_ratio": 0.125, "random_steps": 800}
    flags = settings(cal_ql, name, PROBE, **online, num_samples=2, max_target_backup=False)
    probing = Probing(Script(), flags)
    probing.run("finetune", STEPS)
    probing.check(probing.state.agent, value_of_mean_action)


def test_what_lies_below_the_floor_is_pushed_no_further():
    """There the soft maximum has no slope, and all that is left is the data's own Q; without a floor the loss is CQL's."""
    _, nets, agent, batch = make(cal_ql)
    candidates = np.float32(np.random.default_rng(2).uniform(-1, 1, (6, *batch.action.shape)))
    log_density = np.zeros(candidates.shape[:2], np.float32)
    own = jax.grad(lambda p: -nets.critic.apply(p, batch.obs, batch.action).mean(axis=-1).sum())(agent.critic)

    def slope(floor):
        loss = lambda p: cal_ql.conservative_loss(p, nets, batch.obs, batch.action, candidates, log_density, floor, (-np.inf, np.inf))  # noqa: E731
        return jax.grad(lambda p: loss(p)[0].sum())(agent.critic)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), slope(np.full((6, len(batch.obs)), 1e3, np.float32)), own)
    loss = lambda p: cql.conservative_loss(p, nets, batch.obs, batch.action, candidates, log_density, (-np.inf, np.inf)).sum()  # noqa: E731
    free = slope(np.full((6, len(batch.obs)), -np.inf, np.float32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), free, jax.grad(loss)(agent.critic))
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(free), jax.tree.leaves(own))) > 0.1


# --- as a program ---

TINY = (
    "--env point-mass-wall --hidden 8 8 --critic-hidden 8 8 --num-seeds 2 --batch-size 16 --offline-steps 20 --online-steps 320 "
    "--num-envs 8 --utd-ratio 0.125 --num-samples 2 --eval-episodes 1 --eval-every 1000 --checkpoint-every 80"
)


def run(runs_dir, *flags):
    with pytest.MonkeyPatch.context() as patch:
        if "MINARI_DATASETS_PATH" not in os.environ:
            patch.setenv("MINARI_DATASETS_PATH", str(runs_dir / "minari"))
        patch.setattr(sys, "argv", ["script", *map(str, flags)])
        cal_ql.main()


def test_a_run_that_stops_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    flags = [*TINY.split(), "--name", "it", "--runs-dir"]
    run(tmp_path, *flags, tmp_path / "whole")
    after, calls = data_run.Run.after, []

    def stop(self, chunk, *arguments):
        if len(calls) == 3:  # in the midst of exploration, and of episodes, with a checkpoint behind it
            raise KeyboardInterrupt
        calls.append(chunk)
        return after(self, chunk, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(data_run.Run, "after", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, *flags, tmp_path / "stopped")
    assert calls[-1].phase == "online" and calls[-1].start + calls[-1].length < 320
    folders = [tmp_path / name / "cal_ql" / "point-mass-wall" / "it" for name in ("whole", "stopped")]
    run(tmp_path, "--resume", folders[1])
    assert (folders[0] / "metrics.csv").read_bytes() == (folders[1] / "metrics.csv").read_bytes()
    rows = (folders[0] / "metrics.csv").read_text().splitlines()
    assert any(",raised," in row and row.startswith("online") for row in rows)


def test_no_discounting_needs_another_bootstrap():
    args = dataclasses.replace(cal_ql.Args(), env="point-mass-wall", sweep=("discount=0.9,1",))
    with pytest.raises(cli.UsageError, match="--mc-bootstrap last needs a --discount below 1"):
        cal_ql.make_setup(args, None)
    assert isinstance(cal_ql.make_setup(dataclasses.replace(args, mc_bootstrap="zero"), None).env, envs.Env)
