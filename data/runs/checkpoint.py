"""Checkpoints: saving a run's state, going on from it, and starting another run from its agents."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ooo_rl.data.errors import DISK_FULL, UsageError
from ooo_rl.data.runs import processes
from ooo_rl.data.runs.settings import read_config
from ooo_rl.data.runs.sweep import RunLabel

SIGNS_OF_FULL_DISK = ("No space left", "File too large", "quota exceeded")


class Checkpoints:
    """The checkpoints in a run's folder; only the last one is kept."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False, create=False, multiprocessing_options=_all()
        )
        path = (folder / "checkpoints").absolute()
        path.mkdir(exist_ok=True)
        self.manager = ocp.CheckpointManager(path, options=options)

    def save(self, position: int, state: Any, host: dict) -> None:
        """Writes a checkpoint after `position` chunks of the plan, whole or not at all.

        The checkpoint before it is deleted once the new one is there.
        """
        what = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
        try:
            self.manager.save(position, args=what, force=True)
        except Exception as error:
            text = str(error)
            if getattr(error, "errno", None) not in DISK_FULL and not any(
                sign in text for sign in SIGNS_OF_FULL_DISK
            ):
                raise
            raise UsageError(
                f"no room left for a checkpoint in {self.folder}; the one before it is whole: "
                f"free some, then --resume {self.folder}"
            ) from error

    def restore(self, state: Any, num_runs: int) -> tuple[Any, dict] | None:
        """(state [num_runs, ...], host) of the last checkpoint, or None if there is none yet.

        `state` [places, ...] gives the other axes of the arrays, and their devices if no place is idle. If
        there is a checkpoint, the memory of `state` is free afterwards: there may be no room for two.
        """
        position = self.manager.latest_step()
        if position is None:
            return None
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        first = jax.tree.leaves(state)[0]
        if num_runs < len(first) or isinstance(first, np.ndarray):
            template = jax.tree.map(lambda x: np.empty((num_runs, *x.shape[1:]), x.dtype), template)
        jax.tree.map(lambda x: x.delete() if isinstance(x, jax.Array) else None, state)
        what = ocp.args.Composite(state=ocp.args.StandardRestore(template), host=ocp.args.JsonRestore())
        try:
            saved = self.manager.restore(position, args=what)
        except (ValueError, KeyError, FileNotFoundError) as error:
            reason = str(error).splitlines()[0][:300]
            raise UsageError(
                f"--resume {self.folder}: the checkpoint does not fit these settings, or it is damaged "
                f"({reason})"
            ) from None
        return saved["state"], saved["host"]

    def close(self) -> None:
        self.manager.close()


def _all() -> ocp.options.MultiprocessingOptions:
    """All processes, by name. Orbax then lets them wait for one another for five minutes, not for ever."""
    several = processes.are_several()
    return ocp.options.MultiprocessingOptions(
        active_processes=set(range(jax.process_count())) if several else None
    )


def save_for_inspection(path: pathlib.Path, state: Any) -> None:
    """Writes `state` apart from the run's checkpoints."""
    with ocp.StandardCheckpointer(multiprocessing_options=_all()) as checkpointer:
        checkpointer.save(path.absolute(), state, force=True)


def check_agent(folder: str, labels: list[RunLabel]) -> None:
    """Raises UsageError unless the run in `folder` has a checkpoint, and a row for each of our `labels`."""
    flag = f"--init-from {folder}"
    _rows(flag, read_config(folder, "--init-from")["settings"], labels)
    _last(flag, folder)


def load_agent(folder: str, labels: list[RunLabel], like: Any) -> tuple[Any, str]:
    """The agent that the run in `folder` trained last, as far as it fits `like`.

    `like` is an agent of this run; its arrays have a leading axis of runs. A part keeps its values where the
    other run has no part of that name and shape. Each run gets the agent of its own seed. Returns (the agent,
    a sentence that says what was taken). Raises UsageError if the folder cannot be used or its policy does
    not fit: one that begins anew acts at random, and soon spoils critics that go on. The policy is the actor,
    or the parts that the agent's class names in `policy`.
    """
    flag = f"--init-from {folder}"
    config = read_config(folder, "--init-from")
    rows = _rows(flag, config["settings"], labels)
    saved, host = _restored(flag, folder)
    if lost := [row for row in rows if str(row) in host["failed"]]:
        seed, why = config["settings"]["seed"] + lost[0], host["failed"][str(lost[0])]
        raise UsageError(f"{flag}: its seed {seed} stopped in {why}; take --seed and --num-seeds without it")
    name = host["agent"]
    taken, missing, agent = [], [], {}
    for field in dataclasses.fields(like):
        ours = getattr(like, field.name)
        theirs = saved[name].get(field.name)
        if theirs is None:
            missing.append(f"{field.name} (not there)")
        elif _shapes(ours) != _shapes(theirs):
            missing.append(f"{field.name} (of other shapes)")
        else:
            arrays = _by_name(theirs)
            agent[field.name] = jax.tree_util.tree_map_with_path(
                lambda path, _, arrays=arrays: np.asarray(arrays[_name(path)])[rows], ours
            )
            taken.append(field.name)
    if set(getattr(like, "policy", ("actor",))) - set(taken):
        raise UsageError(
            f"{flag}: the policy of its {name} does not fit: {', '.join(missing)}; the kind of policy, "
            "the networks' sizes and the task must be as in its config.json"
        )
    rest = f"; begins anew: {', '.join(missing)}" if missing else ""
    said = f"from {folder} ({config['method']}'s {name}): {', '.join(taken)}{rest}"
    return like.replace(**agent), said


def _restored(flag: str, folder: str) -> tuple[dict, dict]:
    """(state as nested dictionaries of numpy arrays, host) of the last checkpoint in `folder`.

    As numpy arrays they fit any number of devices.
    """
    last = _last(flag, folder)
    try:
        trees = ocp.PyTreeCheckpointHandler(multiprocessing_options=_all())
        with ocp.Checkpointer(trees, multiprocessing_options=_all()) as checkpointer:
            metadata = checkpointer.metadata(last / "state").item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
            state = checkpointer.restore(last / "state", restore_args=as_numpy)
        with ocp.Checkpointer(ocp.JsonCheckpointHandler(), multiprocessing_options=_all()) as checkpointer:
            host = checkpointer.restore(last / "host")
    except (ValueError, KeyError, OSError) as error:
        raise UsageError(f"{flag}: its checkpoint is damaged ({str(error).splitlines()[0][:200]})") from None
    return state, host


def _last(flag: str, folder: str) -> pathlib.Path:
    """The last checkpoint in `folder`."""
    path = pathlib.Path(folder).expanduser().absolute() / "checkpoints"
    steps = [int(p.name) for p in path.glob("*") if p.name.isdigit()]
    if not steps:
        raise UsageError(f"{flag}: there is no checkpoint yet")
    return path / str(max(steps))


def _rows(flag: str, settings: dict, labels: list[RunLabel]) -> np.ndarray:
    """Which of the other run's rows belongs to each of ours: the one of the same seed."""
    if settings["sweep"]:
        raise UsageError(
            f"{flag}: that run swept {', '.join(settings['sweep'])}; start from one with a single setting"
        )
    seeds = range(settings["seed"], settings["seed"] + settings["num_seeds"])
    if missing := sorted({label.seed for label in labels} - set(seeds)):
        raise UsageError(
            f"{flag}: that run has the seeds {seeds[0]} to {seeds[-1]}, not {', '.join(map(str, missing))}"
        )
    return np.array([seeds.index(label.seed) for label in labels])


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays in `tree` by name, without the leading axis of runs."""
    return {name: np.shape(x)[1:] for name, x in _by_name(tree).items()}


def _by_name(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by name.

    A dataclass and the dictionary of its fields, which a checkpoint gives, have the same names.
    """
    return {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: tuple) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", None)))) for k in path)
