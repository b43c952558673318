"""GDE on TD3+BC: guided decoupled exploration; one policy explores, one exploits, the best one so far guides.

Offline this is TD3+BC (td3_bc.py). Online it is GDE as in gde_iql.py: an explorer acts, and climbs Q, held
near a teacher; an exploiter goes on with TD3+BC's own loss; every `--trial-every` steps the exploiter plays
`--trial-steps` steps from fresh starts, as it is at their first, and what played becomes the teacher where
its return is the best so far. The critics' targets ask the exploiter. Values are learnt from online rows
alone, with returns of `--n-steps` steps. What is evaluated and saved as the policy is the exploiter.

Departures. The paper does not say what its divergence is where policies have no distribution. They act with
noise of the same standard deviation `--exploration-noise`. So they are Gaussians, whose divergence is half of
the squared distance of their actions in units of it. The explorer's Q1 is not scaled, as equation (5) has
it; the exploiter's is. The explorer moves when policies do, `--policy-every`. All else is as in gde_iql.py
and td3_bc.py.

    python algos/gde_td3_bc.py
    python algos/gde_td3_bc.py --env hopper --init-from runs/td3_bc/hopper/mine --offline-steps 0
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
from ooo_rl.data.runs.bounds import Bounds, Fraction, Layers, NonNegative, Positive, Size, Steps, With
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
    target_rate: Fraction = 0.005
    """share of policy and critics that goes into their targets at each update"""
    alpha: NonNegative = 2.5
    """weight of Q, divided by its mean size, against cloning; 0 is behaviour cloning"""
    policy_every: Annotated[float, Bounds(at_least=1, whole=True)] = 2.0
    """gradient steps of the critics for each one of the policy and the targets"""
    rho: NonNegative = 0.3
    """weight of the explorer's divergence from the teacher at first; it falls linearly to 0 (--rho-steps)"""
    exploration_noise: Annotated[Positive, With("online_steps")] = 0.1
    """standard deviation of the noise added to actions online"""
    target_noise: NonNegative = 0.2
    """and of that added to the target policy's actions"""
    target_noise_clip: NonNegative = 0.5
    """bound of the latter noise"""


@dataclass(frozen=True)
class Args(Experiment):
    """GDE: train offline with TD3+BC, then let explorer, exploiter and teacher share the work online."""

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
    normalize_obs: bool = True
    """standardise observations with the dataset's mean and standard deviation"""
    hidden: Layers = (256, 256)
    """units of the policies' hidden layers"""
    critic_hidden: Layers = (256, 256)
    """units of the critics' hidden layers"""
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


# as in td3_bc.py
class Standardise(nn.Module):
    """Observations less `mean`, over `std`. Both lie beside the parameters, and no loss moves them.

    So they go where a network goes: into its target, a checkpoint, another run, a policy file.
    """

    @nn.compact
    def __call__(self, obs):
        mean = self.variable("statistics", "mean", jnp.zeros, obs.shape[-1])
        std = self.variable("statistics", "std", jnp.ones, obs.shape[-1])
        return (obs - jax.lax.stop_gradient(mean.value)) / jax.lax.stop_gradient(std.value)


# as in td3_bc.py
class Actor(nn.Module):
    """Deterministic policy: actions [..., A]."""

    hidden: tuple[int, ...]
    action_size: int

    @nn.compact
    def __call__(self, obs):
        return nn.tanh(MLP((*self.hidden, self.action_size))(Standardise()(obs)))


# as in td3_bc.py
class Critic(nn.Module):
    """Two independent Q functions: [2, B]."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):
        ensemble = nn.vmap(MLP, {"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
        rows = jnp.concatenate([Standardise()(obs), action], axis=-1)
        return ensemble((*self.hidden, 1))(rows).squeeze(-1)


Nets = namedtuple("Nets", "actor critic")  # modules; their parameters are in the state


# as in td3_bc.py
@struct.dataclass
class Agent:
    """What learns, each with its optimiser, and slow copies of both."""

    actor: Learner
    critic: Learner
    target_actor: dict
    target_critic: dict


# as in td3_bc.py
def statistics(offline: Transition) -> dict:
    """What `Standardise` holds: mean and standard deviation + 0.001 [D] of the rows' observations."""
    constant = (offline.obs == offline.obs[0]).all(axis=0)
    std = jnp.where(constant, 1.0, offline.obs.std(axis=0) + 1e-3)
    return {"Standardise_0": {"mean": offline.obs.mean(axis=0), "std": std}}


# as in td3_bc.py
def init_agent(static: Static, offline: Transition | None, key: jax.Array) -> Agent:
    nets, obs, action = static.nets, static.example.obs[None], static.example.action[None]
    actor_key, critic_key = jax.random.split(key)
    actor, critic = nets.actor.init(actor_key, obs), nets.critic.init(critic_key, obs, action)
    if static.args.normalize_obs and offline is not None:
        actor, critic = ({**net, "statistics": statistics(offline)} for net in (actor, critic))
    targets = jax.tree.map(jnp.copy, (actor, critic))
    return Agent(Learner.create(actor), Learner.create(critic), *targets)


# as in td3_bc.py
def act(nets: Nets, actor: dict, obs: jax.Array, key=None, noise=0.0, bound=jnp.inf) -> jax.Array:
    """Actions [..., A] for observations [..., obs]: the policy's own without a key; with one, noise is added.

    `noise` is its standard deviation, `bound` how far it reaches; the sum is clipped.
    """
    action = nets.actor.apply(actor, obs)
    if key is None:
        return action
    return jnp.clip(action + jnp.clip(noise * jax.random.normal(key, action.shape), -bound, bound), -1.0, 1.0)


# as in td3_bc.py
def export(actor: dict) -> policy.Policy:
    """The policy without its noise as a file that NumPy can run, on observations as the environment gives."""
    scale = actor["statistics"]["Standardise_0"]
    return policy.mlp(actor["params"]["MLP_0"], obs_mean=scale["mean"], obs_std=scale["std"])


# as in td3.py
def critic_loss(params, nets, obs, action, target_q):
    """Squared Bellman error of both critics, summed over them: TD3, algorithm 1."""
    q = nets.critic.apply(params, obs, action)
    return jnp.mean(jnp.sum((q - target_q) ** 2, axis=0))


# as in td3_bc.py
def actor_loss(params, nets, critic, obs, action, alpha):
    """-lambda * Q1 at the policy's actions, and their squared distance to the data's: equations (3) and (5).

    The second result is the distance alone.
    """
    own = nets.actor.apply(params, obs)
    q = nets.critic.apply(critic, obs, own)[0]
    weight = alpha / jax.lax.stop_gradient(jnp.abs(q).mean())
    cloning = jnp.mean((own - action) ** 2)
    return -weight * q.mean() + cloning, cloning


# as in td3_bc.py
def update(static: Static, hyper: Hyper, agent: Agent, batch: Transition, key: jax.Array):
    """One gradient step of the critics and, when it is their turn, of policy and targets."""
    nets, rows, noise = static.nets, (batch.obs, batch.action), (hyper.target_noise, hyper.target_noise_clip)
    next_action = act(nets, agent.target_actor, batch.next_obs, key, *noise)
    next_q = nets.critic.apply(agent.target_critic, batch.next_obs, next_action).min(axis=0)
    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = task_reward + hyper.discount * batch.discount * next_q
    loss_q, critic = agent.critic.descend(critic_loss, hyper.critic_lr, nets, *rows, target_q)

    given = nets, critic.params, *rows, hyper.alpha
    (loss_a, cloning), actor = agent.actor.descend(actor_loss, hyper.actor_lr, *given, has_aux=True)
    targets = [
        {**old, "params": optax.incremental_update(new.params["params"], old["params"], hyper.target_rate)}
        for new, old in ((actor, agent.target_actor), (critic, agent.target_critic))
    ]

    # Taken at every step, kept at some: seeds that are vmapped would take both ways of a condition anyway.
    due = critic.opt.count % jnp.int32(hyper.policy_every) == 0
    moved, waiting = Agent(actor, critic, *targets), agent.replace(critic=critic)
    metrics = {"actor_loss": loss_a, "critic_loss": loss_q, "cloning_loss": cloning, "q": target_q.mean()}
    return jax.tree.map(partial(jnp.where, due), moved, waiting), metrics


def explorer_loss(params, nets, critic, teacher, obs, rho, noise):
    """-Q1 of the explorer, and rho times its divergence from the teacher: GDE, equation (5).

    Both act with Gaussian noise of standard deviation `noise`. The second result is the divergence alone.
    """
    own, guide = nets.actor.apply(params, obs), nets.actor.apply(teacher, obs)
    q = nets.critic.apply(critic, obs, own)[0]
    kl = 0.5 * jnp.mean(jnp.sum(((own - guide) / noise) ** 2, axis=-1))
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


def init_state(static: Static, offline: Transition | None, key: jax.Array) -> State:
    key, agent_key, env_key = jax.random.split(key, 3)
    row, zero = n_step.linked(static.example, jnp.float32(0)), jnp.float32(0)
    env_state, ring = start_online(static._replace(example=row), env_key)
    trial = Trial(jnp.zeros(static.args.num_envs, bool), zero, zero, jnp.float32(-jnp.inf))
    agent = init_agent(static, offline, agent_key)
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


def play(static: Static, hyper: Hyper, state: State, added) -> tuple[State, dict]:
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
    actor = exploiter if args.without == "explorer" else explorer
    explored = act(nets, actor, obs, act_key, hyper.exploration_noise)
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


def pretrain_chunk(static: Static, state: State, hyper: Hyper, offline: Transition, *, length: int):
    """`length` gradient steps on the offline rows."""

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        index = jax.random.randint(sample_key, (static.args.batch_size,), 0, buffer.size(offline))
        agent, metrics = update(static, hyper, state.agent, buffer.take(offline, None, index), update_key)
        return state.replace(agent=agent, key=key), metrics

    return scan_mean(step, state, length)


def guided_update(static: Static, hyper: Hyper, agent: Agent, explorer: Learner, teacher, rho, batch, key):
    """An online gradient step of TD3+BC, whose policy is the exploiter, and when due one of the explorer."""
    scaled = hyper.replace(reward_scale=1.0, reward_bias=0.0)  # n-step returns are so already
    learnt, metrics = update(static, scaled, agent, batch, key)
    if static.args.without == "explorer":
        return (learnt, explorer), metrics
    given = static.nets, learnt.critic.params, teacher, batch.obs, rho, hyper.exploration_noise
    (loss_e, kl), moved = explorer.descend(explorer_loss, hyper.actor_lr, *given, has_aux=True)
    due = learnt.critic.opt.count % jnp.int32(hyper.policy_every) == 0
    explorer = jax.tree.map(partial(jnp.where, due), moved, explorer)
    return (learnt, explorer), {**metrics, "explorer_loss": loss_e, "divergence": kl}


def finetune_chunk(static: Static, state: State, hyper, offline, truncation, added, *, length, learns: bool):
    """`length` steps of all environments, with gradient steps if it `learns`; `added` [] rows come before."""
    args, num_updates = static.args, round(static.args.num_envs * static.args.utd_ratio)

    def step(carry):
        state, added = carry
        now = online_hyper(args, hyper, added)
        left = jnp.maximum(0.0, 1 - added / (args.rho_steps or args.online_steps))
        rho = now.rho * left if args.teacher != "none" else 0.0
        state, metrics = play(static, now, state, added)
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


# as in awac.py
def make_nets(session: Session) -> Nets:
    """The networks."""
    args = session.args
    return Nets(Actor(args.hidden, session.action_size), Critic(args.critic_hidden))


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("gde_td3_bc", args, make_plan)
    args, offline, hyper = session.args, session.offline, session.hyper
    n_step.check_share(args, session.card)
    if args.online_steps and lengths(args)[1] < session.env.horizon:
        session.console.print(f"a trial has {lengths(args)[1]} steps, an episode {session.env.horizon}")
    nets, functions = make_nets(session), (init_state, pretrain_chunk, decouple, finetune_chunk)
    initialise, pretrain, begin, finetune = session.compile(session.static(nets), *functions)
    state = session.begin(initialise(offline, session.keys), partial(act, nets))

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


# TD3+BC's settings and GDE's budgets; those of the point mass are ours.
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), critic_hidden=(64, 64), actor_lr=1e-3, critic_lr=1e-3, target_rate=0.02,
        offline_steps=6_000, online_steps=960_000, num_envs=48, utd_ratio=1 / 48, n_steps=3,
        trial_every=24_000, trial_steps=7_200, learning_starts=4_800),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    "probe": dict(
        hidden=(32, 32), critic_hidden=(32, 32), discount=0.9, actor_lr=3e-3, critic_lr=3e-3,
        target_rate=0.05, alpha=50, offline_steps=0, online_steps=3_000, num_envs=8, n_steps=2,
        rho_steps=1_600, trial_every=160, trial_steps=96, learning_starts=160),
    ("halfcheetah-sparse", "ant-sparse"): dict(offline_steps=0),
    "antmaze": dict(reward_bias=-1, n_steps=3, trial_every=25_000, trial_steps=5_000),
    "maze2d": dict(
        reward_bias=-1, offline_steps=500_000, n_steps=3, trial_every=25_000, trial_steps=5_000),
    "kitchen": dict(reward_bias=-4, end_reward=4),
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
