"""GDE on IQL: guided decoupled exploration; one policy explores, one exploits, the best one so far guides.

Offline this is IQL (iql.py). As the online phase begins, three policies start from the one that was learnt:

- the explorer, which acts. It climbs Q, held near the teacher: it descends
  -Q(s, a) + rho * KL(teacher, explorer), a drawn from it. rho falls linearly to 0 over the phase.
- the exploiter, which goes on with IQL's own loss, from what the explorer finds.
- the teacher, which learns nothing. A trial begins every `--trial-every` steps and lasts `--trial-steps`. A
  frozen copy of the exploiter plays it from fresh starts. If its return is the best so far, this copy
  becomes the teacher.

The steps of these trials count as online steps, and their rows are stored like all others. Values are learnt
from online rows alone, with returns of `--n-steps` steps. What is evaluated and saved as the policy is the
exploiter. The paper is "Guided decoupled exploration for offline reinforcement learning fine-tuning".

Departures. There is no official code. The explorer's Q is that of IQL's policy, the least of the target
critics, as in an unofficial code (fuyw/jrlzoo); its entropy term is not in the paper and not here. The
divergence is exact, where that code draws one sample. The paper leaves open when a trial takes place and how
its return is measured: here it begins a cycle, so the first one measures what was learnt offline, and the
exploiter plays its mean. `--trial-steps` in locomotion, which the paper does not tell, is one episode.

    python algos/gde_iql.py
    python algos/gde_iql.py --env hopper --dataset ooo/hopper/medium-v0 --init-from RUN --offline-steps 0
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
from ooo_rl.data.runs.bounds import Bounds, Fraction, Layers, NonNegative, Size, Steps, With
from ooo_rl.data.runs.online_change import online_hyper
from ooo_rl.data.runs.session import Phase, Result, Session, Static, scan_mean, start_online
from ooo_rl.data.runs.settings import Experiment, Traced, UsageError, launch


@struct.dataclass
class Hyper(Traced):
    """Settings that are traced, not compiled in: one value per run, so each can be swept in one program."""

    actor_lr: NonNegative = 3e-4
    """learning rate of the policies"""
    critic_lr: NonNegative = 3e-4
    """learning rate of the two critics"""
    value_lr: NonNegative = 3e-4
    """learning rate of the value function"""
    target_rate: Fraction = 0.005
    """share of the critics that goes into their targets at each update"""
    expectile: Annotated[float, Bounds(above=0, below=1)] = 0.7
    """expectile of the value regression: 0.5 is the mean, towards 1 the maximum over the data's actions"""
    temperature: NonNegative = 3.0
    """beta: how sharply the exploiter prefers advantageous actions; 0 is behaviour cloning"""
    rho: NonNegative = 0.3
    """weight of the explorer's divergence from the teacher at first; it falls linearly to 0 (--rho-steps)"""


@dataclass(frozen=True)
class Args(Experiment):
    """GDE: train offline with IQL, then let an explorer, an exploiter and a teacher share the work online."""

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
    return_range: Annotated[NonNegative, With("dataset")] = 0.0
    """scale rewards so that the dataset's returns span this much (IQL: 1000 in locomotion); 0: do not"""
    hidden: Layers = (256, 256)
    """units of the hidden layers of all networks"""
    actor_decay: Literal["auto", "none", "cosine"] = "auto"
    """schedule of the policy's learning rate over offline steps; auto: cosine to 0 without online steps"""
    dropout: Annotated[float, Bounds(at_least=0, below=1)] = 0.0
    """dropout rate in the exploiter's hidden layers"""
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


def divergence(teacher, explorer) -> jax.Array:
    """KL(teacher, explorer) [...] of two Gaussians, each given by its mean and log standard deviation."""
    (mean, log_std), (own_mean, own_log_std) = teacher, explorer
    spread = jnp.exp(2 * (log_std - own_log_std)) + ((mean - own_mean) / jnp.exp(own_log_std)) ** 2
    return jnp.sum(own_log_std - log_std + 0.5 * (spread - 1), axis=-1)


def explorer_loss(params, nets, critic, teacher, obs, rho, key):
    """-Q at the explorer's actions, and rho times its divergence from the teacher: GDE, equation (5).

    The second result is the divergence alone.
    """
    own, guide = nets.actor.apply(params, obs), nets.actor.apply(teacher, obs)
    q = nets.critic.apply(critic, obs, act(nets, params, obs, key)).min(axis=0)
    kl = divergence(guide, own).mean()
    return -q.mean() + rho * kl, kl


@struct.dataclass
class Trial:
    """The tally of a trial, and the best one so far."""

    counts: jax.Array  # [num_envs] whether the running episode belongs to the trial
    total: jax.Array  # [] sum of the rewards of the trial's episodes
    episodes: jax.Array  # [] number of the trial's episodes
    best: jax.Array  # [] the largest mean return of a trial; -inf before the first


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


def decouple(static: Static, state: State) -> State:
    """Before the first environment step: explorer and teacher become copies of the policy so far."""
    explorer, teacher, tried = (jax.tree.map(jnp.copy, state.agent.actor.params) for _ in range(3))
    return state.replace(explorer=Learner.create(explorer), teacher=teacher, tried=tried)


def init_state(static: Static, key: jax.Array) -> State:
    key, agent_key, env_key = jax.random.split(key, 3)
    row, zero = n_step.linked(static.example, jnp.float32(0)), jnp.float32(0)
    env_state, ring = start_online(static._replace(example=row), env_key)
    trial = Trial(jnp.zeros(static.args.num_envs, bool), zero, zero, jnp.float32(-jnp.inf))
    agent = init_agent(static.nets, static.example, agent_key)
    return decouple(static, State(agent, None, None, None, trial, env_state, ring, key))


def lengths(args: Args) -> tuple[int, int]:
    """Steps of all environments at once: of a cycle, and of the trial with which it begins."""
    return math.ceil(args.trial_every / args.num_envs), math.ceil(args.trial_steps / args.num_envs)


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


def guided_update(static: Static, hyper: Hyper, agent: Agent, explorer: Learner, teacher, rho, batch, key):
    """An online gradient step of IQL, whose policy is the exploiter, and one of the explorer."""
    update_key, explorer_key = jax.random.split(key)
    scaled = hyper.replace(reward_scale=1.0, reward_bias=0.0)  # n-step returns are so already
    learnt, metrics = update(static.nets, scaled, agent, batch, update_key)
    if static.args.without == "explorer":
        return (learnt, explorer), metrics
    given = static.nets, agent.target_critic, teacher, batch.obs, rho, explorer_key
    (loss_e, kl), explorer = explorer.descend(explorer_loss, hyper.actor_lr, *given, has_aux=True)
    return (learnt, explorer), {**metrics, "explorer_loss": loss_e, "divergence": kl}


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


# as in iql.py
def make_nets(session: Session) -> Nets:
    """The networks."""
    args = session.args
    return Nets(
        Actor(args.hidden, session.action_size, args.dropout), Critic(args.hidden), Value(args.hidden)
    )


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("gde_iql", args, make_plan)
    args, offline, hyper = session.args, session.offline, session.scaled_to(session.args.return_range)
    n_step.check_share(args, session.card)
    if args.online_steps and lengths(args)[1] < session.env.horizon:
        session.console.print(f"a trial has {lengths(args)[1]} steps, an episode {session.env.horizon}")
    nets, functions = make_nets(session), (init_state, pretrain_chunk, decouple, finetune_chunk)
    initialise, pretrain, begin, finetune = session.compile(session.static(nets), *functions)
    state = session.begin(initialise(session.keys), partial(act, nets))

    alone = args.online_steps and args.without == "exploiter"
    for chunk in session.chunks():
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, chunk.start, length=chunk.iterations)
        else:
            state = begin(state) if chunk.first else state
            how, rows = {"length": chunk.iterations, "learns": chunk.learns}, (offline, session.truncation)
            state, metrics = finetune(state, hyper, *rows, chunk.collected, **how)
        session.after(chunk, metrics, state, actor=state.explorer.params if alone and chunk.acts else None)

    roles = {"explorer": state.explorer.params, "teacher": state.teacher} if args.online_steps else {}
    roles.pop(args.without, None)  # who is left out has learnt nothing
    played = state.explorer.params if alone else state.agent
    return session.conclude(state, export, {"policy": played} | roles)


# The paper's settings in locomotion and AntMaze, elsewhere those of iql.py; the point mass's are ours.
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), expectile=0.9, temperature=3, actor_lr=1e-3, critic_lr=1e-3, value_lr=1e-3,
        target_rate=0.02, offline_steps=6_000, online_steps=960_000, num_envs=48, utd_ratio=1 / 48, n_steps=3,
        trial_every=24_000, trial_steps=7_200, learning_starts=4_800),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    "probe": dict(
        hidden=(32, 32), discount=0.9, expectile=0.98, temperature=20, actor_lr=3e-3, critic_lr=3e-3,
        value_lr=3e-3, target_rate=0.05, actor_decay="none", offline_steps=0, online_steps=3_000, num_envs=8,
        n_steps=2, rho_steps=1_600, trial_every=160, trial_steps=96, learning_starts=160),
    ("halfcheetah", "hopper", "walker2d", "ant"): dict(return_range=1000),
    ("halfcheetah-sparse", "ant-sparse"): dict(return_range=0, offline_steps=0),
    "antmaze": dict(
        expectile=0.9, temperature=10, reward_bias=-1, n_steps=3, trial_every=25_000, trial_steps=5_000),
    "antmaze-large-goal-missing": dict(offline_steps=500_000),
    "maze2d": dict(
        expectile=0.9, temperature=3, reward_bias=-1, offline_steps=500_000, n_steps=3, trial_every=25_000,
        trial_steps=5_000),
    "kitchen": dict(expectile=0.7, temperature=0.5, dropout=0.1, reward_bias=-4, end_reward=4),
    ("hammer", "door", "pen", "relocate"): dict(expectile=0.7, temperature=0.5, dropout=0.1),
    ("door-binary", "pen-binary", "relocate-binary"): dict(
        expectile=0.8, temperature=3, offline_steps=25_000),
    "hammer-truncated-expert": dict(expectile=0.8, temperature=3, dropout=0, offline_steps=50_000),
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
