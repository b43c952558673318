"""The baseline of the speed comparisons: IQL as people usually write it in JAX, one jitted update per Python
step.

A NumPy replay buffer is sampled on the host and copied to the device for each update; environments are NumPy
and live on the host; each action takes a call of a jitted policy; seeds run one after another. Nothing is
slowed down on purpose: the update is one compiled program with its state donated, nothing is fetched from the
device but actions, and compilation is not counted. Losses, networks, settings and the order V, actor, Q,
target are those of IQL (arXiv 2110.06169) and of its official code.

    python tests/benchmarks/usual_way.py
"""

import time
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ooo_rl.envs.point_mass_wall import GOAL, HIGH, LOW, NOISE, START, STEP, WALL_BOTTOM, WALL_TOP, WALL_X

BATCH, DISCOUNT, TARGET_RATE, EXPECTILE, TEMPERATURE = 256, 0.99, 0.005, 0.7, 3.0
WARM_UP = 20  # steps before the clock starts, on every seed
OPTIMIZER = optax.adam(3e-4)


class MLP(nn.Module):
    hidden: int
    outputs: int

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(self.hidden, kernel_init=nn.initializers.orthogonal(2**0.5))(x))
        return nn.Dense(self.outputs, kernel_init=nn.initializers.orthogonal(2**0.5))(x)


class Actor(nn.Module):
    """Gaussian around tanh(mean), with a standard deviation that does not depend on the state."""

    hidden: int
    action_size: int

    @nn.compact
    def __call__(self, obs):
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_size,))
        return nn.tanh(MLP(self.hidden, self.action_size)(obs)), jnp.clip(log_std, -5.0, 2.0)


class Critic(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, obs, action):
        twin = nn.vmap(
            MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2
        )
        return twin(self.hidden, 1)(jnp.concatenate([obs, action], axis=-1)).squeeze(-1)


class Agent(NamedTuple):
    actor: dict
    critic: dict
    value: dict
    target: dict
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    value_opt: optax.OptState


class IQL:
    """The networks of one size with their jitted `update` and `act`. All seeds share an instance, so they
    share its compilation."""

    def __init__(self, hidden: int, obs_size: int, action_size: int):
        self.obs_size, self.action_size = obs_size, action_size
        self.actor, self.critic, self.value = Actor(hidden, action_size), Critic(hidden), MLP(hidden, 1)
        self.update = jax.jit(self._update, donate_argnums=0)
        self.act = jax.jit(self._act)

    def init(self, seed: int) -> Agent:
        keys = jax.random.split(jax.random.key(seed), 3)
        obs, action = jnp.zeros((1, self.obs_size)), jnp.zeros((1, self.action_size))
        actor, critic, value = (
            self.actor.init(keys[0], obs),
            self.critic.init(keys[1], obs, action),
            self.value.init(keys[2], obs),
        )
        target = jax.tree.map(jnp.copy, critic)  # a buffer of its own, or the donation of both would fail
        return Agent(
            actor, critic, value, target, OPTIMIZER.init(actor), OPTIMIZER.init(critic), OPTIMIZER.init(value)
        )

    def _act(self, actor, obs, key):
        """Sampled actions and the next key: splitting here spares the host a dispatch per step."""
        key, noise_key = jax.random.split(key)
        mean, log_std = self.actor.apply(actor, obs)
        return jnp.clip(mean + jnp.exp(log_std) * jax.random.normal(noise_key, mean.shape), -1.0, 1.0), key

    def _update(self, agent: Agent, batch: dict) -> Agent:
        obs, action = batch["obs"], batch["action"]
        q = self.critic.apply(agent.target, obs, action).min(axis=0)

        def value_loss(params):
            gap = q - self.value.apply(params, obs).squeeze(-1)
            return (jnp.where(gap > 0, EXPECTILE, 1 - EXPECTILE) * gap**2).mean()

        value, value_opt = _descend(value_loss, agent.value, agent.value_opt)
        weight = jnp.minimum(jnp.exp(TEMPERATURE * (q - self.value.apply(value, obs).squeeze(-1))), 100.0)

        def actor_loss(params):
            mean, log_std = self.actor.apply(params, obs)
            log_prob = (-0.5 * ((action - mean) / jnp.exp(log_std)) ** 2 - log_std).sum(-1)
            return -(weight * log_prob).mean()

        actor, actor_opt = _descend(actor_loss, agent.actor, agent.actor_opt)
        target_q = batch["reward"] + DISCOUNT * batch["discount"] * self.value.apply(
            value, batch["next_obs"]
        ).squeeze(-1)

        def critic_loss(params):
            return ((self.critic.apply(params, obs, action) - target_q) ** 2).mean(axis=-1).sum()

        critic, critic_opt = _descend(critic_loss, agent.critic, agent.critic_opt)
        target = optax.incremental_update(critic, agent.target, TARGET_RATE)
        return Agent(actor, critic, value, target, actor_opt, critic_opt, value_opt)


def _descend(loss, params, opt_state):
    updates, opt_state = OPTIMIZER.update(jax.grad(loss)(params), opt_state)
    return optax.apply_updates(params, updates), opt_state


class ReplayBuffer:
    """Preallocated NumPy arrays, sampled uniformly."""

    def __init__(self, capacity: int, obs_size: int, action_size: int, seed: int):
        self.arrays = {
            "obs": np.zeros((capacity, obs_size), np.float32),
            "action": np.zeros((capacity, action_size), np.float32),
            "reward": np.zeros(capacity, np.float32),
            "next_obs": np.zeros((capacity, obs_size), np.float32),
            "discount": np.zeros(capacity, np.float32),
        }
        self.capacity, self.added, self.rng = capacity, 0, np.random.default_rng(seed)

    def add(self, **row) -> None:
        for name, value in row.items():
            self.arrays[name][self.added % self.capacity] = value
        self.added += 1

    def sample(self, size: int) -> dict[str, np.ndarray]:
        index = self.rng.integers(min(self.added, self.capacity), size=size)
        return {name: array[index] for name, array in self.arrays.items()}


class HostPointMass:
    """`ooo_rl.envs.point_mass_wall.PointMassWall` with its default settings, on the host in NumPy, one at a
    time."""

    horizon, goal_radius = 150, 0.05

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def reset(self) -> np.ndarray:
        self.position = (START + NOISE * self.rng.standard_normal(2)).astype(np.float32)
        self.elapsed = 0
        return self.position

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """(observation, reward, terminated, truncated) after an action [2] in [-1, 1]."""
        target = np.clip(self.position + action * STEP, LOW, HIGH).astype(np.float32)
        if not self._blocked(target):
            self.position = target
        self.elapsed += 1
        reached = bool(np.linalg.norm(self.position - GOAL) < self.goal_radius)
        return self.position, float(reached) - 1.0, reached, self.elapsed >= self.horizon and not reached

    def _blocked(self, target: np.ndarray) -> bool:
        (x, y), (new_x, new_y) = self.position, target
        if (x < WALL_X) == (new_x < WALL_X):
            return False
        return WALL_BOTTOM <= y + (WALL_X - x) / (new_x - x) * (new_y - y) <= WALL_TOP


def measure_offline(
    hidden: int, num_seeds: int, obs_size: int, action_size: int, num_updates: int, num_rows: int = 100_000
) -> dict:
    """Offline training of `num_seeds` seeds one after another, `num_updates` each, on random data of
    `num_rows` rows.

    Returns seed_updates_per_second (updates of all seeds over seconds), seconds, compile_seconds (not part of
    seconds).
    """
    iql, rng = IQL(hidden, obs_size, action_size), np.random.default_rng(0)
    buffer = ReplayBuffer(num_rows, obs_size, action_size, seed=0)
    for name, array in buffer.arrays.items():
        array[:] = 1.0 if name == "discount" else rng.uniform(-1, 1, array.shape)
    buffer.added = num_rows
    compile_seconds = _compile_seconds(iql, buffer)

    def run(agent, updates):
        for _ in range(updates):
            agent = iql.update(agent, buffer.sample(BATCH))
        return jax.block_until_ready(agent)

    seconds = 0.0
    for seed in range(num_seeds):
        agent = run(iql.init(seed), WARM_UP)
        begun = time.perf_counter()
        run(agent, num_updates)
        seconds += time.perf_counter() - begun
    return {
        "seed_updates_per_second": num_seeds * num_updates / seconds,
        "seconds": seconds,
        "compile_seconds": compile_seconds,
    }


def measure_online(
    hidden: int, num_seeds: int, num_envs: int, num_steps: int, utd_ratio: float = 1.0
) -> dict:
    """Online training on the point mass: `num_seeds` seeds one after another, `num_steps` environment steps
    each.

    A seed's `num_envs` environments are stepped in a Python loop; their actions come from one call of the
    policy. Then follow num_envs x utd_ratio updates. Usual is num_envs=1. Rates are over the wall time of
    everything, so that both describe the same run: returns env_steps_per_second, seed_updates_per_second,
    seconds, compile_seconds (not part of seconds).
    """
    updates = num_envs * utd_ratio
    if num_steps % num_envs or updates != int(updates):
        given = f"{num_steps}, {num_envs}, {utd_ratio}"
        raise ValueError(f"num_steps must be a multiple of num_envs, and num_envs x utd_ratio whole: {given}")
    iql = IQL(hidden, obs_size=2, action_size=2)
    rounds, seconds = num_steps // num_envs, 0.0
    blank = ReplayBuffer(1, 2, 2, seed=0)
    blank.added = 1
    compile_seconds = _compile_seconds(iql, blank, num_envs)
    for seed in range(num_seeds):
        loop = _OnlineLoop(iql, seed, num_envs, int(updates), capacity=num_steps + WARM_UP * num_envs)
        loop.run(WARM_UP)
        begun = time.perf_counter()
        loop.run(rounds)
        seconds += time.perf_counter() - begun
    steps = num_seeds * num_steps
    return {
        "env_steps_per_second": steps / seconds,
        "seed_updates_per_second": steps * utd_ratio / seconds,
        "seconds": seconds,
        "compile_seconds": compile_seconds,
    }


class _OnlineLoop:
    """One seed's agent, environments and buffer, and the loop that people write over them."""

    def __init__(self, iql: IQL, seed: int, num_envs: int, updates: int, capacity: int):
        self.iql, self.updates, self.agent, self.key = iql, updates, iql.init(seed), jax.random.key(seed)
        self.envs = [HostPointMass(1000 * seed + i) for i in range(num_envs)]
        self.obs = np.stack([env.reset() for env in self.envs])
        self.buffer = ReplayBuffer(capacity, 2, 2, seed)

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            action, self.key = self.iql.act(self.agent.actor, self.obs, self.key)
            action = np.asarray(action)
            for i, env in enumerate(self.envs):
                next_obs, reward, terminated, truncated = env.step(action[i])
                self.buffer.add(
                    obs=self.obs[i],
                    action=action[i],
                    reward=reward,
                    next_obs=next_obs,
                    discount=1.0 - terminated,
                )
                self.obs[i] = env.reset() if terminated or truncated else next_obs
            for _ in range(self.updates):
                self.agent = self.iql.update(self.agent, self.buffer.sample(BATCH))
        jax.block_until_ready(self.agent)


def _compile_seconds(iql: IQL, buffer: ReplayBuffer, num_envs: int = 0) -> float:
    """Seconds of the first calls: of `update`, and with `num_envs` of `act` too."""
    agent, key = iql.init(0), jax.random.key(0)
    begun = time.perf_counter()
    if num_envs:
        jax.block_until_ready(iql.act(agent.actor, np.zeros((num_envs, iql.obs_size), np.float32), key))
    jax.block_until_ready(iql.update(agent, buffer.sample(BATCH)))
    return time.perf_counter() - begun


def iql_flops(hidden: int, obs_size: int, action_size: int, batch: int = BATCH) -> float:
    """Floating-point operations of the matrix products that one IQL update of one seed cannot do without.

    A product of [b, i] and [i, o] counts 2 b i o. All networks have two hidden layers. Counted are the twin
    target Q forward on (s, a); V forward and backward on s; the updated V forward on s, for the policy's
    weights, and on s', for the targets; the policy forward and backward; and the twin Q forward and backward.
    A backward pass has one product per layer for the gradient of its weights and one for the gradient of its
    input, except in the first layer, whose input is data. Element-wise work, Adam and the target update are
    left out: so the share of the ceiling that follows from this is a lower bound.
    """

    def forward(inputs: int, outputs: int) -> float:
        return 2.0 * batch * (inputs * hidden + hidden * hidden + hidden * outputs)

    def forward_and_backward(inputs: int, outputs: int) -> float:
        return 2 * forward(inputs, outputs) + 2.0 * batch * (hidden * hidden + hidden * outputs)

    value = forward_and_backward(obs_size, 1) + 2 * forward(obs_size, 1)
    actor = forward_and_backward(obs_size, action_size)
    critic = forward(obs_size + action_size, 1) + forward_and_backward(obs_size + action_size, 1)
    return value + actor + 2 * critic


def matmul_ceiling(hidden: int, batch: int = BATCH, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of the fastest float32 matrix product that XLA does on this machine: best of `repeats` and of
    two shapes.

    The shapes are [size, size] x [size, size], and the one that IQL has, [batch, hidden] x [hidden, hidden].
    On NVIDIA GPUs, JAX's default precision for float32 is TF32; that is what the updates run in too.
    """
    best = 0.0
    for rows, columns in ((size, size), (batch, hidden)):
        key = jax.random.key(0)
        x, w = (
            jax.random.normal(key, (rows, columns)),
            jax.random.normal(key, (columns, columns)) / columns**0.5,
        )
        chain = max(
            1, int(1e10 / (2 * rows * columns**2))
        )  # products per call, long enough for dispatch not to count
        product = jax.jit(lambda x, w, chain=chain: jax.lax.fori_loop(0, chain, lambda _, x: x @ w, x))
        jax.block_until_ready(product(x, w))
        for _ in range(repeats):
            begun = time.perf_counter()
            jax.block_until_ready(product(x, w))
            best = max(best, 2 * rows * columns**2 * chain / (time.perf_counter() - begun))
    return best


if __name__ == "__main__":
    for hidden, obs_size, action_size in ((64, 2, 2), (256, 17, 6)):
        offline = measure_offline(
            hidden, num_seeds=2, obs_size=obs_size, action_size=action_size, num_updates=1000
        )
        ceiling, flops = matmul_ceiling(hidden), iql_flops(hidden, obs_size, action_size)
        share = offline["seed_updates_per_second"] * flops / ceiling
        print(f"offline, hidden {hidden}, obs {obs_size}, act {action_size}: {offline}")
        most = f"ceiling {ceiling / 1e9:.1f} GFLOP/s, share of it {share:.1%}"
        print(f"  {flops / 1e6:.1f} MFLOP per update, {most}")
    for num_envs, utd_ratio in ((1, 1.0), (8, 0.125)):
        online = measure_online(64, num_seeds=2, num_envs=num_envs, num_steps=2000, utd_ratio=utd_ratio)
        print(f"online, hidden 64, {num_envs} environments, {utd_ratio} updates per step: {online}")
