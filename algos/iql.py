"""IQL: implicit Q-learning, offline and then fine-tuned online (Kostrikov et al., arXiv 2110.06169).

IQL never asks for the value of an action that is not in the data. A state value V is fitted to an upper expectile of
Q over the data's actions, Q is fitted to r + discount * V(s'), and the policy imitates the data's actions, weighted by
exp(temperature * advantage). Fine-tuning goes on with the same three losses while the policy acts; offline and
online rows share one buffer, sampled uniformly, with one gradient step per environment step (`--utd-ratio`).

Departures from the official code (ikostrikov/implicit_q_learning 09d7002): evaluation has episodes of its own (there
it destroys the episode in training), and reward scaling applies to online rows as well (there, in locomotion, only to
the data's). As there, the policy's learning rate decays to 0 when all training is offline and stays constant otherwise.

    python algos/iql.py    # point mass: success 1.0 in 64 steps, 2 minutes on two CPU cores
    python algos/iql.py --dataset door_human_replayed.npz --online-steps 0    # 25 human door demonstrations
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import tyro
from flax import struct

import envs
from data import buffer, cli, report
from data.buffer import Transition
from data.evaluation import Evaluator
from data.program import EVERYWHERE, RUNS, Compiled, mesh_for, orthogonal, place, scan_mean
from data.run import Run


@struct.dataclass
class Hyper:
    """Settings that are traced, not compiled in: one value per run, so each can be swept in one program."""

    # optimisation
    discount: float = 0.99
    """discount factor"""
    actor_lr: float = 3e-4
    """learning rate of the policy"""
    critic_lr: float = 3e-4
    """learning rate of the two critics"""
    value_lr: float = 3e-4
    """learning rate of the value function"""
    target_rate: float = 0.005
    """share of the critics that goes into their targets at each update"""
    reward_scale: float = 1.0
    """task rewards are multiplied by this"""
    reward_bias: float = 0.0
    """and this is added"""
    # IQL
    expectile: float = 0.7
    """expectile of the value regression: 0.5 is the mean, towards 1 the maximum over the data's actions"""
    temperature: float = 3.0
    """beta: how sharply the policy prefers advantageous actions; 0 is behaviour cloning"""


@dataclass(frozen=True)
class Args:
    """IQL: train offline, then fine-tune online."""

    # experiment
    env: str = "auto"
    """environment to act in; auto: the point mass, or none if a dataset is named and there are no online steps"""
    num_seeds: int = 5
    """seeds, trained side by side"""
    seed: int = 0
    """first seed"""
    eval_every: int = 0
    """steps of the phase between evaluations; 0: a quarter of each phase"""
    eval_episodes: int = 20
    """episodes of each evaluation, with the mean action"""
    eval_env: str = ""
    """evaluate in this Gymnasium environment (by id) instead of in --env"""
    checkpoint_every: int = 0
    """steps of the phase between checkpoints; 0: with each evaluation"""
    runs_dir: str = "runs"
    """folder that holds all runs"""
    name: str = ""
    """name of this run's folder; empty: the time it started"""
    resume: str = ""
    """folder of a run to go on with, from its last checkpoint; all other flags come from there"""
    physics: Literal["auto", "mjx", "mjx-warp", "mujoco"] = "auto"
    """physics engine, for environments that have one"""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """send metrics there as well as to metrics.csv"""
    sweep: tuple[str, ...] = ()
    """traced settings to sweep, e.g. intrinsic-coef=0,5 expectile=0.7,0.9: every combination, all seeds, one program"""
    max_q: float = 1e5
    """a seed whose mean Q-value is beyond this, up or down, has diverged and is stopped; no task here pays a tenth of it"""
    # data
    dataset: str = "auto"
    """Minari id, or a .hdf5 or .npz file; none: no offline data; auto: the environment's own, none with --offline-steps 0"""
    clip_actions: bool = False
    """clip dataset actions that lie outside [-1, 1] instead of refusing them"""
    export: str = ""
    """write each seed's online experience as the Minari dataset EXPORT-seed<k>-v0, e.g. ooo/my-run"""
    # offline
    offline_steps: int = 1_000_000
    """gradient steps on the dataset"""
    # online
    online_steps: int = 1_000_000
    """environment steps of fine-tuning"""
    num_envs: int = 8
    """environments that act side by side, per seed"""
    utd_ratio: float = 1.0
    """gradient steps per environment step; num_envs * utd_ratio of them follow each step of all environments"""
    buffer_size: int = 0
    """online rows kept, a multiple of num_envs; 0: all"""
    return_range: float = 0.0
    """scale rewards so that the dataset's episode returns span this much (IQL: 1000 in locomotion); 0, or no dataset: leave them"""
    # optimisation
    batch_size: int = 256
    """rows of a batch"""
    hidden: tuple[int, ...] = (256, 256)
    """units of the hidden layers of all networks"""
    actor_decay: Literal["auto", "none", "cosine"] = "auto"
    """schedule of the policy's learning rate over the offline steps; auto: cosine to 0 if there are no online steps, else none"""
    dropout: float = 0.0
    """dropout rate in the policy's hidden layers"""
    hyper: Annotated[Hyper, tyro.conf.OmitArgPrefixes] = field(default_factory=Hyper)
    """traced settings, which --sweep can vary"""


# The settings of IQL's paper and of OOO's Table 4 by environment family; those of the point mass are ours.
SETTINGS = {
    "point-mass-wall": {
        "hidden": (64, 64), "expectile": 0.9, "temperature": 3.0, "actor_lr": 1e-3, "critic_lr": 1e-3, "value_lr": 1e-3,
        "target_rate": 0.02, "offline_steps": 6_000, "online_steps": 960_000, "num_envs": 48, "utd_ratio": 1 / 48,
    },
    "point-mass-wall-sparse": {"reward_bias": -1.0},
    "probe": {"hidden": (32, 32), "offline_steps": 0, "online_steps": 8_000},
    **{key: {"return_range": 1000.0} for key in ("halfcheetah", "hopper", "walker2d", "ant")},
    **{key: {"return_range": 0.0, "offline_steps": 0} for key in ("halfcheetah-sparse", "ant-sparse")},
    "antmaze": {"expectile": 0.9, "temperature": 10.0, "reward_bias": -1.0},
    "maze2d": {"expectile": 0.9, "temperature": 3.0, "reward_bias": -1.0, "offline_steps": 500_000, "online_steps": 500_000},
    "kitchen": {"expectile": 0.7, "temperature": 0.5, "dropout": 0.1, "reward_bias": -4.0},
    **{key: {"expectile": 0.7, "temperature": 0.5, "dropout": 0.1} for key in ("hammer", "door", "pen", "relocate")},
    **{key: {"expectile": 0.8, "temperature": 3.0, "offline_steps": 25_000} for key in ("door-binary", "pen-binary", "relocate-binary")},
    "hammer-truncated-expert": {
        "expectile": 0.8, "temperature": 3.0, "dropout": 0.0, "offline_steps": 50_000, "online_steps": 500_000,
    },
}  # fmt: skip


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


class Actor(nn.Module):
    """Gaussian policy around tanh(mean), not squashed after sampling; log_std does not depend on the state."""

    hidden: tuple[int, ...]
    action_size: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, obs, train=False):
        mean = nn.tanh(MLP((*self.hidden, self.action_size), self.dropout)(obs, train))
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_size,))
        return mean, jnp.clip(log_std, -5.0, 2.0)


class Critic(nn.Module):
    """Two independent Q functions: [2, B]."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        ensemble = nn.vmap(MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
        return ensemble((*self.hidden, 1))(jnp.concatenate([obs, action], axis=-1)).squeeze(-1)


class Value(nn.Module):
    """State value: [B]."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, obs):
        return MLP((*self.hidden, 1))(obs).squeeze(-1)


class Nets(NamedTuple):
    """The modules of an agent; their parameters are in `Agent`."""

    actor: Actor
    critic: Critic
    value: Value


@struct.dataclass
class Agent:
    """Parameters and Adam states of one IQL agent."""

    actor: dict
    critic: dict
    target_critic: dict
    value: dict
    actor_opt: tuple
    critic_opt: tuple
    value_opt: tuple


def init_agent(nets: Nets, obs_size: int, key: jax.Array) -> Agent:
    keys = jax.random.split(key, 3)
    obs, action = jnp.zeros((1, obs_size)), jnp.zeros((1, nets.actor.action_size))
    actor, critic, value = nets.actor.init(keys[0], obs), nets.critic.init(keys[1], obs, action), nets.value.init(keys[2], obs)
    adam = optax.scale_by_adam()
    return Agent(actor, critic, jax.tree.map(jnp.copy, critic), value, adam.init(actor), adam.init(critic), adam.init(value))


def value_loss(params, nets, obs, q, expectile):
    """Expectile regression of V(s) on Q(s, a): IQL, equation (5)."""
    diff = q - nets.value.apply(params, obs)
    return jnp.mean(jnp.where(diff > 0, expectile, 1 - expectile) * diff**2)


def actor_loss(params, nets, obs, action, adv, temperature, key):
    """Advantage-weighted regression, weights capped at 100: IQL, equation (7)."""
    weight = jnp.minimum(jnp.exp(temperature * adv), 100.0)
    mean, log_std = nets.actor.apply(params, obs, train=True, rngs={"dropout": key})
    log_prob = jax.scipy.stats.norm.logpdf(action, mean, jnp.exp(log_std)).sum(axis=-1)
    return -jnp.mean(weight * log_prob)


def critic_loss(params, nets, obs, action, target_q):
    """Squared Bellman error of both critics, summed over them: IQL, equation (6)."""
    q = nets.critic.apply(params, obs, action)
    return jnp.mean(jnp.sum((q - target_q) ** 2, axis=0))


def descend(params, opt, grads, learning_rate):
    """One Adam step; the learning rate is traced, so it is not part of the optimiser."""
    direction, opt = optax.scale_by_adam().update(grads, opt)
    return jax.tree.map(lambda p, d: p - learning_rate * d, params, direction), opt


def update(nets: Nets, hyper: Hyper, agent: Agent, batch: Transition, key: jax.Array):
    """One gradient step of value, policy and critics, in the order of the official code."""
    q = nets.critic.apply(agent.target_critic, batch.obs, batch.action).min(axis=0)
    loss_v, grads = jax.value_and_grad(value_loss)(agent.value, nets, batch.obs, q, hyper.expectile)
    value, value_opt = descend(agent.value, agent.value_opt, grads, hyper.value_lr)

    v, next_v = jnp.split(nets.value.apply(value, jnp.concatenate([batch.obs, batch.next_obs])), 2)
    adv = q - v
    loss_a, grads = jax.value_and_grad(actor_loss)(agent.actor, nets, batch.obs, batch.action, adv, hyper.temperature, key)
    actor, actor_opt = descend(agent.actor, agent.actor_opt, grads, hyper.actor_lr)

    target_q = hyper.reward_scale * batch.reward + hyper.reward_bias + hyper.discount * batch.discount * next_v
    loss_q, grads = jax.value_and_grad(critic_loss)(agent.critic, nets, batch.obs, batch.action, target_q)
    critic, critic_opt = descend(agent.critic, agent.critic_opt, grads, hyper.critic_lr)
    target_critic = optax.incremental_update(critic, agent.target_critic, hyper.target_rate)

    agent = Agent(actor, critic, target_critic, value, actor_opt, critic_opt, value_opt)
    return agent, {"value_loss": loss_v, "actor_loss": loss_a, "critic_loss": loss_q, "q": q.mean(), "adv": adv.mean()}


def act(nets: Nets, actor: dict, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Actions [..., A] for observations [..., obs]: the mean without a key, a sample with one, clipped to [-1, 1]."""
    mean, log_std = nets.actor.apply(actor, obs)
    return mean if key is None else jnp.clip(mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape), -1.0, 1.0)


class Setup(NamedTuple):
    """What is fixed when a program is compiled."""

    args: Args
    env: envs.Env | None
    nets: Nets
    obs_size: int


@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    agent: Agent
    env_state: envs.State | None
    ring: Transition | None
    key: jax.Array


def init_state(setup: Setup, key: jax.Array) -> State:
    args = setup.args
    key, agent, env = jax.random.split(key, 3)
    env_state = ring = None
    if args.online_steps:
        env_state = jax.vmap(setup.env.reset)(jax.random.split(env, args.num_envs))
        obs, action, scalar = jnp.zeros(setup.obs_size), jnp.zeros(setup.nets.actor.action_size), jnp.float32(0)
        ring = buffer.empty(Transition(obs, action, scalar, obs, scalar), args.buffer_size or args.online_steps)
    return State(init_agent(setup.nets, setup.obs_size, agent), env_state, ring, key)


def pretrain_chunk(setup: Setup, state: State, hyper: Hyper, offline: Transition, *, length: int):
    """`length` gradient steps on the offline rows."""
    args = setup.args
    decays = args.actor_decay == "cosine" or (args.actor_decay == "auto" and not args.online_steps)

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        batch = buffer.take(offline, None, jax.random.randint(sample_key, (args.batch_size,), 0, buffer.size(offline)))
        rate = 0.5 + 0.5 * jnp.cos(jnp.pi * state.agent.actor_opt.count / args.offline_steps) if decays else 1.0
        agent, metrics = update(setup.nets, hyper.replace(actor_lr=rate * hyper.actor_lr), state.agent, batch, update_key)
        return state.replace(agent=agent, key=key), metrics

    return scan_mean(step, state, length)


def finetune_chunk(setup: Setup, state: State, hyper: Hyper, offline: Transition | None, added: jax.Array, *, length: int):
    """`length` steps of all environments, each followed by num_envs * utd_ratio gradient steps on offline and online rows alike.

    `added` [] counts the online rows that earlier chunks collected.
    """
    args, env = setup.args, setup.env
    num_updates = round(args.num_envs * args.utd_ratio)

    def step(carry):
        state, added = carry
        key, act_key, reset_key, sample_key, update_key = jax.random.split(state.key, 5)
        obs = state.env_state.obs
        action = act(setup.nets, state.agent.actor, obs, act_key)
        advance = jax.vmap(partial(envs.step_and_reset, env))
        env_state, reached = advance(state.env_state, action, jax.random.split(reset_key, args.num_envs))
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, rows, added, reached.info["broken"])
        added = added + args.num_envs

        filled = buffer.size(offline) + jnp.minimum(added, buffer.size(ring))
        batch = buffer.take(offline, ring, jax.random.randint(sample_key, (num_updates * args.batch_size,), 0, filled))
        batches = jax.tree.map(lambda x: x.reshape(num_updates, args.batch_size, *x.shape[1:]), batch)
        learn = lambda agent, xs: update(setup.nets, hyper, agent, *xs)  # noqa: E731
        agent, metrics = jax.lax.scan(learn, state.agent, (batches, jax.random.split(update_key, num_updates)))
        collected = envs.tally(reached)
        return (State(agent, env_state, ring, key), added), {**jax.tree.map(jnp.mean, metrics), **collected}

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


def make_setup(args: Args, offline: Transition | None) -> Setup:
    """Environment and networks for `args`."""
    env = None if args.env == "none" else envs.make(args.env, args.physics)
    obs_size, action_size = (env.observation_size, env.action_size) if env else (offline.obs.shape[1], offline.action.shape[1])
    return Setup(args, env, Nets(Actor(args.hidden, action_size, args.dropout), Critic(args.hidden), Value(args.hidden)), obs_size)


def main() -> None:
    args = cli.parse(Args, SETTINGS)
    hyper, labels = cli.grid(args)
    data = cli.load_dataset(args)
    hyper = cli.scale_returns(args, hyper, data)
    offline = data and data.transitions
    setup, mesh = make_setup(args, offline), mesh_for(len(labels))
    evaluate = Evaluator(args, setup.env, partial(act, setup.nets), mesh, setup.obs_size, setup.nets.actor.action_size)
    run = Run("iql", args, labels, data and data.card)

    initialise = Compiled(partial(init_state, setup), mesh)
    pretrain = Compiled(partial(pretrain_chunk, setup), mesh, shared=(2,), donate=(0,))
    finetune = Compiled(partial(finetune_chunk, setup), mesh, shared=(2, 3), donate=(0,))
    run.programs = {"offline": pretrain, "online": finetune}
    offline, hyper = place(offline, mesh, EVERYWHERE), place(hyper, mesh, RUNS)
    keys = place(jnp.stack([jax.random.PRNGKey(label.seed) for label in labels]), mesh, RUNS)
    done, state = run.restore(initialise(keys))

    plan = cli.chunks(args, "offline", 0, args.offline_steps) + cli.chunks(args, "online", 0, args.online_steps)
    for position, chunk in run.progress(plan, done):
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, length=chunk.length)
        else:
            state, metrics = finetune(state, hyper, offline, chunk.collected, length=chunk.length // args.num_envs)
        run.after(chunk, metrics, state.agent, state, position, evaluate, keys)

    report.conclude(run, setup.env, data and data.transitions, state.ring, {"policy": state.agent.actor})


if __name__ == "__main__":
    cli.guarded(main)
