"""PER on IQL against plain NumPy: the weighted update, priorities step by step, and what is uniform replay."""

from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import adam_first_step, double, ensemble, gradient, mostly_close
from test_cql import check_moment
from test_jsrl import Clock
from test_losses import SETTINGS, params_of, value_of, whole_update
from test_sac import ACT, BATCH, OBS, random_rows

from ooo_rl.algos import iql, per_iql
from ooo_rl.data import buffer, n_step, priorities
from ooo_rl.data.buffer import Transition
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs import settings
from ooo_rl.data.runs.session import Static

KEY = jax.random.PRNGKey(3)
NAMES = "obs", "action", "reward", "next_obs", "discount"
ENVS, BLOCKS, OLD, N = 2, 4, 12, 3  # the ring holds the last 4 of 8 steps of 2 environments
STILL = dict.fromkeys(("actor_lr", "critic_lr", "value_lr", "target_rate"), 0.0)
EXPONENTS = {"priority_exponent": 0.7, "importance_exponent": 0.3, "final_importance_exponent": 0.8}


class Line(Clock):
    """Episodes from 0 are truncated after 5 steps, those from 2 terminate after 4."""

    horizon = 5


def static_of(sizes=(1, 1), **flags):
    """What the functions of per_iql.py get first; sizes of observations and actions."""
    small = {"hidden": (5, 4), "num_envs": ENVS, "online_steps": 16, "buffer_size": ENVS * BLOCKS}
    args = per_iql.Args.exactly(small | {"batch_size": 6, "n_steps": N} | flags)
    nets = per_iql.make_nets(SimpleNamespace(args=args, action_size=sizes[1]))
    obs, action, scalar = jnp.zeros(sizes[0]), jnp.zeros(sizes[1]), jnp.float32(0)
    return Static(args, Line(), Transition(obs, action, scalar, obs, scalar), nets)


def random_agent(static, rng):
    """An agent of random numbers, for which nothing compiles; its optimisers are new."""
    shapes = jax.eval_shape(partial(per_iql.init_agent, static.nets, static.example), KEY)
    fill = lambda tree: jax.tree.map(lambda x: np.float32(0.6 * rng.normal(size=x.shape)), tree)  # noqa: E731
    agent = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    learners = {
        name: getattr(agent, name).replace(params=fill(getattr(shapes, name).params))
        for name in ("actor", "critic", "value")
    }
    return agent.replace(**learners, target_critic=fill(shapes.target_critic))


@cache
def begun(num_old=OLD):
    """A state with a random agent, offline rows, and which of them are truncated."""
    static, rng = static_of(), np.random.default_rng(0)
    rows = truncation = None
    if num_old:
        goes_on, truncation = rng.random(num_old) < 0.8, jnp.asarray(rng.random(num_old) < 0.1)
        rows = random_rows(rng, num_old, 1, 1).replace(discount=np.float32(goes_on))
        rows = jax.tree.map(jnp.asarray, rows)
    state = jax.jit(partial(per_iql.init_state, static))(rows, KEY)
    return state.replace(agent=random_agent(static, rng)), rows, truncation


def lowest(tree, num_rows):
    entries = np.ravel(tree.levels[0])
    assert not entries[num_rows:].any()
    return entries[:num_rows]


# --- the update ---


def test_update_weighs_the_bellman_errors_of_rows():
    static, rng = static_of((OBS, ACT)), np.random.default_rng(0)
    agent, batch = random_agent(static, rng), random_rows(rng, BATCH)
    hyper, weight = per_iql.Hyper(**SETTINGS), np.float32(rng.uniform(0, 1, BATCH))
    ours, error, metrics = jax.jit(partial(per_iql.update, static.nets, hyper))(agent, batch, weight, KEY)
    theirs = whole_update(agent, batch, hyper, 0.0, -np.inf, np.inf)
    for name in ("value", "actor"):
        mostly_close(params_of(ours, name), theirs[name])

    before, slow, batch = double(agent.critic.params), double(agent.target_critic), double(batch)
    next_v = value_of(double(ours.value.params), batch.next_obs)
    y = 2 * batch.reward - 1 + 0.99 * batch.discount * next_v
    errors = lambda params: ensemble(params, batch.obs, batch.action) - y  # noqa: E731
    loss = lambda params: np.mean(weight * (errors(params) ** 2).sum(axis=0))  # noqa: E731
    np.testing.assert_allclose(error, np.abs(errors(before)).mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["critic_loss"], loss(before), rtol=1e-4)
    slope = gradient(loss, before)
    check_moment(ours.critic, slope)
    mostly_close(ours.critic.params, adam_first_step(before, slope, 3e-2))
    moved = jax.tree.map(lambda new, old: 0.1 * new + 0.9 * old, double(ours.critic.params), slow)
    mostly_close(ours.target_critic, moved)


def test_importance_weights():
    rng = np.random.default_rng(0)
    share = np.float32(rng.dirichlet(np.ones(50)))[:8]
    for beta in (0.0, 0.4, 1.0):
        weight = (50 * np.float64(share)) ** -beta
        np.testing.assert_allclose(per_iql.importance(share, beta), weight / weight.max(), rtol=1e-5)


def test_the_offline_phase_is_that_of_iql():
    static = static_of(offline_steps=9, actor_decay="cosine")
    state, rows, _ = begun()
    plain, hyper = iql.State(state.agent, None, None, state.key), per_iql.Hyper(**SETTINGS)
    ours, theirs = (
        jax.jit(partial(script.pretrain_chunk, static, length=3))(start, hyper, rows, 0)[0]
        for script, start in ((per_iql, state), (iql, plain))
    )
    for a, b in zip(jax.tree.leaves(ours.agent), jax.tree.leaves(theirs.agent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(lowest(ours.priorities, OLD + 8), [1] * OLD + [0] * 8)


# --- priorities ---


def error_of(agent, chain):
    """The absolute TD error of rows (obs, action, reward, next obs, discount) that follow one another."""
    reward = sum(0.9**k * (2 * row[2] - 0.5) for k, row in enumerate(chain))
    obs, action, _, _, _ = chain[0]
    *_, next_obs, discount = chain[-1]
    next_v = value_of(agent.value.params, next_obs[None])[0]
    y = reward + 0.9 ** len(chain) * discount * next_v
    return np.abs(ensemble(agent.critic.params, obs[None], action[None])[:, 0] - y).mean()


def chain_of(rows, ended, start):
    """The rows from `start` on, at most N, up to the end of the episode or of all rows."""
    stop = start + 1
    while stop < min(start + N, len(rows)) and not ended[stop - 1]:
        stop += 1
    return rows[start:stop]


@pytest.mark.parametrize("num_old", [OLD, 0])
def test_priorities_are_those_of_a_plain_loop(num_old):
    """Eight steps in a ring of four: new rows, n-step TD errors, weights and draws, each step by itself."""
    static = static_of()
    state, rows, truncation = begun(num_old)
    hyper = per_iql.Hyper(
        **STILL, **EXPONENTS, discount=0.9, reward_scale=2.0, reward_bias=-0.5, priority_offset=0.01
    )
    chunk = jax.jit(partial(per_iql.finetune_chunk, static, length=1))
    draw = jax.jit(lambda priority, key: priorities.draw(priorities.create(priority), (6,), key))
    agent, old = double(state.agent), list(zip(*double([*vars(rows).values()]))) if num_old else []
    old_ended = (np.asarray(rows.discount) == 0) | np.asarray(truncation) if num_old else []
    expected, newest = np.float32(np.arange(num_old + 8) < num_old), np.float32(1)
    played, ended, lengths = [[], []], [[], []], {"old": set(), "new": set()}
    for t in range(8):
        keys = jax.random.split(jax.random.split(state.key, 4)[3], 2)
        state, metrics = chunk(state, hyper, rows, truncation, jnp.int32(2 * t))
        slot = 2 * t % 8 + np.arange(2)
        expected[num_old + slot] = newest
        for e in range(2):
            row = [np.float64(getattr(state.ring, name)[slot[e]]) for name in NAMES]
            age = 1 + next((k for k, over in enumerate(ended[e][::-1]) if over), t)
            played[e].append(row)
            ended[e].append(row[3][0] >= 6 or age == 5)

        beta, found = 0.3 + 0.5 * 2 * t / 16, []
        for key in keys:
            draw_key, _ = jax.random.split(key)
            index = np.asarray(draw(expected, draw_key))
            weight = (np.sum(expected > 0) * expected[index] / expected.sum()) ** -beta
            errors = []
            for i in index:
                if i < num_old:
                    chain, kind = chain_of(old, old_ended, i), "old"
                else:
                    block, e = divmod(i - num_old, 2)
                    time = max(s for s in range(t + 1) if s % BLOCKS == block)
                    chain, kind = chain_of(played[e], ended[e], time), "new"
                lengths[kind].add(len(chain))
                errors.append(error_of(agent, chain))
            found.append((np.mean(errors), np.mean(weight / weight.max()), np.mean(index < num_old)))
            fresh = (np.array(errors) + 0.01) ** 0.7
            expected[index], newest = fresh, max(newest, np.float32(fresh.max()))

        np.testing.assert_allclose(lowest(state.priorities, num_old + 8), expected, rtol=1e-4)
        np.testing.assert_allclose(state.newest, newest, rtol=1e-4)
        names = "td_error", "importance_weight", "offline_share"
        np.testing.assert_allclose([metrics[name] for name in names], np.mean(found, axis=0), rtol=1e-4)
    assert lengths == {"old": {1, 2, 3} if num_old else set(), "new": {1, 2, 3}}, "some windows were not met"
    assert newest > 1 and len({*expected}) >= 8


def test_without_exponents_it_is_uniform_replay():
    """All rows that are there have one priority, no weight is below 1, and a step is IQL's on those rows."""
    static, hyper = static_of(n_steps=1), per_iql.Hyper(**SETTINGS)
    hyper = hyper.replace(priority_exponent=0.0, importance_exponent=0.0, final_importance_exponent=0.0)
    state, rows, truncation = begun()
    chunk = jax.jit(partial(per_iql.finetune_chunk, static, length=2))
    for step in range(3):
        state, metrics = chunk(state, hyper, rows, truncation, jnp.int32(4 * step))
        there = OLD + min(4 * (step + 1), 8)
        np.testing.assert_array_equal(lowest(state.priorities, OLD + 8), np.arange(OLD + 8) < there)
        np.testing.assert_array_equal([state.newest, metrics["importance_weight"]], 1)

    data, ring = n_step.linked(rows, truncation), state.ring
    learn = jax.jit(partial(per_iql.learn, static, hyper))
    ours, _ = learn(data, ring, jnp.int32(12), jnp.float32(0), state.replace(ring=None), KEY)
    draw_key, update_key = jax.random.split(KEY)
    batch = buffer.take(data, ring, priorities.draw(state.priorities, (6,), draw_key))
    theirs, _ = jax.jit(partial(iql.update, static.nets, hyper))(state.agent, batch, update_key)
    for a, b in zip(jax.tree.leaves(ours.agent), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# --- settings ---


def test_an_agent_of_iql_fits():
    """So that --init-from a run of iql.py keeps all that was learnt."""
    for env in ("point-mass-wall", "hopper", "antmaze-umaze", "maze2d-umaze", "kitchen-mixed", "door"):
        ours, theirs = (
            settings.parse(script.Args, ["--env", env, "--dataset", "mine.npz"]) for script in (per_iql, iql)
        )
        for name in ("hidden", "dropout", "return_range", "end_reward", "expectile", "reward_bias"):
            values = [{**vars(args), **vars(args.hyper)}[name] for args in (ours, theirs)]
            assert values[0] == values[1], (env, name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--n-steps 0", "--n-steps must be at least 1, not 0"),
        ("--priority-offset 0", "--priority-offset must be above 0"),
        ("--priority-exponent -1", "--priority-exponent must be at least 0"),
        ("--importance-exponent 1.5", "--importance-exponent must be at most 1"),
        ("--sweep final-importance-exponent=0,2", "--final-importance-exponent must be at most 1"),
    ],
)
def test_exponents_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(UsageError) as error:
        settings.parse(per_iql.Args, flags.split())
    assert message in str(error.value)
