"""What is known of others' datasets: D4RL's file names, Farama's dictionaries of observations, and how their data differ from D4RL's."""

import os
import pathlib

import h5py
import numpy as np

# --- D4RL's files ---


def d4rl_folder() -> pathlib.Path:
    """Where D4RL keeps what it has downloaded."""
    return pathlib.Path(os.environ.get("D4RL_DATASET_DIR", pathlib.Path.home() / ".d4rl" / "datasets")).expanduser()


def _d4rl_files() -> dict[str, str]:
    files = {}
    for body in ("halfcheetah", "hopper", "walker2d", "ant"):
        for kind in ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert"):
            files |= {f"{body}-{kind}-v{v}": f"{body}_{kind.replace('-', '_')}-v{v}" for v in (1, 2)}
            old = "walker" if (body, kind) == ("walker2d", "medium-replay") else body
            files[f"{body}-{kind}-v0"] = f"{old}_{'mixed' if kind == 'medium-replay' else kind.replace('-', '_')}"
    for size in ("open", "umaze", "medium", "large", "eval-umaze", "eval-medium", "eval-large"):
        for dense in ("", "-dense"):
            name = f"maze2d-{size}{dense or '-sparse'}"
            files |= {f"maze2d-{size}{dense}-v0": name, f"maze2d-{size}{dense}-v1": f"{name}-v1"}
    for size, old in (("umaze", "u-maze"), ("medium", "big-maze"), ("large", "hardest-maze")):
        for kind in ("", "-diverse") if size == "umaze" else ("-play", "-diverse"):
            flags = f"noisy_multistart_{kind != ''}_multigoal_{kind == '-diverse'}_sparse"
            files |= {f"antmaze-{size}{kind}-v0": f"Ant_maze_{old}_{flags}", f"antmaze-{size}{kind}-v1": f"Ant_maze_{size}_{flags}"}
            files[f"antmaze-{size}{kind}-v2"] = f"Ant_maze_{old}_{flags}_fixed"
    for task in ("door", "hammer", "pen", "relocate"):
        files |= {f"{task}-human-v0": f"{task}-v0_demos_clipped", f"{task}-cloned-v0": f"{task}-demos-v0-bc-combined"}
        files[f"{task}-expert-v0"] = f"{task}-v0_expert_clipped"
    kitchen = "kitchen_microwave_kettle_light_slider-v0"
    files |= {"kitchen-complete-v0": f"mini_{kitchen}", "kitchen-partial-v0": kitchen}
    files["kitchen-mixed-v0"] = "kitchen_microwave_kettle_bottomburner_light-v0"
    return {key: f"{value}.hdf5" for key, value in files.items()}


D4RL_FILES = _d4rl_files()  # D4RL's ids -> the names of its files, where these are not `<id>.hdf5`


def d4rl_file(name: str) -> pathlib.Path | None:
    """The file of a D4RL id such as `halfcheetah-medium-v2`, under D4RL's own name or the id's; None if the folder has neither."""
    candidates = (d4rl_folder() / file for file in (D4RL_FILES.get(name), f"{name}.hdf5") if file)
    return next((path for path in candidates if path.is_file()), None)


def d4rl_ids() -> list[str]:
    """The D4RL ids whose files are in D4RL's folder."""
    stems = [path.stem for path in d4rl_folder().glob("*.hdf5")]
    ids = {file: name for name, file in D4RL_FILES.items()}
    return sorted(ids.get(f"{stem}.hdf5", stem) for stem in stems)


# --- Farama's datasets ---

GOAL_TASK = {"achieved_goal", "desired_goal", "observation"}  # the keys of an observation in gymnasium-robotics' goal tasks
ANT = 27  # numbers of the ant without its x and y
FORCES = 84  # numbers of D4RL's ant for contact forces

POINTMAZE = (
    "PointMaze's observations flattened as D4RL's maze2d: (x, y, vx, vy), goals dropped. Its maze is centred on the origin, with x along "
    "the columns and y up the rows, where D4RL's x counts rows and y columns; a goal is reached within 0.45, in D4RL within 0.5"
)
ANTMAZE = (
    "AntMaze's observations flattened as D4RL's: x and y (the achieved goal), then the ant's first 27 numbers; goals, and contact "
    "forces where it has them, dropped. Its maze is centred on the origin with y up, where D4RL's has its origin in the ant's first cell "
    "and y grows with the row; its ant differs too (steps of 0.05 s and gear 150, in D4RL 0.1 s and 30), and a goal is reached within "
    "0.45, in D4RL within 0.5"
)
NOTES = {  # start of a Minari id -> how that data differs from D4RL's of the same name
    "D4RL/pointmaze/": "the goal changes during the data and an episode is cut where it is reached; rewards belong to a goal that the "
    "observation no longer shows, where D4RL's maze2d has one goal for all",
    "D4RL/antmaze/": "a continuing task: the ant stays at the goal and is rewarded until the time limit (only about 250,000 of the million "
    "rows come before that), where D4RL's episodes end at the goal; returns and normalised scores do not compare",
    **dict.fromkeys(
        ("D4RL/door/", "D4RL/hammer/", "D4RL/relocate/"),
        "D4RL's actions re-simulated; unless that was done with gymnasium-robotics 1.2.0, dense rewards have the distance of palm and "
        "object with the wrong sign (+0.1 instead of -0.1), which adds about 1 to 10 to a return",
    ),
    "D4RL/pen/": "D4RL's actions re-simulated; an episode that D4RL ended where the pen fell goes on into the next one",
    "D4RL/kitchen/": "demonstrations replayed in FrankaKitchen-v1, with other noise and other starts: not D4RL's trajectories, nor its "
    "60 numbers of observation",
    "mujoco/": "Gymnasium's v5 environments, and other policies than D4RL's: not comparable with results on D4RL's datasets",
}


def notes(dataset_id: str) -> list[str]:
    """What to know of Farama's dataset of this id before comparing with D4RL."""
    return [note for start, note in NOTES.items() if dataset_id.startswith(start)]


def flat_obs(node: h5py.Dataset | h5py.Group, found: list[str]) -> np.ndarray:
    """An episode's observations as one array [T + 1, ...], in D4RL's layout where D4RL has the task; adds notes to `found`."""
    if isinstance(node, h5py.Dataset):
        return np.asarray(node)
    if set(node) == GOAL_TASK and all(isinstance(leaf, h5py.Dataset) for leaf in node.values()):
        obs, position = np.asarray(node["observation"]), np.asarray(node["achieved_goal"])
        if (obs.shape[1:], position.shape[1:]) == ((4,), (2,)):
            found.append(POINTMAZE)
            return obs
        if obs.shape[1:] in ((ANT,), (105,)) and position.shape[1:] == (2,):
            found.append(ANTMAZE)
            return np.concatenate([position, obs[:, :ANT]], axis=1)
    keys = sorted(node)
    found.append(f"dictionary observations flattened in the order {', '.join(keys)}")
    leaves = [flat_obs(node[key], found) for key in keys]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def empty_forces(obs: np.ndarray) -> bool:
    """Whether `obs` [N, 111] or [N, 112] are an ant's with the contact forces all zero, as old MuJoCo left them in D4RL's data."""
    return obs.shape[1] in (ANT + FORCES, ANT + 1 + FORCES) and not obs[:, -FORCES:].any()


# --- bodies ---

BODIES = {  # (numbers of observation, numbers of action) -> whose they are
    (2, 2): "point-mass-wall", (4, 2): "maze2d or PointMaze", (11, 3): "hopper", (17, 6): "halfcheetah or walker2d", (27, 8): "ant",
    (28, 8): "ant with its x", (29, 8): "antmaze", (105, 8): "Gymnasium's Ant-v5", (111, 8): "ant with contact forces",
    (348, 17): "Gymnasium's Humanoid-v5", (376, 17): "humanoid",
    (39, 28): "door", (46, 26): "hammer", (45, 24): "pen", (39, 30): "relocate", (60, 9): "kitchen",
}  # fmt: skip


def body(obs_size: int, action_size: int) -> str:
    """Of which environments observations and actions of these sizes likely are; empty if of none that is known."""
    return BODIES.get((obs_size, action_size), "")
