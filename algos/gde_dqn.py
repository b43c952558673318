"""GDE on discrete CQL: one network explores, one exploits, the best one so far is the teacher.

"Guided decoupled exploration for offline RL fine-tuning", where actions are choices. Offline this is the CQL
of dqn.py. As the online phase begins, there are three copies of the network that was learnt:

- the explorer acts, epsilon-greedily, and learns as DQN: no conservative loss keeps it where the data were.
  It is held near the teacher by rho * KL(softmax(Q_teacher / T), softmax(Q / T)). rho falls linearly to 0.
- the exploiter goes on with CQL's loss, from what the explorer finds. It is evaluated and saved.
- the teacher learns nothing. Every `--trial-every` steps the exploiter plays `--trial-steps` steps from fresh
  starts, without epsilon, as it is at their first. Where its return is the best so far, what played becomes
  the teacher.

The steps of these trials count as online steps, and their rows are stored like all others. Only online rows
are learnt from.

Departures. The paper has an explorer that climbs Q, for continuous actions, and does not write down what it
does with discrete ones. Here the explorer has a Q of its own: there is no policy beside the values, and the
best action of a conservative Q is the exploiter's. The form of the divergence is QDagger's (Agarwal et al.,
arXiv 2206.01626), also for discrete actions.

    python algos/gde_dqn.py
    python algos/gde_dqn.py --init-from runs/dqn/toy-maze/mine --offline-steps 0
"""

import math
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from ooo_rl import envs
from ooo_rl.data import buffer, policy
from ooo_rl.data.buffer import Transition
from ooo_rl.data.learner import Learner, orthogonal
from ooo_rl.data.runs.bounds import Fraction, Layers, NonNegative, Positive, Size, Steps
from ooo_rl.data.runs.online_change import online_hyper
from ooo_rl.data.runs.session import Phase, Result, Session, Static, scan_mean, start_online
from ooo_rl.data.runs.settings import Experiment, Traced, UsageError, launch


@struct.dataclass
class Hyper(Traced):
    """Settings that are traced, not compiled in: one value per run, so each can be swept in one program."""

    lr: NonNegative = 3e-4
    """learning rate offline"""
    online_lr: NonNegative = 3e-4
    """learning rate online"""
    target_rate: Fraction = 0.005
    """share of a network that goes into its target at each update"""
    cql_weight: NonNegative = 1.0
    """alpha, offline and of the exploiter: weight of the conservative loss beside the Bellman error"""
    epsilon: Fraction = 0.1
    """share of random actions of the explorer"""
    rho: NonNegative = 0.3
    """weight of the explorer's divergence from the teacher at first; it falls linearly to 0"""
    temperature: Positive = 1.0
    """T of the softmax that makes policies of values, for the divergence"""


@dataclass(frozen=True)
class Args(Experiment):
    """GDE: learn offline with CQL, then let an explorer, an exploiter and a teacher share the work online."""

    actions: ClassVar[str] = "discrete"
    """the kind of actions; no setting"""
    learning_starts: Steps = 0
    """online steps before the first gradient step"""
    trial_every: Size = 10_000
    """environment steps from one trial of the exploiter to the next"""
    trial_steps: Size = 800
    """the first of these steps, which are the trial; only an episode of each environment counts"""
    hidden: Layers = (256, 256)
    """units of the hidden layers of all networks"""
    hyper: Hyper = Hyper()
    """traced settings, which --sweep can vary"""


# as in dqn.py
class MLP(nn.Module):
    """Dense layers with ReLU between them, initialised orthogonally."""

    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for size in self.sizes[:-1]:
            x = nn.relu(nn.Dense(size, kernel_init=orthogonal(2**0.5))(x))
        return nn.Dense(self.sizes[-1], kernel_init=orthogonal(1.0))(x)


# as in dqn.py
class QNetwork(nn.Module):
    """The values [..., A] of all actions."""

    hidden: tuple[int, ...]
    action_size: int

    @nn.compact
    def __call__(self, obs):
        return MLP((*self.hidden, self.action_size))(obs)


Nets = namedtuple("Nets", "actor")  # modules; their parameters are in the state


# as in dqn.py
@struct.dataclass
class Agent:
    """The Q network, whose best action is the policy, with its optimiser; and its slow copy."""

    actor: Learner
    target: dict


# as in dqn.py
def init_agent(static: Static, key: jax.Array) -> Agent:
    actor = Learner.create(static.nets.actor.init(key, static.example.obs[None]))
    return Agent(actor, jax.tree.map(jnp.copy, actor.params))


# as in dqn.py
def of_action(q: jax.Array, action: jax.Array) -> jax.Array:
    """From the values of all actions [..., A] that of one `action` [...] each."""
    return jnp.take_along_axis(q, action[..., None], axis=-1)[..., 0]


def target_of(nets: Nets, hyper: Hyper, target: dict, batch: Transition) -> jax.Array:
    """What Q of each row [B] is fitted to: the scaled reward, and the best value after it by `target`."""
    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    next_v = nets.actor.apply(target, batch.next_obs).max(axis=-1)
    return task_reward + hyper.discount * batch.discount * next_v


# as in dqn.py
def bellman_loss(params, nets, obs, action, target_q):
    """Squared Bellman error: DQN, equation (2) of arXiv 1312.5602."""
    return jnp.mean((of_action(nets.actor.apply(params, obs), action) - target_q) ** 2)


# as in dqn.py
def conservative_loss(params, nets, obs, action):
    """Soft maximum of Q over all actions, less Q of the data's: CQL, equation (4)."""
    q = nets.actor.apply(params, obs)
    return jnp.mean(jax.nn.logsumexp(q, axis=-1) - of_action(q, action))


def divergence(params, nets, teacher, obs, temperature):
    """KL(teacher, explorer), the mean over rows, of the policies softmax(Q / temperature)."""
    log_policy = lambda p: jax.nn.log_softmax(nets.actor.apply(p, obs) / temperature)  # noqa: E731
    guide, own = log_policy(teacher), log_policy(params)
    return jnp.mean(jnp.sum(jnp.exp(guide) * (guide - own), axis=-1))


def update(static: Static, hyper: Hyper, agent: Agent, batch: Transition):
    """One gradient step of CQL: offline, and of the exploiter."""
    nets, rows = static.nets, (batch.obs, batch.action)
    target_q = target_of(nets, hyper, agent.target, batch)

    def both_losses(params):
        bellman, diff = bellman_loss(params, nets, *rows, target_q), conservative_loss(params, nets, *rows)
        return bellman + hyper.cql_weight * diff, (bellman, diff)

    (_, (bellman, diff)), actor = agent.actor.descend(both_losses, hyper.lr, has_aux=True)
    target = optax.incremental_update(actor.params, agent.target, hyper.target_rate)
    return Agent(actor, target), {"bellman_loss": bellman, "conservative_loss": diff, "q": target_q.mean()}


def update_explorer(static: Static, hyper: Hyper, explorer: Agent, teacher: dict, rho, batch: Transition):
    """One gradient step of DQN, held near the teacher: GDE, equation (5), with Q-learning for -Q."""
    nets, target_q = static.nets, target_of(static.nets, hyper, explorer.target, batch)

    def both_losses(params):
        kl = divergence(params, nets, teacher, batch.obs, hyper.temperature)
        return bellman_loss(params, nets, batch.obs, batch.action, target_q) + rho * kl, kl

    (loss, kl), actor = explorer.actor.descend(both_losses, hyper.lr, has_aux=True)
    target = optax.incremental_update(actor.params, explorer.target, hyper.target_rate)
    return Agent(actor, target), {"explorer_loss": loss, "divergence": kl, "explorer_q": target_q.mean()}


# as in dqn.py
def act(nets: Nets, actor: dict, obs: jax.Array) -> jax.Array:
    """The best actions [...] for observations [..., obs], as numbers."""
    return nets.actor.apply(actor, obs).argmax(axis=-1)


# as in dqn.py
def explore(static: Static, actor: dict, obs: jax.Array, epsilon: jax.Array, key: jax.Array) -> jax.Array:
    """Actions for observations [n, obs]: each random with probability `epsilon`, else the best."""
    coin_key, action_key = jax.random.split(key)
    random = envs.random_actions(static.env, action_key, obs.shape[:-1])
    is_random = jax.random.uniform(coin_key, random.shape) < epsilon
    return jnp.where(is_random, random, act(static.nets, actor, obs))


# as in dqn.py
def export(actor: dict) -> policy.Policy:
    """The policy as a file that NumPy can run."""
    return policy.mlp(actor["params"]["MLP_0"], output="argmax")


@struct.dataclass
class Trial:
    """The tally of the trial under way, or of the last one."""

    counts: jax.Array  # [num_envs] whether the episode with which the trial began still goes on
    total: jax.Array  # [] sum of the rewards of these episodes
    best: jax.Array  # [] the largest `total` of a trial; -inf before the first


@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    agent: Agent  # the exploiter
    explorer: Agent
    teacher: dict
    tried: dict  # the exploiter as it was when the trial began, which plays it
    trial: Trial
    env_state: envs.State | None
    ring: Transition | None
    key: jax.Array


def decouple(static: Static, state: State) -> State:
    """Before the first environment step: explorer and teacher become copies of the network so far."""
    actor, *others = (jax.tree.map(jnp.copy, state.agent.actor.params) for _ in range(4))
    target, teacher, tried = others
    return state.replace(explorer=Agent(Learner.create(actor), target), teacher=teacher, tried=tried)


def init_state(static: Static, key: jax.Array) -> State:
    key, agent_key, env_key = jax.random.split(key, 3)
    env_state, ring = start_online(static, env_key)
    trial = Trial(jnp.zeros(static.args.num_envs, bool), jnp.float32(0), jnp.float32(-jnp.inf))
    agent = init_agent(static, agent_key)
    return decouple(static, State(agent, None, None, None, trial, env_state, ring, key))


# as in gde_iql.py
def lengths(args: Args) -> tuple[int, int]:
    """Steps of all environments at once: of a cycle, and of the trial with which it begins."""
    return math.ceil(args.trial_every / args.num_envs), math.ceil(args.trial_steps / args.num_envs)


def judge(static: Static, state: State, reached: envs.State, position) -> tuple[State, jax.Array]:
    """Counts the step at `position` [] of the cycle. After a trial, the best one so far is the teacher.

    Each environment's first episode counts. The second result [] tells whether there is a new teacher.
    """
    trial, begins = state.trial, position == 0
    counts = trial.counts | begins
    total = jnp.where(begins, 0.0, trial.total) + jnp.sum(reached.reward, where=counts)
    better = (position == lengths(static.args)[1] - 1) & (total > trial.best)
    trial = Trial(counts & (reached.done == 0), total, jnp.where(better, total, trial.best))
    teacher = jax.tree.map(partial(jnp.where, better), state.tried, state.teacher)
    return state.replace(teacher=teacher, trial=trial), better


def play(static: Static, hyper: Hyper, state: State, added) -> tuple[State, dict]:
    """One step of all environments, in a trial or not, and metrics; `added` [] online rows come before."""
    args, nets, (cycle, trial_length) = static.args, static.nets, lengths(static.args)
    position = added // args.num_envs % cycle
    key, start_key, act_key, reset_key = jax.random.split(state.key, 4)
    fresh = lambda: jax.vmap(static.env.reset)(jax.random.split(start_key, args.num_envs))  # noqa: E731
    env_state = jax.lax.cond(position == 0, fresh, lambda: state.env_state)
    tried = jax.tree.map(partial(jnp.where, position == 0), state.agent.actor.params, state.tried)

    obs, in_trial = env_state.obs, position < trial_length
    explored = explore(static, state.explorer.actor.params, obs, hyper.epsilon, act_key)
    action = jnp.where(in_trial, act(nets, tried, obs), explored)
    env_state, reached = envs.step_all(static.env, env_state, action, reset_key)
    rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
    ring = buffer.insert(state.ring, rows, added, reached.info["broken"])
    state = state.replace(tried=tried, env_state=env_state, ring=ring, key=key)
    state, new_teacher = judge(static, state, reached, position)
    metrics = {"in_trial": jnp.float32(in_trial), "new_teacher": jnp.float32(new_teacher)}
    return state, metrics | envs.tally(reached)


def pretrain_chunk(static: Static, state: State, hyper: Hyper, offline: Transition, *, length: int):
    """`length` gradient steps on the offline rows."""

    def step(state):
        key, sample_key = jax.random.split(state.key)
        index = jax.random.randint(sample_key, (static.args.batch_size,), 0, buffer.size(offline))
        agent, metrics = update(static, hyper, state.agent, buffer.take(offline, None, index))
        return state.replace(agent=agent, key=key), metrics

    return scan_mean(step, state, length)


def finetune_chunk(static: Static, state: State, hyper: Hyper, added, *, length: int, learns: bool):
    """`length` steps of all environments, gradient steps after each if it `learns`.

    `added` [] online rows come before.
    """
    args, num_updates = static.args, round(static.args.num_envs * static.args.utd_ratio)
    hyper = hyper.replace(lr=hyper.online_lr)

    def step(carry):
        state, added = carry
        now = online_hyper(args, hyper, added)
        rho = now.rho * (1 - added / args.online_steps)
        state, metrics = play(static, now, state, added)
        added = added + args.num_envs
        if not learns:
            return (state, added), metrics
        key, sample_key = jax.random.split(state.key)
        filled = jnp.minimum(added, buffer.size(state.ring))
        index = jax.random.randint(sample_key, (num_updates, args.batch_size), 0, filled)

        def learn(both, batch):
            agent, metrics = update(static, now, both[0], batch)
            explorer, more = update_explorer(static, now, both[1], state.teacher, rho, batch)
            return (agent, explorer), metrics | more

        both = state.agent, state.explorer
        (agent, explorer), learnt = jax.lax.scan(learn, both, buffer.take(None, state.ring, index))
        state = state.replace(agent=agent, explorer=explorer, key=key)
        return (state, added), jax.tree.map(jnp.mean, learnt) | metrics

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


# as in gde_iql.py
def make_plan(args: Args) -> list[Phase]:
    """Pre-training, then fine-tuning, which begins without learning."""
    cycle, trial = lengths(args)
    if args.online_steps and trial >= cycle:
        raise UsageError(
            f"--trial-steps {args.trial_steps} leaves nothing of --trial-every {args.trial_every} to the "
            f"explorer, with --num-envs {args.num_envs}; make trials shorter, or rarer"
        )
    online = Phase("online", 0, args.online_steps, acts=True, idle=args.learning_starts)
    return [Phase("offline", 0, args.offline_steps), online]


def make_nets(session: Session) -> Nets:
    """The network of all three."""
    return Nets(QNetwork(session.args.hidden, session.action_size))


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("gde_dqn", args, make_plan)
    args, offline, hyper = session.args, session.offline, session.hyper
    if args.online_steps and lengths(args)[1] != session.env.horizon:
        session.console.print(f"a trial has {lengths(args)[1]} steps, an episode {session.env.horizon}")
    nets, functions = make_nets(session), (init_state, pretrain_chunk, decouple, finetune_chunk)
    initialise, pretrain, begin, finetune = session.compile(session.static(nets), *functions)
    state = session.begin(initialise(session.keys), partial(act, nets))

    for chunk in session.chunks():
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, length=chunk.iterations)
        else:
            state = begin(state) if chunk.first else state
            how = {"length": chunk.iterations, "learns": chunk.learns}
            state, metrics = finetune(state, hyper, chunk.collected, **how)
        session.after(chunk, metrics, state)

    roles = {"explorer": state.explorer, "teacher": state.teacher} if args.online_steps else {}
    return session.conclude(state, export, {"policy": state.agent} | roles)


# As in dqn.py; ten trials of one episode in each environment, as many as the paper has in AntMaze.
FAMILIES = {
    "toy-maze": dict(
        hidden=(64, 64), cql_weight=3, online_lr=1e-4, epsilon=0.2, offline_steps=100_000,
        online_steps=100_000, learning_starts=5_000),
    "probe": dict(
        hidden=(32, 32), discount=0.9, lr=3e-3, online_lr=3e-3, target_rate=0.05, epsilon=0.5,
        cql_weight=0.01, offline_steps=0, online_steps=3_000, num_envs=8, learning_starts=160,
        trial_every=160, trial_steps=32),
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
