"""What tests with the five probes share: data of random actions, the phases of any script compiled as it
does, the known answers.
"""

import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from ooo_rl import envs
from ooo_rl.data.buffer import Transition
from ooo_rl.data.runs.program import EVERYWHERE, RUNS, SHARED, Compiled, mesh_for, place
from ooo_rl.data.runs.session import Static
from ooo_rl.envs.base import Task

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
    traced = {"discount": DISCOUNT, "actor_lr": 3e-3, "critic_lr": 3e-3, "target_rate": 0.05} | hyper
    small = {"hidden": (32, 32)} | (
        {"critic_hidden": (32, 32)} if hasattr(script.Args, "critic_hidden") else {}
    )
    values = {"env": name, "num_seeds": SEEDS, "batch_size": 64} | small | traced | changes
    return script.Args.exactly(values)


def random_data(name, episodes=1_000):
    """Rows of uniformly random actions."""
    env = envs.make(name)

    def step(state, key):
        action_key, reset_key = jax.random.split(key)
        action = jax.random.uniform(action_key, (1,), minval=-1, maxval=1)
        following, reached = envs.step_and_reset(env, state, action, reset_key)
        return following, Transition(
            state.obs, action, reached.reward, reached.obs, 1 - reached.info["termination"]
        )

    start = env.reset(jax.random.PRNGKey(0))
    return jax.jit(lambda: jax.lax.scan(step, start, jax.random.split(jax.random.PRNGKey(1), episodes))[1])()


PROGRAMS: dict[tuple, Compiled] = {}  # of a function of a script and its settings


class AnyProbe(Task):
    """All probes in one: `which` [], set while a program is traced, is the number of the one to play. So one
    program serves all five.
    """

    horizon, observation_size, action_size = 10, 1, 1
    probes = tuple(envs.make(name) for name in PROBES)

    def start(self, key):
        return jax.lax.switch(self.which, [probe.start for probe in self.probes], key)

    def advance(self, inner, action):
        return jax.lax.switch(self.which, [probe.advance for probe in self.probes], inner, action)

    def observe(self, inner):
        return inner


class Probing:
    """A script's state of SEEDS runs; `run(phase, length)` goes on with its function `<phase>_chunk`,
    compiled as `train` does.
    """

    def __init__(self, script, args, offline=None):
        self.script, self.args, self.mesh = script, args, mesh_for(SEEDS)
        self.nets = script.make_nets(SimpleNamespace(args=args, env=AnyProbe(), obs_size=1, action_size=1))
        obs, scalar = jnp.zeros(1), jnp.float32(0)
        self.static = Static(args, AnyProbe(), Transition(obs, obs, scalar, obs, scalar), self.nets)
        keys = jnp.stack([jax.random.PRNGKey(seed) for seed in range(SEEDS)])
        hyper = jax.tree.map(lambda x: jnp.full(SEEDS, x, jnp.float32), args.hyper)
        uncut = None if offline is None else jnp.zeros(len(offline.reward), bool)
        everywhere = {"offline": offline, "truncation": uncut, "which": jnp.int32(PROBES.index(args.env))}
        self.given = {name: place(x, self.mesh, RUNS) for name, x in (("key", keys), ("hyper", hyper))}
        self.given |= {name: place(x, self.mesh, EVERYWHERE) for name, x in everywhere.items()}
        self.given["added"] = 0
        self.state = self.call(script.init_state)

    def call(self, function, **static):
        """`function` of the script, for all seeds; its arguments are known by name, and its program serves
        all probes.
        """
        names = [p.name for p in inspect.signature(function).parameters.values() if p.kind != p.KEYWORD_ONLY][
            1:
        ]

        def on_probe(*arguments, static=self.static, **settings):
            static.env.which = arguments[-1]
            return function(static, *arguments[:-1], **settings)

        kinds = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in (*names, "which")]
        on_probe.__signature__ = inspect.Signature(kinds)
        settings = str({**vars(self.args), "env": "probe"})
        known = function.__module__, function.__qualname__, settings, self.given["offline"] is None
        if known not in PROGRAMS:
            PROGRAMS[known] = Compiled(on_probe, self.mesh, shared=(*SHARED, "which"))
        given = self.given | ({"state": self.state} if "state" in names else {})
        return PROGRAMS[known](*(given[name] for name in names), given["which"], **static)

    def run(self, phase, length):
        """Metrics of `length` steps."""
        self.state, metrics = self.call(getattr(self.script, f"{phase}_chunk"), length=length)
        self.given["added"] += length * self.args.num_envs * (phase in ("finetune", "explore"))
        assert (np.asarray(metrics["nonfinite_at"]) == -1).all()
        return metrics

    def check(self, agents, value, tolerance=0.12):
        """Values `value(nets, agent, obs)` [B] and mean actions of every seed's agent, against those known."""
        obs, values, actions = KNOWN[self.args.env]
        obs = jnp.float32(obs)[:, None]
        for seed in range(SEEDS):
            agent = jax.tree.map(lambda x, seed=seed: x[seed], agents)
            np.testing.assert_allclose(value(self.nets, agent, obs), values, atol=tolerance)
            if actions is not None:
                taken = self.script.act(self.nets, agent.actor.params, obs)
                np.testing.assert_allclose(taken[:, 0], actions, atol=0.2)


def state_value(nets, agent, obs):
    """V(s), of methods that learn one."""
    return nets.value.apply(agent.value.params, obs)


def value_of_mean_action(nets, agent, obs):
    """The least Q-value of the mean action, for methods whose actor has a Gaussian squashed by tanh."""
    action = jnp.tanh(nets.actor.apply(agent.actor.params, obs)[0])
    return nets.critic.apply(agent.critic.params, obs, action).min(axis=0)
