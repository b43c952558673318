"""OOO on RLPD: its update against plain NumPy, the probes through all phases, and what retraining sees and does not see."""

import csv
import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probing import PROBES, STEPS, Probing, random_data, settings, value_of_mean_action
from test_rlpd import BATCH, CRITICS, SETTINGS, SUBSET, check_update, make

from algos import ooo_rlpd
from data import buffer, cli
from data.buffer import Transition


@pytest.mark.parametrize("sizes", [(True, CRITICS, SUBSET), (False, 2, 2)], ids=["rlpd", "sac"])
@pytest.mark.parametrize("bounds", [(-np.inf, np.inf), (-0.5, 0.4)], ids=["free", "bounded"])
def test_update_of_ooo_rlpd(sizes, bounds):
    """One critic step, as in retraining, in which bounds hold the target of the task reward, but not the bonus."""
    nets, agent, batches, bonus = make(1, *sizes, script=ooo_rlpd)
    hyper, key = ooo_rlpd.Hyper(**SETTINGS), jax.random.PRNGKey(5)
    ours, metrics = jax.jit(lambda agent: ooo_rlpd.update(nets, hyper, agent, batches, bonus, bounds, key))(agent)
    check_update(nets, hyper, agent, batches, bonus, key, ours, metrics, bounds)


def probe(name, offline=None, **flags):
    hyper = {"alpha_lr": 3e-3, "entropy_per_action": -3.0, "backup_entropy": 0.0}
    small = {"ensemble": CRITICS, "target_subset": SUBSET, "policy_every": 2, "dataset": "none", "offline_steps": 0, "intrinsic": "none"}
    return Probing(ooo_rlpd, settings(ooo_rlpd, name, hyper, **{**small, "num_envs": 8, "utd_ratio": 0.25, **flags}), offline)


def value_of_exploiter(setup, agent, obs):
    return value_of_mean_action(setup._replace(nets=setup.exploiter), agent, obs)


@pytest.mark.parametrize("name", PROBES)
def test_online_and_retrained(name):
    """Without bonus the explorer solves the probe online, and the exploiter on the explorer's rows alone, here two critics only."""
    probing = probe(name, online_steps=8 * STEPS, random_steps=800, retrain_steps=STEPS, retrainer="sac")
    probing.run("explore", STEPS)
    probing.check(probing.state.explorer, value_of_mean_action)
    probing.run("retrain", STEPS)
    probing.check(probing.state.exploiter, value_of_exploiter)


@pytest.mark.parametrize("name", PROBES)
def test_purely_offline(name):
    probing = probe(name, random_data(name), online_steps=0, offline_steps=STEPS, retrain_steps=STEPS)
    probing.run("pretrain", STEPS)
    probing.check(probing.state.explorer, value_of_mean_action)
    probing.run("retrain", STEPS)
    probing.check(probing.state.exploiter, value_of_exploiter)
    assert buffer.size(probing.state.ring) == 0


def numbered(reward, obs=0.0):
    """Rows with these rewards."""
    reward = jnp.float32(reward)
    full = jnp.full((len(reward), 1), obs)
    return Transition(full, full, reward, full, jnp.ones_like(reward))


def what_retraining_sees(monkeypatch, offline, ring, added, hyper=None, **flags):
    """Each batch's rewards, bonus and bounds in 40 steps of retraining, in the place of its learning."""
    seen = []

    def record(nets, hyper, agent, batches, bonus, q_bounds, key):
        jax.debug.callback(lambda *x: seen.append([np.asarray(v) for v in x]), batches.reward[0], bonus[0], *q_bounds, ordered=True)
        return agent, {"q": batches.reward.mean()}

    monkeypatch.setattr(ooo_rlpd, "update", record)
    args = dataclasses.replace(ooo_rlpd.Args(), env="probe-match-obs", hidden=(4,), critic_hidden=(4,), num_envs=4, rnd_units=8, **flags)
    args = dataclasses.replace(args, online_steps=buffer.size(ring), utd_ratio=1.0, policy_every=4, batch_size=BATCH)
    setup = ooo_rlpd.make_setup(args, offline)
    state = ooo_rlpd.init_state(setup, jax.random.PRNGKey(0)).replace(ring=ring)
    hyper = (hyper or ooo_rlpd.Hyper()).replace(discount=0.9)
    jax.jit(lambda state, added: ooo_rlpd.retrain_chunk(setup, state, hyper, offline, added, length=40))(state, jnp.int32(added))
    jax.effects_barrier()
    rewards, bonus, low, high = (np.stack(x) for x in zip(*seen))
    return rewards, bonus, (float(low[0]), float(high[0])), (setup, state)


def test_retraining_sees_the_rows_until_then_alike(monkeypatch):
    """All offline and the first online rows, each as often; no bonus; bounds from these rows alone, after scale and bias."""
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
    """Two rows of the highest reward so far make up a quarter of each batch; a better one that comes later is not known yet."""
    offline, ring = numbered(np.zeros(1000)), numbered(np.float32([1, 0, 1, 0, 5, 5, 5, 5]))
    rewards, *_ = what_retraining_sees(monkeypatch, offline, ring, 4, upsample=0.25)
    assert set(rewards.ravel()) == {0, 1} and (rewards == 1).sum(axis=1).min() == BATCH // 4
    assert (rewards == 1).mean() < 0.27


def test_a_frozen_bonus_is_the_explorers(monkeypatch):
    hyper, ring = ooo_rlpd.Hyper(intrinsic_coef=3.0), numbered(np.zeros(8), obs=0.5)
    _, bonus, _, (setup, state) = what_retraining_sees(monkeypatch, None, ring, 8, hyper, frozen_bonus=True)
    expected = 3 * setup.bonus.reward(state.bonus, numbered(np.zeros(1), obs=0.5))
    assert expected > 0
    np.testing.assert_allclose(bonus, np.full(bonus.shape, expected), rtol=1e-4)


def test_the_exploiter_has_critics_of_its_own():
    args = dataclasses.replace(ooo_rlpd.Args(), env="probe-match-obs")
    like, sac = (ooo_rlpd.make_setup(dataclasses.replace(args, retrainer=kind), None) for kind in ("rlpd", "sac"))
    assert like.exploiter == like.nets == sac.nets
    assert (sac.exploiter.critic.num, sac.exploiter.target.num, sac.exploiter.critic.layer_norm) == (2, 2, False)
    for flags, words in (
        ({"target_subset": 11}, "--target-subset 11"),
        ({"utd_ratio": 1.0, "num_envs": 8}, "--policy-every 20 must divide"),
    ):
        with pytest.raises(cli.UsageError, match=words):
            ooo_rlpd.make_setup(dataclasses.replace(args, **flags), None)


TINY = (
    "--env point-mass-wall --num-seeds 2 --hidden 8 --critic-hidden 8 --batch-size 16 --ensemble 3 --num-envs 4 --utd-ratio 1 "
    "--policy-every 2 --offline-steps 8 --online-steps 80 --random-steps 16 --retrain-at 40 80 --retrain-steps 8 --retrainer sac "
    "--eval-episodes 1 --rnd-units 16 --name it"
)


@pytest.mark.parametrize("warm", [False, True], ids=["scratch", "warm"])
def test_each_retraining_begins_anew_unless_warm(monkeypatch, tmp_path, warm):
    """A run through all phases. From scratch both retrainings begin with the same alpha; warm, the second one with the first one's last."""
    flags = [*TINY.split(), "--runs-dir", str(tmp_path), *(["--warm-start"] if warm else [])]
    monkeypatch.setattr(sys, "argv", ["ooo_rlpd.py", *flags, "--eval-every", "4"])
    cli.guarded(ooo_rlpd.main)
    folder = tmp_path / "ooo_rlpd" / "point-mass-wall" / "it"
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    value = {(r["phase"], int(r["step"]), r["seed"], r["metric"]): float(r["value"]) for r in rows}
    first, second = (value[phase, 4, "0", "alpha"] for phase in ("retrained@40", "retrained"))
    assert (second < value["retrained@40", 8, "0", "alpha"]) == warm and (abs(first - second) < 1e-4) == (not warm)
    assert value["online", 80, "0", "bonus"] > 0 and value["offline", 8, "0", "bonus"] > 0 == value["retrained", 8, "0", "bonus"]
    assert list(json.loads((folder / "result.json").read_text())["phases"]) == ["offline", "online", "retrained", "retrained@40"]
    assert {p.name.partition("_")[0] for p in (folder / "policies").iterdir()} == {"explorer", "exploiter"}
