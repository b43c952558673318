"""Loads the models of gymnasium-robotics. The package is not imported, because it prints at import."""

import importlib.util
import pathlib
from collections.abc import Callable

import mujoco


def assets() -> pathlib.Path:
    """The folder in which gymnasium-robotics keeps its models. Raises ValueError if it is not installed."""
    found = importlib.util.find_spec("gymnasium_robotics")
    if found is None or found.origin is None:
        raise ValueError(
            "this task needs a model of gymnasium-robotics, which is not installed: pip install '.[robotics]'"
        )
    return pathlib.Path(found.origin).parent / "envs" / "assets"


def load_model(file: str, edit: Callable[[mujoco.MjSpec], None] | None = None) -> mujoco.MjModel:
    """Loads the model in `file`, a path below `assets()`, changes it by `edit(spec)`, and compiles it.

    Raises ValueError, with MuJoCo's reason, if MuJoCo cannot load the file.
    """
    path = assets() / file
    try:
        spec = mujoco.MjSpec.from_file(str(path))
        if edit:
            edit(spec)
        return spec.compile()
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: MuJoCo refuses this model ({reason}); reinstall gymnasium-robotics"
        ) from None
