"""D4RL's reference scores, and returns normalised by them: 0 is a random policy, 100 an expert.

The numbers come from D4RL (d4rl/infos.py at 89141a6; those of maze2d v0 from d4rl/pointmaze/__init__.py).
Gymnasium's and Minari's tasks use the scores of D4RL's family of the same name. Some of these tasks differ
from D4RL's in physics or reward. Where we know of this, the card of a dataset says so.
"""

import re

import numpy as np

from ooo_rl.data.datasets import files, public

# Family -> (random, expert) return. The first family that a name contains counts, so longer names come first.
REFERENCES = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "antmaze": (0.0, 1.0),
    "ant": (-325.6, 3879.7),
    "kitchen": (0.0, 4.0),
    "maze2d-open-dense": (11.17817, 27.166538620695782),
    "maze2d-umaze-dense": (68.537689, 193.66285642381482),
    "maze2d-medium-dense": (44.264742, 297.4552547777125),
    "maze2d-large-dense": (30.569041, 303.4857382709002),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "maze2d-open": (0.01, 20.66),
    "pen": (96.262799, 3076.8331017826877),
    "hammer": (-274.856578, 12794.134825156867),
    "door": (-56.512833, 2880.5693087298737),
    "relocate": (-6.425911, 4233.877797728884),
}
# D4RL's id -> the same, where its first version had shorter episodes. All other names of maze2d mean v1.
MAZE2D_V0 = {
    "maze2d-umaze-v0": (0.94, 62.6),
    "maze2d-medium-v0": (5.77, 85.14),
    "maze2d-large-v0": (4.83, 191.99),
    "maze2d-umaze-dense-v0": (23.249793, 81.78995240126592),
    "maze2d-medium-dense-v0": (19.47762, 96.03474232952358),
    "maze2d-large-dense-v0": (27.38831, 215.09965671563742),
}
# Words of variants without a reference: their returns are on another scale, or D4RL gives none.
WITHOUT = "sparse", "binary", "walk", "bullet", "eval"


def reference(name: str) -> tuple[float, float] | None:
    """The (random, expert) return of the environment or dataset `name`; None if it has no reference.

    `name` is for example `hopper-medium-v2`, `D4RL/door/human-v2` or `AdroitHandDoor-v1`. The path of a file
    has none, whatever words are in it, unless the file has the name that D4RL gives to its own. Nor has a
    task that is imported from a module, as `my_tasks:Hopper`.
    """
    if files.is_file(name):
        name = public.d4rl_id(name)
    elif name.startswith(("/", "~", ".")) or ":" in name:
        return None
    if name in MAZE2D_V0:
        return MAZE2D_V0[name]
    words = re.sub(r"[^a-z0-9]+", "-", re.sub(r"AdroitHand|Franka", "-", name).lower())
    if any(word in words.split("-") or words.endswith(word) for word in WITHOUT) or re.search(
        r"sparse", words
    ):
        return None
    dense = "dense" in words
    for family, scores in REFERENCES.items():
        task, _, size = family.removesuffix("-dense").partition("-")
        matches = re.search(rf"(^|-){task}(-|$)", words) and (
            not size or re.search(rf"(^|-){size}(-|$)", words)
        )
        if matches and task == "antmaze" and dense:
            return None
        if matches and (task != "maze2d" or family.endswith("-dense") == dense):
            return scores
    return None


def scored(name: str, rewards: np.ndarray, episode: np.ndarray) -> np.ndarray:
    """What D4RL scores of each episode: its return or, in the kitchen, how many sub-tasks it solves.

    `rewards` [N] are those of the dataset `name`, `episode` [N] the numbers of their episodes, from 0 on.
    Rewards of the kitchen count the sub-tasks solved so far (D4RL's files, and ours), or the newly solved
    ones (Minari's). Only the first kind has returns above 4.
    """
    returns = np.bincount(episode, rewards)
    if reference(name) != REFERENCES["kitchen"] or returns.max() <= REFERENCES["kitchen"][1]:
        return returns
    solved = np.zeros(len(returns))
    np.maximum.at(solved, episode, rewards)
    return solved


def normalized_score(name: str, returns) -> np.ndarray | None:
    """100 * (return - random) / (expert - random) for each of `returns`; None if there is no reference."""
    scores = reference(name)
    return (
        None
        if scores is None
        else 100 * (np.asarray(returns, np.float64) - scores[0]) / (scores[1] - scores[0])
    )
