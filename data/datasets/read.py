"""Reads offline datasets from files into validated flat arrays.

A file is part of a Minari dataset (`minari_files.py`), or it is an HDF5 or .npz file (`flat.py`). `load`
returns the same arrays for all of them, and keeps terminations and truncations apart. If the data are bad, it
says what is wrong and where. What only concerns D4RL's and Farama's datasets is in `public.py`.
"""

import os
import pathlib

from ooo_rl.data.datasets import flat, minari_files
from ooo_rl.data.datasets.folder import METADATA, MINARI_FILE
from ooo_rl.data.datasets.validate import LIMIT, Dataset, drop_empty_forces, finish, validate


def load(
    path: str | pathlib.Path,
    name: str = "",
    *,
    clip_actions: float = LIMIT,
    clip_out_of_range: bool = False,
    action_box: tuple[float, float] | None = None,
) -> Dataset:
    """Reads the dataset in the file `path`. Its card calls it `name`, or by its path if there is no name.

    Actions are rescaled to [-1, 1] from `action_box` (lowest, highest); None and (0, 0) stand for the box
    that the file itself gives, and a file that gives none is taken as it is. Actions outside are refused,
    unless `clip_out_of_range` allows them. All actions are then clipped to +-`clip_actions`. Raises
    DatasetError for a bad file. Never uses the network.
    """
    path = pathlib.Path(os.path.expanduser(path))
    name = name or str(path)
    raw = minari_files.read(path, name) if path.name in (MINARI_FILE, METADATA) else flat.read(path)
    validate(raw, str(path), clip_out_of_range, action_box)
    drop_empty_forces(raw)
    return finish(raw, name, str(path), clip_actions)
