"""Off2OnRL: an ensemble of CQL agents, fine-tuned with balanced replay (Lee et al., arXiv 2107.00591).

Offline, N CQL agents learn, each from batches of its own (cql.py has CQL in full). Online they are one agent,
which learns by SAC's losses, without CQL's:

- The policy is the Gaussian with the mean and the variance of the mixture of the N Gaussians, then squashed.
- A member's Q is the smaller of its two critics'. The ensemble's is their mean: few unseen actions look good.
- Rows are drawn in proportion to w(s, a)^(1/T). A small network estimates w, the density of online rows over
  that of offline rows. So offline rows that look like online ones are drawn more than the others.

`--replay uniform` or `online` and `--num-members 1` switch parts off. With `--target mean` the members' mean
Q is regressed on one target, as in the paper; by default each has a target of its own, as in its code.
`--init-q fqe` begins with critics that learnt the policy's value without pessimism: Figure 1c.

Departures from the official code (shlee94/Off2OnRL), which has none for CQL: the network gives log w, not w
through a ReLU. The variance is a sum of squares, not a difference. Critics, policies, alpha and ratio learn
in this order, each from what the one before has changed. Environments act side by side (`--num-envs`).

    python algos/off2onrl.py
    python algos/off2onrl.py --env hopper --dataset ooo/hopper/medium-v0 --num-seeds 4
"""

from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from ooo_rl import envs
from ooo_rl.data import buffer, policy, priorities
from ooo_rl.data.buffer import Transition
from ooo_rl.data.learner import Learner, orthogonal
from ooo_rl.data.priorities import Priorities
from ooo_rl.data.runs.bounds import Bounds, Fraction, Layers, NonNegative, Number, Positive, Size, Steps, With
from ooo_rl.data.runs.online_change import online_hyper
from ooo_rl.data.runs.session import Phase, Result, Session, Static, scan_mean, start_online
from ooo_rl.data.runs.settings import Experiment, Traced, launch


@struct.dataclass
class Hyper(Traced):
    """Settings that are traced, not compiled in: one value per run, so each can be swept in one program."""

    actor_lr: NonNegative = 3e-4
    """learning rate of the policies"""
    critic_lr: NonNegative = 3e-4
    """learning rate of all critics"""
    alpha_lr: NonNegative = 3e-4
    """learning rate of the entropy's weight alpha; 0 keeps --init-alpha"""
    ratio_lr: Annotated[NonNegative, With("replay", "balanced")] = 3e-4
    """learning rate of the density ratio"""
    target_rate: Fraction = 0.005
    """share of the critics that goes into their targets at each update"""
    entropy_per_action: Number = -1.0
    """entropy that alpha aims at, per dimension of the action"""
    backup_entropy: NonNegative = 1.0
    """weight of the entropy in the critics' target online: 1 is SAC; offline it is 0, as in CQL's code"""
    cql_weight: NonNegative = 5.0
    """weight of the conservative loss beside the Bellman error, offline"""
    ratio_temperature: Annotated[Positive, With("replay", "balanced")] = 5.0
    """T: priorities are w^(1/T); the larger it is, the more alike they are"""
    online_fraction: Annotated[float, Bounds(above=0, below=1)] = 0.5
    """share of online rows in the first batches; it sets the priority of new rows"""


@dataclass(frozen=True)
class Args(Experiment):
    """Off2OnRL: pre-train an ensemble of CQL agents, fine-tune it with balanced replay."""

    online_steps: Steps = 250_000
    """environment steps"""
    num_members: Size = 5
    """N, CQL agents in the ensemble"""
    replay: Literal["balanced", "uniform", "online"] = "balanced"
    """rows of the online batches: by density ratio, all alike, or online rows alone"""
    target: Literal["own", "mean"] = "own"
    """online each member regresses on its own target (the code), or their mean does on one (the paper)"""
    init_q: Literal["cql", "fqe"] = "cql"
    """critics that the online phase begins with: CQL's, or fresh ones that learnt the policy's value"""
    fqe_steps: Annotated[Size, With("init_q", "fqe")] = 250_000
    """gradient steps of fitted Q evaluation, for --init-q fqe"""
    learning_starts: Steps = 1_000
    """environment steps before the first gradient step of the online phase"""
    hidden: Layers = (256, 256)
    """units of the hidden layers of the policies and of the density ratio"""
    critic_hidden: Layers = (256, 256)
    """units of the critics' hidden layers"""
    init_alpha: Positive = 1.0
    """entropy's weight alpha at the start of each phase"""
    num_samples: Size = 10
    """actions drawn at each row, of each of three kinds, for CQL's soft maximum of Q"""
    max_target_backup: bool = False
    """offline, the target's next value is the best of --num-samples actions, not that of one"""
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


class Ratio(nn.Module):
    """Log of the density ratio w(s, a), online over offline: [...]. It begins near w = 1."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        return MLP((*self.hidden, 1))(jnp.concatenate([obs, action], axis=-1)).squeeze(-1)


Nets = namedtuple("Nets", "actor critic ratio")  # modules, the first two of one member


@struct.dataclass
class Agent:
    """N agents, whose arrays have a leading axis of members, and what they have in common online.

    A loss is a sum over members, so each has its own gradient, and Adam moves each number by itself.
    """

    actor: Learner
    critic: Learner
    target_critic: dict
    alphas: Learner  # of log alpha [N], offline
    alpha: Learner  # of log alpha, online
    ratio: Learner


def init_agent(static: Static, key: jax.Array) -> Agent:
    nets, num = static.nets, static.args.num_members
    obs, action = static.example.obs[None], static.example.action[None]
    actor_key, critic_key, ratio_key = jax.random.split(key, 3)
    actor = jax.vmap(nets.actor.init, (0, None))(jax.random.split(actor_key, num), obs)
    critic = jax.vmap(nets.critic.init, (0, None, None))(jax.random.split(critic_key, num), obs, action)
    alpha = jnp.log(static.args.init_alpha)
    parts = actor, critic, jnp.full(num, alpha), alpha, nets.ratio.init(ratio_key, obs, action)
    actor, critic, alphas, alpha, ratio = map(Learner.create, parts)
    return Agent(actor, critic, jax.tree.map(jnp.copy, critic.params), alphas, alpha, ratio)


def squash(mean: jax.Array, log_std: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Actions [..., A] drawn from a squashed Gaussian, differentiable in it; their log densities [...]."""
    noise = jax.random.normal(key, mean.shape)
    u = mean + jnp.exp(log_std) * noise
    # log(1 - tanh(u)^2), the squashing's change of volume, in a form that does not round to log(0).
    change = 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))
    return jnp.tanh(u), jnp.sum(jax.scipy.stats.norm.logpdf(noise) - log_std - change, axis=-1)


# --- offline: each member is a CQL agent ---


def sample(nets: Nets, actor: dict, obs: jax.Array, num: int, key: jax.Array):
    """`num` actions [num, B, A] of one member's policy at `obs` [B, obs]; their log densities [num, B]."""
    given = nets.actor.apply(actor, obs)
    return jax.vmap(partial(squash, *given))(jax.random.split(key, num))


def cql_loss(static, hyper, params, actor, target_critic, batch, key):
    """One member: squared Bellman error and conservative loss, CQL, equation (4); also both parts and Q."""
    nets, num, keys = static.nets, static.args.num_samples, jax.random.split(key, 4)

    def q(params, obs, actions):  # [num, 2, B]
        return jax.vmap(partial(nets.critic.apply, params, obs))(actions)

    num_next = num if static.args.max_target_backup else 1
    next_action, _ = sample(nets, actor, batch.next_obs, num_next, keys[0])
    next_v = q(target_critic, batch.next_obs, next_action).min(axis=1).max(axis=0)
    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = task_reward + hyper.discount * batch.discount * next_v
    own = nets.critic.apply(params, batch.obs, batch.action)
    bellman = jnp.mean(jnp.sum((own - target_q) ** 2, axis=0))

    uniform = jax.random.uniform(keys[1], (num, *batch.action.shape), minval=-1.0)
    here, log_here = sample(nets, actor, batch.obs, num, keys[2])
    after, log_after = sample(nets, actor, batch.next_obs, num, keys[3])
    log_uniform = jnp.full(log_here.shape, -batch.action.shape[-1] * jnp.log(2.0))
    log_density = jnp.concatenate([log_uniform, log_here, log_after])[:, None]
    candidates = q(params, batch.obs, jnp.concatenate([uniform, here, after]))
    difference = jnp.mean(jax.nn.logsumexp(candidates - log_density, axis=0) - own, axis=-1)
    parts = {"critic_loss": bellman, "conservative_loss": difference.mean(), "q": target_q.mean()}
    return bellman + hyper.cql_weight * difference.sum(), parts


def member_actor_loss(nets, params, critic, obs, alpha, key):
    """One member: least Q less entropy at actions of its policy, SAC, equation (7). Also the log density."""
    action, log_prob = squash(*nets.actor.apply(params, obs), key)
    q = nets.critic.apply(critic, obs, action).min(axis=0)
    return jnp.mean(alpha * log_prob - q), log_prob.mean()


# as in sac.py
def alpha_loss(log_alpha, log_prob, target_entropy):
    """Raises alpha while entropy is below its target: SAC, equation (17), in log alpha as its code has it."""
    return -log_alpha * (log_prob + target_entropy)


def pretrain_update(static: Static, hyper: Hyper, agent: Agent, batch: Transition, key: jax.Array):
    """One gradient step of each member by CQL, on rows [N, B, ...] of its own."""
    nets, alphas = static.nets, jnp.exp(agent.alphas.params)
    critic_keys, actor_keys = jax.random.split(key, (2, len(alphas)))

    def critics(params):
        each = params, agent.actor.params, agent.target_critic, batch, critic_keys
        losses, parts = jax.vmap(partial(cql_loss, static, hyper))(*each)
        return losses.sum(), jax.tree.map(jnp.mean, parts)

    (_, metrics), critic = agent.critic.descend(critics, hyper.critic_lr, has_aux=True)
    target_critic = optax.incremental_update(critic.params, agent.target_critic, hyper.target_rate)

    def actors(params):
        each = params, critic.params, batch.obs, alphas, actor_keys
        losses, log_prob = jax.vmap(partial(member_actor_loss, nets))(*each)
        return losses.sum(), log_prob

    (loss_a, log_prob), actor = agent.actor.descend(actors, hyper.actor_lr, has_aux=True)
    excess = log_prob, hyper.entropy_per_action * nets.actor.action_size
    _, next_alphas = agent.alphas.descend(lambda logs: alpha_loss(logs, *excess).sum(), hyper.alpha_lr)

    metrics |= {"actor_loss": loss_a / len(alphas), "alpha": alphas.mean(), "entropy": -log_prob.mean()}
    return agent.replace(actor=actor, critic=critic, target_critic=target_critic, alphas=next_alphas), metrics


# --- online: the members are one agent ---


def ensemble_policy(nets: Nets, actor: dict, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log standard deviation [..., A], before squashing, of the mixture of members' Gaussians."""
    means, log_stds = jax.vmap(nets.actor.apply, (0, None))(actor, obs)
    mean = means.mean(axis=0)
    # The variance within members and that between them: neither can be negative, as a difference could.
    variance = jnp.mean(jnp.exp(2 * log_stds) + (means - mean) ** 2, axis=0)
    return mean, jnp.clip(0.5 * jnp.log(variance), -20.0, 2.0)


def members_q(nets: Nets, critic: dict, obs: jax.Array, action: jax.Array) -> jax.Array:
    """Q-values [N, 2, B] of both critics of each member."""
    return jax.vmap(nets.critic.apply, (0, None, None))(critic, obs, action)


def ensemble_q(nets: Nets, critic: dict, obs: jax.Array, action: jax.Array) -> jax.Array:
    """The pessimistic Q-value [B]: the mean over members of the lesser of each one's two."""
    return members_q(nets, critic, obs, action).min(axis=1).mean(axis=0)


def critic_loss(params, nets, obs, action, target_q, joint=False):
    """Squared Bellman error on targets [N, 1 or 2, B], summed over critics; `joint`: of the members' mean."""
    q = members_q(nets, params, obs, action)
    q = q.mean(axis=0, keepdims=True) if joint else q
    return jnp.mean(jnp.sum((q - target_q) ** 2, axis=(0, 1)))


def actor_loss(params, nets, critic, obs, alpha, key):
    """Ensemble's Q less entropy at actions of its policy, for all members at once. Also the log density."""
    action, log_prob = squash(*ensemble_policy(nets, params, obs), key)
    return jnp.mean(alpha * log_prob - ensemble_q(nets, critic, obs, action)), log_prob.mean()


def ratio_loss(params, nets, old, new):
    """Jensen-Shannon bound: least where the network is the log of the ratio of densities, `new` over `old`.

    With w = exp(x), -log(2 / (w + 1)) is softplus(x) - log 2; -log(2w / (w + 1)) is softplus(-x) - log 2.
    """
    x_old, x_new = (nets.ratio.apply(params, rows.obs, rows.action) for rows in (old, new))
    return jnp.mean(jax.nn.softplus(x_old)) + jnp.mean(jax.nn.softplus(-x_new)) - 2 * jnp.log(2.0)


def update(static: Static, hyper: Hyper, agent: Agent, batch: Transition, key: jax.Array):
    """One gradient step of critics, policies and alpha, in this order."""
    nets, rows, alpha = static.nets, (batch.obs, batch.action), jnp.exp(agent.alpha.params)
    next_key, actor_key = jax.random.split(key)
    next_action, next_log_prob = squash(*ensemble_policy(nets, agent.actor.params, batch.next_obs), next_key)
    next_q = members_q(nets, agent.target_critic, batch.next_obs, next_action).min(axis=1, keepdims=True)
    joint = static.args.target == "mean"
    next_q = next_q.mean(axis=0, keepdims=True) if joint else next_q  # [1 or N, 1, B]
    next_v = next_q - hyper.backup_entropy * alpha * next_log_prob
    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = task_reward + hyper.discount * batch.discount * next_v
    loss_q, critic = agent.critic.descend(critic_loss, hyper.critic_lr, nets, *rows, target_q, joint)
    target_critic = optax.incremental_update(critic.params, agent.target_critic, hyper.target_rate)

    given = nets, critic.params, batch.obs, alpha, actor_key
    (loss_a, log_prob), actor = agent.actor.descend(actor_loss, hyper.actor_lr, *given, has_aux=True)
    target_entropy = hyper.entropy_per_action * nets.actor.action_size
    _, next_alpha = agent.alpha.descend(alpha_loss, hyper.alpha_lr, log_prob, target_entropy)

    metrics = {"critic_loss": loss_q, "actor_loss": loss_a, "alpha": alpha, "entropy": -log_prob}
    metrics["q"] = target_q.mean()
    return agent.replace(actor=actor, critic=critic, target_critic=target_critic, alpha=next_alpha), metrics


def evaluate_update(static: Static, hyper: Hyper, agent: Agent, batch: Transition, key: jax.Array):
    """One step of fitted Q evaluation: each critic by itself learns what the ensemble's policy is worth."""
    nets, rows = static.nets, (batch.obs, batch.action)
    next_action, _ = squash(*ensemble_policy(nets, agent.actor.params, batch.next_obs), key)
    next_q = members_q(nets, agent.target_critic, batch.next_obs, next_action)
    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = task_reward + hyper.discount * batch.discount * next_q
    loss_q, critic = agent.critic.descend(critic_loss, hyper.critic_lr, nets, *rows, target_q)
    target_critic = optax.incremental_update(critic.params, agent.target_critic, hyper.target_rate)
    learnt = agent.replace(critic=critic, target_critic=target_critic)
    return learnt, {"critic_loss": loss_q, "q": target_q.mean()}


def act(nets: Nets, actor: dict, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Actions [..., A] for observations [..., obs]: the squashed mean without a key, a sample with one."""
    mean, log_std = ensemble_policy(nets, actor, obs)
    return jnp.tanh(mean) if key is None else squash(mean, log_std, key)[0]


def export(actor: dict) -> policy.Policy:
    """The mean of the ensemble's policy as a file that NumPy can run: its members side by side in one MLP."""
    (w, b), *middle, (last_w, last_b) = policy.dense_layers(actor["params"]["MLP_0"])
    num, action_size = len(b), last_b.shape[1] // 2
    layers = [(np.concatenate([*w], axis=1), b.reshape(-1))]
    layers += [(jax.scipy.linalg.block_diag(*w), b.reshape(-1)) for w, b in middle]
    layers += [(np.concatenate([*last_w], axis=0)[:, :action_size] / num, last_b.mean(axis=0)[:action_size])]
    return policy.mlp(layers, output="tanh")


@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    agent: Agent
    priorities: Priorities | None  # of the offline rows, then of the ring's
    newest: jax.Array  # [] priority of new rows: set as the online phase begins, then the largest so far
    env_state: envs.State | None
    ring: Transition | None
    key: jax.Array


def init_state(static: Static, offline: Transition | None, key: jax.Array) -> State:
    key, agent_key, env_key = jax.random.split(key, 3)
    env_state, ring = start_online(static, env_key)
    num_old, tree = buffer.size(offline), None
    if static.args.replay == "balanced" and num_old and ring is not None:
        tree = priorities.create(jnp.float32(jnp.arange(num_old + buffer.size(ring)) < num_old))
    return State(init_agent(static, agent_key), tree, jnp.float32(1.0), env_state, ring, key)


def renew_critics(static: Static, state: State) -> State:
    """Before fitted Q evaluation: critics that know nothing."""
    key, agent_key = jax.random.split(state.key)
    fresh, old = init_agent(static, agent_key), state.agent
    return state.replace(agent=fresh.replace(actor=old.actor, alphas=old.alphas), key=key)


def begin_online(static: Static, state: State, hyper: Hyper, offline: Transition | None) -> State:
    """Before the first environment step: all begins afresh but policies and critics; new rows get a priority.

    It makes the share `online_fraction` of the first batches online rows; offline rows have priority 1.
    """
    args, f, (key, agent_key) = static.args, hyper.online_fraction, jax.random.split(state.key)
    fresh, critic = init_agent(static, agent_key), state.agent.critic.params
    learners = {"actor": Learner.create(state.agent.actor.params), "critic": Learner.create(critic)}
    agent = fresh.replace(**learners, target_critic=jax.tree.map(jnp.copy, critic), alphas=state.agent.alphas)
    first_rows = (-(-args.learning_starts // args.num_envs) + 1) * args.num_envs  # at the first gradient step
    newest = buffer.size(offline) / min(first_rows, buffer.size(state.ring)) * f / (1 - f)
    return state.replace(agent=agent, newest=newest, key=key)


def auroc(nets: Nets, critic: dict, batch: Transition, key: jax.Array) -> jax.Array:
    """Share of the pairs of a row and a random action in which the row's own action has more Q: Figure 4b."""
    random = jax.random.uniform(key, batch.action.shape, minval=-1.0)
    seen, unseen = (ensemble_q(nets, critic, batch.obs, action) for action in (batch.action, random))
    return jnp.mean(seen[:, None] > unseen)


def pretrain_chunk(static: Static, state: State, hyper: Hyper, offline, *, length: int, fqe: bool):
    """`length` gradient steps on offline rows, of CQL or fitted Q evaluation; then a look at the critics."""
    args, nets, num_rows = static.args, static.nets, buffer.size(offline)
    shape = (args.batch_size,) if fqe else (args.num_members, args.batch_size)

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        batch = buffer.take(offline, None, jax.random.randint(sample_key, shape, 0, num_rows))
        one = evaluate_update if fqe else pretrain_update
        agent, metrics = one(static, hyper, state.agent, batch, update_key)
        return state.replace(agent=agent, key=key), metrics

    state, metrics = scan_mean(step, state, length)
    key, row_key, random_key = jax.random.split(state.key, 3)
    rows = buffer.take(offline, None, jax.random.randint(row_key, (1_000,), 0, num_rows))
    told_apart = auroc(nets, state.agent.critic.params, rows, random_key)
    return state.replace(key=key), metrics | {"auroc": told_apart}


def rebalance(static: Static, hyper: Hyper, agent: Agent, tree: Priorities, index, batch, old, new):
    """A gradient step of the density ratio on `old` and `new` rows; new priorities of the rows `index`."""
    nets = static.nets
    loss, ratio = agent.ratio.descend(ratio_loss, hyper.ratio_lr, nets, old, new)
    log_w = (nets.ratio.apply(ratio.params, rows.obs, rows.action) for rows in (batch, old))
    x, x_old = (each / hyper.ratio_temperature for each in log_w)
    log_mean = jax.nn.logsumexp(x_old) - jnp.log(len(x_old))
    fresh = jnp.clip(jnp.exp(x - log_mean), 1e-3, 1e3)  # w^(1/T) over its mean at offline rows
    metrics = {"ratio_loss": loss, "priority": fresh.mean()}
    return agent.replace(ratio=ratio), priorities.update(tree, index, fresh), fresh.max(), metrics


def learn(static: Static, hyper: Hyper, offline, ring, num_new, state: State, key: jax.Array):
    """One online gradient step, from the drawing of its rows to their new priorities."""
    num_old, shape = buffer.size(offline), (static.args.batch_size,)
    draw_key, update_key, old_key, new_key = jax.random.split(key, 4)
    if state.priorities is not None:
        index = priorities.draw(state.priorities, shape, draw_key)
    else:
        first = num_old if static.args.replay == "online" else 0
        index = jax.random.randint(draw_key, shape, first, num_old + num_new)
    batch = buffer.take(offline, ring, index)
    agent, metrics = update(static, hyper, state.agent, batch, update_key)
    metrics["offline_share"] = jnp.mean(index < num_old)
    if state.priorities is None:
        return state.replace(agent=agent), metrics
    old = buffer.take(offline, None, jax.random.randint(old_key, shape, 0, num_old))
    new = buffer.take(None, ring, jax.random.randint(new_key, shape, 0, num_new))
    rows = state.priorities, index, batch, old, new
    agent, tree, largest, more = rebalance(static, hyper, agent, *rows)
    newest = jnp.maximum(state.newest, largest)
    return state.replace(agent=agent, priorities=tree, newest=newest), metrics | more


def finetune_chunk(static: Static, state: State, hyper: Hyper, offline, added, *, length: int, learns: bool):
    """`length` steps of all environments, with gradient steps if it `learns`; `added` [] rows come before."""
    args, num_updates = static.args, round(static.args.num_envs * static.args.utd_ratio)

    def step(carry):
        state, added = carry
        key, act_key, reset_key, learn_key = jax.random.split(state.key, 4)
        obs, tree, now = state.env_state.obs, state.priorities, online_hyper(args, hyper, added)
        action = act(static.nets, state.agent.actor.params, obs, act_key)
        env_state, reached = envs.step_all(static.env, state.env_state, action, reset_key)
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, rows, added, reached.info["broken"])
        if tree is not None:
            slots = added % buffer.size(ring) + jnp.arange(args.num_envs)
            tree = priorities.update(tree, buffer.size(offline) + slots, state.newest)
        added, tally = added + args.num_envs, envs.tally(reached)
        state = state.replace(priorities=tree, env_state=env_state, ring=ring, key=key)
        if not learns:
            return (state, added), tally

        num_new = jnp.minimum(added, buffer.size(ring))
        one = partial(learn, static, now, offline, ring, num_new)
        alone, keys = state.replace(env_state=None, ring=None), jax.random.split(learn_key, num_updates)
        learnt, metrics = jax.lax.scan(one, alone, keys)
        state = learnt.replace(env_state=env_state, ring=ring)
        return (state, added), jax.tree.map(jnp.mean, metrics) | tally

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


def make_plan(args: Args) -> list[Phase]:
    """Pre-training, fitted Q evaluation where asked for, and fine-tuning, which waits for its first rows."""
    fqe = args.fqe_steps if args.init_q == "fqe" else 0
    online = Phase("online", 0, args.online_steps, acts=True, idle=args.learning_starts)
    return [Phase("offline", 0, args.offline_steps), Phase("fqe", 0, fqe), online]


def make_nets(session: Session) -> Nets:
    """The networks."""
    args = session.args
    return Nets(Actor(args.hidden, session.action_size), Critic(args.critic_hidden), Ratio(args.hidden))


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("off2onrl", args, make_plan)
    args, offline, hyper = session.args, session.offline, session.hyper
    nets = make_nets(session)
    session.q_of["agent"] = partial(ensemble_q, nets)
    functions = init_state, renew_critics, begin_online, pretrain_chunk, finetune_chunk
    initialise, renew, begin, pretrain, finetune = session.compile(session.static(nets), *functions)
    state = session.begin(initialise(offline, session.keys), partial(act, nets))

    for chunk in session.chunks():
        if not chunk.acts:
            fqe = chunk.phase == "fqe"
            state = renew(state) if fqe and chunk.first else state
            state, metrics = pretrain(state, hyper, offline, length=chunk.iterations, fqe=fqe)
        else:
            state = begin(state, online_hyper(args, hyper, 0), offline) if chunk.first else state
            how = {"length": chunk.iterations, "learns": chunk.learns}
            state, metrics = finetune(state, hyper, offline, chunk.collected, **how)
        session.after(chunk, metrics, state)

    return session.conclude(state, export, {"policy": state.agent})


# The defaults are for locomotion: JaxCQL's offline, the official code's online. The settings below are ours.
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), critic_hidden=(64, 64), actor_lr=1e-3, critic_lr=1e-3, alpha_lr=1e-3, num_envs=48,
        target_rate=0.02, offline_steps=6_000, online_steps=480_000, utd_ratio=1 / 48, learning_starts=4_800,
        num_samples=4, max_target_backup=True, cql_weight=10, entropy_per_action=-2),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    "probe": dict(
        hidden=(32, 32), critic_hidden=(32, 32), discount=0.9, actor_lr=3e-3, critic_lr=3e-3, alpha_lr=3e-3,
        ratio_lr=3e-3, target_rate=0.05, entropy_per_action=-3, backup_entropy=0, cql_weight=0.01,
        num_members=2, num_samples=4, offline_steps=0, online_steps=3_000, learning_starts=160),
    ("halfcheetah-sparse", "ant-sparse"): dict(offline_steps=0),
    ("antmaze", "maze2d"): dict(critic_hidden=(256,) * 4, actor_lr=1e-4, alpha_lr=1e-4,
        max_target_backup=True, reward_scale=10, reward_bias=-5, offline_steps=500_000),
    "kitchen": dict(hidden=(512,) * 3, critic_hidden=(512,) * 3, actor_lr=1e-4, alpha_lr=1e-4,
        max_target_backup=True, reward_bias=-5, end_reward=jnp.inf, offline_steps=500_000),
    ("door", "hammer", "pen", "relocate"): dict(hidden=(512,) * 2, critic_hidden=(512,) * 3, actor_lr=1e-4,
        alpha_lr=1e-4, cql_weight=1, max_target_backup=True, offline_steps=20_000),
    ("door-binary", "pen-binary", "relocate-binary"): dict(reward_scale=10, reward_bias=5, end_reward=0),
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
