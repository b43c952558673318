"""TD3: twin delayed deterministic policy gradient (Fujimoto et al., arXiv 1802.09477).

The policy is deterministic, and explores by noise added to its actions. Two critics are fitted to
r + discount * min Q(s', a'), where a' is the target policy's action with clipped noise, so that a narrow peak
of Q gains nothing. The policy climbs the first critic. It and all targets move at every `--policy-every`-th
step only. The method is here as two baselines of OOO (Mark et al., arXiv 2310.08558):

- TD3 + RND, with a bonus: `--intrinsic rnd --dataset own`. There is no pre-training: the data are in the
  buffer from the start, drawn like all other rows.
- An exploiter without pessimism (Figure 5c): `--retrain-steps N` ends with training a fresh agent, as in
  ooo_iql.py, on the task reward of all rows. Only `--bound-q` holds its Q-values back; a seed whose Q goes
  beyond the limit of `--max-q` is stopped and named.

Departures. What OOO's code (MaxSobolMark/OOO b1424a2) calls TD3 is another method, here `--variant code`: a
Gaussian squashed by tanh, its deviation independent of the state, without an entropy term. There a' is drawn
from the policy itself, with no target policy and no target noise; nothing is delayed, and the policy climbs
the mean of both critics. (Its V, which nothing reads, is left out.) OOO's numbers presumably come from that
code. Its paper says TD3, so TD3 is the default. Where paper and code of TD3 (sfujim/TD3 34770cc) differ
(networks, batches, Adam, 25,000 random steps), settings are the code's. Networks start orthogonal, as in
OOO's code, and several environments act at once (`--num-envs`).

    python algos/td3.py
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
from ooo_rl.data.runs.bounds import Bounds, Fraction, Layers, NonNegative, Number, Steps, With
from ooo_rl.data.runs.online_change import online_hyper, online_ratio
from ooo_rl.data.runs.session import Phase, Result, Session, Static, scan_mean, start_online
from ooo_rl.data.runs.settings import Experiment, Traced, launch


@struct.dataclass
class Hyper(Traced):
    """Settings that are traced, not compiled in: one value per run, so each can be swept in one program."""

    actor_lr: NonNegative = 3e-4
    """learning rate of the policy"""
    critic_lr: NonNegative = 3e-4
    """learning rate of the two critics"""
    target_rate: Fraction = 0.005
    """share of the critics that goes into their targets at each update"""
    policy_every: Annotated[float, Bounds(at_least=1, whole=True)] = 2.0
    """gradient steps of the critics for each one of the policy and the targets; --variant code has 1"""
    exploration_noise: Annotated[NonNegative, With("online_steps")] = 0.1
    """standard deviation of the noise added to actions online"""
    target_noise: NonNegative = 0.2
    """and of that added to the target policy's actions"""
    target_noise_clip: NonNegative = 0.5
    """bound of the latter noise"""
    intrinsic_coef: Annotated[Number, With("intrinsic")] = 0.5
    """c: weight of the exploration bonus"""
    frozen_bonus_coef: Annotated[Number, With("frozen_bonus")] = 10.0
    """weight of the bonus in retraining with --frozen-bonus"""
    rnd_lr: Annotated[NonNegative, With("intrinsic", "rnd")] = 1e-4
    """learning rate of the RND predictor"""


@dataclass(frozen=True)
class Args(Experiment):
    """TD3: train online, with a dataset's rows in the buffer if there is one; retrain afresh if asked."""

    dataset: str = "own"
    """Minari id, or a .hdf5 or .npz file; none: no offline data; own: the environment's, if any"""
    offline_ratio: Annotated[float, Bounds(at_most=1)] = -1.0
    """share of each online batch that comes from the offline rows; below 0: their share of all rows"""
    offline_steps: Steps = 0
    """gradient steps on the dataset"""
    online_steps: Steps = 1_000_000
    """environment steps"""
    random_steps: Steps = 25_000
    """of these, steps of uniformly random actions and no learning at the start"""
    retrain_steps: Steps = 0
    """gradient steps of each retraining; 0: none"""
    retrain_at: Annotated[tuple[int, ...], Bounds(at_least=0)] = ()
    """environment steps after which to retrain; empty: at the end"""
    intrinsic: Literal["rnd", "none"] = "none"
    """exploration bonus: random network distillation (OOO's TD3 + RND), or none"""
    rnd_variant: Annotated[Literal["paper", "code"], With("intrinsic", "rnd")] = "paper"
    """paper: novelty of s, two hidden layers, summed errors; code: of s', one hidden layer, largest error"""
    bound_q: Annotated[bool, With("retrain_steps")] = False
    """in retraining, hold Q inside what the data's rewards allow"""
    upsample: Fraction = 0.0
    """share of each retraining batch that is drawn from the rows of highest reward"""
    frozen_bonus: bool = False
    """retrain with the explorer's bonus, frozen, added to the reward"""
    hidden: Layers = (256, 256)
    """units of the policy's hidden layers"""
    critic_hidden: Layers = (256, 256)
    """units of the critics' hidden layers"""
    variant: Literal["paper", "code"] = "paper"
    """paper: TD3; code: what OOO's code calls so, a stochastic policy without targets of its own and delay"""
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


class Actor(nn.Module):
    """Mean [..., A] before tanh; with `gaussian` also a log standard deviation there, one for all states."""

    hidden: tuple[int, ...]
    action_size: int
    gaussian: bool = False

    @nn.compact
    def __call__(self, obs):
        mean = MLP((*self.hidden, self.action_size))(obs)
        if not self.gaussian:
            return mean, None
        log_std = self.param("log_std_before_tanh", nn.initializers.zeros, (self.action_size,))
        return mean, jnp.clip(log_std, -5.0, 2.0)


# as in ooo_iql.py
class Critic(nn.Module):
    """Two independent Q functions: [2, B]."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        ensemble = nn.vmap(MLP, {"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
        return ensemble((*self.hidden, 1))(jnp.concatenate([obs, action], axis=-1)).squeeze(-1)


Nets = namedtuple("Nets", "actor critic rnd")  # modules; their parameters are in the state


@struct.dataclass
class Agent:
    """What learns, each with its optimiser, and slow copies of both; --variant code has no target policy."""

    actor: Learner
    critic: Learner
    target_actor: dict
    target_critic: dict


def init_agent(nets: Nets, example: Transition, key: jax.Array) -> Agent:
    keys, obs, action = jax.random.split(key), example.obs[None], example.action[None]
    actor, critic = nets.actor.init(keys[0], obs), nets.critic.init(keys[1], obs, action)
    targets = jax.tree.map(jnp.copy, (actor, critic))
    return Agent(Learner.create(actor), Learner.create(critic), *targets)


def act(nets: Nets, actor: dict, obs: jax.Array, key=None, noise=0.0, bound=jnp.inf) -> jax.Array:
    """Actions [..., A] for observations [..., obs]: the policy's own without a key; with one, noise is added.

    `noise` is its standard deviation, `bound` how far it reaches; the sum is clipped. A Gaussian policy draws
    a sample instead, and needs neither.
    """
    mean, log_std = nets.actor.apply(actor, obs)
    draw = jnp.zeros(mean.shape) if key is None else jax.random.normal(key, mean.shape)
    if nets.actor.gaussian:
        return jnp.tanh(mean + jnp.exp(log_std) * draw)
    return jnp.clip(jnp.tanh(mean) + jnp.clip(noise * draw, -bound, bound), -1.0, 1.0)


def export(actor: dict) -> policy.Policy:
    """The policy without its noise as a file that NumPy can run."""
    return policy.mlp(actor["params"]["MLP_0"])


def target_action(nets, hyper, agent, next_obs, key):
    """a': the target policy's action with clipped noise, TD3, algorithm 1; in the code's variant a sample."""
    if nets.actor.gaussian:
        return act(nets, agent.actor.params, next_obs, key)
    return act(nets, agent.target_actor, next_obs, key, hyper.target_noise, hyper.target_noise_clip)


def critic_loss(params, nets, obs, action, target_q):
    """Squared Bellman error of both critics, summed over them: TD3, algorithm 1."""
    q = nets.critic.apply(params, obs, action)
    return jnp.mean(jnp.sum((q - target_q) ** 2, axis=0))


def actor_loss(params, nets, critic, obs, key):
    """-Q1 at the policy's actions: TD3, algorithm 1; in the code's variant both critics' mean, at samples."""
    if nets.actor.gaussian:
        return -nets.critic.apply(critic, obs, act(nets, params, obs, key)).mean()
    return -nets.critic.apply(critic, obs, act(nets, params, obs))[0].mean()


def update(nets: Nets, hyper: Hyper, agent: Agent, batch: Transition, bonus, q_bounds: tuple, key: jax.Array):
    """One gradient step of the critics and, when it is their turn, of policy and targets.

    `bonus` [B] enters the critics' target alone; `q_bounds` (low, high) hold Q-values of the task reward.
    """
    next_key, actor_key = jax.random.split(key)
    next_action = target_action(nets, hyper, agent, batch.next_obs, next_key)
    next_q = nets.critic.apply(agent.target_critic, batch.next_obs, next_action).min(axis=0)
    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = jnp.clip(task_reward + hyper.discount * batch.discount * next_q, *q_bounds) + bonus
    rows = nets, batch.obs, batch.action
    loss_q, critic = agent.critic.descend(critic_loss, hyper.critic_lr, *rows, target_q)

    # OOO's code takes the policy's step before that of the critics.
    climbed = agent.critic.params if nets.actor.gaussian else critic.params
    loss_a, actor = agent.actor.descend(actor_loss, hyper.actor_lr, nets, climbed, batch.obs, actor_key)
    old = agent.target_actor, agent.target_critic
    targets = optax.incremental_update((actor.params, critic.params), old, hyper.target_rate)

    # Taken at every step, kept at some: seeds that are vmapped would take both ways of a condition anyway.
    due = (critic.opt.count % jnp.int32(hyper.policy_every) == 0) | nets.actor.gaussian
    moved, waiting = Agent(actor, critic, *targets), agent.replace(critic=critic)
    losses = {"actor_loss": loss_a, "critic_loss": loss_q}
    metrics = {**losses, "q": target_q.mean(), "bonus": bonus.mean()}
    return jax.tree.map(partial(jnp.where, due), moved, waiting), metrics


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


# as in ooo_rlpd.py
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
    explorer, exploiter = (init_agent(static.nets, static.example, k) for k in (explorer_key, exploiter_key))
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


# as in ooo_iql.py
def optimistic_update(static: Static, hyper: Hyper, learners: tuple, sample: tuple):
    """The explorer's gradient step: the bonus learns from a batch, then the agent from reward + c * bonus."""
    (agent, memory), (batch, key) = learners, sample
    if static.args.intrinsic == "rnd":
        memory = learn_rnd(static, memory, batch, hyper.rnd_lr)
    intrinsic = hyper.intrinsic_coef * bonus(static, memory, batch)
    agent, metrics = update(static.nets, hyper, agent, batch, intrinsic, (-jnp.inf, jnp.inf), key)
    return (agent, memory), metrics


# as in ooo_iql.py
def pretrain_chunk(static: Static, state: State, hyper: Hyper, offline: Transition, *, length: int):
    """`length` gradient steps of the explorer on the offline rows."""

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        index = jax.random.randint(sample_key, (static.args.batch_size,), 0, buffer.size(offline))
        sample = buffer.take(offline, None, index), update_key
        learners, metrics = optimistic_update(static, hyper, (state.explorer, state.bonus), sample)
        return state.replace(explorer=learners[0], bonus=learners[1], key=key), metrics

    return scan_mean(step, state, length)


def explore_chunk(static: Static, state: State, hyper: Hyper, offline, added, *, length: int, learns: bool):
    """`length` steps of all environments, gradient steps after each; random ones unless it `learns`.

    `added` [] online rows come before.
    """
    args, num_updates = static.args, round(static.args.num_envs * static.args.utd_ratio)

    def step(carry):
        state, added = carry
        now = online_hyper(args, hyper, added)
        key, act_key, reset_key, learn_key = jax.random.split(state.key, 4)
        obs = state.env_state.obs
        if learns:
            action = act(static.nets, state.explorer.actor.params, obs, act_key, now.exploration_noise)
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
        shape, keys = (num_updates, args.batch_size), jax.random.split(update_key, num_updates)
        batches = sample_batches(offline, ring, added, online_ratio(args, added), shape, sample_key)
        learners = state.explorer, state.bonus
        learners, metrics = jax.lax.scan(partial(optimistic_update, static, now), learners, (batches, keys))
        metrics = jax.tree.map(jnp.mean, metrics) | envs.tally(reached)
        return (state.replace(explorer=learners[0], bonus=learners[1]), added), metrics

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


# as in ooo_iql.py
def value_range(low: jax.Array, high: jax.Array, discount: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What Q can be if rewards lie in [low, high] and an episode may terminate after any step."""
    far = [jnp.where(r == 0, 0.0, r / (1 - discount)) for r in (low, high)]  # 0, too, without discount
    return jnp.minimum(low, far[0]), jnp.maximum(high, far[1])


# as in ooo_iql.py
def retrain_chunk(static: Static, state: State, hyper: Hyper, offline, added, *, length: int):
    """`length` gradient steps of the exploiter on offline rows and the `added` [] online ones alike."""
    args, ring, q_bounds = static.args, state.ring, (-jnp.inf, jnp.inf)
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
        frozen = hyper.frozen_bonus_coef * bonus(static, state.bonus, batch)
        intrinsic = frozen if args.frozen_bonus else jnp.zeros(args.batch_size)
        exploiter, metrics = update(static.nets, hyper, exploiter, batch, intrinsic, q_bounds, update_key)
        return (exploiter, key), metrics

    (exploiter, key), metrics = scan_mean(step, (state.exploiter, state.key), length)
    return state.replace(exploiter=exploiter, key=key), metrics


def make_plan(args: Args) -> list[Phase]:
    """Pre-training, then exploration with a retraining at each of --retrain-at."""
    plan, now = [Phase("offline", 0, args.offline_steps, "explorer")], 0
    online = partial(Phase, "online", agent="explorer", acts=True, idle=args.random_steps)
    stops = sorted(set(args.retrain_at or (args.online_steps,)))
    for stop in stops:
        name = "retrained" if stop == stops[-1] else f"retrained@{stop}"
        plan.append(online(now, stop))
        plan.append(Phase(name, 0, args.retrain_steps, "exploiter", collected=stop))
        now = stop
    return [*plan, online(now, args.online_steps)]


def make_nets(session: Session) -> Nets:
    """The networks, or the reason why the settings do not go together."""
    args = session.args
    rnd = MLP((512, 512, 512) if args.rnd_variant == "paper" else (512, 512))
    actor = Actor(args.hidden, session.action_size, args.variant == "code")
    return Nets(actor, Critic(args.critic_hidden), rnd)


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("td3", args, make_plan)
    args, offline, hyper = session.args, session.offline, session.hyper
    nets, functions = make_nets(session), (init_state, pretrain_chunk, explore_chunk, retrain_chunk)
    initialise, pretrain, explore, retrain = session.compile(session.static(nets), *functions)
    state = session.begin(initialise(session.keys), partial(act, nets))

    for chunk in session.chunks():
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, length=chunk.iterations)
        elif chunk.phase == "online":
            how = {"length": chunk.iterations, "learns": chunk.learns}
            state, metrics = explore(state, hyper, offline, chunk.collected, **how)
        else:
            if chunk.first:  # from scratch: the exploiter of a fresh state
                state = state.replace(exploiter=initialise(session.keys, only="exploiter"))
            state, metrics = retrain(state, hyper, offline, chunk.collected, length=chunk.iterations)
        session.after(chunk, metrics, state)

    policies = {"policy": state.explorer, "exploiter": state.exploiter}
    return session.conclude(state, export, policies, stages=("offline", "online", "retrained"))


# TD3's code in locomotion; on OOO's tasks OOO's table, with TD3's networks and rates. There the data's rows
# stand in for random steps, and --intrinsic rnd takes this intrinsic_coef. Those of the point mass are ours.
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), critic_hidden=(64, 64), actor_lr=1e-3, critic_lr=1e-3, target_rate=0.02,
        intrinsic_coef=10, online_steps=960_000, num_envs=48, utd_ratio=1 / 48, random_steps=4_800),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    "probe": dict(
        hidden=(32, 32), critic_hidden=(32, 32), discount=0.9, actor_lr=3e-3, critic_lr=3e-3,
        target_rate=0.05, online_steps=3_000, random_steps=160),
    "antmaze": dict(
        reward_bias=-1, intrinsic_coef=10, online_steps=1_500_000, upsample=8 / 256, random_steps=0),
    "maze2d": dict(reward_bias=-1, intrinsic_coef=10, online_steps=500_000, random_steps=0),
    "kitchen": dict(
        reward_bias=-4, end_reward=4, intrinsic_coef=10, online_steps=4_000_000, random_steps=0),
    "hammer": dict(online_steps=500_000, random_steps=0),
    ("door", "pen", "relocate"): dict(random_steps=0),
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
