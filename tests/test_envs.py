"""The environment contract, also for a user's own environments; the point mass, of which all is known."""

import ast
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ooo_rl import envs
from ooo_rl.envs import point_mass_wall as pm
from ooo_rl.envs.rollout import rollout

# Each class is played. Other names are traced alone, and named here by their ends: those that differ from a
# played one by their map, and those whose rewards, endings or starts have tests in test_bodies.py,
# test_adroit.py or test_kitchen.py.
MAPS = (
    "antmaze-medium-diverse", "antmaze-large-diverse", "medium-gymnasium", "large-gymnasium", "maze2d-open",
    "maze2d-medium", "maze2d-umaze", "open-dense", "medium-dense", "large-dense",
)  # fmt: skip
REWARDS = ("halfcheetah-sparse", "antmaze-umaze-v0", "-binary", "-ending", "-d4rl", "kitchen-mixed")
DATA = (
    "play", "diverse-v0", "play-v0", "missing", "missing-v0", "missing-data", "umaze-diverse",
    "truncated-expert", "kitchen-partial", "kitchen-partial-d4rl",
)  # fmt: skip
NAMES = [name for name in envs.names() if not name.endswith(DATA)]  # DATA: the same task with other data
PLAYED = [name for name in NAMES if not name.endswith(MAPS + REWARDS)]
TRACED = [name for name in NAMES if name.endswith(MAPS + REWARDS)]


def test_every_name_makes_an_environment():
    for name in envs.names():
        env = envs.make(name)
        assert isinstance(env, envs.Env) and min(env.observation_size, env.action_size, env.horizon) > 0, name


def check_types(env, state, following, reached, shape):
    """The types of a step's results; arrays have the leading `shape`."""
    assert reached.obs.shape == (*shape, env.observation_size)
    flags = (reached.info[kind] for kind in ("termination", "truncation", "broken"))
    for leaf in (reached.reward, reached.done, reached.metrics["success"], *flags):
        assert (leaf.shape, leaf.dtype) == (shape, jnp.float32)
    assert jax.tree.structure(state) == jax.tree.structure(following) == jax.tree.structure(reached)


def check_contract(env, worlds, actions_seed=0):
    """Plays `worlds` worlds at random beyond the end of their episodes, in one program."""
    rng, length = np.random.default_rng(actions_seed), env.horizon + 2
    actions = envs.random_actions(env, jax.random.PRNGKey(actions_seed), (length, worlds))
    keys = rng.integers(0, 2**32, (length + 1, worlds, 2), dtype=np.uint32)

    def step(state, x):
        following, reached = jax.vmap(lambda s, a, k: envs.step_and_reset(env, s, a, k))(state, *x)
        return following, (following, reached)

    begin = lambda keys, actions: jax.lax.scan(step, jax.vmap(env.reset)(keys[0]), (actions, keys[1:]))  # noqa: E731
    state, (following, reached) = jax.jit(begin)(keys, actions)  # a scan refuses states of changing types
    check_types(env, state, following, reached, (length, worlds))
    termination, truncation = (np.asarray(reached.info[kind]) for kind in ("termination", "truncation"))
    np.testing.assert_array_equal(reached.done, np.maximum(termination, truncation))
    assert not (termination * truncation).any()
    over = np.asarray(reached.done) > 0
    np.testing.assert_array_equal(following.obs[~over], reached.obs[~over])
    assert (np.asarray(following.info["elapsed"])[over] == 0).all()
    assert over.any()


@pytest.mark.parametrize("name", PLAYED)
def test_contract(name):
    env = envs.make(name)
    moved = hasattr(env, "engine")
    env.horizon = min(env.horizon, 15 if moved else 150)
    check_contract(env, worlds=16 if moved else 64)


@pytest.mark.parametrize("name", TRACED)
def test_contract_of_types(name):
    env = envs.make(name)
    state, action = (
        jax.eval_shape(env.reset, jax.random.PRNGKey(0)),
        envs.random_actions(env, jax.random.PRNGKey(0)),
    )
    step = lambda state, key: envs.step_and_reset(env, state, action, key)  # noqa: E731
    check_types(env, state, *jax.eval_shape(step, state, jax.random.PRNGKey(0)), ())


def test_random_actions_are_of_the_environments_kind():
    key = jax.random.PRNGKey(0)
    vectors, numbers = (
        envs.random_actions(envs.make(f"probe-all{kind}"), key, (99, 2)) for kind in ("", "-discrete")
    )
    assert vectors.shape == (99, 2, 1) and vectors.dtype == jnp.float32 and -1 <= vectors.min() < -0.9
    assert (
        numbers.shape == (99, 2) and numbers.dtype == jnp.int32 and set(np.unique(numbers)) == set(range(5))
    )


def test_many_environments_step_as_each_alone():
    env = envs.make("point-mass-wall", horizon=3)
    states = jax.vmap(env.reset)(jax.random.split(jax.random.PRNGKey(0), 5))
    states = states.replace(
        info={**states.info, "elapsed": jnp.array([0, 2, 0, 2, 1])}
    )  # two of them end now
    actions, key = jax.random.uniform(jax.random.PRNGKey(1), (5, 2)), jax.random.PRNGKey(2)
    following, reached = jax.jit(lambda *x: envs.step_all(env, *x))(states, actions, key)
    assert reached.done.tolist() == [0, 1, 0, 1, 0]
    alone = jax.jit(lambda *x: envs.step_and_reset(env, *x))
    for i, one_key in enumerate(jax.random.split(key, 5)):
        expected = alone(jax.tree.map(lambda x, i=i: x[i], states), actions[i], one_key)
        got = jax.tree.map(lambda x, i=i: x[i], (following, reached))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)


def test_environments_know_nothing_of_data_and_methods():
    for path in pathlib.Path(envs.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in named if name.startswith(("ooo_rl.data", "ooo_rl.algos"))], path


# --- a user's own environments ---

OWN = """
import jax.numpy as jnp
from ooo_rl.envs import Task

class Line(Task):
    '''Walk along a line to the end.'''
    observation_size = action_size = 1

    def __init__(self, horizon=20{more}):
        self.horizon{also} = horizon{more_values}

    def start(self, key):
        return jnp.zeros(1)

    def advance(self, inner, action):
        there = inner[0] + action[0] > 2
        return inner + action, jnp.float32(there), there, there

    def observe(self, inner):
        return inner

class Unfinished(Task):
    observation_size = 1

LENGTH = 2
nothing = lambda: LENGTH
half = lambda: type("Half", (), {{"reset": None, "horizon": 3}})()
"""


@pytest.fixture
def own(working_directory):
    """Writes modules into the working directory."""

    def write(name, physics=False):
        changes = (", physics='none'", ", self.physics", ", physics") if physics else ("", "", "")
        path = (working_directory / name.replace(".", "/")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(OWN.format(**dict(zip(("more", "also", "more_values"), changes))))

    return write


def test_an_environment_from_a_module_in_the_working_directory(own):
    own("own_tasks")
    own("own_package.tasks")
    for name in ("own_tasks:Line", "own_package.tasks:Line"):
        env = envs.make(name)
        assert type(env).__name__ == "Line" and env.horizon == 20 and not envs.is_ours(name)
    assert envs.make("own_tasks:Line", horizon=5).horizon == 5
    check_contract(env, worlds=8)


def test_an_own_environment_gets_the_engine_if_it_takes_one(own):
    own("own_bodies", physics=True)
    assert envs.make("own_bodies:Line").physics == "auto"
    assert envs.make("own_bodies:Line", "mujoco", horizon=7).physics == "mujoco"
    own("own_tasks")
    with pytest.raises(
        ValueError, match="own_tasks:Line has no parameter `physics`; leave --physics auto, not mjx"
    ):
        envs.make("own_tasks:Line", "mjx")
    with pytest.raises(ValueError, match="unknown physics 'bullet'"):
        envs.make("own_bodies:Line", "bullet")


def test_a_registered_environment_has_a_name(own):
    from ooo_rl.envs.probes import MatchObs

    made = []
    envs.register("own-probe", MatchObs)
    envs.register("own-function", lambda physics, size=1: made.append((physics, size)) or MatchObs())
    assert {"own-probe", "own-function"} <= set(envs.names()) and envs.names() == sorted(envs.names())
    assert isinstance(envs.make("own-probe"), MatchObs) and not envs.is_ours("own-probe")
    assert envs.is_ours("hopper") and envs.is_ours("point-mass-wall")
    envs.make("own-function")
    envs.make("own-function", "mjx", size=3)
    assert made == [("auto", 1), ("mjx", 3)]
    with pytest.raises(ValueError, match="own-probe has no parameter `physics`"):
        envs.make("own-probe", "mujoco")
    with pytest.raises(ValueError, match="unknown environment 'own-prob'; did you mean own-probe"):
        envs.make("own-prob")


@pytest.mark.parametrize("name", ["hopper", "maze2d-large", "own-probe"])
def test_a_taken_name_is_refused(own, name):
    from ooo_rl.envs.probes import MatchObs

    envs.register("own-probe", MatchObs)
    with pytest.raises(ValueError, match=f"an environment '{name}' exists already; choose another name"):
        envs.register(name, MatchObs)


@pytest.mark.parametrize("name", ["", "my:probe", "my/probe", "my probe"])
def test_a_name_that_no_folder_can_have_is_refused(own, name):
    with pytest.raises(
        ValueError,
        match=f"'{name}' cannot be an environment's name: it is empty, or holds a colon, slash or space",
    ):
        envs.register(name, pm.PointMassWall)
    assert name not in envs.names()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "own_absent:Line",
            r"cannot import 'own_absent' .*\(No module named 'own_absent'\); write --env my_module:MyTask",
        ),
        (
            "own_tasks:Lime",
            r"the module 'own_tasks' \(.*own_tasks.py\) has no 'Lime'; write --env my_module:MyTask",
        ),
        ("own_tasks:", r"the module 'own_tasks' \(.*\) has no ''"),
        (":Line", "':Line' names no module to import; write --env my_module:MyTask"),
        (".own_tasks:Line", "'.own_tasks:Line' names no module to import"),
        ("own_tasks:Unfinished", "own_tasks:Unfinished is not an environment: it has no action_size; docs/c"),
        ("own_tasks:LENGTH", "own_tasks:LENGTH is not an environment: it is neither a class nor a function"),
        (
            "own_tasks:nothing",
            "own_tasks:nothing is not an environment: it has no reset, step, observation_size",
        ),
        (
            "own_tasks:half",
            "own_tasks:half is not an environment: it has no step, observation_size, action_size; docs/c",
        ),
    ],
)
def test_what_is_no_environment_is_one_clear_error(own, name, message):
    own("own_tasks")
    with pytest.raises(ValueError, match=message):
        envs.make(name)


# --- the point mass and the probes ---


def test_the_true_next_observation_outlives_the_reset():
    env = envs.make("point-mass-wall", start_noise="none")
    near = env.begin(jnp.array([0.95, 0.15]))
    step = jax.jit(lambda *x: envs.step_and_reset(env, *x))
    following, reached = step(near, jnp.array([1.0, 0.0]), jax.random.PRNGKey(1))
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
    end = np.asarray(jax.jit(jax.vmap(lambda p, a: env.advance(p, a)[0]))(start, action))
    target = np.clip(np.float64(start) + np.float64(action) * pm.STEP, pm.LOW, pm.HIGH)
    blocked = np.array([segments_meet(p, q) for p, q in zip(np.float64(start), target)])
    assert 300 < blocked.sum() < 3000
    np.testing.assert_allclose(end, np.where(blocked[:, None], start, target), atol=1e-6)


def test_bounds_hold_and_actions_are_clipped():
    env = envs.make("point-mass-wall", start_noise="none")
    far = jax.jit(env.step)(env.begin(jnp.asarray(pm.START)), jnp.array([-9.0, -9.0]))
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
    tally = jax.jit(lambda key: rollout(env, jnp.zeros_like, key, 3))(jax.random.PRNGKey(0))
    assert (np.asarray(tally["length"]) == 7).all()
    assert (np.asarray(tally["success"]) == 0).all()
    keys, kinds = jax.random.split(jax.random.PRNGKey(0), 4000), ("normal", "uniform")
    starts = [jax.vmap(envs.make("point-mass-wall", start_noise=kind).start) for kind in kinds]
    normal, uniform = map(np.asarray, jax.jit(lambda keys: [start(keys) for start in starts])(keys))
    assert abs(normal.std(axis=0).mean() - 0.02) < 1e-3
    assert np.abs(uniform - pm.START).max() <= 0.0201
    assert abs(uniform.std(axis=0).mean() - 0.02 / 3**0.5) < 1e-3


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
    step = jax.jit(lambda state: env.step(state, toward(state.obs)))
    for e, k in enumerate(jax.random.split(key, 2)):
        state, total, length, success = env.reset(k), 0.0, 0, 0.0
        while length < env.horizon:
            state = step(state)
            total, length = total + float(state.reward), length + 1
            success = max(success, float(state.metrics["success"]))
            np.testing.assert_allclose(tally["obs"][e, length], state.obs, atol=1e-5)
            if state.done:
                break
        assert [float(tally[name][e]) for name in ("return", "length", "success")] == [total, length, success]


@pytest.mark.slow
def test_brax_trains_on_it(monkeypatch):
    from brax.training.agents.ppo import networks
    from brax.training.agents.ppo import train as ppo

    # brax 0.14.2 still calls what jax 0.10 took out.
    replicate = lambda tree, devices: jax.tree.map(lambda x: jnp.stack([x] * len(devices)), tree)  # noqa: E731
    monkeypatch.setattr(jax, "device_put_replicated", replicate, raising=False)

    one_layer = {"policy_hidden_layer_sizes": (8,), "value_hidden_layer_sizes": (8,)}  # compiles sooner
    _, _, metrics = ppo.train(
        envs.make("probe-match-obs"), num_timesteps=256, episode_length=10, num_envs=8, batch_size=8,
        num_minibatches=2, unroll_length=4, num_updates_per_batch=1, num_evals=2, num_eval_envs=4,
        max_devices_per_host=1, action_repeat=1, normalize_observations=False,
        network_factory=functools.partial(networks.make_ppo_networks, **one_layer),
    )  # fmt: skip
    assert np.isfinite(metrics["eval/episode_reward"])


def test_in_braxs_own_wrapper_each_episode_has_its_horizon():
    """Its reset leaves `info` alone, where our count of steps is."""
    from brax.envs.wrappers import training

    env = training.wrap(envs.make("point-mass-wall", horizon=20), episode_length=100)
    state = jax.jit(env.reset)(jax.random.split(jax.random.PRNGKey(0), 1))
    stay = lambda state, _: (reached := env.step(state, jnp.zeros((1, 2))), reached.done)  # noqa: E731
    done = np.asarray(jax.jit(lambda state: jax.lax.scan(stay, state, None, 45)[1])(state))
    assert np.flatnonzero(done).tolist() == [19, 39]
