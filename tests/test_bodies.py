"""MuJoCo's bodies: each engine against code that is not ours, states that travel through JAX exactly, and
worlds that break."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from ooo_rl import envs
from ooo_rl.data import buffer, policy
from ooo_rl.data.buffer import Transition
from ooo_rl.envs import antmaze, locomotion, physics_task
from ooo_rl.envs.engines import physics
from ooo_rl.envs.rollout import rollout

REPO = pathlib.Path(__file__).parents[1]
POLICIES = REPO.parent / "shared" / "policies"
needs_policies = pytest.mark.skipif(
    not POLICIES.is_dir(), reason="the real policies and trajectories are not on this machine"
)
BODIES = (  # tests/test_adroit.py has the hands
    "halfcheetah", "hopper", "walker2d", "ant", "halfcheetah-sparse", "ant-sparse", "antmaze-umaze",
    "antmaze-medium-diverse", "antmaze-large-diverse", "antmaze-umaze-gymnasium",
)  # fmt: skip


# --- parity ---


def test_c_engine_is_the_benchmark_to_rounding(tmp_path):
    flags = "--policies none --json p.json --precision 64 --engines mujoco --states 100 --horizon 100 --envs"
    command = [sys.executable, str(REPO / "tests/reproduction/parity.py"), *flags.split(), *BODIES]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert len(rows) == len(BODIES)
    for row in rows:
        assert row["obs_max"] < 1e-11 and row["reward_max"] < 1e-11, row
        assert row["terminations"].endswith(" 0 differ"), row
        assert max(row["diverged"]["ours"].values()) < 1e-9 < row["diverged"]["perturbed"]["100"], row


def test_mjx_in_float32_follows_c(monkeypatch):
    """One body, for the time that compiling takes; test_contacts.py has the ant, and docs/physics.md all of
    them."""
    monkeypatch.syspath_prepend(REPO / "tests" / "reproduction")
    import parity

    args = parity.Args(engines=("mjx",), states=150, horizon=0, policies=pathlib.Path("none"))
    (row,) = parity.measure("halfcheetah", args)
    assert row["obs_median"] < 1e-4 and row["obs_p99"] < 0.02 and row["terminations"].endswith(" 0 differ"), (
        row
    )


@needs_policies
@pytest.mark.parametrize("name", ["halfcheetah", "walker2d"])
def test_recorded_trajectories_replay(name):
    """Real transitions recorded by others, with the MuJoCo of their time; x is not recorded and does not
    matter."""
    with np.load(POLICIES / name / "cs285_expert_trajectories.npz") as file:
        obs, action, reward = (np.float32(file[key]) for key in ("observation", "action", "reward"))
    env = envs.make(name, physics="mujoco")
    half = env.model.nq - 1
    before, after = obs[:, :-1].reshape(-1, obs.shape[-1]), obs[:, 1:].reshape(-1, obs.shape[-1])
    actions, rewards = action.reshape(-1, action.shape[-1]), reward.reshape(-1)
    inside = [(np.abs(x[:, half:]) < 9.99).all(1) for x in (before, after)]
    # The velocities of walker2d were recorded clipped.
    whole = inside[0] & inside[1] if name == "walker2d" else np.ones(len(before), bool)
    assert whole.sum() > 150

    def step(obs, action):
        state = env.reset_to(jnp.concatenate([jnp.zeros(1), obs[:half]]), obs[half:])
        return env.step(state, action)

    reached = jax.jit(jax.vmap(step))(before[whole], actions[whole])
    np.testing.assert_allclose(reached.obs, after[whole], atol=2e-3)  # a float32 start
    assert np.median(np.abs(reached.obs - after[whole])) < 1e-6
    # The record charges for unclipped actions.
    excess = (actions[whole] ** 2).sum(1) - (np.clip(actions[whole], -1, 1) ** 2).sum(1)
    paid = env.control_cost * excess
    np.testing.assert_allclose(reached.reward - paid, rewards[whole], atol=2e-3)


@needs_policies
def test_a_real_policy_earns_in_ours_what_it_earns_in_gymnasium():
    import gymnasium

    actor = policy.load(POLICIES / "hopper" / "cs285_expert.npz")
    env = envs.make("hopper", physics="mujoco")
    act = lambda obs: policy.forward(actor, obs, None, jnp)  # noqa: E731
    tally = jax.jit(lambda key: rollout(env, act, key, 20))(jax.random.PRNGKey(0))
    ours, theirs = np.asarray(tally["return"]), []
    with gymnasium.make("Hopper-v4") as other:
        for seed in range(5):
            obs, _ = other.reset(seed=seed)
            total, over = 0.0, False
            while not over:
                obs, reward, terminated, truncated, _ = other.step(np.clip(policy.act(actor, obs), -1, 1))
                total, over = total + reward, terminated or truncated
            theirs.append(total)
    error = np.hypot(ours.std() / 20**0.5, np.std(theirs) / 5**0.5)
    assert abs(ours.mean() - np.mean(theirs)) < 2 * error + 5
    assert (np.asarray(tally["length"]) == 1000).all()


# --- the state of the C engine ---


def test_floats_become_doubles_bit_by_bit():
    rng = np.random.default_rng(0)
    many = rng.normal(size=1000) * 10.0 ** rng.integers(-37, 38, 1000)
    x = np.float32(np.concatenate([many, [0, -0.0, 1, -1, np.inf, -np.inf]]))
    x[np.abs(x) < np.finfo(np.float32).tiny] *= 0  # denormals count as zeros
    words = np.asarray(jax.jit(physics._double_words)(np.append(x, np.float32(np.nan))))
    doubles = np.ascontiguousarray(words).view(np.float64)
    np.testing.assert_array_equal(doubles[:-1], x.astype(np.float64))
    assert np.isnan(doubles[-1])


def test_c_state_is_exact_under_vmap_scan_and_resumption():
    """300 steps in nested vmaps, float32 outside, are those of a bare mj_step loop in float64, with a pause
    too."""
    import mujoco

    env = envs.make("halfcheetah", physics="mujoco")
    start = jax.jit(jax.vmap(jax.vmap(env.reset)))(jax.random.split(jax.random.PRNGKey(0), (2, 3)))
    actions = np.float32(np.random.default_rng(0).uniform(-1, 1, (300, 2, 3, 6)))
    step = jax.vmap(jax.vmap(env.step))
    run_150 = jax.jit(lambda state, actions: jax.lax.scan(lambda s, a: (step(s, a), None), state, actions)[0])
    half = run_150(start, actions[:150])
    saved = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, half))
    end = run_150(half, actions[150:])
    numbers = lambda state: np.ascontiguousarray(np.asarray(state.pipeline_state.inner)).view(np.float64)  # noqa: E731
    data = mujoco.MjData(env.model)
    data.qpos[:], data.qvel[:] = numbers(start)[1, 2, :9], numbers(start)[1, 2, 9:18]
    for a in actions[:, 1, 2]:
        data.ctrl[:] = a
        mujoco.mj_step(env.model, data, 5)
    np.testing.assert_array_equal(numbers(end)[1, 2, :18], np.concatenate([data.qpos, data.qvel]))
    np.testing.assert_array_equal(numbers(run_150(saved, actions[150:])), numbers(end))


# --- tasks ---


def test_reset_to_puts_any_body_into_a_state():
    for name in ("hopper", "ant-sparse", "antmaze-umaze", "maze2d-open"):
        env = envs.make(name)
        state = jax.jit(env.reset)(jax.random.PRNGKey(1))
        inner = state.pipeline_state
        body = getattr(inner, "body", inner)
        qpos, qvel = (body.qpos, body.qvel) if hasattr(body, "qpos") else (inner[:2], inner[2:])
        again = jax.jit(env.reset_to)(qpos, qvel)
        # A compiler may make two things of one sum in two programs.
        np.testing.assert_allclose(again.obs, state.obs, atol=1e-6)
        assert jax.tree.structure(again) == jax.tree.structure(state)
    with pytest.raises(ValueError, match=r"needs qpos \(6,\) and qvel \(6,\)"):
        envs.make("hopper").reset_to(jnp.zeros(5), jnp.zeros(6))
    with pytest.raises(NotImplementedError, match="no positions and velocities"):
        envs.make("probe-match-obs").reset_to(jnp.zeros(1), jnp.zeros(1))


@pytest.mark.parametrize(("name", "threshold"), [("halfcheetah-sparse", 20.0), ("ant-sparse", 10.0)])
def test_sparse_rewards_begin_beyond_the_threshold(name, threshold):
    env = envs.make(name)
    qpos, qvel, still = (
        jnp.asarray(env.model.qpos0, float),
        jnp.zeros(env.model.nv),
        jnp.zeros(env.action_size),
    )

    @jax.jit
    def step_from(ahead):
        state = env.reset_to(qpos, qvel)
        there = state.pipeline_state.replace(body=env.put(qpos.at[0].add(ahead), qvel))
        return env.step(state.replace(pipeline_state=there), still)

    for ahead, far in ((threshold - 0.5, 0.0), (threshold + 0.5, 1.0)):
        reached = step_from(ahead)
        assert (reached.reward, reached.metrics["success"], reached.info["termination"]) == (far, far, 0.0)


def test_antmaze_goals_and_starts_lie_where_d4rl_puts_them():
    env = envs.make("antmaze-large-diverse")
    keys = jax.random.split(jax.random.PRNGKey(0), 500)
    see = lambda key: (env.draw_goal(key), env.start(key).goal, env.start(key).body.qpos[:2])  # noqa: E731
    drawn, begun, starts = map(np.asarray, jax.jit(jax.vmap(see))(keys))
    for goals in (drawn, begun):
        assert (goals >= [32, 24]).all() and (goals <= [33.5, 25.5]).all()
        assert (goals.max(0) > [33.2, 25.2]).all()
    assert np.abs(starts).max() <= 0.1
    fixed = envs.make("antmaze-large-diverse-v0")
    assert len(np.unique(jax.jit(jax.vmap(lambda key: fixed.start(key).goal))(keys[:5]), axis=0)) == 1
    assert envs.make("antmaze-umaze").horizon == 700 and env.horizon == 1000
    centred = envs.make("antmaze-umaze-gymnasium")
    begun = jax.jit(jax.vmap(lambda key: centred.start(key).body))(keys)
    away = np.abs(begun.qpos[:, :2] - np.array([-4, 4]))
    assert 0.98 < away.max() <= 1.0
    # gymnasium-robotics gives its ant a reset noise of 0 (seen in AntMaze_UMaze-v3, -v4 and -v5).
    assert (begun.qpos[:, 2:] == centred.model.qpos0[2:]).all() and (begun.qvel == 0).all()
    np.testing.assert_allclose(centred.centre((1, 1)), [-4, 4])
    qpos, goal = jnp.asarray(env.model.qpos0, float), jnp.array([0.3, 0.0])
    reached = jax.jit(lambda goal: env.step(env.reset_to(qpos, jnp.zeros(14), goal), jnp.zeros(8)))(goal)
    assert (reached.reward, reached.info["termination"], reached.metrics["success"]) == (1, 1, 1)


def test_the_canonical_ant_is_the_same_ant():
    """Turning the world and renaming the legs changes neither what a policy sees nor what its actions do."""
    env = envs.make("ant-walk", physics="mujoco")
    rng, reset, step = np.random.default_rng(0), jax.jit(env.reset), jax.jit(env.step)

    @jax.jit
    def see(qpos, qvel, ahead, action):
        """What a policy sees, before and after its action."""
        obs, to_joints = antmaze.canonical(qpos[2:], qvel, ahead)
        body = env.engine.step(env.put(qpos, qvel), env.control(to_joints(action)))
        return obs, antmaze.canonical(body.qpos[2:], body.qvel, ahead)[0]

    for quarter in range(4):
        state = reset(jax.random.PRNGKey(quarter))
        for _ in range(3):
            state = step(state, jnp.float32(rng.uniform(-1, 1, 8)))
        qpos, qvel = np.array(state.pipeline_state.qpos), np.array(state.pipeline_state.qvel)
        angle, action = rng.uniform(-3, 3), jnp.float32(rng.uniform(-1, 1, 8))
        straight = see(*map(jnp.float32, (qpos, qvel, [1.0, 0.0])), action)
        other = *turned(qpos, qvel, angle, quarter), [np.cos(angle), np.sin(angle)]
        np.testing.assert_allclose(straight, see(*map(jnp.float32, other), action), atol=2e-4)
        w, x, y, z = np.asarray(straight[0][1:5])
        assert abs(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))) <= np.pi / 4 + 1e-5


def turned(qpos, qvel, angle, quarter):
    """The ant in a world turned by `angle`, its legs renamed by quarter turns, without the code under
    test."""
    rotation = lambda a: np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])  # noqa: E731
    q, v, back = qpos.copy(), qvel.copy(), quarter * np.pi / 2
    q[:2], v[:2] = rotation(angle) @ q[:2], rotation(angle) @ v[:2]
    v[3:5] = rotation(-back) @ v[3:5]
    from scipy.spatial.transform import Rotation

    about_z = lambda angle: Rotation.from_euler("z", angle)  # noqa: E731
    q[[4, 5, 6, 3]] = (about_z(angle) * Rotation.from_quat(q[[4, 5, 6, 3]]) * about_z(back)).as_quat()
    for values in (q[7:], v[6:]):
        ankles = np.roll(values[1::2] * [1, -1, -1, 1], -quarter) * [1, -1, -1, 1]
        values[0::2], values[1::2] = np.roll(values[0::2], -quarter), ankles
    return q, v


# --- broken worlds ---


class Exploding(locomotion.Hopper):
    """A hopper whose physics gives up when the first action is beyond 0.9."""

    def advance(self, inner, action):
        body, reward, termination, success = super().advance(inner, action)
        return body.replace(qpos=jnp.where(action[0] > 0.9, jnp.nan, body.qpos)), reward, termination, success


MANY = """
import jax, mujoco
from mujoco import mjx
from ooo_rl.envs.engines import euler
from ooo_rl.envs.engines.physics import our_mjx
joint = '<joint axis="0 1 0" damping="0.01" limited="true" range="-0.1 0.1"/>'
geom = '<geom size="0.01" contype="0" conaffinity="0"/>'
links = "".join(f'<body pos="0 {i} 0">{joint}{geom}</body>' for i in range(16))
model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{links}</worldbody></mujoco>")
device, start = mjx.put_model(model), mjx.make_data(model)
step = our_mjx()(lambda data, _: (euler.step(device, data), None))
run = jax.jit(jax.vmap(lambda qpos: jax.lax.scan(step, start.replace(qpos=qpos), None, 5)[0].qpos))
print(float(abs(run(0.2 * jax.random.normal(jax.random.PRNGKey(0), (512, 16)))).max()))
"""


def test_many_worlds_on_two_threads_come_to_an_end():
    """With `mjx.step` in the place of ours this never ends: see envs/engines/euler.py."""
    variables, command = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "2"}, [sys.executable, "-c", MANY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)
    assert done.returncode == 0 and 0 < float(done.stdout.split()[-1]) < 2, done.stderr[-2000:]


ON_TWO_DEVICES = """
import jax, jax.numpy as jnp
from ooo_rl import envs
from ooo_rl.data.runs.program import RUNS, Compiled, mesh_for, place
env, mesh = envs.make("halfcheetah", physics="mujoco"), mesh_for(2)
def play(key, *, length):
    state = jax.vmap(env.reset)(jax.random.split(key, 600))
    step = lambda state, _: (jax.vmap(env.step)(state, jnp.zeros((600, env.action_size))), None)
    return jax.lax.scan(step, state, None, length)[0].obs
keys = place(jax.random.split(jax.random.PRNGKey(0), 2), mesh, RUNS)
print(mesh.size, Compiled(play, mesh)(keys, length=20).shape)
"""


def test_host_calls_of_all_devices_at_once_come_to_an_end():
    """Their states have 130 kB. With `jax.pure_callback` this never ends: see envs/engines/host.py."""
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "2", "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-c", ON_TWO_DEVICES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=variables)
    assert done.stdout.strip() == "2 (2, 600, 17)", done.stderr[-2000:]


def test_a_broken_world_is_reset_counted_and_never_stored():
    env = Exploding()
    state = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.PRNGKey(0), 3))
    actions = jnp.array([[0.0, 0, 0], [1.0, 0, 0], [0.0, 0, 0]])
    following, reached = jax.jit(lambda *x: envs.step_all(env, *x))(state, actions, jax.random.PRNGKey(1))
    assert np.asarray(reached.info["broken"]).tolist() == [0, 1, 0]
    assert (reached.info["truncation"][1], reached.info["termination"][1], reached.reward[1]) == (1, 0, 0)
    assert np.isfinite(reached.obs).all()
    assert np.isfinite(np.asarray(jax.tree.leaves(following)[0], np.float32)).all()
    assert following.info["elapsed"].tolist() == [1, 0, 1]
    assert envs.tally(reached)["broken_worlds"] == 1
    rows = Transition(state.obs, actions, reached.reward, reached.obs, 1 - reached.info["termination"])
    ring = buffer.empty(jax.tree.map(lambda x: x[0], rows), 6)
    ring = buffer.insert(ring, rows, jnp.int32(0), reached.info["broken"])
    np.testing.assert_array_equal(ring.obs[:3], state.obs[jnp.array([0, 0, 2])])
    ring = buffer.insert(ring, jax.tree.map(lambda x: 9 + 0 * x, rows), jnp.int32(3), jnp.ones(3))
    # None is sound: the last row before stands in.
    np.testing.assert_array_equal(ring.obs[3:], jnp.stack([state.obs[2]] * 3))


@pytest.mark.parametrize("name", ["antmaze-umaze", "door"])
def test_an_action_that_is_no_number_breaks_its_world_and_no_other(name):
    """C MuJoCo plays no action in its place, and the rewards of these tasks do not show it."""
    env = envs.make(name, physics="mujoco")
    state = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.PRNGKey(0), 3))
    actions = jnp.zeros((3, env.action_size)).at[1, 2].set(jnp.nan)
    reached = jax.jit(jax.vmap(env.step))(state, actions)
    assert reached.info["broken"].tolist() == reached.done.tolist() == [0, 1, 0]
    assert np.isfinite(reached.obs).all()


def test_a_world_that_breaks_inside_c_leaves_the_others_alone():
    env = envs.make("hopper", physics="mujoco")
    state = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.PRNGKey(0), 3))
    qpos = jnp.stack([env.model.qpos0] * 3).at[:, 3].add(0.01)
    put, step = jax.jit(jax.vmap(env.reset_to)), jax.jit(jax.vmap(env.step))
    speed = jnp.zeros((3, env.model.nv)).at[1].set(1e9)
    state, sound = put(qpos, speed), put(qpos, jnp.zeros_like(speed))
    for action in jax.random.uniform(jax.random.PRNGKey(1), (5, 3, 3), minval=-1.0):
        state, sound = step(state, action), step(sound, action)
        np.testing.assert_array_equal(state.obs[jnp.array([0, 2])], sound.obs[jnp.array([0, 2])])
    assert state.info["broken"].tolist() == [0, 1, 0]


def test_c_mujoco_does_not_hide_a_divergence():
    env = envs.make("halfcheetah", physics="mujoco")
    step, state = jax.jit(env.step), jax.jit(env.reset_to)(env.model.qpos0, jnp.full(9, 1e9))
    reached = step(state, jnp.zeros(6))
    for _ in range(20):
        reached = step(reached, jnp.ones(6))
    assert reached.info["broken"] == 1


# --- what is refused ---


class Observed(physics_task.PhysicsTask):
    observation_size = 1


def test_bad_engines_and_models(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="unknown physics 'bullet'; choose one of auto, mjx, mjx-warp, mujoco"
    ):
        envs.make("hopper", physics="bullet")
    monkeypatch.setattr(physics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="mjx-warp is not installed: pip install warp-lang"):
        envs.make("hopper", physics="mjx-warp")
    xml = "<mujoco><worldbody><geom size='1' type='bal'/></worldbody></mujoco>"
    (tmp_path / "broken.xml").write_text(xml)
    with pytest.raises(ValueError, match=r"broken.xml: MuJoCo refuses this model"):
        locomotion.load_spec(tmp_path / "broken.xml")
    joint = "<worldbody><body><joint name='j' type='slide'/><geom size='1'/></body></worldbody>"
    for actuator, message in {
        "<motor joint='j' name='push'/>": "actuator push has no control range",
        "<general joint='j' ctrlrange='-1 1' dyntype='filter' dynprm='1'/>": "the model has 1 actuator act",
    }.items():
        xml = f"<mujoco>{joint}<actuator>{actuator}</actuator></mujoco>"
        for engine in ("mujoco", "mjx"):
            with pytest.raises(ValueError, match=message):
                Observed(mujoco.MjModel.from_xml_string(xml), 1, engine)
    with pytest.raises(ValueError, match="maze is one of umaze, medium, large, not 'huge'"):
        antmaze.AntMaze("huge")
    with pytest.raises(ValueError, match="did you mean antmaze-large-diverse"):
        envs.make("antmaze-large-divers")
