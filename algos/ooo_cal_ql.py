"""OOO on Cal-QL: explore with an optimistic policy, then retrain a pessimistic one from scratch on everything seen.

Offline-to-Online-to-Offline RL (Mark et al., arXiv 2310.08558), the policy that gathers data being Cal-QL's (cal_ql.py), and the one
that is handed over CQL's (cql.py), which is more careful, having no floor under the values that it pushes down:

1. pre-train  The explorer, Cal-QL, learns from the offline data with r + c * bonus in place of r in its target.
2. explore    It acts and learns online; the bonus (random network distillation) draws it to what it has not seen.
3. retrain    A fresh CQL agent learns from the offline rows and those collected, on the task reward alone, with its targets
              held inside what the data's rewards allow. `--retrain-steps 0` leaves this out: Cal-QL + RND.

Departures from the official code (MaxSobolMark/OOO b1424a2), beside those in cal_ql.py. There the predictor and the moments of RND are
constants of the compiled function, so that the bonus hardly changes; here they learn with every update. There returns
of the bonus are worked out for the floor and never used; here, in the open, the floor is of the task's rewards alone, and stays
a floor, for no bonus is negative. RND is ooo_iql.py's. Up-sampled rows take places in the batch (there, 32 come on top).

    python algos/ooo_cal_ql.py
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
    actor_lr: float = 1e-4
    """learning rate of the policy"""
    critic_lr: float = 3e-4
    """learning rate of the two critics, and of alpha'"""
    alpha_lr: float = 1e-4
    """learning rate of the entropy's weight alpha; 0 keeps --init-alpha"""
    target_rate: float = 0.005
    """share of the critics that goes into their targets at each update"""
    reward_scale: float = 1.0
    """task rewards are multiplied by this"""
    reward_bias: float = 0.0
    """and this is added"""
    # SAC
    entropy_per_action: float = -1.0
    """entropy that alpha aims at, for each dimension of the action: -1 in the paper, -0.5 in jaxrl and RLPD"""
    # CQL
    cql_weight: float = 5.0
    """weight of the conservative loss beside the Bellman error; with --lagrange alpha' multiplies it"""
    lagrange_gap: float = 0.8
    """difference between the soft maximum and the data's Q at which --lagrange aims"""
    # Cal-QL
    target_min: float = -float("inf")
    """the explorer's target, less the bonus, is held at or above this"""
    target_max: float = float("inf")
    """and at or below this"""
    # OOO
    intrinsic_coef: float = 0.5
    """c: weight of the exploration bonus"""
    frozen_bonus_coef: float = 10.0
    """weight of the bonus in retraining with --frozen-bonus"""
    rnd_lr: float = 1e-4
    """learning rate of the RND predictor"""
    retrain_scale: float = 1.0
    """in retraining, scaled rewards are also multiplied by this"""
    retrain_bias: float = 0.0
    """and this is added"""
    upsample_from: float = float("inf")
    """task reward from which --upsample takes rows; the highest seen, if no row has as much"""


@dataclass(frozen=True)
class Args:
    """OOO(Cal-QL): pre-train offline, explore online optimistically, retrain pessimistically from scratch."""

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
    offline_ratio: float = 0.5
    """share of each online batch that comes from the offline rows; below 0: that of the offline rows among all"""
    # offline
    offline_steps: int = 1_000_000
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
    intrinsic: Literal["rnd", "none"] = "rnd"
    """exploration bonus: random network distillation, or none"""
    rnd_variant: Literal["paper", "code"] = "paper"
    """paper: novelty of s, two hidden layers, summed squared error; code: of s', one hidden layer, largest squared error"""
    sync_explorer: bool = False
    """after each retraining the explorer goes on from the exploiter (the paper's Figure 14)"""
    # retraining
    retrain_steps: int = 1_000_000
    """gradient steps of each retraining; 0: none"""
    retrain_at: tuple[int, ...] = ()
    """environment steps after which to retrain; empty: at the end"""
    bound_q: bool = True
    """in retraining, hold Q inside what the data's rewards allow"""
    frozen_bonus: bool = False
    """retrain with the explorer's bonus, frozen, added to the reward (the paper's Figure 3)"""
    warm_start: bool = False
    """retrain from the previous exploiter instead of from scratch (the paper's Figure 13)"""
    retrain_ratio: float = -1.0
    """share of each retraining batch that comes from the offline rows; below 0: that of the offline rows among all"""
    retrain_critic_hidden: tuple[int, ...] = ()
    """units of the exploiter's critics, if not those of the explorer's"""
    # optimisation
    batch_size: int = 256
    """rows of a batch"""
    hidden: tuple[int, ...] = (256, 256)
    """units of the policy's hidden layers"""
    critic_hidden: tuple[int, ...] = (256, 256, 256)
    """units of the critics' hidden layers"""
    init_alpha: float = 1.0
    """entropy's weight alpha to start with"""
    # CQL
    num_samples: int = 10
    """actions drawn at each row, of each of three kinds, for the soft maximum of Q"""
    importance_sampling: bool = True
    """divide exp Q by its action's density; else do not, and let the data's action join the sum"""
    lagrange: bool = False
    """multiply the weight by alpha', which is moved until the difference is --lagrange-gap"""
    max_target_backup: bool = True
    """the target's next value is the best of --num-samples actions of the policy, not that of one"""
    # Cal-QL
    calibrate_random: bool = True
    """raise the Q-values of uniform actions to the floor, too"""
    mc_bootstrap: Literal["last", "worst", "zero"] = "last"
    """what is taken to follow a truncated episode: its last reward for ever, the least reward seen for ever, or nothing"""
    hyper: Annotated[Hyper, tyro.conf.OmitArgPrefixes] = field(default_factory=Hyper)
    """traced settings, which --sweep can vary"""


# The settings of OOO's and Cal-QL's code by environment family; those of the point mass are ours.
MAZE = {"critic_hidden": (256, 256, 256, 256), "lagrange": True, "reward_scale": 10.0, "reward_bias": -5.0}
HAND = {
    "hidden": (512, 512), "critic_hidden": (512, 512, 512), "cql_weight": 1.0, "offline_steps": 20_000, "retrain_steps": 500_000,
    "retrain_ratio": 0.5,
}  # fmt: skip
SETTINGS = {
    "point-mass-wall": {
        "hidden": (64, 64), "critic_hidden": (64, 64), "actor_lr": 1e-3, "critic_lr": 1e-3, "alpha_lr": 1e-3, "target_rate": 0.02,
        "offline_steps": 5_000, "online_steps": 960_000, "num_envs": 48, "utd_ratio": 1 / 48, "num_samples": 4, "retrain_steps": 12_000,
        "cql_weight": 10.0, "entropy_per_action": -2.0, "upsample": 8 / 256,
    },
    "point-mass-wall-sparse": {"reward_bias": -1.0},
    "probe": {"hidden": (32, 32), "critic_hidden": (32, 32), "offline_steps": 0, "online_steps": 8_000, "retrain_steps": 1_000},
    **{key: {"offline_steps": 0} for key in ("halfcheetah-sparse", "ant-sparse")},
    "antmaze": {**MAZE, "intrinsic_coef": 50.0, "online_steps": 2_000_000},
    "maze2d": {
        **MAZE, "offline_steps": 500_000, "target_min": -500.0, "target_max": 600.0, "intrinsic_coef": 10.0, "upsample": 32 / 256,
    },
    "kitchen": {
        "hidden": (512, 512, 512), "critic_hidden": (512, 512, 512), "importance_sampling": False, "reward_bias": -5.0, "target_max": 50.0,
        "offline_ratio": 0.25, "offline_steps": 500_000, "intrinsic_coef": 10.0, "retrain_bias": 1.0, "retrain_ratio": 0.25,
    },
    "kitchen-complete": {"online_steps": 4_000_000, "retrain_critic_hidden": (256, 256, 256)},
    **dict.fromkeys(("door", "pen", "relocate"), HAND),
    **{key: {"reward_scale": 10.0, "reward_bias": 5.0} for key in ("door-binary", "pen-binary", "relocate-binary")},
    "hammer": {
        **HAND, "target_max": 10_300.0, "retrain_steps": 1_000_000, "retrain_ratio": -1.0,
        "retrain_scale": 0.01, "upsample": 32 / 256, "upsample_from": 25.0,
    },
}  # fmt: skip


@struct.dataclass
class Rows(Transition):
    """Rows and the return from each to the end of its episode; -inf where that is not known."""

    mc_return: jax.Array


class MLP(nn.Module):
    """Dense layers, LayerNorm if asked, and ReLU between them; initialised orthogonally, the last layer small if not told otherwise."""

    sizes: tuple[int, ...]
    layer_norm: bool = False
    last: float = 1e-2

    @nn.compact
    def __call__(self, x):
        for size in self.sizes[:-1]:
            x = nn.Dense(size, kernel_init=orthogonal(2**0.5))(x)
            x = nn.relu(nn.LayerNorm()(x) if self.layer_norm else x)
        return nn.Dense(self.sizes[-1], kernel_init=orthogonal(self.last))(x)


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


@struct.dataclass
class Agent:
    """Parameters and Adam states of one agent."""

    actor: dict
    critic: dict
    target_critic: dict
    log_alpha: jax.Array
    log_alpha_prime: jax.Array
    actor_opt: tuple
    critic_opt: tuple
    alpha_opt: tuple
    alpha_prime_opt: tuple


def init_agent(nets: Nets, obs_size: int, init_alpha: float, key: jax.Array) -> Agent:
    keys = jax.random.split(key)
    obs, action = jnp.zeros((1, obs_size)), jnp.zeros((1, nets.actor.action_size))
    actor, critic, log_alpha = nets.actor.init(keys[0], obs), nets.critic.init(keys[1], obs, action), jnp.log(init_alpha)
    log_alpha_prime = jnp.float32(1.0)  # where JaxCQL starts; the original code at 0
    opts = [optax.scale_by_adam().init(params) for params in (actor, critic, log_alpha, log_alpha_prime)]
    return Agent(actor, critic, jax.tree.map(jnp.copy, critic), log_alpha, log_alpha_prime, *opts)


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


def conservative_loss(params, nets, obs, action, candidates, log_density, floor, diff_clip):
    """Soft maximum of max(Q, floor) over `candidates` [N, B, A] less Q of the data's action, clipped, for each critic [2].

    CQL, equation (4), with Cal-QL's floor [N, B], equation (5.1) of its paper. Also the share of Q-values that it raised.
    """
    q = jax.vmap(partial(nets.critic.apply, params, obs))(candidates)
    soft_max = jax.nn.logsumexp(jnp.maximum(q, floor[:, None]) - log_density[:, None], axis=0)
    return jnp.clip(soft_max - nets.critic.apply(params, obs, action), *diff_clip).mean(axis=-1), jnp.mean(q < floor[:, None])


def actor_loss(params, nets, critic, obs, alpha, key):
    """Least Q less entropy at actions of the policy: SAC, equation (7). Also the actions' log density."""
    action, log_prob = sample(nets, params, obs, key)
    q = nets.critic.apply(critic, obs, action).min(axis=0)
    return jnp.mean(alpha * log_prob - q), log_prob.mean()


def alpha_loss(log_alpha, log_prob, target_entropy):
    """Raises alpha while the policy's entropy is below its target: SAC, equation (17), in log alpha as its code has it."""
    return -log_alpha * (log_prob + target_entropy)


def multiplier(log_alpha_prime):
    """alpha', kept finite."""
    return jnp.clip(jnp.exp(log_alpha_prime), 0.0, 1e6)


def alpha_prime_loss(log_alpha_prime, excess):
    """Raises alpha' while the weighted difference exceeds its gap: the paper's Lagrange version, in log alpha'."""
    return -multiplier(log_alpha_prime) * excess


def descend(params, opt, grads, learning_rate):
    """One Adam step; the learning rate is traced, so it is not part of the optimiser."""
    direction, opt = optax.scale_by_adam().update(grads, opt)
    return jax.tree.map(lambda p, d: p - learning_rate * d, params, direction), opt


def sample_many(nets: Nets, actor: dict, obs: jax.Array, num: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`num` actions of the policy at each observation [B, obs], [num, B, A], and their log densities [num, B]."""
    return jax.vmap(partial(sample, nets, actor, obs))(jax.random.split(key, num))


def draw_candidates(args: Args, nets: Nets, actor: dict, batch: Transition, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Actions [N, B, A] that stand for all others in the soft maximum, and what to take from their Q-values there [N, B].

    They are `--num-samples` each: uniform, of the policy at s, of the policy at s'; without importance sampling also the data's.
    """
    uniform_key, here_key, next_key = jax.random.split(key, 3)
    uniform = jax.random.uniform(uniform_key, (args.num_samples, *batch.action.shape), minval=-1.0)
    here, log_prob = sample_many(nets, actor, batch.obs, args.num_samples, here_key)
    following, next_log_prob = sample_many(nets, actor, batch.next_obs, args.num_samples, next_key)
    if not args.importance_sampling:
        actions = jnp.concatenate([uniform, here, following, batch.action[None]])
        return actions, jnp.zeros(actions.shape[:-1])
    log_uniform = jnp.full(log_prob.shape, -batch.action.shape[-1] * jnp.log(2.0))
    return jnp.concatenate([uniform, here, following]), jnp.concatenate([log_uniform, log_prob, next_log_prob])


def calibration_floor(args: Args, mc_return: jax.Array) -> jax.Array:
    """The least [N, B] that each of the candidates' Q-values counts for, from the rows' returns [B]."""
    free = jnp.full_like(mc_return, -jnp.inf)
    uniform = mc_return if args.calibrate_random else free
    return jnp.stack([uniform] * args.num_samples + [mc_return] * (2 * args.num_samples) + [free] * (not args.importance_sampling))


def update(
    args: Args, nets: Nets, hyper: Hyper, agent: Agent, batch: Rows, bonus: jax.Array, q_bounds: tuple, key: jax.Array
):  # fmt: skip
    """One gradient step of critics and alpha', policy and alpha, in this order. `bonus` [B] enters the critics' target alone.

    `q_bounds` holds (low, high) for Q-values of the task reward; (-inf, inf) leaves them free.
    """
    next_key, candidate_key, actor_key = jax.random.split(key, 3)
    alpha = jnp.exp(agent.log_alpha)
    next_action, _ = sample_many(nets, agent.actor, batch.next_obs, args.num_samples if args.max_target_backup else 1, next_key)
    next_q = jax.vmap(partial(nets.critic.apply, agent.target_critic, batch.next_obs))(next_action).min(axis=1)
    next_v = next_q.max(axis=0)
    target_q = hyper.reward_scale * batch.reward + hyper.reward_bias + hyper.discount * batch.discount * next_v
    target_q = jnp.clip(target_q, *q_bounds) + bonus

    candidates, log_density = draw_candidates(args, nets, agent.actor, batch, candidate_key)
    floor = calibration_floor(args, batch.mc_return)
    weight = hyper.cql_weight * (multiplier(agent.log_alpha_prime) if args.lagrange else 1.0)

    def both_losses(params):
        bellman = critic_loss(params, nets, batch.obs, batch.action, target_q)
        diff, raised = conservative_loss(params, nets, batch.obs, batch.action, candidates, log_density, floor, (-jnp.inf, jnp.inf))
        return bellman + weight * diff.sum(), (bellman, diff.mean(), raised)

    (_, (loss_q, diff, raised)), grads = jax.value_and_grad(both_losses, has_aux=True)(agent.critic)
    critic, critic_opt = descend(agent.critic, agent.critic_opt, grads, hyper.critic_lr)
    target_critic = optax.incremental_update(critic, agent.target_critic, hyper.target_rate)
    log_alpha_prime, alpha_prime_opt = agent.log_alpha_prime, agent.alpha_prime_opt
    if args.lagrange:
        grads = jax.grad(alpha_prime_loss)(log_alpha_prime, hyper.cql_weight * (diff - hyper.lagrange_gap))
        log_alpha_prime, alpha_prime_opt = descend(log_alpha_prime, alpha_prime_opt, grads, hyper.critic_lr)

    (loss_a, log_prob), grads = jax.value_and_grad(actor_loss, has_aux=True)(agent.actor, nets, critic, batch.obs, alpha, actor_key)
    actor, actor_opt = descend(agent.actor, agent.actor_opt, grads, hyper.actor_lr)
    grads = jax.grad(alpha_loss)(agent.log_alpha, log_prob, hyper.entropy_per_action * nets.actor.action_size)
    log_alpha, alpha_opt = descend(agent.log_alpha, agent.alpha_opt, grads, hyper.alpha_lr)

    opts = actor_opt, critic_opt, alpha_opt, alpha_prime_opt
    metrics = {"critic_loss": loss_q, "conservative_loss": diff, "cql_weight": weight, "raised": raised}
    metrics |= {"actor_loss": loss_a, "q": target_q.mean(), "alpha": alpha, "entropy": -log_prob, "bonus": bonus.mean()}
    return Agent(actor, critic, target_critic, log_alpha, log_alpha_prime, *opts), metrics


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

    def __init__(self, obs_size: int, variant: str):
        self.obs_size, self.variant = obs_size, variant
        self.net = MLP((512, 512, 512) if variant == "paper" else (512, 512), last=2**0.5)

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
    """What is fixed when a program is compiled; `nets` are the explorer's."""

    args: Args
    env: envs.Env | None
    nets: Nets
    exploiter_nets: Nets
    bonus: NoBonus
    obs_size: int


def value_after(args: Args, hyper: Hyper, reward: jax.Array, truncation: jax.Array, least: jax.Array) -> jax.Array:
    """What is taken to follow rows of this scaled `reward` [...]: something after a `truncation` only."""
    if args.mc_bootstrap == "zero":
        return jnp.zeros_like(reward)
    return truncation * (reward if args.mc_bootstrap == "last" else least) / (1 - hyper.discount)


def offline_returns(args: Args, hyper: Hyper, offline: Transition, truncation: jax.Array) -> jax.Array:
    """Discounted sum [N] of the scaled rewards from each row to the end of its episode, and of what follows that."""
    reward = hyper.reward_scale * offline.reward + hyper.reward_bias
    own = reward + hyper.discount * value_after(args, hyper, reward, truncation, reward.min())
    decay = hyper.discount * offline.discount * (1 - truncation)
    join = lambda later, row: (row[0] + row[1] * later[0], row[1] * later[1])  # noqa: E731
    return jax.lax.associative_scan(join, (own, decay), reverse=True)[0]


def with_returns(offline: Transition | None, mc_return: jax.Array | None) -> Rows | None:
    """The offline rows, which all runs share, with their returns [N], which depend on a run's settings."""
    return offline and Rows(**vars(offline), mc_return=mc_return)


@struct.dataclass
class Episodes:
    """The episodes under way: returns so far from each row [H, num_envs], rows [num_envs], and the least reward [] ever seen."""

    returns: jax.Array
    rows: jax.Array
    least: jax.Array


def record_returns(args: Args, hyper: Hyper, ring: Rows, episodes: Episodes, reached: envs.State, added: jax.Array):
    """Credits the rewards of a step to all rows of their episodes, and writes the returns of episodes that it ended into the ring.

    The step's own rows are there already; `added` [] were before. The rows of a world that broke never get a return.
    """
    num_slots, (horizon, num_envs) = buffer.size(ring), episodes.returns.shape
    reward, broken, ended = hyper.reward_scale * reached.reward + hyper.reward_bias, reached.info["broken"] > 0, reached.done > 0
    least = jnp.minimum(episodes.least, jnp.min(reward, where=~broken, initial=jnp.inf))
    age = episodes.rows - jnp.arange(horizon)[:, None]  # of each row of the episode; negative: it is still to come
    faded = hyper.discount ** jnp.maximum(age, 0)
    returns = jnp.where(age > 0, episodes.returns, 0.0) + jnp.where(age >= 0, faded * reward, 0.0)
    whole = returns + faded * hyper.discount * value_after(args, hyper, reward, reached.info["truncation"], least)
    kept = (age >= 0) & (age < num_slots // num_envs)  # older ones have given their place in the ring to newer ones
    slot = (added + jnp.arange(num_envs) - age * num_envs) % num_slots
    mc_return = ring.mc_return.at[jnp.where(kept & ended & ~broken, slot, num_slots)].set(whole, mode="drop")
    return ring.replace(mc_return=mc_return), Episodes(returns, jnp.where(ended, 0, episodes.rows + 1), least)


@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    explorer: Agent
    exploiter: Agent
    bonus: dict
    env_state: envs.State | None
    ring: Rows | None
    episodes: Episodes | None
    offline_return: jax.Array | None
    key: jax.Array


def init_state(setup: Setup, hyper: Hyper, offline: Transition | None, truncation: jax.Array | None, key: jax.Array) -> State:
    args = setup.args
    key, explorer, exploiter, bonus, env = jax.random.split(key, 5)
    env_state = ring = episodes = None
    offline_return = offline and offline_returns(args, hyper, offline, truncation)
    if args.online_steps:
        env_state = jax.vmap(setup.env.reset)(jax.random.split(env, args.num_envs))
        obs, action, scalar = jnp.zeros(setup.obs_size), jnp.zeros(setup.nets.actor.action_size), jnp.float32(0)
        ring = buffer.empty(Rows(obs, action, scalar, obs, scalar, scalar), args.buffer_size or args.online_steps)
        least = jnp.float32(jnp.inf) if offline is None else jnp.min(hyper.reward_scale * offline.reward + hyper.reward_bias)
        episodes = Episodes(jnp.zeros((setup.env.horizon, args.num_envs)), jnp.zeros(args.num_envs, jnp.int32), least)
    pairs = (setup.nets, explorer), (setup.exploiter_nets, exploiter)
    agents = [init_agent(nets, setup.obs_size, args.init_alpha, k) for nets, k in pairs]
    return State(*agents, setup.bonus.init(bonus, offline), env_state, ring, episodes, offline_return, key)


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


def explore_update(setup: Setup, hyper: Hyper, agent: Agent, novelty, batch: Rows, key: jax.Array):
    """The explorer's gradient step: the bonus learns, then the agent learns from reward + c * bonus."""
    novelty = setup.bonus.learn(novelty, batch, hyper.rnd_lr)
    bonus = hyper.intrinsic_coef * setup.bonus.reward(novelty, batch)
    agent, metrics = update(setup.args, setup.nets, hyper, agent, batch, bonus, (hyper.target_min, hyper.target_max), key)
    return agent, novelty, metrics


def pretrain_chunk(setup: Setup, state: State, hyper: Hyper, offline: Transition, *, length: int):
    """`length` gradient steps of the explorer on the offline rows."""
    rows = with_returns(offline, state.offline_return)

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        batch = jax.tree.map(lambda x: x[0], sample_batches(setup.args, rows, None, 0, 1, sample_key))
        explorer, bonus, metrics = explore_update(setup, hyper, state.explorer, state.bonus, batch, update_key)
        return state.replace(explorer=explorer, bonus=bonus, key=key), metrics

    return scan_mean(step, state, length)


def explore_chunk(setup: Setup, state: State, hyper: Hyper, offline: Transition | None, added: jax.Array, *, length: int):
    """`length` steps of all environments, each followed by num_envs * utd_ratio gradient steps.

    `added` [] counts the online rows that earlier chunks collected.
    """
    args, env = setup.args, setup.env
    num_updates, old_rows = round(args.num_envs * args.utd_ratio), with_returns(offline, state.offline_return)

    def step(carry):
        state, added = carry
        key, act_key, reset_key, sample_key, update_key = jax.random.split(state.key, 5)
        obs = state.env_state.obs
        action = act(setup.nets, state.explorer.actor, obs, act_key)
        advance = jax.vmap(partial(envs.step_and_reset, env))
        env_state, reached = advance(state.env_state, action, jax.random.split(reset_key, args.num_envs))
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, with_returns(rows, jnp.full(args.num_envs, -jnp.inf)), added, reached.info["broken"])
        ring, episodes = record_returns(args, hyper, ring, state.episodes, reached, added)
        added = added + args.num_envs

        def learn(carry, xs):
            explorer, bonus, metrics = explore_update(setup, hyper, *carry, *xs)
            return (explorer, bonus), metrics

        xs = sample_batches(args, old_rows, ring, added, num_updates, sample_key), jax.random.split(update_key, num_updates)
        (explorer, bonus), metrics = jax.lax.scan(learn, (state.explorer, state.bonus), xs)
        state = state.replace(explorer=explorer, bonus=bonus, env_state=env_state, ring=ring, episodes=episodes, key=key)
        return (state, added), {**jax.tree.map(jnp.mean, metrics), **envs.tally(reached)}

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


def value_range(low: jax.Array, high: jax.Array, discount: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What Q can be if rewards lie in [low, high] and an episode may terminate after any step, the first one included."""
    return jnp.minimum(low, low / (1 - discount)), jnp.maximum(high, high / (1 - discount))


def retrain_chunk(setup: Setup, state: State, hyper: Hyper, offline: Transition | None, added: jax.Array, *, length: int):
    """`length` gradient steps of the exploiter on the task reward of the offline rows and the `added` [] online ones, without floors."""
    args, q_bounds = setup.args, (-jnp.inf, jnp.inf)
    offline = with_returns(offline, jnp.full(buffer.size(offline), -jnp.inf))
    ring = state.ring and state.ring.replace(mc_return=jnp.full_like(state.ring.mc_return, -jnp.inf))
    bias = hyper.retrain_scale * hyper.reward_bias + hyper.retrain_bias
    hyper = hyper.replace(reward_scale=hyper.retrain_scale * hyper.reward_scale, reward_bias=bias)
    filled = buffer.size(offline) + jnp.minimum(added, buffer.size(ring))
    reward = jnp.concatenate([rows.reward for rows in (offline, ring) if rows is not None])
    seen = jnp.arange(len(reward)) < filled
    low, high = jnp.min(reward, where=seen, initial=jnp.inf), jnp.max(reward, where=seen, initial=-jnp.inf)
    if args.bound_q:
        q_bounds = value_range(*(hyper.reward_scale * r + hyper.reward_bias for r in (low, high)), hyper.discount)
    best = seen & (reward >= jnp.minimum(high, hyper.upsample_from))
    num_best = round(args.upsample * args.batch_size)
    best_rows = jnp.nonzero(best, size=len(reward), fill_value=0)[0] if num_best else None
    others = dataclasses.replace(args, offline_ratio=args.retrain_ratio, batch_size=args.batch_size - num_best)

    def step(carry):
        exploiter, key = carry
        key, sample_key, best_key, update_key = jax.random.split(key, 4)
        batch = jax.tree.map(lambda x: x[0], sample_batches(others, offline, ring, added, 1, sample_key))
        if num_best:
            index = best_rows[jax.random.randint(best_key, (num_best,), 0, best.sum())]
            batch = jax.tree.map(lambda *parts: jnp.concatenate(parts), batch, buffer.take(offline, ring, index))
        bonus = hyper.frozen_bonus_coef * setup.bonus.reward(state.bonus, batch) if args.frozen_bonus else jnp.zeros(args.batch_size)
        exploiter, metrics = update(args, setup.exploiter_nets, hyper, exploiter, batch, bonus, q_bounds, update_key)
        return (exploiter, key), metrics

    (exploiter, key), metrics = scan_mean(step, (state.exploiter, state.key), length)
    return state.replace(exploiter=exploiter, key=key), metrics


def make_setup(args: Args, offline: Transition | None) -> Setup:
    """Environment, networks and bonus for `args`, or the reason why they do not go together."""
    if args.mc_bootstrap != "zero" and not (cli.grid(args)[0].discount < 1).all():
        raise cli.UsageError(f"--mc-bootstrap {args.mc_bootstrap} needs a --discount below 1; for no discount, --mc-bootstrap zero")
    if args.retrain_ratio > 1 or (args.retrain_ratio >= 0 and 0 in args.retrain_at and args.online_steps):
        raise cli.UsageError(f"--retrain-ratio {args.retrain_ratio:g} is a share, at most 1; --retrain-at 0, without online rows, needs -1")
    critic_hidden = args.retrain_critic_hidden or args.critic_hidden
    if min(critic_hidden) < 1 or (args.sync_explorer and critic_hidden != args.critic_hidden):
        raise cli.UsageError(f"--retrain-critic-hidden {critic_hidden} must be positive, and with --sync-explorer those of --critic-hidden")
    env = None if args.env == "none" else envs.make(args.env, args.physics)
    obs_size, action_size = (env.observation_size, env.action_size) if env else (offline.obs.shape[1], offline.action.shape[1])
    nets = [Nets(Actor(args.hidden, action_size), Critic(sizes)) for sizes in (args.critic_hidden, critic_hidden)]
    return Setup(args, env, *nets, RNDBonus(obs_size, args.rnd_variant) if args.intrinsic == "rnd" else NoBonus(), obs_size)


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
    offline, truncation = data and data.transitions, data and data.truncation
    setup, mesh = make_setup(args, offline), mesh_for(len(labels))
    evaluate = Evaluator(args, setup.env, partial(act, setup.nets), mesh, setup.obs_size, setup.nets.actor.action_size)
    run = Run("ooo_cal_ql", args, labels, data and data.card)

    initialise = Compiled(partial(init_state, setup), mesh, shared=(1, 2))
    pretrain = Compiled(partial(pretrain_chunk, setup), mesh, shared=(2,), donate=(0,))
    explore = Compiled(partial(explore_chunk, setup), mesh, shared=(2, 3), donate=(0,))
    retrain = Compiled(partial(retrain_chunk, setup), mesh, shared=(2, 3), donate=(0,))
    run.programs = {"offline": pretrain, "online": explore, "retrained": retrain}
    offline, truncation, hyper = place(offline, mesh, EVERYWHERE), place(truncation, mesh, EVERYWHERE), place(hyper, mesh, RUNS)
    keys = place(jnp.stack([jax.random.PRNGKey(label.seed) for label in labels]), mesh, RUNS)
    done, state = run.restore(initialise(hyper, offline, truncation, keys))

    for position, chunk in run.progress(make_plan(args), done):
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, length=chunk.length)
        elif chunk.phase == "online":
            state, metrics = explore(state, hyper, offline, chunk.collected, length=chunk.length // args.num_envs)
        else:
            if chunk.first and not args.warm_start:
                state = state.replace(exploiter=initialise(hyper, offline, truncation, keys).exploiter)
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
