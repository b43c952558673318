"""Cal-QL: calibrated Q-learning, CQL whose pessimism stops where it would be absurd (Nakamoto et al., arXiv 2303.05479).

CQL pushes the Q-values of the policy's actions down without end, so that online the first good action looks like a wonder and
the policy forgets what it knew. Cal-QL counts no such value as lower than the return that the data's own behaviour
got from that state on: in CQL's soft maximum, Q at actions of pi(.|s) and pi(.|s') is max(Q, R(s)), R the discounted sum of
scaled rewards from the row to the end of its episode. All else is cql.py's, offline and online alike.

- `--calibrate-random` raises the uniform actions' Q-values too, which OOO found to help (arXiv 2310.08558, appendix B.3). Off
  by default, for this is the paper's method; on in the settings that are OOO's, and in ooo_cal_ql.py.
- `--mc-bootstrap` is what follows a truncation, which no data tell. last: the last reward, for ever. For an episode that never
  reached its goal that is the official code's rule, and it is OOO's for the kitchen. worst: the least reward seen so far, for
  ever, which makes a true lower bound. zero: nothing, the official code's way with all other episodes.

Departures from the official code (nakamotoo/Cal-QL): environments act side by side, each followed by its gradient steps,
where it plays one whole episode and then learns. An online row's R is written when its episode ends, to the same
value; until then, and for ever if the world broke, the row has no floor. Other departures are cql.py's.

    python algos/cal_ql.py
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
    backup_entropy: float = 0.0
    """weight of the entropy in the critics' target: 1 is SAC, 0 leaves it out (CQL, Cal-QL)"""
    # CQL
    cql_weight: float = 5.0
    """weight of the conservative loss beside the Bellman error; with --lagrange alpha' multiplies it"""
    lagrange_gap: float = 0.8
    """difference between the soft maximum and the data's Q at which --lagrange aims"""
    diff_clip_min: float = -float("inf")
    """this difference is clipped from below, row by row: a row further down is no longer pushed"""
    diff_clip_max: float = float("inf")
    """and from above"""
    # Cal-QL
    target_min: float = -float("inf")
    """the critics' target is held at or above this"""
    target_max: float = float("inf")
    """and at or below this"""


@dataclass(frozen=True)
class Args:
    """Cal-QL: learn offline, and go on online with the same loss."""

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
    """environment steps"""
    random_steps: int = 0
    """of these, steps of uniformly random actions and no learning at the start"""
    num_envs: int = 8
    """environments that act side by side, per seed"""
    utd_ratio: float = 1.0
    """gradient steps per environment step; num_envs * utd_ratio of them follow each step of all environments"""
    buffer_size: int = 0
    """online rows kept, a multiple of num_envs; 0: all"""
    # optimisation
    batch_size: int = 256
    """rows of a batch"""
    hidden: tuple[int, ...] = (256, 256)
    """units of the policy's hidden layers"""
    critic_hidden: tuple[int, ...] = (256, 256, 256)
    """units of the critics' hidden layers"""
    layer_norm: bool = False
    """LayerNorm in the critics' hidden layers"""
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
    calibrate_random: bool = False
    """raise the Q-values of uniform actions to the floor, too"""
    mc_bootstrap: Literal["last", "worst", "zero"] = "last"
    """what is taken to follow a truncated episode: its last reward for ever, the least reward seen for ever, or nothing"""
    hyper: Annotated[Hyper, tyro.conf.OmitArgPrefixes] = field(default_factory=Hyper)
    """traced settings, which --sweep can vary"""


# The settings of Cal-QL's code and, where they are OOO's, of its code, by environment family; those of the point mass are ours.
MAZE = {"critic_hidden": (256, 256, 256, 256), "lagrange": True, "reward_scale": 10.0, "reward_bias": -5.0}
HAND = {
    "hidden": (512, 512), "critic_hidden": (512, 512, 512), "cql_weight": 1.0, "offline_steps": 20_000,
}  # fmt: skip
SETTINGS = {
    "point-mass-wall": {
        "hidden": (64, 64), "critic_hidden": (64, 64), "actor_lr": 1e-3, "critic_lr": 1e-3, "alpha_lr": 1e-3, "target_rate": 0.02,
        "offline_steps": 6_000, "online_steps": 480_000, "num_envs": 48, "utd_ratio": 1 / 48, "num_samples": 4,
        "cql_weight": 10.0, "entropy_per_action": -2.0,
    },
    "point-mass-wall-sparse": {"reward_bias": -1.0},
    "probe": {"hidden": (32, 32), "critic_hidden": (32, 32), "offline_steps": 0, "online_steps": 8_000, "num_samples": 4},
    **{key: {"offline_steps": 0} for key in ("halfcheetah-sparse", "ant-sparse")},
    "antmaze": MAZE,
    "antmaze-large-goal-missing": {"calibrate_random": True, "online_steps": 2_000_000},
    "maze2d": {**MAZE, "offline_steps": 500_000},
    "maze2d-large-missing-data": {"calibrate_random": True, "target_min": -500.0, "target_max": 600.0},
    "kitchen": {
        "hidden": (512, 512, 512), "critic_hidden": (512, 512, 512), "importance_sampling": False, "reward_bias": -5.0,
        "offline_ratio": 0.25, "offline_steps": 500_000, "calibrate_random": True, "target_max": 50.0,
    },
    "kitchen-complete": {"online_steps": 4_000_000},
    **dict.fromkeys(("door", "pen", "relocate"), HAND),
    **{key: {"reward_scale": 10.0, "reward_bias": 5.0} for key in ("door-binary", "pen-binary", "relocate-binary")},
    "hammer": {**HAND, "calibrate_random": True, "target_max": 10_300.0},
}  # fmt: skip


@struct.dataclass
class Rows(Transition):
    """Rows and the return from each to the end of its episode; -inf where that is not known."""

    mc_return: jax.Array


class MLP(nn.Module):
    """Dense layers, LayerNorm if asked, and ReLU between them; initialised orthogonally, the last layer small."""

    sizes: tuple[int, ...]
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x):
        for size in self.sizes[:-1]:
            x = nn.Dense(size, kernel_init=orthogonal(2**0.5))(x)
            x = nn.relu(nn.LayerNorm()(x) if self.layer_norm else x)
        return nn.Dense(self.sizes[-1], kernel_init=orthogonal(1e-2))(x)


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


def update(args: Args, nets: Nets, hyper: Hyper, agent: Agent, batch: Rows, key: jax.Array):
    """One gradient step of critics and alpha', policy and alpha, in this order."""
    next_key, candidate_key, actor_key = jax.random.split(key, 3)
    alpha = jnp.exp(agent.log_alpha)
    next_action, next_log_prob = sample_many(nets, agent.actor, batch.next_obs, args.num_samples if args.max_target_backup else 1, next_key)
    next_q = jax.vmap(partial(nets.critic.apply, agent.target_critic, batch.next_obs))(next_action).min(axis=1)
    next_v = jnp.max(next_q - hyper.backup_entropy * alpha * next_log_prob, axis=0)
    target_q = hyper.reward_scale * batch.reward + hyper.reward_bias + hyper.discount * batch.discount * next_v
    target_q = jnp.clip(target_q, hyper.target_min, hyper.target_max)

    candidates, log_density = draw_candidates(args, nets, agent.actor, batch, candidate_key)
    floor = calibration_floor(args, batch.mc_return)
    weight = hyper.cql_weight * (multiplier(agent.log_alpha_prime) if args.lagrange else 1.0)

    def both_losses(params):
        bellman = critic_loss(params, nets, batch.obs, batch.action, target_q)
        clip = hyper.diff_clip_min, hyper.diff_clip_max
        diff, raised = conservative_loss(params, nets, batch.obs, batch.action, candidates, log_density, floor, clip)
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
    metrics |= {"actor_loss": loss_a, "q": target_q.mean(), "alpha": alpha, "entropy": -log_prob}
    return Agent(actor, critic, target_critic, log_alpha, log_alpha_prime, *opts), metrics


def act(nets: Nets, actor: dict, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Actions [..., A] for observations [..., obs]: the squashed mean without a key, a sample with one."""
    return jnp.tanh(nets.actor.apply(actor, obs)[0]) if key is None else sample(nets, actor, obs, key)[0]


class Setup(NamedTuple):
    """What is fixed when a program is compiled."""

    args: Args
    env: envs.Env | None
    nets: Nets
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

    agent: Agent
    env_state: envs.State | None
    ring: Rows | None
    episodes: Episodes | None
    offline_return: jax.Array | None
    key: jax.Array


def init_state(setup: Setup, hyper: Hyper, offline: Transition | None, truncation: jax.Array | None, key: jax.Array) -> State:
    args = setup.args
    key, agent, env = jax.random.split(key, 3)
    env_state = ring = episodes = None
    offline_return = offline and offline_returns(args, hyper, offline, truncation)
    if args.online_steps:
        env_state = jax.vmap(setup.env.reset)(jax.random.split(env, args.num_envs))
        obs, action, scalar = jnp.zeros(setup.obs_size), jnp.zeros(setup.nets.actor.action_size), jnp.float32(0)
        ring = buffer.empty(Rows(obs, action, scalar, obs, scalar, scalar), args.buffer_size or args.online_steps)
        least = jnp.float32(jnp.inf) if offline is None else jnp.min(hyper.reward_scale * offline.reward + hyper.reward_bias)
        episodes = Episodes(jnp.zeros((setup.env.horizon, args.num_envs)), jnp.zeros(args.num_envs, jnp.int32), least)
    agent = init_agent(setup.nets, setup.obs_size, args.init_alpha, agent)
    return State(agent, env_state, ring, episodes, offline_return, key)


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
    rows = with_returns(offline, state.offline_return)

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        batch = jax.tree.map(lambda x: x[0], sample_batches(setup.args, rows, None, 0, 1, sample_key))
        agent, metrics = update(setup.args, setup.nets, hyper, state.agent, batch, update_key)
        return state.replace(agent=agent, key=key), metrics

    return scan_mean(step, state, length)


def finetune_chunk(setup: Setup, state: State, hyper: Hyper, offline: Transition | None, added: jax.Array, *, length: int):
    """`length` steps of all environments, each followed by num_envs * utd_ratio gradient steps once the random steps are over.

    `added` [] counts the online rows that earlier chunks collected.
    """
    args, env = setup.args, setup.env
    num_updates, old_rows = round(args.num_envs * args.utd_ratio), with_returns(offline, state.offline_return)

    def learn(agent, ring, added, key):
        sample_key, update_key = jax.random.split(key)
        batches = sample_batches(args, old_rows, ring, added, num_updates, sample_key)
        descend_on = lambda agent, xs: update(args, setup.nets, hyper, agent, *xs)  # noqa: E731
        agent, metrics = jax.lax.scan(descend_on, agent, (batches, jax.random.split(update_key, num_updates)))
        return agent, jax.tree.map(jnp.mean, metrics)

    def idle(agent, ring, added, key):
        metrics = jax.eval_shape(learn, agent, ring, added, key)[1]
        return agent, jax.tree.map(lambda x: jnp.zeros(x.shape), metrics)

    def step(carry):
        state, added = carry
        key, act_key, reset_key, learn_key = jax.random.split(state.key, 4)
        obs = state.env_state.obs
        action = act(setup.nets, state.agent.actor, obs, act_key)
        action = jnp.where(added < args.random_steps, jax.random.uniform(act_key, action.shape, minval=-1.0), action)
        advance = jax.vmap(partial(envs.step_and_reset, env))
        env_state, reached = advance(state.env_state, action, jax.random.split(reset_key, args.num_envs))
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, with_returns(rows, jnp.full(args.num_envs, -jnp.inf)), added, reached.info["broken"])
        ring, episodes = record_returns(args, hyper, ring, state.episodes, reached, added)
        added = added + args.num_envs
        agent, metrics = jax.lax.cond(added > args.random_steps, learn, idle, state.agent, ring, added, learn_key)
        return (State(agent, env_state, ring, episodes, state.offline_return, key), added), {**metrics, **envs.tally(reached)}

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


def make_setup(args: Args, offline: Transition | None) -> Setup:
    """Environment and networks for `args`, or the reason why they do not go together."""
    if args.mc_bootstrap != "zero" and not (cli.grid(args)[0].discount < 1).all():
        raise cli.UsageError(f"--mc-bootstrap {args.mc_bootstrap} needs a --discount below 1; for no discount, --mc-bootstrap zero")
    env = None if args.env == "none" else envs.make(args.env, args.physics)
    obs_size, action_size = (env.observation_size, env.action_size) if env else (offline.obs.shape[1], offline.action.shape[1])
    return Setup(args, env, Nets(Actor(args.hidden, action_size), Critic(args.critic_hidden, 2, args.layer_norm)), obs_size)


def main() -> None:
    args = cli.parse(Args, SETTINGS)
    hyper, labels = cli.grid(args)
    data = cli.load_dataset(args)
    offline, truncation = data and data.transitions, data and data.truncation
    setup, mesh = make_setup(args, offline), mesh_for(len(labels))
    evaluate = Evaluator(args, setup.env, partial(act, setup.nets), mesh, setup.obs_size, setup.nets.actor.action_size)
    run = Run("cal_ql", args, labels, data and data.card)

    initialise = Compiled(partial(init_state, setup), mesh, shared=(1, 2))
    pretrain = Compiled(partial(pretrain_chunk, setup), mesh, shared=(2,), donate=(0,))
    finetune = Compiled(partial(finetune_chunk, setup), mesh, shared=(2, 3), donate=(0,))
    run.programs = {"offline": pretrain, "online": finetune}
    offline, truncation, hyper = place(offline, mesh, EVERYWHERE), place(truncation, mesh, EVERYWHERE), place(hyper, mesh, RUNS)
    keys = place(jnp.stack([jax.random.PRNGKey(label.seed) for label in labels]), mesh, RUNS)
    done, state = run.restore(initialise(hyper, offline, truncation, keys))

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
