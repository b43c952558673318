"""O3F on IQL: fine-tuning with optimistic action selection (Mark et al., 2022).

Offline this is IQL (iql.py) with five critics. Online nothing changes but the choice of actions. The policy
proposes an action a. N candidates are drawn around it, each a + N(0, sigma^2). The agent plays the one whose
mean Q over the critics, plus omega times their standard deviation, is highest. So it tries actions that the
critics value more than the policy's, and what follows corrects the critics. The losses are those of the
offline phase, on offline and online rows in one buffer. Evaluation plays the policy alone.

- `--candidates 1` is the paper's baseline of noise: a + N(0, sigma^2), and nothing is ranked.
- `--candidate-std 0` is the fine-tuning of IQL, with five critics.

Departures. There is no official code. The paper says that IQL has five critics, not how they become one
value: as in IQL it is the least of them all. Ranking asks the critics, not their slow copies. Candidates are
clipped to [-1, 1] before they are ranked, so that the action ranked is the action played. Evaluation is not
described, nor the number of environment steps; both are IQL's.

    python algos/o3f_iql.py
    python algos/o3f_iql.py --env hopper --dataset ooo/hopper/medium-v0 --sweep omega=0,1
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
from ooo_rl.data.runs.bounds import Bounds, Fraction, Layers, NonNegative, Number, Size, Steps, With
from ooo_rl.data.runs.online_change import online_hyper
from ooo_rl.data.runs.session import Phase, Result, Session, Static, scan_mean, start_online
from ooo_rl.data.runs.settings import Experiment, Traced, launch


@struct.dataclass
class Hyper(Traced):
    """Settings that are traced, not compiled in: one value per run, so each can be swept in one program."""

    actor_lr: NonNegative = 3e-4
    """learning rate of the policy"""
    critic_lr: NonNegative = 3e-4
    """learning rate of the critics"""
    value_lr: NonNegative = 3e-4
    """learning rate of the value function"""
    target_rate: Fraction = 0.005
    """share of the critics that goes into their targets at each update"""
    expectile: Annotated[float, Bounds(above=0, below=1)] = 0.7
    """expectile of the value regression: 0.5 is the mean, towards 1 the maximum over the data's actions"""
    temperature: NonNegative = 3.0
    """beta: how sharply the policy prefers advantageous actions; 0 is behaviour cloning"""
    candidate_std: Annotated[NonNegative, With("online_steps")] = 0.05
    """sigma: standard deviation of the candidates around the policy's action"""
    omega: Annotated[Number, With("online_steps")] = 0.0
    """weight of the critics' standard deviation beside their mean, when candidates are ranked"""


@dataclass(frozen=True)
class Args(Experiment):
    """O3F on IQL: train offline, then fine-tune online with optimistic actions."""

    offline_steps: Steps = 1_000_000
    """gradient steps on the dataset"""
    online_steps: Steps = 1_000_000
    """environment steps of fine-tuning"""
    ensemble: Size = 5
    """critics"""
    candidates: Size = 100
    """N: actions that are ranked at each environment step; 1: noise without ranking"""
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


class Critic(nn.Module):
    """`num` independent Q functions: [num, ...]."""

    hidden: tuple[int, ...]
    num: int

    @nn.compact
    def __call__(self, obs, action):
        ensemble = nn.vmap(MLP, {"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=self.num)
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


def critic_loss(params, nets, obs, action, target_q):
    """Squared Bellman error, summed over the critics: IQL, equation (6)."""
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


def draw_candidates(action: jax.Array, num: int, std: jax.Array, key: jax.Array) -> jax.Array:
    """`num` actions [num, E, A] around each `action` [E, A], normally distributed, then clipped."""
    return jnp.clip(action + std * jax.random.normal(key, (num, *action.shape)), -1.0, 1.0)


def choose(nets: Nets, critic: dict, obs: jax.Array, candidates: jax.Array, omega: jax.Array):
    """The best [E, A] of `candidates` [N, E, A] at `obs` [E, obs], by the critics' mean + omega * deviation.

    Also, how much the best is above the average candidate [].
    """
    q = nets.critic.apply(critic, jnp.broadcast_to(obs, (*candidates.shape[:2], obs.shape[-1])), candidates)
    score = q.mean(axis=0) + omega * q.std(axis=0)
    best = score.argmax(axis=0)[None, :, None]
    gain = jnp.mean(score.max(axis=0) - score.mean(axis=0))
    return jnp.take_along_axis(candidates, best, axis=0)[0], gain


# as in iql.py
@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    agent: Agent
    env_state: envs.State | None
    ring: Transition | None
    key: jax.Array


# as in iql.py
def init_state(static: Static, key: jax.Array) -> State:
    key, agent_key, env_key = jax.random.split(key, 3)
    env_state, ring = start_online(static, env_key)
    return State(init_agent(static.nets, static.example, agent_key), env_state, ring, key)


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


def finetune_chunk(static: Static, state: State, hyper: Hyper, offline, added, *, length: int):
    """`length` steps of all environments, gradient steps after each; `added` [] online rows come before."""
    args, num_updates = static.args, round(static.args.num_envs * static.args.utd_ratio)

    def step(carry):
        state, added = carry
        now = online_hyper(args, hyper, added)
        keys = jax.random.split(state.key, 6)
        key, act_key, candidate_key, reset_key, sample_key, update_key = keys
        obs, critic = state.env_state.obs, state.agent.critic.params
        proposed = act(static.nets, state.agent.actor.params, obs, act_key)
        candidates = draw_candidates(proposed, args.candidates, now.candidate_std, candidate_key)
        action, gain = choose(static.nets, critic, obs, candidates, now.omega)
        env_state, reached = envs.step_all(static.env, state.env_state, action, reset_key)
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, rows, added, reached.info["broken"])
        added = added + args.num_envs

        filled = buffer.size(offline) + jnp.minimum(added, buffer.size(ring))
        index = jax.random.randint(sample_key, (num_updates, args.batch_size), 0, filled)
        samples = buffer.take(offline, ring, index), jax.random.split(update_key, num_updates)
        learn = lambda agent, sample: update(static.nets, now, agent, *sample)  # noqa: E731
        agent, metrics = jax.lax.scan(learn, state.agent, samples)
        metrics = jax.tree.map(jnp.mean, metrics) | {"gain": gain} | envs.tally(reached)
        return (State(agent, env_state, ring, key), added), metrics

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


# as in iql.py
def make_plan(args: Args) -> list[Phase]:
    """Pre-training, then fine-tuning."""
    return [Phase("offline", 0, args.offline_steps), Phase("online", 0, args.online_steps, acts=True)]


def make_nets(session: Session) -> Nets:
    """The networks."""
    args = session.args
    actor = Actor(args.hidden, session.action_size, args.dropout)
    return Nets(actor, Critic(args.hidden, args.ensemble), Value(args.hidden))


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("o3f_iql", args, make_plan)
    args, offline, hyper = session.args, session.offline, session.scaled_to(session.args.return_range)
    nets, functions = make_nets(session), (init_state, pretrain_chunk, finetune_chunk)
    initialise, pretrain, finetune = session.compile(session.static(nets), *functions)
    state = session.begin(initialise(session.keys), partial(act, nets))

    for chunk in session.chunks():
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, chunk.start, length=chunk.iterations)
        else:
            state, metrics = finetune(state, hyper, offline, chunk.collected, length=chunk.iterations)
        session.after(chunk, metrics, state)

    return session.conclude(state, export, {"policy": state.agent})


# The settings of iql.py, with O3F's sigma: 0.2 in locomotion, 0.05 elsewhere. Those of the point mass: ours.
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), expectile=0.9, temperature=3, actor_lr=1e-3, critic_lr=1e-3, value_lr=1e-3,
        target_rate=0.02, offline_steps=6_000, online_steps=960_000, num_envs=48, utd_ratio=1 / 48),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    "probe": dict(
        hidden=(32, 32), discount=0.9, expectile=0.98, temperature=20, actor_lr=3e-3, critic_lr=3e-3,
        value_lr=3e-3, target_rate=0.05, actor_decay="none", offline_steps=0, online_steps=3_000),
    ("halfcheetah", "hopper", "walker2d", "ant"): dict(return_range=1000, candidate_std=0.2),
    ("halfcheetah-sparse", "ant-sparse"): dict(return_range=0, offline_steps=0),
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
