"""The marked copies of algos/: a file tells its whole method, so what methods share is copied, and checked.

Above a function or class the comment `# as in sac.py` says: this is a copy of the one of that name in sac.py,
word for word. The original carries no mark.

    python tests/copies.py          # what is wrong, if anything
    python tests/copies.py --fix    # carry every original into its copies: edit the original, then run this
"""

import argparse
import ast
import pathlib
import re
import sys
from collections import defaultdict
from typing import NamedTuple

ALGOS = pathlib.Path(__file__).parents[1] / "algos"
MARK = re.compile(r"# as in (\S+\.py)")


class Definition(NamedTuple):
    """A function or class at the top of a file."""

    file: str
    name: str
    original: str | None  # the file that its mark names
    start: int  # the first line, a decorator's if there is one, counted from 0
    end: int  # the line after the last
    text: str


def read(path: pathlib.Path) -> list[str]:
    """Lines as Python counts them; joined with newlines they are the file again, byte for byte."""
    return path.read_bytes().decode().split("\n")


def definitions(path: pathlib.Path) -> list[Definition]:
    lines, found = read(path), []
    for node in ast.parse("\n".join(lines), str(path)).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            start, end = min(part.lineno for part in (node, *node.decorator_list)) - 1, node.end_lineno
            mark = MARK.fullmatch(lines[start - 1]) if start else None
            text = "\n".join(lines[start:end])
            found.append(Definition(path.name, node.name, mark and mark[1], start, end, text))
    return found


def survey(folder: pathlib.Path) -> list[Definition]:
    """All definitions of all files of `folder`."""
    return [definition for path in sorted(folder.glob("*.py")) for definition in definitions(path)]


def compare(folder: pathlib.Path) -> tuple[list[str], list[tuple[Definition, Definition]]]:
    """What --fix cannot mend, in words; and the copies that differ, each with its original."""
    everything, faults, differing = survey(folder), [], []
    by_place = {(one.file, one.name): one for one in everything}
    for copy in everything:
        if copy.original is None:
            continue
        original, said = by_place.get((copy.original, copy.name)), f"{copy.file}: {copy.name} is marked as in"
        if copy.original == copy.file:
            faults.append(f"{said} {copy.original}, which is its own file")
        elif original is None:
            faults.append(f"{said} {copy.original}, where there is none")
        elif original.original:
            faults.append(f"{said} {copy.original}, where it is a copy itself; name {original.original}")
        elif original.text != copy.text:
            differing.append((copy, original))

    alike = defaultdict(list)  # were all of them marked, one of the marks would be at fault already
    for one in everything:
        if one.original is None:
            alike[one.name, one.text].append(one.file)
    for (name, _), files in alike.items():
        if len(files) > 1:
            faults.append(f"{', '.join(files)}: the same {name}; mark all but the original, # as in FILE.py")

    for path in sorted(folder.glob("*.py")):
        marks = {number for number, line in enumerate(read(path)) if MARK.fullmatch(line.strip())}
        for number in sorted(marks - {one.start - 1 for one in definitions(path)}):
            faults.append(f"{path.name}, line {number + 1}: a mark that stands above no function or class")
    return faults, differing


def check(folder: pathlib.Path) -> list[str]:
    """All faults, in words."""
    faults, differing = compare(folder)
    advice = "edit the original, then run python tests/copies.py --fix"
    return [
        *faults,
        *(f"{one.file}: {one.name} differs from {one.original}'s; {advice}" for one, _ in differing),
    ]


def fix(folder: pathlib.Path) -> list[str]:
    """Carries the originals into the copies that differ; says what changed."""
    _, differing = compare(folder)
    for copy, original in sorted(differing, key=lambda pair: -pair[0].start):  # from below: places stay right
        lines = read(folder / copy.file)
        lines[copy.start : copy.end] = original.text.split("\n")
        (folder / copy.file).write_bytes("\n".join(lines).encode())
    return [f"{copy.file}: {copy.name} is now as in {copy.original}" for copy, _ in differing]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, default=ALGOS, help="the files to compare")
    parser.add_argument("--fix", action="store_true", help="carry the originals into their copies")
    args = parser.parse_args()
    if not any(args.folder.glob("*.py")):
        parser.exit(2, f"error: --folder {args.folder}: no folder with Python files\n")
    changes = fix(args.folder) if args.fix else []
    faults = check(args.folder)
    for line in (*changes, *faults):
        print(line)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
