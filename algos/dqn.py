"""DQN and discrete CQL: Q-learning where actions are choices, offline and then online, RND's bonus if asked.

A network gives the values of all actions at once; the best of them is the policy. DQN (Mnih et al., Nature
518, 2015) fits Q(s, a) to r + discount * max Q_target(s', .). CQL (Kumar et al., arXiv 2006.04779) adds
alpha * (log sum exp Q(s, .) - Q(s, a)): actions outside the data get no larger values than those in the data.
There is one alpha for each phase, `--cql-weight` offline and `--online-cql-weight` online; with 0, CQL is
DQN. So CQL can be fine-tuned with its own loss, or as DQN from the same parameters (GDE's Figure 2).

Online, actions are epsilon-greedy. With `--intrinsic rnd` the reward grows by c times RND's error (random
network distillation, Burda et al., arXiv 1810.12894) at the next state, standardised in each batch.

Departures. From DQN: the target network follows slowly, the optimiser is Adam, the error is squared.
`--double` takes the best action of the network itself in the target (double DQN, arXiv 1509.06461). From the
code that fits GDE's toy maze (fuyw/jrlzoo, rnd/torch and cql/discrete), whose settings are those of the toy
maze here: environments act side by side (`--num-envs`), and networks begin orthogonal.

    python algos/dqn.py
    python algos/dqn.py --sweep online-cql-weight=0,3    # DQN and CQL, fine-tuned from the same parameters
"""

from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

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

    lr: NonNegative = 3e-4
    """learning rate offline"""
    online_lr: NonNegative = 3e-4
    """learning rate online"""
    target_rate: Fraction = 0.005
    """share of the network that goes into its target at each update"""
    cql_weight: NonNegative = 1.0
    """alpha offline, the weight of the conservative loss beside the Bellman error; 0: DQN"""
    online_cql_weight: NonNegative = 0.0
    """alpha online"""
    epsilon: Fraction = 0.1
    """share of random actions online"""
    intrinsic_coef: Annotated[NonNegative, With("intrinsic")] = 0.5
    """c: weight of RND's bonus"""
    rnd_lr: Annotated[NonNegative, With("intrinsic", "rnd")] = 1e-4
    """learning rate of RND's predictor"""


@dataclass(frozen=True)
class Args(Experiment):
    """DQN or discrete CQL: learn offline, and go on online."""

    actions: ClassVar[str] = "discrete"
    """the kind of actions; no setting"""
    offline_ratio: Annotated[float, Bounds(at_most=1)] = 0.0
    """share of each online batch that comes from the offline rows; below 0: their share of all rows"""
    learning_starts: Steps = 0
    """online steps before the first gradient step; a network that has learnt nothing acts at random there"""
    hidden: Layers = (256, 256)
    """units of the hidden layers of all networks"""
    double: bool = False
    """double DQN: the target's action is the best one of the network, not of its target"""
    intrinsic: Literal["rnd", "none"] = "none"
    """exploration bonus, in both phases: random network distillation, or none"""
    hyper: Hyper = Hyper()
    """traced settings, which --sweep can vary"""


class MLP(nn.Module):
    """Dense layers with ReLU between them, initialised orthogonally."""

    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for size in self.sizes[:-1]:
            x = nn.relu(nn.Dense(size, kernel_init=orthogonal(2**0.5))(x))
        return nn.Dense(self.sizes[-1], kernel_init=orthogonal(1.0))(x)


class QNetwork(nn.Module):
    """The values [..., A] of all actions."""

    hidden: tuple[int, ...]
    action_size: int

    @nn.compact
    def __call__(self, obs):
        return MLP((*self.hidden, self.action_size))(obs)


Nets = namedtuple("Nets", "actor rnd")  # modules; their parameters are in the state


@struct.dataclass
class Agent:
    """The Q network, whose best action is the policy, with its optimiser; and its slow copy."""

    actor: Learner
    target: dict


def init_agent(static: Static, key: jax.Array) -> Agent:
    actor = Learner.create(static.nets.actor.init(key, static.example.obs[None]))
    return Agent(actor, jax.tree.map(jnp.copy, actor.params))


@struct.dataclass
class RND:
    """Random network distillation: a predictor learns a fixed random network, and errs on what is new."""

    predictor: Learner
    target: dict


def init_rnd(static: Static, key: jax.Array) -> RND:
    predictor, target = (static.nets.rnd.init(k, static.example.obs[None]) for k in jax.random.split(key))
    return RND(Learner.create(predictor), target)


def rnd_errors(params, nets, rnd, obs):
    """Squared error of the predictor [B], summed over its outputs."""
    return jnp.sum((nets.rnd.apply(params, obs) - nets.rnd.apply(rnd.target, obs)) ** 2, axis=-1)


def of_action(q: jax.Array, action: jax.Array) -> jax.Array:
    """From the values of all actions [..., A] that of one `action` [...] each."""
    return jnp.take_along_axis(q, action[..., None], axis=-1)[..., 0]


def bellman_loss(params, nets, obs, action, target_q):
    """Squared Bellman error: DQN, equation (2) of arXiv 1312.5602."""
    return jnp.mean((of_action(nets.actor.apply(params, obs), action) - target_q) ** 2)


def conservative_loss(params, nets, obs, action):
    """Soft maximum of Q over all actions, less Q of the data's: CQL, equation (4)."""
    q = nets.actor.apply(params, obs)
    return jnp.mean(jax.nn.logsumexp(q, axis=-1) - of_action(q, action))


def update(static: Static, hyper: Hyper, agent: Agent, batch: Transition, bonus: jax.Array):
    """One gradient step on rows with a `bonus` [B] to the scaled reward."""
    nets, rows = static.nets, (batch.obs, batch.action)
    next_q = nets.actor.apply(agent.target, batch.next_obs)
    chooser = nets.actor.apply(agent.actor.params, batch.next_obs) if static.args.double else next_q
    next_v = of_action(next_q, chooser.argmax(axis=-1))
    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = task_reward + bonus + hyper.discount * batch.discount * next_v

    def both_losses(params):
        bellman, diff = bellman_loss(params, nets, *rows, target_q), conservative_loss(params, nets, *rows)
        return bellman + hyper.cql_weight * diff, (bellman, diff)

    (_, (bellman, diff)), actor = agent.actor.descend(both_losses, hyper.lr, has_aux=True)
    target = optax.incremental_update(actor.params, agent.target, hyper.target_rate)
    return Agent(actor, target), {"bellman_loss": bellman, "conservative_loss": diff, "q": target_q.mean()}


def learn(static: Static, hyper: Hyper, learners: tuple, batch: Transition):
    """A gradient step of the agent on reward and bonus, then one of RND's predictor.

    `learners` are (agent, RND); without the bonus RND is ().
    """
    agent, rnd = learners
    if static.args.intrinsic == "none":
        agent, metrics = update(static, hyper, agent, batch, jnp.zeros(batch.reward.shape))
        return (agent, rnd), metrics
    loss = lambda params: rnd_errors(params, static.nets, rnd, batch.next_obs).mean()  # noqa: E731
    error = rnd_errors(rnd.predictor.params, static.nets, rnd, batch.next_obs)
    bonus = hyper.intrinsic_coef * (error - error.mean()) / (error.std() + 1e-6)
    agent, metrics = update(static, hyper, agent, batch, bonus)
    _, predictor = rnd.predictor.descend(loss, hyper.rnd_lr)
    return (agent, rnd.replace(predictor=predictor)), metrics | {"rnd_error": error.mean()}


def act(nets: Nets, actor: dict, obs: jax.Array) -> jax.Array:
    """The best actions [...] for observations [..., obs], as numbers."""
    return nets.actor.apply(actor, obs).argmax(axis=-1)


def explore(static: Static, actor: dict, obs: jax.Array, epsilon: jax.Array, key: jax.Array) -> jax.Array:
    """Actions for observations [n, obs]: each random with probability `epsilon`, else the best."""
    coin_key, action_key = jax.random.split(key)
    random = envs.random_actions(static.env, action_key, obs.shape[:-1])
    is_random = jax.random.uniform(coin_key, random.shape) < epsilon
    return jnp.where(is_random, random, act(static.nets, actor, obs))


def export(actor: dict) -> policy.Policy:
    """The policy as a file that NumPy can run."""
    return policy.mlp(actor["params"]["MLP_0"], output="argmax")


@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    agent: Agent
    rnd: RND | tuple
    env_state: envs.State | None
    ring: Transition | None
    key: jax.Array


def init_state(static: Static, key: jax.Array) -> State:
    key, agent_key, rnd_key, env_key = jax.random.split(key, 4)
    env_state, ring = start_online(static, env_key)
    rnd = init_rnd(static, rnd_key) if static.args.intrinsic == "rnd" else ()
    return State(init_agent(static, agent_key), rnd, env_state, ring, key)


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


def pretrain_chunk(static: Static, state: State, hyper: Hyper, offline: Transition, *, length: int):
    """`length` gradient steps on the offline rows."""

    def step(state):
        key, sample_key = jax.random.split(state.key)
        batch = sample_batches(offline, None, 0, 1.0, (static.args.batch_size,), sample_key)
        (agent, rnd), metrics = learn(static, hyper, (state.agent, state.rnd), batch)
        return state.replace(agent=agent, rnd=rnd, key=key), metrics

    return scan_mean(step, state, length)


def finetune_chunk(static: Static, state: State, hyper: Hyper, offline, added, *, length: int, learns: bool):
    """`length` steps of all environments, gradient steps after each if it `learns`.

    `added` [] online rows come before.
    """
    args, num_updates = static.args, round(static.args.num_envs * static.args.utd_ratio)
    hyper = hyper.replace(lr=hyper.online_lr, cql_weight=hyper.online_cql_weight)
    has_learnt = learns or args.offline_steps or args.init_from

    def step(carry):
        state, added = carry
        now = online_hyper(args, hyper, added)
        epsilon = now.epsilon if has_learnt else 1.0
        key, act_key, reset_key, sample_key = jax.random.split(state.key, 4)
        obs = state.env_state.obs
        action = explore(static, state.agent.actor.params, obs, epsilon, act_key)
        env_state, reached = envs.step_all(static.env, state.env_state, action, reset_key)
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, rows, added, reached.info["broken"])
        added = added + args.num_envs

        state = state.replace(env_state=env_state, ring=ring, key=key)
        if not learns:
            return (state, added), envs.tally(reached)
        shape = num_updates, args.batch_size
        batches = sample_batches(offline, ring, added, online_ratio(args, added), shape, sample_key)
        learners = state.agent, state.rnd
        (agent, rnd), metrics = jax.lax.scan(partial(learn, static, now), learners, batches)
        metrics = jax.tree.map(jnp.mean, metrics) | envs.tally(reached)
        return (state.replace(agent=agent, rnd=rnd), added), metrics

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


# as in pex.py
def make_plan(args: Args) -> list[Phase]:
    """Pre-training, then fine-tuning, which begins without learning."""
    online = Phase("online", 0, args.online_steps, acts=True, idle=args.learning_starts)
    return [Phase("offline", 0, args.offline_steps), online]


def make_nets(session: Session) -> Nets:
    """The networks. RND's have as many outputs as there are actions, as in the code of the toy maze."""
    hidden, num_actions = session.args.hidden, session.action_size
    return Nets(QNetwork(hidden, num_actions), MLP((*hidden, num_actions)))


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("dqn", args, make_plan)
    args, offline, hyper = session.args, session.offline, session.hyper
    nets, functions = make_nets(session), (init_state, pretrain_chunk, finetune_chunk)
    initialise, pretrain, finetune = session.compile(session.static(nets), *functions)
    state = session.begin(initialise(session.keys), partial(act, nets))

    for chunk in session.chunks():
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, length=chunk.iterations)
        else:
            how = {"length": chunk.iterations, "learns": chunk.learns}
            state, metrics = finetune(state, hyper, offline, chunk.collected, **how)
        session.after(chunk, metrics, state)

    return session.conclude(state, export, {"policy": state.agent})


# The toy maze's settings are those of the code that fits GDE's; --online-lr 3e-4 suits DQN from scratch.
FAMILIES = {
    "toy-maze": dict(
        hidden=(64, 64), cql_weight=3, online_cql_weight=3, online_lr=1e-4, epsilon=0.2,
        offline_steps=100_000, online_steps=100_000, learning_starts=5_000),
    "probe": dict(
        hidden=(32, 32), discount=0.9, lr=3e-3, online_lr=3e-3, target_rate=0.05, epsilon=0.5,
        cql_weight=0.01, offline_steps=0, online_steps=3_000, learning_starts=160),
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
