"""OOO(Cal-QL): its update against plain NumPy, what goes into batches, probes, and every switch once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import double
from test_cql import TRACED, Reference, check_update, make_cql
from test_sac import BATCH, random_rows, static_of

from ooo_rl import envs
from ooo_rl.algos import ooo_cal_ql
from ooo_rl.data.errors import UsageError
from ooo_rl.data.returns import with_returns
from ooo_rl.data.runs.settings import parse

KNOWN = {name: value for name, value in TRACED.items() if name != "backup_entropy"}
CASES = [({"lagrange": True}, (-np.inf, np.inf)), ({"importance_sampling": False}, (-0.8, 0.6))]


@pytest.mark.parametrize(("flags", "bounds"), CASES)
def test_update_of_ooo_cal_ql(flags, bounds):
    """The explorer's has a floor and a bonus; bounds do not cut the bonus."""
    static, agent, batch = make_cql(ooo_cal_ql, **flags)
    hyper, key, rng = ooo_cal_ql.Hyper(**KNOWN), jax.random.PRNGKey(5), np.random.default_rng(1)
    floor = np.where(rng.uniform(size=BATCH) < 0.7, rng.normal(1.0, 2.0, BATCH), -np.inf)
    bonus = rng.uniform(0, 3, BATCH)
    rows = with_returns(batch, np.float32(floor))
    update = jax.jit(partial(ooo_cal_ql.update, static, hyper))
    ours, metrics = update(agent, rows, np.float32(bonus), np.float32(bounds), key)
    before = double(agent)
    reference = Reference(static.args, hyper, before, double(batch), key, floor, True, bonus, bounds)
    check_update(reference, before, ours, metrics)
    np.testing.assert_allclose(metrics["bonus"], bonus.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["q"], reference.target.mean(), rtol=1e-4)


# --- what goes into a batch ---

ROWS, SLOTS, WORLDS = 40, 32, 4


def scene(traced=None, **changes):
    """(static, state, hyper, offline) of a tiny agent; 16 rows of the ring count as filled.

    Rewards: offline 0, but one 5; online 1; what is not filled 99.
    """
    sizes = {"batch_size": 16, "hidden": (4,), "critic_hidden": (4,), "num_samples": 2}
    steps = {"online_steps": SLOTS, "offline_steps": 10, "num_envs": WORLDS, "utd_ratio": 0.5}
    off = {"bound_q": False, "intrinsic": "none"}
    static = static_of(ooo_cal_ql, envs.make("probe-match-obs"), 1, 1, **sizes, **steps, **{**off, **changes})
    hyper, rng = ooo_cal_ql.Hyper(**{"discount": 0.0, **(traced or {})}), np.random.default_rng(0)

    def draw(n, reward):
        return random_rows(rng, n, 1, 1).replace(reward=np.float32(reward), discount=np.ones(n, np.float32))

    offline, uncut = draw(ROWS, np.eye(ROWS)[3] * 5), np.zeros(ROWS, bool)
    start = jax.jit(partial(ooo_cal_ql.init_state, static))
    state = start(hyper, offline, uncut, jax.random.PRNGKey(0))
    ring = draw(SLOTS, np.where(np.arange(SLOTS) < 16, 1, 99))
    ring = with_returns(ring, np.float32(rng.normal(size=SLOTS)))
    return static, state.replace(ring=ring), hyper, offline


def retrained(scene, length=1, **traced):
    """(state, metrics) after retraining, with each of the `traced` settings instead of the scene's."""
    static, state, hyper, offline = scene
    run = jax.jit(partial(ooo_cal_ql.retrain_chunk, static), static_argnames="length")
    run = partial(run, state, offline=offline, added=jnp.int32(16), length=length)
    return [jax.device_get(run(hyper=hyper.replace(**new))) for new in traced.values() or [{}]]


def test_shares_of_a_retraining_batch():
    """Without discount the mean target is the batch's mean reward."""

    def q(*arguments, **traced):
        return [float(metrics["q"]) for _, metrics in retrained(*arguments, **traced)]

    scaled = {"reward_scale": 2.0, "reward_bias": -3.0, "retrain_scale": 0.5, "retrain_bias": 0.25}
    best, online, rescaled = q(scene(upsample=1.0), plain={}, some={"upsample_from": 1.0}, scaled=scaled)
    assert best == 5.0 and 1.0 <= online < 5.0 and rescaled == 0.5 * (10 - 3) + 0.25
    assert q(scene(upsample=0.25, retrain_ratio=0.0)) == [0.75 * 1 + 0.25 * 5]
    assert q(scene(retrain_ratio=0.5))[0] in {0.5 + k * 5 / 16 for k in range(3)}
    alike = q(scene(), 200)[0]
    np.testing.assert_allclose(alike, (16 + 5) / (ROWS + 16), atol=0.06)  # of all rows that are filled


def test_bounds_are_those_of_the_rewards():
    """Critics beside themselves say thousands; no target leaves what the rewards allow.

    That is the highest reward, 0, and the lowest for ever, -5 / (1 - 0.5).
    """
    static, state, hyper, offline = scene({"discount": 0.5, "reward_bias": -5.0}, bound_q=True)
    run = jax.jit(partial(ooo_cal_ql.retrain_chunk, static), static_argnames="length")
    for shift, bound in ((100.0, 0.0), (-100.0, -10.0)):
        mad = jax.tree.map(lambda x, shift=shift: x + shift, state.exploiter.target_critic)
        mad = state.replace(exploiter=state.exploiter.replace(target_critic=mad))
        _, metrics = run(mad, hyper, offline, jnp.int32(16), length=1)
        assert metrics["q"] == bound, shift


def test_retraining_knows_no_floor_and_no_bonus_but_a_frozen_one():
    same = partial(jax.tree.map, np.testing.assert_array_equal)
    static, state, hyper, offline = scene({"discount": 0.9, "cql_weight": 1.0})
    run = jax.jit(partial(ooo_cal_ql.retrain_chunk, static), static_argnames="length")
    retrain = lambda state: run(state, hyper, offline, jnp.int32(16), length=3)  # noqa: E731
    ours, metrics = retrain(state)
    lifted = state.replace(
        ring=state.ring.replace(mc_return=np.full(SLOTS, 1e3, np.float32)),
        returns=state.returns.replace(offline=state.returns.offline + 1e3),
    )
    same(retrain(lifted)[0].exploiter, ours.exploiter)
    assert metrics["raised"] == 0 and metrics["bonus"] == 0
    same((ours.explorer, ours.rnd), (state.explorer, state.rnd))
    frozen = scene({"frozen_bonus_coef": 3.0}, frozen_bonus=True, intrinsic="rnd")
    ((after, metrics),) = retrained(frozen, 3)
    assert metrics["bonus"] > 0
    same(after.rnd, frozen[1].rnd)


def test_the_explorer_has_floors_and_a_bonus_that_learns_with_every_update():
    static, state, hyper, offline = scene({"discount": 0.9, "intrinsic_coef": 2.0}, intrinsic="rnd")
    pretrain = jax.jit(partial(ooo_cal_ql.pretrain_chunk, static), static_argnames="length")
    explore = jax.jit(partial(ooo_cal_ql.explore_chunk, static), static_argnames="length")
    start = state.rnd
    state, first = pretrain(state, hyper, offline, length=7)
    assert state.rnd.predictor.opt.count == 7 and first["bonus"] > 0 and 0 < first["raised"] <= 1
    later, metrics = explore(state, hyper, offline, jnp.int32(0), length=5)
    assert later.rnd.predictor.opt.count == 7 + 5 * 2
    assert later.explorer.critic.opt.count == 17 and later.exploiter.critic.opt.count == 0
    np.testing.assert_allclose(later.rnd.obs.count, 17 * 16, rtol=1e-4)
    pairs = zip(jax.tree.leaves(later.rnd.predictor.params), jax.tree.leaves(start.predictor.params))
    assert max(np.abs(a - b).max() for a, b in pairs) > 5e-4  # more than one Adam step of 1e-4
    jax.tree.map(np.testing.assert_array_equal, later.rnd.target, start.target)
    assert metrics["nonfinite_at"] == -1
    # Each of the probe's episodes is over at once.
    np.testing.assert_array_equal(later.ring.mc_return[:20], later.ring.reward[:20])
    # The bonus is over its deviation, not over the small number that keeps the division finite.
    assert np.sqrt(later.rnd.error.var) > 1e-2


# --- as a program ---

TINY = (
    "--env point-mass-wall --hidden 8 8 --critic-hidden 8 8 --num-seeds 2 --batch-size 16 --offline-steps 20 "
    "--online-steps 320 --num-envs 8 --utd-ratio 0.125 --num-samples 2 --eval-episodes 1 --eval-every 1000 "
    "--retrain-steps 20 --name it --runs-dir"
)
SWITCHES = (
    "--retrain-at 160 320 --frozen-bonus --warm-start --upsample 0.125 --retrain-ratio 0.5 --lagrange "
    "--retrain-critic-hidden 8 --mc-bootstrap worst --no-importance-sampling --rnd-variant code"
)


@pytest.mark.slow
def test_a_run_with_every_switch(tmp_path):
    flags = [*TINY.split(), str(tmp_path), *SWITCHES.split()]
    result = ooo_cal_ql.train(parse(ooo_cal_ql.Args, flags))
    assert set(result.results["phases"]) == {"offline", "online", "retrained@160", "retrained"}
    assert not result.results["failed"]
    names = {path.name for path in (result.folder / "policies").iterdir()}
    assert names == {f"{agent}_seed{k}.npz" for agent in ("explorer", "exploiter") for k in (0, 1)}
    critics = [result.agents[name].critic.params for name in ("explorer", "exploiter")]
    assert [len(jax.tree.leaves(critic)) // 2 for critic in critics] == [3, 2], "layers"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"retrain_ratio": 1.5}, "--retrain-ratio must be at most 1"),
        ({"retrain_ratio": 0.5, "retrain_at": (0, 48)}, "needs --retrain-ratio -1"),
        ({"retrain_critic_hidden": (8, 0)}, "--retrain-critic-hidden must be at least 1"),
        (
            {"retrain_critic_hidden": (8,), "sync_explorer": True, "retrain_at": (480,)},
            "--sync-explorer needs critics of one size",
        ),
        ({"mc_bootstrap": "worst", "discount": 1.0}, "--mc-bootstrap worst needs a --discount below 1"),
    ],
)
def test_settings_that_do_not_go_together(flags, message, tmp_path):
    """Refused before anything compiles and before a folder is made."""
    steps = {"offline_steps": 0, "dataset": "own"}
    args = ooo_cal_ql.Args(env="point-mass-wall", runs_dir=str(tmp_path), **steps, **flags)
    with pytest.raises(UsageError, match=message):
        ooo_cal_ql.train(args)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_rnd_has_two_hidden_layers_in_both_variants(variant):
    """Unlike OOO's other code, where the code's variant has one."""
    static = static_of(ooo_cal_ql, rnd_variant=variant)
    shapes = jax.eval_shape(partial(ooo_cal_ql.init_rnd, static), jax.random.PRNGKey(0))
    kernels = [layer["kernel"].shape for layer in shapes.target["params"].values()]
    assert kernels == [(3, 512), (512, 512), (512, 512)]
