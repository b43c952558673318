"""What is known about the five probes, and rows of random actions to learn them from."""

import jax
import jax.numpy as jnp
import numpy as np

from ooo_rl import envs
from ooo_rl.envs.probes import AllProbesDiscrete

KNOWN = [  # (probe, observation, its value under the best action, this action; None where all are as good)
    ("constant reward", 0.0, 1.0, None),
    ("reward is obs", -1.0, -1.0, None),
    ("reward is obs", 1.0, 1.0, None),
    ("delayed reward", 0.0, "discount", None),
    ("delayed reward", 1.0, 1.0, None),
    ("action reward", 0.0, 1.0, 0.5),
    ("match obs", -0.5, 1.0, -0.5),
    ("match obs", 0.5, 1.0, 0.5),
]
LEVELS = jnp.array(AllProbesDiscrete.LEVELS)
PROBES = list(dict.fromkeys(name for name, *_ in KNOWN))  # in the order of the one-hot part of observations


def check(nets, agents, actors, act, discounts, where, without=(), ensemble_q=None):
    """Values of the best actions and mean actions in `probe-all`, or `-discrete`, against those known.

    `agents` are those of all runs, `act(actor, obs)` plays one of their policies, `discounts` has one number
    per run. `where` begins the message; the probes in `without` are not asked. An agent without values
    imitates: its mean action is that of the random rows, 0. `ensemble_q(nets, critic, obs, action)` are the
    values of an agent with several critics of a kind. What is wrong in a method is wrong in all runs. So
    the mean error of a value is held tightly, and that of one run loosely: a run may see a probe late.
    """
    known = [row for row in KNOWN if row[0] not in without]
    which = jax.nn.one_hot(jnp.array([PROBES.index(name) for name, *_ in known]), len(PROBES))
    obs = jnp.concatenate([jnp.float32([[s] for _, s, _, _ in known]), which], axis=1)

    def ask(agent, actor):
        action = act(actor, obs)
        if action.ndim == 1:  # discrete: numbers of levels; the values of all are the policy's own
            return LEVELS[action][:, None], nets.actor.apply(actor, obs).max(axis=-1)
        if hasattr(agent, "value"):
            return action, nets.value.apply(agent.value.params, obs)
        if ensemble_q:
            return action, ensemble_q(nets, agent.critic.params, obs, action)
        if hasattr(agent, "critic"):
            return action, nets.critic.apply(agent.critic.params, obs, action).min(axis=0)
        return action, None

    actions, values = jax.device_get(jax.jit(jax.vmap(ask))(agents, actors))
    wrong, none = [], np.zeros(len(discounts))
    for i, (name, s, value, best) in enumerate(known):
        right = discounts if value == "discount" else value
        best = 0.0 if values is None else best
        error = none if values is None else np.abs(values[:, i] - right)
        off = none if best is None else np.abs(actions[:, i, 0] - best)
        if error.mean() > 0.12 or error.max() > 0.3 or off.max() > 0.2:
            wrong.append(f"{name} at {s}: off by run: values {error.round(2)}, actions {off.round(2)}")
    assert not wrong, "\n".join([where, *wrong])


def random_rows(path, env="probe-all", n=8_000, without=()):
    """Writes rows of uniformly random actions in `env` as the .npz file `path`; returns its name.

    Of the n rows those of the probes in `without` are left out.
    """
    env = envs.make(env)

    def step(state, key):
        action_key, reset_key = jax.random.split(key)
        action = envs.random_actions(env, action_key)
        following, reached = envs.step_and_reset(env, state, action, reset_key)
        return following, (state.obs, action, reached.reward, reached.obs, reached.info["termination"])

    play = jax.jit(lambda start, keys: jax.lax.scan(step, start, keys)[1])
    rows = play(env.reset(jax.random.PRNGKey(0)), jax.random.split(jax.random.PRNGKey(1), n))
    names = "observations", "actions", "rewards", "next_observations", "terminals"
    left = np.ones(n, bool)
    for name in without:
        left &= np.asarray(rows[0])[:, 1 + PROBES.index(name)] == 0
    np.savez(path, **{name: np.asarray(part)[left] for name, part in zip(names, rows)})
    return str(path)
