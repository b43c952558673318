"""Every damaged or odd file is refused with one line, or it loads as arrays that can be learnt from."""

import json
import shutil
import warnings
from collections import Counter

import h5py
import numpy as np
import pytest

from ooo_rl.data.datasets import read, write
from ooo_rl.data.errors import DatasetError

LENGTHS = (6, 4, 5)
KINDS = (
    *("flat.npz", "flat.hdf5", "whole.npz", "main_data.hdf5", "masks.npz"),
    *("antmaze-umaze-v0.hdf5", "maze2d-large-v1.hdf5"),  # D4RL's, of which rows are dropped
)
FILES = 150  # of each kind


def arrays_of(kind, rng):
    """The arrays of a small file of this kind."""
    n = sum(LENGTHS)
    last = np.isin(np.arange(n), np.cumsum(LENGTHS) - 1)
    terminal = last & (np.arange(n) < LENGTHS[0])
    obs = rng.normal(size=(n + len(LENGTHS), 3)).astype(np.float32)
    starts = np.cumsum([0, *LENGTHS[:-1]]) + np.arange(len(LENGTHS))
    row = np.concatenate([np.arange(a, a + k) for a, k in zip(starts, LENGTHS)])
    arrays = {
        "observations": obs[row],
        "actions": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        "rewards": rng.normal(size=n),
        "terminals": terminal,
    }
    if kind == "whole.npz":
        arrays |= {"observations": obs, "episode_lengths": np.int32(LENGTHS)}
        return arrays | {"next_observations": obs[row + 1]} if rng.random() < 0.5 else arrays
    if kind == "masks.npz":
        arrays["masks"], arrays["dones_float"] = 1.0 - arrays.pop("terminals"), 1.0 * last
        return arrays | {"next_observations": obs[row + 1]}
    arrays["timeouts"] = last & ~terminal
    if rng.random() < 0.5:
        arrays["next_observations"] = obs[row + 1]
    return arrays


def _set(array, rng, value):
    with np.errstate(all="ignore"):
        array = np.array(array, float)
    array[rng.random(array.shape) < 0.1] = value
    return array


MUTATIONS = {  # each gives another array, or None for no array
    "drop": lambda array, rng: None,
    "shorten": lambda array, rng: array[: rng.integers(len(array))] if array.ndim else array,
    "lengthen": lambda array, rng: np.concatenate([array, array]) if array.ndim else array,
    "transpose": lambda array, rng: array.T,
    "deepen": lambda array, rng: array[..., None],
    "flatten": lambda array, rng: array.reshape(-1),
    "no columns": lambda array, rng: array.reshape(len(array), -1)[:, :0] if array.ndim else array,
    "text": lambda array, rng: array.astype("S"),
    "objects": lambda array, rng: array.astype(object),
    "complex": lambda array, rng: array.astype(complex),
    "whole": lambda array, rng: np.nan_to_num(np.real(array)).astype(np.int8),
    "small floats": lambda array, rng: array.astype(np.float16),
    "records": lambda array, rng: np.zeros(array.shape, [("a", "f4"), ("b", "i4")]),
    "times": lambda array, rng: np.zeros(array.shape, "M8[s]"),
    "scalar": lambda array, rng: array.reshape(-1)[:1].reshape(()) if array.size else array,
    "nan": lambda array, rng: _set(array, rng, np.nan),
    "infinite": lambda array, rng: _set(array, rng, -np.inf),
    "huge": lambda array, rng: _set(array, rng, rng.choice([1e39, -3e38, 1e308])),
    "negative": lambda array, rng: _set(array, rng, -128),
    "swapped bytes": lambda array, rng: array.astype(array.dtype.newbyteorder()),
    "long floats": lambda array, rng: array.astype(np.longdouble),
    "one more": lambda array, rng: array + 1 if array.dtype != bool else array,
    "shuffled": lambda array, rng: rng.permutation(array) if array.ndim else array,
}


def store(file, key, value):
    if value.dtype == object and value.ndim:
        file.create_dataset(key, data=value.astype(str).astype(object), dtype=h5py.string_dtype())
    elif value.dtype.kind not in "MO":
        file[key] = value


def save(path, arrays):
    """Writes the file at `path`, or a Minari dataset of one episode."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
        return
    minari = path.name == "main_data.hdf5"
    names = {"terminals": "terminations", "timeouts": "truncations"} if minari else {}
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            store(file.require_group("episode_0") if minari else file, names.get(key, key), value)


def damage(path, rng):
    """Flips bytes of the file, or cuts it."""
    data = bytearray(path.read_bytes())
    if rng.random() < 0.3:
        data = data[: rng.integers(len(data))]
    else:
        for position in rng.integers(0, len(data), rng.integers(1, 20)):
            data[position] = rng.integers(256)
    path.write_bytes(data)


def make(path, kind, rng):
    """Writes a mutated file; returns what was done to it."""
    arrays = arrays_of(kind, rng)
    if kind == "main_data.hdf5":  # one episode has one observation more
        arrays.pop("next_observations", None)
        arrays["observations"] = rng.normal(size=(len(arrays["rewards"]) + 1, 3))
    done = []
    if rng.random() < 0.7:
        for _ in range(rng.integers(1, 3)):
            key, name = rng.choice(sorted(arrays)), rng.choice(sorted(MUTATIONS))
            try:
                with np.errstate(over="ignore"):  # a small float of a huge number
                    changed = MUTATIONS[name](arrays[key], rng)
            except (TypeError, ValueError):  # two mutations that do not go together
                continue
            arrays = {
                k: changed if k == key else v for k, v in arrays.items() if k != key or changed is not None
            }
            done.append(f"{name} {key}")
            if not arrays:
                break
    save(path, arrays)
    if rng.random() < 0.4 or not done:
        damage(path, rng)
        done.append("bytes")
    return ", ".join(done)


def check(data):
    """The arrays of `data` are finite, and fit one another."""
    rows, n = data.transitions, len(data.episode)
    for array in (rows.obs, rows.action, rows.reward, rows.next_obs, rows.discount):
        kind = np.int32 if data.discrete and array is rows.action else np.float32
        assert array.dtype == kind and len(array) == n > 0 and np.isfinite(array).all()
    assert rows.obs.shape == rows.next_obs.shape and rows.obs.ndim == 2
    assert rows.reward.shape == rows.discount.shape == data.truncation.shape == (n,)
    assert rows.obs.shape[1]
    if data.discrete:
        assert rows.action.shape == (n,) and rows.action.min() >= 0
        assert rows.action.max() < data.card["action_size"]
    else:
        assert rows.action.ndim == 2 and rows.action.shape[1] and np.abs(rows.action).max() <= 1
    assert np.isin(rows.discount, (0, 1)).all() and not (data.truncation & (rows.discount == 0)).any()
    last = np.append(np.diff(data.episode) != 0, True)
    assert data.episode[0] == 0 and np.isin(np.diff(data.episode), (0, 1)).all()
    np.testing.assert_array_equal(last, data.truncation | (rows.discount == 0))
    json.dumps(data.card, allow_nan=False)


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(tmp_path, kind):
    rng, seen = np.random.default_rng(KINDS.index(kind)), Counter()
    path = tmp_path / kind
    (tmp_path / "metadata.json").write_text("{}")
    for i in range(FILES):
        done = make(path, kind, rng)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # such as numpy's of an overflow
                check(read.load(path))
            seen["loaded"] += 1
        except DatasetError as error:
            message = str(error)
            assert kind in message and "\n" not in message and message.isprintable(), (i, done, message)
            assert len(message) < 1000, (i, done, message)
            seen["refused"] += 1
        except BaseException as error:
            error.add_note(f"{kind}, file {i}: {done}")
            raise
    assert min(seen["loaded"], seen["refused"]) > FILES / 20, seen


METADATA = [  # (start of what is replaced, what stands there then)
    ('{"type": "Box"', '{"type": "Bax"'),
    ('"Box"', "[1]"),
    ("[-1.0, -1.0]", "[-1.0]"),
    ("[-1.0, -1.0]", "null"),
    ("[-1.0, -1.0]", '["a", 2]'),
    ('"float32"', '"nothing"'),
    ('"shape"', "5"),
]


def test_odd_metadata(tmp_path, monkeypatch):
    """Of a Minari dataset: damaged JSON, and action spaces that are none."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    rng = np.random.default_rng(0)
    episode = write.episode(*(rng.uniform(-1, 1, shape) for shape in ((4, 3), 3, (4, 2), 4)), np.zeros(4))
    write.write_minari("me/some-v0", [episode], description="")
    path = tmp_path / "me/some-v0/data/metadata.json"
    good, whole = path.read_text(), json.loads(path.read_text())
    for old, new in METADATA:
        assert old in whole["action_space"]
        path.write_text(json.dumps(whole | {"action_space": whole["action_space"].replace(old, new, 1)}))
        with pytest.raises(DatasetError) as error:
            read.load(path.parent / "main_data.hdf5")
        assert "metadata.json" in str(error.value) and "\n" not in str(error.value)
    for text in ("", "{", "[]", "7", "null", good[:-9], "\x00", good.replace("Box", "Bo\n")):
        path.write_text(text)
        with pytest.raises(DatasetError) as error:
            read.load(path.parent / "main_data.hdf5")
        assert "\n" not in str(error.value)
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(DatasetError, match="damaged"):
        read.load(path.parent / "main_data.hdf5")
    shutil.rmtree(path.parent)
