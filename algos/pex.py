"""PEX: policy expansion on IQL; online, a new policy joins the offline one (Zhang et al., arXiv 2302.00935).

Offline this is IQL (iql.py). As the online phase begins, the policy is frozen, and a new one with random
parameters is added to it; critics and value function go on. At each step both propose an action, the frozen
policy its mean and the new one a sample. One of the two is drawn, with the probabilities
softmax(inverse_temperature * min Q). So what was learnt offline is never lost, only left behind where
something better is known. Value and critics learn as IQL's, from batches that are half offline, half online
rows. The new policy imitates the actions that the two would choose now in the batch's states, weighted by
exp(temperature * advantage). Actions are stored, scored and imitated as they were drawn; only the environment
gets them clipped. A run that acts online saves the two policies and the composite of them, which
needs the critics to choose and so is no MLP.

Departures from the official code (Haichao-Zhang/PEX): evaluation takes the better of both policies' means by
min Q; there each of its two choices is random one time in ten. Gradient steps are taken in IQL's order, the
policy's with fresh V; there it comes last, with fresh targets. Adam's states of critics and V are kept.
Batches may also be uniform over all rows (`--offline-ratio -1`). An unofficial code (fuyw/jrlzoo) trains the
new policy on the batch's own actions, as IQL does: `--policy-actions buffer`. The default is the official
way, since PEX's published numbers come from it.

    python algos/pex.py
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
from ooo_rl.data.learner import Learner, orthogonal
from ooo_rl.data.runs.bounds import Bounds, Fraction, Layers, NonNegative, Steps, With
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
    value_lr: NonNegative = 3e-4
    """learning rate of the value function"""
    target_rate: Fraction = 0.005
    """share of the critics that goes into their targets at each update"""
    expectile: Annotated[float, Bounds(above=0, below=1)] = 0.7
    """expectile of the value regression: 0.5 is the mean, towards 1 the maximum over the data's actions"""
    temperature: NonNegative = 3.0
    """beta: how sharply the policy prefers advantageous actions; 0 is behaviour cloning"""
    inverse_temperature: NonNegative = 10.0
    """how sharply the choice between the two policies' actions prefers the higher Q; 0 tosses a coin"""


@dataclass(frozen=True)
class Args(Experiment):
    """PEX: train offline with IQL, then add a policy and train it online."""

    offline_ratio: Annotated[float, Bounds(at_most=1)] = 0.5
    """share of each online batch that comes from the offline rows; below 0: their share of all rows"""
    offline_steps: Steps = 1_000_000
    """gradient steps on the dataset"""
    online_steps: Steps = 1_000_000
    """environment steps of fine-tuning"""
    learning_starts: Steps = 5_000
    """of these, steps at the start that only fill the buffer, with no gradient steps"""
    return_range: Annotated[NonNegative, With("dataset")] = 0.0
    """scale rewards so that the dataset's returns span this much (IQL: 1000 in locomotion); 0: do not"""
    hidden: Layers = (256, 256)
    """units of the hidden layers of all networks"""
    actor_decay: Literal["auto", "none", "cosine"] = "cosine"
    """schedule of the policy's learning rate over offline steps; auto: cosine to 0 without online steps"""
    dropout: Annotated[float, Bounds(at_least=0, below=1)] = 0.0
    """dropout rate in the policy's hidden layers"""
    policy_actions: Literal["composite", "buffer"] = "composite"
    """what the new policy imitates: the composite policy's actions in a batch's states, or the batch's own"""
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


# as in ooo_iql.py
def critic_loss(params, nets, obs, action, target_q):
    """Squared Bellman error of both critics, summed over them: IQL, equation (6)."""
    q = nets.critic.apply(params, obs, action)
    return jnp.mean(jnp.sum((q - target_q) ** 2, axis=0))


# as in iql.py
def update(nets: Nets, hyper: Hyper, agent: Agent, batch: Transition, key: jax.Array):
    """One gradient step of value, policy and critics, in the order of the official code."""
    q = nets.critic.apply(agent.target_critic, batch.obs, batch.action).min(axis=0)
    loss_v, value = agent.value.descend(value_loss, hyper.value_lr, nets, batch.obs, q, hyper.expectile)

    v, next_v = jnp.split(nets.value.apply(value.params, jnp.concatenate([batch.obs, batch.next_obs])), 2)
    adv, rows = q - v, (batch.obs, batch.action)
    loss_a, actor = agent.actor.descend(actor_loss, hyper.actor_lr, nets, *rows, adv, hyper.temperature, key)

    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = task_reward + hyper.discount * batch.discount * next_v
    loss_q, critic = agent.critic.descend(critic_loss, hyper.critic_lr, nets, *rows, target_q)
    target_critic = optax.incremental_update(critic.params, agent.target_critic, hyper.target_rate)

    losses = {"value_loss": loss_v, "actor_loss": loss_a, "critic_loss": loss_q}
    return Agent(actor, critic, target_critic, value), {**losses, "q": q.mean(), "adv": adv.mean()}


def act(nets: Nets, actor: dict, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Actions [..., A] for observations [..., obs]: the mean without a key; with one, a sample, not clipped.

    A policy that imitates clipped samples of its own loses its standard deviation.
    """
    mean, log_std = nets.actor.apply(actor, obs)
    return mean if key is None else mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)


@struct.dataclass
class Composite:
    """Parameters of the two policies, and what chooses between them."""

    frozen: dict
    new: dict
    critic: dict
    inverse_temperature: jax.Array


def choose(nets: Nets, composite: Composite, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Actions [..., A] of the composite policy for observations [..., obs]: one of two candidates each, by Q.

    With a key: the frozen policy's mean or a sample of the new one, drawn by a softmax. Without one: the
    better of both means.
    """
    new_key, choice_key = (None, None) if key is None else jax.random.split(key)
    candidates = jnp.stack([act(nets, composite.frozen, obs), act(nets, composite.new, obs, new_key)])
    q = jax.vmap(lambda action: nets.critic.apply(composite.critic, obs, action).min(axis=0))(candidates)
    logits = composite.inverse_temperature * q
    chosen = q.argmax(axis=0) if key is None else jax.random.categorical(choice_key, logits, axis=0)
    return jnp.where(chosen[..., None] == 0, *candidates)


def compose(frozen: dict, agent: Agent, hyper: Hyper) -> Composite:
    """The composite policy of the frozen policy and an agent, whose policy is the new one."""
    return Composite(frozen, agent.actor.params, agent.critic.params, hyper.inverse_temperature)


def export(static: Static, actor: dict | Composite) -> policy.Policy:
    """A policy as a file: each of the two is an MLP that NumPy can run; the composite one needs JAX."""
    if isinstance(actor, Composite):
        clipped = lambda *given: jnp.clip(choose(static.nets, *given), -1.0, 1.0)  # noqa: E731
        return policy.jax_function(clipped, actor, static.example.obs.size)
    log_std = jnp.clip(actor["params"]["log_std"], -5.0, 2.0)
    return policy.mlp(actor["params"]["MLP_0"], output="tanh_mean", log_std=log_std)


def expanded_update(
    static: Static, hyper: Hyper, agent: Agent, frozen: dict, batch: Transition, key: jax.Array
):
    """An online gradient step: `update`, but the policy learns from what the composite policy chooses now."""
    nets = static.nets
    learnt, metrics = update(nets, hyper, agent, batch, key)
    if static.args.policy_actions == "buffer":
        return learnt, metrics
    choice_key, dropout_key = jax.random.split(key)
    action = choose(nets, compose(frozen, agent, hyper), batch.obs, choice_key)
    q = nets.critic.apply(agent.target_critic, batch.obs, action).min(axis=0)
    adv = q - nets.value.apply(learnt.value.params, batch.obs)
    given = nets, batch.obs, action, adv, hyper.temperature, dropout_key
    loss_a, actor = agent.actor.descend(actor_loss, hyper.actor_lr, *given)
    return learnt.replace(actor=actor), {**metrics, "actor_loss": loss_a, "adv": adv.mean()}


@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    agent: Agent
    frozen: dict
    env_state: envs.State | None
    ring: Transition | None
    key: jax.Array


def init_state(static: Static, key: jax.Array) -> State:
    key, agent_key, env_key = jax.random.split(key, 3)
    env_state, ring = start_online(static, env_key)
    agent = init_agent(static.nets, static.example, agent_key)
    return State(agent, jax.tree.map(jnp.copy, agent.actor.params), env_state, ring, key)


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


# as in iql.py
def pretrain_chunk(static: Static, state: State, hyper: Hyper, offline: Transition, before, *, length: int):
    """`length` gradient steps on the offline rows; `before` [] of the phase precede them."""
    args, inherited = static.args, state.agent.actor.opt.count - before  # steps of the --init-from run
    decays = args.actor_decay == "cosine" or (args.actor_decay == "auto" and not args.online_steps)

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        index = jax.random.randint(sample_key, (args.batch_size,), 0, buffer.size(offline))
        batch, steps = buffer.take(offline, None, index), state.agent.actor.opt.count - inherited
        rate = 0.5 + 0.5 * jnp.cos(jnp.pi * steps / args.offline_steps) if decays else 1.0
        decayed = hyper.replace(actor_lr=rate * hyper.actor_lr)
        agent, metrics = update(static.nets, decayed, state.agent, batch, update_key)
        return state.replace(agent=agent, key=key), metrics

    return scan_mean(step, state, length)


def expand(static: Static, state: State) -> State:
    """Before the online phase: the policy so far is frozen, and a random one takes its place in the agent."""
    key, new_key = jax.random.split(state.key)
    fresh = init_agent(static.nets, static.example, new_key)
    agent = state.agent.replace(actor=fresh.actor)
    return state.replace(agent=agent, frozen=state.agent.actor.params, key=key)


def finetune_chunk(static: Static, state: State, hyper: Hyper, offline, added, *, length: int, learns: bool):
    """`length` steps of all environments, gradient steps after each if it `learns` already.

    `added` [] online rows come before.
    """
    args, num_updates = static.args, round(static.args.num_envs * static.args.utd_ratio)

    def step(carry):
        state, added = carry
        now = online_hyper(args, hyper, added)
        key, act_key, reset_key, learn_key = jax.random.split(state.key, 4)
        obs, frozen = state.env_state.obs, state.frozen
        action = choose(static.nets, compose(frozen, state.agent, now), obs, act_key)
        clipped = jnp.clip(action, -1.0, 1.0)  # for the environment alone
        env_state, reached = envs.step_all(static.env, state.env_state, clipped, reset_key)
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, rows, added, reached.info["broken"])
        added = added + args.num_envs

        state = state.replace(env_state=env_state, ring=ring, key=key)
        if not learns:
            return (state, added), envs.tally(reached)
        sample_key, update_key = jax.random.split(learn_key)
        shape, keys = (num_updates, args.batch_size), jax.random.split(update_key, num_updates)
        batches = sample_batches(offline, ring, added, online_ratio(args, added), shape, sample_key)
        one_step = lambda agent, xs: expanded_update(static, now, agent, frozen, *xs)  # noqa: E731
        agent, metrics = jax.lax.scan(one_step, state.agent, (batches, keys))
        metrics = jax.tree.map(jnp.mean, metrics) | envs.tally(reached)
        return (state.replace(agent=agent), added), metrics

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


def make_plan(args: Args) -> list[Phase]:
    """Pre-training, then fine-tuning, which begins without learning."""
    online = Phase("online", 0, args.online_steps, acts=True, idle=args.learning_starts)
    return [Phase("offline", 0, args.offline_steps), online]


# as in iql.py
def make_nets(session: Session) -> Nets:
    """The networks."""
    args = session.args
    return Nets(
        Actor(args.hidden, session.action_size, args.dropout), Critic(args.hidden), Value(args.hidden)
    )


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("pex", args, make_plan)
    args, offline, hyper = session.args, session.offline, session.scaled_to(session.args.return_range)
    static = session.static(make_nets(session))
    functions = init_state, pretrain_chunk, expand, finetune_chunk
    initialise, pretrain, add_policy, finetune = session.compile(static, *functions)
    state = session.begin(initialise(session.keys), partial(choose, static.nets))

    for chunk in session.chunks():
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, chunk.start, length=chunk.iterations)
        else:
            state = add_policy(state) if chunk.first else state
            how = {"length": chunk.iterations, "learns": chunk.learns}
            state, metrics = finetune(state, hyper, offline, chunk.collected, **how)
        # Offline both policies are one, so that the same program evaluates IQL.
        frozen = state.agent.actor.params if chunk.phase == "offline" else state.frozen
        now = online_hyper(args, hyper, chunk.start + chunk.length) if chunk.acts else hyper
        session.after(chunk, metrics, state, actor=compose(frozen, state.agent, now))

    composite = compose(state.frozen, state.agent, online_hyper(args, hyper, args.online_steps))
    policies = {"policy": composite, "frozen": state.frozen, "new": state.agent}
    return session.conclude(
        state, partial(export, static), policies if args.online_steps else {"policy": state.agent}
    )


# PEX's code in locomotion and AntMaze; elsewhere IQL's in OOO's Table 4; those of the point mass are ours.
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), expectile=0.9, temperature=3, actor_lr=1e-3, critic_lr=1e-3, value_lr=1e-3,
        target_rate=0.02, offline_steps=6_000, online_steps=960_000, num_envs=48, utd_ratio=1 / 48,
        learning_starts=4_800),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    "probe": dict(
        hidden=(32, 32), discount=0.9, expectile=0.98, temperature=20, actor_lr=3e-3, critic_lr=3e-3,
        value_lr=3e-3, target_rate=0.05, actor_decay="none", offline_steps=0, online_steps=3_000,
        learning_starts=160),
    ("halfcheetah", "hopper", "walker2d", "ant"): dict(expectile=0.9, temperature=10),
    ("halfcheetah-sparse", "ant-sparse"): dict(offline_steps=0),
    "antmaze": dict(expectile=0.9, temperature=10, reward_bias=-1),
    "antmaze-large-goal-missing": dict(offline_steps=500_000, online_steps=1_500_000),
    "maze2d": dict(
        expectile=0.9, temperature=3, reward_bias=-1, offline_steps=500_000, online_steps=500_000),
    "kitchen": dict(
        expectile=0.7, temperature=0.5, dropout=0.1, reward_bias=-4, end_reward=4, online_steps=4_000_000),
    ("hammer", "door", "pen", "relocate"): dict(expectile=0.7, temperature=0.5, dropout=0.1),
    ("door-binary", "pen-binary", "relocate-binary"): dict(
        expectile=0.8, temperature=3, offline_steps=25_000),
    "hammer-truncated-expert": dict(
        expectile=0.8, temperature=3, dropout=0, offline_steps=50_000, online_steps=500_000),
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
