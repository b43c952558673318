"""CQL: conservative Q-learning offline, and "naive" fine-tuning online with the same loss.

CQL (Kumar et al., arXiv 2006.04779) is SAC whose critics also learn that actions which no data show are worth
no more than those which some do. To the Bellman error comes, for each critic, weight * (soft maximum of
Q(s, .) - Q(s, a)). The soft maximum is the log of a sum of exp Q over actions of three kinds, `--num-samples`
each: uniform ones, some of pi(.|s) and some of pi(.|s'). There are two sums (`--importance-sampling`):

- Each exp Q is divided by the density that its action was drawn with. So the sum estimates 3 n times the
  integral over all actions, n being `--num-samples`.
- Or nothing is divided, and the data's own action joins the sum (the setting for the kitchen).

With `--lagrange` the weight is also multiplied by alpha', which rises while the difference is larger than
`--lagrange-gap`. SAC-ft is sac.py with `--init-from` a run of this file.

Departures. From the paper: the target has no entropy and the sum is no mean, as in all code, to which the
settings belong. From the original code (aviralkumar2907/CQL): there is no behaviour cloning at the start; the
gap is taken off before the weight multiplies, and `--max-target-backup` takes the least critic before the
best action, both as in JaxCQL. From JaxCQL (young-geng): the gradients of critics and alpha', policy and
alpha are taken in this order, not all at once; the policy's log density has no learnt scale and offset;
environments act side by side (`--num-envs`).

    python algos/cql.py
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
from ooo_rl.data.runs.bounds import Bounds, Fraction, Layers, NonNegative, Number, Positive, Size, Steps, With
from ooo_rl.data.runs.online_change import online_hyper, online_ratio
from ooo_rl.data.runs.session import Phase, Result, Session, Static, scan_mean, start_online
from ooo_rl.data.runs.settings import Experiment, Traced, launch


@struct.dataclass
class Hyper(Traced):
    """Settings that are traced, not compiled in: one value per run, so each can be swept in one program."""

    actor_lr: NonNegative = 1e-4
    """learning rate of the policy"""
    critic_lr: NonNegative = 3e-4
    """learning rate of the two critics, and of alpha'"""
    alpha_lr: NonNegative = 1e-4
    """learning rate of the entropy's weight alpha; 0 keeps --init-alpha"""
    target_rate: Fraction = 0.005
    """share of the critics that goes into their targets at each update"""
    entropy_per_action: Number = -1.0
    """entropy that alpha aims at, per dimension of the action: -1 in the paper, -0.5 in jaxrl and RLPD"""
    backup_entropy: NonNegative = 0.0
    """weight of the entropy in the critics' target: 1 is SAC, 0 leaves it out (CQL, Cal-QL)"""
    cql_weight: NonNegative = 5.0
    """weight of the conservative loss beside the Bellman error; with --lagrange alpha' multiplies it"""
    lagrange_gap: Annotated[Number, With("lagrange")] = 0.8
    """difference between the soft maximum and the data's Q at which --lagrange aims"""
    diff_clip_min: Number = -float("inf")
    """this difference is clipped from below, row by row: a row further down is no longer pushed"""
    diff_clip_max: Number = float("inf")
    """and from above"""


@dataclass(frozen=True)
class Args(Experiment):
    """CQL: learn offline, and go on online with the same loss."""

    offline_ratio: Annotated[float, Bounds(at_most=1)] = 0.5
    """share of each online batch that comes from the offline rows; below 0: their share of all rows"""
    random_steps: Steps = 0
    """environment steps of uniformly random actions and no learning at the start"""
    hidden: Layers = (256, 256)
    """units of the policy's hidden layers"""
    critic_hidden: Layers = (256, 256, 256)
    """units of the critics' hidden layers"""
    layer_norm: bool = False
    """LayerNorm in the critics' hidden layers"""
    init_alpha: Positive = 1.0
    """entropy's weight alpha to start with"""
    num_samples: Size = 10
    """actions drawn at each row, of each of three kinds, for the soft maximum of Q"""
    importance_sampling: bool = True
    """divide exp Q by its action's density; else do not, and let the data's action join the sum"""
    lagrange: bool = False
    """multiply the weight by alpha', which is moved until the difference is --lagrange-gap"""
    max_target_backup: bool = False
    """the target's next value is the best of --num-samples actions of the policy, not that of one"""
    hyper: Hyper = Hyper()
    """traced settings, which --sweep can vary"""


# as in sac.py
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


Nets = namedtuple("Nets", "actor critic")  # modules; their parameters are in the state


@struct.dataclass
class Agent:
    """One agent: what learns, each with its optimiser, and the critics' slow copy."""

    actor: Learner
    critic: Learner
    target_critic: dict
    alpha: Learner  # of log alpha
    alpha_prime: Learner  # of log alpha'


def init_agent(static: Static, key: jax.Array) -> Agent:
    nets, obs, action = static.nets, static.example.obs[None], static.example.action[None]
    actor_key, critic_key = jax.random.split(key)
    actor, critic = nets.actor.init(actor_key, obs), nets.critic.init(critic_key, obs, action)
    logs = jnp.log(static.args.init_alpha), jnp.float32(1.0)  # JaxCQL's for alpha'; the original code's is 0
    actor, critic, alpha, alpha_prime = map(Learner.create, (actor, critic, *logs))
    return Agent(actor, critic, jax.tree.map(jnp.copy, critic.params), alpha, alpha_prime)


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


def conservative_loss(params, nets, obs, action, candidates, log_density, diff_clip):
    """Soft maximum of Q over `candidates` [N, B, A] less Q of the data's action, per critic [2].

    CQL, equation (4), the difference clipped.
    """
    q = jax.vmap(partial(nets.critic.apply, params, obs))(candidates)
    soft_max = jax.nn.logsumexp(q - log_density[:, None], axis=0)
    return jnp.clip(soft_max - nets.critic.apply(params, obs, action), *diff_clip).mean(axis=-1)


# as in sac.py
def actor_loss(params, nets, critic, obs, alpha, key):
    """Least Q less entropy at actions of the policy: SAC, equation (7). Also the actions' log density."""
    action, log_prob = sample(nets, params, obs, key)
    q = nets.critic.apply(critic, obs, action).min(axis=0)
    return jnp.mean(alpha * log_prob - q), log_prob.mean()


# as in sac.py
def alpha_loss(log_alpha, log_prob, target_entropy):
    """Raises alpha while entropy is below its target: SAC, equation (17), in log alpha as its code has it."""
    return -log_alpha * (log_prob + target_entropy)


def alpha_prime_loss(log_alpha_prime, excess):
    """Raises alpha' while the weighted difference exceeds its gap: the Lagrange version, in log alpha'."""
    return -jnp.clip(jnp.exp(log_alpha_prime), 0.0, 1e6) * excess


def sample_many(nets: Nets, actor: dict, obs: jax.Array, num: int, key: jax.Array):
    """`num` actions [num, B, A] of the policy at each of `obs` [B, obs], and their log densities [num, B]."""
    return jax.vmap(partial(sample, nets, actor, obs))(jax.random.split(key, num))


def draw_candidates(static: Static, actor: dict, batch: Transition, key: jax.Array):
    """Actions [N, B, A] that stand for all in the soft maximum, and what to take off their Q-values there."""
    num, (uniform_key, here_key, next_key) = static.args.num_samples, jax.random.split(key, 3)
    uniform = jax.random.uniform(uniform_key, (num, *batch.action.shape), minval=-1.0)
    here, log_here = sample_many(static.nets, actor, batch.obs, num, here_key)
    after, log_after = sample_many(static.nets, actor, batch.next_obs, num, next_key)
    if not static.args.importance_sampling:  # the data's action joins them
        actions = jnp.concatenate([uniform, here, after, batch.action[None]])
        return actions, jnp.zeros(actions.shape[:-1])
    log_uniform = jnp.full(log_here.shape, -batch.action.shape[-1] * jnp.log(2.0))
    return jnp.concatenate([uniform, here, after]), jnp.concatenate([log_uniform, log_here, log_after])


def update(static: Static, hyper: Hyper, agent: Agent, batch: Transition, key: jax.Array):
    """One gradient step of critics and alpha', policy and alpha, in this order."""
    args, nets, rows, alpha = static.args, static.nets, (batch.obs, batch.action), jnp.exp(agent.alpha.params)
    next_key, candidate_key, actor_key = jax.random.split(key, 3)
    num = args.num_samples if args.max_target_backup else 1
    next_action, next_log_prob = sample_many(nets, agent.actor.params, batch.next_obs, num, next_key)
    target_critics = partial(nets.critic.apply, agent.target_critic, batch.next_obs)
    next_q = jax.vmap(target_critics)(next_action).min(axis=1)
    best = next_q.argmax(axis=0)[None]  # the action of the largest Q, whatever its entropy
    next_q = next_q - hyper.backup_entropy * alpha * next_log_prob
    next_v = jnp.take_along_axis(next_q, best, axis=0)[0]

    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = task_reward + hyper.discount * batch.discount * next_v
    candidates = draw_candidates(static, agent.actor.params, batch, candidate_key)
    diff_clip = hyper.diff_clip_min, hyper.diff_clip_max
    multiplier = jnp.clip(jnp.exp(agent.alpha_prime.params), 0.0, 1e6) if args.lagrange else 1.0
    weight = hyper.cql_weight * multiplier

    def both_losses(params):
        bellman = critic_loss(params, nets, *rows, target_q)
        diff = conservative_loss(params, nets, *rows, *candidates, diff_clip)
        return bellman + weight * diff.sum(), (bellman, diff.mean())

    (_, (loss_q, diff)), critic = agent.critic.descend(both_losses, hyper.critic_lr, has_aux=True)
    target_critic = optax.incremental_update(critic.params, agent.target_critic, hyper.target_rate)
    alpha_prime, excess = agent.alpha_prime, hyper.cql_weight * (diff - hyper.lagrange_gap)
    if args.lagrange:
        _, alpha_prime = alpha_prime.descend(alpha_prime_loss, hyper.critic_lr, excess)

    given = nets, critic.params, batch.obs, alpha, actor_key
    (loss_a, log_prob), actor = agent.actor.descend(actor_loss, hyper.actor_lr, *given, has_aux=True)
    target_entropy = hyper.entropy_per_action * nets.actor.action_size
    _, next_alpha = agent.alpha.descend(alpha_loss, hyper.alpha_lr, log_prob, target_entropy)

    metrics = {"critic_loss": loss_q, "conservative_loss": diff, "cql_weight": weight, "actor_loss": loss_a}
    metrics |= {"q": target_q.mean(), "alpha": alpha, "entropy": -log_prob}
    return Agent(actor, critic, target_critic, next_alpha, alpha_prime), metrics


# as in sac.py
def act(nets: Nets, actor: dict, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Actions [..., A] for observations [..., obs]: the squashed mean without a key, a sample with one."""
    return jnp.tanh(nets.actor.apply(actor, obs)[0]) if key is None else sample(nets, actor, obs, key)[0]


# as in sac.py
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


# as in sac.py
def init_state(static: Static, key: jax.Array) -> State:
    key, agent_key, env_key = jax.random.split(key, 3)
    env_state, ring = start_online(static, env_key)
    return State(init_agent(static, agent_key), env_state, ring, key)


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


# as in sac.py
def pretrain_chunk(static: Static, state: State, hyper: Hyper, offline: Transition, *, length: int):
    """`length` gradient steps on the offline rows."""

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        batch = sample_batches(offline, None, 0, 1.0, (static.args.batch_size,), sample_key)
        agent, metrics = update(static, hyper, state.agent, batch, update_key)
        return state.replace(agent=agent, key=key), metrics

    return scan_mean(step, state, length)


# as in sac.py
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


# as in sac.py
def make_plan(args: Args) -> list[Phase]:
    """Pre-training, then fine-tuning, which begins with random steps."""
    online = Phase("online", 0, args.online_steps, acts=True, idle=args.random_steps)
    return [Phase("offline", 0, args.offline_steps), online]


# as in sac.py
def make_nets(session: Session) -> Nets:
    """The networks."""
    args = session.args
    return Nets(Actor(args.hidden, session.action_size), Critic(args.critic_hidden, 2, args.layer_norm))


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("cql", args, make_plan)
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


# The settings of Cal-QL's and OOO's code by environment family, locomotion's being the defaults; those of the
# point mass are ours.
MAZE = dict(critic_hidden=(256,) * 4, lagrange=True, max_target_backup=True, reward_scale=10, reward_bias=-5)
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), critic_hidden=(64, 64), actor_lr=1e-3, critic_lr=1e-3, alpha_lr=1e-3,
        target_rate=0.02, offline_steps=6_000, online_steps=480_000, num_envs=48, utd_ratio=1 / 48,
        num_samples=4, max_target_backup=True, cql_weight=10, entropy_per_action=-2),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    "probe": dict(
        hidden=(32, 32), critic_hidden=(32, 32), discount=0.9, actor_lr=3e-3, critic_lr=3e-3, alpha_lr=3e-3,
        target_rate=0.05, entropy_per_action=-3, cql_weight=0.01, num_samples=4, offline_steps=0,
        online_steps=3_000, random_steps=160),
    ("halfcheetah-sparse", "ant-sparse"): dict(offline_steps=0),
    "antmaze": MAZE,
    "maze2d": dict(**MAZE, offline_steps=500_000),
    "kitchen": dict(
        hidden=(512, 512, 512), critic_hidden=(512, 512, 512), importance_sampling=False,
        max_target_backup=True, reward_bias=-5, end_reward=jnp.inf, offline_ratio=0.25,
        offline_steps=500_000),
    "kitchen-complete": dict(online_steps=4_000_000),
    ("door", "hammer", "pen", "relocate"): dict(
        hidden=(512, 512), critic_hidden=(512, 512, 512), cql_weight=1, max_target_backup=True,
        offline_steps=20_000),
    ("door-binary", "pen-binary", "relocate-binary"): dict(reward_scale=10, reward_bias=5, end_reward=0),
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
