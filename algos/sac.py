"""SAC: soft actor-critic, online, and SAC-ft, which fine-tunes what CQL learnt offline (Haarnoja et al., arXiv 1812.05905).

The policy maximises reward and entropy together. Two critics are fitted to r + discount * (min Q(s', a') - alpha * log pi(a'|s')),
a' drawn from the policy; the policy climbs min Q(s, a) - alpha * log pi(a|s) through its own noise; and alpha is moved until the
policy's entropy is what was asked for. Nothing holds back the values of actions that no data show, so offline SAC is no method:
it is here to be compared with. Its uses:

- SAC from scratch: `--offline-steps 0`, the default; with `--dataset` the buffer starts with those rows.
- SAC-ft: `--pretrained runs/cql/<env>/<name>` starts from the agents of a run of cql.py (policy, critics, targets, alpha).

Departures from the official code (rail-berkeley/softlearning) and jaxrl's: environments act side by side (`--num-envs`), gradients
of critics, policy and alpha are taken in this order, each with what the one before has changed; networks start orthogonal, their
last layers small, with standard deviations of 1/e before the squashing, as in Cal-QL's code.

    python algos/sac.py --env maze2d-umaze-dense
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import tyro
from flax import struct

import envs
from data import buffer, cli, report
from data.buffer import Transition
from data.evaluation import Evaluator
from data.program import EVERYWHERE, RUNS, Compiled, mesh_for, orthogonal, place, scan_mean
from data.run import Run, load_agents


@struct.dataclass
class Hyper:
    """Settings that are traced, not compiled in: one value per run, so each can be swept in one program."""

    # optimisation
    discount: float = 0.99
    """discount factor"""
    actor_lr: float = 3e-4
    """learning rate of the policy"""
    critic_lr: float = 3e-4
    """learning rate of the two critics"""
    alpha_lr: float = 3e-4
    """learning rate of the entropy's weight alpha; 0 keeps --init-alpha"""
    target_rate: float = 0.005
    """share of the critics that goes into their targets at each update"""
    reward_scale: float = 1.0
    """task rewards are multiplied by this"""
    reward_bias: float = 0.0
    """and this is added"""
    # SAC
    entropy_per_action: float = -1.0
    """entropy that alpha aims at, for each dimension of the action: -1 in the paper, -0.5 in jaxrl and RLPD"""
    backup_entropy: float = 1.0
    """weight of the entropy in the critics' target: 1 is SAC, 0 leaves it out (CQL, Cal-QL)"""


@dataclass(frozen=True)
class Args:
    """SAC: train online, from scratch or from a CQL agent."""

    # experiment
    env: str = "auto"
    """environment to act in; auto: the point mass, or none if a dataset is named and there are no online steps"""
    num_seeds: int = 5
    """seeds, trained side by side"""
    seed: int = 0
    """first seed"""
    eval_every: int = 0
    """steps of the phase between evaluations; 0: a quarter of each phase"""
    eval_episodes: int = 20
    """episodes of each evaluation, with the mean action"""
    eval_env: str = ""
    """evaluate in this Gymnasium environment (by id) instead of in --env"""
    checkpoint_every: int = 0
    """steps of the phase between checkpoints; 0: with each evaluation"""
    runs_dir: str = "runs"
    """folder that holds all runs"""
    name: str = ""
    """name of this run's folder; empty: the time it started"""
    resume: str = ""
    """folder of a run to go on with, from its last checkpoint; all other flags come from there"""
    physics: Literal["auto", "mjx", "mjx-warp", "mujoco"] = "auto"
    """physics engine, for environments that have one"""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """send metrics there as well as to metrics.csv"""
    sweep: tuple[str, ...] = ()
    """traced settings to sweep, e.g. intrinsic-coef=0,5 expectile=0.7,0.9: every combination, all seeds, one program"""
    max_q: float = 1e5
    """a seed whose mean Q-value is beyond this, up or down, has diverged and is stopped; no task here pays a tenth of it"""
    # data
    dataset: str = "auto"
    """Minari id, or a .hdf5 or .npz file; none: no offline data; auto: the environment's own, none with --offline-steps 0"""
    clip_actions: bool = False
    """clip dataset actions that lie outside [-1, 1] instead of refusing them"""
    export: str = ""
    """write each seed's online experience as the Minari dataset EXPORT-seed<k>-v0, e.g. ooo/my-run"""
    offline_ratio: float = -1.0
    """share of each online batch that comes from the offline rows; below 0: that of the offline rows among all"""
    # offline
    offline_steps: int = 0
    """gradient steps on the dataset"""
    pretrained: str = ""
    """folder of a run of cql.py or cal_ql.py whose agents to start from (SAC-ft)"""
    # online
    online_steps: int = 1_000_000
    """environment steps"""
    random_steps: int = 10_000
    """of these, steps of uniformly random actions and no learning at the start"""
    num_envs: int = 8
    """environments that act side by side, per seed"""
    utd_ratio: float = 1.0
    """gradient steps per environment step; num_envs * utd_ratio of them follow each step of all environments"""
    buffer_size: int = 0
    """online rows kept, a multiple of num_envs; 0: all"""
    # optimisation
    batch_size: int = 256
    """rows of a batch"""
    hidden: tuple[int, ...] = (256, 256)
    """units of the policy's hidden layers"""
    critic_hidden: tuple[int, ...] = (256, 256)
    """units of the critics' hidden layers"""
    layer_norm: bool = False
    """LayerNorm in the critics' hidden layers"""
    init_alpha: float = 1.0
    """entropy's weight alpha to start with"""
    hyper: Annotated[Hyper, tyro.conf.OmitArgPrefixes] = field(default_factory=Hyper)
    """traced settings, which --sweep can vary"""


# jaxrl's settings by environment family; those of the point mass are ours. SAC sees rewards as they are, but for goals (-1 until there).
SETTINGS = {
    "point-mass-wall": {
        "hidden": (64, 64), "critic_hidden": (64, 64), "actor_lr": 1e-3, "critic_lr": 1e-3, "alpha_lr": 1e-3, "target_rate": 0.02,
        "online_steps": 960_000, "num_envs": 48, "utd_ratio": 1 / 48, "random_steps": 4_800,
    },
    "point-mass-wall-sparse": {"reward_bias": -1.0},
    "probe": {"hidden": (32, 32), "critic_hidden": (32, 32), "online_steps": 8_000, "random_steps": 0},
    "antmaze": {"reward_bias": -1.0},
    "maze2d": {"reward_bias": -1.0, "online_steps": 500_000},
}  # fmt: skip


class MLP(nn.Module):
    """Dense layers, LayerNorm if asked, and ReLU between them; initialised orthogonally, the last layer small."""

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
        ensemble = nn.vmap(MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=self.num)
        return ensemble((*self.hidden, 1), self.layer_norm)(jnp.concatenate([obs, action], axis=-1)).squeeze(-1)


class Nets(NamedTuple):
    """The modules of an agent; their parameters are in `Agent`."""

    actor: Actor
    critic: Critic


@struct.dataclass
class Agent:
    """Parameters and Adam states of one agent."""

    actor: dict
    critic: dict
    target_critic: dict
    log_alpha: jax.Array
    actor_opt: tuple
    critic_opt: tuple
    alpha_opt: tuple


def init_agent(nets: Nets, obs_size: int, init_alpha: float, key: jax.Array) -> Agent:
    keys = jax.random.split(key)
    obs, action = jnp.zeros((1, obs_size)), jnp.zeros((1, nets.actor.action_size))
    actor, critic, log_alpha = nets.actor.init(keys[0], obs), nets.critic.init(keys[1], obs, action), jnp.log(init_alpha)
    adam = optax.scale_by_adam()
    return Agent(actor, critic, jax.tree.map(jnp.copy, critic), log_alpha, adam.init(actor), adam.init(critic), adam.init(log_alpha))


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
    """Raises alpha while the policy's entropy is below its target: SAC, equation (17), in log alpha as its code has it."""
    return -log_alpha * (log_prob + target_entropy)


def descend(params, opt, grads, learning_rate):
    """One Adam step; the learning rate is traced, so it is not part of the optimiser."""
    direction, opt = optax.scale_by_adam().update(grads, opt)
    return jax.tree.map(lambda p, d: p - learning_rate * d, params, direction), opt


def update(nets: Nets, hyper: Hyper, agent: Agent, batch: Transition, key: jax.Array):
    """One gradient step of critics, policy and alpha, in this order."""
    next_key, actor_key = jax.random.split(key)
    alpha = jnp.exp(agent.log_alpha)
    next_action, next_log_prob = sample(nets, agent.actor, batch.next_obs, next_key)
    next_v = nets.critic.apply(agent.target_critic, batch.next_obs, next_action).min(axis=0) - hyper.backup_entropy * alpha * next_log_prob
    target_q = hyper.reward_scale * batch.reward + hyper.reward_bias + hyper.discount * batch.discount * next_v
    loss_q, grads = jax.value_and_grad(critic_loss)(agent.critic, nets, batch.obs, batch.action, target_q)
    critic, critic_opt = descend(agent.critic, agent.critic_opt, grads, hyper.critic_lr)
    target_critic = optax.incremental_update(critic, agent.target_critic, hyper.target_rate)

    (loss_a, log_prob), grads = jax.value_and_grad(actor_loss, has_aux=True)(agent.actor, nets, critic, batch.obs, alpha, actor_key)
    actor, actor_opt = descend(agent.actor, agent.actor_opt, grads, hyper.actor_lr)
    grads = jax.grad(alpha_loss)(agent.log_alpha, log_prob, hyper.entropy_per_action * nets.actor.action_size)
    log_alpha, alpha_opt = descend(agent.log_alpha, agent.alpha_opt, grads, hyper.alpha_lr)

    agent = Agent(actor, critic, target_critic, log_alpha, actor_opt, critic_opt, alpha_opt)
    return agent, {"critic_loss": loss_q, "actor_loss": loss_a, "q": target_q.mean(), "alpha": alpha, "entropy": -log_prob}


def act(nets: Nets, actor: dict, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Actions [..., A] for observations [..., obs]: the squashed mean without a key, a sample with one."""
    return jnp.tanh(nets.actor.apply(actor, obs)[0]) if key is None else sample(nets, actor, obs, key)[0]


class Setup(NamedTuple):
    """What is fixed when a program is compiled."""

    args: Args
    env: envs.Env | None
    nets: Nets
    obs_size: int


@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    agent: Agent
    env_state: envs.State | None
    ring: Transition | None
    key: jax.Array


def init_state(setup: Setup, key: jax.Array) -> State:
    args = setup.args
    key, agent, env = jax.random.split(key, 3)
    env_state = ring = None
    if args.online_steps:
        env_state = jax.vmap(setup.env.reset)(jax.random.split(env, args.num_envs))
        obs, action, scalar = jnp.zeros(setup.obs_size), jnp.zeros(setup.nets.actor.action_size), jnp.float32(0)
        ring = buffer.empty(Transition(obs, action, scalar, obs, scalar), args.buffer_size or args.online_steps)
    return State(init_agent(setup.nets, setup.obs_size, args.init_alpha, agent), env_state, ring, key)


def sample_batches(args: Args, offline: Transition | None, ring: Transition | None, added: jax.Array, num: int, key: jax.Array):
    """`num` batches [num, batch_size, ...], each with the share --offline-ratio of offline rows, or uniform over all rows.

    `added` [] counts the rows that ever went into the ring.
    """
    filled, old_key, new_key = jnp.minimum(added, buffer.size(ring)), *jax.random.split(key)
    if offline is None or ring is None or args.offline_ratio < 0:
        index = jax.random.randint(old_key, (num, args.batch_size), 0, buffer.size(offline) + filled)
    else:
        num_old = round(args.offline_ratio * args.batch_size)
        old = jax.random.randint(old_key, (num, num_old), 0, buffer.size(offline))
        new = jax.random.randint(new_key, (num, args.batch_size - num_old), 0, filled) + buffer.size(offline)
        index = jnp.concatenate([old, new], axis=1)
    batch = buffer.take(offline, ring, index.reshape(-1))
    return jax.tree.map(lambda x: x.reshape(num, args.batch_size, *x.shape[1:]), batch)


def pretrain_chunk(setup: Setup, state: State, hyper: Hyper, offline: Transition, *, length: int):
    """`length` gradient steps on the offline rows."""

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        batch = jax.tree.map(lambda x: x[0], sample_batches(setup.args, offline, None, 0, 1, sample_key))
        agent, metrics = update(setup.nets, hyper, state.agent, batch, update_key)
        return state.replace(agent=agent, key=key), metrics

    return scan_mean(step, state, length)


def finetune_chunk(setup: Setup, state: State, hyper: Hyper, offline: Transition | None, added: jax.Array, *, length: int):
    """`length` steps of all environments, each followed by num_envs * utd_ratio gradient steps once the random steps are over.

    `added` [] counts the online rows that earlier chunks collected.
    """
    args, env = setup.args, setup.env
    num_updates = round(args.num_envs * args.utd_ratio)

    def learn(agent, ring, added, key):
        sample_key, update_key = jax.random.split(key)
        batches = sample_batches(args, offline, ring, added, num_updates, sample_key)
        descend_on = lambda agent, xs: update(setup.nets, hyper, agent, *xs)  # noqa: E731
        agent, metrics = jax.lax.scan(descend_on, agent, (batches, jax.random.split(update_key, num_updates)))
        return agent, jax.tree.map(jnp.mean, metrics)

    def idle(agent, ring, added, key):
        metrics = jax.eval_shape(learn, agent, ring, added, key)[1]
        return agent, jax.tree.map(lambda x: jnp.zeros(x.shape), metrics)

    def step(carry):
        state, added = carry
        key, act_key, reset_key, learn_key = jax.random.split(state.key, 4)
        obs = state.env_state.obs
        action = act(setup.nets, state.agent.actor, obs, act_key)
        action = jnp.where(added < args.random_steps, jax.random.uniform(act_key, action.shape, minval=-1.0), action)
        advance = jax.vmap(partial(envs.step_and_reset, env))
        env_state, reached = advance(state.env_state, action, jax.random.split(reset_key, args.num_envs))
        rows = Transition(obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])
        ring = buffer.insert(state.ring, rows, added, reached.info["broken"])
        added = added + args.num_envs
        agent, metrics = jax.lax.cond(added > args.random_steps, learn, idle, state.agent, ring, added, learn_key)
        return (State(agent, env_state, ring, key), added), {**metrics, **envs.tally(reached)}

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


def make_setup(args: Args, offline: Transition | None) -> Setup:
    """Environment and networks for `args`."""
    env = None if args.env == "none" else envs.make(args.env, args.physics)
    obs_size, action_size = (env.observation_size, env.action_size) if env else (offline.obs.shape[1], offline.action.shape[1])
    return Setup(args, env, Nets(Actor(args.hidden, action_size), Critic(args.critic_hidden, 2, args.layer_norm)), obs_size)


def main() -> None:
    args = cli.parse(Args, SETTINGS)
    hyper, labels = cli.grid(args)
    data = cli.load_dataset(args)
    offline = data and data.transitions
    setup, mesh = make_setup(args, offline), mesh_for(len(labels))
    evaluate = Evaluator(args, setup.env, partial(act, setup.nets), mesh, setup.obs_size, setup.nets.actor.action_size)
    like = jax.eval_shape(partial(init_state, setup), jax.random.PRNGKey(0)).agent
    pretrained = load_agents(args.pretrained, labels, like) if args.pretrained else None
    run = Run("sac", args, labels, data and data.card)

    initialise = Compiled(partial(init_state, setup), mesh)
    pretrain = Compiled(partial(pretrain_chunk, setup), mesh, shared=(2,), donate=(0,))
    finetune = Compiled(partial(finetune_chunk, setup), mesh, shared=(2, 3), donate=(0,))
    run.programs = {"offline": pretrain, "online": finetune}
    offline, hyper = place(offline, mesh, EVERYWHERE), place(hyper, mesh, RUNS)
    keys = place(jnp.stack([jax.random.PRNGKey(label.seed) for label in labels]), mesh, RUNS)
    done, state = run.restore(initialise(keys))
    if pretrained and not done:
        state = state.replace(agent=place(pretrained, mesh, RUNS))

    plan = cli.chunks(args, "offline", 0, args.offline_steps) + cli.chunks(args, "online", 0, args.online_steps)
    for position, chunk in run.progress(plan, done):
        if chunk.phase == "offline":
            state, metrics = pretrain(state, hyper, offline, length=chunk.length)
        else:
            state, metrics = finetune(state, hyper, offline, chunk.collected, length=chunk.length // args.num_envs)
        run.after(chunk, metrics, state.agent, state, position, evaluate, keys)

    report.conclude(run, setup.env, data and data.transitions, state.ring, {"policy": state.agent.actor})


if __name__ == "__main__":
    cli.guarded(main)
