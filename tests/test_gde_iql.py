"""GDE on IQL: the explorer's loss and step against NumPy; whose action is played when; who becomes the teacher."""

from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import adam_first_step, double, ensemble, forward, gradient, mostly_close
from test_sac import ACT, BATCH, OBS, random_rows

from ooo_rl import envs
from ooo_rl.algos import cql, gde_cql, gde_dqn, gde_iql, gde_td3_bc, iql, td3_bc
from ooo_rl.data.buffer import Transition
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs import settings
from ooo_rl.data.runs.session import Session, Static

SETTINGS = {"actor_lr": 2e-2, "critic_lr": 3e-2, "value_lr": 1e-2, "target_rate": 0.1, "reward_scale": 2.0}


class Clock(envs.Task):
    """Episodes of 6 steps that terminate; the reward is the action. It never succeeds."""

    horizon, observation_size, action_size = 6, 1, 1

    def start(self, key):
        return jnp.zeros(1)

    def advance(self, inner, action):
        return inner + 1, action[0], inner[0] >= 5, jnp.bool_(False)

    def observe(self, inner):
        return inner


def static_of(env=None, sizes=(OBS, ACT), **settings):
    args = gde_iql.Args.exactly({"hidden": (5, 4)} | settings)
    nets = gde_iql.make_nets(SimpleNamespace(args=args, action_size=sizes[1]))
    obs, action, scalar = jnp.zeros(sizes[0]), jnp.zeros(sizes[1]), jnp.float32(0)
    return Static(args, env, Transition(obs, action, scalar, obs, scalar), nets)


# --- the explorer's loss ---


def log_density(mean, std, action):
    return -0.5 * ((action - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)


def divergence(teacher, explorer):
    """KL by Gauss-Hermite quadrature, which is exact for log densities of Gaussians."""
    points, weights = np.polynomial.hermite_e.hermegauss(4)
    (mean, std), total = teacher, 0.0
    for x, w in zip(points, weights / weights.sum()):
        total = total + w * (log_density(mean, std, mean + std * x) - log_density(*explorer, mean + std * x))
    return total.sum(axis=-1)


def test_the_explorers_step():
    """IQL's step is that of iql.py on returns that are scaled already; then the explorer's, all by NumPy."""
    static, rng = static_of(), np.random.default_rng(0)
    fill = lambda tree: jax.tree.map(lambda x: np.float32(0.6 * rng.normal(size=x.shape)), tree)  # noqa: E731
    example = partial(gde_iql.init_agent, static.nets, static.example)
    agent = jax.jit(example)(jax.random.PRNGKey(0)).replace(target_critic=None)
    critic = fill(agent.critic.params)
    agent = agent.replace(target_critic=critic)
    own, teacher, batch = fill(agent.actor.params), fill(agent.actor.params), random_rows(rng, BATCH)
    explorer = agent.actor.replace(params=own)
    hyper, key, rho = gde_iql.Hyper(**SETTINGS), jax.random.PRNGKey(7), 0.7

    step = jax.jit(partial(gde_iql.guided_update, static, hyper))
    (learnt, moved), metrics = step(agent, explorer, teacher, rho, batch, key)
    update_key, explorer_key = jax.random.split(key)
    plain = iql.Hyper(**SETTINGS | {"reward_scale": 1.0})
    theirs = jax.jit(partial(iql.update, static.nets, plain))(agent, batch, update_key)[0]
    for ours, other in zip(jax.tree.leaves(learnt), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-6)

    noise, obs = np.float64(jax.random.normal(explorer_key, (BATCH, ACT))), np.float64(batch.obs)
    critic, own, teacher = double(critic), double(own), double(teacher)

    def gaussian(params):
        return np.tanh(forward(params["params"]["MLP_0"], obs)), np.exp(
            np.clip(params["params"]["log_std"], -5, 2)
        )

    def loss(params):
        mean, std = gaussian(params)
        q = ensemble(critic, obs, np.clip(mean + std * noise, -1, 1)).min(axis=0)
        return -q.mean() + rho * divergence(gaussian(teacher), (mean, std)).mean()

    np.testing.assert_allclose(metrics["explorer_loss"], loss(own), rtol=1e-4)
    np.testing.assert_allclose(
        metrics["divergence"], divergence(gaussian(teacher), gaussian(own)).mean(), rtol=1e-4
    )
    mostly_close(moved.params, adam_first_step(own, gradient(loss, own), 2e-2))


# --- who acts when ---


def make(**settings):
    """Two clocks side by side; the exploiter plays 0.5, the explorer -0.5, the teacher 0."""
    settings = {
        "num_envs": 2,
        "online_steps": 64,
        "trial_every": 32,
        "trial_steps": 20,
        "n_steps": 3,
    } | settings
    static = static_of(Clock(), (1, 1), hidden=(2,), **settings)
    state = jax.jit(partial(gde_iql.init_state, static))(jax.random.PRNGKey(0))

    def plays(mean):
        params = jax.tree.map(jnp.zeros_like, state.teacher)
        params["params"]["MLP_0"]["Dense_1"]["bias"] += jnp.arctanh(mean)
        params["params"]["log_std"] += -5.0  # a standard deviation of 0.007
        return params

    agent = state.agent.replace(actor=state.agent.actor.replace(params=plays(0.5)))
    explorer = state.explorer.replace(params=plays(-0.5))
    return static, state.replace(agent=agent, explorer=explorer, teacher=plays(0.0))


def after(static, state, steps, added=0):
    """The state after so many steps of both clocks, of no gradient step, and the metrics."""
    chunk = jax.jit(partial(gde_iql.finetune_chunk, static, length=steps, learns=False))
    return chunk(state, gde_iql.Hyper(), None, None, jnp.int32(added))


def bias_of(params):
    return np.tanh(params["params"]["MLP_0"]["Dense_1"]["bias"])


def test_trials_begin_each_cycle_with_fresh_episodes():
    """Of each 16 steps the exploiter plays 10, on clocks that begin anew; the explorer plays 6."""
    static, state = make()
    state, metrics = after(static, state, 32)
    action, clock, last = (x.reshape(32, 2) for x in (state.ring.action, state.ring.obs, state.ring.last))
    for t in range(32):
        np.testing.assert_allclose(action[t], 0.5 if t % 16 < 10 else -0.5, atol=0.05)
        np.testing.assert_array_equal(clock[t], t % 16 % 6)
        np.testing.assert_array_equal(last[t], t % 16 % 6 == 5 or t % 16 == 15)
    np.testing.assert_allclose(metrics["in_trial"], 10 / 16)
    assert np.ptp(action[:10]) == 0 < np.ptp(action[10:16]), "the mean in a trial, samples beside it"


def test_only_episodes_that_have_time_count():
    """In 10 steps the first episode of 6 ends, and the second does not: the return is 3, not 5 or 2.5."""
    static, state = make()
    state, _ = after(static, state, 10)
    np.testing.assert_allclose(state.trial.best, 3, atol=1e-5)
    np.testing.assert_allclose([state.trial.total, state.trial.episodes], [6, 2], atol=1e-5)
    longer, state = make(trial_steps=24)
    np.testing.assert_allclose(after(longer, state, 12)[0].trial.episodes, 4, err_msg="two of each clock")
    shorter, state = make(trial_steps=8)
    np.testing.assert_allclose(after(shorter, state, 4)[0].trial.best, 2, atol=1e-5, err_msg="4 of 6 steps")


@pytest.mark.parametrize("best", [2.9, 3.1])
def test_the_best_so_far_becomes_the_teacher(best):
    static, state = make()
    state = state.replace(trial=state.trial.replace(best=jnp.float32(best)))
    early, _ = after(static, state, 9)
    np.testing.assert_allclose(bias_of(early.teacher), 0)
    late, metrics = after(static, state, 16)
    np.testing.assert_allclose(bias_of(late.teacher), 0.5 if best < 3 else 0, atol=1e-6)
    np.testing.assert_allclose(late.trial.best, max(3, best), rtol=1e-6)
    np.testing.assert_allclose(metrics["new_teacher"], (best < 3) / 16)


@pytest.mark.parametrize("without", ["nothing", "exploiter"])
def test_who_plays_a_trial_does_not_learn_in_it(without):
    """Both policies learn from the first step on. What played, and is the teacher, is that of the first step."""
    static, state = make(batch_size=4, utd_ratio=0.5, without=without)
    at_start = (state.explorer if without == "exploiter" else state.agent.actor).params
    hyper = gde_iql.Hyper(actor_lr=0.05)
    chunk = jax.jit(partial(gde_iql.finetune_chunk, static, length=5, learns=True))
    for added in (32, 42):  # the second trial's ten steps, in two chunks; rows so far have the action 0
        state, _ = chunk(state, hyper, None, None, jnp.int32(added))
    for params in (state.teacher, state.tried):
        jax.tree.map(np.testing.assert_array_equal, params, at_start)
    assert np.ptp(state.ring.action[32:52]) == 0, "one and the same mean"
    for learner in (state.agent.actor, state.explorer):
        assert np.abs(bias_of(learner.params) - bias_of(at_start)).max() > 1e-4
    state, _ = chunk(state, hyper, None, None, jnp.int32(64))  # the next trial has another player
    assert np.abs(bias_of(state.tried) - bias_of(at_start)).max() > 1e-4


ABLATIONS = [  # flags, the actions in a trial and beside it, the teacher's after it
    ({"without": "exploiter"}, -0.5, -0.5, -0.5), ({"without": "explorer"}, 0.5, 0.5, 0.5),
    ({"teacher": "fixed"}, 0.5, -0.5, 0.0), ({"teacher": "none"}, 0.5, -0.5, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "tried", "explored", "teacher"), ABLATIONS)
def test_ablations(flags, tried, explored, teacher):
    static, state = make(**flags)
    state, _ = after(static, state, 16)
    np.testing.assert_allclose(state.ring.action[:20], tried, atol=0.05)
    np.testing.assert_allclose(state.ring.action[20:32], explored, atol=0.05)
    np.testing.assert_allclose(bias_of(state.teacher), teacher, atol=1e-6)


def test_rho_falls_to_nothing_and_the_explorer_may_have_no_teacher():
    """With a critic that is 0 everywhere the loss is rho times the divergence."""
    for flags, expected in (({}, 0.3 * 0.25), ({"teacher": "none"}, 0)):
        static, state = make(batch_size=4, utd_ratio=0.5, **flags)
        agent = state.agent.replace(target_critic=jax.tree.map(jnp.zeros_like, state.agent.target_critic))
        chunk = jax.jit(partial(gde_iql.finetune_chunk, static, length=1, learns=True))
        rates = dict.fromkeys(("actor_lr", "critic_lr", "value_lr"), 0.0)
        _, metrics = chunk(state.replace(agent=agent), gde_iql.Hyper(**rates), None, None, jnp.int32(48))
        np.testing.assert_allclose(metrics["explorer_loss"], expected * metrics["divergence"], rtol=1e-5)
        assert metrics["divergence"] > 1


def test_offline_rows_are_a_share_of_batches_on_request():
    """Each part has returns of its own rows: the data's of up to 3 steps of reward 1, the ring's of 0.5."""
    ones = np.ones(8, np.float32)
    data = Transition(ones[:, None] * 9, ones[:, None], ones, ones[:, None] * 9, ones)
    truncation = np.arange(8) % 4 == 3
    static, state = make(offline_ratio=0.25)
    ring = after(static, state, 8)[0].ring
    sample = jax.jit(partial(gde_iql.sample_batches, static, gde_iql.Hyper(discount=0.5)), static_argnums=4)
    batches = sample(data, truncation, ring, jnp.int32(16), (5, 80), jax.random.PRNGKey(0))
    assert batches.obs.shape == (5, 80, 1) and (np.sum(batches.obs == 9, axis=1) == 20).all()
    assert {*np.unique(batches.reward[:, :20])} == {1, 1.5, 1.75}
    np.testing.assert_allclose(np.unique(batches.reward[:, 20:].round(4)), [0.5, 0.75, 0.875])
    assert (sample(None, None, ring, jnp.int32(16), (1, 80), jax.random.PRNGKey(0)).obs < 9).all()


def test_a_trial_that_leaves_nothing_to_the_explorer_is_refused():
    with pytest.raises(
        UsageError, match="--trial-steps 20 leaves nothing of --trial-every 20 to the explorer"
    ):
        gde_iql.make_plan(gde_iql.Args.exactly({"trial_every": 20, "trial_steps": 20}))


def test_explorer_and_teacher_begin_as_the_policy_so_far():
    static, state = make()
    state = jax.jit(partial(gde_iql.decouple, static))(state)
    for params in (state.explorer.params, state.teacher, state.tried):
        jax.tree.map(np.testing.assert_array_equal, params, state.agent.actor.params)


# --- what the three scripts share ---


@pytest.mark.parametrize("without", ["nothing", "exploiter", "explorer"])
@pytest.mark.parametrize("script", [gde_iql, gde_td3_bc, gde_cql])
def test_the_explorer_alone_is_evaluated_and_saved(script, without, monkeypatch, tmp_path):
    """Explorer and exploiter differ by 1 everywhere, and nobody learns. Who is evaluated, and saved as what?"""
    decouple, seen = script.decouple, {}

    def apart(static, state):
        state = decouple(static, state)
        params = jax.tree.map(lambda x: x + 1, state.explorer.params)
        return state.replace(explorer=state.explorer.replace(params=params))

    def note(self, chunk, metrics, state, actor=None):
        seen["evaluated"] = state.agent.actor.params if actor is None else actor

    def conclude(self, state, export, policies):
        self.folder.close()
        return state, policies

    monkeypatch.setattr(script, "decouple", apart)
    monkeypatch.setattr(Session, "after", note)
    monkeypatch.setattr(Session, "conclude", conclude)
    given = {"env": "probe-match-obs", "hidden": (2,), "offline_steps": 0, "online_steps": 32, "num_envs": 8}
    given |= {"trial_every": 32, "trial_steps": 8, "learning_starts": 32, "eval_every": 32}
    given |= {"dataset": "none", "without": without, "runs_dir": str(tmp_path)}
    state, policies = script.train(script.Args(**given))
    explorer, exploiter = state.explorer.params, state.agent.actor.params
    saved = policies["policy"] if without == "exploiter" else policies["policy"].actor.params
    for found in (seen["evaluated"], saved):
        expected = explorer if without == "exploiter" else exploiter
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), explorer, exploiter))
    assert policies.get("explorer") is (None if without == "explorer" else explorer)
    assert policies["teacher"] is state.teacher


MAKE = cache(envs.make)


@pytest.mark.parametrize(("script", "base"), [(gde_iql, iql), (gde_td3_bc, td3_bc), (gde_cql, cql)])
def test_networks_fit_a_run_of_the_offline_method(script, base, monkeypatch):
    """So that --init-from a run with its defaults keeps all that was learnt."""
    monkeypatch.setattr(envs, "make", MAKE)
    for env in ("point-mass-wall", "hopper", "antmaze-umaze", "maze2d-umaze", "kitchen-mixed", "door"):
        flags = ["--env", env, "--dataset", "mine.npz"]
        ours, theirs = (settings.parse(kind.Args, flags) for kind in (script, base))
        for name in ("hidden", "critic_hidden", "layer_norm"):
            assert getattr(ours, name, None) == getattr(theirs, name, None), (env, name)


@pytest.mark.parametrize("script", [gde_iql, gde_td3_bc, gde_cql])
def test_a_share_of_offline_rows_needs_some(script):
    args = {"env": "probe-match-obs", "dataset": "none", "offline_steps": 0, "offline_ratio": 0.5}
    given = {"online_steps": 320, "num_envs": 8, "trial_every": 160, "trial_steps": 32}
    with pytest.raises(UsageError, match=r"--offline-ratio 0\.5 needs --dataset, and it is none"):
        script.train(script.Args(**args, **given))
    changing = given | {"online_change": ("offline-ratio=0.5",)}
    with pytest.raises(UsageError, match=r"--online-change offline-ratio=0\.5: with n-step returns"):
        script.train(script.Args(**args | {"offline_ratio": 0.0}, **changing))


def test_a_trial_that_is_no_episode_is_reported_for_discrete_actions(monkeypatch, capsys):
    """Only each environment's first episode counts there, so a longer trial is waste."""
    monkeypatch.setattr(Session, "compile", lambda *_: (_ for _ in ()).throw(InterruptedError))
    given = {"env": "toy-maze", "dataset": "none", "offline_steps": 0, "num_envs": 16, "trial_every": 4_800}
    for trial_steps, said in ((800, "50 steps"), (1_600, ""), (3_200, "200 steps")):
        with pytest.raises(InterruptedError):
            gde_dqn.train(
                gde_dqn.Args(**given, trial_steps=trial_steps, online_steps=48_000, utd_ratio=1 / 16)
            )
        printed = capsys.readouterr().out
        assert f"a trial has {said}, an episode 100" in printed if said else "a trial has" not in printed


def test_a_trial_shorter_than_an_episode_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(Session, "compile", lambda *_: (_ for _ in ()).throw(InterruptedError))
    given = {"env": "point-mass-wall", "dataset": "none", "offline_steps": 0, "num_envs": 48}
    for trial_steps, said in ((4_800, True), (7_200, False)):
        args = given | {"online_steps": 48_000, "trial_every": 24_000, "trial_steps": trial_steps}
        with pytest.raises(InterruptedError):
            gde_iql.train(gde_iql.Args(**args, utd_ratio=1 / 48))
        assert ("a trial has 100 steps, an episode 150" in capsys.readouterr().out) == said
