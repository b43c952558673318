"""TD3: twin delayed deterministic policy gradient (Fujimoto et al., arXiv 1802.09477); with a bonus, OOO's baseline TD3 + RND.

The policy is deterministic, and explores by noise added to its actions. Two critics are fitted to r + discount * min Q(s', a'), where
a' is the target policy's action with clipped noise, so that a narrow peak of Q gains nothing; the policy climbs the first critic,
and it and all targets move at every `--policy-every`-th step only. It is here as two baselines of OOO (arXiv 2310.08558):

- TD3 + RND: `--intrinsic rnd --dataset own`. No pre-training: the data are in the buffer from the start, drawn like all other rows.
- An exploiter without pessimism (Figure 5c): `--retrain-steps N` ends with training a fresh agent, as in ooo_iql.py, on the task
  reward of all rows. Only `--bound-q` holds its Q-values back; a seed whose Q passes --max-q is stopped and named.

Departures. What OOO's code (MaxSobolMark/OOO b1424a2) calls TD3 is another method, here `--variant code`: a Gaussian squashed by
tanh, its deviation independent of the state, no entropy term; a' is drawn from the policy itself, with no target policy and no
target noise; no delay; the policy climbs the mean of both critics. (Its V, which nothing reads, is left out.) OOO's numbers
presumably come from it; its paper says TD3, so that is the default. Where paper and code of TD3 (sfujim/TD3 34770cc) differ
(networks, batches, Adam, 25,000 random steps), settings are the code's; networks start orthogonal, as in OOO's; several
environments act at once (`--num-envs`).

    python algos/td3.py
"""

import dataclasses
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
from data import buffer, cli, datasets, report
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
    target_rate: float = 0.005
    """share of the critics that goes into their targets at each update"""
    reward_scale: float = 1.0
    """task rewards are multiplied by this"""
    reward_bias: float = 0.0
    """and this is added"""
    # TD3
    policy_every: float = 2.0
    """gradient steps of the critics for each one of the policy and the targets; --variant code has 1"""
    exploration_noise: float = 0.1
    """standard deviation of the noise added to actions online"""
    target_noise: float = 0.2
    """and of that added to the target policy's actions"""
    target_noise_clip: float = 0.5
    """bound of the latter noise"""
    # OOO
    intrinsic_coef: float = 0.5
    """c: weight of the exploration bonus"""
    frozen_bonus_coef: float = 10.0
    """weight of the bonus in retraining with --frozen-bonus"""
    rnd_lr: float = 1e-4
    """learning rate of the RND predictor"""


@dataclass(frozen=True)
class Args:
    """TD3: train online, from scratch or with a dataset's rows in the buffer; retrain from scratch if asked."""

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
    dataset: str = "own"
    """Minari id, or a .hdf5 or .npz file; none: no offline data; own: that of the environment, if it has one"""
    clip_actions: bool = False
    """clip dataset actions that lie outside [-1, 1] instead of refusing them"""
    export: str = ""
    """write each seed's online experience as the Minari dataset EXPORT-seed<k>-v0, e.g. ooo/my-run"""
    offline_ratio: float = -1.0
    """share of each online batch that comes from the offline rows; below 0: that of the offline rows among all"""
    upsample: float = 0.0
    """share of each retraining batch that is drawn from the rows of highest reward"""
    # offline
    offline_steps: int = 0
    """gradient steps on the dataset"""
    # online
    online_steps: int = 1_000_000
    """environment steps"""
    random_steps: int = 25_000
    """of these, steps of uniformly random actions and no learning at the start"""
    num_envs: int = 8
    """environments that act side by side, per seed"""
    utd_ratio: float = 1.0
    """gradient steps per environment step; num_envs * utd_ratio of them follow each step of all environments"""
    buffer_size: int = 0
    """online rows kept, a multiple of num_envs; 0: all"""
    intrinsic: Literal["rnd", "none"] = "none"
    """exploration bonus: random network distillation (OOO's TD3 + RND), or none"""
    rnd_variant: Literal["paper", "code"] = "paper"
    """paper: novelty of s, two hidden layers, summed squared error; code: of s', one hidden layer, largest squared error"""
    # retraining
    retrain_steps: int = 0
    """gradient steps of each retraining; 0: none"""
    retrain_at: tuple[int, ...] = ()
    """environment steps after which to retrain; empty: at the end"""
    bound_q: bool = False
    """in retraining, hold Q inside what the data's rewards allow"""
    frozen_bonus: bool = False
    """retrain with the explorer's bonus, frozen, added to the reward"""
    # optimisation
    batch_size: int = 256
    """rows of a batch"""
    hidden: tuple[int, ...] = (256, 256)
    """units of the policy's hidden layers"""
    critic_hidden: tuple[int, ...] = (256, 256)
    """units of the critics' hidden layers"""
    # TD3
    variant: Literal["paper", "code"] = "paper"
    """paper: TD3; code: what OOO's code calls so, a stochastic policy without target policy, target noise and delay"""
    hyper: Annotated[Hyper, tyro.conf.OmitArgPrefixes] = field(default_factory=Hyper)
    """traced settings, which --sweep can vary"""


# Settings by environment family: TD3's code in locomotion; OOO's table, with TD3's networks and rates, on its tasks, where the data's rows
# stand in for random steps and intrinsic_coef is what --intrinsic rnd takes. Those of the point mass are ours.
SETTINGS = {
    "point-mass-wall": {
        "hidden": (64, 64), "critic_hidden": (64, 64), "actor_lr": 1e-3, "critic_lr": 1e-3, "target_rate": 0.02, "intrinsic_coef": 10.0,
        "online_steps": 960_000, "num_envs": 48, "utd_ratio": 1 / 48, "random_steps": 4_800,
    },
    "point-mass-wall-sparse": {"reward_bias": -1.0},
    "probe": {"hidden": (32, 32), "critic_hidden": (32, 32), "online_steps": 8_000, "random_steps": 0},
    "antmaze": {"reward_bias": -1.0, "intrinsic_coef": 10.0, "online_steps": 1_500_000, "upsample": 8 / 256, "random_steps": 0},
    "maze2d": {"reward_bias": -1.0, "intrinsic_coef": 10.0, "online_steps": 500_000, "random_steps": 0},
    "kitchen": {"reward_bias": -4.0, "intrinsic_coef": 10.0, "online_steps": 4_000_000, "random_steps": 0},
    "hammer": {"online_steps": 500_000, "random_steps": 0},
    **{key: {"random_steps": 0} for key in ("door", "pen", "relocate")},
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
    """Mean [..., A] that tanh squashes into (-1, 1); with `gaussian` also a log standard deviation, before the squashing, of all states."""

    hidden: tuple[int, ...]
    action_size: int
    gaussian: bool = False

    @nn.compact
    def __call__(self, obs):
        mean = MLP((*self.hidden, self.action_size))(obs)
        if not self.gaussian:
            return mean, None
        return mean, jnp.clip(self.param("log_std_before_tanh", nn.initializers.zeros, (self.action_size,)), -5.0, 2.0)


class Critic(nn.Module):
    """Two independent Q functions: [2, B]."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        ensemble = nn.vmap(MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
        return ensemble((*self.hidden, 1))(jnp.concatenate([obs, action], axis=-1)).squeeze(-1)


class Nets(NamedTuple):
    """The modules of an agent; their parameters are in `Agent`."""

    actor: Actor
    critic: Critic


@struct.dataclass
class Agent:
    """Parameters and Adam states of one agent; --variant code never uses the target policy."""

    actor: dict
    critic: dict
    target_actor: dict
    target_critic: dict
    actor_opt: tuple
    critic_opt: tuple


def init_agent(nets: Nets, obs_size: int, key: jax.Array) -> Agent:
    keys = jax.random.split(key)
    obs, action = jnp.zeros((1, obs_size)), jnp.zeros((1, nets.actor.action_size))
    actor, critic = nets.actor.init(keys[0], obs), nets.critic.init(keys[1], obs, action)
    adam = optax.scale_by_adam()
    return Agent(actor, critic, *jax.tree.map(jnp.copy, (actor, critic)), adam.init(actor), adam.init(critic))


def act(nets: Nets, actor: dict, obs: jax.Array, key: jax.Array | None = None, noise=0.0, bound=jnp.inf) -> jax.Array:
    """Actions [..., A] for observations [..., obs]: the policy's own without a key; with one, Gaussian noise is added and the sum clipped.

    `noise` is its standard deviation, `bound` how far it reaches. A Gaussian policy draws a sample instead, and needs neither.
    """
    mean, log_std = nets.actor.apply(actor, obs)
    draw = jnp.zeros(mean.shape) if key is None else jax.random.normal(key, mean.shape)
    if nets.actor.gaussian:
        return jnp.tanh(mean + jnp.exp(log_std) * draw)
    return jnp.clip(jnp.tanh(mean) + jnp.clip(noise * draw, -bound, bound), -1.0, 1.0)


def target_action(nets, hyper, agent, next_obs, key):
    """a': the target policy's action with clipped noise, TD3, algorithm 1. In the code's variant a sample of the policy."""
    if nets.actor.gaussian:
        return act(nets, agent.actor, next_obs, key)
    return act(nets, agent.target_actor, next_obs, key, hyper.target_noise, hyper.target_noise_clip)


def critic_loss(params, nets, obs, action, target_q):
    """Squared Bellman error of both critics, summed over them: TD3, algorithm 1."""
    q = nets.critic.apply(params, obs, action)
    return jnp.mean(jnp.sum((q - target_q) ** 2, axis=0))


def actor_loss(params, nets, critic, obs, key):
    """-Q1 at the policy's actions, whose gradient is that of TD3's algorithm 1. In the code's variant both critics' mean, at samples."""
    if nets.actor.gaussian:
        return -nets.critic.apply(critic, obs, act(nets, params, obs, key)).mean()
    return -nets.critic.apply(critic, obs, act(nets, params, obs))[0].mean()


def descend(params, opt, grads, learning_rate):
    """One Adam step; the learning rate is traced, so it is not part of the optimiser."""
    direction, opt = optax.scale_by_adam().update(grads, opt)
    return jax.tree.map(lambda p, d: p - learning_rate * d, params, direction), opt


def update(nets: Nets, hyper: Hyper, agent: Agent, batch: Transition, bonus: jax.Array, q_bounds: tuple, key: jax.Array):
    """One gradient step of the critics and, when it is their turn, of policy and targets. `bonus` [B] enters the critics' target alone.

    `q_bounds` holds (low, high) for Q-values of the task reward; (-inf, inf) leaves them free.
    """
    next_key, actor_key = jax.random.split(key)
    next_action = target_action(nets, hyper, agent, batch.next_obs, next_key)
    next_q = nets.critic.apply(agent.target_critic, batch.next_obs, next_action).min(axis=0)
    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = jnp.clip(task_reward + hyper.discount * batch.discount * next_q, *q_bounds) + bonus
    loss_q, grads = jax.value_and_grad(critic_loss)(agent.critic, nets, batch.obs, batch.action, target_q)
    critic, critic_opt = descend(agent.critic, agent.critic_opt, grads, hyper.critic_lr)

    # OOO's code takes the policy's step before that of the critics.
    climbed = agent.critic if nets.actor.gaussian else critic
    loss_a, grads = jax.value_and_grad(actor_loss)(agent.actor, nets, climbed, batch.obs, actor_key)
    actor, actor_opt = descend(agent.actor, agent.actor_opt, grads, hyper.actor_lr)
    targets = optax.incremental_update((actor, critic), (agent.target_actor, agent.target_critic), hyper.target_rate)

    # Taken at every step, kept at some: seeds that are vmapped would take both ways of a condition anyway.
    due = (critic_opt.count % hyper.policy_every == 0) | nets.actor.gaussian
    waiting = agent.replace(critic=critic, critic_opt=critic_opt)
    agent = jax.tree.map(partial(jnp.where, due), Agent(actor, critic, *targets, actor_opt, critic_opt), waiting)
    return agent, {"actor_loss": loss_a, "critic_loss": loss_q, "q": target_q.mean(), "bonus": bonus.mean()}


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
    """`length` steps of all environments, each followed by num_envs * utd_ratio gradient steps once the random steps are over.

    `added` [] counts the online rows that earlier chunks collected.
    """
    args, env = setup.args, setup.env
    num_updates = round(args.num_envs * args.utd_ratio)

    def learn(learner, ring, added, key):
        sample_key, update_key = jax.random.split(key)
        batches = sample_batches(args, offline, ring, added, num_updates, sample_key)

        def descend_on(learner, xs):
            explorer, bonus, metrics = explore_update(setup, hyper, *learner, *xs)
            return (explorer, bonus), metrics

        learner, metrics = jax.lax.scan(descend_on, learner, (batches, jax.random.split(update_key, num_updates)))
        return learner, jax.tree.map(jnp.mean, metrics)

    def idle(learner, ring, added, key):
        metrics = jax.eval_shape(learn, learner, ring, added, key)[1]
        return learner, jax.tree.map(lambda x: jnp.zeros(x.shape), metrics)

    def step(carry):
        state, added = carry
        key, act_key, reset_key, learn_key = jax.random.split(state.key, 4)
        obs = state.env_state.obs
        action = act(setup.nets, state.explorer.actor, obs, act_key, hyper.exploration_noise)
        action = jnp.where(added < args.random_steps, jax.random.uniform(act_key, action.shape, minval=-1.0), action)
        advance = jax.vmap(partial(envs.step_and_reset, env))
        env_state, reached = advance(state.env_state, action, jax.random.split(reset_key, args.num_envs))
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, rows, added, reached.info["broken"])
        added = added + args.num_envs
        learner = state.explorer, setup.bonus.observe(state.bonus, rows)
        (explorer, bonus), metrics = jax.lax.cond(added > args.random_steps, learn, idle, learner, ring, added, learn_key)
        return (State(explorer, state.exploiter, bonus, env_state, ring, key), added), {**metrics, **envs.tally(reached)}

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
    if not (args.hyper.policy_every >= 1 and args.hyper.policy_every % 1 == 0):
        raise cli.UsageError(f"--policy-every must be a whole number, at least 1, not {args.hyper.policy_every:g}")
    for name in ("exploration_noise", "target_noise", "target_noise_clip"):
        if not getattr(args.hyper, name) >= 0:
            raise cli.UsageError(f"--{name.replace('_', '-')} must be at least 0, not {getattr(args.hyper, name):g}")
    if args.frozen_bonus and args.intrinsic == "none":
        raise cli.UsageError("--frozen-bonus needs --intrinsic rnd, the bonus to freeze")
    env = None if args.env == "none" else envs.make(args.env, args.physics)
    obs_size, action_size = (env.observation_size, env.action_size) if env else (offline.obs.shape[1], offline.action.shape[1])
    nets = Nets(Actor(args.hidden, action_size, args.variant == "code"), Critic(args.critic_hidden))
    bonus = RNDBonus(obs_size, args.rnd_variant) if args.intrinsic == "rnd" else NoBonus()
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
    if args.dataset == "own":
        args = dataclasses.replace(args, dataset=datasets.own(args.env))
        cli.check(args)
    hyper, labels = cli.grid(args)
    data = cli.load_dataset(args)
    offline = data and data.transitions
    setup, mesh = make_setup(args, offline), mesh_for(len(labels))
    evaluate = Evaluator(args, setup.env, partial(act, setup.nets), mesh, setup.obs_size, setup.nets.actor.action_size)
    run = Run("td3", args, labels, data and data.card)

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
            if chunk.first:
                state = state.replace(exploiter=initialise(offline, keys).exploiter)
            state, metrics = retrain(state, hyper, offline, chunk.collected, length=chunk.length)
        agent = state.exploiter if chunk.phase.startswith("retrained") else state.explorer
        run.after(chunk, metrics, agent, state, position, evaluate, keys)

    actors = {"policy": state.explorer.actor} | ({"exploiter": state.exploiter.actor} if args.retrain_steps else {})
    report.conclude(run, setup.env, data and data.transitions, state.ring, actors)


if __name__ == "__main__":
    cli.guarded(main)
