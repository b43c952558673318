"""TD3+BC: TD3 with one more term, which clones the data's actions (Fujimoto and Gu, arXiv 2106.06860).

It is TD3 on a dataset, with two changes. The policy climbs lambda * Q1(s, pi(s)) and stays near the data's
action a by the squared distance (pi(s) - a)^2. lambda = alpha / mean |Q1| makes the two comparable, whatever
the size of rewards. Second, observations are standardised with the mean and the standard deviation of the
dataset. Fine-tuning goes on with the same losses, on offline and online rows in one buffer, while the policy
acts with noise. This is the naive fine-tuning of GDE's paper (its Table 3).

Departures. The paper takes |Q| at the data's actions; its code (sfujim/TD3_BC 8791ad7) at the policy's, and
so do we. The code averages the distance over the dimensions of an action; so do we. An observation that never
varies in the data is shifted, not scaled: the code divides it by 0.001, and what moves online would then
arrive a thousand times as large. Networks start orthogonal. The policy's step is computed at every step, and
kept at some, as in td3.py. The paper is about data alone: the noise of acting online is TD3's, the budget of
250,000 environment steps GDE's.

    python algos/td3_bc.py
    python algos/td3_bc.py --env hopper --dataset ooo/hopper/medium-v0
"""

from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from ooo_rl import envs
from ooo_rl.data import buffer, policy
from ooo_rl.data.buffer import Transition
from ooo_rl.data.learner import Learner, orthogonal
from ooo_rl.data.runs.bounds import Bounds, Fraction, Layers, NonNegative, Steps, With
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
    """share of policy and critics that goes into their targets at each update"""
    alpha: NonNegative = 2.5
    """weight of Q, divided by its mean size, against cloning; 0 is behaviour cloning"""
    policy_every: Annotated[float, Bounds(at_least=1, whole=True)] = 2.0
    """gradient steps of the critics for each one of the policy and the targets"""
    exploration_noise: Annotated[NonNegative, With("online_steps")] = 0.1
    """standard deviation of the noise added to actions online"""
    target_noise: NonNegative = 0.2
    """and of that added to the target policy's actions"""
    target_noise_clip: NonNegative = 0.5
    """bound of the latter noise"""


@dataclass(frozen=True)
class Args(Experiment):
    """TD3+BC: train offline, then fine-tune online."""

    offline_ratio: Annotated[float, Bounds(at_most=1)] = -1.0
    """share of each online batch that comes from the offline rows; below 0: their share of all rows"""
    offline_steps: Steps = 1_000_000
    """gradient steps on the dataset"""
    online_steps: Steps = 250_000
    """environment steps of fine-tuning"""
    normalize_obs: bool = True
    """standardise observations with the dataset's mean and standard deviation"""
    hidden: Layers = (256, 256)
    """units of the policy's hidden layers"""
    critic_hidden: Layers = (256, 256)
    """units of the critics' hidden layers"""
    hyper: Hyper = Hyper()
    """traced settings, which --sweep can vary"""


# as in ooo_iql.py
class MLP(nn.Module):
    """Dense layers with ReLU between them, initialised orthogonally."""

    sizes: tuple[int, ...]
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        for size in self.sizes[:-1]:
            x = nn.relu(nn.Dense(size, kernel_init=orthogonal(2**0.5))(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x) if self.dropout else x
        return nn.Dense(self.sizes[-1], kernel_init=orthogonal(2**0.5))(x)


class Standardise(nn.Module):
    """Observations less `mean`, over `std`. Both lie beside the parameters, and no loss moves them.

    So they go where a network goes: into its target, a checkpoint, another run, a policy file.
    """

    @nn.compact
    def __call__(self, obs):
        mean = self.variable("statistics", "mean", jnp.zeros, obs.shape[-1])
        std = self.variable("statistics", "std", jnp.ones, obs.shape[-1])
        return (obs - jax.lax.stop_gradient(mean.value)) / jax.lax.stop_gradient(std.value)


class Actor(nn.Module):
    """Deterministic policy: actions [..., A]."""

    hidden: tuple[int, ...]
    action_size: int

    @nn.compact
    def __call__(self, obs):
        return nn.tanh(MLP((*self.hidden, self.action_size))(Standardise()(obs)))


class Critic(nn.Module):
    """Two independent Q functions: [2, B]."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        ensemble = nn.vmap(MLP, {"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
        rows = jnp.concatenate([Standardise()(obs), action], axis=-1)
        return ensemble((*self.hidden, 1))(rows).squeeze(-1)


Nets = namedtuple("Nets", "actor critic")  # modules; their parameters are in the state


@struct.dataclass
class Agent:
    """What learns, each with its optimiser, and slow copies of both."""

    actor: Learner
    critic: Learner
    target_actor: dict
    target_critic: dict


def statistics(offline: Transition) -> dict:
    """What `Standardise` holds: mean and standard deviation + 0.001 [D] of the rows' observations."""
    constant = (offline.obs == offline.obs[0]).all(axis=0)
    std = jnp.where(constant, 1.0, offline.obs.std(axis=0) + 1e-3)
    return {"Standardise_0": {"mean": offline.obs.mean(axis=0), "std": std}}


def init_agent(static: Static, offline: Transition | None, key: jax.Array) -> Agent:
    nets, obs, action = static.nets, static.example.obs[None], static.example.action[None]
    actor_key, critic_key = jax.random.split(key)
    actor, critic = nets.actor.init(actor_key, obs), nets.critic.init(critic_key, obs, action)
    if static.args.normalize_obs and offline is not None:
        actor, critic = ({**net, "statistics": statistics(offline)} for net in (actor, critic))
    targets = jax.tree.map(jnp.copy, (actor, critic))
    return Agent(Learner.create(actor), Learner.create(critic), *targets)


def act(nets: Nets, actor: dict, obs: jax.Array, key=None, noise=0.0, bound=jnp.inf) -> jax.Array:
    """Actions [..., A] for observations [..., obs]: the policy's own without a key; with one, noise is added.

    `noise` is its standard deviation, `bound` how far it reaches; the sum is clipped.
    """
    action = nets.actor.apply(actor, obs)
    if key is None:
        return action
    return jnp.clip(action + jnp.clip(noise * jax.random.normal(key, action.shape), -bound, bound), -1.0, 1.0)


def export(actor: dict) -> policy.Policy:
    """The policy without its noise as a file that NumPy can run, on observations as the environment gives."""
    scale = actor["statistics"]["Standardise_0"]
    return policy.mlp(actor["params"]["MLP_0"], obs_mean=scale["mean"], obs_std=scale["std"])


# as in td3.py
def critic_loss(params, nets, obs, action, target_q):
    """Squared Bellman error of both critics, summed over them: TD3, algorithm 1."""
    q = nets.critic.apply(params, obs, action)
    return jnp.mean(jnp.sum((q - target_q) ** 2, axis=0))


def actor_loss(params, nets, critic, obs, action, alpha):
    """-lambda * Q1 at the policy's actions, and their squared distance to the data's: equations (3) and (5).

    The second result is the distance alone.
    """
    own = nets.actor.apply(params, obs)
    q = nets.critic.apply(critic, obs, own)[0]
    weight = alpha / jax.lax.stop_gradient(jnp.abs(q).mean())
    cloning = jnp.mean((own - action) ** 2)
    return -weight * q.mean() + cloning, cloning


def update(static: Static, hyper: Hyper, agent: Agent, batch: Transition, key: jax.Array):
    """One gradient step of the critics and, when it is their turn, of policy and targets."""
    nets, rows, noise = static.nets, (batch.obs, batch.action), (hyper.target_noise, hyper.target_noise_clip)
    next_action = act(nets, agent.target_actor, batch.next_obs, key, *noise)
    next_q = nets.critic.apply(agent.target_critic, batch.next_obs, next_action).min(axis=0)
    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = task_reward + hyper.discount * batch.discount * next_q
    loss_q, critic = agent.critic.descend(critic_loss, hyper.critic_lr, nets, *rows, target_q)

    given = nets, critic.params, *rows, hyper.alpha
    (loss_a, cloning), actor = agent.actor.descend(actor_loss, hyper.actor_lr, *given, has_aux=True)
    targets = [
        {**old, "params": optax.incremental_update(new.params["params"], old["params"], hyper.target_rate)}
        for new, old in ((actor, agent.target_actor), (critic, agent.target_critic))
    ]

    # Taken at every step, kept at some: seeds that are vmapped would take both ways of a condition anyway.
    due = critic.opt.count % jnp.int32(hyper.policy_every) == 0
    moved, waiting = Agent(actor, critic, *targets), agent.replace(critic=critic)
    metrics = {"actor_loss": loss_a, "critic_loss": loss_q, "cloning_loss": cloning, "q": target_q.mean()}
    return jax.tree.map(partial(jnp.where, due), moved, waiting), metrics


# as in iql.py
@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    agent: Agent
    env_state: envs.State | None
    ring: Transition | None
    key: jax.Array


def init_state(static: Static, offline: Transition | None, key: jax.Array) -> State:
    key, agent_key, env_key = jax.random.split(key, 3)
    env_state, ring = start_online(static, env_key)
    return State(init_agent(static, offline, agent_key), env_state, ring, key)


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


def finetune_chunk(static: Static, state: State, hyper: Hyper, offline, added, *, length: int):
    """`length` steps of all environments, gradient steps after each; `added` [] online rows come before."""
    args, num_updates = static.args, round(static.args.num_envs * static.args.utd_ratio)

    def step(carry):
        state, added = carry
        now = online_hyper(args, hyper, added)
        key, act_key, reset_key, sample_key, update_key = jax.random.split(state.key, 5)
        obs = state.env_state.obs
        action = act(static.nets, state.agent.actor.params, obs, act_key, now.exploration_noise)
        env_state, reached = envs.step_all(static.env, state.env_state, action, reset_key)
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, rows, added, reached.info["broken"])
        added = added + args.num_envs

        shape, keys = (num_updates, args.batch_size), jax.random.split(update_key, num_updates)
        batches = sample_batches(offline, ring, added, online_ratio(args, added), shape, sample_key)
        one_step = lambda agent, xs: update(static, now, agent, *xs)  # noqa: E731
        agent, metrics = jax.lax.scan(one_step, state.agent, (batches, keys))
        metrics = jax.tree.map(jnp.mean, metrics) | envs.tally(reached)
        return (State(agent, env_state, ring, key), added), metrics

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


# as in iql.py
def make_plan(args: Args) -> list[Phase]:
    """Pre-training, then fine-tuning."""
    return [Phase("offline", 0, args.offline_steps), Phase("online", 0, args.online_steps, acts=True)]


# as in awac.py
def make_nets(session: Session) -> Nets:
    """The networks."""
    args = session.args
    return Nets(Actor(args.hidden, session.action_size), Critic(args.critic_hidden))


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("td3_bc", args, make_plan)
    args, offline, hyper = session.args, session.offline, session.hyper
    nets, functions = make_nets(session), (init_state, pretrain_chunk, finetune_chunk)
    initialise, pretrain, finetune = session.compile(session.static(nets), *functions)
    state = session.begin(initialise(offline, session.keys), partial(act, nets))

    for chunk in session.chunks():
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, length=chunk.iterations)
        else:
            state, metrics = finetune(state, hyper, offline, chunk.collected, length=chunk.iterations)
        session.after(chunk, metrics, state)

    return session.conclude(state, export, {"policy": state.agent})


# The official settings are the defaults, the same for all bodies. Those of the point mass are ours. Rewards
# of tasks with a goal are shifted as in OOO's tables: Q near 0 everywhere would leave cloning no weight.
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), critic_hidden=(64, 64), actor_lr=1e-3, critic_lr=1e-3, target_rate=0.02,
        offline_steps=6_000, online_steps=960_000, num_envs=48, utd_ratio=1 / 48),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    "probe": dict(
        hidden=(32, 32), critic_hidden=(32, 32), discount=0.9, actor_lr=3e-3, critic_lr=3e-3,
        target_rate=0.05, alpha=50, offline_steps=0, online_steps=3_000),
    ("halfcheetah-sparse", "ant-sparse"): dict(offline_steps=0),
    "antmaze": dict(reward_bias=-1),
    "maze2d": dict(reward_bias=-1, offline_steps=500_000),
    "kitchen": dict(reward_bias=-4, end_reward=4),
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
