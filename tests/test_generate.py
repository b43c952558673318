"""The generators: episodes as they were played, D4RL's recipes, and datasets that are whole or not there."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import envs
from data import cli, collect, datasets, generate, policy
from data.record import cut_to
from envs import maze2d

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
        policy.save(files[-1], [(0.01 * rng.normal(size=(11, 3)), np.full(3, bias))], log_std=np.full(3, -3.0), output="clip", algo=name)
    return tuple(files)


def test_locomotion_is_replayed_by_the_environment(root, actors):
    """Every recorded row is a step of the environment: from its observation, with its action, to the next one, for that reward."""
    generate.make("ooo/hopper/medium-v0", transitions=300, policies=actors[:1])
    data = datasets.load("ooo/hopper/medium-v0")
    rows, env = data.transitions, envs.make("hopper", physics="mujoco")
    assert len(rows.reward) == 300 and data.card["terminated_episodes"] >= data.card["episodes"] - 1
    state = env.reset_to(np.r_[0, rows.obs[0, :5]], rows.obs[0, 5:])
    for i in range(5):
        assert data.episode[i] == 0
        state = env.step(state, rows.action[i])
        np.testing.assert_allclose(state.obs, rows.next_obs[i], atol=1e-3)
        assert float(state.reward) == pytest.approx(rows.reward[i], abs=0.02)
    assert abs(rows.action.mean() + 0.5) < 0.1
    recipe = json.loads(data.card["recipe"])
    assert (
        recipe["seed"] == 0 and recipe["behaviour"] == ["low.npz (low)"] and recipe["transitions"] == 300 and recipe["versions"]["mujoco"]
    )


def test_medium_expert_is_half_and_half_and_random_is_uniform(root, actors):
    generate.make("ooo/hopper/medium-expert-v0", transitions=400, policies=actors)
    action = datasets.load("ooo/hopper/medium-expert-v0").transitions.action
    assert len(action) == 400
    assert action[:200].mean() < -0.3 and action[200:].mean() > 0.3
    generate.make("ooo/hopper/random-v0", transitions=2000, seed=3)
    action = datasets.load("ooo/hopper/random-v0").transitions.action
    assert abs(action.mean()) < 0.03 and abs(action.std() - 3**-0.5) < 0.02


def test_maze2d_episodes_run_from_target_to_target(root):
    generate.make("ooo/maze2d-umaze/noisy-v0", transitions=6000)
    data = datasets.load("ooo/maze2d-umaze/noisy-v0")
    env, rows = maze2d.Maze2D("umaze"), data.transitions
    assert len(rows.reward) == 6000 and (rows.discount == 1).all() and np.abs(rows.action).max() <= 1
    distance = np.linalg.norm(rows.next_obs[:, :2] - env.goal, axis=1)
    np.testing.assert_array_equal(rows.reward, (distance <= 0.5).astype(np.float32))
    ends = np.flatnonzero(data.truncation)[:-1]
    to_cell = np.linalg.norm(rows.obs[ends, None, :2] - env.cells[None], axis=2).min(axis=1)
    assert (to_cell < 0.1).mean() > 0.9  # the others ran into the time limit
    assert 40 < np.mean(data.card["length_quantiles"][2]) < 140


def test_the_missing_data_are_missing(root):
    generate.make("ooo/maze2d-large-missing-data/noisy-v0", transitions=20_000)
    data = datasets.load("ooo/maze2d-large-missing-data/noisy-v0")
    rows = data.transitions
    for centre, radius in collect.MISSING:
        assert np.linalg.norm(rows.obs[:, :2] - np.array(centre), axis=1).min() > radius
    assert 15_000 < len(rows.reward) < 19_000
    inside = data.episode[1:] == data.episode[:-1]
    np.testing.assert_array_equal(rows.next_obs[:-1][inside], rows.obs[1:][inside])


def test_antmaze_rewards_one_goal_of_the_evaluation(root):
    generate.make("ooo/antmaze-umaze/noisy-v0", transitions=2000)
    data = datasets.load("ooo/antmaze-umaze/noisy-v0")
    rows, env = data.transitions, envs.make("antmaze-umaze")
    assert len(rows.reward) == 2000 and rows.obs.shape[1] == 29
    np.testing.assert_array_equal(rows.reward, 1 - rows.discount)
    assert np.abs(rows.obs[0, :2]).max() <= 0.1  # the start
    assert rows.reward.sum() > 3, "the walker never got to the goal"
    centre = env.centre(env.cells("G")[0])
    assert (np.abs(rows.next_obs[rows.reward == 1][:, :2] - (centre + 0.75)) < 0.75 + 0.5).all()


def test_relabelling_and_cutting():
    whole = datasets.episode(np.c_[np.arange(5.0), np.zeros(5)], np.array([5.0, 0]), np.zeros((5, 1)), np.zeros(5), np.zeros(5))
    parts = collect.relabelled(whole, np.array([3.0, 0]), 0.5)
    assert [len(p["rewards"]) for p in parts] == [3, 2]
    assert [p["rewards"].tolist() for p in parts] == [[0, 0, 1], [0, 0]]
    assert parts[0]["terminations"].tolist() == [False, False, True] and parts[1]["truncations"].tolist() == [False, True]
    np.testing.assert_array_equal(parts[1]["observations"][:, 0], [3, 4, 5])
    left = collect.without([whole], (((2.0, 0.0), 0.4),))
    assert [p["observations"][:, 0].tolist() for p in left] == [[0, 1, 2], [3, 4, 5]]
    short = cut_to([whole, whole], 7)
    assert [len(p["rewards"]) for p in short] == [5, 2] and short[1]["truncations"].tolist() == [False, True]


def test_brax_sac_learns_on_ours_and_its_experience_is_kept():
    from data import behaviour

    env, rows, scores = envs.make("probe-match-obs"), [], []
    parameters = behaviour.train(
        env, "sac", 600, keep=lambda *row: rows.append([np.array(x) for x in row]), progress=lambda step, score: scores.append(score),
        num_envs=4, batch_size=16, grad_updates_per_step=1, min_replay_size=32,
    )  # fmt: skip
    obs, action, reward, _, termination, done = (np.concatenate(column) for column in zip(*rows))
    assert len(obs) >= 600 and len(scores) > 5
    np.testing.assert_allclose(reward, 1 - (action[:, 0] - obs[:, 0]) ** 2, atol=1e-5)
    assert (termination == 1).all() and (done == 1).all()
    assert set(np.unique(obs)) == {-0.5, 0.5}
    assert len(jax.tree.leaves(parameters)) > 4


def test_a_policy_of_brax_acts_the_same_as_a_file(tmp_path):
    import jax.numpy as jnp
    from brax.training.acme import running_statistics
    from brax.training.agents.ppo import networks

    from data import behaviour

    nets = networks.make_ppo_networks(
        5, 2, running_statistics.normalize, policy_hidden_layer_sizes=(8, 8), value_hidden_layer_sizes=(8,), activation=jax.nn.relu
    )
    normaliser = running_statistics.init_state(jnp.zeros(5)).replace(mean=jnp.arange(5.0), std=jnp.full(5, 2.0))
    parameters = (normaliser, nets.policy_network.init(jax.random.PRNGKey(0)))
    behaviour.save(tmp_path / "p.npz", parameters, 2)
    obs = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    logits = nets.policy_network.apply(*parameters, obs)
    actor = policy.load(tmp_path / "p.npz")
    np.testing.assert_allclose(policy.act(actor, obs), nets.parametric_action_distribution.mode(logits), atol=1e-5)
    noise = np.random.default_rng(1).normal(size=(7, 2))
    spread = jax.nn.softplus(logits[:, 2:]) + 0.001
    np.testing.assert_allclose(policy.forward(actor, obs, noise, np), np.tanh(logits[:, :2] + spread * noise), atol=1e-5)


# --- what is refused ---


def run(*flags, **environment):
    command = [sys.executable, str(REPO / "data/generate.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_bad_requests(root, actors, monkeypatch):
    with pytest.raises(cli.UsageError, match="did you mean hopper-medium"):
        generate.own_id("hopper-mediun")
    assert generate.own_id("antmaze-large-play") == "ooo/antmaze-large-play/noisy-v0"
    assert generate.own_id("walker2d-medium-expert") == "ooo/walker2d/medium-expert-v0"
    own = {name: datasets.own(name) for name in ("hopper", "door", "pen-binary-ending", "maze2d-large")}
    assert own == {
        "hopper": "none", "door": "none", "pen-binary-ending": "ooo/pen-binary/mixed-v0", "maze2d-large": "ooo/maze2d-large/noisy-v0",
    }  # fmt: skip
    with pytest.raises(cli.UsageError, match="takes 11 observations and gives 3 actions; ooo/halfcheetah/medium-v0 needs 17 and 6"):
        generate.make("ooo/halfcheetah/medium-v0", policies=actors[:1], transitions=10)
    with pytest.raises(datasets.DatasetError, match=r"is made by hand: python data/generate\.py ooo/hopper/expert-v0"):
        datasets.load("ooo/hopper/expert-v0")
    monkeypatch.setenv("MINARI_DATASETS_PATH", "/dev/null/datasets")
    with pytest.raises(datasets.DatasetError, match="cannot be written"):
        generate.make("ooo/maze2d-open/noisy-v0", transitions=100)


def test_the_command_line_says_what_it_needs(root):
    done = run("hopper-medium-expert", "--policy", "one.npz")
    assert done.returncode == 2 and "takes 2 --policy files, not 1" in done.stderr and "Traceback" not in done.stderr


def test_a_generator_killed_half_way_leaves_no_dataset(root):
    command = [sys.executable, str(REPO / "data/generate.py"), "maze2d-open", "--transitions", "3000000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        seen = root / "ooo" / "maze2d-open"
        limit = time.time() + 90
        while time.time() < limit and not list(seen.glob("*unfinished*/data/main_data.hdf5")):  # until it writes
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert list(seen.glob("*unfinished*")), "it was too quick to be killed while writing"
    assert not (seen / "noisy-v0").exists()
    assert datasets.exists("ooo/maze2d-open/noisy-v0") is False
