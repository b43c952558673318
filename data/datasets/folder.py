"""Where datasets are on disk."""

import os
import pathlib

MINARI_FILE = "main_data.hdf5"  # a Minari dataset's file in its folder data/; arrow's has many
METADATA = "metadata.json"  # beside it


def folder(variable: str, default: str) -> pathlib.Path:
    """The folder that the environment variable names, by default `default`; a leading ~ is the home folder.

    The ~ stays where there is no home folder, as for a user without an entry in /etc/passwd. So reading finds
    nothing there, and says where it looked.
    """
    return pathlib.Path(os.path.expanduser(os.environ.get(variable) or default))


def datasets_root() -> pathlib.Path:
    """The folder of all Minari datasets: $MINARI_DATASETS_PATH, by default ~/.minari/datasets."""
    return folder("MINARI_DATASETS_PATH", "~/.minari/datasets")
