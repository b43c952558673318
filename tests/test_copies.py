"""Copies in algos/ are marked and equal to their originals; and `copies` itself finds what is wrong."""

import pathlib
import shutil
import subprocess
import sys

import copies
import pytest

ORIGINAL = '''"""Spring."""

import math


class Net:
    width = 2


@staticmethod
def loss(x):
    # why
    return x**2


def act(x):
    return math.tanh(x)
'''
COPY = '''"""Summer."""


# as in spring.py
class Net:
    width = 2


SIZE = 3  # as in spring.py


# as in spring.py
@staticmethod
def loss(x):
    # why
    return x**2


def act(x):
    """Another one."""
    return x\x0c
'''


@pytest.fixture
def folder(tmp_path):
    """Two files without a fault."""
    (tmp_path / "spring.py").write_text(ORIGINAL)
    (tmp_path / "summer.py").write_text(COPY)
    assert copies.check(tmp_path) == []
    return tmp_path


def change(path: pathlib.Path, old: str, new: str) -> None:
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.py"))}


def test_algos_have_no_fault():
    if faults := copies.check(copies.ALGOS):
        pytest.fail("\n".join(faults), pytrace=False)


def test_algos_have_copies():
    marked = {one.name for one in copies.survey(copies.ALGOS) if one.original}
    assert {"MLP", "Actor", "Critic", "value_loss", "init_agent", "act"} <= marked


def test_every_copy_of_algos_is_guarded(tmp_path):
    shutil.copytree(copies.ALGOS, tmp_path, dirs_exist_ok=True)
    before, marked = contents(tmp_path), [one for one in copies.survey(tmp_path) if one.original]
    for one in sorted(marked, key=lambda one: -one.start):  # from below, as a line more moves what follows
        lines = copies.read(tmp_path / one.file)
        lines.insert(one.end, "    changed = True")
        (tmp_path / one.file).write_bytes("\n".join(lines).encode())
    caught = {
        tuple(fault.split(" differs")[0].split(": "))
        for fault in copies.check(tmp_path)
        if "differs" in fault
    }
    assert caught == {(one.file, one.name) for one in marked}
    copies.fix(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [("x**2", "x**3"), ("    # why\n", ""), ("@staticmethod\n", ""), ("loss(x):", "loss(x=1):")],
)
def test_a_difference_is_caught_and_mended(folder, old, new):
    before = contents(folder)
    change(folder / "summer.py", old, new)
    (fault,) = copies.check(folder)
    assert fault.startswith("summer.py: loss differs from spring.py's")
    assert copies.fix(folder) == ["summer.py: loss is now as in spring.py"]
    assert contents(folder) == before


def test_originals_are_carried_into_all_copies(folder):
    shutil.copy(folder / "summer.py", folder / "autumn.py")
    change(folder / "autumn.py", "def act(x):", "def fall(x):")
    change(folder / "spring.py", "    width = 2\n", "    width = 2\n    height = 5\n\n    depth = 7\n")
    change(folder / "spring.py", "    # why\n", "")
    expected = contents(folder)
    for name in ("autumn.py", "summer.py"):
        text = expected[name].replace(b"    width = 2\n", b"    width = 2\n    height = 5\n\n    depth = 7\n")
        expected[name] = text.replace(b"    # why\n", b"")
    assert len(copies.fix(folder)) == 4
    assert contents(folder) == expected
    assert copies.check(folder) == copies.fix(folder) == []


@pytest.mark.parametrize("mark", ["# as in spring.py\n", "# as in winter.py\n"])
def test_fix_touches_nothing_that_has_no_original(folder, mark):
    change(folder / "summer.py", "\n\ndef act", "\n\n" + mark + "def act")
    change(folder / "spring.py", "def act", "def acts")
    before = contents(folder)
    assert copies.fix(folder) == []
    assert contents(folder) == before


def test_an_unmarked_copy_is_caught(folder):
    change(folder / "summer.py", "# as in spring.py\n@", "@")
    assert copies.check(folder) == [
        "spring.py, summer.py: the same loss; mark all but the original, # as in FILE.py"
    ]
    assert copies.fix(folder) == []


def test_two_originals_are_caught(folder):
    (folder / "autumn.py").write_text('"""Autumn."""\n\n\nclass Net:\n    width = 2\n')
    assert copies.check(folder) == [
        "autumn.py, spring.py: the same Net; mark all but the original, # as in FILE.py"
    ]


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ("winter.py", "where there is none"),  # no such file
        ("autumn.py", "where there is none"),  # a file without it
        ("autumn_copy.py", "where it is a copy itself; name spring.py"),
        ("summer.py", "which is its own file"),
    ],
)
def test_a_mark_without_an_original_is_caught(folder, mark, said):
    (folder / "autumn.py").write_text('"""Autumn."""\n')
    shutil.copy(folder / "summer.py", folder / "autumn_copy.py")
    change(folder / "autumn_copy.py", '    """Another one."""\n', "")
    change(folder / "summer.py", "# as in spring.py\n@", f"# as in {mark}\n@")
    assert copies.check(folder) == [f"summer.py: loss is marked as in {mark}, {said}"]
    assert copies.fix(folder) == []


def test_all_marked_is_a_fault_as_well(folder):
    change(folder / "spring.py", "class Net", "# as in summer.py\nclass Net")
    assert copies.check(folder) == [
        "spring.py: Net is marked as in summer.py, where it is a copy itself; name spring.py",
        "summer.py: Net is marked as in spring.py, where it is a copy itself; name summer.py",
    ]


@pytest.mark.parametrize("place", ["SIZE = 3", "    width = 2", "    # why"])
def test_a_mark_above_anything_else_is_caught(folder, place):
    change(folder / "summer.py", place, f"# as in spring.py\n{place}")
    assert any("a mark that stands above no function or class" in fault for fault in copies.check(folder))


def test_command(folder):
    def run(*arguments):
        command = [sys.executable, copies.__file__, "--folder", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout

    assert run() == (0, "")
    change(folder / "summer.py", "x**2", "x**3")
    code, said = run()
    assert code == 1 and said.startswith("summer.py: loss differs from spring.py's; ")
    assert run("--fix") == (0, "summer.py: loss is now as in spring.py\n")
    assert run() == (0, "")
    change(folder / "summer.py", "# as in spring.py\n@", "@")
    assert run("--fix")[0] == 1


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_the_command_needs_files(tmp_path, name):
    (tmp_path / "empty").mkdir()
    command = [sys.executable, copies.__file__, "--folder", name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: --folder {name}: no folder with Python files\n"
