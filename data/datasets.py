"""Offline datasets: from a file or Minari to validated flat arrays, and from episodes back to Minari.

A dataset is a Minari dataset on disk, an HDF5 file or a .npz in D4RL's layout, or a .npz of whole episodes. Whatever
its source, `load` returns the same arrays, with terminations and truncations apart, or says what is wrong and where.
What is particular to D4RL's and Farama's datasets is in `data/public.py`.
"""

import difflib
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import tempfile
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import gymnasium
import h5py
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from rich.console import Console
from rich.table import Table

from data import public
from data.buffer import Transition
from data.scores import normalized_score, reference

LIMIT = 1 - 1e-5  # the official loaders clip actions to this, so that no policy has to reach the very edge
TOLERANCE = 1e-6
FILES = (".npz", ".hdf5", ".h5")
MINARI_FILE = "main_data.hdf5"


class DatasetError(ValueError):
    """Data that cannot be learnt from; the message names file, episode and step, and says what to do."""


@dataclass(frozen=True)
class Dataset:
    """N rows of experience in order of time.

    transitions: float32 numpy arrays [N, ...]; discount is 0 where the episode terminated after the row, else 1.
    episode: int32 [N], counted from 0. truncation: bool [N], the last row of an episode that did not terminate.
    card: what the loader found, in plain types for dataset.json.
    """

    transitions: Transition
    episode: np.ndarray
    truncation: np.ndarray
    card: dict


@dataclass
class Raw:
    """Rows as a file gives them, before validation; `notes` say what was dropped or flattened on the way."""

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_obs: np.ndarray
    termination: np.ndarray
    end: np.ndarray
    notes: list[str]
    recipe: Any = None
    row: np.ndarray | None = None  # of the file, where some were dropped


def load(name: str, *, clip_actions: float = LIMIT, clip_out_of_range: bool = False) -> Dataset:
    """The dataset `name`: a .npz, .hdf5 or .h5 file, a Minari dataset on disk, by id or folder, one of ours, which is made on first
    use, or the D4RL id of a file in D4RL's own folder.

    Actions must lie in [-1, 1] (`clip_out_of_range` clips instead) and are then clipped to +-`clip_actions`.
    Raises DatasetError; never touches the network.
    """
    source = pathlib.Path(name)
    if source.suffix not in FILES:
        source = _find(name)
    elif not source.is_file():
        raise DatasetError(f"{name}: there is no such file")
    raw = _read_minari(source, name) if source.name == MINARI_FILE else _read_file(source)
    _validate(raw, str(source), clip_out_of_range)
    _drop_empty_forces(raw)
    return _finish(raw, name, str(source), clip_actions)


# --- reading ---


def _read_file(path: pathlib.Path) -> Raw:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
        else:
            with h5py.File(path, "r") as file:
                arrays = {key: file[key][()] for key in file if isinstance(file[key], h5py.Dataset)}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DatasetError(f"{path}: damaged or not such a file ({error}); copy or download it again") from None
    for key in ("observations", "actions", "rewards"):
        if key not in arrays:
            raise DatasetError(f"{path}: no array {key!r}; found {', '.join(sorted(arrays)) or 'nothing'}")
        if arrays[key].dtype.kind not in "fiu":
            raise DatasetError(f"{path}: {key} holds {arrays[key].dtype}, not numbers")
    return _whole_episodes(arrays, str(path)) if "episode_lengths" in arrays else _d4rl(arrays, str(path))


def _d4rl(arrays: dict, path: str) -> Raw:
    """D4RL's flat layout: `terminals`, `timeouts`, and mostly no next observations, so that the row at a timeout has none."""
    n = len(arrays["rewards"])
    flags = {key: np.asarray(arrays.get(key, np.zeros(n)), bool).reshape(-1) for key in ("terminals", "timeouts")}
    for key, value in {**{k: arrays[k] for k in ("observations", "actions")}, **flags}.items():
        if len(value) != n:
            raise DatasetError(f"{path}: {key} has {len(value)} rows, rewards {n}")
    end = flags["terminals"] | flags["timeouts"]
    obs, rows = np.asarray(arrays["observations"]), np.arange(n)
    notes = []
    if "next_observations" in arrays:
        next_obs = np.asarray(arrays["next_observations"])
        end[-1:] = True
    else:
        # A terminated row's next observation is never used; at a timeout, or the end of the file, it is simply not known.
        next_obs = np.concatenate([obs[1:], obs[-1:]])
        next_obs = np.where(flags["terminals"].reshape(-1, *(1,) * (obs.ndim - 1)), obs, next_obs)
        known = flags["terminals"] | ~flags["timeouts"]
        known[-1:] &= flags["terminals"][-1:]
        dropped = n - known.sum()
        before_gap = np.concatenate([~known[1:], [False]]) & ~end
        end = end | before_gap
        rows = rows[known]
        notes.append(f"{dropped} rows at timeouts dropped: their next observations are not stored")
    take = lambda x: np.asarray(x)[rows]  # noqa: E731
    return Raw(*map(take, (obs, arrays["actions"], arrays["rewards"], next_obs, flags["terminals"], end)), notes, row=rows)


def _whole_episodes(arrays: dict, path: str) -> Raw:
    """Episodes end to end: T actions each and T + 1 observations (`obs_starts`), or T, of which the last row has no next one."""
    lengths = np.asarray(arrays["episode_lengths"], np.int64)
    if (lengths < 1).any():
        raise DatasetError(f"{path}: episode {(lengths < 1).argmax()} has the length {lengths.min()}; drop empty episodes")
    n, num_obs = int(lengths.sum()), len(arrays["observations"])
    if len(arrays["actions"]) != n or len(arrays["rewards"]) != n:
        raise DatasetError(
            f"{path}: episode_lengths add up to {n}, but there are {len(arrays['actions'])} actions and {len(arrays['rewards'])} rewards"
        )
    extra = (num_obs - n) // max(len(lengths), 1)
    if extra not in (0, 1) or num_obs != n + extra * len(lengths):
        raise DatasetError(
            f"{path}: {num_obs} observations for {n} actions in {len(lengths)} episodes; expected as many, or one more per episode"
        )
    terminals = np.asarray(arrays.get("terminals", np.zeros(n)), bool).reshape(-1)
    if len(terminals) != n:
        raise DatasetError(f"{path}: terminals has {len(terminals)} rows, rewards {n}")
    starts = np.cumsum(lengths + extra) - (lengths + extra)
    # A terminated row's next observation is never used, so it may be missing.
    used = lengths if extra else lengths - ~terminals[np.cumsum(lengths) - 1]
    first_row = np.cumsum(lengths) - lengths
    index = np.concatenate([np.arange(s, s + k) for s, k in zip(starts, used)]) if n else np.zeros(0, int)
    rows = np.concatenate([np.arange(s, s + k) for s, k in zip(first_row, used)]) if n else np.zeros(0, int)
    end = np.zeros(len(rows), bool)
    end[np.cumsum(used) - 1] = True
    obs = np.asarray(arrays["observations"])
    next_obs = obs[np.minimum(index + 1, np.repeat(starts + lengths + extra - 1, used))]
    dropped = n - len(rows)
    notes = [f"{dropped} last rows of episodes dropped: their next observations are not stored"] if dropped else []
    action, reward = (np.asarray(arrays[key])[rows] for key in ("actions", "rewards"))
    return Raw(obs[index], action, reward, next_obs, terminals[rows], end, notes, row=rows)


def _datasets_root() -> pathlib.Path:
    return pathlib.Path(os.environ.get("MINARI_DATASETS_PATH", pathlib.Path.home() / ".minari" / "datasets"))


def _find(name: str) -> pathlib.Path:
    """The file of the dataset of this id or in this folder, made if it is one of ours."""
    from data.generate import GENERATED, RECIPES, make  # here: the generators write with this module

    file = _datasets_root() / name / "data" / MINARI_FILE
    if not file.is_file() and name in GENERATED:
        try:
            make(name)
        except (DatasetError, OSError):
            if not file.is_file():  # else another process was quicker
                raise
    if not file.is_file():
        elsewhere = pathlib.Path(name) / "data" / MINARI_FILE
        file = elsewhere if elsewhere.is_file() else public.d4rl_file(name) or file
    if not file.is_file() and name in RECIPES:
        raise DatasetError(
            f"{name} is not in {_datasets_root()} and is made by hand: python data/generate.py {name}, which says what it needs"
        )
    if not file.is_file():
        root = _datasets_root()
        known = {*RECIPES, *public.d4rl_ids(), *(str(p.parents[1].relative_to(root)) for p in root.rglob(MINARI_FILE))}
        near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.3) or sorted(known)
        raise DatasetError(
            f"unknown dataset {name!r}; near it, on disk or made by us: {', '.join(near)}. Or give the path of an .hdf5 or .npz file, "
            f"or fetch a public one first: Minari's with `minari download {name}`, D4RL's file "
            f"({public.D4RL_FILES.get(name, name + '.hdf5')}) into {public.d4rl_folder()}"
        )
    return file


def _read_minari(path: pathlib.Path, name: str) -> Raw:
    parts, notes = [], []
    try:
        with h5py.File(path, "r") as file:
            for key in sorted((k for k in file if re.fullmatch(r"episode_\d+", k)), key=lambda k: int(k[8:])):
                episode = file[key]
                obs = public.flat_obs(episode["observations"], notes)
                fields = [np.asarray(episode[k]) for k in ("actions", "rewards", "terminations", "truncations")]
                if len({len(f) for f in fields}) != 1 or len(obs) != len(fields[0]) + 1:
                    raise DatasetError(
                        f"{path}: {key} has {len(obs)} observations for {', '.join(str(len(f)) for f in fields)} actions, rewards, ..."
                    )
                action, reward, termination, truncation = fields
                end = termination | truncation
                end[-1:] = True
                parts.append((obs[:-1], action, reward, obs[1:], termination.astype(bool), end))
        metadata = json.loads((path.parent / "metadata.json").read_text())
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise DatasetError(f"{path}: damaged ({error}); delete {name} and make or download it again") from None
    if not parts:
        raise DatasetError(f"{path}: no episodes")
    notes = [*dict.fromkeys(notes), *public.notes(metadata.get("dataset_id", name))]
    return Raw(*(np.concatenate(column) for column in zip(*parts)), notes, metadata.get("recipe") or metadata.get("description"))


# --- validation ---


def _validate(raw: Raw, source: str, clip_out_of_range: bool) -> None:
    """Raises DatasetError for the first thing with which `raw` cannot be learnt from; clips actions in place if allowed."""
    n = len(raw.reward)
    if n == 0:
        raise DatasetError(f"{source}: no transitions")
    for name, rank in (("obs", 2), ("action", 2), ("reward", 1), ("next_obs", 2)):
        array = getattr(raw, name)
        if array.ndim == rank + 1 and array.shape[-1] == 1 and name == "reward":
            array = array[:, 0]
        if array.ndim != rank or len(array) != n:
            raise DatasetError(f"{source}: {name} has shape {array.shape}; expected {n} rows and {rank} dimension{'s' * (rank > 1)}")
        setattr(raw, name, np.asarray(array))
    if raw.obs.shape != raw.next_obs.shape:
        raise DatasetError(f"{source}: observations are {raw.obs.shape[1:]}, next observations {raw.next_obs.shape[1:]}")
    episode, step = _episodes(raw.end)
    in_file = np.arange(n) if raw.row is None else raw.row
    where = lambda row: f"{source}: episode {episode[row]}, step {step[row]} (row {in_file[row]})"  # noqa: E731
    for name in ("obs", "action", "reward", "next_obs"):
        bad = ~np.isfinite(getattr(raw, name)).reshape(n, -1).all(axis=1)
        if bad.any():
            raise DatasetError(
                f"{where(bad.argmax())}: {name} is not finite, and {bad.sum() - 1} more rows are not; mend or drop the episode"
            )
    excess = np.abs(raw.action).max(axis=1) - 1
    if (excess > TOLERANCE).any():
        share = (np.abs(raw.action) > 1 + TOLERANCE).mean()
        if not clip_out_of_range:
            raise DatasetError(
                f"{where((excess > TOLERANCE).argmax())}: an action lies outside [-1, 1]; {share:.1%} of all entries do, "
                f"by up to {excess.max():.3g}. "
                "Rescale them, or load with --clip-actions"
            )
        raw.notes.append(f"{share:.2%} of action entries clipped to [-1, 1], from up to {1 + excess.max():.3g}")
    gap = np.abs(raw.next_obs[:-1] - raw.obs[1:]).max(axis=1) > TOLERANCE
    gap &= ~raw.end[:-1]
    if gap.any():
        row = gap.argmax()
        raise DatasetError(
            f"{where(row)}: next_obs differs from the observation that follows; mark the end of an episode there, or mend the file"
        )


def _drop_empty_forces(raw: Raw) -> None:
    if public.empty_forces(raw.obs) and public.empty_forces(raw.next_obs):
        raw.obs, raw.next_obs = raw.obs[:, : -public.FORCES], raw.next_obs[:, : -public.FORCES]
        raw.notes.append(f"the last {public.FORCES} numbers of the observation dropped: an ant's contact forces, zero in every row")


def _episodes(end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Episode number and step within it, [N] each, from the flags of last rows."""
    first = np.concatenate([[True], end[:-1]])
    episode = np.cumsum(first) - 1
    return episode.astype(np.int32), np.arange(len(end)) - np.flatnonzero(first)[episode]


def _finish(raw: Raw, name: str, source: str, clip_actions: float) -> Dataset:
    termination = raw.termination.astype(bool)
    raw.end[-1] = True
    raw.end |= termination
    columns = (raw.obs, np.clip(raw.action, -clip_actions, clip_actions), raw.reward, raw.next_obs, 1 - termination)
    rows = Transition(*(np.ascontiguousarray(column, np.float32) for column in columns))
    episode, _ = _episodes(raw.end)
    truncation = raw.end & ~termination
    return Dataset(rows, episode, truncation, _card(raw, rows, episode, truncation, name, source))


def _card(raw: Raw, rows: Transition, episode: np.ndarray, truncation: np.ndarray, name: str, source: str) -> dict:
    returns, lengths = np.bincount(episode, rows.reward), np.bincount(episode)
    quantiles = lambda x: [round(float(q), 4) for q in np.quantile(x, (0, 0.25, 0.5, 0.75, 1))]  # noqa: E731
    digest = hashlib.sha256()
    for array in (rows.obs, rows.action, rows.reward, rows.next_obs, rows.discount):
        digest.update(array.tobytes())
    score = normalized_score(name, returns.mean())
    return {
        "id": name, "source": source, "sha256": digest.hexdigest()[:16],
        "episodes": len(lengths), "transitions": len(episode), "obs_size": rows.obs.shape[1], "action_size": rows.action.shape[1],
        "return_quantiles": quantiles(returns), "return_mean": float(returns.mean()), "length_quantiles": quantiles(lengths),
        "reward_range": [float(rows.reward.min()), float(rows.reward.max())],
        "action_range": [float(raw.action.min()), float(raw.action.max())],
        "terminated_episodes": int((rows.discount == 0).sum()), "truncated_episodes": int(truncation.sum()),
        "normalized_score": None if score is None else float(score), "notes": raw.notes, "recipe": raw.recipe,
    }  # fmt: skip


def print_card(card: dict) -> None:
    """Prints what there is to know about a dataset before training on it."""
    table = Table(title=f"dataset {card['id']}", show_header=False)
    for key, value in card.items():
        if value not in (None, [], "") and key != "id":
            shown = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value) if isinstance(value, list) else str(value)
            table.add_row(key.replace("_", " "), f"{value:.2f}" if isinstance(value, float) else shown)
    Console().print(table)


def check_fits(data: Dataset, obs_size: int, action_size: int, env: str) -> None:
    """Raises DatasetError if the dataset belongs to another body than the environment's."""
    has = data.transitions.obs.shape[1], data.transitions.action.shape[1]
    if has != (obs_size, action_size):
        body = public.body(*has)
        raise DatasetError(
            f"{data.card['id']} has {has[0]} observations and {has[1]} actions, {env} has {obs_size} and {action_size}: "
            f"they do not belong together{f'; data of this shape come from {body}' if body else ''}"
        )


# --- writing ---


def own(env: str) -> str:
    """The dataset of ours that `--dataset auto` means for an environment: the only one, random actions aside, made for it, or "none"."""
    from data.generate import RECIPES

    task = env.removesuffix("-ending")  # how an episode ends changes nothing in data whose episodes never do
    found = [name for name, recipe in RECIPES.items() if recipe.env == task and not name.endswith("/random-v0")]
    return found[0] if len(found) == 1 else "none"


def exists(dataset_id: str) -> bool:
    return (_datasets_root() / dataset_id).exists()


def check_free(dataset_id: str) -> None:
    """Raises DatasetError if there is a dataset of this name already, or can be none."""
    try:
        parse_dataset_id(dataset_id)
    except ValueError as error:
        raise DatasetError(str(error)) from None
    if exists(dataset_id):
        raise DatasetError(
            f"the dataset {dataset_id} exists already in {_datasets_root()}; "
            f"delete it with `minari delete {dataset_id}`, or choose another id"
        )


def check_writable() -> None:
    """Raises DatasetError if no dataset can be written, before the work of making one is done."""
    root = _datasets_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise DatasetError(
            f"the dataset folder {root} cannot be written ({error.strerror}); set MINARI_DATASETS_PATH to one that can"
        ) from None


def episode(obs: np.ndarray, last_obs: np.ndarray, action: np.ndarray, reward: np.ndarray, terminations: np.ndarray) -> dict:
    """An episode of T rows as `write_minari` takes it: obs [T, obs], then `last_obs` [obs]. It is truncated if it did not terminate."""
    terminations = np.asarray(terminations, bool)
    truncations = np.zeros(len(reward), bool)
    truncations[-1:] = ~terminations[-1:]
    observations = np.concatenate([obs, last_obs[None]])
    return {"observations": observations, "actions": action, "rewards": reward, "terminations": terminations, "truncations": truncations}


def write_minari(dataset_id: str, episodes: list[dict[str, np.ndarray]], *, description: str, recipe: Any = None) -> None:
    """Writes episodes as a Minari dataset, whole or not at all.

    Each episode has observations [T + 1, obs], actions [T, act] in [-1, 1], rewards, terminations and truncations [T]. `recipe`
    (plain types: how it was made) goes into the metadata, as do D4RL's reference scores where the id names a task that has them.
    """
    root = _datasets_root()
    check_free(dataset_id)
    obs, action = (episodes[0][key].shape[1] for key in ("observations", "actions"))
    buffers = [
        EpisodeBuffer(
            id=i, observations=np.float32(e["observations"]), actions=np.float32(e["actions"]), rewards=list(np.float32(e["rewards"])),
            terminations=list(map(bool, e["terminations"])), truncations=list(map(bool, e["truncations"])),
            infos={"step": np.arange(len(e["observations"]))},
        )
        for i, e in enumerate(episodes)
    ]  # fmt: skip
    # Minari writes in place, so it writes beside the final folder, under a name that no one loads, and the rename makes it whole.
    base, _, version = dataset_id.rpartition("-v")
    temporary = f"{base}-unfinished{os.getpid()}-v{version}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Minari's advice on metadata that a dataset of ours has elsewhere
            written = minari.create_dataset_from_buffers(
                temporary, buffers, description=description, author={"ooo-rl"},
                observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (obs,), np.float32),
                action_space=gymnasium.spaces.Box(-1, 1, (action,), np.float32), requirements=[],
            )  # fmt: skip
        scores = reference(dataset_id)
        extra = {
            "recipe": recipe if isinstance(recipe, str) else json.dumps(recipe or ""),
            **({"ref_min_score": scores[0], "ref_max_score": scores[1]} if scores else {}),
        }
        written.storage.update_metadata(extra)
        metadata = root / temporary / "data" / "metadata.json"
        metadata.write_text(metadata.read_text().replace(temporary, dataset_id))
        (root / temporary).rename(root / dataset_id)
    except BaseException:
        shutil.rmtree(root / temporary, ignore_errors=True)
        raise


def export_experience(dataset_id: str, rows: Transition, num_envs: int, description: str = "", recipe: Any = None) -> None:
    """Writes flat online rows [N, ...] as a Minari dataset; row i belongs to environment i % num_envs.

    An environment's rows are one episode for as long as each next observation is the following row's observation and nothing terminated.
    """
    episodes = []
    for e in range(num_envs):
        own = Transition(*(np.asarray(getattr(rows, name))[e::num_envs] for name in ("obs", "action", "reward", "next_obs", "discount")))
        goes_on = (own.discount[:-1] > 0) & (own.next_obs[:-1] == own.obs[1:]).all(axis=1)
        cuts = [0, *(np.flatnonzero(~goes_on) + 1), len(own.reward)]
        for a, b in itertools.pairwise(cuts):
            episodes.append(episode(own.obs[a:b], own.next_obs[b - 1], own.action[a:b], own.reward[a:b], own.discount[a:b] == 0))
    write_minari(dataset_id, episodes, description=description, recipe=recipe)
