"""SAC: soft actor-critic, online, and SAC-ft, which fine-tunes what CQL learnt.

SAC (Haarnoja et al., arXiv 1812.05905) maximises reward and entropy together. It has three losses:

- Two critics are fitted to r + discount * (min Q(s', a') - alpha * log pi(a'|s')), a' drawn from the policy.
- The policy climbs min Q(s, a) - alpha * log pi(a|s), a drawn from it: the gradient runs through the noise.
- alpha, the weight of the entropy, is moved until the policy's entropy is what was asked for.

Nothing holds back the values of actions that no data show. So SAC alone is no offline method: it stands here
to be compared with. Its uses:

- SAC from scratch is the default, `--offline-steps 0`. With `--dataset` the buffer begins with those rows.
- SAC-ft is `--init-from runs/cql/<env>/<name>`, a run of cql.py or cal_ql.py. Policy, critics, their targets
  and alpha begin as they were there, and their optimisers go on.

Departures from the official code (rail-berkeley/softlearning) and from jaxrl's: environments act side by side
(`--num-envs`). The gradients of critics, policy and alpha are taken in this order, and each sees what the one
before has changed. Networks begin orthogonal, their last layers small, with standard deviations of 1/e before
the squashing, as in Cal-QL's code.

    python algos/sac.py --env maze2d-umaze-dense
"""

from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from ooo_rl import envs
from ooo_rl.data import buffer, policy
from ooo_rl.data.buffer import Transition
from ooo_rl.data.learner import Learner, orthogonal
from ooo_rl.data.runs.bounds import Bounds, Fraction, Layers, NonNegative, Number, Positive, Steps
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
    alpha_lr: NonNegative = 3e-4
    """learning rate of the entropy's weight alpha; 0 keeps --init-alpha"""
    target_rate: Fraction = 0.005
    """share of the critics that goes into their targets at each update"""
    entropy_per_action: Number = -1.0
    """entropy that alpha aims at, per dimension of the action: -1 in the paper, -0.5 in jaxrl and RLPD"""
    backup_entropy: NonNegative = 1.0
    """weight of the entropy in the critics' target: 1 is SAC, 0 leaves it out (CQL, Cal-QL)"""


@dataclass(frozen=True)
class Args(Experiment):
    """SAC: train online, from scratch or from a CQL agent."""

    offline_ratio: Annotated[float, Bounds(at_most=1)] = -1.0
    """share of each online batch that comes from the offline rows; below 0: their share of all rows"""
    offline_steps: Steps = 0
    """gradient steps on the dataset"""
    random_steps: Steps = 10_000
    """environment steps of uniformly random actions and no learning at the start"""
    hidden: Layers = (256, 256)
    """units of the policy's hidden layers"""
    critic_hidden: Layers = (256, 256)
    """units of the critics' hidden layers"""
    layer_norm: bool = False
    """LayerNorm in the critics' hidden layers"""
    init_alpha: Positive = 1.0
    """entropy's weight alpha to start with"""
    hyper: Hyper = Hyper()
    """traced settings, which --sweep can vary"""


class MLP(nn.Module):
    """Dense layers with ReLU, LayerNorm if asked; initialised orthogonally, the last layer small."""

    sizes: tuple[int, ...]
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x):
        for size in self.sizes[:-1]:
            x = nn.Dense(size, kernel_init=orthogonal(2**0.5))(x)
            x = nn.relu(nn.LayerNorm()(x) if self.layer_norm else x)
        return nn.Dense(self.sizes[-1], kernel_init=orthogonal(1e-2))(x)


class Actor(nn.Module):
    """Mean and log standard deviation, both [..., A], of a Gaussian that tanh squashes into (-1, 1)."""

    hidden: tuple[int, ...]
    action_size: int

    @nn.compact
    def __call__(self, obs):
        mean, log_std = jnp.split(MLP((*self.hidden, 2 * self.action_size))(obs), 2, axis=-1)
        return mean, jnp.clip(log_std - 1.0, -20.0, 2.0)


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


Nets = namedtuple("Nets", "actor critic")  # modules; their parameters are in the state


@struct.dataclass
class Agent:
    """One agent: what learns, each with its optimiser, and the critics' slow copy."""

    actor: Learner
    critic: Learner
    target_critic: dict
    alpha: Learner  # of log alpha


def init_agent(static: Static, key: jax.Array) -> Agent:
    nets, obs, action = static.nets, static.example.obs[None], static.example.action[None]
    actor_key, critic_key = jax.random.split(key)
    critic = Learner.create(nets.critic.init(critic_key, obs, action))
    actor, alpha = nets.actor.init(actor_key, obs), jnp.log(static.args.init_alpha)
    target_critic = jax.tree.map(jnp.copy, critic.params)
    return Agent(Learner.create(actor), critic, target_critic, Learner.create(alpha))


def sample(nets: Nets, actor: dict, obs: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Actions [..., A] drawn from the policy, differentiable in it, and their log densities [...]."""
    mean, log_std = nets.actor.apply(actor, obs)
    noise = jax.random.normal(key, mean.shape)
    u = mean + jnp.exp(log_std) * noise
    # log(1 - tanh(u)^2), the squashing's change of volume, in a form that does not round to log(0).
    squash = 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))
    return jnp.tanh(u), jnp.sum(jax.scipy.stats.norm.logpdf(noise) - log_std - squash, axis=-1)


def critic_loss(params, nets, obs, action, target_q):
    """Squared Bellman error, summed over the critics: SAC, equation (5)."""
    q = nets.critic.apply(params, obs, action)
    return jnp.mean(jnp.sum((q - target_q) ** 2, axis=0))


def actor_loss(params, nets, critic, obs, alpha, key):
    """Least Q less entropy at actions of the policy: SAC, equation (7). Also the actions' log density."""
    action, log_prob = sample(nets, params, obs, key)
    q = nets.critic.apply(critic, obs, action).min(axis=0)
    return jnp.mean(alpha * log_prob - q), log_prob.mean()


def alpha_loss(log_alpha, log_prob, target_entropy):
    """Raises alpha while entropy is below its target: SAC, equation (17), in log alpha as its code has it."""
    return -log_alpha * (log_prob + target_entropy)


def update(static: Static, hyper: Hyper, agent: Agent, batch: Transition, key: jax.Array):
    """One gradient step of critics, policy and alpha, in this order."""
    nets, rows, alpha = static.nets, (batch.obs, batch.action), jnp.exp(agent.alpha.params)
    next_key, actor_key = jax.random.split(key)
    next_action, next_log_prob = sample(nets, agent.actor.params, batch.next_obs, next_key)
    next_q = nets.critic.apply(agent.target_critic, batch.next_obs, next_action).min(axis=0)
    next_v = next_q - hyper.backup_entropy * alpha * next_log_prob

    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = task_reward + hyper.discount * batch.discount * next_v
    loss_q, critic = agent.critic.descend(critic_loss, hyper.critic_lr, nets, *rows, target_q)
    target_critic = optax.incremental_update(critic.params, agent.target_critic, hyper.target_rate)

    given = nets, critic.params, batch.obs, alpha, actor_key
    (loss_a, log_prob), actor = agent.actor.descend(actor_loss, hyper.actor_lr, *given, has_aux=True)
    target_entropy = hyper.entropy_per_action * nets.actor.action_size
    _, next_alpha = agent.alpha.descend(alpha_loss, hyper.alpha_lr, log_prob, target_entropy)

    metrics = {"critic_loss": loss_q, "actor_loss": loss_a}
    metrics |= {"q": target_q.mean(), "alpha": alpha, "entropy": -log_prob}
    return Agent(actor, critic, target_critic, next_alpha), metrics


def act(nets: Nets, actor: dict, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Actions [..., A] for observations [..., obs]: the squashed mean without a key, a sample with one."""
    return jnp.tanh(nets.actor.apply(actor, obs)[0]) if key is None else sample(nets, actor, obs, key)[0]


def export(actor: dict) -> policy.Policy:
    """The policy as a file that NumPy can run."""
    return policy.mlp(actor["params"]["MLP_0"], gaussian=(-1.0, -20.0, 2.0))


# as in iql.py
@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    agent: Agent
    env_state: envs.State | None
    ring: Transition | None
    key: jax.Array


def init_state(static: Static, key: jax.Array) -> State:
    key, agent_key, env_key = jax.random.split(key, 3)
    env_state, ring = start_online(static, env_key)
    return State(init_agent(static, agent_key), env_state, ring, key)


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
        key, sample_key, update_key = jax.random.split(state.key, 3)
        batch = sample_batches(offline, None, 0, 1.0, (static.args.batch_size,), sample_key)
        agent, metrics = update(static, hyper, state.agent, batch, update_key)
        return state.replace(agent=agent, key=key), metrics

    return scan_mean(step, state, length)


def finetune_chunk(static: Static, state: State, hyper: Hyper, offline, added, *, length: int, learns: bool):
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
            action = act(static.nets, state.agent.actor.params, obs, act_key)
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
        one_step = lambda agent, xs: update(static, now, agent, *xs)  # noqa: E731
        agent, metrics = jax.lax.scan(one_step, state.agent, (batches, keys))
        metrics = jax.tree.map(jnp.mean, metrics) | envs.tally(reached)
        return (state.replace(agent=agent), added), metrics

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


def make_plan(args: Args) -> list[Phase]:
    """Pre-training, then fine-tuning, which begins with random steps."""
    online = Phase("online", 0, args.online_steps, acts=True, idle=args.random_steps)
    return [Phase("offline", 0, args.offline_steps), online]


def make_nets(session: Session) -> Nets:
    """The networks."""
    args = session.args
    return Nets(Actor(args.hidden, session.action_size), Critic(args.critic_hidden, 2, args.layer_norm))


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("sac", args, make_plan)
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


# jaxrl's settings by environment family; those of the point mass are ours. Rewards stay as they are, but for
# tasks with a goal: there they are -1 until it is reached.
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), critic_hidden=(64, 64), actor_lr=1e-3, critic_lr=1e-3, alpha_lr=1e-3,
        target_rate=0.02, online_steps=960_000, num_envs=48, utd_ratio=1 / 48, random_steps=4_800),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    "probe": dict(
        hidden=(32, 32), critic_hidden=(32, 32), discount=0.9, actor_lr=3e-3, critic_lr=3e-3, alpha_lr=3e-3,
        target_rate=0.05, entropy_per_action=-3, backup_entropy=0, online_steps=3_000, random_steps=160),
    "antmaze": dict(reward_bias=-1),
    "maze2d": dict(reward_bias=-1, online_steps=500_000),
    "kitchen": dict(reward_bias=-5, end_reward=jnp.inf),
    ("door-binary", "pen-binary", "relocate-binary"): dict(reward_scale=10, reward_bias=5, end_reward=0),
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
