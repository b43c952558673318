"""What tests with the five probes share: data of random actions, the phases of any script compiled as it does, the known answers."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np

import envs
from data.buffer import Transition
from data.program import EVERYWHERE, RUNS, Compiled, mesh_for, place
from envs.base import Task

SEEDS, STEPS, DISCOUNT = 3, 2_000, 0.9
PROBES = [name for name in envs.names() if name.startswith("probe-")]
KNOWN = {  # observations; their values under the best actions; the best actions, None where all are as good
    "probe-constant-reward": ([0.0], [1.0], None),
    "probe-reward-is-obs": ([-1.0, 1.0], [-1.0, 1.0], None),
    "probe-delayed-reward": ([0.0, 1.0], [DISCOUNT, 1.0], None),
    "probe-action-reward": ([0.0], [1.0], [0.5]),
    "probe-match-obs": ([-0.5, 0.5], [1.0, 1.0], [-0.5, 0.5]),
}


def settings(script, name, hyper, **changes):
    """Settings of small runs on probe `name`; `hyper` are traced ones of the method."""
    hyper = script.Hyper(discount=DISCOUNT, actor_lr=3e-3, critic_lr=3e-3, target_rate=0.05, **hyper)
    small = {"hidden": (32, 32)} | ({"critic_hidden": (32, 32)} if hasattr(script.Args, "critic_hidden") else {})
    return dataclasses.replace(script.Args(), env=name, num_seeds=SEEDS, batch_size=64, hyper=hyper, **small, **changes)


def random_data(name, episodes=1_000):
    """Rows of uniformly random actions."""
    env = envs.make(name)

    def step(state, key):
        action_key, reset_key = jax.random.split(key)
        action = jax.random.uniform(action_key, (1,), minval=-1, maxval=1)
        following, reached = envs.step_and_reset(env, state, action, reset_key)
        return following, Transition(state.obs, action, reached.reward, reached.obs, 1 - reached.info["termination"])

    start = env.reset(jax.random.PRNGKey(0))
    return jax.jit(lambda: jax.lax.scan(step, start, jax.random.split(jax.random.PRNGKey(1), episodes))[1])()


PROGRAMS: dict[tuple, Compiled] = {}  # of a function of a script and its settings


class AnyProbe(Task):
    """All probes in one: `which` [], set while a program is traced, is the number of the one to play. So one program serves all five."""

    horizon, observation_size, action_size = 10, 1, 1
    probes = tuple(envs.make(name) for name in PROBES)

    def start(self, key):
        return jax.lax.switch(self.which, [probe.start for probe in self.probes], key)

    def advance(self, inner, action):
        return jax.lax.switch(self.which, [probe.advance for probe in self.probes], inner, action)

    def observe(self, inner):
        return inner


class Probing:
    """A script's state of SEEDS runs; `run(phase, length)` goes on with its function `<phase>_chunk`, compiled as `main` does."""

    def __init__(self, script, args, offline=None):
        self.script, self.args = script, args
        self.setup, self.mesh = script.make_setup(args, offline)._replace(env=AnyProbe()), mesh_for(SEEDS)
        self.which = place(jnp.int32(PROBES.index(args.env)), self.mesh, EVERYWHERE)
        keys = place(jnp.stack([jax.random.PRNGKey(seed) for seed in range(SEEDS)]), self.mesh, RUNS)
        self.hyper = place(jax.tree.map(lambda x: jnp.full(SEEDS, x, jnp.float32), args.hyper), self.mesh, RUNS)
        self.offline, self.added = place(offline, self.mesh, EVERYWHERE), 0
        given = {"hyper": self.hyper, "offline": self.offline, "key": keys}
        names = list(inspect.signature(script.init_state).parameters)[1:]
        shared = tuple(i for i, name in enumerate(names) if name == "offline")
        self.state = self.compiled(script.init_state, (*shared, len(names)))(*(given[name] for name in names), self.which)

    def compiled(self, function, shared, **settings):
        """`function` of the setup and more, which takes the number of the probe as one last argument; made once for all probes."""

        def on_probe(*arguments, setup=self.setup, **static):
            setup.env.which = arguments[-1]
            return function(setup, *arguments[:-1], **static)

        known = function.__module__, function.__qualname__, dataclasses.replace(self.args, env="probe"), self.offline is None
        if known not in PROGRAMS:
            PROGRAMS[known] = Compiled(on_probe, self.mesh, shared=shared, **settings)
        return PROGRAMS[known]

    def run(self, phase, length):
        """Metrics of `length` steps."""
        chunk = getattr(self.script, f"{phase}_chunk")
        more = (self.added,) if "added" in inspect.signature(chunk).parameters else ()
        program = self.compiled(chunk, tuple(range(2, 4 + len(more))), donate=(0,))
        self.state, metrics = program(self.state, self.hyper, self.offline, *more, self.which, length=length)
        self.added += length * self.args.num_envs * (phase in ("finetune", "explore"))
        assert (np.asarray(metrics["nonfinite_at"]) == -1).all()
        return metrics

    def check(self, agents, value, tolerance=0.12):
        """Values `value(setup, agent, obs)` [B] and mean actions of every seed's agent, against those known."""
        obs, values, actions = KNOWN[self.args.env]
        obs = jnp.float32(obs)[:, None]
        for seed in range(SEEDS):
            agent = jax.tree.map(lambda x, seed=seed: x[seed], agents)
            np.testing.assert_allclose(value(self.setup, agent, obs), values, atol=tolerance)
            if actions is not None:
                np.testing.assert_allclose(self.script.act(self.setup.nets, agent.actor, obs)[:, 0], actions, atol=0.2)


def state_value(setup, agent, obs):
    """V(s), of methods that learn one."""
    return setup.nets.value.apply(agent.value, obs)


def value_of_mean_action(setup, agent, obs):
    """The least Q-value of the mean action, for methods whose actor has a Gaussian squashed by tanh."""
    action = jnp.tanh(setup.nets.actor.apply(agent.actor, obs)[0])
    return setup.nets.critic.apply(agent.critic, obs, action).min(axis=0)
