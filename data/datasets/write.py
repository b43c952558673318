"""Writes episodes as Minari datasets, completely or not at all."""

import itertools
import json
import os
import shutil
import tempfile
import warnings
from typing import Any

import gymnasium
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id

from ooo_rl.data.buffer import Transition
from ooo_rl.data.datasets.folder import METADATA, datasets_root
from ooo_rl.data.datasets.scores import reference
from ooo_rl.data.errors import DatasetError


def exists(dataset_id: str) -> bool:
    """Whether there is a dataset of this id on disk."""
    return (datasets_root() / dataset_id).exists()


def recipe_of(dataset_id: str) -> str | None:
    """The recipe in the metadata of a dataset on disk; None if there is no such dataset."""
    if not exists(dataset_id):
        return None
    return json.loads((datasets_root() / dataset_id / "data" / METADATA).read_text()).get("recipe")


def check_free(dataset_id: str) -> None:
    """Raises DatasetError if there is a dataset of this id already, or if the id is not valid."""
    try:
        parse_dataset_id(dataset_id)
    except ValueError as error:
        raise DatasetError(str(error)) from None
    except TypeError:  # newer versions of Minari convert a missing version before they look at it
        raise DatasetError(f"Malformed dataset ID: {dataset_id}; it must end in -v0, -v1 ...") from None
    if exists(dataset_id):
        raise DatasetError(
            f"the dataset {dataset_id} exists already in {datasets_root()}; "
            f"delete it with `minari delete {dataset_id}`, or choose another id"
        )


def check_writable() -> None:
    """Raises DatasetError if no dataset can be written. Call it before the work of making one."""
    root = datasets_root()
    if str(root).startswith("~"):
        raise DatasetError(
            "there is no home folder to keep datasets in; set MINARI_DATASETS_PATH to a folder for them"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise DatasetError(
            f"the dataset folder {root} cannot be written ({error.strerror}); "
            "set MINARI_DATASETS_PATH to a folder that can be written"
        ) from None


def episode(
    obs: np.ndarray, last_obs: np.ndarray, action: np.ndarray, reward: np.ndarray, terminations: np.ndarray
) -> dict:
    """An episode of T rows as `write_minari` takes it. It is truncated if it did not terminate.

    The arguments are obs [T, obs], the observation `last_obs` [obs] after the last row, action [T, act],
    reward [T] and terminations [T].
    """
    terminations = np.asarray(terminations, bool)
    truncations = np.zeros(len(reward), bool)
    truncations[-1:] = ~terminations[-1:]
    observations = np.concatenate([obs, last_obs[None]])
    return {
        "observations": observations,
        "actions": action,
        "rewards": reward,
        "terminations": terminations,
        "truncations": truncations,
    }


def write_minari(
    dataset_id: str,
    episodes: list[dict[str, np.ndarray]],
    *,
    description: str,
    recipe: Any = None,
    choices: int = 0,
) -> None:
    """Writes episodes as a Minari dataset, completely or not at all.

    Each episode has observations [T + 1, obs], actions [T, act] in [-1, 1], rewards, terminations and
    truncations [T]. If actions are discrete, `choices` is their number, and they are integers [T]. `recipe`
    (plain types) says how the dataset was made, and goes into the metadata. D4RL's reference scores go there
    too, if the id names a task that has them. Raises DatasetError without episodes, or for a taken or odd id.
    """
    root = datasets_root()
    check_free(dataset_id)
    if not episodes:
        raise DatasetError(f"{dataset_id}: there is no complete episode to write; ask for more transitions")
    if os.environ.get("MINARI_DATASETS_PATH", "").startswith("~"):  # Minari would make a folder named ~
        os.environ["MINARI_DATASETS_PATH"] = str(root)
    obs, spaces = episodes[0]["observations"].shape[1], gymnasium.spaces
    if choices:
        action_space = spaces.Discrete(choices)
    else:
        action_space = spaces.Box(-1, 1, episodes[0]["actions"].shape[1:], np.float32)
    buffers = [
        EpisodeBuffer(
            id=i, observations=np.float32(e["observations"]),
            actions=np.asarray(e["actions"], action_space.dtype), rewards=list(np.float32(e["rewards"])),
            terminations=list(map(bool, e["terminations"])), truncations=list(map(bool, e["truncations"])),
            infos={"step": np.arange(len(e["observations"]))},
        )
        for i, e in enumerate(episodes)
    ]  # fmt: skip
    # Minari writes its files in place. So they go beside the final folder first, under a name that nobody
    # loads. The rename then makes the complete dataset appear at once.
    base, _, version = dataset_id.rpartition("-v")
    temporary = f"{base}-unfinished{os.getpid()}-v{version}"
    try:
        with warnings.catch_warnings():
            # Minari warns about missing metadata, which our datasets keep elsewhere.
            warnings.simplefilter("ignore", UserWarning)
            written = minari.create_dataset_from_buffers(
                temporary, buffers, description=description, author={"ooo-rl"},
                observation_space=spaces.Box(-np.inf, np.inf, (obs,), np.float32),
                action_space=action_space, requirements=[],
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


def export_experience(
    dataset_id: str,
    rows: Transition,
    num_envs: int,
    horizon: int,
    description: str = "",
    recipe: Any = None,
    choices: int = 0,
) -> None:
    """Writes flat online rows [N, ...] as a Minari dataset; row i belongs to environment i % num_envs.

    `choices` is the number of discrete actions, 0 if they are continuous.

    At most `horizon` rows of an environment stay in one episode, as long as nothing terminates, and each next
    observation is the observation of the environment's next row.
    """
    episodes = []
    for e in range(num_envs):
        own = Transition(
            *(
                np.asarray(getattr(rows, name))[e::num_envs]
                for name in ("obs", "action", "reward", "next_obs", "discount")
            )
        )
        goes_on = (own.discount[:-1] > 0) & (own.next_obs[:-1] == own.obs[1:]).all(axis=1)
        ends = [0, *(np.flatnonzero(~goes_on) + 1), len(own.reward)]
        # An episode may be cut off in the very state in which the next one begins.
        cuts = [*(cut for a, b in itertools.pairwise(ends) for cut in range(a, b, horizon)), ends[-1]]
        # Continuous actions are clipped, as the environment got them.
        action = own.action if choices else np.clip(own.action, -1, 1)
        for a, b in itertools.pairwise(cuts):
            episodes.append(
                episode(
                    own.obs[a:b],
                    own.next_obs[b - 1],
                    action[a:b],
                    own.reward[a:b],
                    own.discount[a:b] == 0,
                )
            )
    write_minari(dataset_id, episodes, description=description, recipe=recipe, choices=choices)


def piece(whole: dict[str, np.ndarray], a: int, b: int) -> dict[str, np.ndarray]:
    """Rows a to b - 1 of the episode `whole`, as a separate episode."""
    obs, action, reward, ended = (
        whole[name] for name in ("observations", "actions", "rewards", "terminations")
    )
    return episode(obs[a:b], obs[b], action[a:b], reward[a:b], ended[a:b])


def cut_to(episodes: list[dict], transitions: int) -> list[dict]:
    """The first `transitions` rows of `episodes`. An episode that is cut there ends with a truncation."""
    kept, room = [], transitions
    for whole in episodes:
        taken = min(room, len(whole["rewards"]))
        kept += [piece(whole, 0, taken)] if taken else []
        room -= taken
    return kept


def without(episodes: list[dict], discs: tuple) -> list[dict]:
    """The episodes without the rows whose position lies in one of `discs` (centre, radius).

    The position is the first two numbers of an observation. Each stretch of rows that remains becomes an
    episode.
    """
    kept = []
    for whole in episodes:
        position = whole["observations"][:-1, :2]
        out = np.any(
            [np.linalg.norm(position - np.array(centre), axis=1) <= radius for centre, radius in discs],
            axis=0,
        )
        edges = np.flatnonzero(np.diff(np.concatenate([[True], out, [True]]).astype(np.int8)))
        kept += [piece(whole, a, b) for a, b in zip(edges[::2], edges[1::2])]
    return kept
