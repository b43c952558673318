"""MJX-Warp against the C engine, with 1, 8 and 64 worlds, and what is refused.

Warp runs on a CPU as well. It compiles its kernels at the first use and keeps them in its own cache.
"""

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from ooo_rl import envs
from ooo_rl.envs.engines import mjx_warp
from ooo_rl.envs.engines.physics import Scene, make_engine

needs_warp = pytest.mark.skipif(
    importlib.util.find_spec("warp") is None,
    reason="warp-lang (149 MB) is not installed: pip install '.[warp]', or MJX-Warp remains unchecked",
)
WORLDS = 64
KITCHEN = {"model": "mjx", "noise": 0.0}


def states(name: str, settings: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Where weak random actions lead 64 worlds on the C engine: qpos, qvel, one more action, and how many
    contacts these states have together."""
    env, rng = envs.make(name, physics="mujoco", **settings), np.random.default_rng(0)
    actions = np.float32(rng.uniform(-1, 1, (31, WORLDS, env.action_size)))
    begun = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.PRNGKey(0), WORLDS))
    body = getattr(begun.pipeline_state, "body", begun.pipeline_state)
    qpos, qvel = np.array(body.qpos), np.array(body.qvel)
    if name.startswith("antmaze"):  # the start is a corner between walls that are 2 m away
        qpos[:, :2] += np.float32(rng.uniform(-1.6, 1.6, (WORLDS, 2)))

    def roll(qpos, qvel, actions):
        following = lambda state, action: (env.step(state, action), None)  # noqa: E731
        inner = jax.lax.scan(following, env.reset_to(qpos, qvel), actions)[0].pipeline_state
        body = getattr(inner, "body", inner)
        return body.qpos, body.qvel

    qpos, qvel = map(np.asarray, jax.jit(jax.vmap(roll, (0, 0, 1)))(qpos, qvel, 0.1 * actions[:-1]))
    data, contacts = mujoco.MjData(env.model), 0
    for data.qpos[:] in qpos:
        mujoco.mj_forward(env.model, data)
        contacts += data.ncon
    return qpos, qvel, actions[-1], contacts


@needs_warp
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *[(name, {}) for name in ("halfcheetah", "hopper", "walker2d", "ant", "antmaze-umaze")],
        pytest.param("kitchen-complete", KITCHEN, marks=pytest.mark.slow),
    ],
)
def test_one_eight_and_many_worlds_step_as_in_c(name, settings):
    qpos, qvel, action, contacts = states(name, settings)
    assert contacts > 48  # the room that MJX makes for all worlds together if it is not told how many

    def step(env):
        return lambda *state: env.step(env.reset_to(*state[:2]), state[2]).obs

    ours, exactly = (envs.make(name, physics=engine, **settings) for engine in ("mjx-warp", "mujoco"))
    wanted = jax.vmap(step(exactly))

    def measured(qpos, qvel, action):
        nested = [x.reshape(4, WORLDS // 4, -1) for x in (qpos, qvel, action)]
        many = jax.vmap(jax.vmap(step(ours)))(*nested)
        return {
            1: step(ours)(qpos[0], qvel[0], action[0])[None],
            8: jax.vmap(step(ours))(qpos[:8], qvel[:8], action[:8]),
            WORLDS: many.reshape(WORLDS, -1),
        }

    exact = np.asarray(jax.jit(wanted)(qpos, qvel, action))
    for worlds, obs in jax.jit(measured)(qpos, qvel, action).items():
        error = np.abs(np.asarray(obs) - exact[:worlds]).max(1)
        assert np.median(error) < 1e-4 and error.max() < 5e-3, (worlds, np.sort(error)[-5:])


@needs_warp
def test_a_world_without_room_is_broken_and_says_why(monkeypatch, capfd):
    monkeypatch.setattr(mjx_warp, "room", lambda *_: (1, 8))
    env = envs.make("halfcheetah", physics="mjx-warp")
    lying = jnp.asarray(env.model.qpos0).at[1].set(-0.3)
    reached = jax.jit(jax.vmap(lambda q: env.step(env.reset_to(q, jnp.zeros(9)), jnp.zeros(6))))(lying[None])
    assert reached.info["broken"].tolist() == [1]
    assert np.isfinite(reached.obs).all() and np.isnan(reached.pipeline_state.qpos).all()
    assert "broadphase overflow - please increase" in capfd.readouterr().out


PENDULUM = """<mujoco><worldbody><body pos="0 0 1"><joint name="hinge" type="hinge" axis="0 1 0"/>
<geom type="capsule" size=".05 .2" mass="1"/><site name="tip" pos="0 0 .2"/></body></worldbody>
<actuator><motor joint="hinge" ctrlrange="-1 1"/></actuator></mujoco>"""


@needs_warp
def test_worlds_have_scenes_of_their_own():
    scenes, seen = jnp.array([[0.0, 0.0, 0.2], [0.1, 0.0, 0.3]]), []
    for physics in ("mujoco", "mjx-warp"):
        model = mujoco.MjModel.from_xml_string(PENDULUM)
        engine = make_engine(physics, model, 2, scene=Scene((("site_pos", 0),), ("tip",)))

        def watch(scene, engine=engine):
            body = engine.begin(jnp.full(1, 0.5), jnp.ones(1), scene)
            return body.watched, engine.step(body, jnp.ones(1)).watched

        seen.append(np.stack(jax.jit(jax.vmap(watch))(scenes)))
    np.testing.assert_allclose(seen[1], seen[0], atol=1e-6)


def test_static_geoms_within_reach_are_counted():
    rng = np.random.default_rng(0)
    for _ in range(20):
        low = rng.integers(0, 6, (9, 2)).astype(float)
        high = low + rng.integers(0, 4, (9, 2))
        points = np.array(list(itertools.product(np.arange(10.0), repeat=2)))
        inside = ((low <= points[:, None]) & (points[:, None] <= high)).all(-1)
        assert mjx_warp.deepest(low, high) == inside.sum(1).max()


def test_what_warp_would_run_wrongly_is_refused():
    ball = '<body name="b"><freejoint/><geom name="ball" size=".1"/></body><geom name="wall" type="box" size="1 1 1"/>'

    def model(more=""):
        return mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{ball}</worldbody>{more}</mujoco>")

    pair = '<pair geom1="ball" geom2="wall"/>'
    height = (
        '<asset><hfield name="h" nrow="2" ncol="2" size="1 1 1 1"/></asset><worldbody><geom type="hfield" '
    )
    assert mjx_warp.unfit(model(f"<contact>{pair}</contact>"), (("body_pos", 1),)) is None
    assert "more than once" in mjx_warp.unfit(model(f"<contact>{pair * 2}</contact>"))
    assert "height field" in mjx_warp.unfit(model(height + 'hfield="h"/></worldbody>'))
    assert "geom_pos[0], but Warp has static geoms" in mjx_warp.unfit(model(), (("geom_pos", 0),))
    with jax.enable_x64(True):
        assert "JAX_ENABLE_X64" in mjx_warp.unfit(model())


@needs_warp
@pytest.mark.parametrize("name", ["door", "hammer", "pen", "relocate"])
def test_the_hands_are_refused(name):
    with pytest.raises(ValueError, match=r"C_rfdistal and C_lfdistal more than once.*choose mjx or mujoco"):
        envs.make(name, physics="mjx-warp")
