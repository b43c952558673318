"""AWAC: advantage-weighted actor-critic, offline and then fine-tuned online (Nair et al., arXiv 2006.09359).

The policy never climbs Q. It imitates the actions of the batch, and the better ones more: with weights that
go with exp(A / beta), where A = min Q(s, a) - V(s) and V(s) = min Q at an action of the policy itself. Two
critics are fitted to r + discount * min Q(s', a'), a' drawn from the policy. Fine-tuning goes on with the
same losses, on offline and online rows in one buffer, while the policy acts.

Departures. The paper divides exp(A / beta) by an unknown Z(s), and leaves it out; its code (rail-berkeley/
rlkit ac45a9d) takes the softmax of A / beta over the batch, times its size; so do we. Critics take their step
first, and the policy sees them, as in the paper's algorithm 1 and in jaxrl; rlkit takes all gradients before
any step. For the hands, rlkit clamps both critics at 0, which leaves an output above 0 without a gradient;
we clamp their target (`--target-max`). It also ignores terminations there; ours have none but in tasks named
`-ending`. Networks start orthogonal, their last layers small; rlkit's start uniform, their last layers small.

    python algos/awac.py
    python algos/awac.py --env hopper --dataset ooo/hopper/medium-v0
"""

from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from ooo_rl import envs
from ooo_rl.data import buffer, policy
from ooo_rl.data.buffer import Transition
from ooo_rl.data.learner import Learner, orthogonal
from ooo_rl.data.runs.bounds import Bounds, Fraction, Layers, NonNegative, Number, Positive, Size, Steps
from ooo_rl.data.runs.online_change import online_hyper, online_ratio
from ooo_rl.data.runs.session import Phase, Result, Session, Static, scan_mean, start_online
from ooo_rl.data.runs.settings import Experiment, Traced, launch


@struct.dataclass
class Hyper(Traced):
    """Settings that are traced, not compiled in: one value per run, so each can be swept in one program."""

    actor_lr: NonNegative = 3e-4
    """learning rate of the policy"""
    critic_lr: NonNegative = 3e-4
    """learning rate of the two critics"""
    target_rate: Fraction = 0.005
    """share of the critics that goes into their targets at each update"""
    beta: Positive = 2.0
    """temperature: weights go with exp(A / beta); a large one is behaviour cloning (the paper's lambda)"""
    max_advantage: Number = float("inf")
    """advantages are clipped to this before they are weighted"""
    target_max: Number = float("inf")
    """and the critics' target to this; 0 where no reward is above 0"""
    weight_decay: NonNegative = 1e-4
    """L2 penalty of the policy's parameters"""


@dataclass(frozen=True)
class Args(Experiment):
    """AWAC: train offline, then fine-tune online."""

    batch_size: Size = 1024
    """rows of a batch; weights are relative to it"""
    offline_ratio: Annotated[float, Bounds(at_most=1)] = -1.0
    """share of each online batch that comes from the offline rows; below 0: their share of all rows"""
    offline_steps: Steps = 50_000
    """gradient steps on the dataset"""
    online_steps: Steps = 500_000
    """environment steps of fine-tuning"""
    learning_starts: Steps = 1_000
    """of these, steps at the start that only fill the buffer, with no gradient steps"""
    value_action: Literal["sample", "mean"] = "sample"
    """the policy's action at which V is taken: a sample, or its mean"""
    hidden: Layers = (256, 256, 256, 256)
    """units of the policy's hidden layers"""
    critic_hidden: Layers = (256, 256)
    """units of the critics' hidden layers"""
    hyper: Hyper = Hyper()
    """traced settings, which --sweep can vary"""


# as in sac.py
class MLP(nn.Module):
    """Dense layers with ReLU, LayerNorm if asked; initialised orthogonally, the last layer small."""

    sizes: tuple[int, ...]
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x):
        for size in self.sizes[:-1]:
            x = nn.Dense(size, kernel_init=orthogonal(2**0.5))(x)
            x = nn.relu(nn.LayerNorm()(x) if self.layer_norm else x)
        return nn.Dense(self.sizes[-1], kernel_init=orthogonal(1e-2))(x)


def log_std_of(logits):
    """The log standard deviation, between -6 and 0: it begins at -3, a standard deviation of 0.05."""
    return -6.0 * nn.sigmoid(-logits)


class Actor(nn.Module):
    """Gaussian policy around tanh(mean), not squashed after sampling; one log_std for all states."""

    hidden: tuple[int, ...]
    action_size: int

    @nn.compact
    def __call__(self, obs):
        mean = nn.tanh(MLP((*self.hidden, self.action_size))(obs))
        return mean, log_std_of(self.param("log_std_logits", nn.initializers.zeros, (self.action_size,)))


# as in sac.py
class Critic(nn.Module):
    """`num` independent Q functions: [num, ...]."""

    hidden: tuple[int, ...]
    num: int = 2
    layer_norm: bool = False

    @nn.compact
    def __call__(self, obs, action):
        ensemble = nn.vmap(MLP, {"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=self.num)
        q = ensemble((*self.hidden, 1), self.layer_norm)(jnp.concatenate([obs, action], axis=-1))
        return q.squeeze(-1)


Nets = namedtuple("Nets", "actor critic")  # modules; their parameters are in the state


@struct.dataclass
class Agent:
    """One agent: what learns, each with its optimiser, and the critics' slow copy."""

    actor: Learner
    critic: Learner
    target_critic: dict


def init_agent(static: Static, key: jax.Array) -> Agent:
    nets, obs, action = static.nets, static.example.obs[None], static.example.action[None]
    actor_key, critic_key = jax.random.split(key)
    actor, critic = nets.actor.init(actor_key, obs), nets.critic.init(critic_key, obs, action)
    return Agent(Learner.create(actor), Learner.create(critic), jax.tree.map(jnp.copy, critic))


# as in pex.py
def act(nets: Nets, actor: dict, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Actions [..., A] for observations [..., obs]: the mean without a key; with one, a sample, not clipped.

    A policy that imitates clipped samples of its own loses its standard deviation.
    """
    mean, log_std = nets.actor.apply(actor, obs)
    return mean if key is None else mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)


def export(actor: dict) -> policy.Policy:
    """The policy as a file that NumPy can run."""
    log_std = log_std_of(actor["params"]["log_std_logits"])
    return policy.mlp(actor["params"]["MLP_0"], output="tanh_mean", log_std=log_std)


def critic_loss(params, nets, obs, action, target_q):
    """Squared Bellman error of both critics, summed over them: AWAC, algorithm 1."""
    q = nets.critic.apply(params, obs, action)
    return jnp.mean(jnp.sum((q - target_q) ** 2, axis=0))


def actor_loss(params, nets, obs, action, adv, beta, weight_decay):
    """Imitation of the batch's actions with weights softmax(adv / beta), and the penalty of parameters."""
    mean, log_std = nets.actor.apply(params, obs)
    log_prob = jax.scipy.stats.norm.logpdf(action, mean, jnp.exp(log_std)).sum(axis=-1)
    penalty = sum(jnp.sum(p**2) for p in jax.tree.leaves(params)) / 2
    return -jnp.sum(jax.nn.softmax(adv / beta) * log_prob) + weight_decay * penalty


def update(static: Static, hyper: Hyper, agent: Agent, batch: Transition, key: jax.Array):
    """One gradient step of the critics, then of the policy, which sees the new critics."""
    nets, rows, actor = static.nets, (batch.obs, batch.action), agent.actor.params
    next_key, value_key = jax.random.split(key)
    next_action = act(nets, actor, batch.next_obs, next_key)
    next_q = nets.critic.apply(agent.target_critic, batch.next_obs, next_action).min(axis=0)
    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = jnp.minimum(task_reward + hyper.discount * batch.discount * next_q, hyper.target_max)
    loss_q, critic = agent.critic.descend(critic_loss, hyper.critic_lr, nets, *rows, target_q)
    target_critic = optax.incremental_update(critic.params, agent.target_critic, hyper.target_rate)

    own = act(nets, actor, batch.obs, value_key if static.args.value_action == "sample" else None)
    q, v = (nets.critic.apply(critic.params, batch.obs, a).min(axis=0) for a in (batch.action, own))
    adv = jnp.minimum(q - v, hyper.max_advantage)
    given = nets, *rows, adv, hyper.beta, hyper.weight_decay
    loss_a, actor = agent.actor.descend(actor_loss, hyper.actor_lr, *given)

    metrics = {"critic_loss": loss_q, "actor_loss": loss_a, "q": target_q.mean(), "adv": (q - v).mean()}
    return Agent(actor, critic, target_critic), metrics


# as in iql.py
@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    agent: Agent
    env_state: envs.State | None
    ring: Transition | None
    key: jax.Array


# as in sac.py
def init_state(static: Static, key: jax.Array) -> State:
    key, agent_key, env_key = jax.random.split(key, 3)
    env_state, ring = start_online(static, env_key)
    return State(init_agent(static, agent_key), env_state, ring, key)


# as in sac.py
def sample_batches(offline: Transition | None, ring, added, ratio: float, shape: tuple, key) -> Transition:
    """Rows [*shape, ...] in batches of shape[-1], a share `ratio` of them offline; below 0: all alike."""
    num_old, num_new = buffer.size(offline), jnp.minimum(added, buffer.size(ring))
    (old_key, new_key), changes = jax.random.split(key), isinstance(ratio, jax.Array)
    if offline is None or ring is None or (not changes and ratio < 0):
        return buffer.take(offline, ring, jax.random.randint(old_key, shape, 0, num_old + num_new))
    *outer, rows = shape
    sizes = (rows, rows) if changes else (round(ratio * rows), rows - round(ratio * rows))
    old = jax.random.randint(old_key, (*outer, sizes[0]), 0, num_old)
    new = jax.random.randint(new_key, (*outer, sizes[1]), 0, num_new) + num_old
    if changes:  # so that no shape can follow from it
        return buffer.take(offline, ring, jnp.where(jnp.arange(rows) < jnp.round(ratio * rows), old, new))
    return buffer.take(offline, ring, jnp.concatenate([old, new], axis=-1))


# as in sac.py
def pretrain_chunk(static: Static, state: State, hyper: Hyper, offline: Transition, *, length: int):
    """`length` gradient steps on the offline rows."""

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        batch = sample_batches(offline, None, 0, 1.0, (static.args.batch_size,), sample_key)
        agent, metrics = update(static, hyper, state.agent, batch, update_key)
        return state.replace(agent=agent, key=key), metrics

    return scan_mean(step, state, length)


def finetune_chunk(static: Static, state: State, hyper: Hyper, offline, added, *, length: int, learns: bool):
    """`length` steps of all environments, gradient steps after each if it `learns` already.

    `added` [] online rows come before.
    """
    args, num_updates = static.args, round(static.args.num_envs * static.args.utd_ratio)

    def step(carry):
        state, added = carry
        now = online_hyper(args, hyper, added)
        key, act_key, reset_key, learn_key = jax.random.split(state.key, 4)
        obs = state.env_state.obs
        action = act(static.nets, state.agent.actor.params, obs, act_key)
        clipped = jnp.clip(action, -1.0, 1.0)  # for the environment alone
        env_state, reached = envs.step_all(static.env, state.env_state, clipped, reset_key)
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, rows, added, reached.info["broken"])
        added = added + args.num_envs

        state = state.replace(env_state=env_state, ring=ring, key=key)
        if not learns:
            return (state, added), envs.tally(reached)
        sample_key, update_key = jax.random.split(learn_key)
        shape, keys = (num_updates, args.batch_size), jax.random.split(update_key, num_updates)
        batches = sample_batches(offline, ring, added, online_ratio(args, added), shape, sample_key)
        one_step = lambda agent, xs: update(static, now, agent, *xs)  # noqa: E731
        agent, metrics = jax.lax.scan(one_step, state.agent, (batches, keys))
        metrics = jax.tree.map(jnp.mean, metrics) | envs.tally(reached)
        return (state.replace(agent=agent), added), metrics

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


def make_plan(args: Args) -> list[Phase]:
    """Pre-training, then fine-tuning, which begins with steps that only fill the buffer."""
    online = Phase("online", 0, args.online_steps, acts=True, idle=args.learning_starts)
    return [Phase("offline", 0, args.offline_steps), online]


def make_nets(session: Session) -> Nets:
    """The networks."""
    args = session.args
    return Nets(Actor(args.hidden, session.action_size), Critic(args.critic_hidden))


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("awac", args, make_plan)
    args, offline, hyper = session.args, session.offline, session.hyper
    nets, functions = make_nets(session), (init_state, pretrain_chunk, finetune_chunk)
    initialise, pretrain, finetune = session.compile(session.static(nets), *functions)
    state = session.begin(initialise(session.keys), partial(act, nets))

    for chunk in session.chunks():
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, length=chunk.iterations)
        else:
            how = {"length": chunk.iterations, "learns": chunk.learns}
            state, metrics = finetune(state, hyper, offline, chunk.collected, **how)
        session.after(chunk, metrics, state)

    return session.conclude(state, export, {"policy": state.agent})


# rlkit's settings: those for bodies are the defaults, those for the hands stand here. The point mass is ours.
# Rewards of tasks with a goal are -1 until it is reached, as in OOO's tables.
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), critic_hidden=(64, 64), actor_lr=1e-3, critic_lr=1e-3, target_rate=0.02,
        batch_size=256, offline_steps=6_000, online_steps=960_000, num_envs=48, utd_ratio=1 / 48,
        learning_starts=4_800),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    "probe": dict(
        hidden=(32, 32), critic_hidden=(32, 32), discount=0.9, actor_lr=3e-3, critic_lr=3e-3,
        target_rate=0.05, beta=0.05, batch_size=256, offline_steps=0, online_steps=3_000,
        learning_starts=160),
    ("halfcheetah-sparse", "ant-sparse"): dict(offline_steps=0),
    ("antmaze", "maze2d"): dict(reward_bias=-1),
    "kitchen": dict(reward_bias=-4, end_reward=4),
    ("door-binary", "pen-binary", "relocate-binary"): dict(
        hidden=(256, 256), beta=0.5, max_advantage=0.5, target_max=0, value_action="mean",
        offline_steps=25_000),
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
