"""Fitted Q evaluation (FQE, arXiv 1903.08738): what a fixed policy is worth, learnt from a dataset alone.

Q(s, a) is regressed on r + discount * Q'(s', a'), where a' is the policy's action at s', and Q' is a copy of
Q that is renewed from time to time. Each seed has a Q of its own, and nothing about it is pessimistic. It
says what the policy would collect, as far as the data show it; where they do not, Q is a guess. The defaults
are d3rlpy's settings.

    python data/runs/fqe.py --policy policy_seed0.npz --dataset ooo/hopper/medium-v0

From Python, `fitted_q(policy.load(file), library.load(dataset))` returns the values, and Q itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from ooo_rl.data import buffer, policy
from ooo_rl.data.buffer import Transition
from ooo_rl.data.datasets.validate import Dataset
from ooo_rl.data.errors import UsageError, guarded
from ooo_rl.data.learner import Learner, orthogonal
from ooo_rl.data.modes import check_jax, use_float32, usual_promotion
from ooo_rl.data.policy import Policy
from ooo_rl.data.recipes import library
from ooo_rl.data.runs.bounds import Bounds, Fraction, Layers, NonNegative, Number, Seed, Size, check_bounds

LOOKS = 10  # at the values, while Q learns


@dataclass(frozen=True)
class Settings:
    """How Q learns."""

    steps: Size = 100_000
    """gradient steps"""
    num_seeds: Size = 3
    """seeds, each with a Q of its own"""
    seed: Seed = 0
    """first seed"""
    discount: Annotated[float, Bounds(at_least=0, below=1)] = 0.99
    """discount factor"""
    reward_scale: Number = 1.0
    """rewards are multiplied by this"""
    reward_bias: Number = 0.0
    """and this is added"""
    lr: NonNegative = 1e-4
    """learning rate"""
    batch_size: Size = 100
    """rows of a batch"""
    target_every: Size = 100
    """gradient steps between renewals of Q'"""
    target_rate: Fraction = 1.0
    """share of Q that goes into Q' then"""
    hidden: Layers = (256, 256)
    """units of the hidden layers"""
    sample: bool = False
    """the policy's actions are samples, not its means"""


@dataclass(frozen=True)
class Args(Settings):
    """Fitted Q evaluation of a saved policy on a dataset."""

    policy: str = tyro.MISSING
    """the policy's .npz file"""
    dataset: str = tyro.MISSING
    """Minari id, or a .hdf5 or .npz file"""
    clip_actions: bool = False
    """clip dataset actions that lie outside [-1, 1] instead of refusing them"""
    action_low: Number = 0.0
    """smallest action in the dataset's file, which becomes -1; 0 with --action-high 0: as the file says"""
    action_high: Number = 0.0
    """largest action in the dataset's file, which becomes 1"""


class Evaluation(NamedTuple):
    """values: the mean of Q(s, pi(s)) over the first states of all episodes, for each seed [seeds].

    history: (gradient steps, values) at several points, the last one included.
    q: `q(obs, action)` gives the Q-values [seeds, B].
    """

    values: np.ndarray
    history: list[tuple[int, np.ndarray]]
    q: Callable


class Q(nn.Module):
    """A Q function: [...]."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        x = jnp.concatenate([obs, action], axis=-1)
        for size in self.hidden:
            x = nn.relu(nn.Dense(size, kernel_init=orthogonal(2**0.5))(x))
        return nn.Dense(1, kernel_init=orthogonal(1e-2))(x).squeeze(-1)


def loss(params, net, obs, action, target_q):
    """Squared Bellman error."""
    return jnp.mean((net.apply(params, obs, action) - target_q) ** 2)


def fitted_q(
    saved: Policy, data: Dataset, settings: Settings | None = None, report: Callable | None = None
) -> Evaluation:
    """The `Evaluation` of the policy `saved` (see `data.policy`) on the rows of `data`.

    `report(steps, values)` is called while Q learns. Raises UsageError if policy and data do not fit, or if a
    setting is out of its bounds.
    """
    settings = settings or Settings()
    check_bounds(settings)
    check_jax()
    if settings.seed + settings.num_seeds > 2**32:
        raise UsageError(f"--seed {settings.seed} with --num-seeds {settings.num_seeds} goes beyond 2^32 - 1")
    if settings.sample and not {"jax_sample", "log_std", "wS"} & saved.keys():
        raise UsageError("--sample: this policy has no standard deviation to sample with")
    if data.discrete or policy.is_discrete(saved):
        raise UsageError("fitted Q evaluation is for continuous actions: policy or data have discrete ones")
    rows = jax.tree.map(jnp.asarray, data.transitions)
    sizes = rows.obs.shape[1], rows.action.shape[1]
    if policy.policy_sizes(saved) != sizes:
        raise UsageError(
            f"{data.card['id']} has {sizes[0]} observations and {sizes[1]} actions, but the policy takes "
            f"{policy.policy_sizes(saved)[0]} and gives {policy.policy_sizes(saved)[1]}"
        )
    with usual_promotion():
        return _fit(saved, rows, _first_states(data), settings, report or (lambda *_: None))


def _first_states(data: Dataset) -> jax.Array:
    """The first observations [episodes, obs]; all of them where the rows are in no order."""
    if data.card.get("ordered") is False:
        return jnp.asarray(data.transitions.obs)
    first = np.flatnonzero(np.diff(data.episode, prepend=-1))
    return jnp.asarray(data.transitions.obs[first])


def _fit(
    saved: Policy, rows: Transition, starts: jax.Array, settings: Settings, report: Callable
) -> Evaluation:
    net, num_rows = Q(settings.hidden), buffer.size(rows)

    def act(obs, key):
        noise = jax.random.normal(key, (len(obs), rows.action.shape[1])) if settings.sample else None
        return policy.forward(saved, obs, noise, jnp)

    def start(key):
        key, init_key = jax.random.split(key)
        params = net.init(init_key, jnp.zeros((1, rows.obs.shape[1])), jnp.zeros((1, rows.action.shape[1])))
        return Learner.create(params), jax.tree.map(jnp.copy, params), key

    def step(rows, carry):
        learner, target, key = carry
        key, sample_key, act_key = jax.random.split(key, 3)
        batch = buffer.take(rows, None, jax.random.randint(sample_key, (settings.batch_size,), 0, num_rows))
        next_q = net.apply(target, batch.next_obs, act(batch.next_obs, act_key))
        reward = settings.reward_scale * batch.reward + settings.reward_bias
        target_q = reward + settings.discount * batch.discount * next_q
        _, learner = learner.descend(loss, settings.lr, net, batch.obs, batch.action, target_q)
        rate = settings.target_rate * (learner.opt.count % settings.target_every == 0)
        return learner, optax.incremental_update(learner.params, target, rate), key

    def chunk(state, rows, length):  # rows are an argument: what a program closes over is compiled into it
        steps = lambda one: jax.lax.fori_loop(0, length, lambda _, carry: step(rows, carry), one)  # noqa: E731
        return jax.vmap(steps)(state)

    def values(params, starts, actions):
        return jax.vmap(lambda own: net.apply(own, starts, actions).mean())(params)

    keys = jnp.stack([jax.random.PRNGKey(settings.seed + k) for k in range(settings.num_seeds)])
    state, history, done = jax.jit(jax.vmap(start))(keys), [], 0
    chunk, values = jax.jit(chunk, donate_argnums=0), jax.jit(values)
    actions = jax.jit(act)(starts, jax.random.PRNGKey(settings.seed))
    while done < settings.steps:
        length = min(-(-settings.steps // LOOKS), settings.steps - done)
        state, done = chunk(state, rows, length), done + length
        history.append((done, np.asarray(values(state[0].params, starts, actions))))
        report(*history[-1])
    params = state[0].params
    q = jax.jit(lambda obs, action: jax.vmap(partial(net.apply, obs=obs, action=action))(params))
    return Evaluation(history[-1][1], history, q)


def main() -> None:
    """The command-line program."""
    use_float32()
    args = tyro.cli(Args)
    try:
        saved = policy.load(args.policy)
    except ValueError as error:
        raise UsageError(f"--policy {error}") from None
    box = args.action_low, args.action_high
    data = library.load(args.dataset, clip_out_of_range=args.clip_actions, action_box=box)
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})

    heading = ["gradient steps, then the discounted return from the first states by each seed's Q"]

    def report(steps: int, values: np.ndarray) -> None:
        row = f"{steps:>9,}  " + "  ".join(f"{value:.4g}" for value in values)
        print(*heading, row, sep="\n", flush=True)
        heading.clear()  # it stands above the first row: what is refused leaves no empty table

    fitted_q(saved, data, settings, report)


if __name__ == "__main__":
    guarded(main)
