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
from ooo_rl.data.runs.program import EVERYWHERE, RUNS, Compiled, mesh_for, place, scan_mean
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
        return Compiled(counted, mesh)

    state = compiled(script.init_state)(*((offline, keys) if script is ooo_iql else (keys,)))
    pretrain, act = (
        compiled(script.pretrain_chunk),
        compiled(script.explore_chunk if script is ooo_iql else script.finetune_chunk),
    )
    for _ in range(chunks):
        state, _ = pretrain(state, hyper, offline, length=5)
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
    ring = len(state.key) * CAPACITY * ROW_BYTES
    assert memory.temp_size_in_bytes < ring / 4
    assert memory.alias_size_in_bytes >= ring


def test_equal_chunks_are_traced_once_and_no_chunk_copies_the_buffer(ooo):
    check_program(*ooo)


def test_so_it_is_with_a_single_seed():
    """Whose program has no axis of runs."""
    check_program(*trained(iql, 1))


def test_four_devices_give_the_same_runs(ooo, tmp_path):
    """In a process of its own, since the number of CPU devices is fixed when JAX starts."""
    code = (
        "import sys, jax, json, numpy as np; from tests.test_program import ooo_iql, trained\n"
        "state, *_ = trained(ooo_iql, 4)\n"
        "spread = len(jax.tree.leaves(state.explorer)[0].sharding.device_set)\n"
        "np.savez(sys.argv[1], *map(np.asarray, jax.tree.leaves(state)))\n"
        "print(json.dumps([len(jax.devices()), spread]))"
    )
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "state.npz"],
        cwd=REPO, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [4, 4]
    with np.load(tmp_path / "state.npz") as file:
        theirs = [file[name] for name in file.files]
    for ours, other in zip(jax.tree.leaves(ooo[0]), theirs, strict=True):
        np.testing.assert_allclose(np.float64(ours), np.float64(other), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bad", [-1, 3])
def test_scan_mean(bad):
    def step(i):
        return i + 1, {"i": jnp.where(i == bad, jnp.nan, i.astype(float)), "square": (i**2).astype(float)}

    end, metrics = jax.jit(lambda: scan_mean(step, jnp.int32(0), 6))()
    assert end == 6
    assert metrics["nonfinite_at"] == bad
    np.testing.assert_allclose(metrics["square"], np.mean(np.arange(6) ** 2))
    assert np.isnan(metrics["i"]) == (bad >= 0)
