"""The compiled programs: one trace for equal chunks, no copy of the buffer, and the same runs on any number of devices."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import iql, ooo_iql
from data import cli
from data.buffer import Transition
from data.program import EVERYWHERE, RUNS, Compiled, mesh_for, place, scan_mean

REPO = pathlib.Path(__file__).parents[1]
ROWS = 64


def offline_rows():
    rng = np.random.default_rng(0)
    obs = np.float32(rng.uniform(0, 1, (ROWS, 2)))
    action = np.float32(rng.uniform(-1, 1, (ROWS, 2)))
    return Transition(obs, action, np.full(ROWS, -1, np.float32), obs + 0.03 * action, np.ones(ROWS, np.float32))


def trained(script, num_seeds, capacity=800, chunks=2):
    """(state, programs) after offline, online and, for OOO, retraining chunks of a tiny run."""
    fields = {f.name for f in dataclasses.fields(script.Args)}
    settings = {
        "env": "point-mass-wall", "num_seeds": num_seeds, "hidden": (8, 8), "batch_size": 16, "offline_steps": 10,
        "online_steps": capacity, "num_envs": 4, "utd_ratio": 0.25, "retrain_steps": 10, "intrinsic": "count",
        "count_bins": (10, 3), "upsample": 0.125,
    }  # fmt: skip
    args = dataclasses.replace(script.Args(), **{k: v for k, v in settings.items() if k in fields})
    hyper, labels = cli.grid(args)
    mesh, offline = mesh_for(len(labels)), offline_rows()
    setup = script.make_setup(args, offline)
    offline, hyper = place(offline, mesh, EVERYWHERE), place(hyper, mesh, RUNS)
    keys = place(jnp.stack([jax.random.PRNGKey(label.seed) for label in labels]), mesh, RUNS)
    if script is ooo_iql:
        state = Compiled(partial(script.init_state, setup), mesh, shared=(0,))(offline, keys)
    else:
        state = Compiled(partial(script.init_state, setup), mesh)(keys)
    traces = []

    def counted(function):
        def wrapper(*arguments, **static):
            traces.append(function.__name__)
            return function(setup, *arguments, **static)

        return wrapper

    acting = script.explore_chunk if script is ooo_iql else script.finetune_chunk
    pretrain = Compiled(counted(script.pretrain_chunk), mesh, shared=(2,), donate=(0,))
    act = Compiled(counted(acting), mesh, shared=(2, 3), donate=(0,))
    for _ in range(chunks):
        state, _ = pretrain(state, hyper, offline, length=5)
    for i in range(chunks):
        state, _ = act(state, hyper, offline, 40 * i, length=10)
    if script is ooo_iql:
        retrain = Compiled(counted(script.retrain_chunk), mesh, shared=(2, 3), donate=(0,))
        for _ in range(chunks):
            state, _ = retrain(state, hyper, offline, 80, length=5)
    return state, act, (state, hyper, offline, 80), traces


@pytest.mark.parametrize(("script", "seeds"), [(iql, 1), (ooo_iql, 2)], ids=["iql", "ooo_iql"])
def test_equal_chunks_are_traced_once_and_no_chunk_copies_the_buffer(script, seeds):
    capacity = 40_000
    _, program, arguments, traces = trained(script, seeds, capacity=capacity, chunks=3)
    assert sorted(traces) == sorted(set(traces)), "a chunk of known length was traced again"
    memory = program.program(*arguments[:3], jnp.int32(80), length=10).memory_analysis()
    ring = seeds * capacity * 8 * 4  # bytes: 2 + 2 + 1 + 2 + 1 float32 per row
    assert memory.temp_size_in_bytes < ring / 4
    assert memory.alias_size_in_bytes >= ring


def test_four_devices_give_the_same_runs():
    """In a process of its own, since the number of CPU devices is fixed when JAX starts."""
    code = (
        "import jax, json, numpy as np; from tests.test_program import trained; from algos import ooo_iql\n"
        "state, *_ = trained(ooo_iql, 4)\n"
        "spread = len(jax.tree.leaves(state.explorer)[0].sharding.device_set)\n"
        "print(json.dumps([len(jax.devices()), spread, [np.asarray(x, np.float64).ravel().tolist() for x in jax.tree.leaves(state)]]))"
    )
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    devices, spread, leaves = json.loads(done.stdout.splitlines()[-1])
    assert (devices, spread) == (4, 4)
    here, *_ = trained(ooo_iql, 4)
    for ours, theirs in zip(jax.tree.leaves(here), leaves, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64).ravel(), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bad", [-1, 3])
def test_scan_mean(bad):
    def step(i):
        return i + 1, {"i": jnp.where(i == bad, jnp.nan, i.astype(float)), "square": (i**2).astype(float)}

    end, metrics = jax.jit(lambda: scan_mean(step, jnp.int32(0), 6))()
    assert end == 6
    assert metrics["nonfinite_at"] == bad
    np.testing.assert_allclose(metrics["square"], np.mean(np.arange(6) ** 2))
    assert np.isnan(metrics["i"]) == (bad >= 0)
