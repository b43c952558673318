"""OOO on RLPD: explore with RLPD + RND, then retrain a policy from scratch on all data, without bonus.

Offline-to-Online-to-Offline RL (Mark et al., arXiv 2310.08558) separates the policy that gathers data from
the policy that is handed over. Both are soft actor-critics here, and the first one is RLPD (rlpd.py, Ball et
al., arXiv 2302.02948):

1. explore  The explorer acts and learns online from r + c * novelty; offline rows, if there are any, are half
            of each batch.
2. retrain  A fresh exploiter learns from offline and online rows alike, on the task reward alone, with one
            step of policy and alpha to each critic step. Its Q-values are held inside what the data's rewards
            allow, and rare successes are up-sampled.

The explorer alone is RLPD + RND: `--retrain-steps 0`. `rlpd.py --intrinsic rnd` is the same method, with
RLPD's budgets and, in AntMaze, its single target critic.

Departures. The official code (MaxSobolMark/OOO b1424a2) retrains plain SAC, here `--retrainer sac`; it bounds
no Q unless asked; and it adds up-sampled rows to its batches (here, they replace some). The paper's text
speaks of pessimism, and the default here follows it. RND departs as in rlpd.py.

    python algos/ooo_rlpd.py
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
from ooo_rl.data.runs.bounds import Bounds, Fraction, Layers, NonNegative, Number, Positive, Size, Steps, With
from ooo_rl.data.runs.online_change import online_hyper, online_ratio
from ooo_rl.data.runs.session import Phase, Result, Session, Static, scan_mean, start_online
from ooo_rl.data.runs.settings import Experiment, Traced, UsageError, launch


# as in rlpd.py
@struct.dataclass
class Hyper(Traced):
    """Settings that are traced, not compiled in: one value per run, so each can be swept in one program."""

    actor_lr: NonNegative = 3e-4
    """learning rate of the policy"""
    critic_lr: NonNegative = 3e-4
    """learning rate of the critics"""
    alpha_lr: NonNegative = 3e-4
    """learning rate of the entropy's weight alpha; 0 keeps --init-alpha"""
    target_rate: Fraction = 0.005
    """share of the critics that goes into their targets at each update"""
    entropy_per_action: Number = -0.5
    """entropy that alpha aims at, per dimension of the action: -1 in SAC's paper, -0.5 in jaxrl and RLPD"""
    backup_entropy: NonNegative = 1.0
    """weight of the entropy in the critics' target: 1 is SAC, 0 leaves it out (RLPD for goals)"""
    intrinsic_coef: Annotated[Number, With("intrinsic")] = 10.0
    """c: weight of the exploration bonus"""
    rnd_lr: Annotated[NonNegative, With("intrinsic", "rnd")] = 1e-4
    """learning rate of the RND predictor"""


@dataclass(frozen=True)
class Args(Experiment):
    """OOO(RLPD): explore online optimistically, retrain pessimistically from scratch."""

    dataset: str = "own"
    """Minari id, or a .hdf5 or .npz file; none: no offline data; own: the environment's, if it has one"""
    offline_ratio: Annotated[float, Bounds(at_most=1)] = 0.5
    """share of each online batch that comes from the offline rows; below 0: their share of all rows"""
    upsample: Fraction = 0.0
    """share of each retraining batch that is drawn from the rows of highest reward"""
    offline_steps: Steps = 0
    """gradient steps of optimistic pre-training"""
    online_steps: Steps = 1_000_000
    """environment steps of exploration"""
    random_steps: Steps = 5_000
    """of these, steps of uniformly random actions and no learning at the start"""
    utd_ratio: Positive = 20.0
    """critic steps per environment step; num_envs * utd_ratio of them follow each step of all environments"""
    policy_every: Size = 20
    """critic steps per step of policy, alpha and RND, online; must divide num_envs * utd_ratio"""
    intrinsic: Literal["rnd", "none"] = "rnd"
    """exploration bonus: random network distillation, or none"""
    rnd_variant: Annotated[Literal["paper", "code"], With("intrinsic", "rnd")] = "paper"
    """paper: novelty of s, two hidden layers, summed errors; code: of s', one hidden layer, largest error"""
    rnd_units: Annotated[Size, With("intrinsic", "rnd")] = 512
    """units of RND's layers, its output included"""
    retrain_steps: Steps = 1_000_000
    """gradient steps of each retraining; 0: none"""
    retrain_at: Annotated[tuple[int, ...], Bounds(at_least=0)] = ()
    """environment steps after which to retrain; empty: at the end"""
    retrainer: Literal["rlpd", "sac"] = "rlpd"
    """what is retrained: rlpd, critics like the explorer's; sac, two without LayerNorm (OOO's code)"""
    bound_q: Annotated[bool, With("retrain_steps")] = True
    """in retraining, hold Q inside what the data's rewards allow"""
    frozen_bonus: bool = False
    """retrain with the explorer's bonus, c * novelty, frozen, added to the reward (the paper's Figure 3)"""
    warm_start: bool = False
    """retrain from the previous exploiter instead of from scratch (the paper's Figure 13)"""
    hidden: Layers = (256, 256)
    """units of the policy's hidden layers"""
    critic_hidden: Layers = (256, 256)
    """units of the critics' hidden layers"""
    layer_norm: bool = True
    """LayerNorm in the critics' hidden layers"""
    ensemble: Size = 10
    """critics"""
    target_subset: Size = 2
    """critics, drawn anew at each critic step, whose least value is the target's"""
    init_alpha: Positive = 1.0
    """entropy's weight alpha to start with"""
    hyper: Hyper = Hyper()
    """traced settings, which --sweep can vary"""


# as in rlpd.py
class MLP(nn.Module):
    """Dense layers with ReLU, LayerNorm if asked; initialised orthogonally."""

    sizes: tuple[int, ...]
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x):
        for size in self.sizes[:-1]:
            x = nn.Dense(size, kernel_init=orthogonal(2**0.5))(x)
            x = nn.relu(nn.LayerNorm()(x) if self.layer_norm else x)
        return nn.Dense(self.sizes[-1], kernel_init=orthogonal(2**0.5))(x)


# as in sac.py
class Actor(nn.Module):
    """Mean and log standard deviation, both [..., A], of a Gaussian that tanh squashes into (-1, 1)."""

    hidden: tuple[int, ...]
    action_size: int

    @nn.compact
    def __call__(self, obs):
        mean, log_std = jnp.split(MLP((*self.hidden, 2 * self.action_size))(obs), 2, axis=-1)
        return mean, jnp.clip(log_std - 1.0, -20.0, 2.0)


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


Nets = namedtuple("Nets", "actor critic target rnd")  # modules; `target` has the critics that a target asks


# as in sac.py
@struct.dataclass
class Agent:
    """One agent: what learns, each with its optimiser, and the critics' slow copy."""

    actor: Learner
    critic: Learner
    target_critic: dict
    alpha: Learner  # of log alpha


# as in sac.py
def init_agent(static: Static, key: jax.Array) -> Agent:
    nets, obs, action = static.nets, static.example.obs[None], static.example.action[None]
    actor_key, critic_key = jax.random.split(key)
    critic = Learner.create(nets.critic.init(critic_key, obs, action))
    actor, alpha = nets.actor.init(actor_key, obs), jnp.log(static.args.init_alpha)
    target_critic = jax.tree.map(jnp.copy, critic.params)
    return Agent(Learner.create(actor), critic, target_critic, Learner.create(alpha))


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


# as in rlpd.py
def actor_loss(params, nets, critic, obs, alpha, key):
    """Mean Q of all critics less entropy, at actions of the policy: RLPD, the last line of algorithm 1.

    Also the actions' mean log density.
    """
    action, log_prob = sample(nets, params, obs, key)
    q = nets.critic.apply(critic, obs, action).mean(axis=0)
    return jnp.mean(alpha * log_prob - q), log_prob.mean()


# as in rlpd.py
def alpha_loss(log_alpha, log_prob, target_entropy):
    """Raises alpha while entropy is below its target: SAC, equation (17), in alpha as RLPD's code has it."""
    return -jnp.exp(log_alpha) * (log_prob + target_entropy)


def update(nets: Nets, hyper: Hyper, agent: Agent, batches: Transition, bonus, q_bounds: tuple, key):
    """A critic step on each of `batches` [P, B, ...], then one step of policy and alpha on the last one.

    `bonus` [P, B] enters the critics' target alone; `q_bounds` (low, high) hold the task reward's part of it.
    """
    next_key, subset_key, actor_key = jax.random.split(key, 3)
    alpha = jnp.exp(agent.alpha.params)
    # The policy stands still until its own step, so the next actions of all critic steps are drawn at once.
    next_action, next_log_prob = sample(nets, agent.actor.params, batches.next_obs, next_key)
    subset_keys = jax.random.split(subset_key, bonus.shape[0])
    shuffled = jax.vmap(partial(jax.random.permutation, x=nets.critic.num))(subset_keys)

    def fit(critics, given):
        critic, target_critic = critics
        batch, bonus, next_action, next_log_prob, subset = given
        asked = jax.tree.map(lambda p: p[subset], target_critic)  # the other critics cost nothing
        next_q = nets.target.apply(asked, batch.next_obs, next_action).min(axis=0)
        task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
        decay = hyper.discount * batch.discount
        entropy = -hyper.backup_entropy * alpha * next_log_prob
        target_q = jnp.clip(task_reward + decay * next_q, *q_bounds) + decay * entropy + bonus
        rows = nets, batch.obs, batch.action
        loss, critic = critic.descend(critic_loss, hyper.critic_lr, *rows, target_q)
        target_critic = optax.incremental_update(critic.params, target_critic, hyper.target_rate)
        return (critic, target_critic), (loss, target_q.mean())

    given = batches, bonus, next_action, next_log_prob, shuffled[:, : nets.target.num]
    (critic, target_critic), (loss_q, q) = jax.lax.scan(fit, (agent.critic, agent.target_critic), given)

    given = nets, critic.params, batches.obs[-1], alpha, actor_key
    (loss_a, log_prob), actor = agent.actor.descend(actor_loss, hyper.actor_lr, *given, has_aux=True)
    target_entropy = hyper.entropy_per_action * nets.actor.action_size
    _, next_alpha = agent.alpha.descend(alpha_loss, hyper.alpha_lr, log_prob, target_entropy)

    metrics = {"critic_loss": loss_q.mean(), "actor_loss": loss_a, "bonus": bonus.mean()}
    metrics |= {"q": q.mean(), "alpha": alpha, "entropy": -log_prob}
    return Agent(actor, critic, target_critic, next_alpha), metrics


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


# as in rlpd.py
def bonus(static: Static, memory: RND | tuple, batch: Transition) -> jax.Array:
    """Bonus [B]: RND's error over its running standard deviation, or 0."""
    if static.args.intrinsic == "rnd":
        return novelty(static, memory, batch) / jnp.sqrt(memory.error.var + 1e-8)
    return jnp.zeros(batch.reward.shape)


def for_exploiter(static: Static) -> Static:
    """`static` with the exploiter's networks: the explorer's; for sac, two critics without LayerNorm."""
    if static.args.retrainer == "rlpd":
        return static
    critic = Critic(static.args.critic_hidden)
    return static._replace(nets=static.nets._replace(critic=critic, target=critic))


@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    explorer: Agent
    exploiter: Agent
    bonus: RND | tuple
    env_state: envs.State | None
    ring: Transition | None
    key: jax.Array


def init_state(static: Static, key: jax.Array) -> State:
    key, explorer_key, exploiter_key, bonus_key, env_key = jax.random.split(key, 5)
    explorer, exploiter = init_agent(static, explorer_key), init_agent(for_exploiter(static), exploiter_key)
    memory = init_rnd(static, bonus_key) if static.args.intrinsic == "rnd" else ()
    env_state, ring = start_online(static, env_key)
    return State(explorer, exploiter, memory, env_state, ring, key)


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


def optimistic_update(static: Static, hyper: Hyper, learners: tuple, block: tuple):
    """The bonus learns from all rows of a block, (batches [P, B, ...], key), the agent from r + c * bonus."""
    (agent, memory), (batches, key) = learners, block
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
    if static.args.intrinsic == "rnd":
        memory = learn_rnd(static, memory, rows, hyper.rnd_lr)
    intrinsic = hyper.intrinsic_coef * bonus(static, memory, rows).reshape(batches.reward.shape)
    agent, metrics = update(static.nets, hyper, agent, batches, intrinsic, (-jnp.inf, jnp.inf), key)
    return (agent, memory), metrics


def pretrain_chunk(static: Static, state: State, hyper: Hyper, offline: Transition, *, length: int):
    """`length` gradient steps of the explorer on the offline rows, each one of critics, policy and alpha."""

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        shape = (1, static.args.batch_size)
        block = sample_batches(offline, None, 0, 1.0, shape, sample_key), update_key
        (explorer, memory), metrics = optimistic_update(static, hyper, (state.explorer, state.bonus), block)
        return state.replace(explorer=explorer, bonus=memory, key=key), metrics

    return scan_mean(step, state, length)


def explore_chunk(static: Static, state: State, hyper: Hyper, offline, added, *, length: int, learns: bool):
    """`length` steps of all environments, blocks of steps after each; random ones unless it `learns`.

    `added` [] online rows come before.
    """
    args = static.args
    num_blocks = round(args.num_envs * args.utd_ratio) // args.policy_every

    def step(carry):
        state, added = carry
        now = online_hyper(args, hyper, added)
        key, act_key, reset_key, learn_key = jax.random.split(state.key, 4)
        obs = state.env_state.obs
        if learns:
            action = act(static.nets, state.explorer.actor.params, obs, act_key)
        else:
            action = jax.random.uniform(act_key, (args.num_envs, static.env.action_size), minval=-1.0)
        env_state, reached = envs.step_all(static.env, state.env_state, action, reset_key)
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, rows, added, reached.info["broken"])
        added = added + args.num_envs

        state = state.replace(env_state=env_state, ring=ring, key=key)
        if not learns:
            return (state, added), envs.tally(reached)
        sample_key, update_key = jax.random.split(learn_key)
        shape = (num_blocks, args.policy_every, args.batch_size)
        batches = sample_batches(offline, ring, added, online_ratio(args, added), shape, sample_key)
        blocks, learners = (batches, jax.random.split(update_key, num_blocks)), (state.explorer, state.bonus)
        learners, metrics = jax.lax.scan(partial(optimistic_update, static, now), learners, blocks)
        metrics = jax.tree.map(jnp.mean, metrics) | envs.tally(reached)
        return (state.replace(explorer=learners[0], bonus=learners[1]), added), metrics

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


# as in ooo_iql.py
def value_range(low: jax.Array, high: jax.Array, discount: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What Q can be if rewards lie in [low, high] and an episode may terminate after any step."""
    far = [jnp.where(r == 0, 0.0, r / (1 - discount)) for r in (low, high)]  # 0, too, without discount
    return jnp.minimum(low, far[0]), jnp.maximum(high, far[1])


def retrain_chunk(static: Static, state: State, hyper: Hyper, offline, added, *, length: int):
    """`length` gradient steps of the exploiter on offline rows and the `added` [] online ones alike."""
    args, nets, ring, q_bounds = static.args, for_exploiter(static).nets, state.ring, (-jnp.inf, jnp.inf)
    filled = buffer.size(offline) + jnp.minimum(added, buffer.size(ring))
    reward, seen = buffer.rewards(offline, ring, added)
    low, high = jnp.min(reward, where=seen, initial=jnp.inf), jnp.max(reward, where=seen, initial=-jnp.inf)
    if args.bound_q and not args.frozen_bonus:
        extremes = (hyper.reward_scale * r + hyper.reward_bias for r in (low, high))
        q_bounds = value_range(*extremes, hyper.discount)
    best, num_best = seen & (reward == high), round(args.upsample * args.batch_size)
    best_rows = jnp.nonzero(best, size=len(reward), fill_value=0)[0] if num_best else None

    def step(carry):
        exploiter, key = carry
        key, sample_key, best_key, update_key = jax.random.split(key, 4)
        index = jax.random.randint(sample_key, (args.batch_size - num_best,), 0, filled)
        if num_best:
            again = best_rows[jax.random.randint(best_key, (num_best,), 0, best.sum())]
            index = jnp.concatenate([index, again])
        batch = buffer.take(offline, ring, index)
        frozen = hyper.intrinsic_coef * bonus(static, state.bonus, batch)
        intrinsic = frozen if args.frozen_bonus else jnp.zeros(args.batch_size)
        block = jax.tree.map(lambda x: x[None], (batch, intrinsic))
        exploiter, metrics = update(nets, hyper, exploiter, *block, q_bounds, update_key)
        return (exploiter, key), metrics

    (exploiter, key), metrics = scan_mean(step, (state.exploiter, state.key), length)
    return state.replace(exploiter=exploiter, key=key), metrics


# as in rlpd.py
def check_critics(args: Args) -> None:
    """Raises UsageError if the numbers of critics or of their steps do not go together."""
    if args.target_subset > args.ensemble:
        raise UsageError(
            f"--target-subset {args.target_subset} is more than the --ensemble of {args.ensemble} critics"
        )
    num_updates = round(args.num_envs * args.utd_ratio) if args.online_steps else 0
    if num_updates % args.policy_every:
        raise UsageError(
            f"--policy-every {args.policy_every} must divide num_envs * utd_ratio, {num_updates}"
        )


def make_plan(args: Args) -> list[Phase]:
    """Pre-training, then exploration with a retraining at each of --retrain-at."""
    check_critics(args)
    plan, now = [Phase("offline", 0, args.offline_steps, "explorer")], 0
    online = partial(Phase, "online", agent="explorer", acts=True, idle=args.random_steps)
    stops = sorted(set(args.retrain_at or (args.online_steps,)))
    for stop in stops:
        name = "retrained" if stop == stops[-1] else f"retrained@{stop}"
        plan.append(online(now, stop))
        plan.append(Phase(name, 0, args.retrain_steps, "exploiter", collected=stop))
        now = stop
    return [*plan, online(now, args.online_steps)]


# as in rlpd.py
def make_nets(session: Session) -> Nets:
    """The networks: RND's has one hidden layer less in the code's variant."""
    args, units = session.args, session.args.rnd_units
    critics = (args.ensemble, args.target_subset)
    critic, target = (Critic(args.critic_hidden, num, args.layer_norm) for num in critics)
    rnd = MLP((units, units, units) if args.rnd_variant == "paper" else (units, units))
    return Nets(Actor(args.hidden, session.action_size), critic, target, rnd)


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("ooo_rlpd", args, make_plan)
    args, offline, hyper = session.args, session.offline, session.hyper
    nets, functions = make_nets(session), (init_state, pretrain_chunk, explore_chunk, retrain_chunk)
    static = session.static(nets)
    own = for_exploiter(static).nets.critic
    session.q_of["exploiter"] = lambda critic, *given: own.apply(critic, *given).min(axis=0)
    initialise, pretrain, explore, retrain = session.compile(static, *functions)
    state = session.begin(initialise(session.keys), partial(act, nets))

    for chunk in session.chunks():
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, length=chunk.iterations)
        elif chunk.phase == "online":
            how = {"length": chunk.iterations, "learns": chunk.learns}
            state, metrics = explore(state, hyper, offline, chunk.collected, **how)
        else:
            if chunk.first and not args.warm_start:  # from scratch: the exploiter of a fresh state
                state = state.replace(exploiter=initialise(session.keys, only="exploiter"))
            state, metrics = retrain(state, hyper, offline, chunk.collected, length=chunk.iterations)
        session.after(chunk, metrics, state)

    policies = {"explorer": state.explorer, "exploiter": state.exploiter}
    return session.conclude(state, export, policies, stages=("offline", "online", "retrained"))


# Settings of RLPD and OOO by environment family; those of mazes and of the point mass are ours.
# Goals pay -1 until there.
GOAL = dict(hidden=(256, 256, 256), critic_hidden=(256, 256, 256), backup_entropy=0)
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), critic_hidden=(64, 64), actor_lr=1e-3, critic_lr=1e-3, alpha_lr=1e-3,
        target_rate=0.02, backup_entropy=0, online_steps=96_000, num_envs=48, utd_ratio=1 / 6, policy_every=4,
        random_steps=4_800, rnd_units=64, retrain_steps=12_000),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    "probe": dict(
        hidden=(32, 32), critic_hidden=(32, 32), intrinsic="none", discount=0.9, actor_lr=3e-3,
        critic_lr=3e-3, alpha_lr=3e-3, target_rate=0.05, entropy_per_action=-3, backup_entropy=0, ensemble=5,
        policy_every=2, online_steps=3_000, utd_ratio=2, random_steps=160, retrain_steps=3_000),
    ("halfcheetah-sparse", "ant-sparse"): dict(upsample=32 / 288),
    ("antmaze", "maze2d"): dict(**GOAL, reward_bias=-1, upsample=8 / 256),
    "kitchen": dict(reward_bias=-4, end_reward=4),
    ("door", "pen", "relocate"): GOAL,
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
