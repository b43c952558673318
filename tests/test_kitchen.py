"""The Franka Kitchen: its constants beside those of gymnasium-robotics, a human demonstration, its promises."""

import importlib
import os
import pathlib
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from ooo_rl import envs
from ooo_rl.data.errors import UsageError
from ooo_rl.data.recipes import kitchen as recipes
from ooo_rl.envs import kitchen, kitchen_model, robotics
from ooo_rl.envs.rollout import rollout

DEMONSTRATION = pathlib.Path(__file__).parent / "kitchen_demonstration.npz"  # its origin is in the file
ALL = os.environ.get("KITCHEN_DEMONSTRATIONS", "")  # the file with all 19, which is not ours to ship
STILL = np.zeros(9)


@pytest.fixture(scope="module")
def quiet():
    """kitchen-complete without noise, on the C engine, and its compiled (reset, reset_to, step)."""
    env = envs.make("kitchen-complete", "mujoco", noise=0)
    return env, *map(jax.jit, (env.reset, env.reset_to, env.step))


@pytest.fixture(scope="module")
def recorded():
    with np.load(DEMONSTRATION) as file:
        return {key: file[key] for key in file.files}


def demonstrations(recorded):
    """The content of a file with this one episode. Only its first positions and velocities are those."""
    rows = len(recorded["ctrl"])
    qpos, qvel = (np.repeat(recorded[key][None], rows, 0) for key in ("qpos", "qvel"))
    return {"qpos": qpos, "qvel": qvel, "ctrl": recorded["ctrl"], "episode_ends": np.array([rows])}


# --- D4RL's numbers, read elsewhere ---


def test_bounds_and_noise_are_those_of_the_robots_description():
    """The file is D4RL's; gymnasium-robotics has it among its models."""
    path = robotics.assets() / "kitchen_franka" / "franka_assets" / "franka_config.xml"
    rows = [row.attrib for row in ElementTree.parse(path).getroot() if row.tag.startswith("qpos")][:30]
    low, high = np.array([row["pos_bound"].split() for row in rows[:9]], float).T
    np.testing.assert_array_equal(kitchen.LOW, low)
    np.testing.assert_array_equal(kitchen.HIGH, high)
    np.testing.assert_array_equal(kitchen.NOISE, [float(row["pos_noise_amp"]) for row in rows])


def test_goals_are_those_of_gymnasium_robotics():
    theirs = importlib.import_module("gymnasium_robotics.envs.franka_kitchen.kitchen_env")
    assert (
        theirs.BONUS_THRESH == kitchen.SOLVED and theirs.OBS_ELEMENT_GOALS.keys() == kitchen.ELEMENTS.keys()
    )
    for name, (first, goal) in kitchen.ELEMENTS.items():
        np.testing.assert_array_equal(theirs.OBS_ELEMENT_GOALS[name], goal)
        np.testing.assert_array_equal(theirs.OBS_ELEMENT_INDICES[name], first + np.arange(len(goal)))


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("complete", {17: -0.69, 18: -0.05, 19: 0.37, 22: -0.75}),
        ("partial", {17: -0.69, 18: -0.05, 19: 0.37, 22: -0.75}),
        ("mixed", {11: -0.88, 12: -0.01, 17: -0.69, 18: -0.05, 22: -0.75}),
    ],
)
def test_an_observation_ends_with_the_goals(name, elements):
    env = envs.make(f"kitchen-{name}", "mujoco")
    goal = np.zeros(30)
    goal[[*elements]] = [*elements.values()]
    goal[23:] = -0.23, 0.75, 1.62, 0.99, 0, 0, -0.06
    obs = np.asarray(jax.jit(env.reset)(jax.random.PRNGKey(0)).obs)
    np.testing.assert_array_equal(obs[30:], np.float32(goal))
    assert env.action_size == 9 and obs.shape == (60,) and env.dt == pytest.approx(0.08)


# --- noise, controls, rewards ---


def test_noise_is_uniform_and_can_be_switched_off(quiet):
    env = envs.make("kitchen-complete", "mujoco")
    keys = jax.random.split(jax.random.PRNGKey(0), 3000)
    seen = np.asarray(jax.jit(jax.vmap(env.reset))(keys).obs)[:, :30] - kitchen.START
    size = np.array([0.01] * 9 + [0.0005] * 2 + [0.00005] * 6 + [0.0005] * 3 + [0.01] * 3 + [0.0005] * 3)
    size = np.concatenate([size, [0.01] * 3, [0.0005]])
    assert (np.abs(seen) <= size + 3e-7).all()
    np.testing.assert_allclose(seen.std(0), size / 3**0.5, rtol=0.06)
    between = np.corrcoef(seen[:, :9].T) - np.eye(9)
    assert np.abs(between).max() < 0.08  # each coordinate has noise of its own
    first, step = quiet[1](keys[0]), quiet[3]
    np.testing.assert_array_equal(first.obs[:30], np.float32(kitchen.START))
    reached = step(first, STILL)
    np.testing.assert_array_equal(reached.obs[:30], reached.pipeline_state.body.qpos)


def test_controls_start_from_what_is_observed():
    env = envs.make("kitchen-complete", "mujoco")
    state = jax.jit(env.reset)(jax.random.PRNGKey(3))
    action = np.linspace(-1, 1, 9)
    wanted = np.clip(np.asarray(state.obs[:9]) + action * 2 * 0.08, kitchen.LOW, kitchen.HIGH)
    np.testing.assert_allclose(env.control(action, state.pipeline_state), wanted, atol=1e-6)
    np.testing.assert_array_equal(state.obs[:30], state.pipeline_state.seen)
    step = jax.jit(env.step)
    later = step(state, action)
    other = step(
        state.replace(pipeline_state=state.pipeline_state.replace(seen=state.obs[:30] + 0.1)), action
    )
    assert (
        np.abs(np.asarray(later.pipeline_state.body.qpos - other.pipeline_state.body.qpos)[:7]).max() > 0.03
    )


def at(*elements):
    """The start, with some elements at their goals."""
    qpos = kitchen.START.copy()
    for name in elements:
        first, goal = kitchen.ELEMENTS[name]
        qpos[first : first + len(goal)] = goal
    return qpos


def test_each_sub_task_counts_once(quiet):
    """In D4RL's order: what was solved stays solved, whatever becomes of it."""
    _, _, reset_to, step = quiet
    ours, upstream = quiet[0], envs.make("kitchen-complete-d4rl", "mujoco", noise=0)
    assert (ours.horizon, upstream.horizon) == (1000, 280)
    theirs_step = jax.jit(upstream.step)
    state = reset_to(at("microwave"), np.zeros(29))
    assert state.metrics["solved"] == 0  # a reward belongs to a step
    for following, solved in (
        (at("microwave"), 1),
        (at(), 1),
        (at("slide cabinet", "light switch"), 3),
        (at("microwave"), 3),
        (at("kettle", "light switch"), 4),
        (at(), 4),
    ):
        body = ours.put(following, np.zeros(29))
        moved = state.replace(pipeline_state=state.pipeline_state.replace(body=body))
        before = float(state.metrics["solved"])
        reached, theirs = step(moved, STILL), theirs_step(moved, STILL)
        assert reached.reward == reached.metrics["solved"] == solved
        assert theirs.reward == solved - before and theirs.metrics["solved"] == solved
        assert reached.metrics["success"] == theirs.metrics["success"] == (solved == 4)
        assert reached.done == 0 and theirs.info["termination"] == (solved == 4)
        state = reached


def test_an_element_is_solved_within_its_radius(quiet):
    env = quiet[0]
    for place, goal in env.elements:
        for gap, near in ((0.299, True), (0.301, False)):
            seen = kitchen.START.copy()
            seen[place] = goal
            seen[place.start] += gap
            row = [p.start for p, _ in env.elements].index(place.start)
            assert bool(env.near_goals(jnp.asarray(seen))[row]) == near
    assert not env.near_goals(jnp.asarray(kitchen.START)).any()


def test_a_rollout_counts_what_was_solved(quiet):
    """Solved at any step; the score is 25 for each."""
    env, _, reset_to, _ = quiet
    opened = reset_to(at("microwave", "kettle"), np.zeros(29)).pipeline_state

    class Open(kitchen.Kitchen):
        def start(self, key):
            return opened

    env = Open("complete", "mujoco", noise=0, horizon=3)
    tally = jax.jit(lambda key: rollout(env, lambda obs: jnp.zeros((2, 9)), key, 2))(jax.random.PRNGKey(0))
    assert tally["solved"].tolist() == [2, 2] and tally["return"].tolist() == [6, 6]
    assert tally["success"].tolist() == [0, 0] and tally["length"].tolist() == [3, 3]


SCRIPTS = sorted((pathlib.Path(__file__).parents[1] / "algos").glob("[a-z]*.py"))
METHODS = [script.stem for script in SCRIPTS if not script.stem.endswith("dqn")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["kitchen-partial", "kitchen-mixed-d4rl"])
def test_in_no_method_an_early_end_pays(method, task):
    """Rewards are 0 to 4. Either they are scaled to 0 at most, and a return ends only where nothing but 0 could
    follow, or no return ends at all.

    It does so whatever data say, such as D4RL's, in which each demonstration ends by a termination.
    """
    args = importlib.import_module(f"ooo_rl.algos.{method}").Args(env=task)
    reward = np.arange(5.0)
    worth = args.hyper.reward_scale * reward + args.hyper.reward_bias
    assert args.end_reward == np.inf or (
        args.end_reward > -np.inf and (worth <= 0).all() and (worth[reward >= args.end_reward] == 0).all()
    )


# --- demonstrations and models ---


@pytest.mark.parametrize("model", ["shipped", "d4rl", "mjx"])
def test_a_human_demonstration_replays(model, recorded):
    env = envs.make("kitchen-complete", "mujoco", model=model, noise=0)

    def step(state, ctrl):
        reached = env.step(state, recipes.wanted_action(state.pipeline_state.seen, ctrl, env.dt))
        return reached, reached.pipeline_state.solved

    state = env.reset_to(recorded["qpos"], recorded["qvel"])
    last, solved = jax.jit(lambda state, ctrl: jax.lax.scan(step, state, ctrl))(state, recorded["ctrl"])
    assert solved[-1].all()
    when = np.argmax(np.asarray(solved), 0)
    assert np.abs(when - recorded["completed"]).max() <= (0 if model == "d4rl" else 2)
    gap = np.abs(np.asarray(last.obs[:30]) - recorded["last"][:30])
    assert gap[:9].max() < 1e-2 and gap.max() < 0.05, gap


@pytest.mark.slow
@pytest.mark.skipif(not ALL, reason="KITCHEN_DEMONSTRATIONS does not name the file of demonstrations")
@pytest.mark.parametrize("engine", ["mujoco", "mjx"])
def test_all_human_demonstrations_replay(engine):
    """In float32 where MJX plays them; minutes there."""
    env = envs.make("kitchen-complete", engine)
    source = recipes.load_demonstrations(ALL, env)
    shown = recipes.replays(env, source, jax.random.PRNGKey(0))
    assert [episode["rewards"][-1] for episode in shown] == 19 * [4]


def test_demonstrations_become_data(tmp_path, recorded):
    """As in D4RL: the actions ask for the recorded controls from what was observed."""
    env, path = envs.make("kitchen-complete", "mujoco"), tmp_path / "demonstration.npz"
    np.savez(path, **demonstrations(recorded))
    source = recipes.load_demonstrations(str(path), env)
    (played,) = recipes.human(env, 0, 0, [source])
    obs, action, reward = (played[key] for key in ("observations", "actions", "rewards"))
    assert reward[-1] == 4 and (np.diff(reward) >= 0).all() and not played["terminations"].any()
    assert len(obs) == len(action) + 1 == len(recorded["ctrl"]) + 1 and np.abs(action).max() <= 0.999
    asked = np.clip(obs[:-1, :9] + 0.16 * action, kitchen.LOW, kitchen.HIGH)
    exact = np.abs(action) < 0.999
    np.testing.assert_allclose(asked[exact], recorded["ctrl"][exact], atol=1e-5)
    assert exact.mean() > 0.9
    noise = np.abs(obs[0, :9] - recorded["qpos"][:9]).max()
    assert 0.002 < noise < 0.011


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ctrl": None}, "no demonstrations of the kitchen, the keys ctrl are missing"),
        (
            {"qpos": np.zeros((208, 29))},
            r"\(208, 29\).*the kitchen needs \(208, 30\), \(208, 29\), \(208, 9\)",
        ),
        ({"episode_ends": np.array([9, 5])}, "episode_ends that grow up to 5"),
        ({"episode_ends": np.array([], int)}, "episode_ends that grow up to 0"),
    ],
)
def test_bad_demonstrations_are_one_clear_error(tmp_path, recorded, quiet, change, message):
    content = {**demonstrations(recorded), **change}
    np.savez(tmp_path / "d.npz", **{key: value for key, value in content.items() if value is not None})
    with pytest.raises(ValueError, match=message):
        recipes.load_demonstrations(str(tmp_path / "d.npz"), quiet[0])


def test_pieces_of_demonstrations_make_new_episodes(tmp_path, recorded, monkeypatch):
    """Four of six elements in a fixed order, all of them solved, never the four of the task mixed."""
    env, path = envs.make("kitchen-mixed", "mujoco"), tmp_path / "demonstration.npz"
    content = demonstrations(recorded)
    done = np.arange(len(recorded["ctrl"]))[:, None] > recorded["completed"]  # before each step
    for when, element in zip(done.T, kitchen.TASKS["complete"]):
        first, goal = kitchen.ELEMENTS[element]
        content["qpos"][:, first : first + len(goal)][when] = goal
    np.savez(path, **content)
    source = recipes.load_demonstrations(str(path), env)
    ways = recipes.segments(env, source, np.random.default_rng(0))
    assert [len(own) for own in ways.values()] == [1] * 6
    lengths = [len(ways[element][0]) for element in kitchen.TASKS["complete"]]
    after = np.array([recipes.AFTER[element] for element in kitchen.TASKS["complete"]])
    assert np.cumsum(lengths).tolist() == (recorded["completed"] + 1 + after).tolist()
    np.testing.assert_array_equal(np.concatenate([ways[e][0] for e in kitchen.TASKS["complete"]]),
                                  np.float32(recorded["ctrl"][: sum(lengths)]))  # fmt: skip
    monkeypatch.setattr(recipes, "BATCH", 3)
    made = recipes.recombined(env, 60, 0, [source])
    assert sum(len(e["rewards"]) for e in made) == 60
    planned = recipes.plan(ways, recipes.ORDER[:2], recorded["ctrl"][0], np.random.default_rng(0))
    (whole,) = recipes.played(env, jax.random.PRNGKey(1), [planned])
    assert whole["rewards"][-1] == 2 and not whole["terminations"].any()
    content["qpos"][:, 17:20] = 0  # no light, no cabinet
    np.savez(path, **content)
    source = recipes.load_demonstrations(str(path), env)
    with pytest.raises(ValueError, match=r"demonstration.npz: no episode solves light switch, slide cabinet"):
        recipes.segments(env, source, np.random.default_rng(0))


def test_an_episode_counts_if_it_went_as_planned():
    """It never solves the whole task by chance, such as mixed, whose four elements are never planned."""
    mixed, partial = (envs.make(f"kitchen-{task}", "mujoco") for task in ("mixed", "partial"))
    whole, other = kitchen.TASKS["partial"], ("kettle", "bottom burner", "light switch", "slide cabinet")
    for env, order, reached, reward, expected in (
        (partial, whole, whole, 4, True),
        (partial, whole, whole[:3], 3, False),
        (partial, other, other, 3, True),
        (partial, other, other, 4, False),
        (mixed, whole, whole, 3, True),
        (mixed, whole, whole, 4, False),
    ):
        made = {"observations": np.stack([kitchen.START, at(*reached)]), "rewards": np.array([reward])}
        assert recipes.as_planned(env, made, order) == expected


def test_moves_are_slow_and_smooth():
    begin, end = np.zeros(9), np.linspace(-1, 1, 9)
    path = np.concatenate([begin[None], recipes.move(begin, end)])
    np.testing.assert_allclose(path[-1], end)
    step = np.abs(np.diff(path, axis=0)).max(1)
    assert step.max() < 1.6 * recipes.PACE and step[0] < 0.4 * step.max() and step[-1] < 0.4 * step.max()


def test_models_differ_where_they_say():
    shipped, d4rl, mjx = map(kitchen_model.load_model, ("shipped", "d4rl", "mjx"))
    same = (
        "body_mass body_inertia body_ipos body_iquat jnt_range dof_damping dof_frictionloss dof_invweight0 "
    )
    for field in (same + "actuator_gainprm actuator_ctrlrange eq_data qpos0").split():
        for other in (d4rl, mjx):
            np.testing.assert_allclose(
                getattr(other, field), getattr(shipped, field), atol=1e-12, err_msg=field
            )
    assert sorted(set(shipped.geom_margin)) == [0, 0.001] and sorted(set(d4rl.geom_margin)) == [0, 0.0005]
    off = (shipped.geom_contype != d4rl.geom_contype) | (shipped.geom_conaffinity != d4rl.geom_conaffinity)
    assert shipped.geom_size[off].tolist() == [[0.12, 0.9, 0]]  # the pedestal
    assert set(mjx.geom_type) == {0, 2, 3, 6, 7} and mjx.nmesh == 1 and mjx.ngeom < 100


def test_capsules_of_the_links_fit_their_meshes():
    """How far hull and capsules reach in any direction: 2 to 5 mm apart (root mean square)."""
    shipped, rng = kitchen_model.load_model("shipped"), np.random.default_rng(1)
    ways = rng.normal(size=(400, 3))
    ways /= np.linalg.norm(ways, axis=1)[:, None]
    for link, capsules in kitchen_model.LINKS.items():
        body = shipped.body(f"panda0_link{link}").id
        geom = np.flatnonzero((shipped.geom_bodyid == body) & (shipped.geom_contype == 1))[0]
        mesh = shipped.mesh(shipped.geom_dataid[geom])
        points = shipped.mesh_vert[mesh.vertadr[0] : mesh.vertadr[0] + mesh.vertnum[0]]
        turn = np.zeros(9)
        mujoco.mju_quat2Mat(turn, shipped.geom_quat[geom])
        points = points @ turn.reshape(3, 3).T + shipped.geom_pos[geom]
        hull = (ways @ points.T).max(1)
        ends = np.array([[row[:3], row[3:6]] for row in capsules])
        reach = (
            (ways @ ends.reshape(-1, 3).T).reshape(-1, len(ends), 2).max(2) + [row[6] for row in capsules]
        ).max(1)
        assert np.sqrt(((reach - hull) ** 2).mean()) < (0.006 if link < 5 else 0.004), link


def test_mjx_has_all_that_the_task_needs():
    """Traced in float64, not run: docs/kitchen.md has what it then does, in float32 as well."""
    with jax.enable_x64(True):
        env = envs.make("kitchen-mixed", "mjx")
        reached = jax.eval_shape(lambda key: env.step(env.reset(key), jnp.zeros(9)), jax.random.PRNGKey(0))
    assert reached.obs.dtype == "float64" and reached.obs.shape == (60,)
    assert envs.make("kitchen-mixed", "mujoco").compiler_options == {}
    known = kitchen.xla_knows(kitchen.OPTION)
    assert not kitchen.xla_knows("xla_cpu_no_such_option") and kitchen.xla_knows("xla_cpu_enable_fast_math")
    assert (
        env.compiler_options == ({kitchen.OPTION: False} if known else {}) or jax.default_backend() != "cpu"
    )


def test_what_is_refused():
    for settings, message in (
        ({"model": "capsules"}, "model is one of auto, shipped, d4rl, mjx, not 'capsules'"),
        ({"reward": "dense"}, "reward is one of cumulative, new, not 'dense'"),
        ({"horizon": 0}, "horizon is at least 1 and noise at least 0, got 0 and 0.1"),
        ({"noise": -1.0}, "got 1000 and -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            envs.make("kitchen-complete", "mujoco", **settings)
    with pytest.raises(UsageError, match="did you mean kitchen-complete"):
        from ooo_rl.data.recipes import library

        library.full_id("kitchen-complet")
