"""Makes the datasets that are ours to make, as Minari datasets in our own namespace `ooo/`.

    python data/generate.py maze2d-large --transitions 1000000
    python data/generate.py hopper-medium --policy hopper_medium.npz --transitions 200000
    python data/generate.py door-cloned --demonstrations door_human_original.npz

`data/collect.py` and `data/hands.py` have the behaviours. How a dataset was made goes into its metadata, with seed, versions and
behaviour policy.
"""

import difflib
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Annotated

import tyro

import envs
from data import cli, collect, datasets, hands, policy

BODIES = ("halfcheetah", "hopper", "walker2d", "ant")
HANDS = {"door": 1_000_000, "hammer": 1_000_000, "pen": 500_000, "relocate": 1_000_000}  # rows of D4RL's expert and cloned data
NUM_POLICIES = {"random": 0, "medium": 1, "expert": 1, "medium-expert": 2}  # `--policy` files that a locomotion dataset takes


@dataclass(frozen=True)
class Recipe:
    """How to make one dataset: its environment, its episodes, its default size, and what the metadata say of it."""

    env: str
    episodes: Callable[..., list[dict]]  # (environment, transitions, seed, policies) -> episodes
    transitions: int  # 0: the paper's 100 episodes, or all demonstrations
    description: str
    num_policies: int = 0
    recipe: str = ""
    demonstrations: str = ""  # "file": they must be recorded ones; "any": successful episodes of a --policy may stand in


def _recipes() -> dict[str, Recipe]:
    found = {
        f"ooo/{name}/over-v0": Recipe(name, collect.over_the_wall, 0, "Noisy demonstrations over the wall (OOO, section 5.1)",
                                      recipe=f"way-points {collect.WAYPOINTS.tolist()}, action noise {collect.NOISE}")
        for name in ("point-mass-wall", "point-mass-wall-sparse")
    }  # fmt: skip
    for body in BODIES:
        for kind, count in NUM_POLICIES.items():
            how = collect.medium_expert if count == 2 else collect.play
            about = {0: "Uniform random actions", 1: f"Sampled actions of a {kind} policy", 2: "Half medium, half expert policy"}[count]
            found[f"ooo/{body}/{kind}-v0"] = Recipe(body, how, 1_000_000 * max(count, 1), about, count)
        found[f"ooo/{body}/medium-replay-v0"] = Recipe(body, collect.replay, 200_000, "The replay buffer of brax's SAC as it learns")
    for maze, size in (("open", 1_000_000), ("umaze", 1_000_000), ("medium", 2_000_000), ("large", 4_000_000)):
        for dense in ("", "-dense"):
            name = f"maze2d-{maze}{dense}"
            found[f"ooo/{name}/noisy-v0"] = Recipe(name, collect.noisy_waypoints, size, "Waypoint controller with action noise 0.5 (D4RL)")
    found["ooo/maze2d-large-missing-data/noisy-v0"] = Recipe(
        "maze2d-large-missing-data",
        collect.missing_data,
        500_000,
        "maze2d-large with three regions cut out (OOO)",
        recipe=f"discs {collect.MISSING}",
    )
    for name in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"):
        kind = name.partition("-")[2] or "fixed"
        found[f"ooo/antmaze-{name}/noisy-v0"] = Recipe(
            f"antmaze-{name}", partial(collect.walks, kind=kind), 1_000_000, "A walking ant led by waypoints, action noise 0.2 (D4RL)"
        )
    found["ooo/antmaze-large-goal-missing/noisy-v0"] = Recipe(
        "antmaze-large-goal-missing",
        collect.goal_missing,
        1_000_000,
        "antmaze-large-diverse with the goal cut out (OOO)",
        recipe=f"disc {collect.GOAL_MISSING}",
    )
    return found | _hand_recipes()


def _hand_recipes() -> dict[str, Recipe]:
    found = {}
    for task, rows in HANDS.items():
        found[f"ooo/{task}/human-v0"] = Recipe(task, hands.human, 0, "Human demonstrations, replayed", demonstrations="file")
        found[f"ooo/{task}/expert-v0"] = Recipe(task, collect.play, rows, "Sampled actions of an expert policy (D4RL)", 1)
        found[f"ooo/{task}/cloned-v0"] = Recipe(
            task, hands.cloned, rows, "Half roll-outs of a policy cloned from demonstrations, half these, repeated (D4RL)",
            demonstrations="any",
        )  # fmt: skip
        if task != "hammer":
            found[f"ooo/{task}-binary/mixed-v0"] = Recipe(
                f"{task}-binary", hands.mixed, 500 * hands.CLONED_STEPS,
                "Demonstrations, and 500 roll-outs of a policy cloned from them (AWAC, OOO)", demonstrations="any",
            )  # fmt: skip
    found["ooo/hammer-truncated-expert/expert-v0"] = Recipe(
        "hammer-truncated-expert", hands.truncated, 5_000 * hands.TRUNCATED_STEPS, "The first 20 steps of 5,000 expert episodes (OOO)", 1
    )
    return found


RECIPES = _recipes()
GENERATED = {  # these are made on first use: no policy is needed, and none has to be trained
    name: recipe
    for name, recipe in RECIPES.items()
    if not recipe.num_policies and not recipe.demonstrations and recipe.episodes is not collect.replay
}


def own_id(name: str) -> str:
    """Our id for `name`: an id of ours itself, or a short name such as `hopper-medium`, `maze2d-large` or `antmaze-large-play`."""
    short = {key.removeprefix("ooo/").removesuffix("-v0").replace("/", "-"): key for key in RECIPES}
    short |= {recipe.env: key for key, recipe in RECIPES.items() if recipe.env not in (*BODIES, *HANDS)}
    if name in RECIPES or name in short:
        return short.get(name, name)
    near = difflib.get_close_matches(name, [*short, *RECIPES], n=3) or list(RECIPES)
    raise cli.UsageError(f"unknown dataset {name!r}; did you mean {', '.join(near)}? All: {', '.join(RECIPES)}")


def make(
    name: str, dataset_id: str = "", transitions: int = 0, seed: int = 0, policies: tuple[str, ...] = (), physics: str = "auto",
    demonstrations: str = "",
) -> None:  # fmt: skip
    """Generates the dataset `name` (an id of ours) and writes it under `dataset_id`, or `name`; whole or not at all."""
    chosen = RECIPES[name]
    datasets.check_free(dataset_id or name)
    datasets.check_writable()
    env = envs.make(chosen.env, physics)
    loaded = [policy.load(path) for path in policies]
    expected = (27, 8) if chosen.env.startswith("antmaze") else (env.observation_size, env.action_size)
    for path, actor in zip(policies, loaded):
        if policy.policy_sizes(actor) != expected:
            raise cli.UsageError(
                f"--policy {path}: takes {policy.policy_sizes(actor)[0]} observations and gives {policy.policy_sizes(actor)[1]} actions; "
                f"{name} needs {expected[0]} and {expected[1]}"
            )
    sources = [hands.load_demonstrations(demonstrations, env)] if demonstrations else loaded
    episodes = chosen.episodes(env, transitions or chosen.transitions, seed, sources)
    behaviour = [
        f"{path.name} ({', '.join(str(actor[k]) for k in ('algo', 'source') if k in actor)})"
        for path, actor in zip(map(pathlib.Path, policies), loaded)
    ]
    recipe = {
        "made_by": f"data/generate.py {name}", "how": chosen.description, "detail": chosen.recipe, "env": chosen.env, "engine": env.backend,
        "seed": seed, "transitions": sum(len(e["rewards"]) for e in episodes), "behaviour": behaviour or "built in",
        "versions": {package: version(package) for package in ("jax", "mujoco", "gymnasium", "brax")},
    }  # fmt: skip
    if chosen.demonstrations:
        recipe["demonstrations"] = (
            f"{len(sources[0].actions)} recorded ones, {pathlib.Path(demonstrations).name}" if demonstrations
            else f"{hands.STAND_INS} successful episodes of the policy stand in for human ones"
        )  # fmt: skip
    datasets.write_minari(dataset_id or name, episodes, description=chosen.description, recipe=recipe)


@dataclass(frozen=True)
class Args:
    """Makes one of our datasets. Loading one by its id makes it too, with these defaults, where no policy is needed."""

    dataset: Annotated[str, tyro.conf.Positional]
    """which one, e.g. maze2d-large, antmaze-large-diverse, hopper-medium or ooo/hopper/medium-v0"""
    transitions: int = 0
    """rows before any are cut out; 0: D4RL's number"""
    policy: tuple[str, ...] = ()
    """behaviour policies (.npz): one for medium and expert, two for medium-expert; a walker (optional) for antmaze"""
    demonstrations: str = ""
    """recorded demonstrations (.npz) of a hand; without them, successful episodes of the --policy stand in"""
    id: str = ""
    """write it under this id instead"""
    seed: int = 0
    """seed of everything random"""
    physics: str = "auto"
    """engine, for bodies that have one"""


def check_sources(name: str, args: Args) -> None:
    """A UsageError unless the dataset `name` gets the policies and demonstrations that it is made of."""
    recipe, given = RECIPES[name], len(args.policy)
    if recipe.demonstrations == "file" and (given or not args.demonstrations):
        raise cli.UsageError(f"{name} is made of --demonstrations FILE, recorded ones, and of nothing else")
    if recipe.demonstrations == "any" and (given, bool(args.demonstrations)) not in ((1, False), (0, True)):
        raise cli.UsageError(f"{name} takes either --demonstrations FILE, or one --policy of which successful episodes stand in for them")
    if recipe.demonstrations:
        return
    if args.demonstrations:
        raise cli.UsageError(f"{name} is not made of demonstrations; drop --demonstrations")
    needed = recipe.num_policies
    if given != needed and not (recipe.env.startswith("antmaze") and given == 1):
        hint = "; data/behaviour.py trains one" if needed else ""
        raise cli.UsageError(f"{name} takes {needed} --policy files, not {given}{hint}")


def main() -> None:
    args = tyro.cli(Args)
    name = own_id(args.dataset)
    check_sources(name, args)
    if args.transitions < 0 or args.seed < 0:
        raise cli.UsageError(f"--transitions and --seed must be at least 0, not {args.transitions} and {args.seed}")
    try:
        make(name, args.id, args.transitions, args.seed, args.policy, args.physics, args.demonstrations)
    except datasets.DatasetError:
        raise
    except ValueError as error:
        raise cli.UsageError(str(error)) from None
    datasets.print_card(datasets.load(args.id or name).card)


if __name__ == "__main__":
    cli.guarded(main)
