"""OOO(Cal-QL): its update against plain NumPy, what goes into the batches of each phase, its parts on the probes, and every switch once."""

import dataclasses
import json
import os
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import double
from probing import PROBES, STEPS, Probing, random_data, settings, value_of_mean_action
from test_cql import SETTINGS, Reference, check_update, make

from algos import ooo_cal_ql
from data import cli
from data.buffer import Transition

KNOWN = {name: value for name, value in SETTINGS.items() if name != "backup_entropy"}


@pytest.mark.parametrize(("flags", "bounds"), [({"lagrange": True}, (-np.inf, np.inf)), ({"importance_sampling": False}, (-0.8, 0.6))])
def test_update_of_ooo_cal_ql(flags, bounds):
    """The explorer's has a floor and a bonus; that bounds do not cut the bonus."""
    args, nets, agent, batch = make(ooo_cal_ql, **flags)
    hyper, key, rng = ooo_cal_ql.Hyper(**KNOWN), jax.random.PRNGKey(5), np.random.default_rng(1)
    floor, bonus = (
        np.where(rng.uniform(size=len(batch.reward)) < 0.7, rng.normal(1.0, 2.0, len(batch.reward)), -np.inf),
        rng.uniform(0, 3, 16),
    )
    rows = ooo_cal_ql.with_returns(batch, np.float32(floor))
    ours, metrics = jax.jit(lambda agent: ooo_cal_ql.update(args, nets, hyper, agent, rows, np.float32(bonus), bounds, key))(agent)
    before = double(agent)
    reference = Reference(args, hyper, before, double(batch), key, floor, True, bonus, bounds)
    check_update(reference, before, ours, metrics)
    np.testing.assert_allclose(metrics["bonus"], bonus.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["q"], reference.target.mean(), rtol=1e-4)


# --- what goes into a batch ---

ROWS, SLOTS, WORLDS = 40, 32, 4


def scene(traced=None, **changes):
    """(setup, state, hyper, offline) of a tiny agent; 16 rows of the ring count as filled. Rewards: offline 0, one 5; online 1; else 99."""
    hyper = ooo_cal_ql.Hyper(**{"discount": 0.0, **(traced or {})})
    args = dataclasses.replace(
        ooo_cal_ql.Args(), env="probe-match-obs", online_steps=SLOTS, offline_steps=10, num_envs=WORLDS, utd_ratio=0.5, batch_size=16,
        hidden=(4,), critic_hidden=(4,), num_samples=2, hyper=hyper, **{"bound_q": False, "intrinsic": "none", **changes},
    )  # fmt: skip
    setup, rng = ooo_cal_ql.make_setup(args, None), np.random.default_rng(0)
    draw = lambda n, reward: Transition(  # noqa: E731
        np.float32(rng.normal(size=(n, 1))), np.float32(rng.uniform(-1, 1, (n, 1))), np.float32(reward),
        np.float32(rng.normal(size=(n, 1))), np.ones(n, np.float32),
    )  # fmt: skip
    offline = draw(ROWS, np.eye(ROWS)[3] * 5)
    state = jax.jit(partial(ooo_cal_ql.init_state, setup))(hyper, offline, np.zeros(ROWS, bool), jax.random.PRNGKey(0))
    ring = ooo_cal_ql.with_returns(draw(SLOTS, np.where(np.arange(SLOTS) < 16, 1, 99)), np.float32(rng.normal(size=SLOTS)))
    return setup, state.replace(ring=ring), hyper, offline


def retrained(scene, length=1, **traced):
    """(state, metrics) after retraining, with each of the `traced` settings instead of the scene's."""
    setup, state, hyper, offline = scene
    run = jax.jit(partial(ooo_cal_ql.retrain_chunk, setup), static_argnames="length")
    return [jax.device_get(run(state, hyper.replace(**new), offline, jnp.int32(16), length=length)) for new in traced.values() or [{}]]


def test_shares_of_a_retraining_batch():
    """Without discount the mean target is the batch's mean reward."""
    q = lambda *arguments, **traced: [float(metrics["q"]) for _, metrics in retrained(*arguments, **traced)]  # noqa: E731
    scaled = {"reward_scale": 2.0, "reward_bias": -3.0, "retrain_scale": 0.5, "retrain_bias": 0.25}
    best, online, rescaled = q(scene(upsample=1.0), plain={}, some={"upsample_from": 1.0}, scaled=scaled)
    assert best == 5.0 and 1.0 <= online < 5.0 and rescaled == 0.5 * (10 - 3) + 0.25
    assert q(scene(upsample=0.25, retrain_ratio=0.0)) == [0.75 * 1 + 0.25 * 5]
    assert q(scene(retrain_ratio=0.5))[0] in {0.5 + k * 5 / 16 for k in range(3)}
    alike = q(scene(), 200)[0]
    np.testing.assert_allclose(alike, (16 + 5) / (ROWS + 16), atol=0.06)  # of all rows, and of none that is not filled


def test_bounds_are_those_of_the_rewards():
    """Critics beside themselves say thousands; no target is above the highest reward, 0, or below the lowest for ever, -5 / (1 - 0.5)."""
    setup, state, hyper, offline = scene({"discount": 0.5, "reward_bias": -5.0}, bound_q=True)
    for shift, bound in ((100.0, 0.0), (-100.0, -10.0)):
        mad = jax.tree.map(lambda x, shift=shift: x + shift, state.exploiter.target_critic)
        mad = state.replace(exploiter=state.exploiter.replace(target_critic=mad))
        ((_, metrics),) = retrained((setup, mad, hyper, offline))
        assert metrics["q"] == bound, shift


def test_retraining_knows_no_floor_and_no_bonus_but_a_frozen_one():
    setup, state, hyper, offline = scene({"discount": 0.9, "cql_weight": 1.0})
    ((ours, metrics),) = retrained((setup, state, hyper, offline), 3)
    lifted = state.replace(ring=state.ring.replace(mc_return=np.full(SLOTS, 1e3, np.float32)), offline_return=state.offline_return + 1e3)
    jax.tree.map(np.testing.assert_array_equal, retrained((setup, lifted, hyper, offline), 3)[0][0].exploiter, ours.exploiter)
    assert metrics["raised"] == 0 and metrics["bonus"] == 0
    for name in ("explorer", "bonus"):
        jax.tree.map(np.testing.assert_array_equal, getattr(ours, name), getattr(state, name))
    frozen = scene({"frozen_bonus_coef": 3.0}, frozen_bonus=True, intrinsic="rnd")
    ((after, metrics),) = retrained(frozen, 3)
    assert metrics["bonus"] > 0
    jax.tree.map(np.testing.assert_array_equal, after.bonus, frozen[1].bonus)


def test_the_explorer_has_floors_and_a_bonus_that_learns_with_every_update():
    setup, state, hyper, offline = scene({"discount": 0.9, "intrinsic_coef": 2.0}, intrinsic="rnd")
    pretrain = jax.jit(partial(ooo_cal_ql.pretrain_chunk, setup), static_argnames="length")
    explore = jax.jit(partial(ooo_cal_ql.explore_chunk, setup), static_argnames="length")
    start = state.bonus
    state, first = pretrain(state, hyper, offline, length=7)
    assert state.bonus.opt.count == 7 and first["bonus"] > 0 and 0 < first["raised"] <= 1
    later, metrics = explore(state, hyper, offline, jnp.int32(0), length=5)
    assert later.bonus.opt.count == 7 + 5 * 2 and later.explorer.critic_opt.count == 17 and later.exploiter.critic_opt.count == 0
    np.testing.assert_allclose(later.bonus.obs.count, 17 * 16, rtol=1e-4)
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(later.bonus.predictor), jax.tree.leaves(start.predictor))]
    assert max(moved) > 5e-4  # more than one Adam step of 1e-4
    jax.tree.map(np.testing.assert_array_equal, later.bonus.target, start.target)
    assert np.isfinite(later.ring.mc_return[:20]).all() and metrics["nonfinite_at"] == -1  # each of the probe's episodes is over at once
    np.testing.assert_array_equal(later.ring.mc_return[:20], later.ring.reward[:20])
    # The bonus is over its deviation, not over the small number that keeps the division finite.
    assert np.sqrt(later.bonus.error.var) > 1e-2


# --- what it learns ---


class Script:
    """ooo_cal_ql as Probing knows scripts: no episode of its data was cut off."""

    def __getattr__(self, name):
        return getattr(ooo_cal_ql, name)

    @staticmethod
    def init_state(setup, hyper, offline, key):
        return ooo_cal_ql.init_state(setup, hyper, offline, offline and jnp.zeros(len(offline.reward)), key)


PROBE = {"alpha_lr": 3e-3, "entropy_per_action": -3.0, "cql_weight": 0.01}
COMMON = {"num_samples": 2, "max_target_backup": False, "intrinsic": "none", "retrain_steps": STEPS}


@pytest.mark.parametrize("name", PROBES)
def test_ooo_cal_ql_offline(name):
    """The explorer on the data, then the exploiter."""
    probing = Probing(Script(), settings(ooo_cal_ql, name, PROBE, online_steps=0, offline_steps=STEPS, **COMMON), random_data(name))
    probing.run("pretrain", STEPS)
    probing.check(probing.state.explorer, value_of_mean_action)
    probing.run("retrain", STEPS)
    probing.check(probing.state.exploiter, value_of_mean_action)


@pytest.mark.parametrize("name", PROBES)
def test_ooo_cal_ql_online(name):
    """The explorer solves the probe online, the exploiter on the explorer's rows alone."""
    online = {"online_steps": 8 * STEPS, "offline_steps": 0, "num_envs": 8, "utd_ratio": 0.125}
    probing = Probing(Script(), settings(ooo_cal_ql, name, PROBE, **online, **COMMON))
    probing.run("explore", STEPS)
    probing.check(probing.state.explorer, value_of_mean_action)
    probing.run("retrain", STEPS)
    probing.check(probing.state.exploiter, value_of_mean_action)


# --- as a program ---

TINY = (
    "--env point-mass-wall --hidden 8 8 --critic-hidden 8 8 --num-seeds 2 --batch-size 16 --offline-steps 20 --online-steps 320 "
    "--num-envs 8 --utd-ratio 0.125 --num-samples 2 --eval-episodes 1 --eval-every 1000 --retrain-steps 20"
)


def run(runs_dir, *flags):
    with pytest.MonkeyPatch.context() as patch:
        if "MINARI_DATASETS_PATH" not in os.environ:
            patch.setenv("MINARI_DATASETS_PATH", str(runs_dir / "minari"))
        patch.setattr(sys, "argv", ["script", *TINY.split(), *flags, "--name", "it", "--runs-dir", str(runs_dir)])
        ooo_cal_ql.main()
    return runs_dir / "ooo_cal_ql" / "point-mass-wall" / "it"


def test_a_run_with_every_switch(tmp_path):
    flags = "--retrain-at 160 320 --frozen-bonus --warm-start --upsample 0.125 --retrain-ratio 0.5 --retrain-critic-hidden 8"
    folder = run(tmp_path, *flags.split(), "--lagrange", "--mc-bootstrap", "worst", "--no-importance-sampling", "--rnd-variant", "code")
    result = json.loads((folder / "result.json").read_text())
    assert set(result["phases"]) == {"offline", "online", "retrained@160", "retrained"} and not result["failed"]
    names = {path.name for path in (folder / "policies").iterdir()}
    assert names == {f"{agent}_seed{k}.npz" for agent in ("explorer", "exploiter") for k in (0, 1)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"retrain_ratio": 1.5}, "share, at most 1"),
        ({"retrain_ratio": 0.5, "retrain_at": (0, 8)}, "needs -1"),
        ({"retrain_critic_hidden": (8, 0)}, "must be positive"),
        ({"retrain_critic_hidden": (8,), "sync_explorer": True}, "with --sync-explorer"),
    ],
)
def test_settings_that_do_not_go_together(flags, message):
    args = dataclasses.replace(ooo_cal_ql.Args(), env="point-mass-wall", **flags)
    with pytest.raises(cli.UsageError, match=message):
        ooo_cal_ql.make_setup(args, None)
