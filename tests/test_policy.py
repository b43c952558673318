"""Policy files: what is written can be read and acts as the format says; what is no policy is refused with the reason."""

import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from data import policy

SHARED = pathlib.Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "policies").is_dir(), reason="the shared policies are not beside this project")


def mlp(sizes=(3, 8, 5, 2), seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=pair), rng.normal(size=pair[1])) for pair in itertools.pairwise(sizes)]


def by_hand(layers, obs, activation):
    """The network's output for one observation, unit by unit."""
    values = [float(x) for x in obs]
    for depth, (w, b) in enumerate(layers):
        sums = [sum(v * float(w[i, j]) for i, v in enumerate(values)) + float(b[j]) for j in range(len(b))]
        values = sums if depth == len(layers) - 1 else [activation(s) for s in sums]
    return np.array(values)


@pytest.mark.parametrize("output", policy.OUTPUTS)
@pytest.mark.parametrize(("name", "activation"), [("relu", lambda x: max(x, 0.0)), ("tanh", np.tanh), ("none", lambda x: x)])
def test_a_saved_policy_acts_as_its_layers_do(tmp_path, output, name, activation):
    layers, obs = mlp(), np.random.default_rng(1).normal(size=(4, 6, 3))
    normal = {"obs_mean": [0.5, -1.0, 0.0], "obs_std": [2.0, 0.5, 1.0], "obs_clip": 1.5}
    policy.save(tmp_path / "p.npz", layers, hidden_activation=name, output=output, **normal, algo="iql", note="trained on nothing")
    loaded = policy.load(tmp_path / "p.npz")
    assert str(loaded["algo"]) == "iql" and str(loaded["note"]) == "trained on nothing"
    action = policy.act(loaded, obs)
    assert action.shape == (4, 6, 2)
    squash = np.tanh if output != "clip" else (lambda u: np.clip(u, -1, 1))
    for place in np.ndindex(4, 6):
        seen = [min(max((o - m) / s, -1.5), 1.5) for o, m, s in zip(obs[place], normal["obs_mean"], normal["obs_std"])]
        np.testing.assert_allclose(action[place], squash(by_hand(layers, seen, activation)), atol=1e-5)


@pytest.mark.parametrize("output", policy.OUTPUTS)
def test_samples_are_distributed_as_the_output_says(tmp_path, output):
    layers, log_std = [(np.zeros((3, 2)), np.array([0.3, -0.8]))], np.log([0.2, 0.6])
    policy.save(tmp_path / "p.npz", layers, log_std=log_std, output=output)
    sample = policy.act(policy.load(tmp_path / "p.npz"), np.zeros((200_000, 3)), np.random.default_rng(0))
    center = np.tanh([0.3, -0.8]) if output == "tanh_mean" else np.array([0.3, -0.8])
    # Each output is monotone in the noise, so the quantiles of the action are known from those of a normal distribution.
    for probability, z in ((0.0228, -2), (0.1587, -1), (0.5, 0), (0.8413, 1), (0.9772, 2)):
        u = center + np.exp(log_std) * z
        expected = np.tanh(u) if output == "tanh" else np.clip(u, -1, 1)
        np.testing.assert_allclose(np.quantile(sample, probability, axis=0), expected, atol=0.02)
    assert np.abs(sample).max() <= 1


def test_sampling_needs_a_standard_deviation_and_observations_need_their_size(tmp_path):
    policy.save(tmp_path / "p.npz", mlp())
    loaded = policy.load(tmp_path / "p.npz")
    with pytest.raises(ValueError, match="no standard deviation"):
        policy.act(loaded, np.zeros(3), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"\[\.\.\., 3\], not \(4, 1\)"):
        policy.act(loaded, np.zeros((4, 1)))


def rewrite(path, **changes):
    """The policy file `path` with keys replaced, or dropped where the change is None; unchecked."""
    with np.load(path) as file:
        content = {name: file[name] for name in file.files}
    content |= {name: np.asarray(value) for name, value in changes.items() if value is not None}
    np.savez(path, **{name: value for name, value in content.items() if changes.get(name, 0) is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"obs_std": None, "num_layers": None}, "keys obs_std, num_layers are missing"),
        ({"num_layers": 4}, "with num_layers 4, the keys w3, b3 are missing"),
        ({"num_layers": 2.5}, "num_layers must be a whole number"),
        ({"num_layers": 0}, "num_layers must be a whole number, at least 1"),
        ({"w1": np.ones((7, 5), np.float32)}, r"w1 must be floating-point \(8, 5\), not float32 \(7, 5\)"),
        ({"w0": np.ones(3, np.float32)}, "w0 must be a matrix"),
        ({"b2": np.ones(3, np.float32)}, r"b2 must be floating-point \(2,\)"),
        ({"log_std": np.ones(3, np.float32)}, "log_std must be"),
        ({"wS": np.ones((5, 2), np.float32)}, "the keys bS, log_std_min, log_std_max are missing"),
        ({"w2": np.full((5, 2), np.nan, np.float32)}, "w2 is not finite"),
        ({"obs_mean": np.full(3, np.inf, np.float32)}, "obs_mean is not finite"),
        ({"obs_clip": np.float32(np.nan)}, "obs_clip is not finite"),
        ({"b0": np.array(["x"] * 8)}, "b0 must be floating-point"),
        ({"obs_std": np.zeros(3, np.float32)}, "obs_std must be positive"),
        ({"action_low": np.ones(2, np.float32)}, "action_low must be below action_high"),
        ({"output_activation": "softmax"}, "output_activation is 'softmax', not one of tanh, clip, tanh_mean"),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_reason(tmp_path, changes, message):
    path = tmp_path / "bad.npz"
    policy.save(path, mlp())
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=r"bad\.npz: .*" + message):
        policy.load(path)


def test_what_is_no_archive_of_plain_arrays_is_refused(tmp_path):
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "pickle.npz", a=np.array([{}], object))
    (tmp_path / "text.npz").write_text("weights")
    (tmp_path / "empty.npz").touch()
    policy.save(tmp_path / "whole.npz", mlp())
    (tmp_path / "torn.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:600])
    for name in ("array.npy", "pickle.npz", "text.npz", "empty.npz", "torn.npz", "."):
        with pytest.raises(ValueError, match=r"not an \.npz file of plain arrays"):
            policy.load(tmp_path / name)
    with pytest.raises(ValueError, match="there is no such file"):
        policy.load(tmp_path / "absent.npz")


def test_a_bad_policy_is_not_written_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "p.npz"
    policy.save(path, mlp(seed=0))
    before = path.read_bytes()
    for layers, more in (
        ([(np.full((3, 2), np.nan), np.zeros(2))], {}), ([], {}), (mlp(), {"log_std": np.zeros(5)}), (mlp(), {"output": "tanh-mean"}),
        (mlp(), {"w0": "somewhere"}), (mlp(), {"file": "somewhere"}), ([(np.zeros(3), np.zeros(3))], {}),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            policy.save(path, layers, **more)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.npz"]


@needs_shared
def test_every_shared_policy_loads_and_acts():
    files = [path for path in sorted((SHARED / "policies").glob("*/*.npz")) if "trajectories" not in path.name]
    assert files
    for path in files:
        loaded = policy.load(path)
        obs = np.random.default_rng(0).normal(size=(2, 5, len(loaded["w0"])))
        for rng in (None, np.random.default_rng(0)):
            action = policy.act(loaded, obs, rng)
            assert action.shape[:2] == (2, 5) and np.isfinite(action).all() and np.abs(action).max() <= 1


@needs_shared
def test_a_shared_policy_gives_its_recorded_actions():
    """The recorded ones are means before clipping, of the policy that the file was converted from."""
    folder = SHARED / "policies" / "halfcheetah"
    with np.load(folder / "cs285_expert_trajectories.npz") as recorded:
        obs, action = recorded["observation"][:, :-1], recorded["action"]
    np.testing.assert_allclose(policy.act(policy.load(folder / "cs285_expert.npz"), obs), np.clip(action, -1, 1), atol=1e-5)


def run(*arguments):
    program = pathlib.Path(policy.__file__)
    return subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True, check=False)


def test_the_command_line_program_plays_a_policy(tmp_path):
    path = tmp_path / "p.npz"
    policy.save(path, mlp((3, 4, 1)), log_std=np.zeros(1))
    done = run("--policy", path, "--env-id", "Pendulum-v1", "--episodes", "2", "--sample")
    assert done.returncode == 0, done.stderr
    assert "2 episodes, sampled actions" in done.stdout and "200.0" in done.stdout


def test_the_command_line_program_says_in_one_line_what_is_wrong(tmp_path):
    path = tmp_path / "p.npz"
    policy.save(path, mlp((4, 4, 1)))
    done = run("--policy", path, "--env-id", "Pendulum-v1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: Pendulum-v1 has 3 observations and 1 actions, but {path} takes 4 and gives 1" in done.stderr
