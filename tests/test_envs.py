"""The environment contract on every environment, and the point mass and the probes against what is known of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
from envs import point_mass_wall as pm
from envs.rollout import rollout

SAME = ("play", "diverse-v0", "play-v0", "missing", "missing-v0", "missing-data", "umaze-diverse")  # names of one task with other data
ALL = pytest.mark.parametrize("name", [name for name in envs.names() if not name.endswith(SAME)])


@ALL
def test_contract(name):
    env = envs.make(name)
    env.horizon = min(env.horizon, 15 if name.startswith(("ant", "half", "hop", "walk")) else 150)
    keys = jax.random.split(jax.random.PRNGKey(0), 64)
    state = jax.jit(jax.vmap(env.reset))(keys)
    step = jax.jit(jax.vmap(lambda s, a, k: envs.step_and_reset(env, s, a, k)))
    ends = {"termination": 0, "truncation": 0}
    for i in range(env.horizon + 2):
        action = jax.random.uniform(jax.random.PRNGKey(i), (64, env.action_size), minval=-1, maxval=1)
        following, reached = step(state, action, jax.random.split(jax.random.PRNGKey(1000 + i), 64))
        assert reached.obs.shape == (64, env.observation_size)
        flags = (reached.info[kind] for kind in ("termination", "truncation", "broken"))
        for leaf in (reached.reward, reached.done, reached.metrics["success"], *flags):
            assert leaf.shape == (64,)
            assert leaf.dtype == jnp.float32
        assert (reached.done == jnp.maximum(reached.info["termination"], reached.info["truncation"])).all()
        assert (reached.info["termination"] * reached.info["truncation"] == 0).all()
        over = np.asarray(reached.done) > 0
        np.testing.assert_array_equal(following.obs[~over], reached.obs[~over])
        assert (np.asarray(following.info["elapsed"])[over] == 0).all()
        for kind in ends:
            ends[kind] += int(reached.info[kind].sum())
        state = following
    assert sum(ends.values()) > 0
    assert jax.tree.structure(state) == jax.tree.structure(following)


def test_the_true_next_observation_outlives_the_reset():
    env = envs.make("point-mass-wall", start_noise="none")
    near = env.reset(jax.random.PRNGKey(0)).replace(pipeline_state=jnp.array([0.95, 0.15]), obs=jnp.array([0.95, 0.15]))
    following, reached = envs.step_and_reset(env, near, jnp.array([1.0, 0.0]), jax.random.PRNGKey(1))
    assert reached.info["termination"] == 1
    np.testing.assert_allclose(reached.obs, [0.95 + pm.STEP, 0.15], atol=1e-6)
    np.testing.assert_allclose(following.obs, pm.START, atol=1e-6)


def segments_meet(p, q):
    """Whether segment p-q meets the wall, by orientations of triangles."""
    a, b = (pm.WALL_X, pm.WALL_BOTTOM), (pm.WALL_X, pm.WALL_TOP)
    turn = lambda o, u, v: (u[0] - o[0]) * (v[1] - o[1]) - (u[1] - o[1]) * (v[0] - o[0])  # noqa: E731
    return turn(a, b, p) * turn(a, b, q) < 0 and turn(p, q, a) * turn(p, q, b) < 0


def test_the_wall_stops_exactly_the_moves_that_meet_it():
    rng = np.random.default_rng(0)
    start = np.float32(rng.uniform([0.46, -0.05], [0.54, 1.35], (4000, 2)))
    action = np.float32(rng.uniform(-1, 1, (4000, 2)))
    env = envs.make("point-mass-wall")
    end = np.asarray(jax.vmap(lambda p, a: env.advance(p, a)[0])(start, action))
    target = np.clip(np.float64(start) + np.float64(action) * pm.STEP, pm.LOW, pm.HIGH)
    blocked = np.array([segments_meet(p, q) for p, q in zip(np.float64(start), target)])
    assert 300 < blocked.sum() < 3000
    np.testing.assert_allclose(end, np.where(blocked[:, None], start, target), atol=1e-6)


def test_bounds_hold_and_actions_are_clipped():
    env = envs.make("point-mass-wall", start_noise="none")
    state = env.reset(jax.random.PRNGKey(0))
    far = jax.jit(env.step)(state, jnp.array([-9.0, -9.0]))
    np.testing.assert_allclose(far.obs, pm.START - pm.STEP, atol=1e-6)
    corner, *_ = env.advance(jnp.array([-0.24, 1.44]), jnp.array([-1.0, 1.0]))
    np.testing.assert_allclose(corner, [pm.LOW[0], pm.HIGH[1]], atol=1e-6)


@pytest.mark.parametrize(("reward", "there", "elsewhere"), [("cost", 0.0, -1.0), ("goal", 1.0, 0.0)])
def test_rewards_and_radius(reward, there, elsewhere):
    env = envs.make("point-mass-wall", reward=reward, goal_radius=0.02)
    still = jnp.zeros(2)
    for offset, inside in ((0.019, True), (0.021, False)):
        _, got, ended, success = env.advance(pm.GOAL + jnp.array([0.0, offset]), still)
        assert bool(ended) == bool(success) == inside
        assert got == (there if inside else elsewhere)


def test_horizon_truncates_and_start_noise_has_its_size():
    env = envs.make("point-mass-wall", horizon=7)
    tally = rollout(env, jnp.zeros_like, jax.random.PRNGKey(0), 3)
    assert (np.asarray(tally["length"]) == 7).all()
    assert (np.asarray(tally["success"]) == 0).all()
    starts = {
        kind: jax.vmap(envs.make("point-mass-wall", start_noise=kind).start)(jax.random.split(jax.random.PRNGKey(0), 4000))
        for kind in ("normal", "uniform")
    }
    assert abs(float(starts["normal"].std(axis=0).mean()) - 0.02) < 1e-3
    assert float(jnp.abs(starts["uniform"] - pm.START).max()) <= 0.0201
    assert abs(float(starts["uniform"].std(axis=0).mean()) - 0.02 / 3**0.5) < 1e-3


def test_bad_names_and_settings():
    with pytest.raises(ValueError, match="did you mean point-mass-wall"):
        envs.make("point-mas-wall")
    with pytest.raises(ValueError, match="leave --physics auto"):
        envs.make("point-mass-wall", physics="mjx")
    with pytest.raises(ValueError, match="unknown physics"):
        envs.make("point-mass-wall", physics="bullet")
    for bad in ({"goal_radius": 0.0}, {"horizon": 0}, {"start_noise": "some"}, {"reward": "dense"}):
        with pytest.raises(ValueError, match=r"got"):
            envs.make("point-mass-wall", **bad)


def test_rollout_is_a_plain_loop():
    env = envs.make("point-mass-wall")
    toward = lambda obs: jnp.clip((jnp.array([0.3, -0.1]) - obs) / pm.STEP, -1, 1) * 0.9 + 0.1  # noqa: E731
    key = jax.random.PRNGKey(3)
    tally = jax.jit(lambda: rollout(env, toward, key, 2, record=True))()
    step = jax.jit(env.step)
    for e, k in enumerate(jax.random.split(key, 2)):
        state, total, length, success = env.reset(k), 0.0, 0, 0.0
        while length < env.horizon:
            state = step(state, toward(state.obs))
            total, length, success = total + float(state.reward), length + 1, max(success, float(state.metrics["success"]))
            np.testing.assert_allclose(tally["obs"][e, length], state.obs, atol=1e-5)
            if state.done:
                break
        assert (float(tally["return"][e]), int(tally["length"][e]), float(tally["success"][e])) == (total, length, success)


def test_brax_trains_on_it(monkeypatch):
    from brax.training.agents.ppo import train as ppo

    # brax 0.14.2 still calls what jax 0.10 took out.
    replicate = lambda tree, devices: jax.tree.map(lambda x: jnp.stack([x] * len(devices)), tree)  # noqa: E731
    monkeypatch.setattr(jax, "device_put_replicated", replicate, raising=False)

    _, _, metrics = ppo.train(
        envs.make("probe-match-obs"), num_timesteps=256, episode_length=10, num_envs=8, batch_size=8, num_minibatches=2,
        unroll_length=4, num_updates_per_batch=1, num_evals=2, num_eval_envs=4, max_devices_per_host=1,
        action_repeat=1, normalize_observations=False,
    )  # fmt: skip
    assert np.isfinite(metrics["eval/episode_reward"])
