"""What the files of algos/ share stays the same word for word, and the house keeps its order."""

import ast
import itertools
import pathlib

import pytest

REPO = pathlib.Path(__file__).parents[1]
ALGOS = sorted(p for p in (REPO / "algos").glob("*.py") if p.name != "__init__.py")
DIFFERENT = {  # name: why files may define it differently
    "Args": "settings of the method",
    "Hyper": "traced settings of the method",
    "Setup": "OOO has a bonus",
    "State": "OOO has two agents and a bonus",
    "init_state": "builds State",
    "update": "OOO adds a bonus and bounds to the critics' target",
    "pretrain_chunk": "OOO pre-trains on a bonus, IQL has a learning-rate schedule",
    "make_setup": "builds Setup",
    "main": "phases of the method",
}


def definitions(path):
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


PAIRS = [(a, b, name) for a, b in itertools.combinations(ALGOS, 2) for name in sorted(definitions(a).keys() & definitions(b).keys())]


@pytest.mark.parametrize(("a", "b", "name"), PAIRS, ids=lambda x: getattr(x, "stem", x))
def test_same_name_same_code(a, b, name):
    same = ast.dump(definitions(a)[name]) == ast.dump(definitions(b)[name])
    if name in DIFFERENT:
        assert not same, f"{name} no longer differs between {a.name} and {b.name}: take it off the list"
    else:
        assert same, f"{name} differs between {a.name} and {b.name}: make it the same, or list it with a reason"


def test_the_guard_guards_something():
    assert {"MLP", "Actor", "Critic", "Value", "value_loss", "actor_loss", "critic_loss", "act"} <= {
        name for *_, name in PAIRS
    } - DIFFERENT.keys()


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
