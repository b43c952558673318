"""GDE on CQL: guided decoupled exploration; one policy explores, one exploits, the best one so far guides.

Offline this is CQL (cql.py). Online it is GDE, as gde_iql.py tells: an explorer acts; an exploiter goes on
with CQL's losses, and is evaluated and saved; the best that was tried of it is the explorer's teacher.

Departures. The explorer's Q is that of CQL's policy, the least of the critics. tanh squashes both policies'
Gaussians alike, which leaves their divergence as it is. The paper has CQL's weight at 5 and two hidden
layers; critics have three here, four in mazes, to fit a run of cql.py. All else as in cql.py and gde_iql.py.

    python algos/gde_cql.py
    python algos/gde_cql.py --env hopper --init-from runs/cql/hopper/mine --offline-steps 0
"""

import math
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
from ooo_rl.data import buffer, n_step, policy
from ooo_rl.data.buffer import Transition
from ooo_rl.data.learner import Learner, orthogonal
from ooo_rl.data.n_step import Linked
from ooo_rl.data.runs.bounds import Fraction, Layers, NonNegative, Number, Positive, Size, Steps, With
from ooo_rl.data.runs.online_change import online_hyper
from ooo_rl.data.runs.session import Phase, Result, Session, Static, scan_mean, start_online
from ooo_rl.data.runs.settings import Experiment, Traced, UsageError, launch


@struct.dataclass
class Hyper(Traced):
    """Settings that are traced, not compiled in: one value per run, so each can be swept in one program."""

    actor_lr: NonNegative = 1e-4
    """learning rate of the policies"""
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
    rho: NonNegative = 0.3
    """weight of the explorer's divergence from the teacher at first; it falls linearly to 0 (--rho-steps)"""
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
    """GDE: train offline with CQL, then let explorer, exploiter and teacher share the work online."""

    num_envs: Steps = 1
    """environments that act side by side, per seed; the steps of a trial are those of all together"""
    offline_ratio: Fraction = 0.0
    """share of each online batch that comes from the offline rows"""
    online_steps: Steps = 250_000
    """environment steps of fine-tuning"""
    learning_starts: Steps = 2_500
    """of these, steps at the start that only fill the buffer, with no gradient steps"""
    n_steps: Size = 1
    """steps of the returns that values learn online"""
    rho_steps: Annotated[Steps, With("online_steps")] = 0
    """environment steps in which rho falls to 0; 0: all of the phase"""
    trial_every: Size = 2_500
    """environment steps from one trial of the exploiter to the next"""
    trial_steps: Size = 1_000
    """the first of these steps, which are the trial"""
    without: Literal["nothing", "exploiter", "explorer"] = "nothing"
    """ablation: who is left out; the other of the two then acts, plays the trials and is evaluated"""
    teacher: Literal["best", "fixed", "none"] = "best"
    """who guides the explorer: the best policy of all trials so far, the offline one, or nobody"""
    hidden: Layers = (256, 256)
    """units of the policies' hidden layers"""
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


# as in cql.py
@struct.dataclass
class Agent:
    """One agent: what learns, each with its optimiser, and the critics' slow copy."""

    actor: Learner
    critic: Learner
    target_critic: dict
    alpha: Learner  # of log alpha
    alpha_prime: Learner  # of log alpha'


# as in cql.py
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


# as in cql.py
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


# as in cql.py
def alpha_prime_loss(log_alpha_prime, excess):
    """Raises alpha' while the weighted difference exceeds its gap: the Lagrange version, in log alpha'."""
    return -jnp.clip(jnp.exp(log_alpha_prime), 0.0, 1e6) * excess


# as in cql.py
def sample_many(nets: Nets, actor: dict, obs: jax.Array, num: int, key: jax.Array):
    """`num` actions [num, B, A] of the policy at each of `obs` [B, obs], and their log densities [num, B]."""
    return jax.vmap(partial(sample, nets, actor, obs))(jax.random.split(key, num))


# as in cql.py
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


# as in cql.py
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


# as in gde_iql.py
def divergence(teacher, explorer) -> jax.Array:
    """KL(teacher, explorer) [...] of two Gaussians, each given by its mean and log standard deviation."""
    (mean, log_std), (own_mean, own_log_std) = teacher, explorer
    spread = jnp.exp(2 * (log_std - own_log_std)) + ((mean - own_mean) / jnp.exp(own_log_std)) ** 2
    return jnp.sum(own_log_std - log_std + 0.5 * (spread - 1), axis=-1)


def explorer_loss(params, nets, critic, teacher, obs, rho, key):
    """-Q at the explorer's actions, and rho times its divergence from the teacher: GDE, equation (5).

    The second result is the divergence alone.
    """
    own, guide = nets.actor.apply(params, obs), nets.actor.apply(teacher, obs)  # before tanh
    q = nets.critic.apply(critic, obs, sample(nets, params, obs, key)[0]).min(axis=0)
    kl = divergence(guide, own).mean()
    return -q.mean() + rho * kl, kl


# as in gde_iql.py
@struct.dataclass
class Trial:
    """The tally of a trial, and the best one so far."""

    counts: jax.Array  # [num_envs] whether the running episode belongs to the trial
    total: jax.Array  # [] sum of the rewards of the trial's episodes
    episodes: jax.Array  # [] number of the trial's episodes
    best: jax.Array  # [] the largest mean return of a trial; -inf before the first


# as in gde_iql.py
@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    agent: Agent  # its policy is the exploiter
    explorer: Learner
    teacher: dict
    tried: dict  # the exploiter as it was when the trial began, which plays it
    trial: Trial
    env_state: envs.State | None
    ring: Linked | None
    key: jax.Array


# as in gde_iql.py
def decouple(static: Static, state: State) -> State:
    """Before the first environment step: explorer and teacher become copies of the policy so far."""
    explorer, teacher, tried = (jax.tree.map(jnp.copy, state.agent.actor.params) for _ in range(3))
    return state.replace(explorer=Learner.create(explorer), teacher=teacher, tried=tried)


def init_state(static: Static, key: jax.Array) -> State:
    key, agent_key, env_key = jax.random.split(key, 3)
    row, zero = n_step.linked(static.example, jnp.float32(0)), jnp.float32(0)
    env_state, ring = start_online(static._replace(example=row), env_key)
    trial = Trial(jnp.zeros(static.args.num_envs, bool), zero, zero, jnp.float32(-jnp.inf))
    agent = init_agent(static, agent_key)
    return decouple(static, State(agent, None, None, None, trial, env_state, ring, key))


# as in gde_iql.py
def lengths(args: Args) -> tuple[int, int]:
    """Steps of all environments at once: of a cycle, and of the trial with which it begins."""
    return math.ceil(args.trial_every / args.num_envs), math.ceil(args.trial_steps / args.num_envs)


# as in gde_iql.py
def follow(static: Static, trial: Trial, reached: envs.State, position) -> Trial:
    """The tally after the step at `position` [] of the cycle.

    The episodes that begin with the trial count, as far as it goes; later ones if they have time to end.
    """
    begins, over = position == 0, reached.done > 0
    counts = trial.counts | begins
    total = jnp.where(begins, 0.0, trial.total) + jnp.sum(reached.reward, where=counts)
    more = over & (position + 1 + static.env.horizon <= lengths(static.args)[1])  # the next one has time
    episodes = jnp.where(begins, float(static.args.num_envs), trial.episodes) + more.sum()
    return trial.replace(counts=jnp.where(over, more, counts), total=total, episodes=episodes)


# as in gde_iql.py
def judge(static: Static, state: State, position) -> tuple[State, jax.Array]:
    """After the last step of a trial, what played it becomes the teacher if its return is the best so far.

    The second result [] tells whether it does.
    """
    args, trial, mean_return = static.args, state.trial, state.trial.total / state.trial.episodes
    better = (position == lengths(args)[1] - 1) & (mean_return > trial.best)
    best = jnp.where(better, mean_return, trial.best)
    new = better if args.teacher == "best" else jnp.bool_(False)
    teacher = jax.tree.map(partial(jnp.where, new), state.tried, state.teacher)
    return state.replace(teacher=teacher, trial=trial.replace(best=best)), new


# as in gde_iql.py
def play(static: Static, state: State, added) -> tuple[State, dict]:
    """One step of all environments, in a trial or not, and metrics; `added` [] online rows come before."""
    args, nets, (cycle, trial_length) = static.args, static.nets, lengths(static.args)
    position = added // args.num_envs % cycle
    key, start_key, act_key, reset_key = jax.random.split(state.key, 4)
    fresh = lambda: jax.vmap(static.env.reset)(jax.random.split(start_key, args.num_envs))  # noqa: E731
    env_state = jax.lax.cond(position == 0, fresh, lambda: state.env_state)

    obs, in_trial = env_state.obs, position < trial_length
    exploiter, explorer = state.agent.actor.params, state.explorer.params
    player = explorer if args.without == "exploiter" else exploiter
    tried = jax.tree.map(partial(jnp.where, position == 0), player, state.tried)
    explored = act(nets, exploiter if args.without == "explorer" else explorer, obs, act_key)
    action = jnp.where(in_trial, act(nets, tried, obs), explored)
    env_state, reached = envs.step_all(static.env, env_state, action, reset_key)

    rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
    last = jnp.where(position == cycle - 1, 1.0, reached.done)  # a trial begins with fresh episodes
    ring = n_step.insert(state.ring, rows, added, last, reached.info["broken"])
    trial = follow(static, state.trial, reached, position)
    state = state.replace(tried=tried, trial=trial, env_state=env_state, ring=ring, key=key)
    state, new_teacher = judge(static, state, position)
    metrics = {"in_trial": jnp.float32(in_trial), "new_teacher": jnp.float32(new_teacher)}
    return state, metrics | envs.tally(reached)


# as in gde_iql.py
def sample_batches(static: Static, hyper: Hyper, offline, truncation, ring, added, shape: tuple, key):
    """n-step rows [*shape, ...] in batches of shape[-1], a share `--offline-ratio` of them offline."""
    args, (*outer, rows), (old_key, new_key) = static.args, shape, jax.random.split(key)
    num_old = round(args.offline_ratio * rows) if offline is not None else 0
    new = jax.random.randint(new_key, (*outer, rows - num_old), 0, jnp.minimum(added, buffer.size(ring)))
    batches = n_step.n_step(hyper, ring, new, added, args.num_envs, args.n_steps)
    if not num_old:
        return batches
    size, data = buffer.size(offline), n_step.linked(offline, truncation)
    old = jax.random.randint(old_key, (*outer, num_old), 0, size)
    past = n_step.n_step(hyper, data, old, size, 1, args.n_steps)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=len(outer)), past, batches)


# as in gde_td3_bc.py
def pretrain_chunk(static: Static, state: State, hyper: Hyper, offline: Transition, *, length: int):
    """`length` gradient steps on the offline rows."""

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        index = jax.random.randint(sample_key, (static.args.batch_size,), 0, buffer.size(offline))
        agent, metrics = update(static, hyper, state.agent, buffer.take(offline, None, index), update_key)
        return state.replace(agent=agent, key=key), metrics

    return scan_mean(step, state, length)


def guided_update(static: Static, hyper: Hyper, agent: Agent, explorer: Learner, teacher, rho, batch, key):
    """An online gradient step of CQL, whose policy is the exploiter, and one of the explorer."""
    update_key, explorer_key = jax.random.split(key)
    scaled = hyper.replace(reward_scale=1.0, reward_bias=0.0)  # n-step returns are so already
    learnt, metrics = update(static, scaled, agent, batch, update_key)
    if static.args.without == "explorer":
        return (learnt, explorer), metrics
    given = static.nets, learnt.critic.params, teacher, batch.obs, rho, explorer_key
    (loss_e, kl), explorer = explorer.descend(explorer_loss, hyper.actor_lr, *given, has_aux=True)
    return (learnt, explorer), {**metrics, "explorer_loss": loss_e, "divergence": kl}


# as in gde_iql.py
def finetune_chunk(static: Static, state: State, hyper, offline, truncation, added, *, length, learns: bool):
    """`length` steps of all environments, with gradient steps if it `learns`; `added` [] rows come before."""
    args, num_updates = static.args, round(static.args.num_envs * static.args.utd_ratio)

    def step(carry):
        state, added = carry
        now = online_hyper(args, hyper, added)
        left = jnp.maximum(0.0, 1 - added / (args.rho_steps or args.online_steps))
        rho = now.rho * left if args.teacher != "none" else 0.0
        state, metrics = play(static, state, added)
        added = added + args.num_envs
        if not learns:
            return (state, added), metrics
        key, sample_key, update_key = jax.random.split(state.key, 3)
        shape, keys = (num_updates, args.batch_size), jax.random.split(update_key, num_updates)
        batches = sample_batches(static, now, offline, truncation, state.ring, added, shape, sample_key)
        one_step = lambda both, xs: guided_update(static, now, *both, state.teacher, rho, *xs)  # noqa: E731
        (agent, explorer), learnt = jax.lax.scan(one_step, (state.agent, state.explorer), (batches, keys))
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


# as in sac.py
def make_nets(session: Session) -> Nets:
    """The networks."""
    args = session.args
    return Nets(Actor(args.hidden, session.action_size), Critic(args.critic_hidden, 2, args.layer_norm))


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("gde_cql", args, make_plan)
    args, offline, hyper = session.args, session.offline, session.hyper
    n_step.check_share(args, session.card)
    if args.online_steps and lengths(args)[1] < session.env.horizon:
        session.console.print(f"a trial has {lengths(args)[1]} steps, an episode {session.env.horizon}")
    nets, functions = make_nets(session), (init_state, pretrain_chunk, decouple, finetune_chunk)
    initialise, pretrain, begin, finetune = session.compile(session.static(nets), *functions)
    state = session.begin(initialise(session.keys), partial(act, nets))

    alone = args.online_steps and args.without == "exploiter"
    for chunk in session.chunks():
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, length=chunk.iterations)
        else:
            state = begin(state) if chunk.first else state
            how, rows = {"length": chunk.iterations, "learns": chunk.learns}, (offline, session.truncation)
            state, metrics = finetune(state, hyper, *rows, chunk.collected, **how)
        session.after(chunk, metrics, state, actor=state.explorer.params if alone and chunk.acts else None)

    roles = {"explorer": state.explorer.params, "teacher": state.teacher} if args.online_steps else {}
    roles.pop(args.without, None)  # who is left out has learnt nothing
    played = state.explorer.params if alone else state.agent
    return session.conclude(state, export, {"policy": played} | roles)


# CQL's settings as in cql.py, and GDE's budgets; those of the point mass are ours.
MAZE = dict(critic_hidden=(256,) * 4, lagrange=True, max_target_backup=True, reward_scale=10, reward_bias=-5,
    n_steps=3, trial_every=25_000, trial_steps=5_000)  # fmt: skip
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), critic_hidden=(64, 64), actor_lr=1e-3, critic_lr=1e-3, alpha_lr=1e-3, n_steps=3,
        target_rate=0.02, offline_steps=6_000, online_steps=480_000, num_envs=48, utd_ratio=1 / 48,
        num_samples=4, max_target_backup=True, cql_weight=10, entropy_per_action=-2, trial_every=24_000,
        trial_steps=7_200, learning_starts=4_800),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    "probe": dict(
        hidden=(32, 32), critic_hidden=(32, 32), discount=0.9, actor_lr=3e-3, critic_lr=3e-3, alpha_lr=3e-3,
        target_rate=0.05, entropy_per_action=-3, cql_weight=0.01, num_samples=4, offline_steps=0, n_steps=2,
        online_steps=3000, num_envs=8, rho_steps=1_600, trial_every=160, trial_steps=96, learning_starts=160),
    ("halfcheetah-sparse", "ant-sparse"): dict(offline_steps=0),
    "antmaze": MAZE,
    "maze2d": dict(**MAZE, offline_steps=500_000),
    "kitchen": dict(hidden=(512,) * 3, critic_hidden=(512,) * 3, importance_sampling=False,
        max_target_backup=True, reward_bias=-5, end_reward=jnp.inf, offline_steps=500_000),
    ("door", "hammer", "pen", "relocate"): dict(hidden=(512,) * 2, critic_hidden=(512,) * 3, cql_weight=1,
        max_target_backup=True, offline_steps=20_000),
    ("door-binary", "pen-binary", "relocate-binary"): dict(reward_scale=10, reward_bias=5, end_reward=0),
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
