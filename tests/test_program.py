"""The compiled programs: one trace for equal chunks, no copy of the buffer, the same runs on any number of
devices.
"""

import dataclasses
import inspect
import json
import os
import pathlib
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ooo_rl import envs
from ooo_rl.algos import iql, ooo_iql
from ooo_rl.data.buffer import Transition
from ooo_rl.data.runs.program import EVERYWHERE, RUNS, Compiled, in_turn, mesh_for, place, scan_mean, traced
from ooo_rl.data.runs.session import Static
from ooo_rl.data.runs.sweep import grid

REPO = pathlib.Path(__file__).parents[1]
ROWS, CAPACITY = 64, 40_000
ROW_BYTES = 4 * (2 + 2 + 1 + 2 + 1)


def offline_rows():
    rng = np.random.default_rng(0)
    obs = np.float32(rng.uniform(0, 1, (ROWS, 2)))
    action = np.float32(rng.uniform(-1, 1, (ROWS, 2)))
    minus_one, one = np.full(ROWS, -1, np.float32), np.ones(ROWS, np.float32)
    return Transition(obs, action, minus_one, obs + 0.03 * action, one)


USUAL = {"xla_backend_optimization_level": 3}  # not that of conftest.py: only so does the last bit stay


def trained(script, num_seeds, chunks=3):
    """(state, the program that acts, its arguments, traces) after chunks of every phase of a tiny run."""
    fields = {f.name for f in dataclasses.fields(script.Args)}
    settings = {
        "env": "point-mass-wall", "num_seeds": num_seeds, "hidden": (8, 8), "batch_size": 16, "offline_steps": 10,
        "online_steps": CAPACITY, "num_envs": 4, "utd_ratio": 0.25, "retrain_steps": 10, "intrinsic": "count",
        "count_bins": (10, 3), "upsample": 0.125,
    }  # fmt: skip
    args = script.Args(**{k: v for k, v in settings.items() if k in fields})
    hyper, labels = grid(args)
    env, two, scalar = envs.make(args.env), jnp.zeros(2), jnp.float32(0)
    nets = script.make_nets(SimpleNamespace(args=args, env=env, obs_size=2, action_size=2))
    static = Static(args, env, Transition(two, two, scalar, two, scalar), nets)
    mesh = mesh_for(num_seeds)
    offline, hyper = place(offline_rows(), mesh, EVERYWHERE), place(hyper, mesh, RUNS)
    keys = place(jnp.stack([jax.random.PRNGKey(label.seed) for label in labels]), mesh, RUNS)
    traces = []

    def compiled(function):
        def counted(*arguments, **static_arguments):
            traces.append(function.__name__)
            return function(static, *arguments, **static_arguments)

        counted.__signature__ = inspect.signature(partial(function, static))
        return Compiled(counted, mesh, options=USUAL)

    state = compiled(script.init_state)(*((offline, keys) if script is ooo_iql else (keys,)))
    pretrain, act = (
        compiled(script.pretrain_chunk),
        compiled(script.explore_chunk if script is ooo_iql else script.finetune_chunk),
    )
    before = (0,) if "before" in inspect.signature(script.pretrain_chunk).parameters else ()
    for _ in range(chunks):
        state, _ = pretrain(state, hyper, offline, *before, length=5)
    for i in range(chunks):
        state, _ = act(state, hyper, offline, 40 * i, length=10)
    if script is ooo_iql:
        retrain = compiled(script.retrain_chunk)
        for _ in range(chunks):
            state, _ = retrain(state, hyper, offline, 40 * chunks, length=5)
    return state, act, (state, hyper, offline, 40 * chunks), traces


@pytest.fixture(scope="module")
def ooo():
    """Four seeds of OOO(IQL)."""
    return trained(ooo_iql, 4)


def check_program(state, act, arguments, traces):
    assert sorted(traces) == sorted(set(traces)), "a chunk of known length was traced again"
    memory = act.program(*arguments[:3], jnp.int32(arguments[3]), length=10).memory_analysis()
    places, one_run = len(state.key) // act.mesh.size, CAPACITY * ROW_BYTES  # of a device
    in_turn = one_run if places > 1 else 0  # the run whose turn it is
    assert memory.temp_size_in_bytes < places * one_run / 4 + in_turn
    assert memory.alias_size_in_bytes >= places * one_run


def test_equal_chunks_are_traced_once_and_no_chunk_copies_the_buffer(ooo):
    check_program(*ooo)


def test_a_part_of_a_state_is_made_without_the_rest():
    """A retraining begins with a new exploiter beside a ring for which there may be room once."""
    args = ooo_iql.Args(
        env="point-mass-wall", hidden=(8, 8), online_steps=CAPACITY, num_envs=4, intrinsic="none"
    )
    env, two, scalar = envs.make(args.env), jnp.zeros(2), jnp.float32(0)
    nets = ooo_iql.make_nets(SimpleNamespace(args=args, env=env, obs_size=2, action_size=2))
    static = Static(args, env, Transition(two, two, scalar, two, scalar), nets)
    mesh = mesh_for(2)
    keys = place(jnp.stack([jax.random.PRNGKey(k) for k in range(2)]), mesh, RUNS)
    start = Compiled(partial(ooo_iql.init_state, static), mesh)
    whole, part = start(None, keys), start(None, keys, only="exploiter")
    jax.tree.map(np.testing.assert_array_equal, part, whole.exploiter)
    for only, fits in (("", False), ("exploiter", True)):
        memory = start.program(None, keys, only=only).memory_analysis()
        needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
        assert (needed < CAPACITY * ROW_BYTES / 4) == fits


def test_so_it_is_with_a_single_seed():
    """Whose program has no axis of runs."""
    check_program(*trained(iql, 1))


def test_a_run_has_the_same_bits_on_any_number_of_devices_beside_any_others(ooo, tmp_path):
    """Three of the four runs, on two devices, where one place is left. In a process of its own, since the
    number of CPU devices is fixed when JAX starts.
    """
    code = (
        "import sys, jax, json, numpy as np; from tests.test_program import ooo_iql, trained\n"
        "from ooo_rl.algos import iql; from ooo_rl.data.runs.session import Session\n"
        "state, *_ = trained(ooo_iql, 3)\n"
        "spread = len(jax.tree.leaves(state.explorer)[0].sharding.device_set)\n"
        "np.savez(sys.argv[1], *map(np.asarray, jax.tree.leaves(state)))\n"
        "args = iql.Args(env='hopper', physics='mjx', dataset='none', offline_steps=0, num_seeds=2)\n"
        "print(json.dumps([len(jax.devices()), spread, Session('iql', args, iql.make_plan).mesh.size]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "state.npz"], cwd=REPO,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    devices, spread, with_mjx = json.loads(done.stdout.splitlines()[-1])
    assert (devices, spread, with_mjx) == (2, 2, 1)
    with np.load(tmp_path / "state.npz") as file:
        theirs = [file[name] for name in file.files]
    exact = jax.__version_info__ < (0, 11)  # newer XLAs may fuse a program for two devices otherwise
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
    for ours, other in zip(jax.tree.leaves(ooo[0]), theirs, strict=True):
        assert len(other) == 4, "places"
        np.testing.assert_allclose(ours[:3], other[:3], **tolerance)


@pytest.mark.parametrize("keeps_state", [False, True])
def test_in_turn_it_is_what_each_run_gives_alone(keeps_state):
    def function(state, scale, shared):
        return {"x": state["x"] * scale + shared}, state["x"].sum()

    states, scales = {"x": jnp.arange(6.0).reshape(3, 2)}, jnp.array([1.0, 2, 3])
    arguments, axes = (states, scales, jnp.float32(0.5)), (0, 0, None)
    after, sums = in_turn(function, axes, keeps_state)(*arguments)
    for r in range(3):
        new, total = function({"x": states["x"][r]}, scales[r], 0.5)
        np.testing.assert_array_equal(after["x"][r], new["x"])
        assert sums[r] == total
    alone = in_turn(lambda *a: function(*a)[0], axes, keeps_state)(*arguments)
    np.testing.assert_array_equal(alone["x"], after["x"])


def test_calls_of_the_host_are_seen_wherever_they_are():
    """And such a function takes all runs at once: one call of the host for all of them."""
    asked = []

    def host(x):
        asked.append(x.shape)
        return np.asarray(x)

    def calls(x):
        ask = partial(
            jax.pure_callback, host, jax.ShapeDtypeStruct((), jnp.float32), vmap_method="broadcast_all"
        )
        inner = lambda x, _: (jax.lax.cond(x > 1, ask, lambda x: x + 1, x), None)  # noqa: E731
        return jax.lax.scan(inner, x, None, 2)[0]

    for function, expected in ((calls, True), (lambda x: x + 1, False)):
        assert traced(function, (jnp.zeros(3),), (0,))[1] == expected
    np.testing.assert_array_equal(Compiled(calls, mesh_for(3, jax.devices()[:1]))(jnp.zeros(3)), [2, 2, 2])
    assert set(asked) == {(3,)}


def test_options_reach_the_compiler():
    """It refuses one that it does not know."""
    double = lambda x: 2 * x  # noqa: E731
    known = Compiled(double, mesh_for(1), options={"xla_cpu_enable_fast_math": False})
    assert known(jnp.ones(1)).tolist() == [2]
    with pytest.raises(Exception, match="xla_no_such_option"):
        Compiled(double, mesh_for(1), options={"xla_no_such_option": False})(jnp.ones(1))


@pytest.mark.parametrize("bad", [-1, 3])
def test_scan_mean(bad):
    def step(i):
        return i + 1, {"i": jnp.where(i == bad, jnp.nan, i.astype(float)), "square": (i**2).astype(float)}

    end, metrics = jax.jit(lambda: scan_mean(step, jnp.int32(0), 6))()
    assert end == 6
    assert metrics["nonfinite_at"] == bad
    np.testing.assert_allclose(metrics["square"], np.mean(np.arange(6) ** 2))
    assert np.isnan(metrics["i"]) == (bad >= 0)
