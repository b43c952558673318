"""BCQ: batch-constrained Q-learning (Fujimoto et al., arXiv 1812.02900), and BCQ-ft, which goes on online.

Values of actions that no data show cannot be trusted. So BCQ chooses among actions that the data could show:

- A conditional VAE learns which actions the data have at a state. Its decoder makes candidates from latents.
- A small network moves each candidate by at most phi, towards more Q.
- The policy takes the candidate whose first Q is the largest. There is no network for the action itself.
- The target takes the best of ten candidates at s', by 0.75 of the lesser of two Qs and 0.25 of the larger.

BCQ-ft is the same losses on offline and online rows in one buffer: a baseline of Off2OnRL's paper. Online
the policy draws new latents at each step, as in the official code. Evaluation always takes the same ones, so
that the policy is a function of the state.

Departures from the official code (sfujim/BCQ 4876f7e): networks start orthogonal, their last layers small.
Online, of which the paper has nothing and Off2OnRL's paper no details: no noise beside that of the latents.

    python algos/bcq.py
    python algos/bcq.py --env hopper --dataset ooo/hopper/medium-v0
"""

from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from ooo_rl import envs
from ooo_rl.data import buffer, policy
from ooo_rl.data.buffer import Transition
from ooo_rl.data.learner import Learner, orthogonal
from ooo_rl.data.runs.bounds import Bounds, Fraction, Layers, NonNegative, Size, Steps
from ooo_rl.data.runs.online_change import online_hyper, online_ratio
from ooo_rl.data.runs.session import Phase, Result, Session, Static, scan_mean, start_online
from ooo_rl.data.runs.settings import Experiment, Traced, launch


@struct.dataclass
class Hyper(Traced):
    """Settings that are traced, not compiled in: one value per run, so each can be swept in one program."""

    actor_lr: NonNegative = 1e-3
    """learning rate of the network that moves candidates"""
    critic_lr: NonNegative = 1e-3
    """learning rate of the two critics"""
    vae_lr: NonNegative = 1e-3
    """learning rate of the VAE"""
    target_rate: Fraction = 0.005
    """share of both networks that goes into their targets at each update"""
    phi: NonNegative = 0.05
    """how far a candidate is moved at most, in each dimension of the action"""
    least_weight: Fraction = 0.75
    """lambda: weight of the lesser of two Qs in the target, the rest being the larger's"""


@dataclass(frozen=True)
class Args(Experiment):
    """BCQ: learn offline, and go on online with the same losses."""

    batch_size: Size = 100
    """rows of a batch"""
    offline_ratio: Annotated[float, Bounds(at_most=1)] = -1.0
    """share of each online batch that comes from the offline rows; below 0: their share of all rows"""
    online_steps: Steps = 250_000
    """environment steps of fine-tuning"""
    hidden: Layers = (400, 300)
    """units of the hidden layers of the network that moves candidates"""
    critic_hidden: Layers = (400, 300)
    """units of the critics' hidden layers"""
    vae_hidden: Layers = (750, 750)
    """units of the hidden layers of encoder and decoder"""
    act_candidates: Size = 100
    """candidates among which the policy chooses"""
    target_candidates: Size = 10
    """candidates at each next state in the critics' target"""
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


class Encoder(nn.Module):
    """Mean and log standard deviation, both [..., 2 A], of the latent of an action."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        rows = jnp.concatenate([obs, action], axis=-1)
        mean, log_std = jnp.split(MLP((*self.hidden, 4 * action.shape[-1]))(rows), 2, axis=-1)
        return mean, jnp.clip(log_std, -4.0, 15.0)


class Decoder(nn.Module):
    """The action [..., A] of a latent."""

    hidden: tuple[int, ...]
    action_size: int

    @nn.compact
    def __call__(self, obs, latent):
        return nn.tanh(MLP((*self.hidden, self.action_size))(jnp.concatenate([obs, latent], axis=-1)))


class Actor(nn.Module):
    """Which way to move an action: [..., A], within -1 and 1."""

    hidden: tuple[int, ...]
    action_size: int

    @nn.compact
    def __call__(self, obs, action):
        return nn.tanh(MLP((*self.hidden, self.action_size))(jnp.concatenate([obs, action], axis=-1)))


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


Nets = namedtuple("Nets", "actor critic encoder decoder act_candidates")  # modules, and a number


@struct.dataclass
class Agent:
    """What learns, each with its optimiser, and slow copies."""

    actor: Learner
    critic: Learner
    vae: Learner  # of {"encoder": ..., "decoder": ...}
    target_actor: dict
    target_critic: dict
    policy: ClassVar = ("actor", "critic", "vae")  # what --init-from must find: together they act


@struct.dataclass
class Choice:
    """The parameters of the policy: what makes candidates, what moves them, what chooses one."""

    decoder: dict
    mover: dict
    critic: dict
    phi: jax.Array


def acting(agent: Agent, hyper: Hyper) -> Choice:
    """The policy of an agent."""
    return Choice(agent.vae.params["decoder"], agent.actor.params, agent.critic.params, hyper.phi)


def init_agent(static: Static, key: jax.Array) -> Agent:
    nets, obs, action = static.nets, static.example.obs[None], static.example.action[None]
    actor_key, critic_key, encoder_key, decoder_key = jax.random.split(key, 4)
    actor, critic = (net.init(k, obs, action) for net, k in zip(nets[:2], (actor_key, critic_key)))
    latent = jnp.concatenate([action, action], axis=-1)
    encoder, decoder = (
        nets.encoder.init(encoder_key, obs, action),
        nets.decoder.init(decoder_key, obs, latent),
    )
    targets = jax.tree.map(jnp.copy, (actor, critic))
    parts = actor, critic, {"encoder": encoder, "decoder": decoder}
    return Agent(*map(Learner.create, parts), *targets)


def decoded(nets: Nets, decoder: dict, obs: jax.Array, num: int, key: jax.Array, alike=False) -> jax.Array:
    """`num` candidates [num, ..., A] at each of `obs` [..., obs]; `alike`: of the same latents everywhere."""
    places = (1,) * (obs.ndim - 1) if alike else obs.shape[:-1]
    latent = jnp.clip(jax.random.normal(key, (num, *places, 2 * nets.actor.action_size)), -0.5, 0.5)
    latent = jnp.broadcast_to(latent, (num, *obs.shape[:-1], latent.shape[-1]))
    return nets.decoder.apply(decoder, jnp.broadcast_to(obs, (num, *obs.shape)), latent)


def moved(nets: Nets, actor: dict, phi, obs: jax.Array, action: jax.Array) -> jax.Array:
    """Actions [num, ..., A] at `obs` [..., obs], each moved by the actor within phi."""
    obs = jnp.broadcast_to(obs, (*action.shape[:-1], obs.shape[-1]))
    return jnp.clip(action + phi * nets.actor.apply(actor, obs, action), -1.0, 1.0)


def vae_loss(params, nets, obs, action, key):
    """Error of the decoded action and half the divergence of the latent from N(0, 1), both as means.

    Also the error alone.
    """
    mean, log_std = nets.encoder.apply(params["encoder"], obs, action)
    latent = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
    error = jnp.mean((nets.decoder.apply(params["decoder"], obs, latent) - action) ** 2)
    divergence = -0.5 * jnp.mean(1 + 2 * log_std - mean**2 - jnp.exp(2 * log_std))
    return error + 0.5 * divergence, error


# as in sac.py
def critic_loss(params, nets, obs, action, target_q):
    """Squared Bellman error, summed over the critics: SAC, equation (5)."""
    q = nets.critic.apply(params, obs, action)
    return jnp.mean(jnp.sum((q - target_q) ** 2, axis=0))


def actor_loss(params, nets, critic, phi, obs, action):
    """Minus the first Q of decoded actions once they are moved: algorithm 1."""
    return -jnp.mean(nets.critic.apply(critic, obs, moved(nets, params, phi, obs, action))[0])


def update(static: Static, hyper: Hyper, agent: Agent, batch: Transition, key: jax.Array):
    """One gradient step of VAE, critics and actor, in this order; then the targets."""
    nets, rows = static.nets, (batch.obs, batch.action)
    vae_key, next_key, actor_key = jax.random.split(key, 3)
    given = nets, *rows, vae_key
    (loss_vae, error), vae = agent.vae.descend(vae_loss, hyper.vae_lr, *given, has_aux=True)
    decoder = vae.params["decoder"]

    obs = batch.next_obs
    action = decoded(nets, decoder, obs, static.args.target_candidates, next_key)
    action = moved(nets, agent.target_actor, hyper.phi, obs, action)
    q = jax.vmap(partial(nets.critic.apply, agent.target_critic, obs))(action)  # [num, 2, B]
    mixed = hyper.least_weight * q.min(axis=1) + (1 - hyper.least_weight) * q.max(axis=1)
    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = task_reward + hyper.discount * batch.discount * mixed.max(axis=0)
    loss_q, critic = agent.critic.descend(critic_loss, hyper.critic_lr, nets, *rows, target_q)

    given = nets, critic.params, hyper.phi, batch.obs, decoded(nets, decoder, batch.obs, 1, actor_key)[0]
    loss_a, actor = agent.actor.descend(actor_loss, hyper.actor_lr, *given)
    pairs = (actor.params, agent.target_actor), (critic.params, agent.target_critic)
    targets = (optax.incremental_update(new, old, hyper.target_rate) for new, old in pairs)
    metrics = {"vae_loss": loss_vae, "decoding_error": error, "critic_loss": loss_q, "actor_loss": loss_a}
    return Agent(actor, critic, vae, *targets), metrics | {"q": target_q.mean()}


def act(nets: Nets, actor: Choice, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Actions [..., A] for observations [..., obs]: the best of the candidates, by the first Q.

    With a key each state has latents of its own; without one they are the same for all states, always.
    """
    latent_key = jax.random.PRNGKey(0) if key is None else key
    action = decoded(nets, actor.decoder, obs, nets.act_candidates, latent_key, alike=key is None)
    action = moved(nets, actor.mover, actor.phi, obs, action)
    q = nets.critic.apply(actor.critic, jnp.broadcast_to(obs, (len(action), *obs.shape)), action)[0]
    return jnp.take_along_axis(action, q.argmax(axis=0)[None, ..., None], axis=0)[0]


def export(static: Static, actor: Choice) -> policy.Policy:
    """The policy as a file. It is no MLP, so it needs JAX to run."""
    return policy.jax_function(partial(act, static.nets), actor, static.example.obs.size)


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


def finetune_chunk(static: Static, state: State, hyper: Hyper, offline, added, *, length: int):
    """`length` steps of all environments, gradient steps after each; `added` [] online rows come before."""
    args, num_updates = static.args, round(static.args.num_envs * static.args.utd_ratio)

    def step(carry):
        state, added = carry
        key, act_key, reset_key, sample_key, update_key = jax.random.split(state.key, 5)
        obs, now = state.env_state.obs, online_hyper(args, hyper, added)
        action = act(static.nets, acting(state.agent, now), obs, act_key)
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


def make_nets(session: Session) -> Nets:
    """The networks."""
    args, action_size = session.args, session.action_size
    actor, critic = Actor(args.hidden, action_size), Critic(args.critic_hidden)
    vae = Encoder(args.vae_hidden), Decoder(args.vae_hidden, action_size)
    return Nets(actor, critic, *vae, args.act_candidates)


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("bcq", args, make_plan)
    args, offline, hyper = session.args, session.offline, session.hyper
    static, functions = session.static(make_nets(session)), (init_state, pretrain_chunk, finetune_chunk)
    initialise, pretrain, finetune = session.compile(static, *functions)
    state = session.begin(initialise(session.keys), partial(act, static.nets))

    for chunk in session.chunks():
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, length=chunk.iterations)
        else:
            state, metrics = finetune(state, hyper, offline, chunk.collected, length=chunk.iterations)
        now = online_hyper(args, hyper, chunk.start + chunk.length) if chunk.acts else hyper
        session.after(chunk, metrics, state, acting(state.agent, now))

    last = online_hyper(args, hyper, args.online_steps)
    return session.conclude(state, partial(export, static), {"policy": acting(state.agent, last)})


# The official settings are the defaults, the same for all bodies. Those of the point mass are ours.
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), critic_hidden=(64, 64), vae_hidden=(64, 64), target_rate=0.02, batch_size=256,
        offline_steps=6_000, online_steps=480_000, num_envs=48, utd_ratio=1 / 48, act_candidates=20),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    "probe": dict(
        hidden=(32, 32), critic_hidden=(32, 32), vae_hidden=(16, 16), discount=0.9, actor_lr=3e-3,
        critic_lr=3e-3, vae_lr=3e-3, target_rate=0.05, phi=1, act_candidates=10, target_candidates=4,
        offline_steps=0, online_steps=3_000),
    ("halfcheetah-sparse", "ant-sparse"): dict(offline_steps=0),
    "antmaze": dict(reward_bias=-1),
    "maze2d": dict(reward_bias=-1, offline_steps=500_000),
    "kitchen": dict(reward_bias=-4, end_reward=4),
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
