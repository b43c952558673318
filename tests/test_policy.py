"""Policy files: what is written is read again and acts as the format says; what is no policy is refused."""

import itertools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ooo_rl.data import policy

SHARED = pathlib.Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(
    not (SHARED / "policies").is_dir(), reason="the shared policies are not beside this project"
)


def random_layers(sizes=(3, 8, 5, 2), seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=pair), rng.normal(size=pair[1])) for pair in itertools.pairwise(sizes)]


def saved(path, layers, **settings):
    """Writes the MLP of `layers` to `path` and reads it."""
    policy.save(path, policy.mlp(layers, **settings))
    return policy.load(path)


def by_hand(layers, obs, activation):
    """The network's output for one observation, unit by unit."""
    values = [float(x) for x in obs]
    for depth, (w, b) in enumerate(layers):
        sums = [sum(v * float(w[i, j]) for i, v in enumerate(values)) + float(b[j]) for j in range(len(b))]
        values = sums if depth == len(layers) - 1 else [activation(s) for s in sums]
    return np.array(values)


@pytest.mark.parametrize("output", policy.OUTPUTS)
@pytest.mark.parametrize(
    ("name", "activation"), [("relu", lambda x: max(x, 0.0)), ("tanh", np.tanh), ("none", lambda x: x)]
)
def test_a_saved_policy_acts_as_its_layers_do(tmp_path, output, name, activation):
    layers, obs = random_layers(), np.random.default_rng(1).normal(size=(4, 6, 3))
    normal = {"obs_mean": [0.5, -1.0, 0.0], "obs_std": [2.0, 0.5, 1.0], "obs_clip": 1.5}
    made = policy.mlp(layers, hidden_activation=name, output=output, **normal)
    policy.save(tmp_path / "p.npz", made, algo="iql", note="trained on nothing")
    loaded = policy.load(tmp_path / "p.npz")
    assert str(loaded["algo"]) == "iql" and str(loaded["note"]) == "trained on nothing"
    action = policy.act(loaded, obs)
    assert action.shape == ((4, 6) if output == "argmax" else (4, 6, 2))
    assert policy.is_discrete(loaded) == (output == "argmax")
    squash = {"clip": lambda u: np.clip(u, -1, 1), "argmax": np.argmax}.get(output, np.tanh)
    for place in np.ndindex(4, 6):
        seen = [
            min(max((o - m) / s, -1.5), 1.5)
            for o, m, s in zip(obs[place], normal["obs_mean"], normal["obs_std"])
        ]
        np.testing.assert_allclose(action[place], squash(by_hand(layers, seen, activation)), atol=1e-5)


@pytest.mark.parametrize("output", [output for output in policy.OUTPUTS if output != "argmax"])
def test_samples_are_distributed_as_the_output_says(tmp_path, output):
    layers, log_std = [(np.zeros((3, 2)), np.array([0.3, -0.8]))], np.log([0.2, 0.6])
    loaded = saved(tmp_path / "p.npz", layers, log_std=log_std, output=output)
    sample = policy.act(loaded, np.zeros((200_000, 3)), np.random.default_rng(0))
    center = np.tanh([0.3, -0.8]) if output == "tanh_mean" else np.array([0.3, -0.8])
    # Each output is monotone in the noise, so the quantiles of the action are known from those of a normal
    # distribution.
    for probability, z in ((0.0228, -2), (0.1587, -1), (0.5, 0), (0.8413, 1), (0.9772, 2)):
        u = center + np.exp(log_std) * z
        expected = np.tanh(u) if output == "tanh" else np.clip(u, -1, 1)
        np.testing.assert_allclose(np.quantile(sample, probability, axis=0), expected, atol=0.02)
    assert np.abs(sample).max() <= 1


def test_sampling_needs_a_standard_deviation_and_observations_need_their_size(tmp_path):
    loaded = saved(tmp_path / "p.npz", random_layers())
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
        (
            {"output_activation": "softmax"},
            "output_activation is 'softmax', not one of tanh, clip, tanh_mean",
        ),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_reason(tmp_path, changes, message):
    path = tmp_path / "bad.npz"
    saved(path, random_layers())
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=r"bad\.npz: .*" + message):
        policy.load(path)


def test_what_is_no_archive_of_plain_arrays_is_refused(tmp_path):
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "pickle.npz", a=np.array([{}], object))
    (tmp_path / "text.npz").write_text("weights")
    (tmp_path / "empty.npz").touch()
    saved(tmp_path / "whole.npz", random_layers())
    (tmp_path / "torn.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:600])
    for kind, save in (("stored", np.savez), ("packed", np.savez_compressed)):
        save(tmp_path / f"{kind}.npz", a=np.zeros(99))
        damaged = bytearray((tmp_path / f"{kind}.npz").read_bytes())
        if kind == "stored":
            damaged[damaged.rindex(b"PK\x01\x02") + 10] = 97  # a way to compress that nobody knows
        else:
            damaged[45:60] = bytes(15)
        (tmp_path / f"{kind}.npz").write_bytes(damaged)
    for name in (
        "array.npy", "pickle.npz", "text.npz", "empty.npz", "torn.npz", ".", "stored.npz", "packed.npz",
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"not an \.npz file of plain arrays"):
            policy.load(tmp_path / name)
    with pytest.raises(ValueError, match="there is no such file"):
        policy.load(tmp_path / "absent.npz")


def test_a_bad_policy_is_not_written_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "p.npz"
    saved(path, random_layers(seed=0))
    before, good = path.read_bytes(), policy.mlp(random_layers())
    for bad, words in (
        ({"w0": np.full((3, 8), np.nan, np.float32)}, {}), ({"log_std": np.zeros(5, np.float32)}, {}),
        ({"output_activation": np.asarray("tanh-mean")}, {}), ({"num_layers": np.int32(0)}, {}),
        ({}, {"w0": "somewhere"}), ({}, {"file": "somewhere"}),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            policy.save(path, good | bad, **words)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.npz"]


def test_what_would_be_refused_is_not_made():
    for layers, settings in (
        ([(np.full((3, 2), np.nan), np.zeros(2))], {}), ([], {}), (random_layers(), {"log_std": np.zeros(5)}),
        (random_layers(), {"output": "tanh-mean"}), ([(np.zeros(3), np.zeros(3))], {}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="this policy"):
            policy.mlp(layers, **settings)


@pytest.mark.parametrize("head", [{"gaussian": (-0.5, -2.0, 1.0)}, {"softplus": 0.1}])
def test_the_parameters_of_flax_with_a_head_for_the_noise(tmp_path, head):
    """Twelve layers, since Dense_10 comes before Dense_2 in the alphabet. The last gives means and noise."""
    layers = random_layers((3, *range(5, 16), 4))
    params = {f"Dense_{i}": {"kernel": 0.5 * w, "bias": b} for i, (w, b) in enumerate(layers)}
    loaded = saved(tmp_path / "p.npz", params, **head, hidden_activation="tanh", output="clip")
    h = obs = np.random.default_rng(1).normal(size=(7, 3))
    for i in range(12):
        h = (h if i == 0 else np.tanh(h)) @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
    mean, x = h[:, :2], h[:, 2:]
    std = np.exp(np.clip(x - 0.5, -2, 1)) if "gaussian" in head else np.log1p(np.exp(x)) + 0.1
    assert policy.policy_sizes(loaded) == (3, 2)
    np.testing.assert_allclose(policy.act(loaded, obs), np.clip(mean, -1, 1), atol=1e-5)
    noise = np.random.default_rng(2).normal(size=(7, 2))
    sampled = np.clip(mean + std * noise, -1, 1)
    np.testing.assert_allclose(policy.forward(loaded, obs, noise, np), sampled, atol=1e-5)


# --- policies that decode a latent action ---


def decoder_of(path, **settings):
    """Layers of the decoder and of what gives its latent action, and the policy as read from the file `path`."""
    before, layers = random_layers((3, 6, 4)), random_layers((7, 5, 8, 2), seed=1)
    return before, layers, saved(path, layers, latent=(before, 1.5), obs_mean=0.5, obs_std=2.0, **settings)


def test_a_decoded_latent_action_is_that_of_both_networks(tmp_path):
    before, layers, loaded = decoder_of(tmp_path / "p.npz", output="clip", log_std=np.log([0.1, 0.2]))
    assert policy.policy_sizes(loaded) == (3, 2)
    obs, noise = (np.random.default_rng(k).normal(size=(4, 6, size)) for k, size in ((1, 3), (2, 2)))
    mean, sampled = policy.act(loaded, obs), policy.forward(loaded, obs, noise, np)
    relu = lambda x: max(x, 0.0)  # noqa: E731
    for place in np.ndindex(4, 6):
        x = (obs[place] - 0.5) / 2
        latent = 1.5 * np.tanh(by_hand(before, x, relu))
        u = by_hand(layers, [*x, *latent], relu)
        np.testing.assert_allclose(mean[place], np.clip(u, -1, 1), atol=1e-5)
        expected = np.clip(u + noise[place] * [0.1, 0.2], -1, 1)
        np.testing.assert_allclose(sampled[place], expected, atol=1e-5)
    traced = jax.jit(jax.vmap(lambda o: policy.forward(loaded, o, None, jnp)))(np.float32(obs))
    np.testing.assert_allclose(traced, mean, atol=1e-5)
    with pytest.raises(ValueError, match=r"\[\.\.\., 3\], not \(4, 7\)"):
        policy.act(loaded, np.zeros((4, 7)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_latent_layers": None}, "the key num_latent_layers is missing"),
        ({"v1": None, "latent_max": None}, "with num_latent_layers 2, the keys v1, latent_max are missing"),
        ({"num_latent_layers": 0}, "num_latent_layers must be a whole number, at least 1"),
        ({"latent_max": np.float32(0)}, "latent_max must be positive"),
        ({"c0": np.ones(5, np.float32)}, r"c0 must be floating-point \(6,\)"),
        (
            {"v1": np.ones((6, 3), np.float32), "c1": np.ones(3, np.float32)},
            r"w0 must be floating-point \(6, 5\)",
        ),
        ({"v0": np.full((3, 6), np.inf, np.float32)}, "v0 is not finite"),
    ],
)
def test_a_bad_decoder_is_refused(tmp_path, changes, message):
    path = tmp_path / "bad.npz"
    decoder_of(path)
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=r"bad\.npz: .*" + message):
        policy.load(path)


# --- policies that are no MLP ---


def best_of_four(parameters, obs, key):
    """The best of four candidates by a score, or with a key one drawn by the scores: no MLP does that."""
    table, (gain, offset) = parameters["table"], parameters["scores"]
    scores = gain * obs @ table.T + offset
    chosen = jnp.argmax(scores, 1) if key is None else jax.random.categorical(key, scores)
    return jnp.tanh(table[chosen, :2])


@pytest.fixture(scope="module")
def chooser(tmp_path_factory):
    """(parameters of `best_of_four`, the policy as read from its file, the file)."""
    parameters = {
        "table": np.float32(np.random.default_rng(0).normal(size=(4, 3))),
        "scores": (np.float32(2.0), np.arange(4)),  # not all of them are float32 arrays
    }
    path = tmp_path_factory.mktemp("policy") / "p.npz"
    policy.save(path, policy.jax_function(best_of_four, parameters, 3), algo="pex", note="best of four")
    return parameters, policy.load(path), path


def test_a_saved_jax_function_acts_as_the_function(chooser):
    parameters, loaded, _ = chooser
    assert policy.policy_sizes(loaded) == (3, 2) and (str(loaded["algo"]), str(loaded["note"])) == (
        "pex",
        "best of four",
    )
    obs = np.random.default_rng(1).normal(size=(4, 6, 3)).astype(np.float32)
    expected = best_of_four(parameters, obs.reshape(24, 3), None).reshape(4, 6, 2)
    np.testing.assert_allclose(policy.act(loaded, obs), expected, atol=1e-6)
    np.testing.assert_allclose(policy.act(loaded, obs[1, 2]), expected[1, 2], atol=1e-6)  # one alone
    np.testing.assert_allclose(policy.forward(loaded, obs[0], None, jnp), expected[0], atol=1e-6)
    with pytest.raises(ValueError, match=r"\[\.\.\., 3\], not \(4, 1\)"):
        policy.act(loaded, np.zeros((4, 1)))


def test_a_saved_jax_function_samples_by_its_own_rule(chooser):
    parameters, loaded, _ = chooser
    obs = np.tile(np.float32([0.3, -0.2, 0.1]), (20_000, 1))
    drawn = policy.act(loaded, obs, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn, policy.act(loaded, obs, np.random.default_rng(0)))
    assert (drawn != policy.act(loaded, obs, np.random.default_rng(1))).any()
    scores = 2 * parameters["table"] @ obs[0] + np.arange(4)
    chance = np.exp(scores) / np.exp(scores).sum()
    for choice, row in enumerate(np.tanh(parameters["table"][:, :2])):
        assert abs((np.abs(drawn - row) < 1e-6).all(1).mean() - chance[choice]) < 0.015


def test_a_saved_jax_function_acts_inside_a_program(chooser):
    """As the recipes and the films call it: traced, and mapped over worlds, each with noise of its own."""
    parameters, loaded, _ = chooser
    rng = np.random.default_rng(2)
    obs, noise = np.float32(rng.normal(size=(500, 3))), np.float32(rng.normal(size=(500, 2)))
    mean, drawn = jax.jit(
        jax.vmap(lambda o, n: (policy.forward(loaded, o, None, jnp), policy.forward(loaded, o, n, jnp)))
    )(obs, noise)
    np.testing.assert_allclose(mean, best_of_four(parameters, obs, None), atol=1e-6)
    known = np.tanh(parameters["table"][:, :2])
    assert np.abs(drawn[:, None] - known).max(2).min(1).max() < 1e-6 and (np.abs(drawn - mean) > 1e-3).any()


def test_a_saved_jax_function_is_compiled_once(chooser):
    """A host loop calls it at every step of every episode."""
    _, loaded, _ = chooser
    events = []
    hear = lambda event, *_, **__: events.append(event)  # noqa: E731
    for rng in (None, np.random.default_rng(0)):
        policy.act(loaded, np.zeros((5, 3)), rng)
        jax.monitoring.register_event_duration_secs_listener(hear)
        try:
            for _ in range(3):
                policy.act(loaded, np.ones((5, 3)), rng)
        finally:
            jax.monitoring.unregister_event_duration_listener(hear)
    assert not [event for event in events if "compile" in event or "trace" in event], events


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p1": None}, "the keys p1 are missing"),
        ({"sizes": None}, "the keys sizes are missing"),
        ({"p0": np.full((4, 3), np.nan, np.float32)}, "p0 is not finite"),
    ],
)
def test_a_bad_jax_function_is_refused(chooser, tmp_path, changes, message):
    path = tmp_path / "bad.npz"
    path.write_bytes(chooser[2].read_bytes())
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=r"bad\.npz: .*" + message):
        policy.load(path)


def test_a_jax_function_that_is_not_finite_is_not_written(tmp_path):
    bad = policy.jax_function(lambda gain, obs, key: gain * obs, np.float32(np.nan), 3)
    with pytest.raises(ValueError, match="p0 is not finite"):
        policy.save(tmp_path / "p.npz", bad)
    assert not list(tmp_path.iterdir())


@needs_shared
def test_every_shared_policy_loads_and_acts():
    files = [
        path for path in sorted((SHARED / "policies").glob("*/*.npz")) if "trajectories" not in path.name
    ]
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
    np.testing.assert_allclose(
        policy.act(policy.load(folder / "cs285_expert.npz"), obs), np.clip(action, -1, 1), atol=1e-5
    )


def run(*arguments):
    program = pathlib.Path(policy.__file__)
    return subprocess.run([sys.executable, program, *arguments], capture_output=True, text=True, check=False)


def test_the_command_line_program_plays_a_policy(tmp_path):
    path = tmp_path / "p.npz"
    saved(path, random_layers((3, 4, 1)), log_std=np.zeros(1))
    done = run("--policy", path, "--env-id", "Pendulum-v1", "--episodes", "2", "--sample")
    assert done.returncode == 0, done.stderr
    assert "2 episodes, sampled actions" in done.stdout and "200.0" in done.stdout


def test_the_command_line_program_says_in_one_line_what_is_wrong(tmp_path):
    path = tmp_path / "p.npz"
    saved(path, random_layers((4, 4, 1)))
    done = run("--policy", path, "--env-id", "Pendulum-v1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        f"error: Pendulum-v1 has 3 observations and 1 actions, but {path} takes 4 and gives 1" in done.stderr
    )
