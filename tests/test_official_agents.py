"""The reader of Off2OnRL's official agents: files that PyTorch wrote before version 1.6, read without it."""

import pathlib
import pickle
import struct
import sys
import types
import zlib
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent / "reproduction"))
import official_agents
import tables

from ooo_rl.algos import off2onrl
from ooo_rl.data import policy


class Rebuilt:
    """In a pickle it is PyTorch's call that makes a tensor of a storage."""

    def __init__(self, key, offset, shape, strides):
        self.given = Storage(key), offset, shape, strides, False, OrderedDict()

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.given


class Storage:
    def __init__(self, key):
        self.key = key


class Pickler(pickle.Pickler):
    def persistent_id(self, thing):
        kind = sys.modules["torch"].FloatStorage
        return ("storage", kind, thing.key, "cpu", 12, None) if isinstance(thing, Storage) else None


@pytest.fixture
def torch(monkeypatch):
    """As much of the package as its pickles name."""
    package, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    utils._rebuild_tensor_v2 = types.FunctionType((lambda *_: None).__code__, {}, "_rebuild_tensor_v2")
    utils._rebuild_tensor_v2.__module__, utils._rebuild_tensor_v2.__qualname__ = (
        "torch._utils",
        "_rebuild_tensor_v2",
    )
    package.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})
    monkeypatch.setitem(sys.modules, "torch", package)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)


def write(path, tensors, storages):
    with path.open("wb") as file:
        for mark in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(mark, file, protocol=2)
        Pickler(file, protocol=2).dump(tensors)
        pickle.dump(sorted(storages), file, protocol=2)
        for key in sorted(storages):
            file.write(struct.pack("<q", len(storages[key])) + storages[key].tobytes())


def test_tensors_are_views_of_their_storages(torch, tmp_path):
    a, b = np.arange(12, dtype=np.float32), np.arange(100, 103, dtype=np.float32)
    tensors = OrderedDict(
        w=Rebuilt("1", 0, (3, 4), (4, 1)), t=Rebuilt("1", 2, (2, 3), (1, 4)), b=Rebuilt("2", 0, (3,), (1,))
    )
    write(tmp_path / "it.pt", tensors, {"1": a, "2": b})
    found = official_agents.load(tmp_path / "it.pt")
    np.testing.assert_array_equal(found["w"], a.reshape(3, 4))
    np.testing.assert_array_equal(found["t"], [[2, 6, 10], [3, 7, 11]])
    np.testing.assert_array_equal(found["b"], b)


def test_a_pickle_that_would_call_something_else_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("called",)

    with (tmp_path / "it.pt").open("wb") as file:
        pickle.dump(Evil(), file, protocol=2)
    with pytest.raises(pickle.UnpicklingError, match=r"print is no part of a state_dict"):
        official_agents.load(tmp_path / "it.pt")


def test_the_networks_compute_what_theirs_do(monkeypatch, tmp_path):
    """Theirs are x W^T + b with ReLU between; a policy has heads of its own for mean and log deviation."""
    rng = np.random.default_rng(0)
    sizes = {"fc0": (8, 17), "fc1": (8, 8), "last_fc": (6, 8), "last_fc_log_std": (6, 8)}

    def arrays(path):
        own = np.random.default_rng(zlib.crc32(f"{path.parent.name}/{path.name}".encode()))
        of = sizes if "actor" in path.name else {"fc0": (8, 23), "fc1": (8, 8), "last_fc": (1, 8)}
        return {f"{n}.{part}": own.normal(size=shape if part == "weight" else shape[:1]).astype(np.float32) / 3
                for n, shape in of.items() for part in ("weight", "bias")}  # fmt: skip

    def mlp(arrays, x, last):
        for name in ("fc0", "fc1"):
            x = np.maximum(x @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"], 0)
        return x @ arrays[f"{last}.weight"].T + arrays[f"{last}.bias"]

    monkeypatch.setattr(official_agents, "load", arrays)
    actor, critic = official_agents.read(tmp_path)
    obs, action = rng.normal(size=(5, 17)).astype(np.float32), rng.uniform(-1, 1, (5, 6)).astype(np.float32)
    path = lambda member, part: tmp_path / official_agents.FILES.format(member, part)  # noqa: E731
    mean, log_std = jax.vmap(off2onrl.Actor((8, 8), 6).apply, (0, None))(actor, obs)
    q = jax.vmap(off2onrl.Critic((8, 8)).apply, (0, None, None))(critic, obs, action)
    for k, member in enumerate(official_agents.MEMBERS):
        of = arrays(path(member, "actor"))
        np.testing.assert_allclose(mean[k], mlp(of, obs, "last_fc"), atol=1e-5)
        np.testing.assert_allclose(log_std[k], np.clip(mlp(of, obs, "last_fc_log_std"), -20, 2), atol=1e-5)
        for j in (0, 1):
            theirs = mlp(arrays(path(member, f"critic{j + 1}")), np.concatenate([obs, action], 1), "last_fc")
            np.testing.assert_allclose(q[k, j], theirs[:, 0], atol=1e-5)
    saved = []
    monkeypatch.setattr(policy, "save", lambda path, policy, **_: saved.append(policy))
    monkeypatch.setattr(official_agents.library, "make", lambda *_: None)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "none"))
    official_agents.record(official_agents.Args(tmp_path, tmp_path), actor)
    noise, of = rng.normal(size=(5, 6)), arrays(path(0, "actor"))
    wanted = np.tanh(
        mlp(of, obs, "last_fc") + np.exp(np.clip(mlp(of, obs, "last_fc_log_std"), -20, 2)) * noise
    )
    np.testing.assert_allclose(policy.forward(saved[0], obs, noise, jnp), wanted, atol=1e-5)


def test_a_run_that_was_not_finished_is_not_taken_for_one_that_was(tmp_path):
    args = official_agents.Args(tmp_path, tmp_path)
    where = tables.Args("off2onrl", "halfcheetah-official", runs_dir=tmp_path)
    with pytest.raises(
        SystemExit, match="off2onrl-halfcheetah-official-pre is not there; make it first: python tests/"
    ):
        tables.carry_out(where, "off2onrl")
    folder = tables.folder_of(where, "pre")
    folder.mkdir(parents=True)
    with pytest.raises(SystemExit, match="was not finished; delete it first"):
        official_agents.make(args, "pre", {}, {})
    (folder / "result.json").touch()
    official_agents.make(args, "pre", {}, {})
    tables.carry_out(where, "pre")
