"""The library of datasets: names lead to files and recipes, and a recipe knows what it needs."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from ooo_rl import envs
from ooo_rl.data import policy
from ooo_rl.data.datasets import write
from ooo_rl.data.errors import DatasetError, UsageError
from ooo_rl.data.recipes import adroit, library
from ooo_rl.data.recipes.library import RECIPES
from ooo_rl.data.recipes.recipe import Recipe

SHORT = {name: name.removeprefix("ooo/").removesuffix("-v0").replace("/", "-") for name in RECIPES}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Empty folders of Minari's and of D4RL's datasets."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def three_rows(value=0.0):
    rows = np.zeros((3, 2)) + value
    return [write.episode(rows, rows[0], rows, rows[:, 0], np.zeros(3))]


@pytest.fixture
def made(root, monkeypatch):
    """A recipe ooo/fake/some-v0 of three rows, and the (transitions, seed, sources) with which it was asked
    for them."""
    asked = []

    def episodes(env, transitions, seed, sources):
        asked.append((transitions, seed, sources))
        return three_rows()

    monkeypatch.setitem(RECIPES, "ooo/fake/some-v0", Recipe("point-mass-wall", episodes, 7, "three rows"))
    return asked


# --- recipes ---


@pytest.mark.parametrize(
    ("needs", "made_on_first_use"),
    [
        ({}, True),
        ({"policies": (0, 1)}, True),
        ({"policies": (1,)}, False),
        ({"policies": (2,)}, False),
        ({"demonstrations": "file"}, False),
        ({"demonstrations": "any"}, False),
        ({"by_hand": True}, False),
        ({"policies": (0, 1), "by_hand": True}, False),
    ],
)
def test_what_needs_nothing_is_made_on_first_use(needs, made_on_first_use):
    assert Recipe("hopper", list, 10, "", **needs).made_on_first_use == made_on_first_use


def test_which_of_ours_are_made_on_first_use():
    made = {SHORT[name] for name, recipe in RECIPES.items() if recipe.made_on_first_use}
    assert {"point-mass-wall-over", "hopper-random", "maze2d-large-noisy", "antmaze-umaze-noisy"} <= made
    left = set(SHORT.values()) - made
    assert {
        "hopper-medium",
        "ant-medium-expert",
        "walker2d-medium-replay",
        "door-human",
        "pen-cloned",
    } <= left
    assert {"relocate-binary-mixed", "hammer-truncated-expert-expert", "halfcheetah-expert"} <= left


def test_every_recipe_is_whole():
    for name, recipe in RECIPES.items():
        assert name.startswith("ooo/") and name.endswith("-v0") and recipe.description, name
        assert {recipe.env, *recipe.also} <= set(envs.names()) and recipe.transitions >= 0, name
        assert recipe.policies and all(number in (0, 1, 2, 4) for number in recipe.policies), name
        assert bool(recipe.read) == (recipe.demonstrations != "none"), name
    assert len(RECIPES) == sum(len(family.RECIPES) for family in library.FAMILIES)


LAYER = [(np.zeros((4, 2)), np.zeros(2))]
NOISY, STILL = policy.mlp(LAYER, log_std=np.zeros(2)), policy.mlp(LAYER)
FUNCTION = {"jax_mean": np.uint8([0]), "jax_sample": np.uint8([0])}
SHOWN = adroit.Demonstrations(pathlib.Path("shown.npz"), *[np.zeros((3, 1))] * 3, [np.zeros((2, 1))] * 3)


@pytest.mark.parametrize(
    ("name", "sources", "episodes", "said"),
    [
        ("hopper/medium", [NOISY], 1, "Sampled actions of a medium policy"),
        ("hopper/medium", [STILL], 1, "Mean actions of a medium policy"),
        ("ant/expert", [FUNCTION], 1, "Sampled actions of an expert policy"),
        (
            "ant/medium-expert",
            [STILL, NOISY],
            2,
            "Half mean actions of a medium policy, half sampled actions of an expert policy",
        ),
        ("door/expert", [NOISY], 1, "Sampled actions of an expert policy (D4RL)"),
        ("door/expert", [STILL], 1, "Mean actions of an expert policy"),
        (
            "pen-binary/mixed",
            [SHOWN],
            503,
            "Demonstrations, and 500 roll-outs of a policy cloned from them (AWAC, OOO)",
        ),
        (
            "door-binary/mixed",
            [NOISY],
            26,
            "Demonstrations, and 1 roll-out of a policy cloned from them (AWAC, OOO)",
        ),
        (
            "hammer-truncated-expert/expert",
            [NOISY],
            5000,
            "The first 20 steps of 5,000 expert episodes (OOO)",
        ),
        ("hammer-truncated-expert/expert", [NOISY], 7, "The first 20 steps of 7 expert episodes (OOO)"),
        ("hopper/random", [], 1, "Uniform random actions"),
    ],
)
def test_a_description_says_what_was_done(name, sources, episodes, said):
    assert RECIPES[f"ooo/{name}-v0"].describe(sources, three_rows() * episodes) == said


def test_behaviour_that_came_from_a_file_is_named_by_it(root, made, tmp_path, monkeypatch):
    def recipe_of(name):
        return json.loads(library.load(name).card["recipe"])

    library.make("ooo/fake/some-v0")
    assert recipe_of("ooo/fake/some-v0")["behaviour"] == "built in"
    file = dataclasses.replace(
        RECIPES["ooo/fake/some-v0"], demonstrations="any", read=lambda path, env: [path] * 3
    )
    monkeypatch.setitem(RECIPES, "ooo/fake/shown-v0", file)
    library.make("ooo/fake/shown-v0", demonstrations=str(tmp_path / "shown.npz"))
    recipe = recipe_of("ooo/fake/shown-v0")
    assert recipe["behaviour"] == ["shown.npz"] and recipe["demonstrations"] == "3 recorded ones, shown.npz"


# --- names ---


def test_every_short_name_leads_to_its_dataset():
    for name, short in SHORT.items():
        assert library.full_id(short) == library.full_id(name) == name


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ("point-mass-wall", "ooo/point-mass-wall/over-v0"),
        ("maze2d-umaze-dense", "ooo/maze2d-umaze-dense/noisy-v0"),
        ("antmaze-large-diverse", "ooo/antmaze-large-diverse/noisy-v0"),
        ("door-binary", "ooo/door-binary/mixed-v0"),
        ("door-binary-ending", "ooo/door-binary/mixed-v0"),  # the data of another environment, too
        ("hammer-truncated-expert", "ooo/hammer-truncated-expert/expert-v0"),
        ("hopper", "none"),  # there is a choice
        ("door", "none"),
        ("kitchen-complete", "ooo/kitchen-complete/human-v0"),
        ("probe-match-obs", "none"),
        ("no-such-env", "none"),
        ("", "none"),
    ],
)
def test_the_only_dataset_for_an_environment(env, name):
    assert library.only_one_for(env) == name
    if name == "none":
        with pytest.raises(UsageError, match="unknown dataset"):
            library.full_id(env)
    elif env == RECIPES[name].env:
        assert library.full_id(env) == name


@pytest.mark.parametrize(
    ("name", "near"), [("hopper-mediun", "hopper-medium"), ("ooo/hopper/medum-v0", "ooo/hopper/med")]
)
def test_an_unknown_name_is_told_the_near_ones(name, near):
    with pytest.raises(
        UsageError, match=f"unknown dataset '{name}'; did you mean .*{near}.*All: .*ooo/door/human-v0"
    ):
        library.full_id(name)


# --- files ---


def test_ours_are_made_once_under_their_id(root, made):
    file = library.find("ooo/fake/some-v0")
    assert file.is_relative_to(root / "ooo" / "fake" / "some-v0") and library.find("ooo/fake/some-v0") == file
    assert made == [(7, 0, [])]
    data = library.load("ooo/fake/some-v0")
    assert (data.card["id"], data.card["transitions"], data.card["source"]) == (
        "ooo/fake/some-v0",
        3,
        str(file),
    )
    library.make("ooo/fake/some-v0", "ooo/fake/other-v0", transitions=2, seed=5)
    assert made[1:] == [(2, 5, [])] and library.load("ooo/fake/other-v0").card["transitions"] == 3


def test_a_dataset_that_another_process_has_just_made_is_taken(root, made, monkeypatch):
    def make(name):
        write.write_minari(name, three_rows(1.0), description="theirs")
        raise DatasetError(f"the dataset {name} exists already")

    monkeypatch.setattr(library, "make", make)
    assert (library.load("ooo/fake/some-v0").transitions.obs == 1).all() and made == []


def test_a_dataset_that_cannot_be_made_says_why(root, made, monkeypatch):
    def make(name):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(library, "make", make)
    with pytest.raises(OSError, match="No space left"):
        library.find("ooo/fake/some-v0")


def test_what_is_made_by_hand_is_not_made(root, made, monkeypatch):
    by_hand = dataclasses.replace(RECIPES["ooo/fake/some-v0"], policies=(1,))
    monkeypatch.setitem(RECIPES, "ooo/fake/some-v0", by_hand)
    with pytest.raises(
        DatasetError, match=r"is made by hand: python data/recipes/generate\.py ooo/fake/some-v0"
    ):
        library.find("ooo/fake/some-v0")
    assert made == [] and not root.exists()


def test_files_are_found_by_path_and_by_folder(root, tmp_path, monkeypatch):
    path = tmp_path / "rows.npz"
    np.savez(path, observations=np.zeros((1, 2)))
    assert library.find(str(path)) == path
    with pytest.raises(DatasetError, match=r"absent\.npz: there is no such file"):
        library.find(str(tmp_path / "absent.npz"))
    write.write_minari("own/some-v0", three_rows(), description="")
    by_id = library.find("own/some-v0")
    assert by_id.is_relative_to(root / "own" / "some-v0")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "elsewhere"))
    assert library.find(str(root / "own" / "some-v0")) == by_id
    with pytest.raises(DatasetError, match="unknown dataset 'own/some-v0'; near it"):
        library.find("own/some-v0")


def test_an_unknown_dataset_is_told_the_near_ones_on_disk_and_of_ours(root):
    write.write_minari("own/hopper-v0", three_rows(), description="")
    with pytest.raises(
        DatasetError, match=r"unknown dataset 'own/hoper-v0'; near it.*own/hopper-v0.*ooo/hopper/"
    ):
        library.find("own/hoper-v0")
