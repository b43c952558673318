"""JSRL: jump-start reinforcement learning on IQL; a guide begins each episode (Uchendu et al., 2204.02372).

Offline this is IQL (iql.py). As the online phase begins, the policy becomes the guide, which learns no more,
and an exploration agent starts: afresh, or from the same parameters (`--start warm`). In each episode the
guide acts for the first h steps, the exploration policy for the rest. So it begins where the guide has
brought it, and need not find the way there. h falls from the mean length of the guide's own episodes to 0 in
`--stages` steps. The combined policy is played at every evaluation (`--eval-every`). Where the mean return of
the last `--window` ones is no worse than the best such mean less `--tolerance` of it, the next stage begins.
`--schedule random` draws h for each episode instead. The agent learns by IQL's losses, from batches that are
three quarters online rows.

Departures. There is no official code; settings are those of the paper's appendix, and what it leaves open is
as in two public codes (steventango/jumpstart-rl, LaurenYTaylor/jsrl-CORL). The guide acts by its mean. Cold,
critics and value start afresh, too. The evaluations of a run (`eval/return`) play the exploration policy
alone, which is what is to be had in the end.

    python algos/jsrl.py
    python algos/jsrl.py --offline-steps 0 --dataset own --init-from runs/iql/point-mass-wall/mine
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
    tolerance: NonNegative = 0.05
    """a stage ends where the mean return is no worse than the best, less this share of its size"""


@dataclass(frozen=True)
class Args(Experiment):
    """JSRL: train offline with IQL, then let that policy guide a second one online."""

    eval_every: Steps = 10_000
    """steps between evaluations, online of both policies together, too; 0: a quarter of the phase"""
    buffer_size: Steps = 100_000
    """online rows kept, a multiple of num_envs; 0: all"""
    offline_ratio: Annotated[float, Bounds(at_most=1)] = 0.25
    """share of each online batch that comes from the offline rows; below 0: their share of all rows"""
    offline_steps: Steps = 1_000_000
    """gradient steps on the dataset"""
    online_steps: Steps = 1_000_000
    """environment steps of fine-tuning"""
    start: Literal["cold", "warm"] = "cold"
    """the exploration agent begins afresh, or with what was learnt offline"""
    schedule: Literal["curriculum", "random"] = "curriculum"
    """the guide's steps: fewer from stage to stage, or drawn for each episode"""
    stages: Annotated[int, Bounds(at_least=2)] = 10
    """stages of the curriculum; in the last one the guide has no step"""
    window: Size = 5
    """evaluations whose mean return is compared with the best such mean"""
    guide_episodes: Size = 100
    """episodes whose mean length is the guide's number of steps in the first stage"""
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


def combined(nets: Nets, guide: dict, actor: dict, obs, guided, key=None) -> jax.Array:
    """Actions [N, A]: the guide's mean where `guided` [N], else the policy's; with a key a sample of it."""
    return jnp.where(guided[:, None], act(nets, guide, obs), act(nets, actor, obs, key))


@struct.dataclass
class Curriculum:
    """How long the guide acts, and what decides it."""

    longest: jax.Array  # [] its steps in the first stage
    stage: jax.Array  # [] from 0 on
    recent: jax.Array  # [window] mean returns of the combined policy, the last one first; -inf: not yet
    best: jax.Array  # [] the best mean of `window` such returns


def stage_steps(args: Args, course: Curriculum) -> jax.Array:
    """Steps of the guide [] in each episode of this stage."""
    return course.longest * (1 - course.stage / (args.stages - 1))


def guide_steps(args: Args, course: Curriculum, key: jax.Array) -> jax.Array:
    """Steps of the guide [num_envs] in episodes that begin now."""
    if args.schedule == "random":
        return course.longest * jax.random.uniform(key, (args.num_envs,))
    return jnp.full(args.num_envs, stage_steps(args, course))


def advance(args: Args, hyper: Hyper, course: Curriculum, mean_return: jax.Array) -> Curriculum:
    """The curriculum after one more evaluation [] of the combined policy."""
    recent = jnp.roll(course.recent, 1).at[0].set(mean_return)
    mean = recent.mean()  # -inf before there are as many as the window holds
    worse = mean < course.best - hyper.tolerance * jnp.abs(course.best)  # at first not: than -inf, or NaN
    stage = jnp.minimum(course.stage + (jnp.isfinite(mean) & ~worse), args.stages - 1)
    return course.replace(stage=stage, recent=recent, best=jnp.maximum(course.best, mean))


def last_stage(args: Args, evaluations: int) -> int:
    """The last stage that so many evaluations online can reach: with a full window each one ends a stage."""
    return max(0, min(evaluations - args.window + 1, args.stages - 1))


@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    agent: Agent
    guide: dict
    course: Curriculum
    elapsed: jax.Array  # [num_envs] steps of the episodes under way
    guided: jax.Array  # [num_envs] and the guide's steps in them
    env_state: envs.State | None
    ring: Transition | None
    key: jax.Array


def init_state(static: Static, key: jax.Array) -> State:
    key, agent_key, env_key = jax.random.split(key, 3)
    env_state, ring = start_online(static, env_key)
    agent, none = init_agent(static.nets, static.example, agent_key), jnp.float32(-jnp.inf)
    course = Curriculum(jnp.float32(0), jnp.int32(0), jnp.full(static.args.window, none), none)
    elapsed, guided = jnp.zeros(static.args.num_envs, jnp.int32), jnp.zeros(static.args.num_envs)
    guide = jax.tree.map(jnp.copy, agent.actor.params)
    return State(agent, guide, course, elapsed, guided, env_state, ring, key)


def jump_start(static: Static, state: State) -> State:
    """Before the first environment step: the policy becomes the guide, and the curriculum begins."""
    args, guide = static.args, jax.tree.map(jnp.copy, state.agent.actor.params)
    key, agent_key, play_key, steps_key = jax.random.split(state.key, 4)
    cold = args.start == "cold"
    agent = init_agent(static.nets, static.example, agent_key) if cold else state.agent
    played = rollout(static.env, lambda obs: act(static.nets, guide, obs), play_key, args.guide_episodes)
    course = state.course.replace(longest=played["length"].mean())
    guided = guide_steps(args, course, steps_key)
    return state.replace(agent=agent, guide=guide, course=course, guided=guided, key=key)


def assess(static: Static, state: State, hyper: Hyper) -> State:
    """Plays `--eval-episodes` episodes of the combined policy, by means alone; the curriculum goes on."""
    args, env, nets = static.args, static.env, static.nets
    key, play_key = jax.random.split(state.key)
    limit, episodes = stage_steps(args, state.course), args.eval_episodes
    start = jax.vmap(env.reset)(jax.random.split(play_key, episodes))

    def step(carry, elapsed):
        env_state, alive, total = carry
        guided = jnp.full(episodes, elapsed < limit)
        action = combined(nets, state.guide, state.agent.actor.params, env_state.obs, guided)
        reached = jax.vmap(env.step)(env_state, action)
        total = total + jnp.where(alive > 0, reached.reward, 0.0)
        return (reached, alive * (1 - reached.done), total), None

    carry = start, jnp.ones(episodes), jnp.zeros(episodes)
    (_, _, total), _ = jax.lax.scan(step, carry, jnp.arange(env.horizon))
    return state.replace(course=advance(args, hyper, state.course, total.mean()), key=key)


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


def finetune_chunk(static: Static, state: State, hyper: Hyper, offline, added, *, length: int):
    """`length` steps of all environments, gradient steps after each; `added` [] online rows come before."""
    args, num_updates = static.args, round(static.args.num_envs * static.args.utd_ratio)

    def step(carry):
        state, added = carry
        now = online_hyper(args, hyper, added)
        key, act_key, reset_key, steps_key, sample_key, update_key = jax.random.split(state.key, 6)
        obs, guided = state.env_state.obs, state.elapsed < state.guided
        action = combined(static.nets, state.guide, state.agent.actor.params, obs, guided, act_key)
        env_state, reached = envs.step_all(static.env, state.env_state, action, reset_key)
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, rows, added, reached.info["broken"])
        added, over = added + args.num_envs, reached.done > 0
        state = state.replace(
            elapsed=jnp.where(over, 0, state.elapsed + 1),
            guided=jnp.where(over, guide_steps(args, state.course, steps_key), state.guided),
        )

        shape, keys = (num_updates, args.batch_size), jax.random.split(update_key, num_updates)
        samples = sample_batches(offline, ring, added, online_ratio(args, added), shape, sample_key), keys
        learn = lambda agent, sample: update(static.nets, now, agent, *sample)  # noqa: E731
        agent, metrics = jax.lax.scan(learn, state.agent, samples)
        state = state.replace(agent=agent, env_state=env_state, ring=ring, key=key)
        jump = {"guided": guided.mean(), "stage": jnp.float32(state.course.stage)}
        return (state, added), jax.tree.map(jnp.mean, metrics) | jump | envs.tally(reached)

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


# as in iql.py
def make_plan(args: Args) -> list[Phase]:
    """Pre-training, then fine-tuning."""
    return [Phase("offline", 0, args.offline_steps), Phase("online", 0, args.online_steps, acts=True)]


# as in iql.py
def make_nets(session: Session) -> Nets:
    """The networks."""
    args = session.args
    return Nets(
        Actor(args.hidden, session.action_size, args.dropout), Critic(args.hidden), Value(args.hidden)
    )


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("jsrl", args, make_plan)
    args, offline, hyper = session.args, session.offline, session.scaled_to(session.args.return_range)
    nets, functions = make_nets(session), (init_state, pretrain_chunk, jump_start, finetune_chunk, assess)
    initialise, pretrain, begin, finetune, look = session.compile(session.static(nets), *functions)
    state = session.begin(initialise(session.keys), partial(act, nets))
    evaluations = sum(chunk.evaluate for chunk in session.plan if chunk.acts)
    last = last_stage(args, evaluations)
    if args.schedule == "curriculum" and evaluations and last < args.stages - 1:
        session.console.print(
            f"{evaluations} evaluations online lead to stage {last} of {args.stages - 1} at most: lower "
            "--eval-every or --window to get further"
        )

    for chunk in session.chunks():
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, chunk.start, length=chunk.iterations)
        else:
            state = begin(state) if chunk.first else state
            state, metrics = finetune(state, hyper, offline, chunk.collected, length=chunk.iterations)
            if chunk.evaluate and args.schedule == "curriculum":
                state = look(state, online_hyper(args, hyper, chunk.start + chunk.length))
        session.after(chunk, metrics, state)

    guide = {"guide": state.guide} if args.online_steps else {}
    return session.conclude(state, export, {"policy": state.agent, **guide})


# IQL's settings by environment family; those of the point mass are ours.
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), expectile=0.9, temperature=3, actor_lr=1e-3, critic_lr=1e-3, value_lr=1e-3,
        target_rate=0.02, offline_steps=6_000, online_steps=960_000, num_envs=48, utd_ratio=1 / 48,
        buffer_size=96_000, eval_every=48_000),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    "probe": dict(
        hidden=(32, 32), discount=0.9, expectile=0.98, temperature=20, actor_lr=3e-3, critic_lr=3e-3,
        value_lr=3e-3, target_rate=0.05, actor_decay="none", offline_steps=0, online_steps=3_000,
        guide_episodes=4),
    ("halfcheetah", "hopper", "walker2d", "ant"): dict(return_range=1000),
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
