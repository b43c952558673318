"""OOO on IQL: explore with an optimistic policy, then retrain a pessimistic one from scratch on all data.

Offline-to-Online-to-Offline RL (Mark et al., arXiv 2310.08558) separates the policy that gathers data from
the policy that is handed over. Both are IQL agents (Kostrikov et al., arXiv 2110.06169):

1. pre-train  The explorer learns from the offline data, with r + c * bonus in place of r.
2. explore    It acts and learns online, drawn by the bonus to what is new: RND's error, or 1 / sqrt(count).
3. retrain    A fresh exploiter learns from offline and online rows alike, on the task reward alone. Its
              Q-values are held inside what the data's rewards allow, and rare successes are up-sampled.

Departures. From the paper: temperature multiplies the advantage, as in IQL's code and in the paper's table;
equation (3) divides by it. From the official code (MaxSobolMark/OOO b1424a2): offline rows are never
overwritten; RND's statistics are those of the raw error (there, of the normalised one); up-sampling works on
every task; the critic loss sums over the critics (there, their mean: the same for Adam).

    python algos/ooo_iql.py     # point mass and wall: success 1.0 in 36 steps, 3.6 minutes on two CPU cores
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
from ooo_rl.data.runs.online_change import online_hyper
from ooo_rl.data.runs.session import Phase, Result, Session, Static, scan_mean, start_online
from ooo_rl.data.runs.settings import Experiment, Traced, UsageError, launch


@struct.dataclass
class Hyper(Traced):
    """Settings that are traced, not compiled in: one value per run, so each can be swept in one program."""

    actor_lr: NonNegative = 3e-4
    """learning rate of the policy"""
    critic_lr: NonNegative = 3e-4
    """learning rate of the two critics"""
    value_lr: NonNegative = 3e-4
    """learning rate of the value function"""
    target_rate: Fraction = 0.005
    """share of the critics that goes into their targets at each update"""
    expectile: Annotated[float, Bounds(above=0, below=1)] = 0.7
    """expectile of the value regression: 0.5 is the mean, towards 1 the maximum over the data's actions"""
    temperature: NonNegative = 3.0
    """beta: how sharply the policy prefers advantageous actions; 0 is behaviour cloning"""
    intrinsic_coef: Annotated[Number, With("intrinsic")] = 0.5
    """c: weight of the exploration bonus"""
    frozen_bonus_coef: Annotated[Number, With("frozen_bonus")] = 10.0
    """weight of the bonus in retraining with --frozen-bonus"""
    rnd_lr: Annotated[NonNegative, With("intrinsic", "rnd")] = 1e-4
    """learning rate of the RND predictor"""


@dataclass(frozen=True)
class Args(Experiment):
    """OOO(IQL): pre-train offline, explore online optimistically, retrain pessimistically from scratch."""

    online_steps: Steps = 1_000_000
    """environment steps of exploration"""
    retrain_steps: Steps = 2_000_000
    """gradient steps of each retraining; 0: none"""
    retrain_at: Annotated[tuple[int, ...], Bounds(at_least=0)] = ()
    """environment steps after which to retrain; empty: at the end"""
    intrinsic: Literal["rnd", "count", "none"] = "rnd"
    """exploration bonus: random network distillation, or by counting, 1 / sqrt(n(s, a) + 1) (2-D tasks)"""
    count_bins: Annotated[tuple[int, int], Bounds(at_least=1), With("intrinsic", "count")] = (100, 10)
    """cells of the count bonus per axis of position and of action; the official code's are 100 and 10"""
    rnd_variant: Annotated[Literal["paper", "code"], With("intrinsic", "rnd")] = "paper"
    """paper: novelty of s, two hidden layers, summed errors; code: of s', one hidden layer, largest error"""
    sync_explorer: bool = False
    """after each retraining the explorer goes on from the exploiter (the paper's Figure 14)"""
    bound_q: Annotated[bool, With("retrain_steps")] = True
    """in retraining, hold Q inside what the data's rewards allow; never with --frozen-bonus"""
    upsample: Fraction = 0.0
    """share of each retraining batch that is drawn from the rows of highest reward"""
    frozen_bonus: bool = False
    """retrain with the explorer's bonus, frozen, added to the reward (the paper's Figure 3)"""
    warm_start: bool = False
    """retrain from the previous exploiter instead of from scratch (the paper's Figure 13)"""
    return_range: Annotated[NonNegative, With("dataset")] = 0.0
    """scale rewards so that the dataset's returns span this much (IQL: 1000 in locomotion); 0: do not"""
    hidden: Layers = (256, 256)
    """units of the hidden layers of all networks"""
    dropout: Annotated[float, Bounds(at_least=0, below=1)] = 0.0
    """dropout rate in the policy's hidden layers"""
    hyper: Hyper = Hyper()
    """traced settings, which --sweep can vary"""


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
    """Gaussian policy around tanh(mean), not squashed after sampling; one log_std for all states."""

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
        ensemble = nn.vmap(MLP, {"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
        return ensemble((*self.hidden, 1))(jnp.concatenate([obs, action], axis=-1)).squeeze(-1)


class Value(nn.Module):
    """State value: [B]."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, obs):
        return MLP((*self.hidden, 1))(obs).squeeze(-1)


Nets = namedtuple("Nets", "actor critic value rnd")  # modules; their parameters are in the state


@struct.dataclass
class Agent:
    """One IQL agent: what learns, each with its optimiser, and the critics' slow copy."""

    actor: Learner
    critic: Learner
    target_critic: dict
    value: Learner


def init_agent(nets: Nets, example: Transition, key: jax.Array) -> Agent:
    keys, obs, action = jax.random.split(key, 3), example.obs[None], example.action[None]
    critic = Learner.create(nets.critic.init(keys[1], obs, action))
    actor, value = (Learner.create(net.init(k, obs)) for net, k in zip((nets.actor, nets.value), keys[::2]))
    return Agent(actor, critic, jax.tree.map(jnp.copy, critic.params), value)


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


def update(nets: Nets, hyper: Hyper, agent: Agent, batch: Transition, bonus, q_bounds: tuple, key: jax.Array):
    """One gradient step of value, policy and critics, in the order of IQL's code.

    `bonus` [B] enters the critics' target alone; `q_bounds` (low, high) hold Q-values of the task reward.
    """
    q = jnp.clip(nets.critic.apply(agent.target_critic, batch.obs, batch.action).min(axis=0), *q_bounds)
    loss_v, value = agent.value.descend(value_loss, hyper.value_lr, nets, batch.obs, q, hyper.expectile)

    v, next_v = jnp.split(nets.value.apply(value.params, jnp.concatenate([batch.obs, batch.next_obs])), 2)
    adv, rows = q - v, (batch.obs, batch.action)
    loss_a, actor = agent.actor.descend(actor_loss, hyper.actor_lr, nets, *rows, adv, hyper.temperature, key)

    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = jnp.clip(task_reward + hyper.discount * batch.discount * next_v, *q_bounds) + bonus
    loss_q, critic = agent.critic.descend(critic_loss, hyper.critic_lr, nets, *rows, target_q)
    target_critic = optax.incremental_update(critic.params, agent.target_critic, hyper.target_rate)

    metrics = {"value_loss": loss_v, "actor_loss": loss_a, "critic_loss": loss_q, "bonus": bonus.mean()}
    return Agent(actor, critic, target_critic, value), {**metrics, "q": q.mean(), "adv": adv.mean()}


def act(nets: Nets, actor: dict, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Actions [..., A] for observations [..., obs]: the mean without a key; with one, a sample, clipped."""
    mean, log_std = nets.actor.apply(actor, obs)
    noise = 0.0 if key is None else jnp.exp(log_std) * jax.random.normal(key, mean.shape)
    return jnp.clip(mean + noise, -1.0, 1.0)


def export(actor: dict) -> policy.Policy:
    """The policy as a file that NumPy can run."""
    log_std = jnp.clip(actor["params"]["log_std"], -5.0, 2.0)
    return policy.mlp(actor["params"]["MLP_0"], output="tanh_mean", log_std=log_std)


@struct.dataclass
class RND:
    """Random network distillation: a predictor learns a fixed random network, and errs on what is new."""

    predictor: Learner
    target: dict
    obs: Moments
    error: Moments


def init_rnd(static: Static, key: jax.Array) -> RND:
    predictor, target = (static.nets.rnd.init(k, static.example.obs[None]) for k in jax.random.split(key))
    return RND(Learner.create(predictor), target, Moments.fresh(*static.example.obs.shape), Moments.fresh())


def rnd_errors(static: Static, predictor: dict, rnd: RND, batch: Transition) -> jax.Array:
    """Squared errors [B, units] on clipped, normalised states (next states in the code's variant)."""
    x = batch.obs if static.args.rnd_variant == "paper" else batch.next_obs
    x = jnp.clip((x - rnd.obs.mean) / jnp.sqrt(rnd.obs.var + 1e-8), -5, 5)
    return (static.nets.rnd.apply(predictor, x) - static.nets.rnd.apply(rnd.target, x)) ** 2


def novelty(static: Static, rnd: RND, batch: Transition) -> jax.Array:
    """How badly each row [B] is predicted."""
    errors = rnd_errors(static, rnd.predictor.params, rnd, batch)
    return errors.sum(axis=-1) if static.args.rnd_variant == "paper" else errors.max(axis=-1)


def learn_rnd(static: Static, rnd: RND, batch: Transition, learning_rate: jax.Array) -> RND:
    """One gradient step of the predictor; the moments of states and errors take the batch in."""
    rnd = rnd.replace(obs=rnd.obs.update(batch.obs))
    loss = lambda params: rnd_errors(static, params, rnd, batch).mean()  # noqa: E731
    rnd = rnd.replace(predictor=rnd.predictor.descend(loss, learning_rate)[1])
    return rnd.replace(error=rnd.error.update(novelty(static, rnd, batch)))


def cell(static: Static, rows: Transition) -> jax.Array:
    """Index [B] of the cell nearest to each row's (position, action), on the grid of --count-bins."""
    (x0, x1, y0, y1), (places, actions) = static.env.layout["bounds"], static.args.count_bins
    low, high = jnp.float32([x0, y0, -1, -1]), jnp.float32([x1, y1, 1, 1])
    last = jnp.float32([places, places, actions, actions]) - 1
    x = jnp.concatenate([rows.obs[:, :2], rows.action], axis=-1)
    nearest = jnp.clip(jnp.round((x - low) / (high - low) * last), 0, last).astype(jnp.int32)
    return jnp.ravel_multi_index(tuple(nearest.T), (places, places, actions, actions), mode="clip")


def init_bonus(static: Static, offline: Transition | None, key: jax.Array):
    """What the bonus is computed from: RND, or counts of all cells, the offline rows included, or nothing."""
    if static.args.intrinsic == "rnd":
        return init_rnd(static, key)
    places, actions = static.args.count_bins
    counts = jnp.zeros((places * actions) ** 2) if static.args.intrinsic == "count" else ()
    return counts if offline is None else observe(static, counts, offline)


def observe(static: Static, memory, rows: Transition):
    """The bonus's `memory` with rows counted in; RND learns from batches instead."""
    return memory.at[cell(static, rows)].add(1.0) if static.args.intrinsic == "count" else memory


def bonus(static: Static, memory, batch: Transition) -> jax.Array:
    """Bonus [B]: RND's error over its running standard deviation, or 1 / sqrt(n(s, a) + 1), or 0."""
    if static.args.intrinsic == "rnd":
        return novelty(static, memory, batch) / jnp.sqrt(memory.error.var + 1e-8)
    if static.args.intrinsic == "count":
        return jax.lax.rsqrt(memory[cell(static, batch)] + 1)
    return jnp.zeros(batch.reward.shape)


@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    explorer: Agent
    exploiter: Agent
    bonus: RND | jax.Array | tuple
    env_state: envs.State | None
    ring: Transition | None
    key: jax.Array


def init_state(static: Static, offline: Transition | None, key: jax.Array) -> State:
    key, explorer_key, exploiter_key, bonus_key, env_key = jax.random.split(key, 5)
    explorer, exploiter = (init_agent(static.nets, static.example, k) for k in (explorer_key, exploiter_key))
    env_state, ring = start_online(static, env_key)
    return State(explorer, exploiter, init_bonus(static, offline, bonus_key), env_state, ring, key)


def optimistic_update(static: Static, hyper: Hyper, learners: tuple, sample: tuple):
    """The explorer's gradient step: the bonus learns from a batch, then the agent from reward + c * bonus."""
    (agent, memory), (batch, key) = learners, sample
    if static.args.intrinsic == "rnd":
        memory = learn_rnd(static, memory, batch, hyper.rnd_lr)
    intrinsic = hyper.intrinsic_coef * bonus(static, memory, batch)
    agent, metrics = update(static.nets, hyper, agent, batch, intrinsic, (-jnp.inf, jnp.inf), key)
    return (agent, memory), metrics


def pretrain_chunk(static: Static, state: State, hyper: Hyper, offline: Transition, *, length: int):
    """`length` gradient steps of the explorer on the offline rows."""

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        index = jax.random.randint(sample_key, (static.args.batch_size,), 0, buffer.size(offline))
        sample = buffer.take(offline, None, index), update_key
        learners, metrics = optimistic_update(static, hyper, (state.explorer, state.bonus), sample)
        return state.replace(explorer=learners[0], bonus=learners[1], key=key), metrics

    return scan_mean(step, state, length)


def explore_chunk(static: Static, state: State, hyper: Hyper, offline, added, *, length: int):
    """`length` steps of all environments, gradient steps after each; `added` [] online rows come before."""
    args, num_updates = static.args, round(static.args.num_envs * static.args.utd_ratio)

    def step(carry):
        state, added = carry
        key, act_key, reset_key, sample_key, update_key = jax.random.split(state.key, 5)
        obs, now = state.env_state.obs, online_hyper(args, hyper, added)
        action = act(static.nets, state.explorer.actor.params, obs, act_key)
        env_state, reached = envs.step_all(static.env, state.env_state, action, reset_key)
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, rows, added, reached.info["broken"])
        added = added + args.num_envs

        filled = buffer.size(offline) + jnp.minimum(added, buffer.size(ring))
        index = jax.random.randint(sample_key, (num_updates, args.batch_size), 0, filled)
        learners = state.explorer, observe(static, state.bonus, rows)
        samples = buffer.take(offline, ring, index), jax.random.split(update_key, num_updates)
        learners, metrics = jax.lax.scan(partial(optimistic_update, static, now), learners, samples)
        state = State(learners[0], state.exploiter, learners[1], env_state, ring, key)
        return (state, added), {**jax.tree.map(jnp.mean, metrics), **envs.tally(reached)}

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


def value_range(low: jax.Array, high: jax.Array, discount: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What Q can be if rewards lie in [low, high] and an episode may terminate after any step."""
    far = [jnp.where(r == 0, 0.0, r / (1 - discount)) for r in (low, high)]  # 0, too, without discount
    return jnp.minimum(low, far[0]), jnp.maximum(high, far[1])


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
    stops = sorted(set(args.retrain_at or (args.online_steps,)))
    for stop in stops:
        name = "retrained" if stop == stops[-1] else f"retrained@{stop}"
        plan.append(Phase("online", now, stop, "explorer", acts=True))
        plan.append(Phase(name, 0, args.retrain_steps, "exploiter", collected=stop))
        now = stop
    return [*plan, Phase("online", now, args.online_steps, "explorer", acts=True)]


def make_nets(session: Session) -> Nets:
    """The networks, or the reason why the settings do not go together."""
    args = session.args
    if args.intrinsic == "count" and not (hasattr(session.env, "layout") and session.action_size == 2):
        raise UsageError(f"--intrinsic count needs a 2-D task with 2 actions; {args.env} is none, use rnd")
    rnd = MLP((512, 512, 512) if args.rnd_variant == "paper" else (512, 512))
    actor = Actor(args.hidden, session.action_size, args.dropout)
    return Nets(actor, Critic(args.hidden), Value(args.hidden), rnd)


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("ooo_iql", args, make_plan)
    args, offline, hyper = session.args, session.offline, session.scaled_to(session.args.return_range)
    nets, functions = make_nets(session), (init_state, pretrain_chunk, explore_chunk, retrain_chunk)
    initialise, pretrain, explore, retrain = session.compile(session.static(nets), *functions)
    state = session.begin(initialise(offline, session.keys), partial(act, nets))

    for chunk in session.chunks():
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, length=chunk.iterations)
        elif chunk.phase == "online":
            state, metrics = explore(state, hyper, offline, chunk.collected, length=chunk.iterations)
        else:
            if chunk.first and not args.warm_start:  # from scratch: the exploiter of a fresh state
                state = state.replace(exploiter=initialise(offline, session.keys, only="exploiter"))
            state, metrics = retrain(state, hyper, offline, chunk.collected, length=chunk.iterations)
            if chunk.last and args.sync_explorer and chunk.collected < args.online_steps:
                state = state.replace(explorer=jax.tree.map(jnp.copy, state.exploiter))
        session.after(chunk, metrics, state)

    policies = {"explorer": state.explorer, "exploiter": state.exploiter}
    return session.conclude(state, export, policies, stages=("offline", "online", "retrained"))


# The paper's settings by environment family (Table 4, App. B); those of the point mass are ours.
FAMILIES = {
    "point-mass-wall": dict(
        intrinsic="count", intrinsic_coef=10, count_bins=(20, 4), hidden=(64, 64), expectile=0.9,
        temperature=5, actor_lr=1e-3, critic_lr=1e-3, value_lr=1e-3, target_rate=0.05, upsample=8 / 256,
        offline_steps=5_000, online_steps=2_880_000, num_envs=48, utd_ratio=1 / 48, retrain_steps=24_000),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    "probe": dict(hidden=(32, 32), intrinsic="none", discount=0.9, expectile=0.98, temperature=20,
        actor_lr=3e-3, critic_lr=3e-3, value_lr=3e-3, target_rate=0.05, offline_steps=0, online_steps=3_000,
        retrain_steps=3_000),
    ("halfcheetah", "hopper", "walker2d", "ant"): dict(return_range=1000),
    ("halfcheetah-sparse", "ant-sparse"): dict(return_range=0, offline_steps=0),
    "antmaze": dict(expectile=0.9, temperature=10, intrinsic_coef=10, reward_bias=-1, upsample=8 / 256,
        online_steps=1_500_000),
    "antmaze-large-goal-missing": dict(offline_steps=500_000),
    "maze2d": dict(expectile=0.9, temperature=3, intrinsic_coef=10, reward_bias=-1, offline_steps=500_000,
        online_steps=500_000),
    "kitchen": dict(expectile=0.7, temperature=0.5, dropout=0.1, intrinsic_coef=10, reward_bias=-4,
        end_reward=4, upsample=8 / 256, online_steps=4_000_000),
    ("hammer", "door", "pen", "relocate"): dict(expectile=0.7, temperature=0.5, dropout=0.1),
    ("door-binary", "pen-binary", "relocate-binary"): dict(
        expectile=0.8, temperature=3, offline_steps=25_000),
    "hammer-truncated-expert": dict(expectile=0.8, temperature=3, dropout=0, offline_steps=50_000,
        online_steps=500_000),
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
