"""The generators: episodes as they were played, D4RL's recipes, and datasets that are whole or not there."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import minari
import numpy as np
import pytest

from ooo_rl import envs
from ooo_rl.data import policy
from ooo_rl.data.datasets import write
from ooo_rl.data.errors import DatasetError, UsageError, guarded
from ooo_rl.data.recipes import antmaze, generate, library, locomotion, point_mass, train_policy
from ooo_rl.data.recipes import maze2d as maze2d_recipes
from ooo_rl.envs import maze2d

REPO = pathlib.Path(__file__).parents[1]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


@pytest.fixture
def actors(tmp_path):
    """Two hopper policies that differ: one pushes one way, one the other."""
    rng, files = np.random.default_rng(0), []
    for name, bias in (("low", -0.5), ("high", 0.5)):
        files.append(str(tmp_path / f"{name}.npz"))
        layers = [(0.01 * rng.normal(size=(11, 3)), np.full(3, bias))]
        policy.save(files[-1], policy.mlp(layers, log_std=np.full(3, -3.0), output="clip"), algo=name)
    return tuple(files)


def test_locomotion_is_replayed_by_the_environment(root, actors):
    """Every row is a step of the environment: from its observation, with its action, to the next, for that
    reward."""
    library.make("ooo/hopper/medium-v0", transitions=300, policies=actors[:1])
    data = library.load("ooo/hopper/medium-v0")
    rows, env = data.transitions, envs.make("hopper", physics="mujoco")
    assert len(rows.reward) == 300 and data.card["terminated_episodes"] >= data.card["episodes"] - 1
    step, state = jax.jit(env.step), jax.jit(env.reset_to)(np.r_[0, rows.obs[0, :5]], rows.obs[0, 5:])
    for i in range(5):
        assert data.episode[i] == 0
        state = step(state, rows.action[i])
        np.testing.assert_allclose(state.obs, rows.next_obs[i], atol=1e-3)
        assert float(state.reward) == pytest.approx(rows.reward[i], abs=0.02)
    assert abs(rows.action.mean() + 0.5) < 0.1
    recipe = json.loads(data.card["recipe"])
    assert (recipe["seed"], recipe["behaviour"], recipe["transitions"]) == (0, ["low.npz (low)"], 300)
    assert recipe["versions"]["mujoco"] and recipe["made_by"].endswith("generate.py ooo/hopper/medium-v0")


def test_the_metadata_say_which_actions_were_played(root, actors, tmp_path, monkeypatch):
    """A policy without noise plays its mean actions."""
    still = str(tmp_path / "still.npz")
    policy.save(still, policy.mlp([(np.zeros((11, 3)), np.full(3, 0.25))], output="clip"))
    said = {}
    for file, version in ((actors[0], "v1"), (still, "v2")):
        library.make("ooo/hopper/expert-v0", f"ooo/hopper/expert-{version}", transitions=60, policies=(file,))
        data = library.load(f"ooo/hopper/expert-{version}")
        varies = data.transitions.action.std(axis=0).max() > 0.01
        said[varies] = json.loads(data.card["recipe"])["how"]
        metadata = root / "ooo" / "hopper" / f"expert-{version}" / "data" / "metadata.json"
        assert json.loads(metadata.read_text())["description"] == said[varies]
    assert said == {
        True: "Sampled actions of an expert policy",
        False: "Mean actions of an expert policy",
    }


def test_random_is_uniform(root):
    library.make("ooo/hopper/random-v0", transitions=2000, seed=3)
    action = library.load("ooo/hopper/random-v0").transitions.action
    assert abs(action.mean()) < 0.03 and abs(action.std() - 3**-0.5) < 0.02


def test_medium_expert_is_half_and_half(root, actors, monkeypatch):
    """With a player that compiles nothing; the one before plays a policy in earnest."""
    played = []

    def play(env, transitions, seed, policies, actor):
        played.append((transitions, seed, policies))
        obs = np.zeros((transitions, 11))
        action = policy.act(actor, obs)
        return [write.episode(obs, obs[0], action, obs[:, 0], np.zeros(transitions))]

    monkeypatch.setattr(locomotion, "play", play)
    library.make("ooo/hopper/medium-expert-v0", transitions=401, seed=5, policies=actors)
    data = library.load("ooo/hopper/medium-expert-v0")
    action = data.transitions.action
    assert played == [(200, 5, []), (201, 6, [])] and len(action) == 401
    np.testing.assert_allclose(action[:200], -0.5)
    np.testing.assert_allclose(action[200:], 0.5)
    recipe = json.loads(data.card["recipe"])
    assert recipe["behaviour"] == ["low.npz (low)", "high.npz (high)"]
    assert (
        recipe["how"] == "Half sampled actions of a medium policy, half sampled actions of an expert policy"
    )


@pytest.fixture(scope="module")
def walks():
    """Episodes of maze2d-large, for two datasets."""
    return maze2d_recipes.noisy_waypoints(maze2d.Maze2D("large"), 20_000, 0, [])


def test_maze2d_episodes_run_from_target_to_target(root, walks, monkeypatch):
    name = "ooo/maze2d-large/noisy-v0"
    recipe = library.RECIPES[name]
    assert recipe.episodes is maze2d_recipes.noisy_waypoints
    monkeypatch.setitem(library.RECIPES, name, dataclasses.replace(recipe, episodes=lambda *_: walks))
    library.make(name)
    data = library.load(name)
    env, rows = maze2d.Maze2D("large"), data.transitions
    assert len(rows.reward) == 20_000 and (rows.discount == 1).all() and np.abs(rows.action).max() <= 1
    distance = np.linalg.norm(rows.next_obs[:, :2] - env.goal, axis=1)
    np.testing.assert_array_equal(rows.reward, (distance <= 0.5).astype(np.float32))
    ends = np.flatnonzero(data.truncation)[:-1]
    to_cell = np.linalg.norm(rows.obs[ends, None, :2] - env.cells[None], axis=2).min(axis=1)
    assert (to_cell < 0.1).mean() > 0.9  # the others ran into the time limit
    assert 100 < data.card["length_quantiles"][2] < 300


def test_the_missing_data_are_missing(root, walks, monkeypatch):
    monkeypatch.setattr(maze2d_recipes, "noisy_waypoints", lambda *_: walks)
    library.make("ooo/maze2d-large-missing-data/noisy-v0", transitions=20_000)
    data = library.load("ooo/maze2d-large-missing-data/noisy-v0")
    rows = data.transitions
    for centre, radius in maze2d_recipes.MISSING:
        assert np.linalg.norm(rows.obs[:, :2] - np.array(centre), axis=1).min() > radius
    assert 15_000 < len(rows.reward) < 19_000
    inside = data.episode[1:] == data.episode[:-1]
    np.testing.assert_array_equal(rows.next_obs[:-1][inside], rows.obs[1:][inside])


def test_antmaze_rewards_one_goal_of_the_evaluation(root):
    library.make("ooo/antmaze-umaze/noisy-v0", transitions=2000)
    data = library.load("ooo/antmaze-umaze/noisy-v0")
    rows, env = data.transitions, envs.make("antmaze-umaze")
    assert len(rows.reward) == 2000 and rows.obs.shape[1] == 29
    np.testing.assert_array_equal(rows.reward, 1 - rows.discount)
    assert np.abs(rows.obs[0, :2]).max() <= 0.1  # the start
    assert data.episode[-1] + 1 == rows.reward.sum() + data.truncation.sum()  # each row at the goal ends one
    on_disk = minari.load_dataset("ooo/antmaze-umaze/noisy-v0")
    assert on_disk.total_episodes == 2, "a walk of 1,000 steps is one piece"
    assert rows.reward.sum() > 3, "the walker never got to the goal"
    centre = env.centre(env.cells("G")[0])
    assert (np.abs(rows.next_obs[rows.reward == 1][:, :2] - (centre + 0.75)) < 0.75 + 0.5).all()


def test_relabelling_and_cutting():
    whole = write.episode(
        np.c_[np.arange(5.0), np.zeros(5)], np.array([5.0, 0]), np.zeros((5, 1)), np.zeros(5), np.zeros(5)
    )
    walk = antmaze.relabelled(whole, np.array([3.0, 0]), 0.5)
    assert walk["rewards"].tolist() == [0, 0, 1, 0, 0]
    assert walk["terminations"].tolist() == [False, False, True, False, False]
    assert walk["truncations"].tolist() == [False, False, False, False, True]
    np.testing.assert_array_equal(walk["observations"], whole["observations"])
    arrives = antmaze.relabelled(whole, np.array([5.0, 0]), 0.5)
    assert arrives["terminations"].tolist() == 4 * [False] + [True] and not arrives["truncations"].any()
    part = write.piece(walk, 1, 4)
    assert part["terminations"].tolist() == [False, True, False]
    assert part["truncations"].tolist() == [False, False, True]
    left = write.without([whole], (((2.0, 0.0), 0.4),))
    assert [p["observations"][:, 0].tolist() for p in left] == [[0, 1, 2], [3, 4, 5]]
    short = write.cut_to([whole, whole], 7)
    assert [len(p["rewards"]) for p in short] == [5, 2] and short[1]["truncations"].tolist() == [False, True]


class Count(envs.Task):
    """Counts its steps, which are also its rewards. An action above 0.9 breaks it, one below -0.9 ends it."""

    horizon, observation_size, action_size = 4, 1, 1

    def start(self, key):
        return jnp.zeros(())

    def advance(self, count, action):
        broken = jnp.where(action[0] > 0.9, jnp.inf, 0.0)
        return count + 1 + broken, count + 1, action[0] < -0.9, False

    def observe(self, count):
        return count[None]


def test_a_replay_has_all_steps_but_broken_ones(monkeypatch):
    """Each world's last episode is there, truncated where the recording ends; no next observation is a
    placeholder."""
    actions = np.zeros((7, 4, 1), np.float32)
    actions[2, 1], actions[0, 2], actions[6, 3] = 1.0, 1.0, 1.0
    actions[1, 3] = -1.0

    def train(env, algorithm, steps, seed, keep):
        recorded = train_policy.Recorded(train_policy.Restarting(env), keep)
        state, step = recorded.reset(jax.random.split(jax.random.PRNGKey(seed), 4)), jax.jit(recorded.step)
        for action in actions:
            state = step(state, action)
        jax.block_until_ready(state)
        jax.effects_barrier()

    monkeypatch.setattr(train_policy, "train", train)
    episodes = locomotion.replay(Count(), 28, 0, [])
    lengths = [len(each["rewards"]) for each in episodes]
    assert lengths == [4, 3, 2, 4, 4, 2, 2, 4] and sum(lengths) == actions.size - 3
    for each, length in zip(episodes, lengths):
        np.testing.assert_array_equal(each["observations"][:, 0], np.arange(length + 1))
        np.testing.assert_array_equal(each["rewards"], 1 + np.arange(length))
        assert np.abs(each["actions"][:-1]).max(initial=0) == 0 and not each["terminations"][:-1].any()
        assert not each["truncations"][:-1].any()
    assert [bool(each["terminations"][-1]) for each in episodes] == [False] * 6 + [True, False]
    assert [bool(each["truncations"][-1]) for each in episodes] == [True] * 6 + [False, True]


@pytest.mark.slow
def test_brax_sac_learns_on_ours_and_its_experience_is_kept(monkeypatch):
    monkeypatch.setattr(train_policy, "HIDDEN", (8,))  # which compiles sooner
    env, rows, scores = envs.make("probe-match-obs"), [], []
    parameters = train_policy.train(
        env, "sac", 600,
        keep=lambda *row: rows.append([np.array(x) for x in row]), progress=lambda step, score: scores.append(score),
        num_envs=4, batch_size=16, grad_updates_per_step=1, min_replay_size=32,
    )  # fmt: skip
    obs, action, reward, _, termination, done, broken = (np.concatenate(column) for column in zip(*rows))
    assert len(obs) >= 600 and len(scores) > 5
    np.testing.assert_allclose(reward, 1 - (action[:, 0] - obs[:, 0]) ** 2, atol=1e-5)
    assert (termination == 1).all() and (done == 1).all() and (broken == 0).all()
    assert set(np.unique(obs)) == {-0.5, 0.5}
    assert len(jax.tree.leaves(parameters)) > 4


def test_a_policy_of_brax_acts_the_same_as_a_file(tmp_path):
    import jax.numpy as jnp
    from brax.training.acme import running_statistics
    from brax.training.agents.ppo import networks

    nets = networks.make_ppo_networks(
        5,
        2,
        running_statistics.normalize,
        policy_hidden_layer_sizes=(8, 8),
        value_hidden_layer_sizes=(8,),
        activation=jax.nn.relu,
    )
    normaliser = running_statistics.init_state(jnp.zeros(5)).replace(
        mean=jnp.arange(5.0), std=jnp.full(5, 2.0)
    )
    parameters = (normaliser, nets.policy_network.init(jax.random.PRNGKey(0)))
    train_policy.save(tmp_path / "p.npz", parameters, algo="brax ppo")
    obs = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    logits = nets.policy_network.apply(*parameters, obs)
    actor = policy.load(tmp_path / "p.npz")
    np.testing.assert_allclose(
        policy.act(actor, obs), nets.parametric_action_distribution.mode(logits), atol=1e-5
    )
    noise = np.random.default_rng(1).normal(size=(7, 2))
    spread = jax.nn.softplus(logits[:, 2:]) + 0.001
    np.testing.assert_allclose(
        policy.forward(actor, obs, noise, np), np.tanh(logits[:, :2] + spread * noise), atol=1e-5
    )


# --- what is refused ---


def test_bad_requests(root, actors, monkeypatch):
    message = "takes 11 observations and gives 3 actions; ooo/halfcheetah/medium-v0 needs 17 and 6"
    with pytest.raises(UsageError, match=message):
        library.make("ooo/halfcheetah/medium-v0", policies=actors[:1], transitions=10)
    message = r"is made by hand: python data/recipes/generate\.py ooo/hopper/expert-v0"
    with pytest.raises(DatasetError, match=message):
        library.load("ooo/hopper/expert-v0")
    monkeypatch.setenv("MINARI_DATASETS_PATH", "/dev/null/datasets")
    with pytest.raises(DatasetError, match="cannot be written"):
        library.make("ooo/maze2d-open/noisy-v0", transitions=100)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("hopper-mediun", "unknown dataset 'hopper-mediun'; did you mean hopper-medium"),
        (
            "hopper-medium-expert --policy a.npz",
            "takes 2 --policy files, not 1; data/recipes/train_policy.py trains one",
        ),
        ("hopper-random --policy a.npz", "takes 0 --policy files, not 1"),
        ("antmaze-umaze --policy a.npz b.npz", "takes 0 or 1 --policy files, not 2"),
        ("hopper-random --demonstrations a.npz", "is not made from demonstrations; drop --demonstrations"),
        ("door-human", "give --demonstrations FILE, and no --policy"),
        ("door-human --policy a.npz", "give --demonstrations FILE, and no --policy"),
        ("door-cloned", "takes either --demonstrations FILE, or one --policy"),
        (
            "door-cloned --policy a.npz --demonstrations b.npz",
            "takes either --demonstrations FILE, or one --policy",
        ),
        ("hopper-random --transitions -1", "must be at least 0, not -1 and 0"),
        ("hopper-random --seed -2", "must be at least 0, not 0 and -2"),
        ("hopper-random --physics bullet", "unknown physics 'bullet'"),
        ("hopper-medium --policy absent.npz", "absent.npz: there is no such file"),
        ("hopper-random --id no-version", "no-version"),
    ],
)
def test_the_command_says_in_one_line_what_it_needs(root, monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["generate.py", *words.split()])
    with pytest.raises(SystemExit) as end:
        guarded(generate.main)
    said = capsys.readouterr()
    assert (
        end.value.code == 2
        and said.err.startswith("error: ")
        and said.err.count("\n") == 1
        and message in said.err
    )
    assert not said.out and not list(root.rglob("*.hdf5"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--env point-mass-wall --steps 4096",
            "SAC collects 4096 steps before it learns: --steps (of a dataset: --transitions) must be above 4096, "
            "not 4096",
        ),
        ("--env toy-maze --algorithm ppo", "ToyMaze has discrete actions, and brax's PPO and SAC here"),
        ("--env toy-maze --steps 100", "algos/dqn.py learns such tasks"),
    ],
)
def test_what_brax_cannot_learn_is_refused_before_it_begins(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr(train_policy, "Restarting", lambda env: pytest.fail("began before the error"))
    monkeypatch.setattr(sys, "argv", ["train_policy.py", *words.split(), "--out", str(tmp_path / "p.npz")])
    with pytest.raises(SystemExit) as end:
        guarded(train_policy.main)
    said = capsys.readouterr()
    assert end.value.code == 2 and said.err.count("\n") == 1 and not said.out
    assert said.err.startswith("error: ") and message in said.err


def test_a_generator_killed_half_way_leaves_no_dataset(root):
    program = [sys.executable, str(REPO / "data/recipes/generate.py")]
    command = [*program, "maze2d-open", "--transitions", "500000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        seen, limit = root / "ooo" / "maze2d-open", time.time() + 300
        while time.time() < limit and process.poll() is None:
            if list(seen.glob("*unfinished*/data/main_data.hdf5")):  # it writes
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert list(seen.glob("*unfinished*")), "it was too quick to be killed while writing"
    assert not (seen / "noisy-v0").exists()
    assert write.exists("ooo/maze2d-open/noisy-v0") is False


def test_demonstrations_have_their_noise(monkeypatch):
    """That of the first action across, where it is not clipped: the starts are the same without it."""
    env, first = envs.make("point-mass-wall"), []
    for noise in (None, 0.0):
        if noise is not None:
            monkeypatch.setattr(point_mass, "NOISE", noise)
        first.append(np.array([e["actions"][0, 0] for e in point_mass.over_the_wall(env, 0, 0, [])]))
    free = np.abs(first[1]) < 0.6
    assert free.sum() > 30
    np.testing.assert_allclose(np.std((first[0] - first[1])[free]), 0.1, atol=0.03)
