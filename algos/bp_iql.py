"""BpIQL: IQL explores with a state-free behavioural prior (SFP, Bagatella et al., arXiv 2205.13528).

The prior is a distribution of actions given the action before, fitted to the data: a normalising flow
(RealNVP). It knows how actions follow one another in time, and nothing of where the agent is. Offline, IQL
(iql.py) and the prior learn side by side. Online, in each state s, the prior's action is taken with
probability Lambda(s), else the policy's. Lambda learns to be large where the prior's actions have the higher
Q. The policy goes on with IQL's losses on online rows alone, whoever acted. Evaluation plays the policy.
This is how GDE's paper puts SFP, which is made for SAC, on IQL (its appendix B.6).

Departures from SFP's code (eth-ait/sfp b8eb53b), beside SAC: no batch normalisation in the flow. Its scales
are bounded instead, so that no density grows without bound on data that repeat an action. Lambda learns in
the states of a batch, as GDE writes; there in the next ones, and with 1e-9 before its loss. An episode begins
with the action 0 as the last one; there with one of the data. One-step targets; there 10 steps.

    python algos/bp_iql.py
    python algos/bp_iql.py --env hopper --dataset ooo/hopper/medium-v0 --init-from RUN --offline-learns prior
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
from ooo_rl.data.errors import UsageError
from ooo_rl.data.learner import Learner, orthogonal
from ooo_rl.data.runs.bounds import Bounds, Fraction, Layers, NonNegative, Steps, With
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
    value_lr: NonNegative = 3e-4
    """learning rate of the value function"""
    prior_lr: NonNegative = 1e-4
    """learning rate of the prior"""
    mixing_lr: NonNegative = 3e-4
    """learning rate of the prior's share"""
    target_rate: Fraction = 0.005
    """share of the critics that goes into their targets at each update"""
    expectile: Annotated[float, Bounds(above=0, below=1)] = 0.7
    """expectile of the value regression: 0.5 is the mean, towards 1 the maximum over the data's actions"""
    temperature: NonNegative = 3.0
    """beta: how sharply the policy prefers advantageous actions; 0 is behaviour cloning"""


@dataclass(frozen=True)
class Args(Experiment):
    """BpIQL: train IQL and a prior of actions offline, then explore with a mixture of both."""

    offline_ratio: Annotated[float, Bounds(at_most=1)] = 0.0
    """share of each online batch that comes from the offline rows; below 0: their share of all rows"""
    offline_steps: Steps = 1_000_000
    """gradient steps on the dataset"""
    offline_learns: Literal["all", "prior"] = "all"
    """what learns in them: IQL and the prior, or the prior alone, after --init-from"""
    online_steps: Steps = 250_000
    """environment steps of fine-tuning"""
    learning_starts: Steps = 2_500
    """of these, steps at the start that only fill the buffer, with no gradient steps"""
    prior_share: Annotated[float, Bounds(above=0, below=1)] = 0.95
    """how often the prior acts at first: Lambda before it has learnt anything"""
    prior_blocks: Annotated[int, Bounds(at_least=2)] = 6
    """couplings of the prior's flow"""
    prior_hidden: Layers = (128, 128)
    """units of the hidden layers of each coupling, and of Lambda"""
    return_range: Annotated[NonNegative, With("dataset")] = 0.0
    """scale rewards so that the dataset's returns span this much (IQL: 1000 in locomotion); 0: do not"""
    hidden: Layers = (256, 256)
    """units of the hidden layers of all other networks"""
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


class Coupling(nn.Module):
    """Log scale and shift [..., A] of an affine map of x [..., A], which depend on its `kept` dimensions.

    Both are 0 for these, and for all before the first gradient step.
    """

    kept: tuple[bool, ...]
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, x, last_action):
        kept = jnp.array(self.kept)
        hidden = nn.relu(MLP(self.hidden)(jnp.concatenate([jnp.where(kept, x, 0.0), last_action], axis=-1)))
        both = nn.Dense(2 * len(self.kept), kernel_init=nn.initializers.zeros)(hidden)
        log_scale, shift = jnp.split(both, 2, axis=-1)
        return jnp.where(kept, 0.0, nn.tanh(log_scale)), jnp.where(kept, 0.0, shift)


class Prior(nn.Module):
    """Actions given the last one, whatever the state: a RealNVP, which turns actions into Gaussian noise."""

    action_size: int
    blocks: int
    hidden: tuple[int, ...]

    def setup(self):
        kept = [tuple((i + d) % 2 == 0 for d in range(self.action_size)) for i in range(self.blocks)]
        self.couplings = [Coupling(one, self.hidden) for one in kept]

    def __call__(self, action, last_action):
        """The log density [...] of actions [..., A]."""
        x, volume = action, 0.0
        for coupling in self.couplings:
            log_scale, shift = coupling(x, last_action)
            x, volume = x * jnp.exp(log_scale) + shift, volume + log_scale.sum(axis=-1)
        return jax.scipy.stats.norm.logpdf(x).sum(axis=-1) + volume

    def generate(self, noise, last_action):
        """Actions [..., A] from standard normal noise [..., A]: the couplings undone, the last one first."""
        x = noise
        for coupling in reversed(self.couplings):
            log_scale, shift = coupling(x, last_action)
            x = (x - shift) * jnp.exp(-log_scale)
        return x


class Mixing(nn.Module):
    """Lambda(s): the probability [...] that the prior acts; in all states it begins at `share`."""

    hidden: tuple[int, ...]
    share: float

    @nn.compact
    def __call__(self, obs):
        at_first = jnp.log(self.share / (1 - self.share))
        moved = nn.Dense(1, kernel_init=nn.initializers.zeros)(nn.relu(MLP(self.hidden)(obs)))
        return nn.sigmoid(at_first + moved.squeeze(-1))


Nets = namedtuple("Nets", "actor critic value prior mixing")  # modules; their parameters are in the state


@struct.dataclass
class Agent:
    """What learns, each with its optimiser, and the critics' slow copy."""

    actor: Learner
    critic: Learner
    target_critic: dict
    value: Learner
    prior: Learner
    mixing: Learner


def init_agent(nets: Nets, example: Transition, key: jax.Array) -> Agent:
    keys, obs, action = jax.random.split(key, 5), example.obs[None], example.action[None]
    critic = nets.critic.init(keys[1], obs, action)
    prior = Learner.create(nets.prior.init(keys[3], action, action))
    actor, value, mixing = (
        Learner.create(net.init(k, obs))
        for net, k in zip((nets.actor, nets.value, nets.mixing), (keys[0], keys[2], keys[4]))
    )
    return Agent(actor, Learner.create(critic), jax.tree.map(jnp.copy, critic), value, prior, mixing)


@struct.dataclass
class Rows(Transition):
    """Rows with the action before each, 0 where an episode begins."""

    last_action: jax.Array


def with_last_actions(rows: Transition | None, truncation: jax.Array | None) -> Rows | None:
    """Rows [N] of whole episodes, one after the other, some ended by a `truncation` [N]."""
    if rows is None:
        return None
    goes_on = (rows.discount > 0) & ~truncation
    last_action = jnp.roll(jnp.where(goes_on[:, None], rows.action, 0.0), 1, axis=0)
    return Rows(**vars(rows), last_action=last_action.at[0].set(0.0))


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


def prior_loss(params, nets, action, last_action):
    """Negative log likelihood of the actions in the data, each given the one before."""
    return -jnp.mean(nets.prior.apply(params, action, last_action))


def mixing_loss(params, nets, obs, gain):
    """Raises Lambda(s) where the prior's action has a `gain` over the policy's: GDE, appendix B.6."""
    return -jnp.mean(nets.mixing.apply(params, obs) * gain)


def update(nets: Nets, hyper: Hyper, agent: Agent, batch: Transition, key: jax.Array):
    """One gradient step of value, policy and critics: IQL's."""
    q = nets.critic.apply(agent.target_critic, batch.obs, batch.action).min(axis=0)
    loss_v, value = agent.value.descend(value_loss, hyper.value_lr, nets, batch.obs, q, hyper.expectile)

    v, next_v = jnp.split(nets.value.apply(value.params, jnp.concatenate([batch.obs, batch.next_obs])), 2)
    adv, rows = q - v, (batch.obs, batch.action)
    loss_a, actor = agent.actor.descend(actor_loss, hyper.actor_lr, nets, *rows, adv, hyper.temperature, key)

    task_reward = hyper.reward_scale * batch.reward + hyper.reward_bias
    target_q = task_reward + hyper.discount * batch.discount * next_v
    loss_q, critic = agent.critic.descend(critic_loss, hyper.critic_lr, nets, *rows, target_q)
    target_critic = optax.incremental_update(critic.params, agent.target_critic, hyper.target_rate)

    agent = agent.replace(actor=actor, critic=critic, target_critic=target_critic, value=value)
    losses = {"value_loss": loss_v, "actor_loss": loss_a, "critic_loss": loss_q}
    return agent, {**losses, "q": q.mean(), "adv": adv.mean()}


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


def propose(nets: Nets, prior: dict, last_action: jax.Array, key: jax.Array) -> jax.Array:
    """Actions [..., A] of the prior, given the last ones [..., A]: samples, clipped."""
    noise = jax.random.normal(key, last_action.shape)
    return jnp.clip(nets.prior.apply(prior, noise, last_action, method="generate"), -1.0, 1.0)


def behave(nets: Nets, agent: Agent, obs: jax.Array, last_action: jax.Array, key: jax.Array):
    """What is done online: actions [N, A], of the prior with probability Lambda(s), else of the policy.

    Also Lambda [N].
    """
    prior_key, policy_key, coin_key = jax.random.split(key, 3)
    proposed = propose(nets, agent.prior.params, last_action, prior_key)
    own = act(nets, agent.actor.params, obs, policy_key)
    share = nets.mixing.apply(agent.mixing.params, obs)
    from_prior = jax.random.bernoulli(coin_key, share)
    return jnp.where(from_prior[:, None], proposed, own), share


def learn_mixing(nets: Nets, hyper: Hyper, agent: Agent, batch: Rows, key: jax.Array):
    """One gradient step of Lambda: the gain is the least Q of a prior's action, less that of a policy's."""
    prior_key, policy_key = jax.random.split(key)
    proposed = propose(nets, agent.prior.params, batch.last_action, prior_key)
    own = act(nets, agent.actor.params, batch.obs, policy_key)
    q = [nets.critic.apply(agent.critic.params, batch.obs, action).min(axis=0) for action in (proposed, own)]
    gain = q[0] - q[1]
    _, mixing = agent.mixing.descend(mixing_loss, hyper.mixing_lr, nets, batch.obs, gain)
    return agent.replace(mixing=mixing), {"prior_gain": gain.mean()}


@struct.dataclass
class State:
    """All that a run carries from chunk to chunk, and all that a checkpoint holds of it."""

    agent: Agent
    last_action: jax.Array  # [num_envs, A] in the episodes under way
    env_state: envs.State | None
    ring: Rows | None
    key: jax.Array


def init_state(static: Static, key: jax.Array) -> State:
    key, agent_key, env_key = jax.random.split(key, 3)
    action = static.example.action
    row = Rows(**vars(static.example), last_action=action)
    env_state, ring = start_online(static._replace(example=row), env_key)
    agent = init_agent(static.nets, static.example, agent_key)
    return State(agent, jnp.zeros((static.args.num_envs, *action.shape)), env_state, ring, key)


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


def pretrain_chunk(static: Static, state: State, hyper: Hyper, offline, truncation, before, *, length: int):
    """`length` gradient steps on the offline rows: of IQL and of the prior, or of the prior alone.

    `before` [] of the phase precede them.
    """
    args, nets, rows = static.args, static.nets, with_last_actions(offline, truncation)
    decays = args.actor_decay == "cosine" or (args.actor_decay == "auto" and not args.online_steps)
    inherited = state.agent.actor.opt.count - before  # steps of the --init-from run

    def step(state):
        key, sample_key, update_key = jax.random.split(state.key, 3)
        batch = sample_batches(rows, None, 0, 1.0, (args.batch_size,), sample_key)
        agent, metrics = state.agent, {}
        if args.offline_learns == "all":
            steps = agent.actor.opt.count - inherited
            rate = 0.5 + 0.5 * jnp.cos(jnp.pi * steps / args.offline_steps) if decays else 1.0
            decayed = hyper.replace(actor_lr=rate * hyper.actor_lr)
            agent, metrics = update(nets, decayed, agent, batch, update_key)
        given = nets, batch.action, batch.last_action
        loss, prior = agent.prior.descend(prior_loss, hyper.prior_lr, *given)
        return state.replace(agent=agent.replace(prior=prior), key=key), metrics | {"prior_loss": loss}

    return scan_mean(step, state, length)


def finetune_chunk(
    static: Static, state: State, hyper: Hyper, offline, truncation, added, *, length: int, learns: bool
):
    """`length` steps of all environments, gradient steps after each if it `learns` already.

    `added` [] online rows come before.
    """
    args, nets, offline = static.args, static.nets, with_last_actions(offline, truncation)
    num_updates = round(args.num_envs * args.utd_ratio)

    def learn(now, agent, sample):
        batch, key = sample
        update_key, mixing_key = jax.random.split(key)
        agent, metrics = update(nets, now, agent, batch, update_key)
        agent, more = learn_mixing(nets, now, agent, batch, mixing_key)
        return agent, metrics | more

    def step(carry):
        state, added = carry
        now = online_hyper(args, hyper, added)
        key, act_key, reset_key, learn_key = jax.random.split(state.key, 4)
        obs, last_action = state.env_state.obs, state.last_action
        action, share = behave(nets, state.agent, obs, last_action, act_key)
        env_state, reached = envs.step_all(static.env, state.env_state, action, reset_key)
        discount = 1 - reached.info["termination"]
        rows = Rows(obs, action, reached.reward, reached.obs, discount, last_action)
        ring = buffer.insert(state.ring, rows, added, reached.info["broken"])
        added = added + args.num_envs

        last_action = jnp.where(reached.done[:, None] > 0, 0.0, action)
        state = state.replace(last_action=last_action, env_state=env_state, ring=ring, key=key)
        acted = {"prior_share": share.mean()} | envs.tally(reached)
        if not learns:
            return (state, added), acted
        sample_key, update_key = jax.random.split(learn_key)
        shape, keys = (num_updates, args.batch_size), jax.random.split(update_key, num_updates)
        batches = sample_batches(offline, ring, added, online_ratio(args, added), shape, sample_key)
        agent, metrics = jax.lax.scan(partial(learn, now), state.agent, (batches, keys))
        return (state.replace(agent=agent), added), jax.tree.map(jnp.mean, metrics) | acted

    (state, _), metrics = scan_mean(step, (state, added), length)
    return state, metrics


# as in awac.py
def make_plan(args: Args) -> list[Phase]:
    """Pre-training, then fine-tuning, which begins with steps that only fill the buffer."""
    online = Phase("online", 0, args.online_steps, acts=True, idle=args.learning_starts)
    return [Phase("offline", 0, args.offline_steps), online]


def make_nets(session: Session) -> Nets:
    """The networks."""
    args, size = session.args, session.action_size
    return Nets(
        Actor(args.hidden, size, args.dropout), Critic(args.hidden), Value(args.hidden),
        Prior(size, args.prior_blocks, args.prior_hidden), Mixing(args.prior_hidden, args.prior_share),
    )  # fmt: skip


def check_prior(session: Session) -> None:
    """Raises UsageError if the rows of the dataset are in no order, or IQL would learn nothing offline."""
    if session.args.offline_learns == "prior" and not session.args.init_from:
        raise UsageError("--offline-learns prior needs --init-from, the run that has trained IQL")
    if not session.args.offline_steps:
        session.console.print("the prior learns nothing offline; it begins as it is, and acts all the same")
    if session.card.get("ordered") is False:
        raise UsageError(
            f"--dataset {session.card['id']}: its rows are in no order, so the action before each is not "
            "known; learn from it with algos/iql.py"
        )


def train(args: Args) -> Result:
    """All phases for all seeds: what the command does, and what Python may call."""
    session = Session("bp_iql", args, make_plan)
    check_prior(session)
    args, hyper = session.args, session.scaled_to(session.args.return_range)
    nets, functions = make_nets(session), (init_state, pretrain_chunk, finetune_chunk)
    initialise, pretrain, finetune = session.compile(session.static(nets), *functions)
    state = session.begin(initialise(session.keys), partial(act, nets))

    given = hyper, session.offline, session.truncation
    for chunk in session.chunks():
        if chunk.phase == "offline":
            state, metrics = pretrain(state, *given, chunk.start, length=chunk.iterations)
        else:
            how = {"length": chunk.iterations, "learns": chunk.learns}
            state, metrics = finetune(state, *given, chunk.collected, **how)
        session.after(chunk, metrics, state)

    return session.conclude(state, export, {"policy": state.agent})


# IQL's settings by environment family, and SFP's for the prior; those of the point mass are ours.
FAMILIES = {
    "point-mass-wall": dict(
        hidden=(64, 64), expectile=0.9, temperature=3, actor_lr=1e-3, critic_lr=1e-3, value_lr=1e-3,
        prior_lr=1e-3, mixing_lr=1e-3, prior_hidden=(32, 32), target_rate=0.02, offline_steps=6_000,
        online_steps=960_000, num_envs=48, utd_ratio=1 / 48, learning_starts=4_800),
    "point-mass-wall-sparse": dict(reward_bias=-1),
    "probe": dict(
        hidden=(32, 32), discount=0.9, expectile=0.98, temperature=20, actor_lr=3e-3, critic_lr=3e-3,
        value_lr=3e-3, prior_lr=3e-3, mixing_lr=3e-3, prior_blocks=2, prior_hidden=(8, 8), target_rate=0.05,
        actor_decay="none", offline_steps=0, online_steps=3_000, learning_starts=160),
    ("halfcheetah", "hopper", "walker2d", "ant"): dict(return_range=1000),
    ("halfcheetah-sparse", "ant-sparse"): dict(return_range=0, offline_steps=0),
    "antmaze": dict(expectile=0.9, temperature=10, reward_bias=-1),
    "antmaze-large-goal-missing": dict(offline_steps=500_000),
    "maze2d": dict(expectile=0.9, temperature=3, reward_bias=-1, offline_steps=500_000),
    "kitchen": dict(expectile=0.7, temperature=0.5, dropout=0.1, reward_bias=-4, end_reward=4),
    ("hammer", "door", "pen", "relocate"): dict(expectile=0.7, temperature=0.5, dropout=0.1),
    ("door-binary", "pen-binary", "relocate-binary"): dict(
        expectile=0.8, temperature=3, offline_steps=25_000),
    "hammer-truncated-expert": dict(expectile=0.8, temperature=3, dropout=0, offline_steps=50_000),
}  # fmt: skip


if __name__ == "__main__":
    launch(Args, train)
