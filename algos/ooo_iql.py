"""OOO on IQL: explore with an optimistic policy, then retrain a pessimistic one from scratch on everything seen.

Offline-to-Online-to-Offline RL (Mark et al., arXiv 2310.08558) separates the policy that gathers data from the policy
that is handed over. Both are IQL agents (Kostrikov et al., arXiv 2110.06169):

1. pre-train  The explorer learns from the offline data with r + c * bonus in place of r.
2. explore    It acts and learns online; the bonus (random network distillation, or counts) draws it to what it has not seen.
3. retrain    A fresh exploiter learns from the offline and online rows alike, on the task reward alone, with its
              Q-values held inside what the data's rewards allow, and with rare successes up-sampled.

Departures. From the paper: temperature multiplies the advantage, as in IQL's code and in the paper's own table, where
its equation (3) divides by it. From the official code (MaxSobolMark/OOO b1424a2): offline rows are never
overwritten; RND's reward statistics are those of the raw error (there, of the already normalised one); up-sampling
works on every task; the critic loss sums over the two critics (there, their mean: the same for Adam).
    python algos/ooo_iql.py     # point mass and wall: retrained success 1.0 in 36 steps, 3.6 minutes on two CPU cores
"""

import math
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
from data.moments import Moments
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
    # OOO
    intrinsic_coef: float = 0.5
    """c: weight of the exploration bonus"""
    frozen_bonus_coef: float = 10.0
    """weight of the bonus in retraining with --frozen-bonus"""
    rnd_lr: float = 1e-4
    """learning rate of the RND predictor"""


@dataclass(frozen=True)
class Args:
    """OOO(IQL): pre-train offline, explore online optimistically, retrain pessimistically from scratch."""

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
    upsample: float = 0.0
    """share of each retraining batch that is drawn from the rows of highest reward"""
    # offline
    offline_steps: int = 500_000
    """gradient steps of optimistic pre-training"""
    # online
    online_steps: int = 1_000_000
    """environment steps of exploration"""
    num_envs: int = 8
    """environments that act side by side, per seed"""
    utd_ratio: float = 1.0
    """gradient steps per environment step; num_envs * utd_ratio of them follow each step of all environments"""
    buffer_size: int = 0
    """online rows kept, a multiple of num_envs; 0: all"""
    intrinsic: Literal["rnd", "count", "none"] = "rnd"
    """exploration bonus: random network distillation, 1 / sqrt(n(s, a) + 1) by counting (2-D tasks), or none"""
    count_bins: tuple[int, int] = (100, 10)
    """cells of the count bonus per axis of position and of action; the official code's are 100 and 10"""
    rnd_variant: Literal["paper", "code"] = "paper"
    """paper: novelty of s, two hidden layers, summed squared error; code: of s', one hidden layer, largest squared error"""
    sync_explorer: bool = False
    """after each retraining the explorer goes on from the exploiter (the paper's Figure 14)"""
    # retraining
    retrain_steps: int = 2_000_000
    """gradient steps of each retraining; 0: none"""
    retrain_at: tuple[int, ...] = ()
    """environment steps after which to retrain; empty: at the end"""
    bound_q: bool = True
    """in retraining, hold Q inside what the data's rewards allow"""
    frozen_bonus: bool = False
    """retrain with the explorer's bonus, frozen, added to the reward (the paper's Figure 3)"""
    warm_start: bool = False
    """retrain from the previous exploiter instead of from scratch (the paper's Figure 13)"""
    return_range: float = 0.0
    """scale rewards so that the dataset's episode returns span this much (IQL: 1000 in locomotion); 0, or no dataset: leave them"""
    # optimisation
    batch_size: int = 256
    """rows of a batch"""
    hidden: tuple[int, ...] = (256, 256)
    """units of the hidden layers of all networks"""
    dropout: float = 0.0
    """dropout rate in the policy's hidden layers"""
    hyper: Annotated[Hyper, tyro.conf.OmitArgPrefixes] = field(default_factory=Hyper)
    """traced settings, which --sweep can vary"""


# The paper's settings by environment family (Table 4, App. B); those of the point mass, which it does not give, are ours.
SETTINGS = {
    "point-mass-wall": {
        "intrinsic": "count", "intrinsic_coef": 10.0, "count_bins": (20, 4), "hidden": (64, 64), "expectile": 0.9, "temperature": 5.0,
        "actor_lr": 1e-3, "critic_lr": 1e-3, "value_lr": 1e-3, "target_rate": 0.05, "upsample": 8 / 256,
        "offline_steps": 5_000, "online_steps": 2_880_000, "num_envs": 48, "utd_ratio": 1 / 48, "retrain_steps": 24_000,
    },
    "point-mass-wall-sparse": {"reward_bias": -1.0},
    "probe": {"hidden": (32, 32), "offline_steps": 0, "online_steps": 8_000, "retrain_steps": 1_000},
    **{key: {"return_range": 1000.0, "offline_steps": 1_000_000} for key in ("halfcheetah", "hopper", "walker2d", "ant")},
    **{key: {"return_range": 0.0, "offline_steps": 0} for key in ("halfcheetah-sparse", "ant-sparse")},
    "antmaze": {
        "expectile": 0.9, "temperature": 10.0, "intrinsic_coef": 10.0, "reward_bias": -1.0, "upsample": 8 / 256, "online_steps": 1_500_000,
    },
    "maze2d": {"expectile": 0.9, "temperature": 3.0, "intrinsic_coef": 10.0, "reward_bias": -1.0, "online_steps": 500_000},
    "kitchen": {
        "expectile": 0.7, "temperature": 0.5, "dropout": 0.1, "intrinsic_coef": 10.0, "reward_bias": -4.0,
        "offline_steps": 1_000_000, "online_steps": 4_000_000,
    },
    "hammer": {"expectile": 0.8, "temperature": 3.0, "offline_steps": 50_000, "online_steps": 500_000},
    **{key: {"expectile": 0.8, "temperature": 3.0, "dropout": 0.1, "offline_steps": 25000} for key in ("door", "pen", "relocate")},
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


def update(nets: Nets, hyper: Hyper, agent: Agent, batch: Transition, bonus: jax.Array, q_bounds: tuple, key: jax.Array):
    """One gradient step of value, policy and critics, in the order of IQL's code. `bonus` [B] enters the critics' target alone.

    `q_bounds` holds (low, high) for Q-values of the task reward; (-inf, inf) leaves them free.
    """
    q = jnp.clip(nets.critic.apply(agent.target_critic, batch.obs, batch.action).min(axis=0), *q_bounds)
    loss_v, grads = jax.value_and_grad(value_loss)(agent.value, nets, batch.obs, q, hyper.expectile)
    value, value_opt = descend(agent.value, agent.value_opt, grads, hyper.value_lr)

    v, next_v = jnp.split(nets.value.apply(value, jnp.concatenate([batch.obs, batch.next_obs])), 2)
    adv = q - v
    loss_a, grads = jax.value_and_grad(actor_loss)(agent.actor, nets, batch.obs, batch.action, adv, hyper.temperature, key)
    actor, actor_opt = descend(agent.actor, agent.actor_opt, grads, hyper.actor_lr)

    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = jnp.clip(task_reward + hyper.discount * batch.discount * next_v, *q_bounds) + bonus
    loss_q, grads = jax.value_and_grad(critic_loss)(agent.critic, nets, batch.obs, batch.action, target_q)
    critic, critic_opt = descend(agent.critic, agent.critic_opt, grads, hyper.critic_lr)
    target_critic = optax.incremental_update(critic, agent.target_critic, hyper.target_rate)

    agent = Agent(actor, critic, target_critic, value, actor_opt, critic_opt, value_opt)
    metrics = {"value_loss": loss_v, "actor_loss": loss_a, "critic_loss": loss_q, "q": q.mean(), "adv": adv.mean(), "bonus": bonus.mean()}
    return agent, metrics


def act(nets: Nets, actor: dict, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Actions [..., A] for observations [..., obs]: the mean without a key, a sample with one, clipped to [-1, 1]."""
    mean, log_std = nets.actor.apply(actor, obs)
    return mean if key is None else jnp.clip(mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape), -1.0, 1.0)


class NoBonus:
    """The interface of a bonus, and the one that is always 0. Its state is a pytree that only these methods look into."""

    def init(self, key: jax.Array, offline: Transition | None):
        return ()

    def observe(self, state, rows: Transition):
        return state  # with the rows just collected taken note of

    def learn(self, state, batch: Transition, learning_rate):
        return state  # after learning from the batch that the agent learns from next

    def reward(self, state, batch: Transition) -> jax.Array:
        """Bonus [B]."""
        return jnp.zeros(batch.reward.shape)


class CountBonus(NoBonus):
    """1 / sqrt(n(s, a) + 1) over a grid of positions and actions; offline rows are counted in from the start."""

    def __init__(self, env, bins: tuple[int, int]):
        x0, x1, y0, y1 = env.layout["bounds"]
        self.low, self.high = jnp.float32([x0, y0, -1, -1]), jnp.float32([x1, y1, 1, 1])
        self.bins = (bins[0], bins[0], bins[1], bins[1])

    def init(self, key, offline):
        counts = jnp.zeros(math.prod(self.bins))
        return counts if offline is None else self.observe(counts, offline)

    def observe(self, state, rows):
        return state.at[self.cell(rows)].add(1.0)

    def reward(self, state, batch):
        return jax.lax.rsqrt(state[self.cell(batch)] + 1)

    def cell(self, rows):
        """Index [B] of the bin nearest to each row's (position, action)."""
        x = jnp.concatenate([rows.obs[:, :2], rows.action], axis=-1)
        last = jnp.float32(self.bins) - 1
        nearest = jnp.clip(jnp.round((x - self.low) / (self.high - self.low) * last), 0, last).astype(jnp.int32)
        return jnp.ravel_multi_index(tuple(nearest.T), self.bins, mode="clip")


@struct.dataclass
class RNDState:
    predictor: dict
    target: dict
    opt: tuple
    obs: Moments
    error: Moments


class RNDBonus(NoBonus):
    """Random network distillation: how badly a trained network predicts a fixed random one, over the running std of that error."""

    def __init__(self, obs_size: int, variant: str):
        self.obs_size, self.variant = obs_size, variant
        self.net = MLP((512, 512, 512) if variant == "paper" else (512, 512))

    def init(self, key, offline):
        keys, obs = jax.random.split(key), jnp.zeros((1, self.obs_size))
        predictor, target = (self.net.init(k, obs) for k in keys)
        fresh = Moments(jnp.zeros(self.obs_size), jnp.ones(self.obs_size), jnp.float32(1e-4))
        error = Moments(jnp.float32(0), jnp.float32(1), jnp.float32(1e-4))
        return RNDState(predictor, target, optax.scale_by_adam().init(predictor), fresh, error)

    def learn(self, state, batch, learning_rate):
        state = state.replace(obs=state.obs.update(batch.obs))
        grads = jax.grad(lambda predictor: self.errors(state.replace(predictor=predictor), batch).mean())(state.predictor)
        predictor, opt = descend(state.predictor, state.opt, grads, learning_rate)
        state = state.replace(predictor=predictor, opt=opt)
        return state.replace(error=state.error.update(self.novelty(state, batch)))

    def reward(self, state, batch):
        return self.novelty(state, batch) / jnp.sqrt(state.error.var + 1e-8)

    def novelty(self, state, batch):
        errors = self.errors(state, batch)
        return errors.sum(axis=-1) if self.variant == "paper" else errors.max(axis=-1)

    def errors(self, state, batch):
        """Squared errors [B, 512] on clipped, normalised states (next states in the code's variant)."""
        x = batch.obs if self.variant == "paper" else batch.next_obs
        x = jnp.clip((x - state.obs.mean) / jnp.sqrt(state.obs.var + 1e-8), -5, 5)
        return (self.net.apply(state.predictor, x) - self.net.apply(state.target, x)) ** 2


class Setup(NamedTuple):
    """What is fixed when a program is compiled."""

    args: Args
    env: envs.Env | None
    nets: Nets
    bonus: NoBonus
    obs_size: int


@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    explorer: Agent
    exploiter: Agent
    bonus: dict
    env_state: envs.State | None
    ring: Transition | None
    key: jax.Array


def init_state(setup: Setup, offline: Transition | None, key: jax.Array) -> State:
    args = setup.args
    key, explorer, exploiter, bonus, env = jax.random.split(key, 5)
    env_state = ring = None
    if args.online_steps:
        env_state = jax.vmap(setup.env.reset)(jax.random.split(env, args.num_envs))
        obs, action, scalar = jnp.zeros(setup.obs_size), jnp.zeros(setup.nets.actor.action_size), jnp.float32(0)
        ring = buffer.empty(Transition(obs, action, scalar, obs, scalar), args.buffer_size or args.online_steps)
    agents = [init_agent(setup.nets, setup.obs_size, k) for k in (explorer, exploiter)]
    return State(*agents, setup.bonus.init(bonus, offline), env_state, ring, key)


def explore_update(setup: Setup, hyper: Hyper, agent: Agent, novelty, batch: Transition, key: jax.Array):
    """The explorer's gradient step: the bonus learns, then the agent learns from reward + c * bonus."""
    novelty = setup.bonus.learn(novelty, batch, hyper.rnd_lr)
    bonus = hyper.intrinsic_coef * setup.bonus.reward(novelty, batch)
    agent, metrics = update(setup.nets, hyper, agent, batch, bonus, (-jnp.inf, jnp.inf), key)
    return agent, novelty, metrics


def pretrain_chunk(setup: Setup, state: State, hyper: Hyper, offline: Transition, *, length: int):
    """`length` gradient steps of the explorer on the offline rows."""

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        index = jax.random.randint(sample_key, (setup.args.batch_size,), 0, buffer.size(offline))
        batch = buffer.take(offline, None, index)
        explorer, bonus, metrics = explore_update(setup, hyper, state.explorer, state.bonus, batch, update_key)
        return state.replace(explorer=explorer, bonus=bonus, key=key), metrics

    return scan_mean(step, state, length)


def explore_chunk(setup: Setup, state: State, hyper: Hyper, offline: Transition | None, added: jax.Array, *, length: int):
    """`length` steps of all environments, each followed by num_envs * utd_ratio gradient steps on offline and online rows alike.

    `added` [] counts the online rows that earlier chunks collected.
    """
    args, env = setup.args, setup.env
    num_updates = round(args.num_envs * args.utd_ratio)

    def step(carry):
        state, added = carry
        key, act_key, reset_key, sample_key, update_key = jax.random.split(state.key, 5)
        obs = state.env_state.obs
        action = act(setup.nets, state.explorer.actor, obs, act_key)
        advance = jax.vmap(partial(envs.step_and_reset, env))
        env_state, reached = advance(state.env_state, action, jax.random.split(reset_key, args.num_envs))
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, rows, added, reached.info["broken"])
        added = added + args.num_envs

        filled = buffer.size(offline) + jnp.minimum(added, buffer.size(ring))
        batch = buffer.take(offline, ring, jax.random.randint(sample_key, (num_updates * args.batch_size,), 0, filled))
        batches = jax.tree.map(lambda x: x.reshape(num_updates, args.batch_size, *x.shape[1:]), batch)

        def learn(carry, xs):
            explorer, bonus, metrics = explore_update(setup, hyper, *carry, *xs)
            return (explorer, bonus), metrics

        carry = (state.explorer, setup.bonus.observe(state.bonus, rows))
        (explorer, bonus), metrics = jax.lax.scan(learn, carry, (batches, jax.random.split(update_key, num_updates)))
        collected = envs.tally(reached)
        return (State(explorer, state.exploiter, bonus, env_state, ring, key), added), {**jax.tree.map(jnp.mean, metrics), **collected}

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


def value_range(low: jax.Array, high: jax.Array, discount: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What Q can be if rewards lie in [low, high] and an episode may terminate after any step, the first one included."""
    return jnp.minimum(low, low / (1 - discount)), jnp.maximum(high, high / (1 - discount))


def retrain_chunk(setup: Setup, state: State, hyper: Hyper, offline: Transition | None, added: jax.Array, *, length: int):
    """`length` gradient steps of the exploiter on the task reward of the offline rows and the `added` [] online ones."""
    args, ring, q_bounds = setup.args, state.ring, (-jnp.inf, jnp.inf)
    filled = buffer.size(offline) + jnp.minimum(added, buffer.size(ring))
    reward = jnp.concatenate([rows.reward for rows in (offline, ring) if rows is not None])
    seen = jnp.arange(len(reward)) < filled
    low, high = jnp.min(reward, where=seen, initial=jnp.inf), jnp.max(reward, where=seen, initial=-jnp.inf)
    if args.bound_q:
        q_bounds = value_range(*(hyper.reward_scale * r + hyper.reward_bias for r in (low, high)), hyper.discount)
    best = seen & (reward == high)
    num_best = round(args.upsample * args.batch_size)
    best_rows = jnp.nonzero(best, size=len(reward), fill_value=0)[0] if num_best else None

    def step(carry):
        exploiter, key = carry
        key, sample_key, best_key, update_key = jax.random.split(key, 4)
        index = jax.random.randint(sample_key, (args.batch_size - num_best,), 0, filled)
        if num_best:
            index = jnp.concatenate([index, best_rows[jax.random.randint(best_key, (num_best,), 0, best.sum())]])
        batch = buffer.take(offline, ring, index)
        bonus = hyper.frozen_bonus_coef * setup.bonus.reward(state.bonus, batch) if args.frozen_bonus else jnp.zeros(args.batch_size)
        exploiter, metrics = update(setup.nets, hyper, exploiter, batch, bonus, q_bounds, update_key)
        return (exploiter, key), metrics

    (exploiter, key), metrics = scan_mean(step, (state.exploiter, state.key), length)
    return state.replace(exploiter=exploiter, key=key), metrics


def make_setup(args: Args, offline: Transition | None) -> Setup:
    """Environment, networks and bonus for `args`, or the reason why they do not go together."""
    env = None if args.env == "none" else envs.make(args.env, args.physics)
    obs_size, action_size = (env.observation_size, env.action_size) if env else (offline.obs.shape[1], offline.action.shape[1])
    nets = Nets(Actor(args.hidden, action_size, args.dropout), Critic(args.hidden), Value(args.hidden))
    bonus = RNDBonus(obs_size, args.rnd_variant) if args.intrinsic == "rnd" else NoBonus()
    if args.intrinsic == "count":
        if not hasattr(env, "layout") or action_size != 2:
            raise cli.UsageError(f"--intrinsic count needs a 2-D task with 2 actions, which {args.env} is not; use rnd")
        bonus = CountBonus(env, args.count_bins)
    return Setup(args, env, nets, bonus, obs_size)


def make_plan(args: Args) -> list[cli.Chunk]:
    """Pre-training, then exploration with a retraining at each of --retrain-at."""
    plan, now = cli.chunks(args, "offline", 0, args.offline_steps), 0
    stops = sorted(set(args.retrain_at or (args.online_steps,)))
    for stop in stops:
        plan += cli.chunks(args, "online", now, stop)
        phase = "retrained" if stop == stops[-1] else f"retrained@{stop}"
        plan += cli.chunks(args, phase, 0, args.retrain_steps, collected=stop)
        now = stop
    return plan + cli.chunks(args, "online", now, args.online_steps)


def main() -> None:
    args = cli.parse(Args, SETTINGS)
    hyper, labels = cli.grid(args)
    data = cli.load_dataset(args)
    hyper = cli.scale_returns(args, hyper, data)
    offline = data and data.transitions
    setup, mesh = make_setup(args, offline), mesh_for(len(labels))
    evaluate = Evaluator(args, setup.env, partial(act, setup.nets), mesh, setup.obs_size, setup.nets.actor.action_size)
    run = Run("ooo_iql", args, labels, data and data.card)

    initialise = Compiled(partial(init_state, setup), mesh, shared=(0,))
    pretrain = Compiled(partial(pretrain_chunk, setup), mesh, shared=(2,), donate=(0,))
    explore = Compiled(partial(explore_chunk, setup), mesh, shared=(2, 3), donate=(0,))
    retrain = Compiled(partial(retrain_chunk, setup), mesh, shared=(2, 3), donate=(0,))
    run.programs = {"offline": pretrain, "online": explore, "retrained": retrain}
    offline, hyper = place(offline, mesh, EVERYWHERE), place(hyper, mesh, RUNS)
    keys = place(jnp.stack([jax.random.PRNGKey(label.seed) for label in labels]), mesh, RUNS)
    done, state = run.restore(initialise(offline, keys))

    for position, chunk in run.progress(make_plan(args), done):
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, length=chunk.length)
        elif chunk.phase == "online":
            state, metrics = explore(state, hyper, offline, chunk.collected, length=chunk.length // args.num_envs)
        else:
            if chunk.first and not args.warm_start:
                state = state.replace(exploiter=initialise(offline, keys).exploiter)
            state, metrics = retrain(state, hyper, offline, chunk.collected, length=chunk.length)
            if chunk.last and args.sync_explorer:
                state = state.replace(explorer=jax.tree.map(jnp.copy, state.exploiter))
        agent = state.exploiter if chunk.phase.startswith("retrained") else state.explorer
        run.after(chunk, metrics, agent, state, position, evaluate, keys)

    report.conclude(
        run, setup.env, data and data.transitions, state.ring, {"explorer": state.explorer.actor, "exploiter": state.exploiter.actor}
    )


if __name__ == "__main__":
    cli.guarded(main)
