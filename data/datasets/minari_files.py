"""Reads Minari datasets: episodes in one HDF5 file, or in many files of arrow or parquet."""

import json
import pathlib
import re
from typing import Any

import h5py
import numpy as np

from ooo_rl.data.datasets import action_box, choices, files, keys, public
from ooo_rl.data.datasets.folder import METADATA, MINARI_FILE
from ooo_rl.data.datasets.validate import Raw
from ooo_rl.data.errors import DatasetError

FIELDS = ("actions", "rewards", "terminations", "truncations")


def read(path: pathlib.Path, name: str) -> Raw:
    """The rows of the dataset whose main file is `path`: main_data.hdf5, or metadata.json of other formats.

    `name` is what the user calls it.
    """
    metadata = _metadata(path.parent / METADATA, name)
    where = f"{path.parent / METADATA}"
    space = metadata.get("action_space")
    box, number, first = None, 0, 0
    if space is not None:
        with files.decoding(path.parent / METADATA):
            space = json.loads(space) if isinstance(space, str) else space
        if isinstance(space, dict) and space.get("type") == "Discrete":
            number, first = choices.of_space(space, where)
        else:
            box = action_box.of_space(space, where)
    parts, notes = [], []
    for key, episode in _from_hdf5(path) if path.name == MINARI_FILE else _from_arrow(path, metadata):
        part = _rows(episode, f"{path}: {key}", notes)
        shapes = [column.shape[1:] for column in part]
        if parts and shapes != [column.shape[1:] for column in parts[0]]:
            raise DatasetError(f"{path}: {key} has arrays of other widths than the first episode")
        parts.append(part)
    if not parts:
        raise DatasetError(f"{path}: no episodes")
    dataset_id = metadata.get("dataset_id")
    dataset_id = dataset_id if isinstance(dataset_id, str) else name
    notes = [*dict.fromkeys(notes), *public.notes(dataset_id)]
    if space is not None and box is None and not number:
        notes.append("the action space has no finite bounds: actions taken as they are")
    recipe = metadata.get("recipe") or metadata.get("description")
    obs, action, *others = (np.concatenate(column) for column in zip(*parts))
    if number:
        action = _numbers(action, where) - first
    known = {"box": box, "is_box": space is not None and not number, "choices": number}
    return Raw(obs, action, *others, notes, recipe, dataset_id=dataset_id, **known)


def _numbers(action: np.ndarray, where: str) -> np.ndarray:
    """Discrete actions as signed integers."""
    if action.dtype.kind not in "iub":
        raise DatasetError(f"{where}: its action space is Discrete, but its actions are {action.dtype}")
    return action.astype(np.int64)


def _metadata(path: pathlib.Path, name: str) -> dict:
    if not path.is_file():
        raise DatasetError(
            f"{path}: this Minari dataset has no {METADATA}, which says what its actions are; "
            f"copy the whole folder, or delete {name} and download it again"
        )
    with files.decoding(path):
        metadata = json.loads(path.read_text())
    if not isinstance(metadata, dict):
        raise DatasetError(f"{path}: damaged; delete {name} and make or download it again")
    return metadata


def _rows(episode: dict, where: str, notes: list[str]) -> tuple[np.ndarray, ...]:
    """An episode's rows: obs, action, reward, next_obs, termination and end."""
    action, reward, termination, truncation = (episode[field] for field in FIELDS)
    leaves, lengths = [episode["observations"]], set()
    while leaves:
        leaf = leaves.pop()
        leaves += leaf.values() if isinstance(leaf, dict) else []
        lengths |= set() if isinstance(leaf, dict) else {len(leaf)}
    counts = [len(episode[field]) for field in FIELDS]
    if {*counts} != {counts[0]} or lengths != {counts[0] + 1}:
        raise DatasetError(
            f"{where} has {' or '.join(map(str, sorted(lengths)))} observations for "
            f"{', '.join(map(str, counts))} actions, rewards, terminations and truncations; "
            "expected equal numbers of these, and one observation more"
        )
    obs = public.flat_obs(episode["observations"], notes)
    termination = keys.flags(termination, f"{where}/terminations")
    end = termination | keys.flags(truncation, f"{where}/truncations")
    end[-1:] = True
    return obs[:-1], action, reward, obs[1:], termination, end


def _from_hdf5(path: pathlib.Path) -> list[tuple[str, dict]]:
    with files.opened(path) as file:
        found = sorted((k for k in file if re.fullmatch(r"episode_\d+", k)), key=lambda k: int(k[8:]))
        return [(key, _episode(file[key], f"{path}: {key}")) for key in found]


def _from_arrow(path: pathlib.Path, metadata: dict) -> list[tuple[str, dict]]:
    """Minari's formats of one folder per episode. Read without Minari, which cannot read all its infos."""
    kind = files.printable(str(metadata.get("data_format")))
    if kind not in ("arrow", "parquet"):
        raise DatasetError(
            f"{path.parent / MINARI_FILE}: there is no such file, only {METADATA} beside it; copy it too"
        )
    try:
        from pyarrow import dataset as arrow
    except ImportError:
        raise DatasetError(
            f"{path.parent}: stored in Minari's format {kind}, which needs pyarrow: pip install minari[arrow]"
        ) from None
    with files.decoding(path.parent):
        episodes = []
        for folder in sorted(
            (p for p in path.parent.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)
        ):
            table = arrow.dataset(folder, format=kind, ignore_prefixes=["_", ".", METADATA])
            columns = table.to_table(columns=["observations", *FIELDS])
            arrays = {
                key: _column(columns[key].combine_chunks(), f"{folder}: {key}")
                for key in columns.column_names
            }
            for field in FIELDS:  # as long as the observations, one longer than there are steps
                arrays[field] = files.numbers(arrays[field], f"{folder}: {field}")[:-1]
            episodes.append((f"episode_{folder.name}", arrays))
        return episodes


def _column(column: Any, where: str) -> Any:
    """An arrow array as numpy's; of a structure, a dictionary of arrays."""
    if hasattr(column.type, "fields"):
        return {
            field.name: _column(column.field(field.name), f"{where}/{field.name}") for field in column.type
        }
    if hasattr(column.type, "list_size"):
        values = np.asarray(column.flatten())
        return files.numbers(values.reshape(len(column), column.type.list_size), where)
    return files.numbers(column.to_numpy(zero_copy_only=False), where)


def _episode(group: Any, where: str) -> dict:
    """The arrays of one episode; observations may be dictionaries of arrays."""
    if not isinstance(group, h5py.Group):
        raise DatasetError(f"{where} is no group of arrays")
    # Each is looked up once: there may be a hundred thousand episodes.
    nodes = {field: group.get(field) for field in ("observations", *FIELDS)}
    for field, node in nodes.items():
        if node is None:
            raise DatasetError(f"{where} has no {field!r}; found {keys.shown(group) or 'nothing'}")
    if isinstance(nodes["actions"], h5py.Group):
        raise DatasetError(
            f"{where} has dictionaries of {keys.shown(nodes['actions'])} as actions; these methods need "
            "continuous actions, each one vector of numbers (a Box)"
        )
    fields = {field: files.numbers(nodes[field], f"{where}/{field}") for field in FIELDS}
    return {"observations": _tree(nodes["observations"], f"{where}/observations"), **fields}


def _tree(node: Any, where: str) -> Any:
    """The arrays at `node`, a group or an array, as (nested dictionaries of) numpy arrays."""
    if not isinstance(node, h5py.Group):
        return files.numbers(node, where)
    if not len(node):
        raise DatasetError(f"{where} is empty")
    return {key: _tree(node[key], f"{where}/{files.printable(key)}") for key in node}
