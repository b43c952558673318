"""Which offline rows IQL's fine-tuning goes on with, and how widely it explores. (Losses: test_losses.py.)"""

import importlib
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sac import random_rows

from ooo_rl import envs
from ooo_rl.algos import iql
from ooo_rl.data.buffer import Transition
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs.program import mesh_for
from ooo_rl.data.runs.session import Static

LENGTHS = [4, 6, 2, 5, 3]  # of five episodes; 20 rows


def session_of(keep, returns=(1, 9, 8, 2, 3), ordered=True):
    """A session whose data are five episodes with these returns; the first number of a row's obs is its place."""
    episode = np.repeat(np.arange(5), LENGTHS)
    rows = random_rows(np.random.default_rng(0), 20)
    rows = rows.replace(reward=np.float32(np.repeat(np.divide(returns, LENGTHS), LENGTHS)))
    rows.obs[:, 0] = np.arange(20)
    data = SimpleNamespace(transitions=rows, episode=episode, card={"id": "mine", "ordered": ordered})
    offline, args = jax.tree.map(jnp.asarray, rows), SimpleNamespace(keep=keep)
    return SimpleNamespace(args=args, data=data, offline=offline, mesh=mesh_for(1))


@pytest.mark.parametrize(
    ("returns", "rows"),
    [
        ((1, 2, 3, 9, 4), range(12, 17)),  # the best episode alone is more than a fifth
        ((9, 1, 2, 3, 4), range(4)),  # just a fifth, 4 of 20
        ((1, 7, 9, 2, 3), [*range(4, 10), 10, 11]),  # two rows are not enough: the next one, whole
    ],
)
def test_the_best_fifth_is_of_whole_episodes(returns, rows):
    found = iql.kept(session_of("best", returns))
    np.testing.assert_array_equal(found.obs[:, 0], rows)
    np.testing.assert_array_equal(found.action, session_of("best").offline.action[np.array(rows)])


def test_all_or_no_offline_rows():
    session = session_of("all")
    assert iql.kept(session) is session.offline
    assert iql.kept(session_of("none")) is None
    nothing = SimpleNamespace(args=SimpleNamespace(keep="all"), data=None, offline=None)
    assert iql.kept(nothing) is None
    for keep in ("none", "best"):
        nothing.args.keep = keep
        with pytest.raises(UsageError, match=f"--keep {keep} chooses rows of --dataset, and it is none"):
            iql.kept(nothing)


def test_rows_in_no_order_have_no_best_episodes():
    with pytest.raises(UsageError, match="--keep best: the rows of mine are in no order"):
        iql.kept(session_of("best", ordered=False))


@pytest.mark.parametrize(
    ("decay", "online_steps", "rate"),
    [("auto", 0, 0.05), ("auto", 96, 0.1), ("cosine", 96, 0.05), ("none", 0, 0.1)],
)
def test_the_learning_rate_decays_over_this_phase_alone(monkeypatch, decay, online_steps, rate):
    """Half of it is over, whatever --init-from brought along."""
    env, two, scalar = envs.make("point-mass-wall"), jnp.zeros(2), jnp.float32(0)
    args = {
        "hidden": (2,),
        "offline_steps": 10,
        "online_steps": online_steps,
        "num_envs": 48,
        "batch_size": 4,
    }
    args = iql.Args.exactly(args | {"actor_decay": decay})
    nets = iql.make_nets(SimpleNamespace(args=args, action_size=2))
    static = Static(args, env, Transition(two, two, scalar, two, scalar), nets)
    state = jax.jit(partial(iql.init_state, static))(jax.random.PRNGKey(0))
    opt = state.agent.actor.opt
    actor = state.agent.actor.replace(opt=opt._replace(count=jnp.full_like(opt.count, 700)))
    state = state.replace(agent=state.agent.replace(actor=actor))
    monkeypatch.setattr(iql, "update", lambda nets, hyper, agent, *_: (agent, {"rate": hyper.actor_lr}))
    rows = jax.tree.map(jnp.asarray, random_rows(np.random.default_rng(0), 20, obs_size=2, action_size=2))
    metrics = iql.pretrain_chunk(static, state, iql.Hyper(actor_lr=0.1), rows, 5, length=2)[1]
    np.testing.assert_allclose(metrics["rate"], rate, rtol=1e-5)


ON_IQL = "gde_iql", "jsrl", "qdagger", "bp_iql", "per_iql", "o3f_iql", "ooo_iql", "pex"
BODIES = "halfcheetah", "ant-sparse"  # here PEX has settings of its own
OTHERS = "antmaze-umaze", "antmaze-large-goal-missing", "maze2d-large", "kitchen-mixed", "door", "pen-binary", \
    "hammer-truncated-expert"  # fmt: skip


@pytest.mark.parametrize(
    ("name", "env"),
    [(name, env) for name in ON_IQL for env in (*BODIES, *OTHERS) if name != "pex" or env in OTHERS],
)
def test_scripts_on_iql_have_its_settings(name, env):
    def of(script):
        args = script.Args(env=env)
        shared = "offline_steps", "dropout", "end_reward", "return_range"
        traced = "discount", "expectile", "temperature", "reward_scale", "reward_bias", "target_rate"
        return [getattr(args, x) for x in shared] + [getattr(args.hyper, x) for x in traced]

    assert of(importlib.import_module(f"ooo_rl.algos.{name}")) == of(iql)


def test_exploration_has_the_spread_that_is_asked():
    """Standard deviations e^-1 times the spread around a mean of 0, in the rows of a chunk without offline ones."""
    env, n = envs.make("point-mass-wall"), 500
    settings = {"hidden": (2,), "num_envs": n, "online_steps": 4 * n, "utd_ratio": 1 / n, "batch_size": 4}
    args, two, scalar = iql.Args.exactly(settings), jnp.zeros(2), jnp.float32(0)
    nets = iql.make_nets(SimpleNamespace(args=args, action_size=2))
    static = Static(args, env, Transition(two, two, scalar, two, scalar), nets)
    state = jax.jit(partial(iql.init_state, static))(jax.random.PRNGKey(0))
    params = jax.tree.map(jnp.zeros_like, state.agent.actor.params)
    params["params"]["log_std"] -= 1.0
    state = state.replace(agent=state.agent.replace(actor=state.agent.actor.replace(params=params)))
    chunk = jax.jit(partial(iql.finetune_chunk, static, length=4))
    for spread in (0.0, 0.5, 1.0):
        hyper = iql.Hyper(exploration_spread=spread, actor_lr=0.0)
        ring = chunk(state, hyper, None, jnp.int32(0))[0].ring
        np.testing.assert_allclose(ring.action.std(axis=0), spread * np.exp(-1), atol=0.02)
