"""The house keeps its order: which file may import which, names that shadow no other, files that stay short.

Every check takes a folder that holds algos/, data/, envs/ and tests/, and returns what is wrong, in words.
It reads the source text alone and runs nothing; so imports inside functions count as well.
"""

import ast
import functools
import graphlib
import pathlib
import re
import sys
import tomllib
from importlib import metadata
from typing import NamedTuple

import pytest

REPO = pathlib.Path(__file__).parents[1]
ROOMS = ("algos", "data", "envs")

MAY_IMPORT = {  # by folder: the folders from which its files may import; "data" alone is the ground floor
    "algos": "data data/datasets data/figures data/recipes data/runs envs",  # but no other file of algos/
    "data": "data envs",
    "data/datasets": "data data/datasets envs",
    "data/recipes": "data data/datasets data/recipes envs",
    "data/figures": "data data/figures envs",
    "data/runs": "data data/datasets data/figures data/recipes data/runs envs",
    "envs": "envs",
    "envs/engines": "envs/engines",
}
DOORS = {  # what single files may do beside that: (importing file or folder, imported file or folder)
    ("envs/__init__.py", "envs/engines"),  # names of engines, for `make`
    ("envs/physics_task.py", "envs/engines"),  # so that the author of a task never enters that folder
    ("envs/engines", "envs/base.py"),  # the contract
}

WIDTH, ALGOS_WIDTH, MARKDOWN_WIDTH = 120, 110, 100  # characters of a line
ALGOS_LINES, FUNCTION_LINES = 560, 60
FLAGSHIP, FLAGSHIP_LINES, NETWORKS_BEFORE = "algos.ooo_iql", 470, 125


class Module(NamedTuple):
    """A Python file. `name` is its import name without ooo_rl, such as data.runs.plan."""

    path: pathlib.Path
    file: str  # the path below the root
    name: str
    text: str
    tree: ast.Module
    imports: list[tuple[str, ...]]  # what `imports` found

    @property
    def folder(self) -> str:
        return self.file.rpartition("/")[0]


@functools.cache
def everything(root: pathlib.Path) -> dict[str, Module]:
    """All Python files by import name, those of tests/ as well."""
    found = {}
    for path in sorted(path for folder in (*ROOMS, "tests") for path in (root / folder).rglob("*.py")):
        file, text = path.relative_to(root).as_posix(), path.read_text()
        name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        tree = ast.parse(text, str(path))
        found[name] = Module(path, file, name, text, tree, sorted(imports(file, tree)))
    return found


def house(root: pathlib.Path) -> dict[str, Module]:
    """All modules of algos/, data/ and envs/ by import name."""
    return {name: module for name, module in everything(root).items() if not module.file.startswith("tests/")}


def imports(file: str, tree: ast.Module) -> set[tuple[str, ...]]:
    """What is imported anywhere in a file: for each name the modules that may be meant, the longest first."""
    found, package = set(), ["ooo_rl", *file.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name,) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *(node.module.split(".") if node.module else [])])
            found |= {(f"{base}.{alias.name}", base) for alias in node.names}
    return found


def of_ours(module: Module, known: dict[str, Module]) -> list[str]:
    """Names of our own modules that it imports; one that is not there is named as it is written.

    The packages above an imported module do not count. Python runs them first, and each of ours imports its
    own modules: everything would be a circle.
    """
    found = set()
    for candidates in module.imports:
        ours = [name.removeprefix("ooo_rl.") for name in candidates if name.startswith("ooo_rl.")]
        if ours:
            found.add(next((name for name in ours if name in known), ours[-1]))
    return sorted(found)


def circles(root: pathlib.Path) -> list[str]:
    """(a) No module imports itself, whatever the way round."""
    known = house(root)
    graph = {name: of_ours(module, known) for name, module in known.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [f"a circle: {' <- '.join(error.args[1])}"]
    return []


def arrows(root: pathlib.Path) -> list[str]:
    """(b), (c) Imports lead down the house, and none leads from one file of algos/ to another."""
    known, faults = house(root), []
    for module in known.values():
        if module.folder not in MAY_IMPORT:
            faults.append(f"{module.file}: its folder has no place in the house; give it one in MAY_IMPORT")
            continue
        for name in of_ours(module, known):
            other = known.get(name)
            if other is None:
                faults.append(f"{module.file} imports {name}, which is not there")
                continue
            doors = {(a, b) for a in (module.file, module.folder) for b in (other.file, other.folder)}
            if other.folder not in MAY_IMPORT[module.folder].split() and not doors & DOORS:
                faults.append(f"{module.file} imports {name}, which is not below it")
    return faults


def old_names(root: pathlib.Path) -> list[str]:
    """Our modules are imported as ooo_rl's, since a user may have a data.py or a folder envs/, too."""
    faults = [
        f"{module.file} imports {base}: write ooo_rl.{base}"
        for module in everything(root).values()
        for *_, base in module.imports
        if base.split(".")[0] in ROOMS
    ]
    return sorted({*faults})


@functools.cache
def installed() -> dict[str, list[str]]:
    """Names that can be imported, and the distributions that they come from."""
    return dict(metadata.packages_distributions())


def needed(root: pathlib.Path) -> set[str]:
    """Packages that we depend on, by import name: those of pyproject.toml, and those that we import."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    groups = (project["dependencies"], *project.get("optional-dependencies", {}).values())
    distributions = {re.split(r"[^\w.-]", line)[0] for group in groups for line in group}
    names = {name for name, origins in installed().items() if distributions & {*origins}}
    names |= {name.replace("-", "_") for name in distributions}  # some are not installed here
    names |= {base.split(".")[0] for module in house(root).values() for *_, base in module.imports}
    return names - {"ooo_rl", *ROOMS} - sys.stdlib_module_names


def shadows(root: pathlib.Path) -> list[str]:
    """(d) `python data/runs/x.py` puts data/runs first on the path: what is there hides what is elsewhere."""
    files, others, faults = everything(root).values(), needed(root), []
    commands = {module.path.parent for module in files if 'if __name__ == "__main__":' in module.text}
    for path in sorted({path for module in files for path in (module.path, module.path.parent)}):
        if path.stem in sys.stdlib_module_names:
            faults.append(f"{path.relative_to(root)} shadows the standard library's {path.stem}")
        if path.parent in commands and path.stem in others:
            faults.append(f"{path.relative_to(root)} shadows the package {path.stem} in commands beside it")
    return faults


def short_files(root: pathlib.Path) -> list[str]:
    """(e) Every file says why it exists, and none is long, nor any of its lines."""
    faults = []
    for module in everything(root).values():
        lines, in_algos = module.text.splitlines(), module.folder == "algos"
        most = FLAGSHIP_LINES if module.name == FLAGSHIP else ALGOS_LINES
        if not ast.get_docstring(module.tree):
            faults.append(f"{module.file}: no docstring")
        if in_algos and len(lines) > most:
            faults.append(f"{module.file}: {len(lines)} lines, at most {most}")
        for number, line in enumerate(lines, 1):
            if len(line) > (ALGOS_WIDTH if in_algos else WIDTH):
                faults.append(f"{module.file}:{number}: {len(line)} characters")
    return faults


def short_functions(root: pathlib.Path) -> list[str]:
    """(e) No function is long."""
    faults = []
    for module in house(root).values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    faults.append(f"{module.file}: {node.name} has {lines} lines, at most {FUNCTION_LINES}")
    return faults


def first_network(root: pathlib.Path) -> list[str]:
    """(e) Whoever opens the flagship meets its networks soon."""
    classes = [node for node in house(root)[FLAGSHIP].tree.body if isinstance(node, ast.ClassDef)]
    line = min((one.lineno for one in classes if "nn.Module" in map(ast.unparse, one.bases)), default=None)
    return [] if line and line < NETWORKS_BEFORE else [f"{FLAGSHIP}: its first network stands in line {line}"]


def markdown(root: pathlib.Path) -> list[str]:
    """(e) Lines of Markdown stay short, except tables and code; where a link leads does not count."""
    faults, folders = [], [root / folder for folder in ("docs", "tests", *ROOMS)]
    for path in [*root.glob("*.md"), *(path for folder in folders for path in sorted(folder.rglob("*.md")))]:
        fenced = False
        for number, line in enumerate(path.read_text().splitlines(), 1):
            fence = line.lstrip().startswith(("```", "~~~"))
            fenced ^= fence
            if fence or fenced or line.startswith("    ") or line.lstrip().startswith("|"):
                continue
            shown = re.sub(r"https?://[^\s)>]+", "", re.sub(r"\]\([^)\s]*\)", "]", line))
            if len(shown) > MARKDOWN_WIDTH:
                faults.append(f"{path.relative_to(root)}:{number}: {len(shown)} characters")
    return faults


def packages(root: pathlib.Path) -> list[str]:
    """(f) An installed wheel has every folder that has Python files."""
    folders = sorted({module.folder for module in house(root).values()})
    faults = [
        f"{folder}: no __init__.py" for folder in folders if not (root / folder / "__init__.py").is_file()
    ]
    expected = {f"ooo_rl.{folder.replace('/', '.')}" for folder in folders}
    listed = {*tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]}
    faults += [f"pyproject.toml: packages lack {name}" for name in sorted(expected - listed)]
    return faults + [f"pyproject.toml: there is no package {name}" for name in sorted(listed - expected)]


CHECKS = (
    circles, arrows, old_names, shadows, short_files, short_functions, first_network, markdown, packages,
)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house(check):
    if faults := check(REPO):
        pytest.fail("\n".join(faults), pytrace=False)


# The checks themselves: a small house without a fault, then one fault at a time planted into it.
PROJECT = """
[project]
dependencies = ["numpy>=2", "orbax-checkpoint"]
[tool.setuptools]
packages = ["ooo_rl.algos", "ooo_rl.data", "ooo_rl.data.runs", "ooo_rl.envs", "ooo_rl.envs.engines"]
"""
COMMAND = 'if __name__ == "__main__":\n    pass\n'
HOUSE = {
    "pyproject.toml": PROJECT,
    "README.md": f"# A house\n\n| {'table ' * 20}|\n\n[here]({'far/' * 30}.md)\n\n    {'code ' * 30}\n",
    "docs/page.md": f"```\n{'code ' * 30}\n```\n",
    "algos/__init__.py": "",
    "algos/ooo_iql.py": "from ooo_rl.data.runs import plan\nclass MLP(nn.Module):\n    pass\n",
    "algos/sac.py": f"import ooo_rl.data.runs.plan\nfrom ooo_rl import envs\n{COMMAND}",
    "data/__init__.py": "",
    "data/policy.py": "import numpy as np\ndef play():\n    from ooo_rl.envs import base, make\n",
    "data/runs/__init__.py": "",
    "data/runs/plan.py": "from ooo_rl.data import policy\n",
    "envs/__init__.py": "from . import physics_task\nfrom ooo_rl.envs.engines.mjx import ENGINES\n",
    "envs/base.py": "",
    "envs/physics_task.py": "from ooo_rl.envs.base import Task\nfrom ooo_rl.envs.engines import mjx\n",
    "envs/engines/__init__.py": "",
    "envs/engines/mjx.py": "from ooo_rl.envs import base\n",
    "tests/test_plan.py": "from ooo_rl.data.runs import plan\n",
}


def build(root: pathlib.Path, changes: dict[str, str]) -> pathlib.Path:
    """The small house, `changes` planted at the head of its files, below the docstring."""
    for name in {**HOUSE, **changes}:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        docstring = f'"""{name}."""\n' if name.endswith(".py") else ""
        (root / name).write_text(docstring + changes.get(name, "") + HOUSE.get(name, ""))
    return root


def test_a_house_without_a_fault(tmp_path):
    assert [fault for check in CHECKS for fault in check(build(tmp_path, {}))] == []


UPWARD = [  # a file; what is planted there; the module that it must not import
    ("data/policy.py", "import ooo_rl.algos.sac", "algos.sac"),
    ("data/policy.py", "def f():\n    from ooo_rl.data.runs import plan", "data.runs.plan"),
    ("data/policy.py", "from ooo_rl.data.runs.plan import cut", "data.runs.plan"),
    ("data/policy.py", "from ooo_rl.envs.engines import mjx", "envs.engines.mjx"),
    ("data/datasets/read.py", "from ooo_rl.data.runs import plan", "data.runs.plan"),
    ("data/figures/maps.py", "from ooo_rl.data.runs import plan", "data.runs.plan"),
    ("data/recipes/maze.py", "from ooo_rl.data.runs import plan", "data.runs.plan"),
    ("data/runs/plan.py", "import ooo_rl.algos", "algos"),
    ("envs/base.py", "import math, ooo_rl.data.policy as p", "data.policy"),
    ("envs/base.py", "from ..data import policy", "data.policy"),
    ("envs/hopper.py", "from ooo_rl.envs.engines.mjx import step", "envs.engines.mjx"),
    ("envs/engines/mjx.py", "from ooo_rl.envs.physics_task import Task", "envs.physics_task"),
    ("envs/engines/mjx.py", "from ooo_rl.envs import make", "envs"),
    ("algos/sac.py", "from ooo_rl.algos import ooo_iql", "algos.ooo_iql"),
    ("algos/sac.py", "from . import ooo_iql", "algos.ooo_iql"),
    ("algos/sac.py", "from ooo_rl.envs.engines import mjx", "envs.engines.mjx"),
]


@pytest.mark.parametrize(("file", "text", "name"), UPWARD)
def test_an_upward_arrow_is_found(tmp_path, file, text, name):
    assert arrows(build(tmp_path, {file: f"{text}\n"})) == [f"{file} imports {name}, which is not below it"]


WINGS = ("datasets", "figures", "recipes", "runs")
DOWNWARD = {("recipes", "datasets"), ("runs", "datasets"), ("runs", "recipes"), ("runs", "figures")}


@pytest.mark.parametrize("pair", [(upper, lower) for upper in WINGS for lower in WINGS if upper != lower])
def test_the_order_of_the_wings(tmp_path, pair):
    build(
        tmp_path,
        {f"data/{pair[0]}/a.py": f"from ooo_rl.data.{pair[1]} import b\n", f"data/{pair[1]}/b.py": ""},
    )
    assert bool(arrows(tmp_path)) == (pair not in DOWNWARD)


PLANTED = [  # a check; a file; what is planted there; what the fault says
    (circles, "data/policy.py", "from ooo_rl.data.runs.plan import cut\n", "data.runs.plan"),
    (circles, "envs/base.py", "def make():\n    from ooo_rl import envs\n", "envs.base"),
    (circles, "envs/base.py", "from ooo_rl.envs import make\n", "envs.base"),
    (circles, "envs/base.py", "from . import physics_task\n", "envs.physics_task"),
    (circles, "data/runs/plan.py", "from . import plan\n", "data.runs.plan"),
    (arrows, "data/new/thing.py", "", "data/new/thing.py: its folder has no place"),
    (
        arrows,
        "data/policy.py",
        "def f():\n    import ooo_rl.data.moments\n",
        "data.moments, which is not there",
    ),
    (old_names, "algos/sac.py", "import envs\n", "algos/sac.py imports envs: write ooo_rl.envs"),
    (old_names, "tests/test_plan.py", "from data.runs import plan\n", "tests/test_plan.py imports data.runs"),
    (shadows, "data/runs/statistics.py", "", "data/runs/statistics.py shadows the standard library's"),
    (shadows, "envs/profile/__init__.py", "", "envs/profile shadows the standard library's"),
    (shadows, "algos/numpy.py", "", "algos/numpy.py shadows the package numpy"),
    (shadows, "algos/orbax/__init__.py", "", "algos/orbax shadows the package orbax"),
    (short_files, "algos/ooo_iql.py", "x = 0\n" * 470, "algos/ooo_iql.py: 474 lines, at most 470"),
    (short_files, "algos/sac.py", "x = 0\n" * 560, "algos/sac.py: 565 lines, at most 560"),
    (short_files, "algos/sac.py", f"# {'é' * 109}\n", "algos/sac.py:2: 111 characters"),
    (short_files, "tests/test_plan.py", f"# {'x' * 119}\n", "tests/test_plan.py:2: 121 characters"),
    (short_functions, "envs/base.py", "class A:\n  def f(x):\n" + "    x = 0\n" * 60, "f has 61 lines"),
    (first_network, "algos/ooo_iql.py", "x = 0\n" * 122, "its first network stands in line 125"),
    (markdown, "README.md", f"{'word ' * 20}w\n", "README.md:1: 101 characters"),
    (markdown, "docs/page.md", f"[{'word ' * 20}](page.md)\n", "docs/page.md:1: 102 characters"),
    (packages, "data/figures/maps.py", "", "data/figures: no __init__.py"),
    (packages, "data/figures/__init__.py", "", "packages lack ooo_rl.data.figures"),
]


@pytest.mark.parametrize(("check", "file", "text", "said"), PLANTED)
def test_a_planted_fault_is_found(tmp_path, check, file, text, said):
    assert said in "\n".join(check(build(tmp_path, {file: text})))


ALLOWED = [  # what is just short enough, and a name that is in nobody's way
    (short_files, "algos/ooo_iql.py", "x = 0\n" * 466),
    (short_files, "algos/sac.py", f"# {'é' * 108}\n"),
    (short_files, "tests/test_plan.py", f"# {'x' * 118}\n"),
    (short_functions, "envs/base.py", "def f(x):\n" + "    x = 0\n" * 59),
    (first_network, "algos/ooo_iql.py", "x = 0\n" * 121),
    (shadows, "envs/numpy.py", ""),  # no command is run from there
]


@pytest.mark.parametrize(("check", "file", "text"), ALLOWED)
def test_what_is_allowed(tmp_path, check, file, text):
    assert check(build(tmp_path, {file: text})) == []


def test_a_missing_docstring_is_found(tmp_path):
    (build(tmp_path, {}) / "data/policy.py").write_text("import math\n")
    assert short_files(tmp_path) == ["data/policy.py: no docstring"]


def test_a_package_that_is_not_there_is_found(tmp_path):
    build(tmp_path, {})
    (tmp_path / "pyproject.toml").write_text(PROJECT.replace('"ooo_rl.envs"', '"ooo_rl.env", "ooo_rl.envs"'))
    assert packages(tmp_path) == ["pyproject.toml: there is no package ooo_rl.env"]
