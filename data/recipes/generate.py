"""Makes our datasets, as Minari datasets in the namespace `ooo/`.

    python data/recipes/generate.py maze2d-large --transitions 1000000
    python data/recipes/generate.py hopper-medium --policy hopper_medium.npz --transitions 200000
    python data/recipes/generate.py door-cloned --demonstrations door_human_original.npz

The metadata of a dataset say how it was made, with seed, versions and behaviour policy.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ooo_rl.data.datasets.card import print_card
from ooo_rl.data.errors import DatasetError, UsageError, guarded
from ooo_rl.data.recipes import library


@dataclass(frozen=True)
class Args:
    """Makes one of our datasets.

    Loading a dataset by its id makes it too, with these defaults, if it needs no file and little time.
    """

    dataset: Annotated[str, tyro.conf.Positional]
    """the dataset, e.g. maze2d-large, antmaze-large-diverse, hopper-medium or ooo/hopper/medium-v0"""
    transitions: int = 0
    """number of rows, before the recipe removes any; 0: D4RL's number"""
    policy: tuple[str, ...] = ()
    """behaviour policies (.npz): one for medium or expert, two for medium-expert; optional for antmaze"""
    demonstrations: str = ""
    """recorded demonstrations (.npz); for a hand, successful episodes of a --policy may replace them"""
    id: str = ""
    """id to write the dataset under, instead of its own"""
    seed: int = 0
    """seed of everything random"""
    physics: str = "auto"
    """physics engine, for environments that need one"""


def check_sources(name: str, args: Args) -> None:
    """Raises UsageError unless `args` has the policies and demonstrations that the dataset `name` needs."""
    recipe, given = library.RECIPES[name], len(args.policy)
    if recipe.demonstrations == "file" and (given or not args.demonstrations):
        raise UsageError(
            f"{name} is made from recorded demonstrations: give --demonstrations FILE, and no --policy"
        )
    if recipe.demonstrations == "any" and (given, bool(args.demonstrations)) not in ((1, False), (0, True)):
        raise UsageError(
            f"{name} takes either --demonstrations FILE, or one --policy, "
            "whose successful episodes replace them"
        )
    if recipe.demonstrations != "none":
        return
    if args.demonstrations:
        raise UsageError(f"{name} is not made from demonstrations; drop --demonstrations")
    if given not in recipe.policies:
        hint = "; data/recipes/train_policy.py trains one" if min(recipe.policies) else ""
        raise UsageError(
            f"{name} takes {' or '.join(map(str, recipe.policies))} --policy files, not {given}{hint}"
        )


def main() -> None:
    args = tyro.cli(Args)
    name = library.full_id(args.dataset)
    check_sources(name, args)
    if args.transitions < 0 or args.seed < 0:
        raise UsageError(
            f"--transitions and --seed must be at least 0, not {args.transitions} and {args.seed}"
        )
    try:
        library.make(
            name, args.id, args.transitions, args.seed, args.policy, args.physics, args.demonstrations
        )
    except DatasetError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from None
    print_card(library.load(args.id or name).card)


if __name__ == "__main__":
    guarded(main)
