"""Every format of dataset gives the same validated rows, and what is wrong with one is named by file, episode
and step."""

import fcntl
import json
import os
import pathlib
import sys

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

from ooo_rl.data.buffer import Transition
from ooo_rl.data.datasets import validate, write
from ooo_rl.data.datasets.card import print_card
from ooo_rl.data.errors import DatasetError
from ooo_rl.data.figures.paths import crossings
from ooo_rl.data.recipes import library
from ooo_rl.data.recipes.library import load
from ooo_rl.envs.point_mass_wall import PointMassWall

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
    arrays = {
        "observations": joined(parts, "observations", -1),
        "actions": joined(parts, "actions"),
        "rewards": joined(parts, "rewards"),
    }
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
    assert (
        data.card["terminated_episodes"] == ended.sum()
        and data.card["truncated_episodes"] == data.truncation.sum()
    )
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


@pytest.mark.parametrize("extra", [1, 0])
def test_whole_episodes_with_their_next_observations(tmp_path, extra):
    """They are used; `episode_lengths` says where episodes end. Of another length, they are left alone."""
    parts = episodes()
    obs = joined(parts, "observations", None if extra else -1)
    arrays = flat(parts, True) | {"observations": obs, "episode_lengths": np.int32(LENGTHS)}
    data = load(save(tmp_path / "d.npz", arrays))
    expect(data, parts)
    assert data.card["notes"] == []
    data = load(save(tmp_path / "d.hdf5", arrays | {"next_observations": np.zeros((7, 3))}))
    expect(data, parts, last_rows=bool(extra))
    assert "not used: next_observations" in data.card["notes"]


def test_minari(root):
    parts = episodes()
    write.write_minari("ooo/test/some-v0", parts, description="some", recipe={"seed": 1})
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
            id=i, observations={"goal": p["observations"][:, :1], "body": {"pos": p["observations"][:, 1:]}},
            actions=p["actions"], rewards=list(p["rewards"]), terminations=list(p["terminations"]),
            truncations=list(p["truncations"]), infos={"i": np.arange(len(p["observations"]))},
        )
        for i, p in enumerate(parts)
    ]  # fmt: skip
    space = gymnasium.spaces.Dict({"goal": box(1), "body": gymnasium.spaces.Dict({"pos": box(2)})})
    minari.create_dataset_from_buffers(
        "dict-v0", buffers, observation_space=space, action_space=gymnasium.spaces.Box(-1, 1, (2,))
    )
    for part in parts:
        part["observations"] = np.roll(part["observations"], -1, axis=1)  # body before goal
    data = load("dict-v0")
    expect(data, parts)
    assert any("body, goal" in note for note in data.card["notes"])


def test_ours_are_made_on_first_use(root):
    data = load("ooo/point-mass-wall/over-v0")
    assert (
        (root / "ooo/point-mass-wall/over-v0").is_dir()
        and data.card["episodes"] == 100
        and "way-points" in data.card["recipe"]
    )
    rows, layout = data.transitions, PointMassWall().layout
    starts = np.flatnonzero(np.diff(data.episode, prepend=-1))
    paths = [
        np.vstack([rows.obs[a:b], rows.next_obs[b - 1]]) for a, b in zip(starts, [*starts[1:], len(rows.obs)])
    ]
    assert crossings(paths, layout) == {"under": 0, "over": 1, "none": 0}
    assert all(np.linalg.norm(path[-1] - layout["goal"]) < layout["goal_radius"] for path in paths)
    assert (rows.discount == 0).sum() == 100 and np.abs(rows.action).max() < 1
    before = data.card
    assert load("ooo/point-mass-wall/over-v0").card == before


def test_generating_is_seeded(root):
    for name, seed in (("a-v0", 3), ("b-v0", 3), ("c-v0", 4)):
        library.make("ooo/point-mass-wall/over-v0", name, transitions=150, seed=seed)
    a, b, c = (load(name).card["sha256"] for name in ("a-v0", "b-v0", "c-v0"))
    assert a == b != c


@pytest.mark.skipif(not DOOR.is_file(), reason="the human door demonstrations are not on this machine")
def test_the_real_door_demonstrations():
    data = load(str(DOOR))
    assert (data.card["episodes"], data.card["transitions"]) == (25, 6729)
    assert (data.card["obs_size"], data.card["action_size"]) == (39, 28)
    assert data.card["return_mean"] == pytest.approx(795.95, abs=0.01)
    assert data.card["normalized_score"] is None  # a file name says nothing of the task
    assert data.card["terminated_episodes"] == 0 and data.card["truncated_episodes"] == 25


# --- names of arrays, and ends of episodes ---


def on_a_line(episodes=10, steps=20):
    """Episodes that each go from 0 up to `steps` - 1, without ends; and the flags of last rows."""
    t = np.tile(np.arange(float(steps)), episodes)
    arrays = {"observations": t[:, None], "actions": np.zeros((len(t), 1)), "rewards": np.ones(len(t))}
    return arrays, t == steps - 1


LAST, NEXT, MASKS = object(), object(), object()
ENDS = [  # further arrays; terminations; truncations; rows; a word of the notes
    ({"terminals": LAST}, 10, 0, 200, "marks no time limits"),
    ({"terminals": 0, "timeouts": LAST}, 0, 10, 190, "dropped"),
    ({"terminations": LAST, "truncations": 0}, 10, 0, 200, "terminations as terminals"),
    ({"terminated": 0, "truncated": LAST}, 0, 10, 190, "truncated as timeouts"),
    ({"is_terminal": LAST}, 10, 0, 200, "is_terminal as terminals"),
    ({"dones": LAST}, 10, 0, 200, "dones read as terminations"),
    ({"done": LAST}, 10, 0, 200, "done read as terminations"),
    ({"dones": LAST, "timeouts": 0}, 10, 0, 200, "dones without a truncation"),
    ({"dones": LAST, "timeouts": LAST}, 0, 10, 190, "dones without a truncation"),
    ({"dones": LAST, "terminals": 0}, 0, 10, 190, "dones without a termination"),
    ({"dones": LAST, "terminals": LAST, "timeouts": 0}, 10, 0, 200, "dones not used"),
    ({"dones": LAST, "next_obs": NEXT}, 10, 0, 200, "next_obs as next_observations"),
    ({"terminals": 0, "next_observations": NEXT}, 0, 10, 200, "(9 times)"),
    ({"next_observations": NEXT}, 0, 10, 200, "no terminations in the file"),
    ({"masks": MASKS}, 10, 0, 200, "masks read as terminations where it is 0"),
    ({"masks": MASKS, "terminals": LAST}, 10, 0, 200, "masks read as terminations where it is 0"),
    ({"masks": MASKS, "dones_float": LAST, "next_observations": NEXT}, 10, 0, 200, "dones_float as dones"),
    (
        {"masks": 1, "dones_float": LAST, "next_observations": NEXT},
        0,
        10,
        200,
        "dones_float without a termin",
    ),
    ({"masks": 1, "dones_float": LAST}, 0, 10, 190, "dropped"),
    ({"masks": 1, "timeouts": LAST}, 0, 10, 190, "dropped"),
    ({"is_last": LAST}, 0, 10, 190, "RLDS"),
    ({"is_last": LAST, "is_terminal": LAST}, 10, 0, 190, "RLDS"),
    ({"is_last": LAST, "terminals": 0, "next_observations": NEXT}, 0, 10, 200, "not used: more"),
]


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
@pytest.mark.parametrize(("more", "terminated", "truncated", "rows", "note"), ENDS)
def test_ends_of_episodes_under_many_names(tmp_path, suffix, more, terminated, truncated, rows, note):
    arrays, last = on_a_line()
    for key, value in more.items():
        named = {LAST: last, NEXT: arrays["observations"] + 1, MASKS: 1.0 - last}
        arrays[key] = named[value] if value in named else np.full(len(last), value, float)
    data = load(save(tmp_path / f"d{suffix}", arrays | {"more": np.zeros(3)}))
    got = data.transitions
    assert (got.next_obs >= got.obs).all()  # no row leads across a reset
    assert (data.card["terminated_episodes"], data.card["truncated_episodes"]) == (terminated, truncated)
    assert (len(got.reward), data.card["episodes"], data.card["ordered"]) == (rows, 10, True)
    assert any(note in text for text in data.card["notes"]) and "not used: more" in data.card["notes"]
    if "is_last" in more and "next_observations" not in more:
        np.testing.assert_array_equal(got.next_obs, got.obs + 1)  # the last rows are observations alone
        np.testing.assert_array_equal(got.discount == 0, (terminated > 0) & (got.obs[:, 0] == 18))


@pytest.mark.parametrize("more", [{}, {"terminals": 0}, {"dones": 0, "timeouts": 0}, {"is_last": 0}])
def test_a_file_that_marks_no_end_is_refused(tmp_path, more):
    arrays, last = on_a_line()
    path = save(tmp_path / "d.npz", arrays | dict.fromkeys(more, 0 * last))
    fault = "no row is marked in" if more else "no array marks ends"
    with pytest.raises(DatasetError, match=f"{fault}.*timeouts.*next_observations; found actions"):
        load(path)


def test_arrays_under_other_names(tmp_path):
    parts = episodes()
    names = {"observations": "obs", "actions": "action", "rewards": "reward", "next_observations": "next_obs"}
    data = load(save(tmp_path / "d.npz", {names.get(k, k): v for k, v in flat(parts, True).items()}))
    expect(data, parts)
    assert data.card["notes"][0].startswith("read obs as observations, action as actions")


def test_two_names_of_the_same_flags_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="terminals and terminated are names of the same flags"):
        load(save(tmp_path / "d.npz", flat(episodes(), True) | {"terminated": np.zeros(12)}))


def test_terminals_and_masks_that_disagree_are_refused(tmp_path):
    arrays, last = on_a_line()
    path = save(tmp_path / "d.npz", arrays | {"terminals": last, "masks": np.ones(200)})
    with pytest.raises(DatasetError, match=r"d\.npz: terminals and masks disagree \(row 19\).*name it dones"):
        load(path)


@pytest.mark.parametrize("value", [0.99, np.nan, 2])
def test_masks_are_0_or_1(tmp_path, value):
    arrays, last = on_a_line()
    arrays["masks"] = np.where(np.arange(200) == 7, value, 1.0 - last)
    with pytest.raises(DatasetError, match=r"d\.npz: masks \(0 where the task ended, else 1\) holds .*row 7"):
        load(save(tmp_path / "d.npz", arrays))
    load(save(tmp_path / "e.npz", on_a_line()[0] | {"terminals": last, "discounts": np.full(200, value)}))


def test_rows_in_no_order(tmp_path):
    """As a replay buffer holds them, or D4RL's qlearning_dataset, which has dropped rows at timeouts."""
    arrays = flat(episodes(), True)
    order = np.random.default_rng(0).permutation(12)
    del arrays["timeouts"]
    data = load(save(tmp_path / "hopper-medium-v2.npz", {key: value[order] for key, value in arrays.items()}))
    np.testing.assert_array_equal(data.transitions.next_obs, arrays["next_observations"][order])
    assert not data.card["ordered"] and "in no order" in data.card["notes"][0]
    assert data.card["normalized_score"] is None
    kept = np.delete(np.arange(12), (6, 11))
    data = load(save(tmp_path / "q.npz", {key: value[kept] for key, value in arrays.items()}))
    assert data.card["ordered"] and np.bincount(data.episode).tolist() == [4, 2, 4]
    assert "no time limits; an episode ends where" in data.card["notes"][0]


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("shuffled", [True, False])
def test_order_is_judged_by_the_rows_that_could_go_on(tmp_path, steps, shuffled):
    """Of short episodes, half of the rows or more are ends, and these follow no other row in any order."""
    parts = episodes((1, steps) * 100, (True,) * 200)
    arrays = flat(parts, True)
    del arrays["timeouts"]
    n = len(arrays["rewards"])
    order = np.random.default_rng(0).permutation(n) if shuffled else np.arange(n)
    arrays = {key: value[order] for key, value in arrays.items()}
    card = load(save(tmp_path / "hopper-medium-v2.hdf5", arrays)).card
    assert card["ordered"] == (not shuffled) and (card["normalized_score"] is None) == shuffled
    if shuffled:
        with pytest.raises(
            DatasetError, match="if the rows are in no order, leave out what marks time limits"
        ):
            load(save(tmp_path / "d.npz", arrays | {"timeouts": np.zeros(n)}))


@pytest.mark.parametrize(
    "kinds", [(np.float64, np.float32), (np.float32, np.float64), (np.float64, np.float64)]
)
def test_observations_may_have_been_rounded_once(tmp_path, kinds):
    """A walk of one episode, whose numbers one of two arrays has as float32."""
    walk = 100 + np.random.default_rng(0).normal(size=(201, 3)).cumsum(axis=0)
    arrays = {"observations": walk[:-1].astype(kinds[0]), "next_observations": walk[1:].astype(kinds[1])}
    zeros = {"actions": np.zeros((200, 2)), "rewards": np.zeros(200), "terminals": np.zeros(200, bool)}
    for more in ({}, {"timeouts": np.arange(200) == 199}):
        data = load(save(tmp_path / "d.npz", arrays | zeros | more))
        assert data.card["ordered"] and data.card["episodes"] == 1


def test_the_card_tells_where_episodes_are_cut(tmp_path):
    def card(name, cut):
        arrays = flat(episodes((6, 6), (False, False)), True)
        return load(save(tmp_path / name, arrays | {"timeouts": np.isin(np.arange(12), cut)})).card

    one, two = card("one.npz", (5, 11)), card("two.npz", (2, 5, 11))
    assert one["sha256"] == two["sha256"] and one["sha256_of_ends"] != two["sha256_of_ends"]


def test_a_card_is_printed_with_its_brackets(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "data[old]").mkdir()
    arrays = flat(episodes(), True) | {"[/red]": np.zeros(12), "[bold]": np.zeros(12)}
    print_card(load(save(tmp_path / "data[old]" / "d.npz", arrays)).card)
    shown = capsys.readouterr().out
    assert shown.count("data[old]/d.npz") == 2 and "not used: [/red], [bold]" in shown


@pytest.mark.parametrize("key", ["terminals", "timeouts"])
@pytest.mark.parametrize("value", [np.nan, 2, -1, 0.5])
def test_flags_are_0_or_1(tmp_path, key, value):
    arrays = flat(episodes(), True)
    arrays[key] = arrays[key].astype(float)
    expect(load(save(tmp_path / "d.npz", arrays)), episodes())
    arrays[key][5] = value
    with pytest.raises(DatasetError, match=rf"{key} holds {value}.*\(row 5\); a flag is"):
        load(save(tmp_path / "d.npz", arrays))
    for text in (arrays[key].astype(str), arrays[key].astype("S")):
        with pytest.raises(DatasetError, match=f"{key} holds text, not numbers"):
            load(save(tmp_path / "d.npz", arrays | {key: text}))


# --- actions ---


def write_box(name, actions, space):
    """A Minari dataset of one episode with these actions, from this action space."""
    n = len(next(iter(actions.values())) if isinstance(actions, dict) else actions)
    buffer = EpisodeBuffer(
        id=0, observations=np.zeros((n + 1, 3), np.float32), actions=actions, rewards=[0.0] * n,
        terminations=[False] * n, truncations=[False] * (n - 1) + [True],
    )  # fmt: skip
    spaces = {"observation_space": gymnasium.spaces.Box(-9, 9, (3,)), "action_space": space}
    minari.create_dataset_from_buffers(name, [buffer], **spaces)


BOXES = [  # the box of a file; actions there; the same in [-1, 1]; action_low and action_high of the card
    (-0.4, 0.4, [[0.4, -0.4], [0.2, 0]], [[1, -1], [0.5, 0]], -0.4, 0.4),
    (0, 2, [[2, 0], [1, 0.5]], [[1, -1], [0, -0.5]], 0, 2),
    ([-1, -2], [1, 4], [[1, 4], [0.5, 1]], [[1, 1], [0.5, 0]], [-1, -2], [1, 4]),
    (-1, 1, [[1, -1], [0.5, 0]], [[1, -1], [0.5, 0]], -1, 1),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("low", "high", "stored", "wanted", "card_low", "card_high"), BOXES)
def test_actions_are_rescaled_from_the_box_of_the_file(root, low, high, stored, wanted, card_low, card_high):
    bounds = (np.broadcast_to(np.float32(x), 2) for x in (low, high))
    write_box("box-v0", np.float32(stored), gymnasium.spaces.Box(*bounds))
    data = load("box-v0", clip_actions=1)
    np.testing.assert_allclose(data.transitions.action, wanted, atol=1e-6)
    assert data.card["action_low"] == pytest.approx(card_low)
    assert data.card["action_high"] == pytest.approx(card_high)
    rescaled = [note for note in data.card["notes"] if "rescaled from" in note]
    assert len(rescaled) == ((low, high) != (-1, 1))
    json.dumps(data.card)
    # What is exported again is in [-1, 1], and is not rescaled again.
    whole = {"observations": np.zeros((3, 3)), "actions": data.transitions.action, "rewards": np.zeros(2)}
    flags = {"terminations": np.zeros(2), "truncations": np.array([0, 1])}
    write.write_minari("again-v0", [whole | flags], description="")
    np.testing.assert_array_equal(
        load("again-v0", clip_actions=1).transitions.action, data.transitions.action
    )


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_actions_are_rescaled_from_a_given_box(tmp_path, suffix):
    arrays = flat(episodes(), True)
    before = arrays["actions"].copy()
    arrays["actions"] *= 2.5
    path = save(tmp_path / f"d{suffix}", arrays)
    with pytest.raises(DatasetError, match=r"outside.*--action-low and --action-high"):
        load(path)
    data = load(path, action_box=(-2.5, 2.5))
    np.testing.assert_allclose(data.transitions.action, before, atol=1e-6)
    assert (data.card["action_low"], data.card["action_high"]) == (-2.5, 2.5)
    assert data.card["notes"] == ["actions rescaled from [-2.5, 2.5] to [-1, 1]"]
    with pytest.raises(DatasetError, match=r"outside \[-1, 1\], to which \[-2, 2\] was rescaled"):
        load(path, action_box=(-2, 2))
    for box in ((1, -1), (0, np.inf), (2, 2), (np.nan, 1)):
        with pytest.raises(DatasetError, match="--action-low"):
            load(path, action_box=box)


def test_no_box_leaves_actions_as_they_are(tmp_path):
    arrays = flat(episodes(), True)
    arrays["actions"] *= 0.1  # from a small box or timid: nobody knows
    for box in (None, (0, 0)):
        data = load(save(tmp_path / "d.npz", arrays), action_box=box)
        np.testing.assert_array_equal(data.transitions.action, arrays["actions"])
        assert data.card["action_low"] is data.card["action_high"] is None and data.card["notes"] == []
        assert -0.1 <= data.card["action_range"][0] < data.card["action_range"][1] <= 0.1


@pytest.mark.parametrize("shape", [(12,), (12, 1)])
@pytest.mark.parametrize("values", [np.arange(12) % 2 == 1, (np.arange(12) % 3) * 1.0])
def test_discrete_actions_that_are_no_integers_are_refused(tmp_path, shape, values):
    arrays = flat(episodes(), True) | {"actions": values.reshape(shape)}
    with pytest.raises(DatasetError, match=r"look like discrete actions.*store them as integers"):
        load(save(tmp_path / "d.npz", arrays))


@pytest.mark.parametrize("shape", [(12,), (12, 1)])
@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_integers_in_one_column_are_discrete_actions(tmp_path, shape, kind):
    values = np.arange(12) % 3
    arrays = flat(episodes(), True) | {"actions": values.astype(kind).reshape(shape)}
    path = save(tmp_path / "d.npz", arrays)
    data = load(path)
    assert data.discrete and data.transitions.action.dtype == np.int32
    np.testing.assert_array_equal(data.transitions.action, values)
    assert data.card["discrete"] and data.card["action_size"] == 3
    continuous = load(path, action_box=(0, 2))  # as the user says
    assert continuous.card["discrete"] is None
    np.testing.assert_allclose(continuous.transitions.action[:3], [[-1], [0], [1]], atol=1e-4)
    for more in (3, 4):  # the data may lack some of an environment's actions
        validate.check_fits(data, 3, more, "toy", discrete=True)
    for wrong in ((3, 2, True), (2, 3, True), (3, 3, False)):
        with pytest.raises(DatasetError, match="do not belong together"):
            validate.check_fits(data, *wrong[:2], "toy", discrete=wrong[2])


@pytest.mark.parametrize("low", [-1, -(2**40)])
def test_a_discrete_action_below_0_is_refused(tmp_path, low):
    values = np.where(np.arange(12) == 5, low, np.arange(12) % 3)
    arrays = flat(episodes(), True) | {"actions": values}
    with pytest.raises(DatasetError, match=rf"episode 1, step 1 .*the action is {low}.*from 0 to 2"):
        load(save(tmp_path / "d.npz", arrays))


def test_continuous_actions_that_look_whole_are_kept(tmp_path):
    for values in (np.zeros(12), np.ones(12) * -1, np.arange(12) % 2 * 2 - 1.0, np.arange(12) / 12):
        arrays = flat(episodes(), True) | {"actions": values[:, None]}
        load(save(tmp_path / "d.npz", arrays))
    arrays = flat(episodes(), True) | {"actions": np.arange(12.0)[:, None] % 3}
    assert load(save(tmp_path / "d.npz", arrays), action_box=(0, 2)).card["action_range"] == [-1, 1]


SPACES = [  # an action space; actions of it; what is said
    (gymnasium.spaces.Discrete(2), np.arange(3), "the action is 2; discrete actions .* from 0 to 1"),
    (gymnasium.spaces.Discrete(4), np.arange(3.0), "Discrete, but its actions are float64"),
    (gymnasium.spaces.MultiDiscrete([2, 2]), np.ones((3, 2), int), "action space is MultiDiscrete"),
    (
        gymnasium.spaces.Dict({"a": gymnasium.spaces.Box(-1, 1, (2,))}),
        {"a": np.zeros((3, 2), np.float32)},
        "action space is Dict",
    ),
    (gymnasium.spaces.Box(-1, 1, (2, 2)), np.zeros((3, 2, 2), np.float32), "bounds of the shapes"),
    (gymnasium.spaces.Box(np.float32([0, 1]), np.float32([0, 2])), np.ones((3, 2), np.float32), "no room"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("space", "actions", "message"), SPACES)
def test_other_action_spaces_are_refused(root, space, actions, message):
    write_box("other-v0", actions, space)
    with pytest.raises(DatasetError, match=message):
        load("other-v0")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_discrete_actions_of_minari_begin_at_0(root):
    write_box("chosen-v0", np.array([2, 3, 5]), gymnasium.spaces.Discrete(4, start=2))
    data = load("chosen-v0")
    assert data.transitions.action.tolist() == [0, 1, 3] and data.card["action_size"] == 4


def test_discrete_actions_are_written_and_read_again(root):
    parts = episodes()
    for i, part in enumerate(parts):
        part["actions"] = (np.arange(len(part["rewards"])) + i) % 4
    write.write_minari("chosen-v0", parts, description="", choices=5)
    data = load("chosen-v0")
    np.testing.assert_array_equal(data.transitions.action, joined(parts, "actions"))
    assert data.discrete and data.card["action_size"] == 5


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_action_space_without_bounds(root):
    write_box("free-v0", np.float32([[0.5], [0.2]]), gymnasium.spaces.Box(-np.inf, np.inf, (1,)))
    data = load("free-v0")
    assert data.card["action_low"] is None and "no finite bounds" in data.card["notes"][0]
    np.testing.assert_array_equal(data.transitions.action, np.float32([[0.5], [0.2]]))
    np.testing.assert_allclose(load("free-v0", action_box=(-0.5, 0.5)).transitions.action, [[1], [0.4]], 1e-4)


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
    "infinite": (
        broken(observations=put((7, 1), np.inf), next_observations=put((6, 1), np.inf)),
        r"episode 1, step 2 .*next_obs|row 7",
    ),
    "action": (
        broken(actions=put((4, 1), 1.5)),
        r"episode 1, step 0 \(row 4\): an action lies outside.*by up to 0\.5.*--clip-actions",
    ),
    "gap": (broken(next_observations=put(1, 9)), r"episode 0, step 1 \(row 1\): next_obs differs"),
    "text": (broken(rewards=lambda x: x.astype(str)), "rewards holds .*not numbers"),
    "rows": (broken(actions=lambda x: x[:-1]), "actions has 11 rows, rewards 12"),
    "flags": (broken(terminals=lambda x: x[:-1]), "terminals has 11 rows, rewards 12"),
    "flat": (
        broken(observations=lambda x: x[:, 0], next_observations=lambda x: x[:, 0]),
        r"observations has shape \(12,\); expected 12 rows and 2 dimensions$",
    ),
    "width": (broken(next_observations=lambda x: x[:, :2]), "observations are .*next observations"),
    "short": (broken(next_observations=lambda x: x[:-2]), "next_observations has 10 rows, rewards 12"),
    "long": (
        broken(next_observations=lambda x: np.append(x, x, axis=0)),
        "next_observations has 24 rows, rewards 12",
    ),
    "scalar": (broken(rewards=lambda x: x[0]), "rewards is a single number"),
    "overflow": (
        broken(rewards=lambda x: put(5, 1e39)(x.astype(float))),
        r"step 1 \(row 5\): reward is not finite in float32",
    ),
    "complex": (broken(actions=lambda x: x + 1j), "actions holds complex numbers, not numbers"),
    "no columns": (broken(actions=lambda x: x[:, :0]), r"actions has shape \(12, 0\), so its rows are empty"),
    "empty": (lambda arrays: {key: value[:0] for key, value in arrays.items()}, "no transitions"),
    "missing": (
        lambda arrays: {k: v for k, v in arrays.items() if k != "rewards"},
        "no array 'rewards'; found actions, next_obs",
    ),
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
    assert data.transitions.action[4, 1] == np.float32(validate.LIMIT) and data.transitions.action[
        5, 0
    ] == -np.float32(validate.LIMIT)
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
    [
        ((4, 3, 6), "add up to 13"),
        ((4, 8), "observations for 12 actions"),
        ((4, 8, 0), "episode 2 has the length 0"),
    ],
)
def test_episode_lengths_must_add_up(tmp_path, lengths, message):
    parts = episodes()
    with pytest.raises(DatasetError, match=message):
        load(
            save(
                tmp_path / "d.npz",
                flat(parts) | {"observations": joined(parts, "observations"), "episode_lengths": lengths},
            )
        )


def test_unknown_and_damaged_minari_datasets(root):
    write.write_minari("ooo/test/some-v0", episodes(), description="")
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
    validate.check_fits(data, 3, 2, "point-mass-wall")
    with pytest.raises(DatasetError, match="has 3 observations and 2 actions, point-mass-wall has 2 and 2"):
        validate.check_fits(data, 2, 2, "point-mass-wall")


# --- files and folders ---


@pytest.mark.parametrize("suffix", [".NPZ", ".HDF5", ".H5", ".Npz"])
def test_suffixes_in_capitals(tmp_path, suffix):
    path = save(tmp_path / f"d{suffix.lower()}", flat(episodes(), True))
    os.rename(path, tmp_path / f"d{suffix}")
    expect(load(str(tmp_path / f"d{suffix}")), episodes())


def test_paths_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINARI_DATASETS_PATH", "~/mine")
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "d.npz", flat(episodes(), True))
    expect(load("~/d.npz"), episodes())
    assert load("~/d.npz").card["source"] == str(tmp_path / "d.npz")
    write.write_minari("some-v0", episodes(), description="")
    expect(load("some-v0"), episodes())
    expect(load("~/mine/some-v0"), episodes())
    assert sorted(os.listdir(tmp_path)) == ["d.npz", "mine"]


def test_no_home_folder(tmp_path, monkeypatch):
    """A user without an entry in /etc/passwd."""

    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    write.write_minari("some-v0", episodes(), description="")
    expect(load("some-v0"), episodes())
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=r"unknown dataset 'some-v1'.* into ~/\.d4rl"):
        load("some-v1")
    with pytest.raises(DatasetError, match=r"no home folder.*set MINARI_DATASETS_PATH"):
        load("ooo/point-mass-wall/over-v0")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    save(tmp_path / "hopper_medium-v2.hdf5", flat(episodes(), True))
    expect(load("hopper-medium-v2"), episodes())


def test_a_file_that_another_program_writes(tmp_path):
    path = save(tmp_path / "d.hdf5", flat(episodes(), True))
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as HDF5 does for writing
        with pytest.raises(DatasetError, match=r"d\.hdf5: another program has it open"):
            load(path)
    expect(load(path), episodes())


def test_arrays_that_nobody_uses_are_not_read(tmp_path):
    arrays = flat(episodes(), True)
    path = save(tmp_path / "d.hdf5", arrays)
    with h5py.File(path, "a") as file:
        file.create_dataset("images", (2**40, 2**16), "u1", chunks=(1, 2**16))  # 64 petabytes, none on disk
        file["nowhere"] = h5py.SoftLink("/absent")
    data = load(path)
    expect(data, episodes())
    assert data.card["notes"] == ["not used: images"]
    expect(load(save(tmp_path / "d.npz", arrays | {"labels": np.array([{}, "a"], object)})), episodes())


def test_objects_and_other_files_are_refused(tmp_path):
    path = save(tmp_path / "d.npz", flat(episodes(), True) | {"rewards": np.array([None] * 12)})
    with pytest.raises(DatasetError, match=r"d\.npz: .*Python objects, not numbers"):
        load(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    os.rename(tmp_path / "array.npy", tmp_path / "array.npz")
    for name, content in (("empty.npz", b""), ("empty.h5", b""), ("text.npz", b"hello"), ("array.npz", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DatasetError, match=f"{name}: damaged or not a file of this type"):
            load(str(tmp_path / name))
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file.create_group("observations")
    message = "no array 'observations'; found groups: observations; the arrays must stand at the top level"
    with pytest.raises(DatasetError, match=message):
        load(str(tmp_path / "group.h5"))
    with h5py.File(tmp_path / "none.h5", "w"):
        pass
    with pytest.raises(DatasetError, match=r"no array 'observations'; found nothing$"):
        load(str(tmp_path / "none.h5"))


def test_arrays_in_groups_are_refused(tmp_path):
    """robomimic's layout has a group for each demonstration."""
    with h5py.File(tmp_path / "low_dim.hdf5", "w") as file:
        file["data/demo_0/obs/object"], file["data/demo_0/actions"] = np.zeros((9, 3)), np.zeros((9, 2))
        file["mask/train"] = np.zeros(1)
    message = "no array 'observations'; found groups: data, mask; the arrays must stand at the top level of the file"
    with pytest.raises(DatasetError, match=message):
        load(str(tmp_path / "low_dim.hdf5"))
    with h5py.File(tmp_path / "low_dim.hdf5", "a") as file:
        file["observations"] = np.zeros((9, 3))
    with pytest.raises(DatasetError, match="'actions'; found observations, and groups: data, mask; the"):
        load(str(tmp_path / "low_dim.hdf5"))


@pytest.mark.parametrize(("obs", "next_obs"), [("obs", None), ("observations", None), ("obs", "next_obs")])
def test_images_are_refused(tmp_path, obs, next_obs):
    """By the names that the file has. An image may be the next observation alone."""
    arrays, images = flat(episodes()), np.zeros((12, 8, 8, 3), np.uint8)
    arrays[obs] = arrays.pop("observations")
    arrays[next_obs or obs] = images
    said = rf"npz: {next_obs or obs} has the shape \(8, 8, 3\) in each row; an observation must be a vector: images"
    with pytest.raises(DatasetError, match=said):
        load(save(tmp_path / "images.npz", arrays))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_odd_minari_datasets(root):
    text = gymnasium.spaces.Dict(
        {"p": gymnasium.spaces.Box(-1, 1, (2,)), "mission": gymnasium.spaces.Text(9)}
    )
    buffer = EpisodeBuffer(
        id=0, observations={"p": np.zeros((4, 2), np.float32), "mission": ["open it"] * 4},
        actions=np.zeros((3, 2), np.float32), rewards=[0.0] * 3, terminations=[False] * 3,
        truncations=[False] * 3,
    )  # fmt: skip
    minari.create_dataset_from_buffers(
        "text-v0", [buffer], observation_space=text, action_space=gymnasium.spaces.Box(-1, 1, (2,))
    )
    with pytest.raises(DatasetError, match=r"episode_0/observations/mission holds text.*not numbers"):
        load("text-v0")
    write.write_minari("some-v0", episodes(), description="")
    metadata, file = (root / "some-v0/data" / name for name in ("metadata.json", "main_data.hdf5"))
    good = json.loads(metadata.read_text())
    with h5py.File(file, "a") as opened:
        opened["episode_1/rewards"][1] = np.inf
    with pytest.raises(DatasetError, match=r"episode 1, step 1 \(row 5\): reward is not finite"):
        load("some-v0")
    for change, message in (
        (lambda group: group.create_dataset("terminations", data=np.full(3, 7)), "terminations holds 7"),
        (lambda group: None, "episode_1 has no 'terminations'; found actions"),
    ):
        with h5py.File(file, "a") as opened:
            del opened["episode_1/terminations"]
            change(opened["episode_1"])
        with pytest.raises(DatasetError, match=message):
            load("some-v0")
    with h5py.File(file, "w"):
        pass
    with pytest.raises(DatasetError, match="no episodes"):
        load("some-v0")
    metadata.unlink()
    with pytest.raises(DatasetError, match=r"has no metadata\.json, which says what its actions are"):
        load("some-v0")
    file.unlink()
    metadata.write_text(json.dumps(good))
    with pytest.raises(DatasetError, match=r"main_data\.hdf5: there is no such file"):
        load("some-v0")
    metadata.write_text(json.dumps(good | {"data_format": "arrow"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(DatasetError, match=r"format arrow.*pip install minari\[arrow\]"):
            load("some-v0")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
def test_minaris_formats_of_many_files(root, data_format):
    pytest.importorskip("pyarrow")
    parts = episodes()
    buffers = [
        EpisodeBuffer(
            id=i, **{k: list(v) if v.ndim == 1 else v for k, v in part.items()},
            infos={"step": np.arange(len(part["observations"]))},
        )
        for i, part in enumerate(parts)
    ]  # fmt: skip
    spaces = {
        "observation_space": gymnasium.spaces.Box(-9, 9, (3,)),
        "action_space": gymnasium.spaces.Box(-1, 1, (2,)),
    }
    minari.create_dataset_from_buffers("many-v0", buffers, data_format=data_format, **spaces)
    expect(load("many-v0"), parts)
    expect(load(str(root / "many-v0")), parts)


# --- writing ---


def test_an_existing_id_is_refused_and_left_alone(root):
    write.write_minari("ooo/test/some-v0", episodes(), description="")
    before = load("ooo/test/some-v0").card
    with pytest.raises(DatasetError, match="exists already"):
        write.write_minari("ooo/test/some-v0", episodes(seed=1), description="")
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
        write.write_minari("ooo/test/some-v0", episodes(), description="")
    monkeypatch.undo()
    os.environ["MINARI_DATASETS_PATH"], before = str(root), os.environ.get("MINARI_DATASETS_PATH")
    try:
        with pytest.raises(DatasetError, match="unknown dataset"):
            load("ooo/test/some-v0")
        assert not list(root.rglob("main_data.hdf5"))
        write.write_minari("ooo/test/some-v0", episodes(), description="")  # and it is not in the way
        expect(load("ooo/test/some-v0"), episodes())
    finally:
        os.environ.pop("MINARI_DATASETS_PATH") if before is None else os.environ.update(
            MINARI_DATASETS_PATH=before
        )


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
    write.export_experience("ooo/test/export-v0", rows, 2, 9, description="both")
    expect(load("ooo/test/export-v0"), own[0] + own[1])


def test_episodes_that_are_cut_where_the_next_one_begins_stay_apart(root):
    """A loop of four steps, played three times, which a horizon of 4 cuts at its start."""
    obs = np.float32(np.tile([0, 1, 2, 1], 3))[:, None]
    rows = Transition(obs, obs * 0, np.full(12, -1.0), np.roll(obs, -1, axis=0), np.ones(12))
    write.export_experience("ooo/test/loop-v0", rows, 1, 4)
    data = load("ooo/test/loop-v0")
    assert np.bincount(data.episode).tolist() == [4, 4, 4] and data.truncation.sum() == 3


def test_no_episode_is_no_dataset(root):
    with pytest.raises(DatasetError, match="there is no complete episode to write; ask for more transitions"):
        write.write_minari("ooo/test/none-v0", [], description="none")
