"""What the files of algos/ share stays the same word for word, and the house keeps its order."""

import ast
import pathlib

import pytest

REPO = pathlib.Path(__file__).parents[1]
ALGOS = sorted(p for p in (REPO / "algos").glob("*.py") if p.name != "__init__.py")
OWN = "one of its own in every file"
DIFFERENT = {  # name: (why files define it differently, which of them share it)
    "Args": ("settings of the method", OWN),
    "Hyper": ("traced settings of the method", OWN),
    "MLP": ("IQL's policies know dropout, SAC's critics LayerNorm, and small last layers", "iql ooo_iql | sac"),
    "Actor": ("IQL's Gaussian is not squashed, and its deviation does not depend on the state", "iql ooo_iql | sac"),
    "Critic": ("SAC's ensembles have any size", "iql ooo_iql | sac"),
    "Nets": ("IQL has a value function", "iql ooo_iql | sac"),
    "Agent": ("IQL has a value function, SAC's family an entropy weight", "iql ooo_iql | sac"),
    "init_agent": ("builds Agent", "iql ooo_iql | sac"),
    "critic_loss": ("the equation's number", "iql ooo_iql | sac"),
    "actor_loss": ("the heart of the method", "iql ooo_iql | sac"),
    "act": ("how a policy's output becomes an action", "iql ooo_iql | sac"),
    "update": ("the heart of the method", OWN),
    "Setup": ("OOO has a bonus", "iql sac | ooo_iql"),
    "State": ("OOO has two agents and a bonus", "iql sac | ooo_iql"),
    "init_state": ("builds State", OWN),
    "pretrain_chunk": ("IQL has a learning-rate schedule, OOO a bonus, SAC other batches", OWN),
    "finetune_chunk": ("how batches are mixed, and random steps before SAC", OWN),
    "make_setup": ("builds Setup", OWN),
    "main": ("phases of the method", OWN),
}


def definitions(path):
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def shared() -> dict[str, set[frozenset[str]]]:
    """For each name that several files define, which files have the same code under it."""
    variants: dict[str, dict[str, set[str]]] = {}
    for path in ALGOS:
        for name, node in definitions(path).items():
            variants.setdefault(name, {}).setdefault(ast.dump(node), set()).add(path.stem)
    return {name: {frozenset(files) for files in codes.values()} for name, codes in variants.items() if sum(map(len, codes.values())) > 1}


SHARED = shared()


@pytest.mark.parametrize("name", sorted(SHARED))
def test_same_name_same_code(name):
    found, (_, groups) = SHARED[name], DIFFERENT.get(name, ("", ""))
    everywhere = {file for files in found for file in files}
    if groups == OWN:
        expected = {frozenset([file]) for file in everywhere}
    else:
        expected = {frozenset(group.split()) for group in groups.split("|")} if groups else {frozenset(everywhere)}
    assert found == expected, f"{name}: the same code in {sorted(map(sorted, found))}, but listed {sorted(map(sorted, expected))}"


def test_the_list_of_differences_has_no_strays():
    assert DIFFERENT.keys() <= SHARED.keys()


def test_the_guard_guards_something():
    assert {"MLP", "Actor", "Critic", "descend", "value_loss", "init_agent", "act"} <= SHARED.keys()


REACHES_UP = {"envs/render.py": "load_actor"}  # the one function of a command-line program that does; importing its module does not


def imports(path):
    tree, but = ast.parse(path.read_text()), REACHES_UP.get(f"{path.parent.name}/{path.name}")
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == but]
    exempt = {part for function in functions for part in ast.walk(function)}
    for node in ast.walk(tree):
        if node in exempt:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize(("room", "allowed"), [("algos", {"data", "envs"}), ("data", {"data", "envs"}), ("envs", {"envs"})])
def test_arrows_run_one_way(room, allowed):
    for path in (REPO / room).glob("*.py"):
        assert not set(imports(path)) & ({"algos", "data", "envs"} - allowed), path


@pytest.mark.parametrize(
    "path", [p for room in ("algos", "data", "envs") for p in sorted((REPO / room).glob("*.py"))], ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "says in its first line why it exists"
    if path.parent.name == "algos":
        assert text.count("\n") <= 600
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
