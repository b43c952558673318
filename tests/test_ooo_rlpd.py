"""OOO on RLPD: its update against plain NumPy, the probes through all phases, and what retraining sees."""

import csv
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rlpd import BATCH, CRITICS, SETTINGS, SUBSET, check_update, make, static_of
from training import trained

from ooo_rl.algos import ooo_rlpd
from ooo_rl.data import buffer
from ooo_rl.data.buffer import Transition
from ooo_rl.data.runs.session import Session


@functools.cache
def one_step(sizes):
    """The networks, agent and rows of one critic step, with the step compiled for any bounds."""
    static, agent, batches, bonus = make(1, *sizes, script=ooo_rlpd)
    nets, hyper, key = static.nets, ooo_rlpd.Hyper(**SETTINGS), jax.random.PRNGKey(5)
    step = jax.jit(lambda bounds: ooo_rlpd.update(nets, hyper, agent, batches, bonus, bounds, key))
    return (nets, hyper, agent, batches, bonus, key), step


@pytest.mark.parametrize("sizes", [(True, CRITICS, SUBSET), (False, 2, 2)], ids=["rlpd", "sac"])
@pytest.mark.parametrize("bounds", [(-np.inf, np.inf), (-0.5, 0.4)], ids=["free", "bounded"])
def test_update_of_ooo_rlpd(sizes, bounds):
    """One critic step, as in retraining: bounds hold the task reward's part of the target, no other."""
    given, step = one_step(sizes)
    check_update(*given, *step(bounds), bounds)


def numbered(reward, obs=0.0):
    """Rows with these rewards."""
    reward = jnp.float32(reward)
    full = jnp.full((len(reward), 1), obs)
    return Transition(full, full, reward, full, jnp.ones_like(reward))


def what_retraining_sees(monkeypatch, offline, ring, added, hyper=None, **flags):
    """Each batch's rewards, bonus and bounds in 40 steps of retraining, recorded instead of learnt from."""
    seen = []

    def record(nets, hyper, agent, batches, bonus, q_bounds, key):
        keep = lambda *x: seen.append([np.asarray(v) for v in x])  # noqa: E731
        jax.debug.callback(keep, batches.reward[0], bonus[0], *q_bounds, ordered=True)
        return agent, {"q": batches.reward.mean()}

    monkeypatch.setattr(ooo_rlpd, "update", record)
    small = {"hidden": (4,), "critic_hidden": (4,), "rnd_units": 8, "batch_size": BATCH, "num_envs": 4}
    static = static_of(ooo_rlpd, "probe-match-obs", online_steps=buffer.size(ring), **small, **flags)
    state = ooo_rlpd.init_state(static, jax.random.PRNGKey(0)).replace(ring=ring)
    hyper = (hyper or ooo_rlpd.Hyper()).replace(discount=0.9)
    retrain = jax.jit(lambda *given: ooo_rlpd.retrain_chunk(static, *given, length=40))
    retrain(state, hyper, offline, jnp.int32(added))
    jax.effects_barrier()
    rewards, bonus, low, high = (np.stack(x) for x in zip(*seen))
    return rewards, bonus, (float(low[0]), float(high[0])), (static, state)


def test_retraining_sees_the_rows_until_then_alike(monkeypatch):
    """All offline and the first online rows, each as often; no bonus; bounds from their scaled rewards."""
    offline, ring = numbered(np.arange(10)), numbered(np.arange(100, 140))
    hyper = ooo_rlpd.Hyper(reward_scale=2.0, reward_bias=-3.0)
    rewards, bonus, bounds, _ = what_retraining_sees(monkeypatch, offline, ring, 20, hyper)
    assert rewards.shape == (40, BATCH) and set(rewards.ravel()) == {*range(10), *range(100, 120)}
    np.testing.assert_allclose((rewards < 50).mean(), 1 / 3, atol=0.08)
    assert (bonus == 0).all()
    np.testing.assert_allclose(bounds, [-3 / 0.1, (2 * 119 - 3) / 0.1], rtol=1e-4)


def test_retraining_without_bounds_and_without_offline_rows(monkeypatch):
    rewards, _, bounds, _ = what_retraining_sees(monkeypatch, None, numbered(np.arange(40)), 8, bound_q=False)
    assert set(rewards.ravel()) == set(range(8)) and bounds == (-np.inf, np.inf)


def test_the_best_rows_are_up_sampled(monkeypatch):
    """Two rows of the highest reward so far are a quarter of each batch; better ones come later."""
    offline, ring = numbered(np.zeros(1000)), numbered(np.float32([1, 0, 1, 0, 5, 5, 5, 5]))
    rewards, *_ = what_retraining_sees(monkeypatch, offline, ring, 4, upsample=0.25)
    assert set(rewards.ravel()) == {0, 1} and (rewards == 1).sum(axis=1).min() == BATCH // 4
    assert (rewards == 1).mean() < 0.27


def test_a_frozen_bonus_is_the_explorers(monkeypatch):
    hyper, ring = ooo_rlpd.Hyper(intrinsic_coef=3.0), numbered(np.zeros(8), obs=0.5)
    _, bonus, bounds, (static, state) = what_retraining_sees(
        monkeypatch, None, ring, 8, hyper, frozen_bonus=True
    )
    expected = 3 * ooo_rlpd.bonus(static, state.bonus, numbered(np.zeros(1), obs=0.5))
    assert expected > 0
    np.testing.assert_allclose(bonus, np.full(bonus.shape, expected), rtol=1e-4)
    assert bounds == (-np.inf, np.inf), "bounds of the task reward hold no value with the bonus in it"


def test_the_exploiter_has_critics_of_its_own():
    like, sac = (static_of(ooo_rlpd, retrainer=kind) for kind in ("rlpd", "sac"))
    exploiter = ooo_rlpd.for_exploiter(sac).nets
    assert ooo_rlpd.for_exploiter(like).nets == like.nets == sac.nets
    assert (exploiter.critic.num, exploiter.target.num, exploiter.critic.layer_norm) == (2, 2, False)
    assert (exploiter.actor, exploiter.critic.hidden) == (sac.nets.actor, sac.nets.critic.hidden)


def test_the_q_values_of_the_exploiter_come_from_its_own_critics(tmp_path, monkeypatch):
    """Ten critics cannot be asked with the parameters of two; this came out at the end of the exploration."""
    seen = []
    monkeypatch.setattr(Session, "compile", lambda self, static, *_: seen.extend([self, static]) or 1 / 0)
    settings = {
        "env": "probe-match-obs",
        "dataset": "none",
        "offline_steps": 0,
        "hidden": (8,),
        "critic_hidden": (8,),
    }
    with pytest.raises(ZeroDivisionError):
        ooo_rlpd.train(ooo_rlpd.Args(**settings, retrainer="sac", runs_dir=str(tmp_path)))
    session, static = seen
    own, obs, action = ooo_rlpd.for_exploiter(static).nets.critic, jnp.ones((5, 1)), jnp.ones((5, 1))
    params = own.init(jax.random.PRNGKey(0), obs, action)
    found = session._q_of("exploiter")(params, obs, action)
    np.testing.assert_allclose(found, own.apply(params, obs, action).min(axis=0))
    assert found.shape == (5,) and session._q_of("explorer") is not session._q_of("exploiter")


TINY = {
    "env": "point-mass-wall", "num_seeds": 2, "hidden": (8,), "critic_hidden": (8,), "batch_size": 16, "ensemble": 3,
    "num_envs": 4, "utd_ratio": 1, "policy_every": 2, "offline_steps": 8, "online_steps": 80, "random_steps": 16,
    "retrain_at": (40, 80), "retrain_steps": 8, "retrainer": "sac", "eval_episodes": 1, "rnd_units": 16, "name": "it",
    "eval_every": 4, "q_bias": True,
}  # fmt: skip


@pytest.mark.slow
def test_each_retraining_begins_anew_unless_warm(tmp_path):
    """A run through all phases: both retrainings begin with the same alpha; warm, the second one goes on."""
    scratch = trained(ooo_rlpd, **TINY, runs_dir=str(tmp_path / "scratch"))
    again = {"warm_start": True, "whole": False, "like": scratch}
    # The two agents have other critics, so each needs its own for its bias.
    warm = trained(ooo_rlpd, **TINY, **again, runs_dir=str(tmp_path / "warm"))
    for run in (scratch, warm):
        rows = list(csv.DictReader((run.result.folder / "metrics.csv").open()))
        value = {(r["phase"], int(r["step"]), r["seed"], r["metric"]): float(r["value"]) for r in rows}
        first, second = (value[phase, 4, "0", "alpha"] for phase in ("retrained@40", "retrained"))
        assert (second < value["retrained@40", 8, "0", "alpha"]) == (run is warm)
        assert (abs(first - second) < 1e-4) == (run is scratch)
    last = {"offline": 8, "online": 80, "retrained": 8}
    bonus = {phase: value[phase, step, "0", "bonus"] for phase, step in last.items()}
    assert min(bonus["offline"], bonus["online"]) > 0 == bonus["retrained"]
    phases = scratch.result.results["phases"]
    assert list(phases) == ["offline", "online", "retrained@40", "retrained"]
    assert np.isfinite([found["q_bias"] for found in phases.values()]).all()
    files = (scratch.result.folder / "policies").iterdir()
    assert {p.name.partition("_")[0] for p in files} == {"explorer", "exploiter"}
