"""PEX: policy expansion on IQL (Zhang et al., arXiv 2302.00935): online, a new policy joins the offline one, which stays as it is.

Offline this is IQL (iql.py). As the online phase begins, the policy is frozen and a new one with random parameters is added to it;
critics and value function go on. At each step both propose an action, the frozen policy its mean and the new one a sample,
and one of them is drawn with probabilities softmax(--inverse-temperature * min Q): so what was learnt offline is never lost, only left
behind where something better is known. Value and critics learn as IQL's from batches that are half offline, half online rows.
The new policy imitates, weighted by exp(temperature * advantage), the actions that the two would choose now in the batch's states.

Departures from the official code (Haichao-Zhang/PEX): evaluation takes the better of both policies' means by min Q; there each of
its two choices is random one time in ten. Gradient steps are taken in IQL's order, the policy's with fresh V; there it comes last,
with fresh targets. Adam's states of critics and V are kept. Batches may also be uniform over all rows (`--offline-ratio -1`).
An unofficial code (fuyw/jrlzoo) trains the new policy on the batch's own actions, as IQL does: `--policy-actions buffer`.
The default is the official way, since PEX's published numbers come from it.

    python algos/pex.py
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
    # PEX
    inverse_temperature: float = 10.0
    """how sharply the choice between the two policies' actions prefers the higher Q; 0 tosses a coin"""


@dataclass(frozen=True)
class Args:
    """PEX: train offline with IQL, then add a policy and train it online."""

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
    offline_ratio: float = 0.5
    """share of each online batch that comes from the offline rows; below 0: that of the offline rows among all"""
    # offline
    offline_steps: int = 1_000_000
    """gradient steps on the dataset"""
    # online
    online_steps: int = 1_000_000
    """environment steps of fine-tuning"""
    learning_starts: int = 5_000
    """of these, steps at the start that only fill the buffer, with no gradient steps"""
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
    # PEX
    policy_actions: Literal["composite", "buffer"] = "composite"
    """what the new policy imitates: actions that both policies choose anew in the batch's states, or the batch's own"""
    hyper: Annotated[Hyper, tyro.conf.OmitArgPrefixes] = field(default_factory=Hyper)
    """traced settings, which --sweep can vary"""


# Settings by environment family: PEX's code in locomotion and AntMaze; elsewhere IQL's in OOO's Table 4; those of the point mass are ours.
SETTINGS = {
    "point-mass-wall": {
        "hidden": (64, 64), "expectile": 0.9, "temperature": 3.0, "actor_lr": 1e-3, "critic_lr": 1e-3, "value_lr": 1e-3,
        "target_rate": 0.02, "offline_steps": 6_000, "online_steps": 960_000, "num_envs": 48, "utd_ratio": 1 / 48, "learning_starts": 4_800,
    },
    "point-mass-wall-sparse": {"reward_bias": -1.0},
    "probe": {"hidden": (32, 32), "offline_steps": 0, "online_steps": 8_000, "learning_starts": 0},
    **{key: {"expectile": 0.9, "temperature": 10.0} for key in ("halfcheetah", "hopper", "walker2d", "ant")},
    "antmaze": {"expectile": 0.9, "temperature": 10.0, "reward_bias": -1.0},
    "maze2d": {"expectile": 0.9, "temperature": 3.0, "reward_bias": -1.0, "offline_steps": 500_000, "online_steps": 500_000},
    "kitchen": {"expectile": 0.7, "temperature": 0.5, "dropout": 0.1, "reward_bias": -4.0, "online_steps": 4_000_000},
    "hammer": {"expectile": 0.8, "temperature": 3.0, "offline_steps": 50_000, "online_steps": 500_000},
    **{key: {"expectile": 0.8, "temperature": 3.0, "dropout": 0.1, "offline_steps": 25_000} for key in ("door", "pen", "relocate")},
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


@struct.dataclass
class Composite:
    """Parameters of the two policies, and what chooses between them."""

    frozen: dict
    new: dict
    critic: dict
    inverse_temperature: jax.Array


def choose(nets: Nets, composite: Composite, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Actions [..., A] of the composite policy for observations [..., obs]: one of two candidates each, by their Q-values.

    With a key, the frozen policy's mean or a sample of the new one, drawn by a softmax; without, the better mean.
    """
    new_key, choice_key = (None, None) if key is None else jax.random.split(key)
    candidates = jnp.stack([act(nets, composite.frozen, obs), act(nets, composite.new, obs, new_key)])
    q = jax.vmap(lambda action: nets.critic.apply(composite.critic, obs, action).min(axis=0))(candidates)
    logits = composite.inverse_temperature * q
    chosen = q.argmax(axis=0) if key is None else jax.random.categorical(choice_key, logits, axis=0)
    return jnp.where(chosen[..., None] == 0, *candidates)


def update_expanded(args: Args, nets: Nets, hyper: Hyper, agent: Agent, frozen: dict, batch: Transition, key: jax.Array):
    """One online gradient step: `update`, but for the policy, which learns from actions that the composite policy chooses now."""
    learnt, metrics = update(nets, hyper, agent, batch, key)
    if args.policy_actions == "buffer":
        return learnt, metrics
    choice_key, dropout_key = jax.random.split(key)
    action = choose(nets, Composite(frozen, agent.actor, agent.critic, hyper.inverse_temperature), batch.obs, choice_key)
    adv = nets.critic.apply(agent.target_critic, batch.obs, action).min(axis=0) - nets.value.apply(learnt.value, batch.obs)
    loss_a, grads = jax.value_and_grad(actor_loss)(agent.actor, nets, batch.obs, action, adv, hyper.temperature, dropout_key)
    actor, actor_opt = descend(agent.actor, agent.actor_opt, grads, hyper.actor_lr)
    return learnt.replace(actor=actor, actor_opt=actor_opt), {**metrics, "actor_loss": loss_a, "adv": adv.mean()}


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
    frozen: dict
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
    agent = init_agent(setup.nets, setup.obs_size, agent)
    return State(agent, jax.tree.map(jnp.copy, agent.actor), env_state, ring, key)


def sample_batches(args: Args, offline: Transition | None, ring: Transition | None, added: jax.Array, num: int, key: jax.Array):
    """`num` batches [num, batch_size, ...], each with the share --offline-ratio of offline rows, or uniform over all rows.

    `added` [] counts the rows that ever went into the ring.
    """
    filled, old_key, new_key = jnp.minimum(added, buffer.size(ring)), *jax.random.split(key)
    if offline is None or ring is None or args.offline_ratio < 0:
        index = jax.random.randint(old_key, (num, args.batch_size), 0, buffer.size(offline) + filled)
    else:
        num_old = round(args.offline_ratio * args.batch_size)
        old = jax.random.randint(old_key, (num, num_old), 0, buffer.size(offline))
        new = jax.random.randint(new_key, (num, args.batch_size - num_old), 0, filled) + buffer.size(offline)
        index = jnp.concatenate([old, new], axis=1)
    batch = buffer.take(offline, ring, index.reshape(-1))
    return jax.tree.map(lambda x: x.reshape(num, args.batch_size, *x.shape[1:]), batch)


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


def expand(setup: Setup, state: State) -> State:
    """The start of the online phase: the policy so far is frozen, and a new one with random parameters takes its place in the agent."""
    key, new = jax.random.split(state.key)
    fresh = init_agent(setup.nets, setup.obs_size, new)
    return state.replace(agent=state.agent.replace(actor=fresh.actor, actor_opt=fresh.actor_opt), frozen=state.agent.actor, key=key)


def finetune_chunk(setup: Setup, state: State, hyper: Hyper, offline: Transition | None, added: jax.Array, *, length: int):
    """`length` steps of all environments, each followed by num_envs * utd_ratio gradient steps once there are enough online rows.

    `added` [] counts the online rows that earlier chunks collected.
    """
    args, env = setup.args, setup.env
    num_updates = round(args.num_envs * args.utd_ratio)

    def learn(agent, frozen, ring, added, key):
        sample_key, update_key = jax.random.split(key)
        batches = sample_batches(args, offline, ring, added, num_updates, sample_key)
        descend_on = lambda agent, xs: update_expanded(args, setup.nets, hyper, agent, frozen, *xs)  # noqa: E731
        agent, metrics = jax.lax.scan(descend_on, agent, (batches, jax.random.split(update_key, num_updates)))
        return agent, jax.tree.map(jnp.mean, metrics)

    def idle(agent, frozen, ring, added, key):
        metrics = jax.eval_shape(learn, agent, frozen, ring, added, key)[1]
        return agent, jax.tree.map(lambda x: jnp.zeros(x.shape), metrics)

    def step(carry):
        state, added = carry
        key, act_key, reset_key, learn_key = jax.random.split(state.key, 4)
        obs = state.env_state.obs
        composite = Composite(state.frozen, state.agent.actor, state.agent.critic, hyper.inverse_temperature)
        action = choose(setup.nets, composite, obs, act_key)
        advance = jax.vmap(partial(envs.step_and_reset, env))
        env_state, reached = advance(state.env_state, action, jax.random.split(reset_key, args.num_envs))
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, rows, added, reached.info["broken"])
        added = added + args.num_envs
        learner = state.agent, state.frozen, ring, added, learn_key
        agent, metrics = jax.lax.cond(added > args.learning_starts, learn, idle, *learner)
        return (State(agent, state.frozen, env_state, ring, key), added), {**metrics, **envs.tally(reached)}

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


def make_setup(args: Args, offline: Transition | None) -> Setup:
    """Environment and networks for `args`, or the reason why they do not go together."""
    if args.learning_starts < 0:
        raise cli.UsageError(f"--learning-starts must be at least 0, not {args.learning_starts}")
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
    evaluate = Evaluator(args, setup.env, partial(choose, setup.nets), mesh, setup.obs_size, setup.nets.actor.action_size)
    run = Run("pex", args, labels, data and data.card)

    initialise = Compiled(partial(init_state, setup), mesh)
    pretrain = Compiled(partial(pretrain_chunk, setup), mesh, shared=(2,), donate=(0,))
    finetune = Compiled(partial(finetune_chunk, setup), mesh, shared=(2, 3), donate=(0,))
    add_policy = Compiled(partial(expand, setup), mesh, donate=(0,))
    run.programs = {"offline": pretrain, "online": finetune}
    offline, hyper = place(offline, mesh, EVERYWHERE), place(hyper, mesh, RUNS)
    keys = place(jnp.stack([jax.random.PRNGKey(label.seed) for label in labels]), mesh, RUNS)
    done, state = run.restore(initialise(keys))

    plan = cli.chunks(args, "offline", 0, args.offline_steps) + cli.chunks(args, "online", 0, args.online_steps)
    for position, chunk in run.progress(plan, done):
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, length=chunk.length)
        else:
            state = add_policy(state) if chunk.first else state
            state, metrics = finetune(state, hyper, offline, chunk.collected, length=chunk.length // args.num_envs)
        # Offline both policies are one, so that the same program evaluates IQL.
        frozen = state.agent.actor if chunk.phase == "offline" else state.frozen
        composite = Composite(frozen, state.agent.actor, state.agent.critic, hyper.inverse_temperature)
        run.after(chunk, metrics, state.agent.replace(actor=composite), state, position, evaluate, keys)

    actors = {"frozen": state.frozen, "new": state.agent.actor} if args.online_steps else {"policy": state.agent.actor}
    report.conclude(run, setup.env, data and data.transitions, state.ring, actors)


if __name__ == "__main__":
    cli.guarded(main)
