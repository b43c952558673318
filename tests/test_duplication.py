"""What the files of algos/ share stays the same word for word, and the house keeps its order."""

import ast
import pathlib

import pytest

REPO = pathlib.Path(__file__).parents[1]
ALGOS = sorted(p for p in (REPO / "algos").glob("*.py") if p.name != "__init__.py")
OWN = "one of its own in every file"
SQUASHED = "sac cql cal_ql ooo_cal_ql rlpd ooo_rlpd"  # files of SAC's family, whose Gaussian policies are squashed
DIFFERENT = {  # name: (why files define it differently, which of them share it; a bar between groups)
    "Args": ("settings of the method", OWN),
    "Hyper": ("traced settings of the method", "rlpd ooo_rlpd"),
    "MLP": (
        "dropout (IQL), LayerNorm and small last layers (SAC, CQL), LayerNorm alone (RLPD), or for RND as well",
        "iql ooo_iql pex td3 | sac cql cal_ql | rlpd ooo_rlpd",
    ),
    "Actor": ("squashed Gaussian; IQL's, not squashed; deterministic", f"{SQUASHED} | iql ooo_iql pex"),
    "Critic": ("two critics, or any number with LayerNorm", f"{SQUASHED} | iql ooo_iql pex td3"),
    "Nets": ("IQL has a value function, RLPD a subset of its critics", "sac cql cal_ql ooo_cal_ql td3 | iql ooo_iql pex | rlpd ooo_rlpd"),
    "Agent": (
        "value function (IQL), weights alpha (SAC) and alpha' (CQL), target actor (TD3)",
        "cql cal_ql ooo_cal_ql | iql ooo_iql pex | sac rlpd ooo_rlpd",
    ),
    "init_agent": ("builds Agent", "cql cal_ql ooo_cal_ql | iql ooo_iql pex | sac rlpd ooo_rlpd"),
    "critic_loss": ("another paper's equation", f"{SQUASHED} | iql ooo_iql pex"),
    "actor_loss": ("the heart of the method", "sac cql cal_ql ooo_cal_ql | iql ooo_iql pex | rlpd ooo_rlpd"),
    "conservative_loss": ("Cal-QL has a floor", "cal_ql ooo_cal_ql"),
    "act": ("how a policy's output becomes an action", f"{SQUASHED} | iql ooo_iql pex"),
    "update": ("the heart of the method", "iql pex"),
    "RNDBonus": ("the network's constructor", "ooo_iql td3 | rlpd ooo_rlpd"),
    "Setup": ("OOO has a bonus", "iql pex sac cql cal_ql | ooo_iql rlpd td3"),
    "State": ("what a run carries", "iql sac cql | ooo_iql ooo_rlpd td3"),
    "init_state": ("builds State", "sac cql | ooo_iql td3"),
    "explore_update": ("what the update takes", "ooo_iql td3"),
    "pretrain_chunk": ("learning-rate schedule (IQL), bonus, blocks of steps (RLPD)", "iql pex | ooo_iql td3"),
    "finetune_chunk": ("how batches are mixed, random steps, returns of episodes", OWN),
    "explore_chunk": ("the same", OWN),
    "retrain_chunk": ("which agent is retrained", "ooo_iql td3"),
    "make_setup": ("builds Setup", "sac cql"),
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
    listed = {frozenset(group.split()) & everywhere for group in groups.split("|")} if groups not in ("", OWN) else set()
    others = everywhere - {file for group in listed for file in group}
    expected = listed | ({frozenset([file]) for file in others} if groups else {frozenset(everywhere)})
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


LONG = {"ooo_cal_ql": 760}  # two methods, Cal-QL and CQL, and a bonus, each of which a reader must see


@pytest.mark.parametrize(
    "path", [p for room in ("algos", "data", "envs") for p in sorted((REPO / room).glob("*.py"))], ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "says in its first line why it exists"
    if path.parent.name == "algos":
        assert text.count("\n") <= LONG.get(path.stem, 600)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
