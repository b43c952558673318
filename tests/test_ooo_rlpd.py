"""OOO on RLPD: its update against plain NumPy, the probes through all phases, and what retraining sees."""

import csv
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probing import PROBES, STEPS, Probing, random_data, settings, value_of_mean_action
from test_rlpd import BATCH, CRITICS, SETTINGS, SUBSET, check_update, make, static_of

from ooo_rl.algos import ooo_rlpd
from ooo_rl.data import buffer
from ooo_rl.data.buffer import Transition
from ooo_rl.data.runs.settings import launch


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


def probe(name, offline=None, **flags):
    hyper = {"alpha_lr": 3e-3, "entropy_per_action": -3.0, "backup_entropy": 0.0}
    flags |= {"ensemble": CRITICS, "target_subset": SUBSET, "policy_every": 2, "num_envs": 8}
    flags |= {"dataset": "none", "intrinsic": "none", "utd_ratio": 0.25}
    return Probing(ooo_rlpd, settings(ooo_rlpd, name, hyper, **flags), offline)


def check_exploiter(probing):
    """Its critics are of its own kind."""
    nets = ooo_rlpd.for_exploiter(probing.static).nets
    probing.check(probing.state.exploiter, lambda _, agent, obs: value_of_mean_action(nets, agent, obs))


@pytest.mark.parametrize("name", PROBES)
def test_online_and_retrained(name):
    """Without bonus the explorer solves the probe online, an exploiter of two critics on its rows alone."""
    probing = probe(name, online_steps=8 * STEPS, random_steps=800, retrain_steps=STEPS, retrainer="sac")
    probing.run("explore", STEPS)
    probing.check(probing.state.explorer, value_of_mean_action)
    probing.run("retrain", STEPS)
    check_exploiter(probing)


@pytest.mark.parametrize("name", PROBES)
def test_purely_offline(name):
    probing = probe(name, random_data(name), online_steps=0, offline_steps=STEPS, retrain_steps=STEPS)
    probing.run("pretrain", STEPS)
    probing.check(probing.state.explorer, value_of_mean_action)
    probing.run("retrain", STEPS)
    check_exploiter(probing)
    assert buffer.size(probing.state.ring) == 0


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


TINY = (
    "--env point-mass-wall --num-seeds 2 --hidden 8 --critic-hidden 8 --batch-size 16 --ensemble 3 "
    "--num-envs 4 --utd-ratio 1 --policy-every 2 --offline-steps 8 --online-steps 80 --random-steps 16 "
    "--retrain-at 40 80 --retrain-steps 8 --retrainer sac --eval-episodes 1 --rnd-units 16 --name it "
    "--eval-every 4"
)


@pytest.mark.parametrize("warm", [False, True], ids=["scratch", "warm"])
def test_each_retraining_begins_anew_unless_warm(monkeypatch, tmp_path, warm):
    """A run through all phases: both retrainings begin with the same alpha; warm, the second one goes on."""
    flags = [*TINY.split(), "--runs-dir", str(tmp_path), *(["--warm-start"] if warm else [])]
    monkeypatch.setattr(sys, "argv", ["ooo_rlpd.py", *flags])
    launch(ooo_rlpd.Args, ooo_rlpd.train)
    folder = tmp_path / "ooo_rlpd" / "point-mass-wall" / "it"
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    value = {(r["phase"], int(r["step"]), r["seed"], r["metric"]): float(r["value"]) for r in rows}
    first, second = (value[phase, 4, "0", "alpha"] for phase in ("retrained@40", "retrained"))
    assert (second < value["retrained@40", 8, "0", "alpha"]) == warm
    assert (abs(first - second) < 1e-4) == (not warm)
    last = {"offline": 8, "online": 80, "retrained": 8}
    bonus = {phase: value[phase, step, "0", "bonus"] for phase, step in last.items()}
    assert min(bonus["offline"], bonus["online"]) > 0 == bonus["retrained"]
    result = json.loads((folder / "result.json").read_text())
    assert list(result["phases"]) == ["offline", "online", "retrained@40", "retrained"]
    assert {p.name.partition("_")[0] for p in (folder / "policies").iterdir()} == {"explorer", "exploiter"}
