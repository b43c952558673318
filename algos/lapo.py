"""LAPO: latent-variable advantage-weighted policy optimisation, offline and then fine-tuned online.

LAPO (Chen et al., arXiv 2203.08949) learns what to do inside of what the data do. A conditional variational
autoencoder (CVAE) learns to decode a latent action z at a state s into an action like those of the data.
Rows with a positive advantage count nine times as much as the others, so it models good actions above all.
The policy gives z, bounded by `--latent-max`; the decoder makes it an action. So the policy may climb Q
freely: what it can say decodes into an action that the data support. With a(s) the policy's decoded action:

- Two critics are fitted to r + discount * V(s').
- V is fitted to w min Q(s, a(s)) + (1 - w) max Q(s, a(s)), w being `--min-weight`, with a little noise on z.
  This target is clipped to what the rewards allow.
- The CVAE minimises weight * (squared error of the decoded action + `--kl-weight` * KL divergence). The
  advantage in the weight is r + discount * Q(s', a(s')) - V(s).
- The policy climbs the first critic's Q(s, a(s)).

Observations and actions are standardised by the dataset's mean and standard deviation. Fine-tuning goes on
with the same losses, on offline and online rows in one buffer, while the policy acts with noise.

Departures from the official code (pcchenxi/LAPO-offlienRL d2493b1), which is about data alone. V's bounds
come from the rewards seen so far, online ones too, and allow for an episode that ends; there they are the
dataset's smallest and largest reward over 1 - discount. Decoded actions are clipped where they are played. An
observation that never varies in the data is shifted, not scaled. Networks start orthogonal. The noise of
acting online is TD3's.

    python algos/lapo.py
    python algos/lapo.py --env hopper --dataset ooo/hopper/medium-v0
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
from ooo_rl.data.runs.bounds import Bounds, Fraction, Layers, NonNegative, Number, Positive, Size, Steps, With
from ooo_rl.data.runs.online_change import online_hyper, online_ratio
from ooo_rl.data.runs.session import Phase, Result, Session, Static, scan_mean, start_online
from ooo_rl.data.runs.settings import Experiment, Traced, launch


@struct.dataclass
class Hyper(Traced):
    """Settings that are traced, not compiled in: one value per run, so each can be swept in one program."""

    actor_lr: NonNegative = 2e-4
    """learning rate of the policy"""
    critic_lr: NonNegative = 2e-4
    """learning rate of the critics and of V"""
    vae_lr: NonNegative = 2e-4
    """learning rate of the CVAE"""
    target_rate: Fraction = 0.005
    """share of policy, decoder and critics that goes into their targets at each update"""
    min_weight: Fraction = 1.0
    """w: V's target is w times the least Q plus 1 - w times the largest"""
    value_min: Number = -float("inf")
    """V's target is clipped to what the rewards allow, and from below to this"""
    value_max: Number = float("inf")
    """and from above to this"""
    advantage_weight: Fraction = 0.9
    """the CVAE's weight of rows with a positive advantage; the others' is 1 less this"""
    kl_weight: NonNegative = 1.0
    """weight of the KL divergence beside the squared error of the decoded action"""
    latent_noise: NonNegative = 0.1
    """standard deviation of the noise on the latent action in V's target"""
    latent_noise_clip: NonNegative = 0.2
    """bound of this noise"""
    exploration_noise: Annotated[NonNegative, With("online_steps")] = 0.1
    """standard deviation of the noise added to actions online"""


@dataclass(frozen=True)
class Args(Experiment):
    """LAPO: train offline, then fine-tune online."""

    batch_size: Size = 512
    """rows of a batch"""
    offline_ratio: Annotated[float, Bounds(at_most=1)] = -1.0
    """share of each online batch that comes from the offline rows; below 0: their share of all rows"""
    offline_steps: Steps = 1_000_000
    """gradient steps on the dataset"""
    online_steps: Steps = 1_000_000
    """environment steps of fine-tuning"""
    max_reward: Annotated[NonNegative, With("dataset")] = 1.0
    """scale rewards so that the dataset's largest is this; 0: do not"""
    hidden: Layers = (256, 256, 256)
    """units of the hidden layers of all networks"""
    latent_per_action: Size = 2
    """dimensions of the latent action for each one of the action"""
    latent_max: Positive = 2.0
    """bound of the policy's latent actions"""
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
    """x less `mean`, over `std`, or `back`. Both lie beside the parameters, and no loss moves them.

    So they go where a network goes: into its target, a checkpoint, another run, a policy file.
    """

    @nn.compact
    def __call__(self, x, back=False):
        mean = self.variable("statistics", "mean", jnp.zeros, x.shape[-1])
        std = self.variable("statistics", "std", jnp.ones, x.shape[-1])
        mean, std = jax.lax.stop_gradient((mean.value, std.value))
        return mean + std * x if back else (x - mean) / std


class Actor(nn.Module):
    """Deterministic policy: its latent action, with noise if there is any, decoded into actions [..., A]."""

    hidden: tuple[int, ...]
    action_size: int
    latent_size: int
    latent_max: float

    @nn.compact
    def __call__(self, obs, latent_noise=0.0):
        x = Standardise(name="obs")(obs)
        latent = self.latent_max * nn.tanh(MLP((*self.hidden, self.latent_size), name="policy")(x))
        decoder = MLP((*self.hidden, self.action_size), name="decoder")
        action = decoder(jnp.concatenate([x, latent + latent_noise], axis=-1))
        return Standardise(name="action")(action, back=True)


class VAE(nn.Module):
    """Conditional variational autoencoder of actions: its squared error and KL divergence, both [B]."""

    hidden: tuple[int, ...]
    latent_size: int

    @nn.compact
    def __call__(self, obs, action, noise):
        x, a = Standardise(name="obs")(obs), Standardise(name="action")(action)
        encoder = MLP((*self.hidden, 2 * self.latent_size), name="encoder")
        mean, log_var = jnp.split(encoder(jnp.concatenate([x, a], axis=-1)), 2, axis=-1)
        latent = mean + jnp.exp(log_var / 2) * noise
        decoder = MLP((*self.hidden, action.shape[-1]), name="decoder")
        error = jnp.sum((decoder(jnp.concatenate([x, latent], axis=-1)) - a) ** 2, axis=-1)
        return error, 0.5 * jnp.sum(mean**2 + jnp.exp(log_var) - log_var - 1, axis=-1)


class Critic(nn.Module):
    """`num` independent Q functions: [num, ...]."""

    hidden: tuple[int, ...]
    num: int = 2

    @nn.compact
    def __call__(self, obs, action):
        ensemble = nn.vmap(MLP, {"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=self.num)
        rows = jnp.concatenate([Standardise(name="obs")(obs), Standardise(name="action")(action)], axis=-1)
        return ensemble((*self.hidden, 1))(rows).squeeze(-1)


class Value(nn.Module):
    """State value: [B]."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, obs):
        return MLP((*self.hidden, 1))(Standardise(name="obs")(obs)).squeeze(-1)


Nets = namedtuple("Nets", "actor vae critic value")  # modules; their parameters are in the state


@struct.dataclass
class Agent:
    """What learns, each with its optimiser, and slow copies.

    The actor's decoder is the slow copy of the CVAE's: it acts through the same one that it learns through.
    """

    actor: Learner
    vae: Learner
    critic: Learner
    value: Learner
    target_actor: dict
    target_critic: dict


def statistics(rows: jax.Array) -> dict:
    """What `Standardise` holds: mean and standard deviation [D] of `rows` [N, D]."""
    constant = (rows == rows[0]).all(axis=0)
    return {"mean": rows.mean(axis=0), "std": jnp.where(constant, 1.0, rows.std(axis=0) + 1e-6)}


def init_agent(static: Static, offline: Transition | None, key: jax.Array) -> Agent:
    nets, obs, action = static.nets, static.example.obs[None], static.example.action[None]
    keys, noise = jax.random.split(key, 4), jnp.zeros((1, static.nets.vae.latent_size))
    inputs = (obs,), (obs, action, noise), (obs, action), (obs,)
    actor, vae, critic, value = made = [net.init(k, *x) for net, k, x in zip(nets, keys, inputs)]
    if offline is not None:
        found = {"obs": statistics(offline.obs), "action": statistics(offline.action)}
        for net in made:
            net["statistics"] = {name: found[name] for name in net["statistics"]}
    actor["params"]["decoder"] = vae["params"]["decoder"]
    *made, target_actor, target_critic = jax.tree.map(jnp.copy, (actor, vae, critic, value, actor, critic))
    return Agent(*map(Learner.create, made), target_actor, target_critic)


def act(nets: Nets, actor: dict, obs: jax.Array, key=None, noise=0.0) -> jax.Array:
    """Actions [..., A] for observations [..., obs], clipped; with a key, after noise of deviation `noise`."""
    action = nets.actor.apply(actor, obs)
    noise = 0.0 if key is None else noise * jax.random.normal(key, action.shape)
    return jnp.clip(action + noise, -1.0, 1.0)


def export(nets: Nets, actor: dict) -> policy.Policy:
    """The policy without its noise as a file that NumPy can run, on observations as the environment gives."""
    params, (obs, action) = actor["params"], (actor["statistics"][name] for name in ("obs", "action"))
    *layers, (w, b) = policy.dense_layers(params["decoder"])
    last = w * action["std"], b * action["std"] + action["mean"]
    latent = policy.dense_layers(params["policy"]), nets.actor.latent_max
    scale = {"obs_mean": obs["mean"], "obs_std": obs["std"]}
    return policy.mlp([*layers, last], latent=latent, output="clip", **scale)


def critic_loss(params, nets, obs, action, target_q):
    """Squared Bellman error, summed over the critics."""
    q = nets.critic.apply(params, obs, action)
    return jnp.mean(jnp.sum((q - target_q) ** 2, axis=0))


def value_loss(params, nets, obs, target_v):
    """Squared error of V."""
    return jnp.mean((nets.value.apply(params, obs) - target_v) ** 2)


def vae_loss(params, nets, obs, action, weight, kl_weight, noise):
    """Weighted error of the decoded actions and KL divergence: LAPO's advantage-weighted CVAE."""
    error, kl = nets.vae.apply(params, obs, action, noise)
    return jnp.mean(weight * (error + kl_weight * kl))


def actor_loss(params, nets, critic, obs):
    """-Q1 at the policy's decoded actions; the decoder stands still."""
    still = {**params["params"], "decoder": jax.lax.stop_gradient(params["params"]["decoder"])}
    action = nets.actor.apply({**params, "params": still}, obs)
    return -nets.critic.apply(critic, obs, action)[0].mean()


# as in ooo_iql.py
def value_range(low: jax.Array, high: jax.Array, discount: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What Q can be if rewards lie in [low, high] and an episode may terminate after any step."""
    far = [jnp.where(r == 0, 0.0, r / (1 - discount)) for r in (low, high)]  # 0, too, without discount
    return jnp.minimum(low, far[0]), jnp.maximum(high, far[1])


def value_bounds(hyper: Hyper, extremes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Bounds of V's target, from the smallest and the largest reward so far, `extremes` [2]."""
    low, high = value_range(*(hyper.reward_scale * extremes + hyper.reward_bias), hyper.discount)
    return jnp.maximum(low, hyper.value_min), jnp.minimum(high, hyper.value_max)


def widened(extremes: jax.Array, reward: jax.Array, broken: jax.Array) -> jax.Array:
    """`extremes` [2] with the rewards [E] of one more step, but for those of broken worlds."""
    low, high = extremes
    sound = broken == 0
    return jnp.stack([jnp.min(reward, where=sound, initial=low), jnp.max(reward, where=sound, initial=high)])


def policy_value(nets: Nets, hyper: Hyper, agent: Agent, obs: jax.Array, latent_noise=0.0) -> jax.Array:
    """Q [B] of the target critics at the target policy's actions: between their least and their largest."""
    action = nets.actor.apply(agent.target_actor, obs, latent_noise)
    q = nets.critic.apply(agent.target_critic, obs, action)
    return hyper.min_weight * q.min(axis=0) + (1 - hyper.min_weight) * q.max(axis=0)


def slow_copy(new: dict, old: dict, rate: jax.Array) -> dict:
    """A target network that moves towards `new` parameters; its statistics stay."""
    return {**old, "params": optax.incremental_update(new, old["params"], rate)}


def update(static: Static, hyper: Hyper, agent: Agent, batch: Transition, extremes, key: jax.Array):
    """One gradient step of critics and V, then of the CVAE, then of the policy; then the targets move.

    `extremes` [2] are the smallest and the largest reward so far.
    """
    nets, rows = static.nets, (batch.obs, batch.action)
    shape, (value_key, vae_key) = (len(batch.obs), nets.vae.latent_size), jax.random.split(key)
    reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    noise = hyper.latent_noise * jax.random.normal(value_key, shape)
    noise = jnp.clip(noise, -hyper.latent_noise_clip, hyper.latent_noise_clip)
    target_v = jnp.clip(policy_value(nets, hyper, agent, batch.obs, noise), *value_bounds(hyper, extremes))
    next_v = nets.value.apply(agent.value.params, batch.next_obs)
    target_q = reward + hyper.discount * batch.discount * next_v
    loss_q, critic = agent.critic.descend(critic_loss, hyper.critic_lr, nets, *rows, target_q)
    loss_v, value = agent.value.descend(value_loss, hyper.critic_lr, nets, batch.obs, target_v)

    next_q = policy_value(nets, hyper, agent, batch.next_obs)
    v = nets.value.apply(value.params, batch.obs)
    adv = reward + hyper.discount * batch.discount * next_q - v
    weight = jnp.where(adv > 0, hyper.advantage_weight, 1 - hyper.advantage_weight)
    given = nets, *rows, weight, hyper.kl_weight, jax.random.normal(vae_key, shape)
    loss_vae, vae = agent.vae.descend(vae_loss, hyper.vae_lr, *given)
    loss_a, actor = agent.actor.descend(actor_loss, hyper.actor_lr, nets, critic.params, batch.obs)

    target_critic = slow_copy(critic.params["params"], agent.target_critic, hyper.target_rate)
    learnt = {"policy": actor.params["params"]["policy"], "decoder": vae.params["params"]["decoder"]}
    target_actor = slow_copy(learnt, agent.target_actor, hyper.target_rate)
    through = {**actor.params["params"], "decoder": target_actor["params"]["decoder"]}
    actor = actor.replace(params={**actor.params, "params": through})
    metrics = {"critic_loss": loss_q, "value_loss": loss_v, "vae_loss": loss_vae, "actor_loss": loss_a}
    metrics |= {"q": target_q.mean(), "adv": adv.mean()}
    return Agent(actor, vae, critic, value, target_actor, target_critic), metrics


@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    agent: Agent
    extremes: jax.Array  # [2] the smallest and the largest reward so far
    env_state: envs.State | None
    ring: Transition | None
    key: jax.Array


def init_state(static: Static, offline: Transition | None, key: jax.Array) -> State:
    key, agent_key, env_key = jax.random.split(key, 3)
    env_state, ring = start_online(static, env_key)
    extremes = jnp.array([jnp.inf, -jnp.inf])
    if offline is not None:
        extremes = jnp.stack([offline.reward.min(), offline.reward.max()])
    return State(init_agent(static, offline, agent_key), extremes, env_state, ring, key)


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


def pretrain_chunk(static: Static, state: State, hyper: Hyper, offline: Transition, *, length: int):
    """`length` gradient steps on the offline rows."""

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        batch = sample_batches(offline, None, 0, 1.0, (static.args.batch_size,), sample_key)
        agent, metrics = update(static, hyper, state.agent, batch, state.extremes, update_key)
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
        extremes = widened(state.extremes, reached.reward, reached.info["broken"])

        shape, keys = (num_updates, args.batch_size), jax.random.split(update_key, num_updates)
        batches = sample_batches(offline, ring, added, online_ratio(args, added), shape, sample_key)
        one_step = lambda agent, xs: update(static, now, agent, xs[0], extremes, xs[1])  # noqa: E731
        agent, metrics = jax.lax.scan(one_step, state.agent, (batches, keys))
        metrics = jax.tree.map(jnp.mean, metrics) | envs.tally(reached)
        return (State(agent, extremes, env_state, ring, key), added), metrics

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


# as in iql.py
def make_plan(args: Args) -> list[Phase]:
    """Pre-training, then fine-tuning."""
    return [Phase("offline", 0, args.offline_steps), Phase("online", 0, args.online_steps, acts=True)]


def make_nets(session: Session) -> Nets:
    """The networks."""
    args, latent_size = session.args, session.args.latent_per_action * session.action_size
    actor = Actor(args.hidden, session.action_size, latent_size, args.latent_max)
    return Nets(actor, VAE(args.hidden, latent_size), Critic(args.hidden), Value(args.hidden))


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("lapo", args, make_plan)
    args, offline, hyper = session.args, session.offline, session.scaled_to_max(session.args.max_reward)
    nets, functions = make_nets(session), (init_state, pretrain_chunk, finetune_chunk)
    initialise, pretrain, finetune = session.compile(session.static(nets), *functions)
    state = session.begin(initialise(offline, session.keys), partial(act, nets))

    for chunk in session.chunks():
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, length=chunk.iterations)
        else:
            state, metrics = finetune(state, hyper, offline, chunk.collected, length=chunk.iterations)
        session.after(chunk, metrics, state)

    return session.conclude(state, partial(export, nets), {"policy": state.agent})


# The official settings by environment family; those of the point mass are ours, those of the hands OOO's for
# IQL. Where no reward of the data is above 0, there is nothing to scale by.
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), actor_lr=1e-3, critic_lr=1e-3, vae_lr=1e-3, target_rate=0.02, batch_size=256,
        max_reward=0, offline_steps=6_000, online_steps=960_000, num_envs=48, utd_ratio=1 / 48),
    "probe": dict(
        hidden=(32, 32), discount=0.9, actor_lr=3e-3, critic_lr=3e-3, vae_lr=3e-3, target_rate=0.05,
        kl_weight=0.1, batch_size=256, max_reward=0, offline_steps=0, online_steps=3_000),
    ("halfcheetah-sparse", "ant-sparse"): dict(offline_steps=0),
    "antmaze": dict(max_reward=0, reward_scale=100, value_min=0, value_max=100, min_weight=0.7),
    "maze2d": dict(kl_weight=0.3),
    "maze2d-large-missing-data": dict(max_reward=0),
    "kitchen": dict(end_reward=jnp.inf),
    ("door-binary", "pen-binary", "relocate-binary"): dict(max_reward=0, offline_steps=25_000),
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
