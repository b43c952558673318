"""OOO on RLPD: explore with RLPD + RND, then retrain a policy from scratch, without bonus, on everything seen.

Offline-to-Online-to-Offline RL (Mark et al., arXiv 2310.08558) separates the policy that gathers data from the policy
that is handed over. Both are soft actor-critics here, and the first is RLPD (rlpd.py, Ball et al., arXiv 2302.02948):

1. explore  The explorer acts and learns online from r + c * novelty; offline rows, if there are any, are half of each batch.
2. retrain  A fresh exploiter learns from the offline and online rows alike, on the task reward alone, one step of policy and
            alpha to each critic step, with its Q-values held inside what the data's rewards allow, and rare successes up-sampled.

The explorer alone is RLPD + RND: --retrain-steps 0, the same as rlpd.py --intrinsic rnd.
Departures. The official code (MaxSobolMark/OOO b1424a2) retrains plain SAC, here `--retrainer sac`, bounds no Q unless asked, and
adds up-sampled rows to its batches instead of replacing some; the paper's text speaks of pessimism. RND as in rlpd.py.

    python algos/ooo_rlpd.py
"""

from dataclasses import dataclass, field, replace
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
    """learning rate of the critics"""
    alpha_lr: float = 3e-4
    """learning rate of the entropy's weight alpha; 0 keeps --init-alpha"""
    target_rate: float = 0.005
    """share of the critics that goes into their targets at each update"""
    reward_scale: float = 1.0
    """task rewards are multiplied by this"""
    reward_bias: float = 0.0
    """and this is added"""
    # SAC
    entropy_per_action: float = -0.5
    """entropy that alpha aims at, for each dimension of the action: -1 in the paper, -0.5 in jaxrl and RLPD"""
    backup_entropy: float = 1.0
    """weight of the entropy in the critics' target: 1 is SAC, 0 leaves it out (RLPD for goals)"""
    # RND
    intrinsic_coef: float = 10.0
    """c: weight of the exploration bonus"""
    rnd_lr: float = 1e-4
    """learning rate of the RND predictor"""


@dataclass(frozen=True)
class Args:
    """OOO(RLPD): explore online optimistically, retrain pessimistically from scratch."""

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
    offline_ratio: float = 0.5
    """share of each online batch that comes from the offline rows; below 0: that of the offline rows among all"""
    upsample: float = 0.0
    """share of each retraining batch that is drawn from the rows of highest reward"""
    # offline
    offline_steps: int = 0
    """gradient steps of optimistic pre-training"""
    # online
    online_steps: int = 1_000_000
    """environment steps of exploration"""
    random_steps: int = 5_000
    """of these, steps of uniformly random actions and no learning at the start"""
    num_envs: int = 8
    """environments that act side by side, per seed"""
    utd_ratio: float = 20.0
    """critic steps per environment step; num_envs * utd_ratio of them follow each step of all environments"""
    policy_every: int = 20
    """critic steps per step of policy, alpha and RND, online; must divide num_envs * utd_ratio"""
    buffer_size: int = 0
    """online rows kept, a multiple of num_envs; 0: all"""
    intrinsic: Literal["rnd", "none"] = "rnd"
    """exploration bonus: random network distillation, or none"""
    rnd_variant: Literal["paper", "code"] = "paper"
    """paper: novelty of s, two hidden layers, summed squared error; code: of s', one hidden layer, largest squared error"""
    rnd_units: int = 512
    """units of RND's layers, its output included"""
    # retraining
    retrain_steps: int = 1_000_000
    """gradient steps of each retraining; 0: none"""
    retrain_at: tuple[int, ...] = ()
    """environment steps after which to retrain; empty: at the end"""
    retrainer: Literal["rlpd", "sac"] = "rlpd"
    """what learns in retraining: rlpd, critics like the explorer's; sac, two without LayerNorm (OOO's code)"""
    bound_q: bool = True
    """in retraining, hold Q inside what the data's rewards allow"""
    frozen_bonus: bool = False
    """retrain with the explorer's bonus, c * novelty, frozen and added to the reward (the paper's Figure 3)"""
    warm_start: bool = False
    """retrain from the previous exploiter instead of from scratch (the paper's Figure 13)"""
    # optimisation
    batch_size: int = 256
    """rows of a batch"""
    hidden: tuple[int, ...] = (256, 256)
    """units of the policy's hidden layers"""
    critic_hidden: tuple[int, ...] = (256, 256)
    """units of the critics' hidden layers"""
    layer_norm: bool = True
    """LayerNorm in the critics' hidden layers"""
    ensemble: int = 10
    """critics"""
    target_subset: int = 2
    """critics, drawn anew at each critic step, whose least value is the target's"""
    init_alpha: float = 1.0
    """entropy's weight alpha to start with"""
    hyper: Annotated[Hyper, tyro.conf.OmitArgPrefixes] = field(default_factory=Hyper)
    """traced settings, which --sweep can vary"""


# Settings of RLPD and OOO by environment family; those of mazes and of the point mass are ours. Goals pay -1 until there.
GOAL = {"hidden": (256, 256, 256), "critic_hidden": (256, 256, 256), "backup_entropy": 0.0}
SETTINGS = {
    "point-mass-wall": {
        "hidden": (64, 64), "critic_hidden": (64, 64), "actor_lr": 1e-3, "critic_lr": 1e-3, "alpha_lr": 1e-3, "target_rate": 0.02,
        "backup_entropy": 0.0, "online_steps": 96_000, "num_envs": 48, "utd_ratio": 1 / 6, "policy_every": 4, "random_steps": 4_800,
        "rnd_units": 64,
    },
    "point-mass-wall-sparse": {"reward_bias": -1.0},
    "probe": {"hidden": (32, 32), "critic_hidden": (32, 32), "online_steps": 8_000, "random_steps": 0, "utd_ratio": 1.0, "policy_every": 2},
    **{key: {"upsample": 32 / 288} for key in ("halfcheetah-sparse", "ant-sparse")},
    **{key: {**GOAL, "reward_bias": -1.0, "upsample": 8 / 256} for key in ("antmaze", "maze2d")},
    "door": GOAL, "pen": GOAL, "relocate": GOAL,
}  # fmt: skip


class MLP(nn.Module):
    """Dense layers, LayerNorm if asked, and ReLU between them; initialised orthogonally."""

    sizes: tuple[int, ...]
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x):
        for size in self.sizes[:-1]:
            x = nn.Dense(size, kernel_init=orthogonal(2**0.5))(x)
            x = nn.relu(nn.LayerNorm()(x) if self.layer_norm else x)
        return nn.Dense(self.sizes[-1], kernel_init=orthogonal(2**0.5))(x)


class Actor(nn.Module):
    """Mean and log standard deviation, both [..., A], of a Gaussian that tanh squashes into (-1, 1)."""

    hidden: tuple[int, ...]
    action_size: int

    @nn.compact
    def __call__(self, obs):
        mean, log_std = jnp.split(MLP((*self.hidden, 2 * self.action_size))(obs), 2, axis=-1)
        return mean, jnp.clip(log_std - 1.0, -20.0, 2.0)


class Critic(nn.Module):
    """`num` independent Q functions: [num, ...]."""

    hidden: tuple[int, ...]
    num: int = 2
    layer_norm: bool = False

    @nn.compact
    def __call__(self, obs, action):
        ensemble = nn.vmap(MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=self.num)
        return ensemble((*self.hidden, 1), self.layer_norm)(jnp.concatenate([obs, action], axis=-1)).squeeze(-1)


class Nets(NamedTuple):
    """The modules of an agent; their parameters are in `Agent`."""

    actor: Actor
    critic: Critic
    target: Critic  # of the subset that a target asks


@struct.dataclass
class Agent:
    """Parameters and Adam states of one agent."""

    actor: dict
    critic: dict
    target_critic: dict
    log_alpha: jax.Array
    actor_opt: tuple
    critic_opt: tuple
    alpha_opt: tuple


def init_agent(nets: Nets, obs_size: int, init_alpha: float, key: jax.Array) -> Agent:
    keys = jax.random.split(key)
    obs, action = jnp.zeros((1, obs_size)), jnp.zeros((1, nets.actor.action_size))
    actor, critic, log_alpha = nets.actor.init(keys[0], obs), nets.critic.init(keys[1], obs, action), jnp.log(init_alpha)
    adam = optax.scale_by_adam()
    return Agent(actor, critic, jax.tree.map(jnp.copy, critic), log_alpha, adam.init(actor), adam.init(critic), adam.init(log_alpha))


def sample(nets: Nets, actor: dict, obs: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Actions [..., A] drawn from the policy, differentiable in it, and their log densities [...]."""
    mean, log_std = nets.actor.apply(actor, obs)
    noise = jax.random.normal(key, mean.shape)
    u = mean + jnp.exp(log_std) * noise
    # log(1 - tanh(u)^2), the squashing's change of volume, in a form that does not round to log(0).
    squash = 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))
    return jnp.tanh(u), jnp.sum(jax.scipy.stats.norm.logpdf(noise) - log_std - squash, axis=-1)


def critic_loss(params, nets, obs, action, target_q):
    """Squared Bellman error, summed over the critics: SAC, equation (5)."""
    q = nets.critic.apply(params, obs, action)
    return jnp.mean(jnp.sum((q - target_q) ** 2, axis=0))


def actor_loss(params, nets, critic, obs, alpha, key):
    """Mean Q of all critics less entropy at actions of the policy: RLPD, the last line of algorithm 1. Also the actions' log density."""
    action, log_prob = sample(nets, params, obs, key)
    q = nets.critic.apply(critic, obs, action).mean(axis=0)
    return jnp.mean(alpha * log_prob - q), log_prob.mean()


def alpha_loss(log_alpha, log_prob, target_entropy):
    """Raises alpha while the policy's entropy is below its target: SAC, equation (17), in log alpha as its code has it."""
    return -log_alpha * (log_prob + target_entropy)


def descend(params, opt, grads, learning_rate):
    """One Adam step; the learning rate is traced, so it is not part of the optimiser."""
    direction, opt = optax.scale_by_adam().update(grads, opt)
    return jax.tree.map(lambda p, d: p - learning_rate * d, params, direction), opt


def update(nets: Nets, hyper: Hyper, agent: Agent, batches: Transition, bonus: jax.Array, q_bounds: tuple, key: jax.Array):
    """A critic step on each of `batches` [P, B, ...], then one step of policy and alpha on the last. `bonus` [P, B] adds to the reward.

    `q_bounds` holds (low, high) for values of the task reward; (-inf, inf) leaves them free.
    """
    next_key, subset_key, actor_key = jax.random.split(key, 3)
    alpha = jnp.exp(agent.log_alpha)
    # Until its own step the policy stands still: so the next actions of all critic steps are drawn at once, as are the subsets.
    next_action, next_log_prob = sample(nets, agent.actor, batches.next_obs, next_key)
    shuffled = jax.vmap(partial(jax.random.permutation, x=nets.critic.num))(jax.random.split(subset_key, bonus.shape[0]))

    def fit(carry, xs):
        critic, target_critic, opt = carry
        batch, bonus, next_action, next_log_prob, subset = xs
        asked = jax.tree.map(lambda p: p[subset], target_critic)  # the other critics cost nothing
        next_q = nets.target.apply(asked, batch.next_obs, next_action).min(axis=0)
        next_v = next_q - hyper.backup_entropy * alpha * next_log_prob
        task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
        target_q = jnp.clip(task_reward + hyper.discount * batch.discount * next_v, *q_bounds) + bonus
        loss, grads = jax.value_and_grad(critic_loss)(critic, nets, batch.obs, batch.action, target_q)
        critic, opt = descend(critic, opt, grads, hyper.critic_lr)
        return (critic, optax.incremental_update(critic, target_critic, hyper.target_rate), opt), (loss, target_q.mean())

    carry = agent.critic, agent.target_critic, agent.critic_opt
    xs = batches, bonus, next_action, next_log_prob, shuffled[:, : nets.target.num]
    (critic, target_critic, critic_opt), (loss_q, q) = jax.lax.scan(fit, carry, xs)

    obs = batches.obs[-1]
    (loss_a, log_prob), grads = jax.value_and_grad(actor_loss, has_aux=True)(agent.actor, nets, critic, obs, alpha, actor_key)
    actor, actor_opt = descend(agent.actor, agent.actor_opt, grads, hyper.actor_lr)
    grads = jax.grad(alpha_loss)(agent.log_alpha, log_prob, hyper.entropy_per_action * nets.actor.action_size)
    log_alpha, alpha_opt = descend(agent.log_alpha, agent.alpha_opt, grads, hyper.alpha_lr)

    agent = Agent(actor, critic, target_critic, log_alpha, actor_opt, critic_opt, alpha_opt)
    metrics = {"critic_loss": loss_q.mean(), "actor_loss": loss_a, "q": q.mean(), "alpha": alpha, "entropy": -log_prob}
    return agent, {**metrics, "bonus": bonus.mean()}


def act(nets: Nets, actor: dict, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Actions [..., A] for observations [..., obs]: the squashed mean without a key, a sample with one."""
    return jnp.tanh(nets.actor.apply(actor, obs)[0]) if key is None else sample(nets, actor, obs, key)[0]


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

    def __init__(self, obs_size: int, variant: str, units: int):
        self.obs_size, self.variant = obs_size, variant
        self.net = MLP((units, units, units) if variant == "paper" else (units, units))

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
        """Squared errors [B, units] on clipped, normalised states (next states in the code's variant)."""
        x = batch.obs if self.variant == "paper" else batch.next_obs
        x = jnp.clip((x - state.obs.mean) / jnp.sqrt(state.obs.var + 1e-8), -5, 5)
        return (self.net.apply(state.predictor, x) - self.net.apply(state.target, x)) ** 2


class Setup(NamedTuple):
    """What is fixed when a program is compiled."""

    args: Args
    env: envs.Env | None
    nets: Nets
    exploiter: Nets
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


def init_state(setup: Setup, key: jax.Array) -> State:
    args = setup.args
    key, explorer, exploiter, bonus, env = jax.random.split(key, 5)
    env_state = ring = None
    if args.online_steps:
        env_state = jax.vmap(setup.env.reset)(jax.random.split(env, args.num_envs))
        obs, action, scalar = jnp.zeros(setup.obs_size), jnp.zeros(setup.nets.actor.action_size), jnp.float32(0)
        ring = buffer.empty(Transition(obs, action, scalar, obs, scalar), args.buffer_size or args.online_steps)
    agents = [init_agent(nets, setup.obs_size, args.init_alpha, k) for nets, k in ((setup.nets, explorer), (setup.exploiter, exploiter))]
    return State(*agents, setup.bonus.init(bonus, None), env_state, ring, key)


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


def explore_update(setup: Setup, hyper: Hyper, learners: tuple, block: tuple):
    """The bonus learns from all rows of a block, which is (batches [P, B, ...], key), then the agent from reward + c * bonus."""
    (agent, novelty), (batches, key) = learners, block
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
    novelty = setup.bonus.learn(novelty, rows, hyper.rnd_lr)
    bonus = hyper.intrinsic_coef * setup.bonus.reward(novelty, rows).reshape(batches.reward.shape)
    agent, metrics = update(setup.nets, hyper, agent, batches, bonus, (-jnp.inf, jnp.inf), key)
    return (agent, novelty), metrics


def pretrain_chunk(setup: Setup, state: State, hyper: Hyper, offline: Transition, *, length: int):
    """`length` gradient steps of the explorer on the offline rows: each one of critics, policy and alpha."""

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        batches = sample_batches(setup.args, offline, None, 0, 1, sample_key)
        (explorer, bonus), metrics = explore_update(setup, hyper, (state.explorer, state.bonus), (batches, update_key))
        return state.replace(explorer=explorer, bonus=bonus, key=key), metrics

    return scan_mean(step, state, length)


def explore_chunk(setup: Setup, state: State, hyper: Hyper, offline: Transition | None, added: jax.Array, *, length: int):
    """`length` steps of all environments, each followed by num_envs * utd_ratio critic steps once the random steps are over.

    `added` [] counts the online rows that earlier chunks collected.
    """
    args, env = setup.args, setup.env
    num_updates = round(args.num_envs * args.utd_ratio)

    def learn(learners, ring, added, key):
        sample_key, update_key = jax.random.split(key)
        batches = sample_batches(args, offline, ring, added, num_updates, sample_key)
        blocks = jax.tree.map(lambda x: x.reshape(-1, args.policy_every, *x.shape[1:]), batches)
        keys = jax.random.split(update_key, num_updates // args.policy_every)
        learners, metrics = jax.lax.scan(partial(explore_update, setup, hyper), learners, (blocks, keys))
        return learners, jax.tree.map(jnp.mean, metrics)

    def idle(learners, ring, added, key):
        metrics = jax.eval_shape(learn, learners, ring, added, key)[1]
        return learners, jax.tree.map(lambda x: jnp.zeros(x.shape), metrics)

    def step(carry):
        state, added = carry
        key, act_key, reset_key, learn_key = jax.random.split(state.key, 4)
        obs = state.env_state.obs
        action = act(setup.nets, state.explorer.actor, obs, act_key)
        action = jnp.where(added < args.random_steps, jax.random.uniform(act_key, action.shape, minval=-1.0), action)
        advance = jax.vmap(partial(envs.step_and_reset, env))
        env_state, reached = advance(state.env_state, action, jax.random.split(reset_key, args.num_envs))
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, rows, added, reached.info["broken"])
        learners, added = (state.explorer, setup.bonus.observe(state.bonus, rows)), added + args.num_envs
        (explorer, bonus), metrics = jax.lax.cond(added > args.random_steps, learn, idle, learners, ring, added, learn_key)
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
    best_rows = jnp.nonzero(best, size=len(reward), fill_value=0)[0]

    def step(carry):
        exploiter, key = carry
        key, sample_key, best_key, update_key = jax.random.split(key, 4)
        index = jax.random.randint(sample_key, (args.batch_size - num_best,), 0, filled)
        up_sampled = best_rows[jax.random.randint(best_key, (num_best,), 0, best.sum())]
        batch = buffer.take(offline, ring, jnp.concatenate([index, up_sampled]))
        bonus = hyper.intrinsic_coef * setup.bonus.reward(state.bonus, batch) if args.frozen_bonus else jnp.zeros(args.batch_size)
        block = jax.tree.map(lambda x: x[None], (batch, bonus))
        exploiter, metrics = update(setup.exploiter, hyper, exploiter, *block, q_bounds, update_key)
        return (exploiter, key), metrics

    (exploiter, key), metrics = scan_mean(step, (state.exploiter, state.key), length)
    return state.replace(exploiter=exploiter, key=key), metrics


def make_setup(args: Args, offline: Transition | None) -> Setup:
    """Environment, networks and bonus for `args`, or the reason why they do not go together."""
    env = None if args.env == "none" else envs.make(args.env, args.physics)
    obs_size, action_size = (env.observation_size, env.action_size) if env else (offline.obs.shape[1], offline.action.shape[1])
    if args.target_subset > args.ensemble:
        raise cli.UsageError(f"--target-subset {args.target_subset} is more than the --ensemble of {args.ensemble} critics")
    num_updates = round(args.num_envs * args.utd_ratio) if args.online_steps else 0
    if num_updates % args.policy_every:
        raise cli.UsageError(f"--policy-every {args.policy_every} must divide num_envs * utd_ratio, {num_updates}")
    actor, hidden = Actor(args.hidden, action_size), args.critic_hidden
    nets = lambda num, subset, norm: Nets(actor, Critic(hidden, num, norm), Critic(hidden, subset, norm))  # noqa: E731
    explorer = nets(args.ensemble, args.target_subset, args.layer_norm)
    exploiter = explorer if args.retrainer == "rlpd" else nets(2, 2, False)
    bonus = RNDBonus(obs_size, args.rnd_variant, args.rnd_units) if args.intrinsic == "rnd" else NoBonus()
    return Setup(args, env, explorer, exploiter, bonus, obs_size)


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
        args = replace(args, dataset=datasets.own(args.env))
        cli.check(args)
    hyper, labels = cli.grid(args)
    data = cli.load_dataset(args)
    offline = data and data.transitions
    setup, mesh = make_setup(args, offline), mesh_for(len(labels))
    evaluate = Evaluator(args, setup.env, partial(act, setup.nets), mesh, setup.obs_size, setup.nets.actor.action_size)
    run = Run("ooo_rlpd", args, labels, data and data.card)

    initialise = Compiled(partial(init_state, setup), mesh)
    pretrain = Compiled(partial(pretrain_chunk, setup), mesh, shared=(2,), donate=(0,))
    explore = Compiled(partial(explore_chunk, setup), mesh, shared=(2, 3), donate=(0,))
    retrain = Compiled(partial(retrain_chunk, setup), mesh, shared=(2, 3), donate=(0,))
    run.programs = {"offline": pretrain, "online": explore, "retrained": retrain}
    offline, hyper = place(offline, mesh, EVERYWHERE), place(hyper, mesh, RUNS)
    keys = place(jnp.stack([jax.random.PRNGKey(label.seed) for label in labels]), mesh, RUNS)
    done, state = run.restore(initialise(keys))

    for position, chunk in run.progress(make_plan(args), done):
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, length=chunk.length)
        elif chunk.phase == "online":
            state, metrics = explore(state, hyper, offline, chunk.collected, length=chunk.length // args.num_envs)
        else:
            if chunk.first and not args.warm_start:
                state = state.replace(exploiter=initialise(keys).exploiter)
            state, metrics = retrain(state, hyper, offline, chunk.collected, length=chunk.length)
        agent = state.exploiter if chunk.phase.startswith("retrained") else state.explorer
        run.after(chunk, metrics, agent, state, position, evaluate, keys)

    actors = {"explorer": state.explorer.actor, "exploiter": state.exploiter.actor}
    report.conclude(run, setup.env, data and data.transitions, state.ring, actors)


if __name__ == "__main__":
    cli.guarded(main)
