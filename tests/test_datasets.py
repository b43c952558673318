"""Every format of dataset gives the same validated rows, and what is wrong with one is named by file, episode and step."""

import json
import os
import pathlib

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

from data import coverage, datasets, generate
from data.buffer import Transition
from data.datasets import DatasetError, load
from envs.point_mass_wall import PointMassWall

DOOR = pathlib.Path(__file__).parents[2] / "shared/datasets/raw/dapg_door_human/door_human_replayed.npz"
LENGTHS, TERMINATED = (4, 3, 5), (True, False, False)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def episodes(lengths=LENGTHS, terminated=TERMINATED, obs=3, act=2, seed=0):
    """Random episodes as `write_minari` takes them."""
    rng = np.random.default_rng(seed)
    return [
        {
            "observations": rng.normal(size=(n + 1, obs)).astype(np.float32),
            "actions": rng.uniform(-0.9, 0.9, (n, act)).astype(np.float32),
            "rewards": rng.normal(size=n).astype(np.float32),
            "terminations": np.arange(n) == (n - 1 if ended else n),
            "truncations": np.arange(n) == (n if ended else n - 1),
        }
        for n, ended in zip(lengths, terminated)
    ]


def joined(parts, name, cut=None):
    return np.concatenate([part[name][:cut] for part in parts])


def flat(parts, next_observations=False):
    """D4RL's arrays of `parts`."""
    arrays = {"observations": joined(parts, "observations", -1), "actions": joined(parts, "actions"), "rewards": joined(parts, "rewards")}
    arrays |= {"terminals": joined(parts, "terminations"), "timeouts": joined(parts, "truncations")}
    if next_observations:
        arrays["next_observations"] = np.concatenate([part["observations"][1:] for part in parts])
    return arrays


def save(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, value in arrays.items():
                file[key] = value
            file.create_group("infos")["qpos"] = np.zeros(3)
    return str(path)


def expect(data, parts, last_rows=True):
    """`data` holds `parts`; without `last_rows`, all but the rows whose next observation was never stored."""
    rows = lambda p: len(p["rewards"]) - (not last_rows and not p["terminations"][-1])  # noqa: E731
    kept = [{k: v[: rows(p) + (k == "observations")] for k, v in p.items()} for p in parts]
    got, ended = data.transitions, joined(kept, "terminations")
    np.testing.assert_array_equal(got.obs, joined(kept, "observations", -1))
    np.testing.assert_array_equal(got.action, joined(kept, "actions"))
    np.testing.assert_array_equal(got.reward, joined(kept, "rewards"))
    np.testing.assert_array_equal(got.discount, 1 - ended)
    following = np.concatenate([p["observations"][1:] for p in kept])
    used = ~ended | last_rows
    np.testing.assert_array_equal(got.next_obs[used], following[used])
    lengths = [len(p["rewards"]) for p in kept]
    np.testing.assert_array_equal(data.episode, np.repeat(np.arange(len(kept)), lengths))
    last = np.append(np.diff(data.episode) > 0, True)
    np.testing.assert_array_equal(data.truncation, last & ~ended)
    assert all(x.dtype == np.float32 for x in (got.obs, got.action, got.reward, got.next_obs, got.discount))
    assert data.card["episodes"] == len(kept) and data.card["transitions"] == sum(lengths)
    assert data.card["terminated_episodes"] == ended.sum() and data.card["truncated_episodes"] == data.truncation.sum()
    json.dumps(data.card)


# --- formats ---


@pytest.mark.parametrize("suffix", [".npz", ".hdf5", ".h5"])
@pytest.mark.parametrize("with_next", [True, False])
def test_d4rl(tmp_path, suffix, with_next):
    parts = episodes()
    data = load(save(tmp_path / f"d{suffix}", flat(parts, with_next)))
    expect(data, parts, last_rows=with_next)
    assert bool(data.card["notes"]) == (not with_next)
    assert (with_next or "2 rows" in data.card["notes"][0]) and data.card["source"].endswith(suffix)


def test_d4rl_that_ends_in_the_middle_of_an_episode(tmp_path):
    parts = episodes()
    arrays = flat(parts)
    arrays["timeouts"][-1] = False
    expect(load(save(tmp_path / "d.npz", arrays)), parts, last_rows=False)
    arrays = flat(parts, True)
    arrays["timeouts"][-1] = False
    arrays["rewards"] = arrays["rewards"][:, None]
    expect(load(save(tmp_path / "d.hdf5", arrays)), parts)


@pytest.mark.parametrize("extra", [1, 0])
def test_whole_episodes(tmp_path, extra):
    parts = episodes()
    obs = joined(parts, "observations", None if extra else -1)
    arrays = flat(parts) | {"observations": obs, "episode_lengths": np.int32(LENGTHS)}
    del arrays["timeouts"]
    data = load(save(tmp_path / "d.npz", arrays))
    expect(data, parts, last_rows=bool(extra))
    assert bool(data.card["notes"]) == (not extra)


def test_minari(root):
    parts = episodes()
    datasets.write_minari("ooo/test/some-v0", parts, description="some", recipe={"seed": 1})
    data = load("ooo/test/some-v0")
    expect(data, parts)
    assert data.card["recipe"] == '{"seed": 1}' and data.card["normalized_score"] is None
    theirs = minari.load_dataset("ooo/test/some-v0")  # by Minari's own reader
    assert theirs.spec.dataset_id == "ooo/test/some-v0" and theirs.total_steps == sum(LENGTHS)
    np.testing.assert_array_equal(theirs[1].observations, parts[1]["observations"])
    assert sorted(p.name for p in (root / "ooo/test").iterdir() if p.is_dir()) == ["some-v0"]


def test_minari_with_dictionary_observations(root):
    parts, box = episodes(), lambda n: gymnasium.spaces.Box(-np.inf, np.inf, (n,), np.float32)
    buffers = [
        EpisodeBuffer(
            id=i, observations={"goal": p["observations"][:, :1], "body": {"pos": p["observations"][:, 1:]}}, actions=p["actions"],
            rewards=list(p["rewards"]), terminations=list(p["terminations"]), truncations=list(p["truncations"]),
            infos={"i": np.arange(len(p["observations"]))},
        )
        for i, p in enumerate(parts)
    ]  # fmt: skip
    space = gymnasium.spaces.Dict({"goal": box(1), "body": gymnasium.spaces.Dict({"pos": box(2)})})
    minari.create_dataset_from_buffers("dict-v0", buffers, observation_space=space, action_space=gymnasium.spaces.Box(-1, 1, (2,)))
    for part in parts:
        part["observations"] = np.roll(part["observations"], -1, axis=1)  # body before goal
    data = load("dict-v0")
    expect(data, parts)
    assert any("body, goal" in note for note in data.card["notes"])


def test_ours_are_made_on_first_use(root):
    data = load("ooo/point-mass-wall/over-v0")
    assert (root / "ooo/point-mass-wall/over-v0").is_dir() and data.card["episodes"] == 100 and "way-points" in data.card["recipe"]
    rows, layout = data.transitions, PointMassWall().layout
    starts = np.flatnonzero(np.diff(data.episode, prepend=-1))
    paths = [np.vstack([rows.obs[a:b], rows.next_obs[b - 1]]) for a, b in zip(starts, [*starts[1:], len(rows.obs)])]
    assert coverage.crossings(paths, layout) == {"under": 0, "over": 1, "none": 0}
    assert all(np.linalg.norm(path[-1] - layout["goal"]) < layout["goal_radius"] for path in paths)
    assert (rows.discount == 0).sum() == 100 and np.abs(rows.action).max() < 1
    before = data.card
    assert load("ooo/point-mass-wall/over-v0").card == before


def test_generating_is_seeded(root):
    for name, seed in (("a-v0", 3), ("b-v0", 3), ("c-v0", 4)):
        generate.make("ooo/point-mass-wall/over-v0", name, transitions=150, seed=seed)
    a, b, c = (load(name).card["sha256"] for name in ("a-v0", "b-v0", "c-v0"))
    assert a == b != c


@pytest.mark.skipif(not DOOR.is_file(), reason="the human door demonstrations are not on this machine")
def test_the_real_door_demonstrations():
    data = load(str(DOOR))
    assert (data.card["episodes"], data.card["transitions"]) == (25, 6729)
    assert (data.card["obs_size"], data.card["action_size"]) == (39, 28)
    assert data.card["return_mean"] == pytest.approx(795.95, abs=0.01)
    assert data.card["normalized_score"] == pytest.approx(29.02, abs=0.01)
    assert data.card["terminated_episodes"] == 0 and data.card["truncated_episodes"] == 25


# --- what is refused ---


def broken(**changes):
    return lambda arrays: {**arrays, **{key: change(arrays[key].copy()) for key, change in changes.items()}}


def put(row, value):
    def change(array):
        array[row] = value
        return array

    return change


BAD = {
    "nan": (broken(rewards=put(5, np.nan)), r"episode 1, step 1 \(row 5\): reward is not finite"),
    "infinite": (broken(observations=put((7, 1), np.inf), next_observations=put((6, 1), np.inf)), r"episode 1, step 2 .*next_obs|row 7"),
    "action": (broken(actions=put((4, 1), 1.5)), r"episode 1, step 0 \(row 4\): an action lies outside.*by up to 0\.5.*--clip-actions"),
    "gap": (broken(next_observations=put(1, 9)), r"episode 0, step 1 \(row 1\): next_obs differs"),
    "text": (broken(rewards=lambda x: x.astype(str)), "rewards holds .*not numbers"),
    "rows": (broken(actions=lambda x: x[:-1]), "actions has 11 rows, rewards 12"),
    "flags": (broken(terminals=lambda x: x[:-1]), "terminals has 11 rows, rewards 12"),
    "flat": (broken(observations=lambda x: x[:, 0], next_observations=lambda x: x[:, 0]), "obs has shape"),
    "width": (broken(next_observations=lambda x: x[:, :2]), "observations are .*next observations"),
    "empty": (lambda arrays: {key: value[:0] for key, value in arrays.items()}, "no transitions"),
    "missing": (lambda arrays: {k: v for k, v in arrays.items() if k != "rewards"}, "no array 'rewards'; found actions, next_obs"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_bad_rows_are_named(tmp_path, case, suffix):
    change, message = BAD[case]
    arrays = change(flat(episodes(), True))
    if suffix == ".hdf5" and case == "text":
        arrays["rewards"] = arrays["rewards"].astype("S")
    with pytest.raises(DatasetError, match=message) as error:
        load(save(tmp_path / f"bad{suffix}", arrays))
    assert f"bad{suffix}" in str(error.value)


def test_actions_are_clipped_only_where_asked(tmp_path):
    arrays = flat(episodes(), True)
    arrays["actions"][4, 1], arrays["actions"][5, 0] = 1.5, -1.0
    data = load(save(tmp_path / "d.npz", arrays), clip_out_of_range=True)
    assert data.transitions.action[4, 1] == np.float32(datasets.LIMIT) and data.transitions.action[5, 0] == -np.float32(datasets.LIMIT)
    assert "clipped" in data.card["notes"][0] and data.card["action_range"][1] == 1.5


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_truncated_and_absent_files(tmp_path, suffix):
    path = tmp_path / f"d{suffix}"
    save(path, flat(episodes(lengths=(900, 900, 900))))
    path.write_bytes(path.read_bytes()[:-5000])
    for name, message in ((path, "damaged"), (tmp_path / f"absent{suffix}", "no such file")):
        with pytest.raises(DatasetError, match=message) as error:
            load(str(name))
        assert name.name in str(error.value)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [((4, 3, 6), "add up to 13"), ((4, 8), "observations for 12 actions"), ((4, 8, 0), "episode 2 has the length 0")],
)
def test_episode_lengths_must_add_up(tmp_path, lengths, message):
    parts = episodes()
    with pytest.raises(DatasetError, match=message):
        load(save(tmp_path / "d.npz", flat(parts) | {"observations": joined(parts, "observations"), "episode_lengths": lengths}))


def test_unknown_and_damaged_minari_datasets(root):
    datasets.write_minari("ooo/test/some-v0", episodes(), description="")
    with pytest.raises(DatasetError, match=r"unknown dataset 'ooo/test/sme-v0'.*ooo/test/some-v0"):
        load("ooo/test/sme-v0")
    file = root / "ooo/test/some-v0/data/main_data.hdf5"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match="damaged"):
        load("ooo/test/some-v0")
    file.write_bytes(whole)
    (file.parent / "metadata.json").write_text("{")
    with pytest.raises(DatasetError, match="damaged"):
        load("ooo/test/some-v0")


def test_datasets_of_another_body_are_refused(tmp_path):
    data = load(save(tmp_path / "d.npz", flat(episodes(), True)))
    datasets.check_fits(data, 3, 2, "point-mass-wall")
    with pytest.raises(DatasetError, match="has 3 observations and 2 actions, point-mass-wall has 2 and 2"):
        datasets.check_fits(data, 2, 2, "point-mass-wall")


# --- writing ---


def test_an_existing_id_is_refused_and_left_alone(root):
    datasets.write_minari("ooo/test/some-v0", episodes(), description="")
    before = load("ooo/test/some-v0").card
    with pytest.raises(DatasetError, match="exists already"):
        datasets.write_minari("ooo/test/some-v0", episodes(seed=1), description="")
    assert load("ooo/test/some-v0").card == before


@pytest.mark.parametrize("where", ["minari.data_collector.EpisodeBuffer", "update_metadata", "rename"])
def test_a_failure_half_way_leaves_nothing_that_loads(root, monkeypatch, where):
    def fail(*args, **kwargs):
        raise OSError("no more")

    if where == "rename":
        monkeypatch.setattr(pathlib.Path, "rename", fail)
    elif where == "update_metadata":
        monkeypatch.setattr("minari.dataset.minari_storage.MinariStorage.update_metadata", fail)
    else:
        monkeypatch.setattr("minari.dataset._storages.hdf5_storage.HDF5Storage.update_episodes", fail)
    with pytest.raises(OSError, match="no more"):
        datasets.write_minari("ooo/test/some-v0", episodes(), description="")
    monkeypatch.undo()
    os.environ["MINARI_DATASETS_PATH"], before = str(root), os.environ.get("MINARI_DATASETS_PATH")
    try:
        with pytest.raises(DatasetError, match="unknown dataset"):
            load("ooo/test/some-v0")
        assert not list(root.rglob("main_data.hdf5"))
        datasets.write_minari("ooo/test/some-v0", episodes(), description="")  # and it is not in the way
        expect(load("ooo/test/some-v0"), episodes())
    finally:
        os.environ.pop("MINARI_DATASETS_PATH") if before is None else os.environ.update(MINARI_DATASETS_PATH=before)


def test_exported_experience_comes_back(root):
    """Rows of two environments that take turns, as a buffer holds them."""
    own = [episodes((4, 3, 2), (True, False, False), seed=1), episodes((5, 4), (False, True), seed=2)]
    fields = [
        np.stack(columns, axis=1).reshape(18, -1)
        for columns in zip(*(
            (joined(p, "observations", -1), joined(p, "actions"), joined(p, "rewards"),
             np.concatenate([e["observations"][1:] for e in p]), 1 - joined(p, "terminations"))
            for p in own
        ))
    ]  # fmt: skip
    rows = Transition(*(x[:, 0] if i in (2, 4) else x for i, x in enumerate(fields)))
    datasets.export_experience("ooo/test/export-v0", rows, 2, description="both")
    expect(load("ooo/test/export-v0"), own[0] + own[1])
