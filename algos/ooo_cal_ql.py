"""OOO on Cal-QL: explore with an optimistic policy, then retrain a pessimistic one from scratch on all data.

Offline-to-Online-to-Offline RL (Mark et al., arXiv 2310.08558): Cal-QL (cal_ql.py) gathers data; the policy
that is handed over is CQL's (cql.py), which has no floor under the values that it pushes down.

1. pre-train  The explorer, Cal-QL, learns from the offline data, with r + c * bonus in place of r.
2. explore    It acts and learns online, drawn by the bonus to what is new: RND's error.
3. retrain    A fresh exploiter, CQL, learns the task from all rows, Q held inside what their rewards allow.

Departures from the official code (MaxSobolMark/OOO b1424a2), beside those of cal_ql.py: RND learns with each
update (there, hardly at all); up-sampled rows take places in the batch; bounds hold the target, bonus apart.

    python algos/ooo_cal_ql.py
"""

from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from ooo_rl import envs
from ooo_rl.data import buffer, policy
from ooo_rl.data.buffer import Transition
from ooo_rl.data.learner import Learner, Moments, orthogonal
from ooo_rl.data.returns import Returns, Rows, check_returns, with_returns, without_returns
from ooo_rl.data.runs.bounds import Bounds, Fraction, Layers, NonNegative, Number, Positive, Size, Steps, With
from ooo_rl.data.runs.online_change import online_hyper, online_ratio
from ooo_rl.data.runs.session import Phase, Result, Session, Static, scan_mean, start_online
from ooo_rl.data.runs.settings import Experiment, Traced, UsageError, launch


@struct.dataclass
class Hyper(Traced):
    """Settings that are traced, not compiled in: one value per run, so each can be swept in one program."""

    actor_lr: NonNegative = 1e-4
    """learning rate of the policy"""
    critic_lr: NonNegative = 3e-4
    """learning rate of the two critics, and of alpha'"""
    alpha_lr: NonNegative = 1e-4
    """learning rate of the entropy's weight alpha; 0 keeps --init-alpha"""
    target_rate: Fraction = 0.005
    """share of the critics that goes into their targets at each update"""
    entropy_per_action: Number = -1.0
    """entropy that alpha aims at, per dimension of the action: -1 in the paper, -0.5 in jaxrl and RLPD"""
    cql_weight: NonNegative = 5.0
    """weight of the conservative loss beside the Bellman error; with --lagrange alpha' multiplies it"""
    lagrange_gap: Annotated[Number, With("lagrange")] = 0.8
    """difference between the soft maximum and the data's Q at which --lagrange aims"""
    target_min: Number = -float("inf")
    """the explorer's target, less the bonus, is held at or above this"""
    target_max: Number = float("inf")
    """and at or below this"""
    intrinsic_coef: Annotated[Number, With("intrinsic")] = 0.5
    """c: weight of the exploration bonus"""
    frozen_bonus_coef: Annotated[Number, With("frozen_bonus")] = 10.0
    """weight of the bonus in retraining with --frozen-bonus"""
    rnd_lr: Annotated[NonNegative, With("intrinsic", "rnd")] = 1e-4
    """learning rate of the RND predictor"""
    retrain_scale: Annotated[NonNegative, With("retrain_steps")] = 1.0
    """in retraining, scaled rewards are also multiplied by this"""
    retrain_bias: Annotated[Number, With("retrain_steps")] = 0.0
    """and this is added"""
    upsample_from: Annotated[Number, With("upsample")] = float("inf")
    """task reward from which --upsample takes rows; the highest seen, if no row has as much"""


@dataclass(frozen=True)
class Args(Experiment):
    """OOO(Cal-QL): pre-train offline, explore online optimistically, retrain pessimistically from scratch."""

    retrain_steps: Steps = 1_000_000
    """gradient steps of each retraining; 0: none, which is Cal-QL + RND"""
    retrain_at: Annotated[tuple[int, ...], Bounds(at_least=0)] = ()
    """environment steps after which to retrain; empty: at the end"""
    intrinsic: Literal["rnd", "none"] = "rnd"
    """exploration bonus: random network distillation, or none"""
    rnd_variant: Annotated[Literal["paper", "code"], With("intrinsic", "rnd")] = "paper"
    """paper: novelty of s, summed errors; code: of s', largest error, a last layer that begins small"""
    sync_explorer: bool = False
    """after each retraining the explorer goes on from the exploiter (the paper's Figure 14)"""
    bound_q: Annotated[bool, With("retrain_steps")] = True
    """in retraining, hold Q inside what the data's rewards allow"""
    upsample: Fraction = 0.0
    """share of each retraining batch that is drawn from the rows of highest reward"""
    frozen_bonus: bool = False
    """retrain with the explorer's bonus, frozen, added to the reward (the paper's Figure 3)"""
    warm_start: bool = False
    """retrain from the previous exploiter instead of from scratch (the paper's Figure 13)"""
    offline_ratio: Annotated[float, Bounds(at_most=1)] = 0.5
    """share of each online batch that comes from the offline rows; below 0: their share of all rows"""
    retrain_ratio: Annotated[float, Bounds(at_most=1)] = -1.0
    """the same of each retraining batch"""
    hidden: Layers = (256, 256)
    """units of the policy's hidden layers"""
    critic_hidden: Layers = (256, 256, 256)
    """units of the critics' hidden layers"""
    retrain_critic_hidden: Annotated[tuple[int, ...], Bounds(at_least=1)] = ()
    """units of the exploiter's critics, if not those of the explorer's"""
    init_alpha: Positive = 1.0
    """entropy's weight alpha to start with"""
    num_samples: Size = 10
    """actions drawn at each row, of each of three kinds, for the soft maximum of Q"""
    importance_sampling: bool = True
    """divide exp Q by its action's density; else do not, and let the data's action join the sum"""
    lagrange: bool = False
    """multiply the weight by alpha', which is moved until the difference is --lagrange-gap"""
    max_target_backup: bool = True
    """the target's next value is the best of --num-samples actions of the policy, not that of one"""
    calibrate_random: bool = True
    """raise the Q-values of uniform actions to the floor, too"""
    mc_bootstrap: Literal["last", "worst", "zero"] = "last"
    """what follows a truncated episode: its last reward for ever, the least one seen for ever, or nothing"""
    hyper: Hyper = Hyper()
    """traced settings, which --sweep can vary"""


class MLP(nn.Module):
    """Dense layers with ReLU between them, initialised orthogonally, the last layer times `last`."""

    sizes: tuple[int, ...]
    last: float = 1e-2

    @nn.compact
    def __call__(self, x):
        for size in self.sizes[:-1]:
            x = nn.relu(nn.Dense(size, kernel_init=orthogonal(2**0.5))(x))
        return nn.Dense(self.sizes[-1], kernel_init=orthogonal(self.last))(x)


# as in sac.py
class Actor(nn.Module):
    """Mean and log standard deviation, both [..., A], of a Gaussian that tanh squashes into (-1, 1)."""

    hidden: tuple[int, ...]
    action_size: int

    @nn.compact
    def __call__(self, obs):
        mean, log_std = jnp.split(MLP((*self.hidden, 2 * self.action_size))(obs), 2, axis=-1)
        return mean, jnp.clip(log_std - 1.0, -20.0, 2.0)


# as in ooo_iql.py
class Critic(nn.Module):
    """Two independent Q functions: [2, B]."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        ensemble = nn.vmap(MLP, {"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
        return ensemble((*self.hidden, 1))(jnp.concatenate([obs, action], axis=-1)).squeeze(-1)


Nets = namedtuple("Nets", "actor critic rnd exploiter")  # modules; the last: the exploiter's Nets


# as in cql.py
@struct.dataclass
class Agent:
    """One agent: what learns, each with its optimiser, and the critics' slow copy."""

    actor: Learner
    critic: Learner
    target_critic: dict
    alpha: Learner  # of log alpha
    alpha_prime: Learner  # of log alpha'


# as in cql.py
def init_agent(static: Static, key: jax.Array) -> Agent:
    nets, obs, action = static.nets, static.example.obs[None], static.example.action[None]
    actor_key, critic_key = jax.random.split(key)
    actor, critic = nets.actor.init(actor_key, obs), nets.critic.init(critic_key, obs, action)
    logs = jnp.log(static.args.init_alpha), jnp.float32(1.0)  # JaxCQL's for alpha'; the original code's is 0
    actor, critic, alpha, alpha_prime = map(Learner.create, (actor, critic, *logs))
    return Agent(actor, critic, jax.tree.map(jnp.copy, critic.params), alpha, alpha_prime)


# as in sac.py
def sample(nets: Nets, actor: dict, obs: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Actions [..., A] drawn from the policy, differentiable in it, and their log densities [...]."""
    mean, log_std = nets.actor.apply(actor, obs)
    noise = jax.random.normal(key, mean.shape)
    u = mean + jnp.exp(log_std) * noise
    # log(1 - tanh(u)^2), the squashing's change of volume, in a form that does not round to log(0).
    squash = 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))
    return jnp.tanh(u), jnp.sum(jax.scipy.stats.norm.logpdf(noise) - log_std - squash, axis=-1)


# as in sac.py
def critic_loss(params, nets, obs, action, target_q):
    """Squared Bellman error, summed over the critics: SAC, equation (5)."""
    q = nets.critic.apply(params, obs, action)
    return jnp.mean(jnp.sum((q - target_q) ** 2, axis=0))


# as in cal_ql.py
def conservative_loss(params, nets, obs, action, candidates, log_density, floor, diff_clip):
    """Soft maximum of max(Q, floor) over `candidates` [N, B, A] less Q of the data's action, per critic [2].

    CQL, equation (4), with Cal-QL's `floor` [N, B], its equation (5.1). Also the share of Q that this raised.
    """
    q = jax.vmap(partial(nets.critic.apply, params, obs))(candidates)
    soft_max = jax.nn.logsumexp(jnp.maximum(q, floor[:, None]) - log_density[:, None], axis=0)
    diff = jnp.clip(soft_max - nets.critic.apply(params, obs, action), *diff_clip).mean(axis=-1)
    return diff, jnp.mean(q < floor[:, None])


# as in sac.py
def actor_loss(params, nets, critic, obs, alpha, key):
    """Least Q less entropy at actions of the policy: SAC, equation (7). Also the actions' log density."""
    action, log_prob = sample(nets, params, obs, key)
    q = nets.critic.apply(critic, obs, action).min(axis=0)
    return jnp.mean(alpha * log_prob - q), log_prob.mean()


# as in sac.py
def alpha_loss(log_alpha, log_prob, target_entropy):
    """Raises alpha while entropy is below its target: SAC, equation (17), in log alpha as its code has it."""
    return -log_alpha * (log_prob + target_entropy)


# as in cql.py
def alpha_prime_loss(log_alpha_prime, excess):
    """Raises alpha' while the weighted difference exceeds its gap: the Lagrange version, in log alpha'."""
    return -jnp.clip(jnp.exp(log_alpha_prime), 0.0, 1e6) * excess


# as in cql.py
def sample_many(nets: Nets, actor: dict, obs: jax.Array, num: int, key: jax.Array):
    """`num` actions [num, B, A] of the policy at each of `obs` [B, obs], and their log densities [num, B]."""
    return jax.vmap(partial(sample, nets, actor, obs))(jax.random.split(key, num))


# as in cql.py
def draw_candidates(static: Static, actor: dict, batch: Transition, key: jax.Array):
    """Actions [N, B, A] that stand for all in the soft maximum, and what to take off their Q-values there."""
    num, (uniform_key, here_key, next_key) = static.args.num_samples, jax.random.split(key, 3)
    uniform = jax.random.uniform(uniform_key, (num, *batch.action.shape), minval=-1.0)
    here, log_here = sample_many(static.nets, actor, batch.obs, num, here_key)
    after, log_after = sample_many(static.nets, actor, batch.next_obs, num, next_key)
    if not static.args.importance_sampling:  # the data's action joins them
        actions = jnp.concatenate([uniform, here, after, batch.action[None]])
        return actions, jnp.zeros(actions.shape[:-1])
    log_uniform = jnp.full(log_here.shape, -batch.action.shape[-1] * jnp.log(2.0))
    return jnp.concatenate([uniform, here, after]), jnp.concatenate([log_uniform, log_here, log_after])


def update(static: Static, hyper: Hyper, agent: Agent, batch: Rows, bonus, q_bounds: tuple, key: jax.Array):
    """One gradient step of critics and alpha', policy and alpha, in this order.

    `bonus` [B] enters the critics' target alone; `q_bounds` (low, high) hold Q-values of the task reward.
    """
    args, nets, rows, alpha = static.args, static.nets, (batch.obs, batch.action), jnp.exp(agent.alpha.params)
    next_key, candidate_key, actor_key = jax.random.split(key, 3)
    num = args.num_samples if args.max_target_backup else 1
    next_action, _ = sample_many(nets, agent.actor.params, batch.next_obs, num, next_key)
    target_critics = partial(nets.critic.apply, agent.target_critic, batch.next_obs)
    next_v = jax.vmap(target_critics)(next_action).min(axis=1).max(axis=0)
    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = jnp.clip(task_reward + hyper.discount * batch.discount * next_v, *q_bounds) + bonus
    candidates = draw_candidates(static, agent.actor.params, batch, candidate_key)
    # The least that Q counts for at each candidate: R(s), for uniform ones if asked; none for the data's own.
    free, n = jnp.full_like(batch.mc_return, -jnp.inf), args.num_samples
    uniform = batch.mc_return if args.calibrate_random else free
    floor = jnp.stack([uniform] * n + [batch.mc_return] * 2 * n + [free] * (not args.importance_sampling))
    alpha_prime = jnp.clip(jnp.exp(agent.alpha_prime.params), 0.0, 1e6)
    weight = hyper.cql_weight * (alpha_prime if args.lagrange else 1.0)

    def both_losses(params):
        bellman = critic_loss(params, nets, *rows, target_q)
        diff, raised = conservative_loss(params, nets, *rows, *candidates, floor, (-jnp.inf, jnp.inf))
        return bellman + weight * diff.sum(), (bellman, diff.mean(), raised)

    (_, (loss_q, diff, raised)), critic = agent.critic.descend(both_losses, hyper.critic_lr, has_aux=True)
    target_critic = optax.incremental_update(critic.params, agent.target_critic, hyper.target_rate)
    alpha_prime, excess = agent.alpha_prime, hyper.cql_weight * (diff - hyper.lagrange_gap)
    if args.lagrange:
        _, alpha_prime = alpha_prime.descend(alpha_prime_loss, hyper.critic_lr, excess)
    given = nets, critic.params, batch.obs, alpha, actor_key
    (loss_a, log_prob), actor = agent.actor.descend(actor_loss, hyper.actor_lr, *given, has_aux=True)
    target_entropy = hyper.entropy_per_action * nets.actor.action_size
    _, next_alpha = agent.alpha.descend(alpha_loss, hyper.alpha_lr, log_prob, target_entropy)
    metrics = {"critic_loss": loss_q, "conservative_loss": diff, "cql_weight": weight, "raised": raised}
    metrics |= {"actor_loss": loss_a, "q": target_q.mean(), "alpha": alpha, "entropy": -log_prob}
    return Agent(actor, critic, target_critic, next_alpha, alpha_prime), {**metrics, "bonus": bonus.mean()}


# as in sac.py
def act(nets: Nets, actor: dict, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Actions [..., A] for observations [..., obs]: the squashed mean without a key, a sample with one."""
    return jnp.tanh(nets.actor.apply(actor, obs)[0]) if key is None else sample(nets, actor, obs, key)[0]


# as in sac.py
def export(actor: dict) -> policy.Policy:
    """The policy as a file that NumPy can run."""
    return policy.mlp(actor["params"]["MLP_0"], gaussian=(-1.0, -20.0, 2.0))


# as in ooo_iql.py
@struct.dataclass
class RND:
    """Random network distillation: a predictor learns a fixed random network, and errs on what is new."""

    predictor: Learner
    target: dict
    obs: Moments
    error: Moments


# as in ooo_iql.py
def init_rnd(static: Static, key: jax.Array) -> RND:
    predictor, target = (static.nets.rnd.init(k, static.example.obs[None]) for k in jax.random.split(key))
    return RND(Learner.create(predictor), target, Moments.fresh(*static.example.obs.shape), Moments.fresh())


# as in ooo_iql.py
def rnd_errors(static: Static, predictor: dict, rnd: RND, batch: Transition) -> jax.Array:
    """Squared errors [B, units] on clipped, normalised states (next states in the code's variant)."""
    x = batch.obs if static.args.rnd_variant == "paper" else batch.next_obs
    x = jnp.clip((x - rnd.obs.mean) / jnp.sqrt(rnd.obs.var + 1e-8), -5, 5)
    return (static.nets.rnd.apply(predictor, x) - static.nets.rnd.apply(rnd.target, x)) ** 2


# as in ooo_iql.py
def novelty(static: Static, rnd: RND, batch: Transition) -> jax.Array:
    """How badly each row [B] is predicted."""
    errors = rnd_errors(static, rnd.predictor.params, rnd, batch)
    return errors.sum(axis=-1) if static.args.rnd_variant == "paper" else errors.max(axis=-1)


# as in ooo_iql.py
def learn_rnd(static: Static, rnd: RND, batch: Transition, learning_rate: jax.Array) -> RND:
    """One gradient step of the predictor; the moments of states and errors take the batch in."""
    rnd = rnd.replace(obs=rnd.obs.update(batch.obs))
    loss = lambda params: rnd_errors(static, params, rnd, batch).mean()  # noqa: E731
    rnd = rnd.replace(predictor=rnd.predictor.descend(loss, learning_rate)[1])
    return rnd.replace(error=rnd.error.update(novelty(static, rnd, batch)))


def bonus(static: Static, rnd: RND | tuple, batch: Transition) -> jax.Array:
    """Bonus [B]: RND's error over its running standard deviation, or 0."""
    if static.args.intrinsic == "none":
        return jnp.zeros(batch.reward.shape)
    return novelty(static, rnd, batch) / jnp.sqrt(rnd.error.var + 1e-8)


@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    explorer: Agent
    exploiter: Agent
    rnd: RND | tuple
    env_state: envs.State | None
    ring: Rows | None
    returns: Returns
    key: jax.Array


def init_state(static: Static, hyper: Hyper, offline: Transition | None, truncation, key) -> State:
    key, explorer_key, exploiter_key, rnd_key, env_key = jax.random.split(key, 5)
    exploiter = init_agent(static._replace(nets=static.nets.exploiter), exploiter_key)
    rnd = init_rnd(static, rnd_key) if static.args.intrinsic == "rnd" else ()
    row = with_returns(static.example, static.example.reward)
    env_state, ring = start_online(static._replace(example=row), env_key)
    returns = Returns.start(static, hyper, offline, truncation, static.args.mc_bootstrap)
    return State(init_agent(static, explorer_key), exploiter, rnd, env_state, ring, returns, key)


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


def optimistic_update(static: Static, hyper: Hyper, learners: tuple, sample: tuple):
    """The explorer's gradient step: RND learns from a batch, then the agent from reward + c * bonus."""
    (agent, rnd), (batch, key), bounds = learners, sample, (hyper.target_min, hyper.target_max)
    rnd = learn_rnd(static, rnd, batch, hyper.rnd_lr) if static.args.intrinsic == "rnd" else rnd
    intrinsic = hyper.intrinsic_coef * bonus(static, rnd, batch)
    agent, metrics = update(static, hyper, agent, batch, intrinsic, bounds, key)
    return (agent, rnd), metrics


def pretrain_chunk(static: Static, state: State, hyper: Hyper, offline: Transition, *, length: int):
    """`length` gradient steps of the explorer on the offline rows."""
    rows = with_returns(offline, state.returns.offline)

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        sample = sample_batches(rows, None, 0, 1.0, (static.args.batch_size,), sample_key), update_key
        learners, metrics = optimistic_update(static, hyper, (state.explorer, state.rnd), sample)
        return state.replace(explorer=learners[0], rnd=learners[1], key=key), metrics

    return scan_mean(step, state, length)


def explore_chunk(static: Static, state: State, hyper: Hyper, offline, added, *, length: int):
    """`length` steps of all environments, gradient steps after each; `added` [] online rows come before."""
    args, num_updates = static.args, round(static.args.num_envs * static.args.utd_ratio)
    offline = with_returns(offline, state.returns.offline)

    def step(carry):
        state, added = carry
        key, act_key, reset_key, sample_key, update_key = jax.random.split(state.key, 5)
        obs, now = state.env_state.obs, online_hyper(args, hyper, added)
        action = act(static.nets, state.explorer.actor.params, obs, act_key)
        env_state, reached = envs.step_all(static.env, state.env_state, action, reset_key)
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, without_returns(rows), added, reached.info["broken"])
        ring, returns = state.returns.record(now, ring, reached, added, args.mc_bootstrap)
        added, learners = added + args.num_envs, (state.explorer, state.rnd)
        shape, keys = (num_updates, args.batch_size), jax.random.split(update_key, num_updates)
        samples = sample_batches(offline, ring, added, online_ratio(args, added), shape, sample_key), keys
        learners, metrics = jax.lax.scan(partial(optimistic_update, static, now), learners, samples)
        state = State(learners[0], state.exploiter, learners[1], env_state, ring, returns, key)
        return (state, added), {**jax.tree.map(jnp.mean, metrics), **envs.tally(reached)}

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


# as in ooo_iql.py
def value_range(low: jax.Array, high: jax.Array, discount: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What Q can be if rewards lie in [low, high] and an episode may terminate after any step."""
    far = [jnp.where(r == 0, 0.0, r / (1 - discount)) for r in (low, high)]  # 0, too, without discount
    return jnp.minimum(low, far[0]), jnp.maximum(high, far[1])


def retrain_chunk(static: Static, state: State, hyper: Hyper, offline, added, *, length: int):
    """`length` gradient steps of the exploiter on offline rows and `added` [] online ones, without floors."""
    args, static = static.args, static._replace(nets=static.nets.exploiter)
    rows = without_returns(offline), without_returns(state.ring)
    bias = hyper.retrain_scale * hyper.reward_bias + hyper.retrain_bias
    hyper = hyper.replace(reward_scale=hyper.retrain_scale * hyper.reward_scale, reward_bias=bias)
    reward, seen = buffer.rewards(*rows, added)
    low, high = jnp.min(reward, where=seen, initial=jnp.inf), jnp.max(reward, where=seen, initial=-jnp.inf)
    extremes = (hyper.reward_scale * r + hyper.reward_bias for r in (low, high))
    bounded, num_best = args.bound_q and not args.frozen_bonus, round(args.upsample * args.batch_size)
    q_bounds = value_range(*extremes, hyper.discount) if bounded else (-jnp.inf, jnp.inf)
    best = seen & (reward >= jnp.minimum(high, hyper.upsample_from))
    best_rows = jnp.nonzero(best, size=len(reward), fill_value=0)[0] if num_best else None

    def step(carry):
        exploiter, key = carry
        key, sample_key, best_key, update_key = jax.random.split(key, 4)
        batch = sample_batches(*rows, added, args.retrain_ratio, (args.batch_size - num_best,), sample_key)
        if num_best:
            index = best_rows[jax.random.randint(best_key, (num_best,), 0, best.sum())]
            batch = jax.tree.map(lambda *parts: jnp.concatenate(parts), batch, buffer.take(*rows, index))
        frozen = hyper.frozen_bonus_coef * bonus(static, state.rnd, batch)
        intrinsic = frozen if args.frozen_bonus else jnp.zeros(args.batch_size)
        exploiter, metrics = update(static, hyper, exploiter, batch, intrinsic, q_bounds, update_key)
        return (exploiter, key), metrics

    (exploiter, key), metrics = scan_mean(step, (state.exploiter, state.key), length)
    return state.replace(exploiter=exploiter, key=key), metrics


# as in ooo_iql.py
def make_plan(args: Args) -> list[Phase]:
    """Pre-training, then exploration with a retraining at each of --retrain-at."""
    plan, now = [Phase("offline", 0, args.offline_steps, "explorer")], 0
    stops = sorted(set(args.retrain_at or (args.online_steps,)))
    for stop in stops:
        name = "retrained" if stop == stops[-1] else f"retrained@{stop}"
        plan.append(Phase("online", now, stop, "explorer", acts=True))
        plan.append(Phase(name, 0, args.retrain_steps, "exploiter", collected=stop))
        now = stop
    return [*plan, Phase("online", now, args.online_steps, "explorer", acts=True)]


def make_nets(session: Session) -> Nets:
    """The networks, or the reason why the settings do not go together."""
    args, exploiter_hidden = session.args, session.args.retrain_critic_hidden or session.args.critic_hidden
    if args.retrain_ratio >= 0 and 0 in args.retrain_at and args.online_steps:
        raise UsageError("--retrain-at 0 has no online rows yet: it needs --retrain-ratio -1")
    if args.sync_explorer and exploiter_hidden != args.critic_hidden:
        raise UsageError("--sync-explorer needs critics of one size: leave out --retrain-critic-hidden")
    actor = Actor(args.hidden, session.action_size)
    rnd = MLP((512, 512, 512), last=2**0.5 if args.rnd_variant == "paper" else 1e-2)
    return Nets(actor, Critic(args.critic_hidden), rnd, Nets(actor, Critic(exploiter_hidden), rnd, None))


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("ooo_cal_ql", args, make_plan)
    check_returns(session)
    args, offline, hyper = session.args, session.offline, session.hyper
    nets, functions = make_nets(session), (init_state, pretrain_chunk, explore_chunk, retrain_chunk)
    initialise, pretrain, explore, retrain = session.compile(session.static(nets), *functions)
    start = partial(initialise, hyper, offline, session.truncation, session.keys)
    state = session.begin(start(), partial(act, nets))
    for chunk in session.chunks():
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, length=chunk.iterations)
        elif chunk.phase == "online":
            state, metrics = explore(state, hyper, offline, chunk.collected, length=chunk.iterations)
        else:
            if chunk.first and not args.warm_start:  # from scratch: the exploiter of a fresh state
                state = state.replace(exploiter=start(only="exploiter"))
            state, metrics = retrain(state, hyper, offline, chunk.collected, length=chunk.iterations)
            if chunk.last and args.sync_explorer and chunk.collected < args.online_steps:
                state = state.replace(explorer=jax.tree.map(jnp.copy, state.exploiter))
        session.after(chunk, metrics, state)
    policies = {"explorer": state.explorer, "exploiter": state.exploiter}
    return session.conclude(state, export, policies, stages=("offline", "online", "retrained"))


# The settings of OOO's and Cal-QL's code by environment family; those of the point mass are ours.
MAZE = dict(critic_hidden=(256,) * 4, lagrange=True, reward_scale=10, reward_bias=-5, intrinsic_coef=10)
HAND = dict(hidden=(512, 512), critic_hidden=(512, 512, 512), cql_weight=1, offline_steps=20_000)
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), critic_hidden=(64, 64), actor_lr=1e-3, critic_lr=1e-3, alpha_lr=1e-3,
        target_rate=0.02, offline_steps=5_000, online_steps=960_000, num_envs=48, utd_ratio=1 / 48,
        num_samples=4, retrain_steps=12_000, cql_weight=10, entropy_per_action=-2, upsample=8 / 256),
    "probe": dict(hidden=(32, 32), critic_hidden=(32, 32), intrinsic="none", discount=0.9, actor_lr=3e-3,
        critic_lr=3e-3, alpha_lr=3e-3, target_rate=0.05, entropy_per_action=-3, cql_weight=0.01,
        num_samples=2, offline_steps=0, online_steps=3_000, retrain_steps=3_000),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    ("halfcheetah", "hopper", "walker2d", "ant"): dict(mc_bootstrap="zero"),
    ("halfcheetah-sparse", "ant-sparse"): dict(mc_bootstrap="last", offline_steps=0),
    "antmaze": {**MAZE, "intrinsic_coef": 50, "online_steps": 2_000_000},
    "maze2d": dict(**MAZE, offline_steps=500_000, target_min=-500, target_max=600, upsample=1 / 8),
    "kitchen": dict(
        hidden=(512,) * 3, critic_hidden=(512,) * 3, importance_sampling=False, end_reward=jnp.inf,
        reward_bias=-5, target_max=50, offline_ratio=0.25, offline_steps=500_000, intrinsic_coef=10,
        retrain_bias=1, retrain_ratio=0.25),
    "kitchen-complete": dict(online_steps=4_000_000, retrain_critic_hidden=(256,) * 3),
    ("door", "pen", "relocate"): dict(**HAND, retrain_steps=500_000, retrain_ratio=0.5),
    ("door-binary", "pen-binary", "relocate-binary"): dict(reward_scale=10, reward_bias=5, end_reward=0),
    "hammer": dict(**HAND, target_max=10_300, mc_bootstrap="zero", retrain_steps=500_000, retrain_scale=0.01,
        upsample=1 / 8, upsample_from=25),
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
