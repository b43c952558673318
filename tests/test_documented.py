"""The commands of README, pages and scripts: each is one that its script takes."""

import importlib
import importlib.util
import pathlib
import re
import shlex
from types import SimpleNamespace

import pytest

from ooo_rl.data.runs import session, settings

REPO = pathlib.Path(__file__).parents[1]
COMMAND = re.compile(r"python algos/(\w+)\.py([^`#|\n]*)")
OTHERS = ("my_module:MyTask", "--help", "--resume")  # what is only there on a user's machine
REFUSED = "discount=0.9,1.2"  # docs/sac.md says so of this one


def commands():
    """Script -> the words of each of its commands, every one once."""
    found = {}
    for folder, kind in (("", "README.md"), ("docs", "*.md"), ("algos", "*.py")):
        for path in sorted((REPO / folder).glob(kind)):
            for script, words in COMMAND.findall(path.read_text()):
                found.setdefault(script, {})[words.strip()] = path.name
    return found


COMMANDS = commands()


def test_they_are_found():
    assert len(COMMANDS) == len(list((REPO / "algos").glob("[a-z]*.py")))
    assert sum(map(len, COMMANDS.values())) > 100


@pytest.mark.parametrize("script", COMMANDS)
def test_each_command_is_taken(script):
    method = importlib.import_module(f"ooo_rl.algos.{script}")
    for words, where in COMMANDS[script].items():
        if any(other in words for other in (*OTHERS, REFUSED)):
            continue
        if importlib.util.find_spec("warp") is None:  # which is no part of the extra `dev`
            words = words.replace("mjx-warp", "mjx")
        try:
            args = settings.parse(method.Args, shlex.split(words))
            if getattr(args, "return_range", 0) or hasattr(args, "max_reward"):
                data = None if args.dataset == "none" else "some"
                session._has_scale(SimpleNamespace(data=data, args=args), "a scale", "")
        except (settings.UsageError, SystemExit) as error:
            pytest.fail(f"{where}: python algos/{script}.py {words}: {error}")
