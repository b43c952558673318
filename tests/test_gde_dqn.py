"""GDE with discrete actions: the explorer's loss against plain NumPy in float64; trials, and who is the teacher."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import adam_first_step, double, gradient, mostly_close
from test_dqn import BATCH, OBS, SETTINGS, check_update, q_of, random_rows

from ooo_rl import envs
from ooo_rl.algos import gde_dqn
from ooo_rl.data.buffer import Transition
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs.session import Static

NUM_ENVS = 3


def static_of(env=None, obs_size=OBS, num_actions=4, **settings):
    args = gde_dqn.Args(env="none", hidden=(5, 4), num_envs=NUM_ENVS, **settings)
    nets = gde_dqn.make_nets(SimpleNamespace(args=args, action_size=num_actions))
    obs, scalar = jnp.zeros(obs_size), jnp.float32(0)
    return Static(args, env, Transition(obs, jnp.int32(0), scalar, obs, scalar), nets)


def agent_of(static, rng):
    """An agent of random numbers, whose target differs from its network."""
    shapes = jax.eval_shape(partial(gde_dqn.init_agent, static), jax.random.PRNGKey(0))
    fill = lambda tree: jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), tree)  # noqa: E731
    agent = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return agent.replace(
        actor=agent.actor.replace(params=fill(shapes.actor.params)), target=fill(shapes.target)
    )


def hyper_of(**more):
    return gde_dqn.Hyper(**{k: v for k, v in SETTINGS.items() if hasattr(gde_dqn.Hyper, k)}, **more)


def test_update_of_the_exploiter():
    static, rng = static_of(), np.random.default_rng(0)
    agent, batch = agent_of(static, rng), random_rows(rng)
    ours, metrics = jax.jit(partial(gde_dqn.update, static, hyper_of()))(agent, batch)
    agent, batch = double(agent), batch.replace(obs=double(batch.obs), next_obs=double(batch.next_obs))
    check_update(ours, metrics, agent, batch, 0, q_of(agent.target, batch.next_obs))


def test_update_of_the_explorer():
    static, rng = static_of(), np.random.default_rng(0)
    explorer, teacher, batch = agent_of(static, rng), agent_of(static, rng).actor.params, random_rows(rng)
    step = jax.jit(partial(gde_dqn.update_explorer, static, hyper_of(temperature=0.5)))
    ours, metrics = step(explorer, teacher, jnp.float32(0.8), batch)
    explorer, teacher = double(explorer), double(teacher)
    batch = batch.replace(obs=double(batch.obs), next_obs=double(batch.next_obs))
    next_q = q_of(explorer.target, batch.next_obs).max(axis=1)
    target = 2 * batch.reward - 1 + 0.99 * batch.discount * next_q
    guide = np.exp(2 * q_of(teacher, batch.obs))
    guide /= guide.sum(axis=1, keepdims=True)

    def loss(params):
        q = q_of(params, batch.obs)
        own = np.exp(2 * q) / np.exp(2 * q).sum(axis=1, keepdims=True)
        kl = np.mean((guide * np.log(guide / own)).sum(axis=1))
        return np.mean((q[np.arange(BATCH), batch.action] - target) ** 2) + 0.8 * kl, kl

    wanted, kl = loss(explorer.actor.params)
    np.testing.assert_allclose(metrics["explorer_loss"], wanted, rtol=1e-4)
    np.testing.assert_allclose(metrics["divergence"], kl, rtol=1e-4)
    grads = gradient(lambda params: loss(params)[0], explorer.actor.params)
    actor = adam_first_step(explorer.actor.params, grads, 2e-2)
    mostly_close(ours.actor.params, actor)
    mostly_close(ours.target, jax.tree.map(lambda new, old: 0.1 * new + 0.9 * old, actor, explorer.target))


@pytest.fixture(scope="module")
def course():
    """States after each step of three cycles of nine steps of all environments, whose first six are a trial.

    Exploiter and explorer do nothing alike: the one goes up, the other to the right. No step has noise, and
    episodes take four steps.
    """
    env = envs.make("toy-maze", horizon=4, noise=0)
    given = {"online_steps": 9 * NUM_ENVS * 3, "trial_every": 9 * NUM_ENVS, "trial_steps": 6 * NUM_ENVS}
    static = static_of(env, 2, 5, **given)
    state = gde_dqn.init_state(static, jax.random.PRNGKey(0))

    def always(action):
        zero = jax.tree.map(jnp.zeros_like, state.agent.actor.params)
        bias = jnp.zeros(5).at[action].set(1.0)
        zero["params"]["MLP_0"]["Dense_2"]["bias"] = bias
        return state.agent.replace(actor=state.agent.actor.replace(params=zero))

    state = state.replace(agent=always(2), explorer=always(4))
    step = jax.jit(partial(gde_dqn.play, static, gde_dqn.Hyper(epsilon=0.0)))
    states, metrics = [], []
    for i in range(27):
        state, more = step(state, jnp.int32(i * NUM_ENVS))
        states.append(state)
        metrics.append(more)
    return static, states, metrics


def test_the_exploiter_plays_trials_and_the_explorer_the_rest(course):
    static, states, metrics = course
    position = np.arange(27) % 9
    action = np.asarray(states[-1].ring.action).reshape(27, NUM_ENVS)
    np.testing.assert_array_equal(action, np.where(position < 6, 2, 4)[:, None] + np.zeros((1, NUM_ENVS)))
    assert [float(m["in_trial"]) for m in metrics] == (position < 6).tolist()
    starts = np.asarray(states[-1].ring.obs).reshape(27, NUM_ENVS, 2)[::9]  # each trial begins anew
    np.testing.assert_allclose(starts, np.broadcast_to(static.env.layout["start"], starts.shape), atol=1e-6)


def test_only_the_best_trial_makes_a_teacher(course):
    """Each first episode costs 4 in each environment: the second and third trial are not better."""
    _, states, metrics = course
    assert [float(m["new_teacher"]) for m in metrics] == [i == 5 for i in range(27)]
    totals = [float(state.trial.total) for state in states]
    assert totals[:6] == [-3, -6, -9, -12, -12, -12] and float(states[-1].trial.best) == -12
    exploiter = states[0].agent.actor.params
    jax.tree.map(np.testing.assert_array_equal, states[5].teacher, exploiter)
    jax.tree.map(np.testing.assert_array_equal, states[-1].teacher, exploiter)
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), states[4].teacher, exploiter)
    assert max(jax.tree.leaves(apart)) > 0


def test_a_worse_exploiter_does_not_become_the_teacher():
    env = envs.make("toy-maze", horizon=4)
    static = static_of(env, 2, 5, online_steps=90, trial_every=27, trial_steps=18)
    state = gde_dqn.init_state(static, jax.random.PRNGKey(0))
    reached = jax.vmap(env.reset)(jax.random.split(jax.random.PRNGKey(0), NUM_ENVS)).replace(
        reward=-jnp.ones(NUM_ENVS)
    )
    other = jax.tree.map(lambda x: x + 1, state.agent)
    for best, is_new in ((-4.0, False), (-6.0, True)):
        trial = gde_dqn.Trial(jnp.array([True, False, True]), jnp.float32(-3), jnp.float32(best))
        now = state.replace(tried=other.actor.params, trial=trial)
        after, new = gde_dqn.judge(static, now, reached, jnp.int32(5))
        assert bool(new) == is_new and float(after.trial.best) == (-5 if is_new else best)
        wanted = (other.actor.params if is_new else state.teacher)["params"]
        jax.tree.map(np.testing.assert_array_equal, after.teacher["params"], wanted)
        assert not gde_dqn.judge(static, now, reached, jnp.int32(4))[1]  # the trial is not over


def test_all_three_begin_as_what_was_learnt():
    static = static_of(envs.make("toy-maze"), 2, 5, online_steps=90)
    state = gde_dqn.init_state(static, jax.random.PRNGKey(0))
    learnt = state.replace(agent=agent_of(static, np.random.default_rng(0)))
    began = gde_dqn.decouple(static, learnt)
    for copy in (began.explorer.actor.params, began.explorer.target, began.teacher, began.tried):
        jax.tree.map(np.testing.assert_array_equal, copy, learnt.agent.actor.params)
    assert began.explorer.actor.opt.count == 0


def test_who_plays_a_trial_does_not_learn_in_it():
    """The exploiter may learn; the network that plays and is judged is that of the trial's first step."""
    static = static_of(envs.make("toy-maze"), 2, 5, online_steps=90, trial_every=27, trial_steps=18)
    state = gde_dqn.init_state(static, jax.random.PRNGKey(0))
    step, changed = jax.jit(partial(gde_dqn.play, static, gde_dqn.Hyper())), []
    for i in range(10):
        moved = state.agent.actor.replace(params=jax.tree.map(lambda x: x + 1, state.agent.actor.params))
        before, state = state.tried, state.replace(agent=state.agent.replace(actor=moved))
        state, _ = step(state, jnp.int32(i * NUM_ENVS))
        changed.append(not jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), before, state.tried)))
    assert changed == [i % 9 == 0 for i in range(10)]
    jax.tree.map(np.testing.assert_array_equal, state.tried, state.agent.actor.params)


def test_who_learns_what(monkeypatch):
    """Both learn the same rows at the online rate; rho falls from --rho to 0; offline, no explorer learns."""
    seen = []

    def record(static, hyper, agent, batch):
        seen.append((float(hyper.lr), batch.obs.shape))
        return agent, {"q": batch.reward.mean()}

    def record_explorer(static, hyper, explorer, teacher, rho, batch):
        seen.append((float(hyper.lr), batch.obs.shape))
        return explorer, {"rho": rho}

    monkeypatch.setattr(gde_dqn, "update", record)
    monkeypatch.setattr(gde_dqn, "update_explorer", record_explorer)
    env = envs.make("toy-maze")
    static = static_of(
        env, 2, 5, online_steps=90, trial_every=27, trial_steps=18, batch_size=6, utd_ratio=1 / 3
    )
    state = gde_dqn.init_state(static, jax.random.PRNGKey(0))
    rows = jax.tree.map(lambda x: jnp.zeros((8, *jnp.shape(x)), x.dtype), static.example)
    hyper = gde_dqn.Hyper(lr=0.1, online_lr=0.3, rho=0.5)
    jax.eval_shape(lambda s: gde_dqn.pretrain_chunk(static, s, hyper, rows, length=1), state)
    assert set(seen) == {(0.1, (6, 2))}
    seen.clear()
    tune = jax.jit(lambda s, added: gde_dqn.finetune_chunk(static, s, hyper, added, length=1, learns=True))
    for added in (0, 45, 87):
        _, metrics = tune(state, jnp.int32(added))
        assert float(metrics["rho"]) == pytest.approx(0.5 * (1 - added / 90))
    assert set(seen) == {(0.3, (6, 2))}


def test_a_trial_leaves_time_to_explore():
    args = gde_dqn.Args(trial_every=800, trial_steps=800, num_envs=8)
    with pytest.raises(UsageError, match="--trial-steps 800 leaves nothing of --trial-every 800"):
        gde_dqn.make_plan(args)
