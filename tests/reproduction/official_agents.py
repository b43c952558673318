"""The CQL agents of Off2OnRL's official repository, as runs from which our online phase can start.

    git clone https://github.com/shlee94/Off2OnRL
    python tests/reproduction/official_agents.py --repo Off2OnRL
    python tests/reproduction/tables.py --comparison off2onrl --task halfcheetah-official

The repository has five agents, trained for a million steps on D4RL's halfcheetah-medium-v0. So this is the
paper's offline phase, which two cores cannot afford, before ours online. D4RL's file is not needed: the rows
are a million steps of the first agent's policy, sampled, with our recipe. The runs `pre` (all five agents)
and `pre_1` (the first one) hold the agents unchanged, the same ones for each seed, and their evaluation.
"""

import collections
import pathlib
import pickle
import struct
from dataclasses import dataclass

import jax
import numpy as np
import tables
import tyro

from ooo_rl.algos import off2onrl
from ooo_rl.data import policy
from ooo_rl.data.datasets.folder import datasets_root
from ooo_rl.data.learner import Learner
from ooo_rl.data.recipes import library

MEMBERS = (0, 4, 8, 12, 16)  # seeds in the names of the repository's folders
FILES = "rlkit/data/cql/halfcheetah-medium-v0_seed{}/{}_1000000.pt"
DATASET = "ooo/halfcheetah/official-v0"  # the name in the budget of the task halfcheetah-official
LOG_STD = (-20.0, 2.0)  # the bounds of theirs and ours
SHIFT = 1.0  # our policy takes 1 from its last layer's log standard deviation, and theirs does not


@dataclass(frozen=True)
class Args:
    """Makes the dataset and the two runs that the task halfcheetah-official begins with."""

    repo: pathlib.Path
    """a clone of github.com/shlee94/Off2OnRL"""
    runs_dir: pathlib.Path = pathlib.Path("runs")
    """where runs are kept"""
    seeds: int = 3
    """seeds, which all begin with the same agents"""
    transitions: int = 1_000_000
    """rows of the dataset"""


class Unpickler(pickle.Unpickler):
    """Reads PyTorch's file of a state_dict without PyTorch; it can make nothing else than its arrays."""

    def find_class(self, module: str, name: str):
        if name == "OrderedDict":
            return collections.OrderedDict
        if name.endswith("Storage"):
            return name
        if name == "_rebuild_tensor_v2":
            return lambda storage, offset, shape, strides, *_: (storage[2], offset, shape, strides)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a state_dict")

    def persistent_load(self, storage: tuple):
        return storage


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a state_dict by name, from a file that PyTorch wrote before version 1.6.

    Three pickles of marks come first, then the one of the names, then the keys of all storages, and then each
    storage: the number of its elements in 8 bytes, and the elements, here float32.
    """
    with path.open("rb") as file:
        *_, tensors, keys = (Unpickler(file).load() for _ in range(5))
        storages = {}
        for key in keys:
            (length,) = struct.unpack("<q", file.read(8))
            storages[key] = np.frombuffer(file.read(4 * length), np.float32)
    return {name: _strided(storages[key][offset:], shape, strides)
            for name, (key, offset, shape, strides) in tensors.items()}  # fmt: skip


def _strided(storage: np.ndarray, shape: tuple, strides: tuple) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(storage, shape, [4 * stride for stride in strides]).copy()


def layers(arrays: dict[str, np.ndarray], *last: str) -> dict[str, dict]:
    """The dense layers of one network as Flax names them; those called `last` are side by side at the end."""
    names = [("fc0",), ("fc1",), last]
    kernels = [np.concatenate([arrays[f"{n}.weight"].T for n in of], axis=1) for of in names]
    biases = [np.concatenate([arrays[f"{n}.bias"] for n in of]) for of in names]
    return {f"Dense_{i}": {"kernel": k, "bias": b} for i, (k, b) in enumerate(zip(kernels, biases))}


def stack(trees: list) -> dict:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def read(repo: pathlib.Path) -> tuple[dict, dict]:
    """(actor, critic) parameters of the five agents, as off2onrl.py has them: [5, ...], [5, 2, ...]."""
    actors, critics = [], []
    for member in MEMBERS:
        actor, *pair = (load(repo / FILES.format(member, part)) for part in ("actor", "critic1", "critic2"))
        actors.append(layers(actor, "last_fc", "last_fc_log_std"))
        actors[-1]["Dense_2"]["bias"][-6:] += SHIFT
        critics.append(stack([layers(critic, "last_fc") for critic in pair]))
    return {"params": {"MLP_0": stack(actors)}}, {"params": {"VmapMLP_0": stack(critics)}}


def record(args: Args, actor: dict) -> None:
    """Makes the dataset, by the first agent's policy, unless it is there."""
    if (datasets_root() / DATASET).exists():
        return
    path = args.runs_dir / "halfcheetah-official.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    first = jax.tree.map(lambda x: x[0], actor["params"]["MLP_0"])
    behaviour = policy.mlp(first, gaussian=(-SHIFT, *LOG_STD))
    policy.save(path, behaviour, algo="CQL", trained_on="halfcheetah-medium-v0", source="shlee94/Off2OnRL")
    library.make("ooo/halfcheetah/medium-v0", DATASET, args.transitions, 0, (str(path),))


def make(args: Args, run: str, actor: dict, critic: dict) -> None:
    """Makes the run `run`, unless it is there: one gradient step that moves nothing, and the evaluation."""
    where = tables.Args("off2onrl", "halfcheetah-official", runs_dir=args.runs_dir, seeds=args.seeds)
    folder = tables.folder_of(where, run)
    if (folder / "result.json").exists():
        return
    if folder.exists():
        raise SystemExit(f"error: {folder} was not finished; delete it first")
    own_init = off2onrl.init_agent

    def init_agent(static, key):
        fresh = own_init(static, key)
        ours, theirs = (jax.tree.map(np.shape, part) for part in
                        ((fresh.actor.params, fresh.critic.params), (actor, critic)))  # fmt: skip
        if ours != theirs:
            raise SystemExit(f"error: the agents in {args.repo} have the shapes {theirs}, not {ours}")
        parts = {"actor": Learner.create(actor), "critic": Learner.create(critic)}
        return fresh.replace(**parts, target_critic=critic)

    still = dict(actor_lr=0.0, critic_lr=0.0, alpha_lr=0.0)
    off2onrl.init_agent = init_agent
    try:
        off2onrl.train(off2onrl.Args(
            env="halfcheetah", dataset=DATASET, num_seeds=args.seeds, num_envs=1, offline_steps=1, online_steps=0,
            num_members=len(jax.tree.leaves(actor)[0]), batch_size=64, eval_episodes=10,
            runs_dir=str(args.runs_dir), name=tables.name_of(where, run), **still,
        ))  # fmt: skip
    finally:
        off2onrl.init_agent = own_init


def main() -> None:
    args = tyro.cli(Args)
    missing = [p for m in MEMBERS if not (p := args.repo / FILES.format(m, "actor")).is_file()]
    if missing:
        raise SystemExit(
            f"error: {missing[0]} is not there; --repo takes a clone of github.com/shlee94/Off2OnRL"
        )
    actor, critic = read(args.repo)
    record(args, actor)
    make(args, "pre", actor, critic)
    make(args, "pre_1", *(jax.tree.map(lambda x: x[:1], part) for part in (actor, critic)))


if __name__ == "__main__":
    main()
