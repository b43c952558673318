"""QDagger on IQL: fine-tuning with a teacher that fades as it is reached (Agarwal et al., arXiv 2206.01626).

Offline this is IQL (iql.py). As the online phase begins, the policy becomes the teacher, which learns no
more. The student goes on from the same parameters (`--start warm`), or begins afresh. It acts, and learns by
IQL's losses with one more term for its policy: lambda * c * KL(teacher, student) in the states of the batch.
c says how far the student's return is below the teacher's, as a share of it, between 0 and 1. It is 1 at
first, and set anew at every evaluation (`--eval-every`). A student as good as its teacher is left alone; one
that gets worse is pulled back. `--schedule linear` lets c fall from 1 to 0 instead, whatever the returns.
Batches are online rows alone.

Departures. QDagger is made for DQN: its code (google-research/reincarnating_rl e9df46e) has softmax(Q / T) in
the place of both policies, and n-step returns. GDE's paper has it with continuous actions, and states only
lambda = 0.3. Our policies are Gaussian, so the KL divergence is exact. The code's share c is of the way from
the return of random actions, which it has in a table, to the teacher's; ours is of the size of the teacher's.
The code's c stays 0 once it is 0; ours may rise again. The code's first phase trains a new student on the
teacher's data; warm, the pre-trained agent takes its place.

    python algos/qdagger.py
    python algos/qdagger.py --env hopper --dataset ooo/hopper/medium-v0 --init-from RUN --offline-steps 0
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
from ooo_rl.data.runs.bounds import Bounds, Fraction, Layers, NonNegative, Size, Steps, With
from ooo_rl.data.runs.online_change import online_hyper, online_ratio
from ooo_rl.data.runs.session import Phase, Result, Session, Static, scan_mean, start_online
from ooo_rl.data.runs.settings import Experiment, Traced, launch
from ooo_rl.envs.rollout import rollout


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
    distill_weight: NonNegative = 0.3
    """lambda: the largest weight of the distance to the teacher; 0 is fine-tuning without one"""


@dataclass(frozen=True)
class Args(Experiment):
    """QDagger: train offline with IQL, then let that policy teach a student online."""

    eval_every: Steps = 10_000
    """steps of the phase between evaluations, at which the teacher's weight is set; 0: a quarter of each"""
    offline_ratio: Annotated[float, Bounds(at_most=1)] = 0.0
    """share of each online batch that comes from the offline rows; below 0: their share of all rows"""
    offline_steps: Steps = 1_000_000
    """gradient steps on the dataset"""
    online_steps: Steps = 250_000
    """environment steps of fine-tuning"""
    learning_starts: Steps = 2_500
    """of these, steps at the start that only fill the buffer, with no gradient steps"""
    start: Literal["warm", "cold"] = "warm"
    """the student begins with what was learnt offline, or afresh"""
    schedule: Literal["returns", "linear"] = "returns"
    """the teacher's weight goes by how far the student's return is below its own, or falls linearly to 0"""
    distill_until: Steps = 0
    """environment step from which on the teacher has no weight; 0: the last one"""
    teacher_episodes: Size = 100
    """episodes whose mean return is the teacher's"""
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


# as in ooo_iql.py
def critic_loss(params, nets, obs, action, target_q):
    """Squared Bellman error of both critics, summed over them: IQL, equation (6)."""
    q = nets.critic.apply(params, obs, action)
    return jnp.mean(jnp.sum((q - target_q) ** 2, axis=0))


def distillation_loss(params, nets, teacher, obs, key):
    """KL divergence of the student's Gaussian from the teacher's: QDagger's distillation loss, exact here."""
    mean, log_std = nets.actor.apply(params, obs, train=True, rngs={"dropout": key})
    goal, log_goal = nets.actor.apply(teacher, obs)
    spread = (jnp.exp(2 * log_goal) + (goal - mean) ** 2) / jnp.exp(2 * log_std)
    return jnp.mean(jnp.sum(log_std - log_goal + (spread - 1) / 2, axis=-1))


def update(
    nets: Nets, hyper: Hyper, agent: Agent, batch: Transition, key: jax.Array, teacher=None, weight=0.0
):
    """One gradient step of value, policy and critics: IQL's, but the policy also stays near the `teacher`.

    Without one this is IQL. `weight` [] is that of the distance.
    """
    q = nets.critic.apply(agent.target_critic, batch.obs, batch.action).min(axis=0)
    loss_v, value = agent.value.descend(value_loss, hyper.value_lr, nets, batch.obs, q, hyper.expectile)

    v, next_v = jnp.split(nets.value.apply(value.params, jnp.concatenate([batch.obs, batch.next_obs])), 2)
    adv, rows = q - v, (batch.obs, batch.action)

    def both_losses(params):
        imitation = actor_loss(params, nets, *rows, adv, hyper.temperature, key)
        if teacher is None:
            return imitation, {"actor_loss": imitation}
        distance = distillation_loss(params, nets, teacher, batch.obs, key)
        return imitation + weight * distance, {"actor_loss": imitation, "distillation_loss": distance}

    (_, losses), actor = agent.actor.descend(both_losses, hyper.actor_lr, has_aux=True)

    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = task_reward + hyper.discount * batch.discount * next_v
    loss_q, critic = agent.critic.descend(critic_loss, hyper.critic_lr, nets, *rows, target_q)
    target_critic = optax.incremental_update(critic.params, agent.target_critic, hyper.target_rate)

    metrics = {**losses, "value_loss": loss_v, "critic_loss": loss_q, "q": q.mean(), "adv": adv.mean()}
    return Agent(actor, critic, target_critic, value), metrics


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


def shortfall(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """How far the student's return [] is below the teacher's, as a share of its size, between 0 and 1."""
    return jnp.clip((teacher - student) / jnp.maximum(jnp.abs(teacher), 1e-6), 0.0, 1.0)


def weight_of_teacher(args: Args, hyper: Hyper, behind: jax.Array, steps: jax.Array) -> jax.Array:
    """The weight [] of the distance to the teacher after so many environment `steps` [].

    The student was `behind` [] by this share when it was last compared.
    """
    last = args.distill_until or args.online_steps
    share = behind if args.schedule == "returns" else 1 - steps / last
    return jnp.where(steps < last, hyper.distill_weight * share, 0.0)


@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    agent: Agent  # the student, once there is a teacher
    teacher: dict
    teacher_return: jax.Array  # []
    behind: jax.Array  # [] the student's shortfall, when it was last compared
    env_state: envs.State | None
    ring: Transition | None
    key: jax.Array


def init_state(static: Static, key: jax.Array) -> State:
    key, agent_key, env_key = jax.random.split(key, 3)
    env_state, ring = start_online(static, env_key)
    agent = init_agent(static.nets, static.example, agent_key)
    teacher = jax.tree.map(jnp.copy, agent.actor.params)
    return State(agent, teacher, jnp.float32(0), jnp.float32(1), env_state, ring, key)


def mean_return(static: Static, actor: dict, num_episodes: int, key: jax.Array) -> jax.Array:
    """The mean return [] of so many episodes of a policy, by its mean actions."""
    played = rollout(static.env, lambda obs: act(static.nets, actor, obs), key, num_episodes)
    return played["return"].mean()


def appoint(static: Static, state: State) -> State:
    """Before the first environment step: the policy becomes the teacher, and its return is measured."""
    teacher = jax.tree.map(jnp.copy, state.agent.actor.params)
    key, agent_key, play_key = jax.random.split(state.key, 3)
    cold = static.args.start == "cold"
    agent = init_agent(static.nets, static.example, agent_key) if cold else state.agent
    measured = mean_return(static, teacher, static.args.teacher_episodes, play_key)
    return state.replace(agent=agent, teacher=teacher, teacher_return=measured, key=key)


def compare(static: Static, state: State) -> State:
    """Plays `--eval-episodes` episodes of the student, and compares its return with the teacher's."""
    key, play_key = jax.random.split(state.key)
    student = mean_return(static, state.agent.actor.params, static.args.eval_episodes, play_key)
    return state.replace(behind=shortfall(student, state.teacher_return), key=key)


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


def finetune_chunk(static: Static, state: State, hyper: Hyper, offline, added, *, length: int, learns: bool):
    """`length` steps of all environments, gradient steps after each if it `learns` already.

    `added` [] online rows come before.
    """
    args, num_updates = static.args, round(static.args.num_envs * static.args.utd_ratio)
    teacher = state.teacher

    def step(carry):
        state, added = carry
        now = online_hyper(args, hyper, added)
        key, act_key, reset_key, learn_key = jax.random.split(state.key, 4)
        obs = state.env_state.obs
        action = act(static.nets, state.agent.actor.params, obs, act_key)
        env_state, reached = envs.step_all(static.env, state.env_state, action, reset_key)
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, rows, added, reached.info["broken"])
        weight = weight_of_teacher(args, now, state.behind, added)
        added = added + args.num_envs

        state = state.replace(env_state=env_state, ring=ring, key=key)
        if not learns:
            return (state, added), envs.tally(reached)
        sample_key, update_key = jax.random.split(learn_key)
        shape, keys = (num_updates, args.batch_size), jax.random.split(update_key, num_updates)
        batches = sample_batches(offline, ring, added, online_ratio(args, added), shape, sample_key)
        one_step = lambda agent, xs: update(static.nets, now, agent, *xs, teacher, weight)  # noqa: E731
        agent, metrics = jax.lax.scan(one_step, state.agent, (batches, keys))
        metrics = jax.tree.map(jnp.mean, metrics) | {"distill_weight": weight} | envs.tally(reached)
        return (state.replace(agent=agent), added), metrics

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


# as in awac.py
def make_plan(args: Args) -> list[Phase]:
    """Pre-training, then fine-tuning, which begins with steps that only fill the buffer."""
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
    session = Session("qdagger", args, make_plan)
    args, offline, hyper = session.args, session.offline, session.scaled_to(session.args.return_range)
    nets, functions = make_nets(session), (init_state, pretrain_chunk, appoint, finetune_chunk, compare)
    initialise, pretrain, begin, finetune, look = session.compile(session.static(nets), *functions)
    state = session.begin(initialise(session.keys), partial(act, nets))

    for chunk in session.chunks():
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, chunk.start, length=chunk.iterations)
        else:
            state = begin(state) if chunk.first else state
            how = {"length": chunk.iterations, "learns": chunk.learns}
            state, metrics = finetune(state, hyper, offline, chunk.collected, **how)
            if chunk.evaluate and args.schedule == "returns":
                state = look(state)
        session.after(chunk, metrics, state)

    teacher = {"teacher": state.teacher} if args.online_steps else {}
    return session.conclude(state, export, {"policy": state.agent, **teacher})


# IQL's settings by environment family; those of the point mass are ours.
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), expectile=0.9, temperature=3, actor_lr=1e-3, critic_lr=1e-3, value_lr=1e-3,
        target_rate=0.02, offline_steps=6_000, online_steps=960_000, num_envs=48, utd_ratio=1 / 48,
        learning_starts=4_800, eval_every=48_000),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    "probe": dict(
        hidden=(32, 32), discount=0.9, expectile=0.98, temperature=20, actor_lr=3e-3, critic_lr=3e-3,
        value_lr=3e-3, target_rate=0.05, actor_decay="none", offline_steps=0, online_steps=3_000,
        learning_starts=160, teacher_episodes=4),
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
