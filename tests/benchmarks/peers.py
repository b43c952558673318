"""IQL's offline update of other projects, as each of them runs it, beside ours: one machine, one process.

The code of the others is yours to fetch, each into a folder; name the folders that you have:

    git clone https://github.com/nissymori/JAX-CORL && git clone https://github.com/EmptyJackson/unifloral
    git clone https://github.com/ikostrikov/implicit_q_learning && git clone https://github.com/tinkoff-ai/CORL
    python tests/benchmarks/peers.py --jax-corl JAX-CORL --unifloral unifloral --official implicit_q_learning \
        --corl CORL --json out.json

All have 17 observations, 6 actions, batches of 256 from the same 100,000 random rows, and two layers of 256
units. JAX-CORL calls a jitted function of 8 updates, unifloral a scan of 2,500. The official code and PyTorch
CORL take a batch and make one update a call. Repeats take turns, and the best of each counts.

What the others import for other purposes (d4rl, gym, wandb, ...) is replaced by empty modules. Where JAX has
changed since, the old name is put back. Of their distributions they use a density alone, which is written
here. Nothing of the update itself is changed.

Updates differ in work: `passes` counts forward passes of one network, where a gradient counts three. The
official order fits V first and then asks it again, twice. unifloral and CORL ask the old V once for both.
"""

import contextlib
import importlib.util
import inspect
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import core, linen
from rich.console import Console
from rich.table import Table
from throughput import ACTION, OBS, ROWS, Ours, machine

from ooo_rl.data.buffer import Transition
from ooo_rl.data.errors import UsageError, guarded

UNITS, BATCH = 256, 256
EMPTY = ("d4rl", "gym", "wandb", "omegaconf", "tqdm", "pyrallis", "distrax", "tensorflow_probability")
EMPTY += ("tensorflow_probability.substrates",)


@dataclass(frozen=True)
class Args:
    """IQL's update of other projects beside ours."""

    jax_corl: str = ""
    """folder of nissymori/JAX-CORL"""
    unifloral: str = ""
    """folder of EmptyJackson/unifloral"""
    official: str = ""
    """folder of ikostrikov/implicit_q_learning"""
    corl: str = ""
    """folder of tinkoff-ai/CORL, which needs PyTorch"""
    seconds: float = 2.0
    """least length of one measurement"""
    repeats: int = 4
    """measurements of each"""
    json: str = ""
    """write machine and all measurements to this file"""


class Normal:
    """A diagonal Gaussian: `loc` and `scale` [..., n]. With `event`, the last axis is one event."""

    event = False

    def __init__(self, loc: jax.Array, scale: jax.Array):
        self.loc, self.scale = loc, scale

    def log_prob(self, x: jax.Array) -> jax.Array:
        each = jax.scipy.stats.norm.logpdf(x, self.loc, self.scale)
        return each.sum(-1) if self.event else each


class MultivariateNormalDiag(Normal):
    event = True

    def __init__(self, loc: jax.Array, scale_diag: jax.Array):
        super().__init__(loc, scale_diag)


def lenient_jit(function: Callable, static_argnames: tuple[str, ...] = (), **more) -> Callable:
    """`jax.jit`, which once ignored names of arguments that the function does not have."""
    names = [name for name in static_argnames if name in inspect.signature(function).parameters]
    return strict_jit(function, static_argnames=names, **more)


strict_jit = jax.jit


@contextlib.contextmanager
def their_imports(folder: str) -> Iterator[None]:
    """While a project is imported: its folder on the path, and stand-ins for what the update does not use."""
    stand_ins = {name: mock.MagicMock() for name in EMPTY}
    distributions = SimpleNamespace(
        Normal=Normal, MultivariateNormalDiag=MultivariateNormalDiag, Distribution=Normal
    )
    vars(stand_ins["distrax"]).update(vars(distributions))
    stand_ins["tensorflow_probability.substrates"].jax.distributions = distributions
    stand_ins["omegaconf"].OmegaConf.from_cli.return_value = {}
    with (
        mock.patch.dict(sys.modules, stand_ins),
        mock.patch.object(sys, "path", [folder, *sys.path]),
        mock.patch.dict(os.environ),  # two of them set XLA_FLAGS for a GPU
        mock.patch.object(jax, "tree_multimap", jax.tree.map, create=True),
        mock.patch.object(jax, "jit", lenient_jit),
    ):
        yield


def load(folder: str, file: str) -> ModuleType:
    """The module `file` of a project in `folder`. Raises UsageError if it is not there."""
    path = pathlib.Path(folder).expanduser() / file
    if not path.is_file():
        raise UsageError(f"{folder}: there is no {file}, so this is not that project's folder")
    spec = importlib.util.spec_from_file_location(f"peer_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    with their_imports(str(path.parent.absolute())):
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return module


@dataclass
class Peer:
    """A project's update. call: makes `updates` of them, and returns what to wait for.

    passes: forward passes of one network in an update, a gradient counting three.
    """

    name: str
    call: Callable
    updates: int
    passes: int

    def measure(self, seconds: float) -> float:
        """Updates per second."""
        calls, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            for _ in range(max(256 // self.updates, 1)):  # a call may return before it is done
                result = self.call()
                calls += 1
            jax.block_until_ready(result)
        return calls * self.updates / (time.perf_counter() - began)


def ours(rows: Transition) -> Peer:
    """Two critics and two targets count double: 2 + 3 for V, then V twice, 3 for the policy, 6 for Q."""
    program = Ours(UNITS, 1, None, 2_500, rows)
    return Peer("ours", lambda: (program.call(), program.state)[1], program.updates_per_call, 16)


def jax_corl(folder: str, rows: Transition) -> Peer:
    """It asks the target critics twice, which XLA does once."""
    module = load(folder, "algos/iql.py")
    config = module.IQLConfig(layer_norm=False)
    data = module.Transition(
        *(jnp.asarray(x) for x in (rows.obs, rows.action, rows.reward, rows.next_obs)),
        dones=jnp.asarray(1 - rows.discount), dones_float=jnp.asarray(1 - rows.discount),
    )  # fmt: skip
    state = module.create_iql_train_state(
        jax.random.PRNGKey(0), data.observations[0], data.actions[0], config
    )
    update, key = jax.jit(module.IQL.update_n_times, static_argnums=3), jax.random.PRNGKey(1)

    def call():
        nonlocal state, key
        key, own = jax.random.split(key)
        state, _ = update(state, data, own, config)
        return state

    return Peer("JAX-CORL", call, config.n_jitted_updates, 16)


def unifloral(folder: str, rows: Transition) -> Peer:
    """It asks V for s once, in V's own gradient, and the old V for s'."""
    module = load(folder, "algorithms/iql.py")
    args = module.Args()
    names = (rows.obs, rows.action, rows.reward, rows.next_obs, 1 - rows.discount)
    data = module.Transition(*(jnp.asarray(x) for x in names))
    mean, std = data.obs.mean(axis=0), data.obs.std(axis=0)
    actor, q, value = (
        module.TanhGaussianActor(ACTION, mean, std),
        module.DualQNetwork(mean, std),
        module.StateValueFunction(mean, std),
    )
    obs, action, key = jnp.zeros(OBS), jnp.zeros(ACTION), jax.random.PRNGKey(0)
    make = lambda net, *inputs: module.create_train_state(args, key, net, inputs)  # noqa: E731
    state = module.AgentTrainState(
        make(actor, obs), make(q, obs, action), make(q, obs, action), make(value, obs)
    )
    step, carry = module.make_train_step(args, actor.apply, q.apply, value.apply, data), (key, state)

    def call():
        nonlocal carry
        carry, _ = jax.lax.scan(step, carry, None, args.eval_interval)
        return carry

    return Peer("unifloral", call, args.eval_interval, 15)


def official(folder: str, rows: Transition) -> Peer:
    """Batches come from NumPy, and metrics stay on the device, as its script leaves them between two logs."""
    data = load(folder, "dataset_utils.py").Dataset(
        rows.obs, rows.action, rows.reward, rows.discount, 1 - rows.discount, rows.next_obs, ROWS
    )
    init = linen.Module.init
    with mock.patch.object(linen.Module, "init", lambda *a, **k: core.freeze(init(*a, **k))):
        learner = load(folder, "learner.py").Learner(0, rows.obs[:1], rows.action[:1], max_steps=1_000_000)

    def call():
        learner.update(data.sample(BATCH))
        return learner.critic.params

    with mock.patch.object(jax, "tree_multimap", jax.tree.map, create=True):
        call()  # traces
    return Peer("implicit_q_learning", call, 1, 16)


def corl(folder: str, rows: Transition) -> Peer:
    """Not compiled, which is how it is run; losses go to the host at each update."""
    try:
        import torch
    except ImportError as error:
        raise UsageError(
            f"--corl {folder}: PyTorch cannot be imported ({error}); pip install torch"
        ) from None
    module = load(folder, "algorithms/offline/iql.py")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    buffer = module.ReplayBuffer(OBS, ACTION, ROWS, device)
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    values = rows.obs, rows.action, rows.reward, rows.next_obs, 1 - rows.discount
    buffer.load_d4rl_dataset(dict(zip(names, values)))
    nets = module.GaussianPolicy(OBS, ACTION, 1.0), module.TwinQ(OBS, ACTION), module.ValueFunction(OBS)
    parts = [part for net in nets for part in (net.to(device), torch.optim.Adam(net.parameters(), lr=3e-4))]
    learner = module.ImplicitQLearning(1.0, *parts, device=device)
    call = lambda: learner.train([part.to(device) for part in buffer.sample(BATCH)])["actor_loss"]  # noqa: E731
    return Peer(f"CORL (PyTorch {torch.__version__}, {device})", call, 1, 15)


def main() -> None:
    args, console = tyro.cli(Args), Console() if sys.stdout.isatty() else Console(width=120)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.uniform(-1, 1, shape).astype(np.float32)  # noqa: E731
    rows = Transition(
        draw(ROWS, OBS), draw(ROWS, ACTION), draw(ROWS), draw(ROWS, OBS), np.ones(ROWS, np.float32)
    )
    makers = {"jax_corl": jax_corl, "unifloral": unifloral, "official": official, "corl": corl}
    asked = {name: getattr(args, name) for name in makers if getattr(args, name)}
    peers = [ours(rows), *(makers[name](folder, rows) for name, folder in asked.items())]
    for peer in peers:
        jax.block_until_ready(peer.call())  # compiles
    rates: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for _ in range(args.repeats):
        for peer in peers:
            rates[peer.name].append(peer.measure(args.seconds))
    here, own = machine(), max(rates["ours"])
    table = Table(
        title=f"IQL, {UNITS} units, one seed; jax {here['jax']}, {here['cpu']}, {here['cores']} cores"
    )
    for name in ("project", "updates/s, best", "median", "ours / theirs", "passes", "passes/s"):
        table.add_column(name, justify="left" if name == "project" else "right")
    found = []
    for peer in peers:
        all_ = rates[peer.name]
        best, median = max(all_), statistics.median(all_)
        numbers = (
            f"{best:,.0f}",
            f"{median:,.0f}",
            f"{own / best:.2f}",
            peer.passes,
            f"{best * peer.passes:,.0f}",
        )
        table.add_row(peer.name, *map(str, numbers))
        found.append({"project": peer.name, "updates_per_second": all_, "passes": peer.passes})
    console.print(table)
    if missing := sorted(set(makers) - set(asked)):
        console.print(f"not measured, because no folder was named: {', '.join(missing)}", highlight=False)
    if args.json:
        command = " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
        result = {"command": command, "machine": here, "rows": found}
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    guarded(main)
