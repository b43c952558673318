"""PER: IQL, fine-tuned with prioritised replay and n-step returns (Schaul et al., arXiv 1511.05952).

Offline this is IQL (iql.py). Online, too, but for the rows that it learns from. Offline and online rows lie
in one buffer, and each has a priority: its last TD error |delta| to the power alpha. A batch is drawn in
proportion to the priorities, so rows that the critics predict badly come more often. Rows that are drawn
often get less weight in the critics' loss, to correct for it: (N P(i))^-beta, over the largest of the batch.
A drawn row is its return of `--n-steps` steps and what it bootstraps from. This is how the paper of guided
decoupled exploration (GDE) uses it, as one of its ways to go on with the offline data (its Table 5).

What is chosen here, where no code tells. |delta| is the mean of the two critics', before the gradient step.
Value and policy learn from the drawn rows without weights. Offline rows begin with priority 1, which is the
largest as long as no error is known; each new row enters with the largest so far. beta rises linearly over
the online phase, from 0.4 to 1. alpha 0.6 and beta 0.4 are Schaul et al.'s, for priorities in proportion.

    python algos/per_iql.py
    python algos/per_iql.py --env hopper --dataset ooo/hopper/medium-v0 --init-from RUN --offline-steps 0
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
from ooo_rl.data import buffer, n_step, policy, priorities
from ooo_rl.data.buffer import Transition
from ooo_rl.data.learner import Learner, orthogonal
from ooo_rl.data.n_step import Linked
from ooo_rl.data.priorities import Priorities
from ooo_rl.data.runs.bounds import Bounds, Fraction, Layers, NonNegative, Positive, Size, Steps, With
from ooo_rl.data.runs.online_change import online_hyper
from ooo_rl.data.runs.session import Phase, Result, Session, Static, scan_mean, start_online
from ooo_rl.data.runs.settings import Experiment, Traced, launch


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
    """beta of IQL: how sharply the policy prefers advantageous actions; 0 is behaviour cloning"""
    priority_exponent: NonNegative = 0.6
    """alpha: priorities are TD errors to this power; 0 draws all rows alike"""
    priority_offset: Positive = 1e-3
    """epsilon: what is added to each |TD error|, so that a row without one can be drawn as well"""
    importance_exponent: Fraction = 0.4
    """beta as the online phase begins: 0 leaves the critics' loss as it is, 1 takes the whole bias out"""
    final_importance_exponent: Fraction = 1.0
    """beta at last; in between it changes linearly (--importance-steps)"""


@dataclass(frozen=True)
class Args(Experiment):
    """PER: train offline with IQL, then fine-tune with prioritised replay and n-step returns."""

    offline_steps: Steps = 1_000_000
    """gradient steps on the dataset"""
    online_steps: Steps = 250_000
    """environment steps of fine-tuning"""
    n_steps: Size = 5
    """steps of the returns that the critics learn online"""
    importance_steps: Steps = 0
    """environment steps in which beta gets to its last value; 0: all of the phase"""
    return_range: Annotated[NonNegative, With("dataset")] = 0.0
    """scale rewards so that the dataset's returns span this much (IQL: 1000 in locomotion); 0: do not"""
    hidden: Layers = (256, 256)
    """units of the hidden layers of all networks"""
    actor_decay: Literal["auto", "none", "cosine"] = "auto"
    """schedule of the policy's learning rate over offline steps; auto: cosine to 0 without online steps"""
    dropout: Annotated[float, Bounds(at_least=0, below=1)] = 0.0
    """dropout rate in the policy's hidden layers"""
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


# as in ooo_iql.py
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


# as in ooo_iql.py
class Critic(nn.Module):
    """Two independent Q functions: [2, B]."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        ensemble = nn.vmap(MLP, {"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
        return ensemble((*self.hidden, 1))(jnp.concatenate([obs, action], axis=-1)).squeeze(-1)


# as in ooo_iql.py
class Value(nn.Module):
    """State value: [B]."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, obs):
        return MLP((*self.hidden, 1))(obs).squeeze(-1)


Nets = namedtuple("Nets", "actor critic value")  # modules; their parameters are in the state


# as in ooo_iql.py
@struct.dataclass
class Agent:
    """One IQL agent: what learns, each with its optimiser, and the critics' slow copy."""

    actor: Learner
    critic: Learner
    target_critic: dict
    value: Learner


# as in ooo_iql.py
def init_agent(nets: Nets, example: Transition, key: jax.Array) -> Agent:
    keys, obs, action = jax.random.split(key, 3), example.obs[None], example.action[None]
    critic = Learner.create(nets.critic.init(keys[1], obs, action))
    actor, value = (Learner.create(net.init(k, obs)) for net, k in zip((nets.actor, nets.value), keys[::2]))
    return Agent(actor, critic, jax.tree.map(jnp.copy, critic.params), value)


# as in ooo_iql.py
def value_loss(params, nets, obs, q, expectile):
    """Expectile regression of V(s) on Q(s, a): IQL, equation (5)."""
    diff = q - nets.value.apply(params, obs)
    return jnp.mean(jnp.where(diff > 0, expectile, 1 - expectile) * diff**2)


# as in ooo_iql.py
def actor_loss(params, nets, obs, action, adv, temperature, key):
    """Advantage-weighted regression, weights capped at 100: IQL, equation (7)."""
    weight = jnp.minimum(jnp.exp(temperature * adv), 100.0)
    mean, log_std = nets.actor.apply(params, obs, train=True, rngs={"dropout": key})
    log_prob = jax.scipy.stats.norm.logpdf(action, mean, jnp.exp(log_std)).sum(axis=-1)
    return -jnp.mean(weight * log_prob)


def critic_loss(params, nets, obs, action, target_q, weight):
    """Squared Bellman error of both critics, summed over them: IQL, equation (6), each row by its `weight`.

    The second result [B] are the rows' absolute TD errors, the mean of both critics'.
    """
    error = nets.critic.apply(params, obs, action) - target_q
    return jnp.mean(weight * jnp.sum(error**2, axis=0)), jnp.abs(error).mean(axis=0)


def update(nets: Nets, hyper: Hyper, agent: Agent, batch: Transition, weight, key: jax.Array):
    """One gradient step of value, policy and critics, in IQL's order; `weight` [B] is that of the critics.

    Returns the agent, the absolute TD errors [B] before the step, and metrics.
    """
    q = nets.critic.apply(agent.target_critic, batch.obs, batch.action).min(axis=0)
    loss_v, value = agent.value.descend(value_loss, hyper.value_lr, nets, batch.obs, q, hyper.expectile)

    v, next_v = jnp.split(nets.value.apply(value.params, jnp.concatenate([batch.obs, batch.next_obs])), 2)
    adv, rows = q - v, (batch.obs, batch.action)
    loss_a, actor = agent.actor.descend(actor_loss, hyper.actor_lr, nets, *rows, adv, hyper.temperature, key)

    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = task_reward + hyper.discount * batch.discount * next_v
    given = nets, *rows, target_q, weight
    (loss_q, error), critic = agent.critic.descend(critic_loss, hyper.critic_lr, *given, has_aux=True)
    target_critic = optax.incremental_update(critic.params, agent.target_critic, hyper.target_rate)

    metrics = {"value_loss": loss_v, "actor_loss": loss_a, "critic_loss": loss_q}
    metrics |= {"q": q.mean(), "adv": adv.mean()}
    return Agent(actor, critic, target_critic, value), error, metrics


# as in ooo_iql.py
def act(nets: Nets, actor: dict, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Actions [..., A] for observations [..., obs]: the mean without a key; with one, a sample, clipped."""
    mean, log_std = nets.actor.apply(actor, obs)
    noise = 0.0 if key is None else jnp.exp(log_std) * jax.random.normal(key, mean.shape)
    return jnp.clip(mean + noise, -1.0, 1.0)


# as in ooo_iql.py
def export(actor: dict) -> policy.Policy:
    """The policy as a file that NumPy can run."""
    log_std = jnp.clip(actor["params"]["log_std"], -5.0, 2.0)
    return policy.mlp(actor["params"]["MLP_0"], output="tanh_mean", log_std=log_std)


@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    agent: Agent
    priorities: Priorities | None  # of the offline rows, then of the ring's
    newest: jax.Array  # [] priority of new rows: the largest so far
    env_state: envs.State | None
    ring: Linked | None
    key: jax.Array


def init_state(static: Static, offline: Transition | None, key: jax.Array) -> State:
    key, agent_key, env_key = jax.random.split(key, 3)
    row, num_old = n_step.linked(static.example, jnp.float32(0)), buffer.size(offline)
    env_state, ring = start_online(static._replace(example=row), env_key)
    tree = None
    if ring is not None:
        tree = priorities.create(jnp.float32(jnp.arange(num_old + buffer.size(ring)) < num_old))
    agent = init_agent(static.nets, static.example, agent_key)
    return State(agent, tree, jnp.float32(1), env_state, ring, key)


def pretrain_chunk(static: Static, state: State, hyper: Hyper, offline: Transition, before, *, length: int):
    """`length` gradient steps on the offline rows, drawn alike, each of one step and of weight 1.

    `before` [] of the phase precede them.
    """
    args, inherited = static.args, state.agent.actor.opt.count - before  # steps of the --init-from run
    decays = args.actor_decay == "cosine" or (args.actor_decay == "auto" and not args.online_steps)

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        index = jax.random.randint(sample_key, (args.batch_size,), 0, buffer.size(offline))
        batch, steps = buffer.take(offline, None, index), state.agent.actor.opt.count - inherited
        rate = 0.5 + 0.5 * jnp.cos(jnp.pi * steps / args.offline_steps) if decays else 1.0
        decayed = hyper.replace(actor_lr=rate * hyper.actor_lr)
        agent, _, metrics = update(static.nets, decayed, state.agent, batch, 1.0, update_key)
        return state.replace(agent=agent, key=key), metrics

    return scan_mean(step, state, length)


def returns(args: Args, hyper: Hyper, offline: Linked | None, ring: Linked, index, added) -> Transition:
    """The n-step returns from the rows `index` [B], counted over the offline rows, then the ring's slots.

    Each goes on in its own part: an offline row in its episode, an online row in its environment.
    """
    num_old, n = buffer.size(offline), args.n_steps
    new = n_step.n_step(hyper, ring, jnp.maximum(index - num_old, 0), added, args.num_envs, n)
    if offline is None:
        return new
    old = n_step.n_step(hyper, offline, jnp.minimum(index, num_old - 1), num_old, 1, n)
    return jax.tree.map(partial(jax.vmap(jnp.where), index < num_old), old, new)


def importance(probability: jax.Array, beta: jax.Array) -> jax.Array:
    """Weights (N P(i))^-beta over the largest of the batch [B], from P [B]: PER, Section 3.4. N cancels."""
    return (probability.min() / probability) ** beta


def learn(static: Static, hyper: Hyper, offline, ring, added, beta, state: State, key: jax.Array):
    """One online gradient step, from the drawing of its rows to their new priorities."""
    tree, (draw_key, update_key) = state.priorities, jax.random.split(key)
    index = priorities.draw(tree, (static.args.batch_size,), draw_key)
    weight = importance(priorities.probability(tree, index), beta)
    batch = returns(static.args, hyper, offline, ring, index, added)
    scaled = hyper.replace(reward_scale=1.0, reward_bias=0.0)  # n-step returns are so already
    agent, error, metrics = update(static.nets, scaled, state.agent, batch, weight, update_key)

    fresh = (error + hyper.priority_offset) ** hyper.priority_exponent
    tree, newest = priorities.update(tree, index, fresh), jnp.maximum(state.newest, fresh.max())
    metrics |= {"td_error": error.mean(), "importance_weight": weight.mean()}
    metrics["offline_share"] = jnp.mean(index < buffer.size(offline))
    return state.replace(agent=agent, priorities=tree, newest=newest), metrics


def finetune_chunk(static: Static, state: State, hyper, offline, truncation, added, *, length: int):
    """`length` steps of all environments, gradient steps after each; `added` [] online rows come before."""
    args, num_updates = static.args, round(static.args.num_envs * static.args.utd_ratio)
    data = n_step.linked(offline, truncation)

    def step(carry):
        state, added = carry
        now = online_hyper(args, hyper, added)
        key, act_key, reset_key, learn_key = jax.random.split(state.key, 4)
        obs = state.env_state.obs
        action = act(static.nets, state.agent.actor.params, obs, act_key)
        env_state, reached = envs.step_all(static.env, state.env_state, action, reset_key)
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = n_step.insert(state.ring, rows, added, reached.done, reached.info["broken"])
        slots = buffer.size(data) + added % buffer.size(ring) + jnp.arange(args.num_envs)
        tree = priorities.update(state.priorities, slots, state.newest)

        share = jnp.minimum(1, added / (args.importance_steps or args.online_steps))
        rise = share * (now.final_importance_exponent - now.importance_exponent)
        added, beta = added + args.num_envs, now.importance_exponent + rise
        one = partial(learn, static, now, data, ring, added, beta)
        alone = state.replace(priorities=tree, env_state=None, ring=None, key=key)
        learnt, metrics = jax.lax.scan(one, alone, jax.random.split(learn_key, num_updates))
        state = learnt.replace(env_state=env_state, ring=ring)
        return (state, added), jax.tree.map(jnp.mean, metrics) | envs.tally(reached)

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


# as in iql.py
def make_plan(args: Args) -> list[Phase]:
    """Pre-training, then fine-tuning."""
    return [Phase("offline", 0, args.offline_steps), Phase("online", 0, args.online_steps, acts=True)]


# as in iql.py
def make_nets(session: Session) -> Nets:
    """The networks."""
    args = session.args
    return Nets(
        Actor(args.hidden, session.action_size, args.dropout), Critic(args.hidden), Value(args.hidden)
    )


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("per_iql", args, make_plan)
    args, offline, hyper = session.args, session.offline, session.scaled_to(session.args.return_range)
    if args.online_steps:
        n_step.check_order(session.card, args.n_steps)
    nets, functions = make_nets(session), (init_state, pretrain_chunk, finetune_chunk)
    initialise, pretrain, finetune = session.compile(session.static(nets), *functions)
    state = session.begin(initialise(offline, session.keys), partial(act, nets))

    for chunk in session.chunks():
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, chunk.start, length=chunk.iterations)
        else:
            given = hyper, offline, session.truncation, chunk.collected
            state, metrics = finetune(state, *given, length=chunk.iterations)
        session.after(chunk, metrics, state)

    return session.conclude(state, export, {"policy": state.agent})


# IQL's settings by environment family; those of the point mass are ours.
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), expectile=0.9, temperature=3, actor_lr=1e-3, critic_lr=1e-3, value_lr=1e-3,
        target_rate=0.02, offline_steps=6_000, online_steps=960_000, num_envs=48, utd_ratio=1 / 48),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    "probe": dict(
        hidden=(32, 32), discount=0.9, expectile=0.98, temperature=20, actor_lr=3e-3, critic_lr=3e-3,
        value_lr=3e-3, target_rate=0.05, actor_decay="none", offline_steps=0, online_steps=3_000,
        importance_steps=1_600),
    ("halfcheetah", "hopper", "walker2d", "ant"): dict(return_range=1000),
    ("halfcheetah-sparse", "ant-sparse"): dict(return_range=0, offline_steps=0),
    "antmaze": dict(expectile=0.9, temperature=10, reward_bias=-1),
    "antmaze-large-goal-missing": dict(offline_steps=500_000),
    "maze2d": dict(expectile=0.9, temperature=3, reward_bias=-1, offline_steps=500_000),
    "kitchen": dict(expectile=0.7, temperature=0.5, dropout=0.1, reward_bias=-4, end_reward=4),
    ("hammer", "door", "pen", "relocate"): dict(expectile=0.7, temperature=0.5, dropout=0.1),
    ("door-binary", "pen-binary", "relocate-binary"): dict(
        expectile=0.8, temperature=3, offline_steps=25_000),
    "hammer-truncated-expert": dict(expectile=0.8, temperature=3, dropout=0, offline_steps=50_000),
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
