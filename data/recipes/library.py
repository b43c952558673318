"""The library of datasets: all recipes by id, and the file of any dataset by its name.

`find` and `load` are here because `data/datasets` reads files and does not know the recipes.
"""

import difflib
import os
import pathlib
from importlib.metadata import version

from ooo_rl import envs
from ooo_rl.data import policy
from ooo_rl.data.datasets import public, read, write
from ooo_rl.data.datasets.files import is_file
from ooo_rl.data.datasets.folder import METADATA, MINARI_FILE, datasets_root
from ooo_rl.data.datasets.validate import LIMIT, Dataset
from ooo_rl.data.errors import DatasetError, UsageError
from ooo_rl.data.recipes import adroit, antmaze, kitchen, locomotion, maze2d, point_mass, toy_maze
from ooo_rl.data.recipes.recipe import Recipe

FAMILIES = (point_mass, locomotion, maze2d, antmaze, adroit, kitchen, toy_maze)
RECIPES: dict[str, Recipe] = {name: recipe for family in FAMILIES for name, recipe in family.RECIPES.items()}


def load(
    name: str,
    *,
    clip_actions: float = LIMIT,
    clip_out_of_range: bool = False,
    action_box: tuple[float, float] | None = None,
) -> Dataset:
    """Loads and validates the dataset `name`: `find` names its file, and `datasets.read.load` reads it.

    `action_box` is the lowest and the highest action; None and (0, 0) mean: as the file says. Raises
    DatasetError if there is no such dataset, or if its data are bad.
    """
    return read.load(
        find(name),
        name,
        clip_actions=clip_actions,
        clip_out_of_range=clip_out_of_range,
        action_box=action_box,
    )


def find(name: str) -> pathlib.Path:
    """The file of the dataset `name`. If there is none, DatasetError says which names are near.

    `name` may be

    * the path of a .npz, .hdf5 or .h5 file;
    * the id or the folder of a Minari dataset on disk;
    * the id of one of our datasets; it is made now if it needs no file from the user and little time;
    * the id of a D4RL file in D4RL's folder.
    """
    path = pathlib.Path(os.path.expanduser(name))
    if is_file(path):
        if not path.is_file():
            raise DatasetError(f"{name}: there is no such file")
        return path
    file = _main_file(datasets_root() / name)
    if not file.is_file() and name in RECIPES and RECIPES[name].made_on_first_use:
        try:
            make(name)
        except (DatasetError, OSError):
            if not file.is_file():  # else another process has just made it
                raise
    if not file.is_file():
        elsewhere = _main_file(path)
        file = elsewhere if elsewhere.is_file() else public.d4rl_file(name) or file
    if file.is_file():
        return file
    if name in RECIPES:
        raise DatasetError(
            f"{name} is not in {datasets_root()} and is made by hand: "
            f"python data/recipes/generate.py {name}. This command says what it needs"
        )
    root = datasets_root()
    known = {
        *RECIPES,
        *public.d4rl_ids(),
        *(str(p.parents[1].relative_to(root)) for p in root.rglob(f"data/{MINARI_FILE}")),
        *(str(p.parents[1].relative_to(root)) for p in root.rglob(f"data/{METADATA}")),
    }
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.3) or sorted(known)
    raise DatasetError(
        f"unknown dataset {name!r}; near it, on disk or made by us: {', '.join(near)}. "
        "Or give the path of an .hdf5 or .npz file, or download a public dataset first: Minari's with "
        f"`minari download {name}`, D4RL's file ({public.D4RL_FILES.get(name, name + '.hdf5')}) "
        f"into {public.d4rl_folder()}"
    )


def _main_file(dataset: pathlib.Path) -> pathlib.Path:
    """The file by which `read.load` knows a Minari dataset; in its formats of many files, metadata.json."""
    data = dataset / "data"
    many = not (data / MINARI_FILE).is_file() and (data / METADATA).is_file()
    return data / (METADATA if many else MINARI_FILE)


def only_one_for(env: str) -> str:
    """The id of our only dataset for the environment `env`; "none" if we have none, or more than one."""
    found = [name for name, recipe in RECIPES.items() if env in (recipe.env, *recipe.also)]
    return found[0] if len(found) == 1 else "none"


def full_id(name: str) -> str:
    """The id of our dataset `name`, which is an id or a short name such as `hopper-medium` or `door-cloned`.

    The name of an environment also works, if we have only one dataset for it. Raises UsageError for other
    names.
    """
    short = {key.removeprefix("ooo/").removesuffix("-v0").replace("/", "-"): key for key in RECIPES}
    short |= {recipe.env: key for key, recipe in RECIPES.items() if only_one_for(recipe.env) == key}
    if name in RECIPES or name in short:
        return short.get(name, name)
    near = difflib.get_close_matches(name, [*short, *RECIPES], n=3) or list(RECIPES)
    raise UsageError(f"unknown dataset {name!r}; did you mean {', '.join(near)}? All: {', '.join(RECIPES)}")


def make(
    name: str,
    dataset_id: str = "",
    transitions: int = 0,
    seed: int = 0,
    policies: tuple[str, ...] = (),
    physics: str = "auto",
    demonstrations: str = "",
) -> None:
    """Makes our dataset `name` and writes it under `dataset_id` (default: `name`), completely or not at all.

    `policies` and `demonstrations` are paths. `transitions` 0 means the number in the recipe. Raises
    DatasetError if the id is taken or cannot be written, and UsageError or ValueError for sources that do
    not fit.
    """
    recipe = RECIPES[name]
    write.check_free(dataset_id or name)
    write.check_writable()
    env = envs.make(recipe.env, physics)
    loaded = [policy.load(path) for path in policies]
    expected = recipe.policy_sizes or (env.observation_size, env.action_size)
    for path, actor in zip(policies, loaded):
        if policy.policy_sizes(actor) != expected:
            takes, gives = policy.policy_sizes(actor)
            raise UsageError(
                f"--policy {path}: takes {takes} observations and gives {gives} actions; "
                f"{name} needs {expected[0]} and {expected[1]}"
            )
        if policy.is_discrete(actor) != envs.is_discrete(env):
            raise UsageError(f"--policy {path}: of it and {name}, only one has discrete actions")
    sources = [recipe.read(demonstrations, env)] if demonstrations else loaded
    episodes = recipe.episodes(env, transitions or recipe.transitions, seed, sources)
    description = recipe.describe(sources, episodes)
    behaviour = [
        f"{path.name} ({', '.join(str(actor[k]) for k in ('algo', 'source') if k in actor)})"
        for path, actor in zip(map(pathlib.Path, policies), loaded)
    ]
    if demonstrations:
        behaviour = [pathlib.Path(demonstrations).name]
    record = {
        "made_by": f"data/recipes/generate.py {name}", "how": description, "detail": recipe.detail,
        "env": recipe.env, "engine": env.backend, "seed": seed,
        "transitions": sum(len(e["rewards"]) for e in episodes), "behaviour": behaviour or "built in",
        "versions": {package: version(package) for package in ("jax", "mujoco", "gymnasium", "brax")},
    }  # fmt: skip
    if recipe.demonstrations != "none":
        record["demonstrations"] = (
            f"{len(sources[0])} recorded ones, {pathlib.Path(demonstrations).name}"
            if demonstrations
            else f"{adroit.STAND_INS} successful episodes of the policy stand in for human ones"
        )
    about = {"description": description, "recipe": record}
    choices = env.action_size if envs.is_discrete(env) else 0
    write.write_minari(dataset_id or name, episodes, **about, choices=choices)
