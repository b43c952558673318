"""QDagger: its update and the teacher's weight against NumPy, what the online phase begins with, a whole run."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import adam_first_step, double, ensemble, forward, gradient, mostly_close
from test_jsrl import Clock
from test_losses import SETTINGS, value_of, weighted_cloning_loss, whole_update
from test_losses import make as random_agent
from test_run import rows_of
from training import trained

from ooo_rl.algos import iql, qdagger
from ooo_rl.data.buffer import Transition
from ooo_rl.data.runs.session import Static

KEY = jax.random.PRNGKey(0)


@pytest.fixture(scope="module")
def made():
    """Networks, an agent, a teacher, and a batch."""
    nets, agent, batch, rng = random_agent(qdagger)
    moved = lambda x: x + np.float32(0.4 * rng.normal(size=x.shape))  # noqa: E731
    return nets, agent, jax.tree.map(moved, agent.actor.params), batch


def density(params, obs):
    """Mean [B, A, 1] and log standard deviation [A, 1] of a policy."""
    mean = np.tanh(forward(params["params"]["MLP_0"], obs))
    return mean[..., None], np.clip(params["params"]["log_std"], -5, 2)[:, None]


def divergence(student, teacher, obs):
    """The mean KL divergence, by integration over each dimension of the action."""
    (mean, log_std), (goal, log_goal) = density(student, obs), density(teacher, obs)
    x = goal + np.exp(log_goal) * np.linspace(-9, 9, 400)
    log_p = -0.5 * ((x - goal) / np.exp(log_goal)) ** 2 - log_goal - 0.5 * np.log(2 * np.pi)
    log_q = -0.5 * ((x - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    return np.trapezoid(np.exp(log_p) * (log_p - log_q), x, axis=-1).sum(axis=-1).mean()


def test_update_with_a_teacher(made):
    nets, agent, teacher, batch = made
    hyper = qdagger.Hyper(**SETTINGS)
    ours, metrics = jax.jit(partial(qdagger.update, nets, hyper))(agent, batch, KEY, teacher, 0.7)
    expected = whole_update(agent, batch, hyper, 0.0, -np.inf, np.inf)
    mostly_close(ours.value.params, expected["value"])
    mostly_close(ours.critic.params, expected["critic"])
    mostly_close(ours.target_critic, expected["target_critic"])

    student, teacher, batch = double((agent.actor.params, teacher, batch))
    q = ensemble(double(agent.target_critic), batch.obs, batch.action).min(axis=0)
    adv = q - value_of(expected["value"], batch.obs)

    def imitation(params):
        return weighted_cloning_loss(params, batch.obs, batch.action, adv, hyper.temperature)

    def both(params):
        return imitation(params) + 0.7 * divergence(params, teacher, batch.obs)

    np.testing.assert_allclose(metrics["actor_loss"], imitation(student), rtol=1e-4)
    np.testing.assert_allclose(
        metrics["distillation_loss"], divergence(student, teacher, batch.obs), rtol=1e-4
    )
    moved = adam_first_step(student, gradient(both, student), hyper.actor_lr)
    mostly_close(ours.actor.params, moved)
    with pytest.raises(AssertionError):  # the teacher changes the step
        mostly_close(moved, expected["actor"])


def test_update_without_a_teacher_is_iqls(made):
    nets, agent, _, batch = made
    ours, theirs = (
        jax.jit(partial(script.update, nets, script.Hyper(**SETTINGS)))(agent, batch, KEY)[0]
        for script in (qdagger, iql)
    )
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs))


@pytest.mark.parametrize(
    ("teacher", "student", "share"),
    [
        (100, 75, 0.25), (100, 0, 1), (100, -50, 1), (100, 120, 0),  # max(1 - student / teacher, 0), at most 1
        (-50, -60, 0.2), (-50, -200, 1), (-50, -40, 0), (-50, 10, 0),  # what a quotient would get wrong
        (0, 0, 0), (0, -3, 1), (0, 3, 0),
    ],
)  # fmt: skip
def test_shortfall(teacher, student, share):
    ours = qdagger.shortfall(jnp.float32(student), jnp.float32(teacher))
    np.testing.assert_allclose(ours, share, atol=1e-6)


def test_weight_of_the_teacher():
    """Over the steps of a phase of 1,000, for a student that is behind by 0.4."""
    steps, hyper = np.arange(0, 1001, 50), qdagger.Hyper(distill_weight=0.3)
    for settings, expected in (
        ({}, np.where(steps < 1000, 0.3 * 0.4, 0)),
        ({"distill_until": 600}, np.where(steps < 600, 0.3 * 0.4, 0)),
        ({"schedule": "linear"}, 0.3 * (1 - steps / 1000)),
        ({"schedule": "linear", "distill_until": 600}, 0.3 * np.maximum(1 - steps / 600, 0)),
    ):
        args = qdagger.Args.exactly({"online_steps": 1000} | settings)
        ours = qdagger.weight_of_teacher(args, hyper, jnp.float32(0.4), jnp.asarray(steps))
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def make(**settings):
    """What the functions of qdagger.py get first, and a state whose policy always plays 0.5."""
    args = qdagger.Args.exactly({"hidden": (2,), "num_envs": 4, "online_steps": 64} | settings)
    nets = qdagger.make_nets(SimpleNamespace(args=args, action_size=1))
    one, scalar = jnp.zeros(1), jnp.float32(0)
    static = Static(args, Clock(), Transition(one, one, scalar, one, scalar), nets)
    return static, plays(0.5, qdagger.init_state(static, KEY))


def plays(mean, state):
    """`state` with a policy that always plays `mean`."""
    params = jax.tree.map(jnp.zeros_like, state.agent.actor.params)
    params["params"]["MLP_0"]["Dense_1"]["bias"] = jnp.full(1, np.arctanh(mean), jnp.float32)
    return state.replace(agent=state.agent.replace(actor=state.agent.actor.replace(params=params)))


@pytest.mark.parametrize("start", ["warm", "cold"])
def test_what_the_online_phase_begins_with(start):
    """Half of the episodes have 6 steps, half 4; each step pays the action."""
    static, state = make(start=start, teacher_episodes=400)
    after = jax.jit(partial(qdagger.appoint, static))(state)
    jax.tree.map(np.testing.assert_array_equal, after.teacher, state.agent.actor.params)
    same = jax.tree.map(lambda x, y: bool((x == y).all()), after.agent, state.agent)
    kernels = [
        kept
        for path, kept in jax.tree.leaves_with_path(same)
        if "kernel" in jax.tree_util.keystr(path) and ".opt" not in jax.tree_util.keystr(path)
    ]
    assert all(jax.tree.leaves(same)) if start == "warm" else not any(kernels)
    np.testing.assert_allclose(after.teacher_return, 5 * 0.5, atol=0.1)
    assert after.behind == 1, "before a comparison the teacher has its whole weight"


def test_comparison_plays_the_student():
    static, state = make(eval_episodes=400)
    state = plays(0.3, state.replace(teacher_return=jnp.float32(2.5)))
    after = jax.jit(partial(qdagger.compare, static))(state)
    np.testing.assert_allclose(after.behind, 1 - 0.3 / 0.5, atol=0.04)
    assert not (after.key == state.key).all()


def test_a_run_compares_the_two_at_its_evaluations(tmp_path, monkeypatch):
    """The student is half as far behind at each; from step 40 on the teacher has no weight."""
    catch_up = lambda static, state: state.replace(behind=state.behind / 2)  # noqa: E731
    monkeypatch.setattr(qdagger, "compare", catch_up)
    run = trained(
        qdagger, whole=False, env="test_jsrl:Clock", num_seeds=1, hidden=(2,), batch_size=4, num_envs=2,
        utd_ratio=0.5, offline_steps=0, online_steps=64, eval_every=16, learning_starts=0, teacher_episodes=2,
        distill_until=40, runs_dir=str(tmp_path), name="it",
    )  # fmt: skip
    rows = rows_of(run.result.folder)
    found = {int(r["step"]): float(r["value"]) for r in rows if r["metric"] == "distill_weight"}
    expected = [0.3, 0.3 / 2, 0.3 / 4 / 2, 0]  # the third chunk is half over at step 40
    assert list(found) == [16, 32, 48, 64]
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-5)
    distances = [float(r["value"]) for r in rows if r["metric"] == "distillation_loss"]
    assert len(distances) == 4 and min(distances) > 0, "the student has moved away from its teacher"
