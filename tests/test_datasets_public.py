"""Farama's and D4RL's datasets load by id or path into D4RL's layout, and their cards say how they differ
from D4RL's."""

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

from ooo_rl.data.datasets import public
from ooo_rl.data.datasets.validate import check_fits
from ooo_rl.data.errors import DatasetError
from ooo_rl.data.recipes.library import load

gymnasium_robotics = pytest.importorskip("gymnasium_robotics")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Minari's advice on metadata


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The folder of Minari's datasets, empty; D4RL's is empty too."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    (tmp_path / "d4rl").mkdir()
    return tmp_path / "minari"


def stack(observations):
    """A list of (nested dictionaries of) observations as (nested dictionaries of) arrays."""
    first = observations[0]
    return (
        {key: stack([obs[key] for obs in observations]) for key in first}
        if isinstance(first, dict)
        else np.stack(observations)
    )


def record(env_id, dataset_id, body="", episodes=2, steps=5):
    """Steps a Gymnasium environment at random and writes a Minari dataset; returns MuJoCo's own (qpos, qvel)
    of every observation."""
    gymnasium.register_envs(gymnasium_robotics)
    env, states, buffers = gymnasium.make(env_id), [], []
    env.action_space.seed(0)

    def see():
        return np.concatenate([(data := getattr(env.unwrapped, body).data).qpos, data.qvel]) if body else None

    for i in range(episodes):
        obs, actions, rewards = [env.reset(seed=i)[0]], [], []
        states.append([see()])
        for _ in range(steps):
            actions.append(env.action_space.sample())
            seen, reward, *_ = env.step(actions[-1])
            obs, rewards = [*obs, seen], [*rewards, float(reward)]
            states[-1].append(see())
        last = [t == steps - 1 for t in range(steps)]
        buffers.append(
            EpisodeBuffer(
                id=i, observations=stack(obs), actions=np.float32(actions), rewards=rewards,
                terminations=[False] * steps, truncations=last, infos={"step": np.arange(steps + 1)},
            )
        )  # fmt: skip
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    minari.create_dataset_from_buffers(dataset_id, buffers, description="test", **spaces)
    env.close()
    return states


def has(card, *words):
    """Whether for each of `words` there is a note with it."""
    return all(any(word in note for note in card["notes"]) for word in words)


# --- Minari ---


@pytest.mark.parametrize("dataset_id", ["D4RL/pointmaze/umaze-v2", "D4RL/pointmaze/umaze-dense-v2"])
def test_pointmaze_has_the_layout_of_maze2d(root, dataset_id, monkeypatch):
    states = np.float32(record("PointMaze_UMaze-v3", dataset_id, "point_env"))
    data = load(dataset_id)
    np.testing.assert_array_equal(data.transitions.obs, np.concatenate(states[:, :-1]))
    np.testing.assert_array_equal(data.transitions.next_obs, np.concatenate(states[:, 1:]))
    assert (data.card["obs_size"], data.card["action_size"], data.card["truncated_episodes"]) == (4, 2, 2)
    assert has(
        data.card,
        "goals dropped",
        "centred on the origin",
        "y up",
        "goal changes during the data",
        "cut where it is reached",
    )
    assert data.card["normalized_score"] is None and len(data.card["notes"]) == 2
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root / "none"))
    monkeypatch.chdir(root / "D4RL")
    for path in (
        root / dataset_id,
        root / dataset_id / "data" / "main_data.hdf5",
        dataset_id.removeprefix("D4RL/"),
    ):
        card = load(str(path)).card
        assert card["sha256"] == data.card["sha256"] and card["notes"] == data.card["notes"]


@pytest.mark.parametrize("version", ["v4", "v5"])
def test_antmaze_has_the_layout_of_d4rl(root, version):
    states = np.float32(record(f"AntMaze_UMaze-{version}", "D4RL/antmaze/umaze-v1", "ant_env"))
    with h5py.File(root / "D4RL/antmaze/umaze-v1/data/main_data.hdf5") as file:
        assert file["episode_0/observations/observation"].shape[1] == {"v4": 27, "v5": 105}[version]
    data = load("D4RL/antmaze/umaze-v1")
    np.testing.assert_array_equal(
        data.transitions.obs, np.concatenate(states[:, :-1])
    )  # x, y, ... of the 15 positions, 14 velocities
    np.testing.assert_array_equal(data.transitions.next_obs, np.concatenate(states[:, 1:]))
    assert (data.card["obs_size"], data.card["action_size"]) == (29, 8)
    assert has(
        data.card,
        "goals, and contact forces",
        "continuing task",
        "gear 150",
        "0.05 s",
        "y up",
        "stays at the goal",
        "do not compare",
    )


def test_pointmaze_of_ones_own_is_flattened_without_claims_about_faramas(root):
    record("PointMaze_Open-v3", "mine/maze-v0", "point_env", episodes=1)
    card = load("mine/maze-v0").card
    assert card["obs_size"] == 4 and has(card, "goals dropped") and not has(card, "goal changes")


@pytest.mark.parametrize(
    ("env_id", "dataset_id", "body", "words"),
    [
        ("AdroitHandDoor-v1", "D4RL/door/human-v2", "door", ("+0.1 instead of -0.1",)),
        ("Hopper-v5", "mujoco/hopper/medium-v0", "hopper", ("v5 environments", "not comparable")),
    ],
)
def test_notes_on_data_of_other_physics(root, env_id, dataset_id, body, words):
    record(env_id, dataset_id, episodes=1)
    data = load(dataset_id)
    assert has(data.card, *words) and public.body(data.card["obs_size"], data.card["action_size"]) == body


def test_every_table_of_notes_matches_its_ids():
    ids = [
        "D4RL/pointmaze/open-dense-v2",
        "D4RL/antmaze/large-play-v1",
        "D4RL/hammer/cloned-v2",
        "D4RL/relocate/expert-v2",
    ]
    ids += ["D4RL/pen/human-v2", "D4RL/kitchen/mixed-v2", "mujoco/ant/expert-v0"]
    assert all(len(public.notes(name)) == 1 for name in ids)
    assert not public.notes("ooo/point-mass-wall/over-v0") and not public.notes("halfcheetah-medium-v2")


@pytest.mark.parametrize(
    ("shapes", "size"),
    [
        # FrankaKitchen, and Fetch
        ({"observation": (59,), "achieved_goal": {"kettle": (7,)}, "desired_goal": {"kettle": (7,)}}, 73),
        ({"observation": (10,), "achieved_goal": (3,), "desired_goal": (3,)}, 16),
        ({"observation": (4,), "achieved_goal": (3,), "desired_goal": (3,)}, 10),
        ({"observation": (4,), "achieved_goal": (2,)}, 6),
    ],
)
def test_other_dictionaries_keep_all_keys(root, shapes, size):
    def box(s):
        if isinstance(s, dict):
            return gymnasium.spaces.Dict({k: box(v) for k, v in s.items()})
        return gymnasium.spaces.Box(-9, 9, s)

    space = box(shapes)
    space.seed(0)
    buffer = EpisodeBuffer(
        id=0, observations=stack([space.sample() for _ in range(4)]), actions=np.zeros((3, 2), np.float32),
        rewards=[0.0] * 3, terminations=[False] * 3, truncations=[False, False, True],
        infos={"step": np.arange(4)},
    )  # fmt: skip
    spaces = {"observation_space": space, "action_space": gymnasium.spaces.Box(-1, 1, (2,))}
    minari.create_dataset_from_buffers("some/dict-v0", [buffer], description="test", **spaces)
    card = load("some/dict-v0").card
    assert (
        card["obs_size"] == size
        and has(card, "flattened in the order achieved_goal")
        and not has(card, "maze")
    )


def test_the_parts_of_a_tuple_stay_in_their_order():
    parts = {f"_index_{i}": np.full((2, 1), i) for i in range(12)}
    np.testing.assert_array_equal(public.flat_obs(parts, []), [range(12)] * 2)


# --- D4RL's files ---


def d4rl(path, obs=17, act=6, n=12, next_observations=False, terminals=True, observations=None):
    """A file with the arrays, types and groups of D4RL's; timeouts after rows 4 and 11, a terminal at row 8.
    Returns the arrays."""
    rng = np.random.default_rng(0)
    walk = rng.normal(size=(n + 1, obs)).astype(np.float32) if observations is None else observations
    arrays = {"observations": walk[:-1], "actions": rng.uniform(-1, 1, (n, act)).astype(np.float32)}
    arrays |= {"rewards": rng.normal(size=n).astype(np.float32), "timeouts": np.isin(np.arange(n), (4, 11))}
    if terminals:
        arrays["terminals"] = np.arange(n) == 8
    if next_observations:
        arrays["next_observations"] = walk[1:]
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file.create_dataset(key, data=value, compression="gzip")
        for key, width in (("qpos", 9), ("qvel", 9), ("goal", 2)):
            file[f"infos/{key}"] = np.zeros((n, width))
        file["metadata/policy/fc0/weight"], file["metadata/algorithm"] = np.zeros((3, 3)), np.bytes_("SAC")
    return arrays


FILES = [  # D4RL's id, the file that D4RL downloads for it, and the sizes
    ("halfcheetah-medium-v2", "halfcheetah_medium-v2", 17, 6),
    ("walker2d-medium-replay-v2", "walker2d_medium_replay-v2", 17, 6),
    ("hopper-full-replay-v1", "hopper_full_replay-v1", 11, 3),
    ("walker2d-medium-replay-v0", "walker_mixed", 17, 6),
    ("halfcheetah-medium-expert-v0", "halfcheetah_medium_expert", 17, 6),
    ("maze2d-large-v1", "maze2d-large-sparse-v1", 4, 2),
    ("maze2d-umaze-dense-v1", "maze2d-umaze-dense-v1", 4, 2),
    ("maze2d-open-v0", "maze2d-open-sparse", 4, 2),
    (
        "antmaze-large-diverse-v2",
        "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed",
        29,
        8,
    ),
    ("antmaze-medium-play-v2", "Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse_fixed", 29, 8),
    ("antmaze-umaze-v0", "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse", 29, 8),
    ("antmaze-umaze-diverse-v1", "Ant_maze_umaze_noisy_multistart_True_multigoal_True_sparse", 29, 8),
    ("door-human-v1", "door-human-v1", 39, 28),
    ("pen-cloned-v0", "pen-demos-v0-bc-combined", 45, 24),
    ("kitchen-complete-v0", "mini_kitchen_microwave_kettle_light_slider-v0", 60, 9),
]


@pytest.mark.parametrize(("name", "file", "obs", "act"), FILES)
def test_d4rl_ids_find_the_files_that_d4rl_downloaded(root, name, file, obs, act):
    path = public.d4rl_folder() / f"{file}.hdf5"
    d4rl(path, obs, act)
    data = load(name)
    assert (data.card["id"], data.card["source"]) == (name, str(path)) and data.card[
        "normalized_score"
    ] is not None
    check_fits(data, obs, act, name)
    assert load(str(path)).card["sha256"] == data.card["sha256"]
    assert name in public.d4rl_ids()


@pytest.mark.parametrize("name", ["maze2d-umaze-sparse.hdf5", "maze2d-large-v0.hdf5"])
def test_d4rls_first_maze2d_is_one_run_without_ends(root, name):
    d4rl(public.d4rl_folder() / name, 4, 2, terminals=False)
    with h5py.File(public.d4rl_folder() / name, "a") as file:
        del file["timeouts"]
    card = load(str(public.d4rl_folder() / name)).card
    assert (card["transitions"], card["episodes"]) == (11, 1) and has(card, "one run without resets")
    assert card["normalized_score"] is None  # the sum over the whole file is the return of no episode


def rewrite(path, **arrays):
    """Replaces arrays of a file."""
    with h5py.File(path, "a") as file:
        for key, value in arrays.items():
            del file[key]
            file[key] = value


def ant_walk():
    """Positions of an ant that walks 12 steps with resets after rows 2, 7 and 8 (see `d4rl` for the flags)."""
    walk = np.zeros((13, 29), np.float32)
    walk[:, 0] = [0, 1.5, 3, 0, 1, 2, 3, 4, 20, 0, 1, 2, 3]
    return walk


@pytest.mark.parametrize("next_observations", [False, True])
@pytest.mark.parametrize("name", ["antmaze-large-diverse-v0", "antmaze-umaze-v1"])
def test_rows_of_the_first_antmazes_that_lead_across_resets_are_dropped(root, name, next_observations):
    path = public.d4rl_folder() / public.D4RL_FILES[name]
    d4rl(path, 29, 8, observations=ant_walk(), next_observations=next_observations)
    data = load(name)
    rows = data.transitions
    assert np.abs(rows.next_obs[:, 0] - rows.obs[:, 0])[rows.discount == 1].max() <= 2
    # Row 8 terminates, so that its next observation is not used. Rows 4 and 11 are timeouts.
    kept = [0, 1, 3, 4, 5, 6, 8, 9, 10, 11] if next_observations else [0, 1, 3, 5, 6, 8, 9, 10]
    np.testing.assert_array_equal(rows.obs, ant_walk()[kept])
    ends = [1, 4, 6, 8, 11] if next_observations else [1, 3, 6, 8, 10]
    np.testing.assert_array_equal(
        np.flatnonzero(np.diff(data.episode, append=-1)), np.searchsorted(kept, ends)
    )
    assert has(data.card, "2 rows dropped in which the ant moves farther than 2 m", "_fixed")


@pytest.mark.parametrize("name", ["antmaze-umaze-v2.hdf5", "antmaze-mine.hdf5", "hopper-medium-v0.hdf5"])
def test_far_moves_elsewhere_are_kept(root, name):
    d4rl(public.d4rl_folder() / name, 29, 8, observations=ant_walk())
    card = load(str(public.d4rl_folder() / name)).card
    assert card["transitions"] == 10 and not has(card, "farther")


def test_a_first_antmaze_without_such_rows_has_no_note_on_them(root):
    path = public.d4rl_folder() / "antmaze-umaze-v0.hdf5"
    d4rl(path, 29, 8, observations=np.zeros((13, 29), np.float32))
    card = load(str(path)).card
    assert card["transitions"] == 10 and not has(card, "farther")


def test_rows_of_maze2d_that_repeat_an_observation_are_dropped(root):
    """After a timeout D4RL's script kept the old observation, and the ball moved on."""
    walk = np.random.default_rng(0).normal(size=(13, 4)).astype(np.float32)
    walk[5] = walk[4]  # after a timeout
    walk[8] = walk[7]  # the ball may also rest
    path = public.d4rl_folder() / "maze2d-large-sparse-v1.hdf5"
    d4rl(path, 4, 2, terminals=False, observations=walk)
    data = load("maze2d-large-v1")
    np.testing.assert_array_equal(data.transitions.obs, walk[[0, 1, 2, 3, 6, 7, 8, 9, 10]])
    np.testing.assert_array_equal(data.transitions.next_obs, walk[[1, 2, 3, 4, 7, 8, 9, 10, 11]])
    np.testing.assert_array_equal(data.episode, [0] * 4 + [1] * 5)
    assert has(data.card, "1 rows after timeouts dropped", "2 rows at timeouts dropped")
    path.rename(public.d4rl_folder() / "mine.hdf5")
    assert load(str(public.d4rl_folder() / "mine.hdf5")).card["transitions"] == 10


def test_a_maze2d_of_one_step_between_timeouts(root):
    """A new target may be where the ball is; then two timeouts follow one another."""
    walk = np.random.default_rng(0).normal(size=(13, 4)).astype(np.float32)
    walk[5] = walk[6] = walk[4]
    path = public.d4rl_folder() / "maze2d-umaze-v1.hdf5"
    d4rl(path, 4, 2, terminals=False, observations=walk)
    rewrite(path, timeouts=np.isin(np.arange(12), (4, 5, 11)))
    np.testing.assert_array_equal(load(str(path)).transitions.obs, walk[[0, 1, 2, 3, 7, 8, 9, 10]])


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("maze2d-large-v1.hdf5", "one row late"),
        ("maze2d-open-dense.hdf5", "one row late"),
        ("hopper_medium_expert.hdf5", "expert and medium-replay data"),
        ("hopper-medium-expert-v0.hdf5", "expert and medium-replay data"),
        ("hopper_medium_expert-v2.hdf5", None),
        ("hopper_medium.hdf5", None),
        ("maze2d-mine.hdf5", None),
    ],
)
def test_notes_on_files_of_d4rl(root, name, note):
    d4rl(public.d4rl_folder() / name, 4, 2)
    card = load(str(public.d4rl_folder() / name)).card
    assert has(card, note) if note else not has(card, "D4RL")


@pytest.mark.parametrize("folder", ["home/ant", "pen", "hopper-medium-v2", "D4RL/door/human-v2"])
def test_words_of_a_path_give_no_score(root, tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True)
    d4rl(tmp_path / folder / "hopper_log.hdf5", next_observations=True)
    assert load(str(tmp_path / folder / "hopper_log.hdf5")).card["normalized_score"] is None
    d4rl(tmp_path / folder / "hopper_medium-v2.hdf5", next_observations=True)
    assert load(str(tmp_path / folder / "hopper_medium-v2.hdf5")).card["normalized_score"] is not None
    record("Hopper-v5", "mine/log-v0", episodes=1)
    (root / "mine/log-v0").rename(tmp_path / folder / "moved")
    assert load(str(tmp_path / folder / "moved")).card["normalized_score"] is None


def test_a_file_of_d4rl_under_minaris_file_name_is_refused(root, tmp_path):
    d4rl(tmp_path / "main_data.hdf5")
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(DatasetError, match="no episodes"):
        load(str(tmp_path / "main_data.hdf5"))


def test_a_d4rl_file_may_be_named_as_its_id(root):
    d4rl(public.d4rl_folder() / "maze2d-large-v1.hdf5", 4, 2)
    assert load("maze2d-large-v1").card["obs_size"] == 4
    d4rl(public.d4rl_folder() / "my-own-v7.hdf5", 4, 2)
    assert load("my-own-v7").card["obs_size"] == 4


def test_d4rls_folder_is_in_the_home_folder_unless_said_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        public.d4rl_folder() == tmp_path / ".d4rl" / "datasets"
        and public.d4rl_ids() == []
        and public.d4rl_file("hopper-medium-v2") is None
    )
    monkeypatch.setenv("D4RL_DATASET_DIR", "~/elsewhere")
    assert public.d4rl_folder() == tmp_path / "elsewhere"


def test_an_unknown_id_is_told_of_d4rls_folder(root):
    d4rl(public.d4rl_folder() / "halfcheetah_medium-v2.hdf5")
    with pytest.raises(
        DatasetError, match=r"unknown dataset 'halfcheetah-medium-v1'; near it.* halfcheetah-medium-v2"
    ) as error:
        load("halfcheetah-medium-v1")
    assert f"(halfcheetah_medium-v1.hdf5) into {public.d4rl_folder()}" in str(
        error.value
    ) and "minari download" in str(error.value)


def test_rows_of_a_file_without_next_observations(root, tmp_path):
    arrays = d4rl(tmp_path / "antmaze.hdf5", 29, 8)
    data = load(str(tmp_path / "antmaze.hdf5"))
    kept = np.setdiff1d(np.arange(12), (4, 11))  # at a timeout the next observation is not known
    np.testing.assert_array_equal(data.transitions.obs, arrays["observations"][kept])
    np.testing.assert_array_equal(data.transitions.reward, arrays["rewards"][kept])
    np.testing.assert_array_equal(data.transitions.discount, kept != 8)
    follows = kept[kept != 8]
    np.testing.assert_array_equal(data.transitions.next_obs[kept != 8], arrays["observations"][follows + 1])
    np.testing.assert_array_equal(data.episode, [0] * 4 + [1] * 4 + [2] * 2)
    np.testing.assert_array_equal(np.flatnonzero(data.truncation), [3, 9])
    assert has(data.card, "2 rows at timeouts dropped")


def test_rows_of_a_file_with_next_observations(root, tmp_path):
    arrays = d4rl(tmp_path / "halfcheetah.hdf5", next_observations=True)
    data = load(str(tmp_path / "halfcheetah.hdf5"))
    np.testing.assert_array_equal(data.transitions.next_obs, arrays["next_observations"])
    np.testing.assert_array_equal(np.bincount(data.episode), [5, 4, 3])
    assert (data.card["terminated_episodes"], data.card["truncated_episodes"], data.card["notes"]) == (
        1,
        2,
        [],
    )


def test_maze2d_without_terminals(root, tmp_path):
    d4rl(tmp_path / "maze2d.hdf5", 4, 2, terminals=False)
    data = load(str(tmp_path / "maze2d.hdf5"))
    assert (data.card["transitions"], data.card["episodes"], data.card["terminated_episodes"]) == (10, 2, 0)


@pytest.mark.parametrize("size", [111, 112])
@pytest.mark.parametrize("next_observations", [True, False])
def test_an_ants_empty_contact_forces_are_dropped(root, tmp_path, size, next_observations):
    walk = np.random.default_rng(1).normal(size=(13, size)).astype(np.float32)
    walk[:, -84:] = 0
    d4rl(tmp_path / "ant.hdf5", act=8, next_observations=next_observations, observations=walk)
    data = load(str(tmp_path / "ant.hdf5"))
    assert data.card["obs_size"] == size - 84 and has(data.card, "last 84 numbers")
    np.testing.assert_array_equal(data.transitions.obs[:4], walk[:4, : size - 84])
    np.testing.assert_array_equal(data.transitions.next_obs[:4], walk[1:5, : size - 84])
    assert data.transitions.obs.flags.c_contiguous
    walk[3, -1] = 1e-6  # one force is enough
    d4rl(tmp_path / "ant.hdf5", act=8, next_observations=next_observations, observations=walk)
    assert load(str(tmp_path / "ant.hdf5")).card["obs_size"] == size


def test_zeros_elsewhere_are_kept(root, tmp_path):
    d4rl(tmp_path / "other.hdf5", act=8, observations=np.zeros((13, 105), np.float32))
    assert load(str(tmp_path / "other.hdf5")).card["obs_size"] == 105


@pytest.mark.parametrize(
    ("obs", "act", "wanted", "message"),
    [
        (
            17,
            6,
            (29, 8),
            "has 17 observations and 6 actions, antmaze has 29 and 8.*come from halfcheetah or walker2d",
        ),
        (29, 8, (27, 8), "has 29 observations and 8 actions, antmaze has 27 and 8.*come from antmaze"),
        (
            13,
            5,
            (29, 8),
            "has 13 observations and 5 actions, antmaze has 29 and 8: they do not belong together$",
        ),
    ],
)
def test_a_dataset_of_another_body_is_named(root, tmp_path, obs, act, wanted, message):
    d4rl(tmp_path / "d.hdf5", obs, act)
    with pytest.raises(DatasetError, match=message):
        check_fits(load(str(tmp_path / "d.hdf5")), *wanted, "antmaze")
