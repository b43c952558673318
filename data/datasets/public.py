"""What is known about public datasets.

It holds the names of D4RL's files, the layouts of Farama's dictionary observations, and how Farama's data
differ from D4RL's.
"""

import pathlib
import re

import numpy as np

from ooo_rl.data.datasets.folder import folder

# --- D4RL's files ---


def d4rl_folder() -> pathlib.Path:
    """The folder of D4RL's downloads: $D4RL_DATASET_DIR, by default ~/.d4rl/datasets."""
    return folder("D4RL_DATASET_DIR", "~/.d4rl/datasets")


def _d4rl_files() -> dict[str, str]:
    files = {}
    for body in ("halfcheetah", "hopper", "walker2d", "ant"):
        for kind in ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert"):
            files |= {f"{body}-{kind}-v{v}": f"{body}_{kind.replace('-', '_')}-v{v}" for v in (1, 2)}
            old = "walker" if (body, kind) == ("walker2d", "medium-replay") else body
            files[f"{body}-{kind}-v0"] = (
                f"{old}_{'mixed' if kind == 'medium-replay' else kind.replace('-', '_')}"
            )
    for size in ("open", "umaze", "medium", "large", "eval-umaze", "eval-medium", "eval-large"):
        for dense in ("", "-dense"):
            name = f"maze2d-{size}{dense or '-sparse'}"
            files |= {f"maze2d-{size}{dense}-v0": name, f"maze2d-{size}{dense}-v1": f"{name}-v1"}
    for size, old in (("umaze", "u-maze"), ("medium", "big-maze"), ("large", "hardest-maze")):
        for kind in ("", "-diverse") if size == "umaze" else ("-play", "-diverse"):
            flags = f"noisy_multistart_{kind != ''}_multigoal_{kind == '-diverse'}_sparse"
            files |= {
                f"antmaze-{size}{kind}-v0": f"Ant_maze_{old}_{flags}",
                f"antmaze-{size}{kind}-v1": f"Ant_maze_{size}_{flags}",
            }
            files[f"antmaze-{size}{kind}-v2"] = f"Ant_maze_{old}_{flags}_fixed"
    for task in ("door", "hammer", "pen", "relocate"):
        files |= {
            f"{task}-human-v0": f"{task}-v0_demos_clipped",
            f"{task}-cloned-v0": f"{task}-demos-v0-bc-combined",
        }
        files[f"{task}-expert-v0"] = f"{task}-v0_expert_clipped"
    kitchen = "kitchen_microwave_kettle_light_slider-v0"
    files |= {"kitchen-complete-v0": f"mini_{kitchen}", "kitchen-partial-v0": kitchen}
    files["kitchen-mixed-v0"] = "kitchen_microwave_kettle_bottomburner_light-v0"
    return {key: f"{value}.hdf5" for key, value in files.items()}


D4RL_FILES = _d4rl_files()  # D4RL's id -> the name of its file, where that is not `<id>.hdf5`
D4RL_IDS = {  # file name -> D4RL's id
    **{f"{name}.hdf5": name for name in D4RL_FILES},
    **{
        f"{task}-{kind}-v1.hdf5": f"{task}-{kind}-v1"
        for task in ("door", "hammer", "pen", "relocate")
        for kind in ("human", "cloned", "expert")
    },
    **{file: name for name, file in D4RL_FILES.items()},
}
# One run without resets, and no flag marks any end in it.
ENDLESS = {
    file for name, file in D4RL_FILES.items() if name.startswith("maze2d-") and name.endswith("-v0")
} | {f"{name}.hdf5" for name in D4RL_FILES if name.startswith("maze2d-") and name.endswith("-v0")}


def d4rl_id(path: str) -> str:
    """D4RL's id of a file, by the file's name; empty if it is not a name that D4RL gives."""
    return D4RL_IDS.get(pathlib.PurePath(path).name, "")


FIRST_ANTMAZE = re.compile(r"antmaze-.*-v[01]")  # ids of the files whose timeouts are not where episodes end

D4RL_NOTES = {  # start of D4RL's id -> what to know about its file
    "maze2d-": "rewards are one row late against our environments: D4RL pays a row for its own observation, "
    "they pay for the next one (D4RL's issue 194)",
    "hopper-medium-expert-v0": "D4RL's first file of this name holds expert and medium-replay data, not "
    "expert and medium data (D4RL's issue 19): results do not compare with those of later versions",
}


def d4rl_notes(path: str | pathlib.PurePath) -> list[str]:
    """What to know about a file with the name of one of D4RL's; nothing about others."""
    return [note for start, note in D4RL_NOTES.items() if d4rl_id(str(path)).startswith(start)]


def d4rl_file(name: str) -> pathlib.Path | None:
    """The file of a D4RL id such as `halfcheetah-medium-v2`; None if D4RL's folder does not have it.

    The file may have the name that D4RL gives it, or `<id>.hdf5`.
    """
    candidates = (d4rl_folder() / file for file in (D4RL_FILES.get(name), f"{name}.hdf5") if file)
    return next((path for path in candidates if path.is_file()), None)


def d4rl_ids() -> list[str]:
    """The ids of all files in D4RL's folder, sorted."""
    stems = [path.stem for path in d4rl_folder().glob("*.hdf5")]
    ids = {file: name for name, file in D4RL_FILES.items()}
    return sorted(ids.get(f"{stem}.hdf5", stem) for stem in stems)


# --- Farama's datasets ---

# The keys of an observation in gymnasium-robotics' goal tasks.
GOAL_TASK = {"achieved_goal", "desired_goal", "observation"}
ANT = 27  # size of an ant's observation, without its x and y
FORCES = 84  # contact forces, the last numbers in an observation of D4RL's ant

POINTMAZE = (
    "PointMaze's observations flattened to D4RL's layout for maze2d: (x, y, vx, vy), goals dropped. "
    "Its maze is centred on the origin, with x along the columns and y up the rows; "
    "in D4RL x counts rows and y counts columns. A goal is reached within 0.45, in D4RL within 0.5"
)
ANTMAZE = (
    "AntMaze's observations flattened to D4RL's layout: x and y (the achieved goal), then the ant's first "
    "27 numbers; goals, and contact forces if there are any, dropped. "
    "Its maze is centred on the origin with y up; "
    "in D4RL the origin is in the ant's first cell, and y grows with the row. "
    "Its ant has steps of 0.05 s and gear 150, in D4RL 0.1 s and 30. "
    "A goal is reached within 0.45, in D4RL within 0.5"
)
NOTES = {  # start of a Minari id -> how its data differ from D4RL's dataset of the same name
    "D4RL/pointmaze/": "the goal changes during the data, and an episode is cut where it is reached; "
    "rewards belong to a goal that the observation no longer shows; "
    "D4RL's maze2d has one goal for all episodes",
    "D4RL/antmaze/": "a continuing task: the ant stays at the goal and is rewarded until the time limit, "
    "but D4RL's episodes end at the goal; "
    "only about 250,000 of the million rows come before the goal is reached; "
    "returns and normalised scores do not compare with D4RL's",
    **dict.fromkeys(
        ("D4RL/door/", "D4RL/hammer/", "D4RL/relocate/"),
        "D4RL's actions re-simulated; unless this was done with gymnasium-robotics 1.2.0, "
        "dense rewards contain the distance between palm and object with the wrong sign "
        "(+0.1 instead of -0.1), which adds about 1 to 10 to a return",
    ),
    "D4RL/pen/": "D4RL's actions re-simulated; where D4RL ended an episode because the pen fell, "
    "the episode here goes on into the next one",
    "D4RL/kitchen/": "demonstrations replayed in FrankaKitchen-v1, with other noise and other starts: "
    "these are not D4RL's trajectories, and an observation is not D4RL's 60 numbers",
    "mujoco/": "Gymnasium's v5 environments, and other policies than D4RL's: "
    "not comparable with results on D4RL's datasets",
}


def notes(dataset_id: str) -> list[str]:
    """What to know about Farama's dataset of this id before comparing results with D4RL's."""
    return [note for start, note in NOTES.items() if dataset_id.startswith(start)]


def flat_obs(node: np.ndarray | dict, found: list[str]) -> np.ndarray:
    """An episode's observations as one array [T + 1, ...], from an array or nested dictionaries of arrays.

    The array has D4RL's layout if D4RL has the task. The arrays of other dictionaries are joined in the
    alphabetical order of their keys. Notes that say what was done are appended to `found`.
    """
    if not isinstance(node, dict):
        return node
    if set(node) == GOAL_TASK and not any(isinstance(leaf, dict) for leaf in node.values()):
        obs, position = node["observation"], node["achieved_goal"]
        if (obs.shape[1:], position.shape[1:]) == ((4,), (2,)):
            found.append(POINTMAZE)
            return obs
        if obs.shape[1:] in ((ANT,), (105,)) and position.shape[1:] == (2,):
            found.append(ANTMAZE)
            return np.concatenate([position, obs[:, :ANT]], axis=1)
    by_number = all(re.fullmatch(r"_index_\d+", key) for key in node)  # Minari's names of a tuple's parts
    keys = sorted(node, key=(lambda key: int(key.removeprefix("_index_"))) if by_number else None)
    found.append(f"dictionary observations flattened in the order {', '.join(keys)}")
    leaves = [flat_obs(node[key], found) for key in keys]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def empty_forces(obs: np.ndarray) -> bool:
    """Whether `obs` [N, 111] or [N, 112] are observations of an ant whose contact forces are all zero.

    Old MuJoCo left these forces zero in D4RL's data.
    """
    return obs.shape[1] in (ANT + FORCES, ANT + 1 + FORCES) and not obs[:, -FORCES:].any()


# --- bodies ---

BODIES = {  # (size of an observation, size of an action) -> the environments that have these sizes
    (2, 2): "point-mass-wall", (4, 2): "maze2d or PointMaze", (11, 3): "hopper",
    (17, 6): "halfcheetah or walker2d", (27, 8): "ant", (28, 8): "ant with its x", (29, 8): "antmaze",
    (105, 8): "Gymnasium's Ant-v5", (111, 8): "ant with contact forces",
    (348, 17): "Gymnasium's Humanoid-v5", (376, 17): "humanoid",
    (39, 28): "door", (46, 26): "hammer", (45, 24): "pen", (39, 30): "relocate", (60, 9): "kitchen",
}  # fmt: skip


def body(obs_size: int, action_size: int) -> str:
    """The environments that data of these sizes probably come from, in words; empty if none is known."""
    return BODIES.get((obs_size, action_size), "")
