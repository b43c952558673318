"""JSRL: whose action is played when, the curriculum against a plain loop, and what the online phase begins with."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_run import rows_of
from training import trained

from ooo_rl import envs
from ooo_rl.algos import jsrl
from ooo_rl.data.buffer import Transition
from ooo_rl.data.runs.session import Static


class Clock(envs.Task):
    """Episodes of 6 steps, or of 4 from every other start; the reward is the action. It never succeeds."""

    horizon, observation_size, action_size = 6, 1, 1

    def start(self, key):
        return jnp.where(jax.random.bernoulli(key), 0.0, 2.0)[None]

    def advance(self, inner, action):
        return inner + 1, action[0], inner[0] >= 5, jnp.bool_(False)

    def observe(self, inner):
        return inner


def make(**settings):
    """What the functions of jsrl.py get first, and a state in which the guide plays 0.5 and the policy -0.5."""
    args = jsrl.Args.exactly(
        {"hidden": (2,), "num_envs": 4, "online_steps": 64, "buffer_size": 64} | settings
    )
    nets = jsrl.make_nets(SimpleNamespace(args=args, action_size=1))
    one, scalar = jnp.zeros(1), jnp.float32(0)
    static = Static(args, Clock(), Transition(one, one, scalar, one, scalar), nets)
    state = jsrl.init_state(static, jax.random.PRNGKey(0))

    def plays(mean):
        params = jax.tree.map(jnp.zeros_like, state.guide)
        params["params"]["MLP_0"]["Dense_1"]["bias"] += jnp.arctanh(mean)
        params["params"]["log_std"] += -5.0  # a standard deviation of 0.007
        return params

    actor = state.agent.actor.replace(params=plays(-0.5))
    return static, state.replace(agent=state.agent.replace(actor=actor), guide=plays(0.5))


def online_rows(static, state, steps=16):
    """Actions and rewards [steps, num_envs] of a chunk, and the state after it."""
    chunk = jax.jit(partial(jsrl.finetune_chunk, static, length=steps))
    state, metrics = chunk(state, jsrl.Hyper(actor_lr=0.0), None, jnp.int32(0))
    return state.ring.obs.reshape(steps, 4), state.ring.action.reshape(steps, 4), state, metrics


def test_the_guide_acts_first_in_each_episode():
    """In stage 4 of 10 it has 5/9 of 4.5 steps: the first three of each episode."""
    static, state = make()
    course = state.course.replace(longest=jnp.float32(4.5), stage=jnp.int32(4))
    state = state.replace(course=course, guided=jnp.full(4, 4.5 * 5 / 9))
    obs, action, after, metrics = online_rows(static, state)
    elapsed = np.zeros(4)
    for now, played in zip(obs, action):
        np.testing.assert_allclose(played, np.where(elapsed < 2.5, 0.5, -0.5), atol=0.05)
        elapsed = np.where(now >= 5, 0, elapsed + 1)
    share = np.mean(action > 0)
    assert 0.4 < share < 0.8
    np.testing.assert_allclose(metrics["guided"], share, atol=1e-6)
    np.testing.assert_allclose(metrics["stage"], 4)
    jax.tree.map(np.testing.assert_array_equal, after.guide, state.guide)


def test_random_steps_are_drawn_for_each_episode():
    static, state = make(schedule="random", num_envs=2000)
    course = state.course.replace(longest=jnp.float32(6))
    steps = jsrl.guide_steps(static.args, course, jax.random.PRNGKey(0))
    np.testing.assert_allclose(np.quantile(steps, [0, 0.25, 0.5, 1]), [0, 1.5, 3, 6], atol=0.2)


def test_curriculum_is_that_of_a_plain_loop():
    args, hyper = jsrl.Args.exactly({"stages": 4, "window": 3}), jsrl.Hyper(tolerance=0.1)
    course = jsrl.Curriculum(jnp.float32(9), jnp.int32(0), jnp.full(3, -jnp.inf), jnp.float32(-jnp.inf))
    returns = [-10, -20, -10, -30, -30, -11, -5, -9, -8, -30, -2, -2, -1]
    best, stage, seen = None, 0, []
    for i, mean_return in enumerate(returns):
        course = jax.jit(partial(jsrl.advance, args, hyper))(course, jnp.float32(mean_return))
        if i >= 2:
            mean = np.mean(returns[i - 2 : i + 1])
            stage += best is None or mean >= best - 0.1 * abs(best)
            best = mean if best is None else max(best, mean)
        stage = min(stage, 3)
        assert int(course.stage) == stage
        seen.append(float(jsrl.stage_steps(args, course)))
    seen = np.round(seen, 4)
    assert sorted({*seen}) == [0, 3, 6, 9], "all stages, of which the last has no guide"
    assert {*np.diff(seen[: np.argmin(seen)])} == {0, -3}, "it waits as well as it goes on"


def test_too_few_evaluations_for_all_stages_are_told():
    """As many evaluations as are asked for reach the stage that is told, where no mean is worse."""
    args, hyper = jsrl.Args.exactly({"stages": 4, "window": 3}), jsrl.Hyper()
    course = jsrl.Curriculum(jnp.float32(9), jnp.int32(0), jnp.full(3, -jnp.inf), jnp.float32(-jnp.inf))
    for evaluations in range(1, 9):
        course = jsrl.advance(args, hyper, course, jnp.float32(1))
        assert int(course.stage) == jsrl.last_stage(args, evaluations)
    assert jsrl.last_stage(args, 2) == 0 and jsrl.last_stage(args, 5) == 3


def test_assessment_plays_the_combined_policy():
    """The guide has two steps of 0.5, then -0.5 to the end; half of the episodes have 6 steps, half 4."""
    static, state = make(eval_episodes=400)
    state = state.replace(course=state.course.replace(longest=jnp.float32(2)))
    after = jax.jit(partial(jsrl.assess, static))(state, jsrl.Hyper())
    np.testing.assert_allclose(after.course.recent[0], np.mean([1 - 2, 1 - 1]), atol=0.1)
    assert np.isneginf(after.course.recent[1:]).all() and not (after.key == state.key).all()


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_what_the_online_phase_begins_with(start):
    static, state = make(start=start, guide_episodes=400)
    before = state.agent.actor.params
    after = jax.jit(partial(jsrl.jump_start, static))(state)
    jax.tree.map(np.testing.assert_array_equal, after.guide, before)
    same = jax.tree.map(lambda x, y: bool((x == y).all()), after.agent, state.agent)
    assert all(jax.tree.leaves(same)) == (start == "warm")
    np.testing.assert_allclose(after.course.longest, 5, atol=0.2)
    np.testing.assert_allclose(after.guided, after.course.longest)


def test_a_run_goes_from_stage_to_stage(tmp_path):
    """Four evaluations of equal returns: two fill the window, and each from the second on ends a stage."""
    run = trained(
        jsrl, whole=False, env="test_jsrl:Clock", num_seeds=1, hidden=(2,), batch_size=4, utd_ratio=0.125,
        offline_steps=0, online_steps=64, eval_every=16, window=2, stages=3, tolerance=9, buffer_size=64,
        guide_episodes=2, eval_episodes=2, runs_dir=str(tmp_path), name="it",
    )  # fmt: skip
    stages = [float(r["value"]) for r in rows_of(run.result.folder) if r["metric"] == "stage"]
    assert stages == [0, 0, 1, 2]
