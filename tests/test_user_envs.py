"""A user's own environment is tried before a run: each mistake is one line that says where it is and what it is."""

import functools
import pathlib
import re
import sys

import jax
import pytest

from ooo_rl import envs
from ooo_rl.envs import users

LINE = """
import jax
import jax.numpy as jnp
import numpy as np
from ooo_rl import envs
NO = jnp.bool_(False)

class Line(envs.Task):
    horizon, observation_size, action_size = 4, 1, 1
    def start(self, key):
        return jax.random.uniform(key, (1,))
    def advance(self, position, action):
        return position + 0.1 * action, action[0], NO, NO
    def observe(self, position):
        return position
"""
STATE = """
class Ball(envs.Env):
    horizon, observation_size, action_size, backend = 4, 1, 1, "jax"
    def reset(self, rng):
        zero = jnp.zeros(())
        info = {"termination": zero, "truncation": zero, "broken": zero}
        return envs.State(None, jnp.zeros(1), zero, zero, {"success": zero}, info)
    def step(self, state, action):
        return state.replace(obs=state.obs + action, reward=action[0])
"""


@pytest.fixture
def write(working_directory):
    """Writes a module into the working directory."""

    def write(text, file="own.py"):
        path = working_directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


def refusal(name, **settings):
    with pytest.raises(ValueError) as caught:
        envs.make(name, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def variant(text, kind="Line"):
    """LINE with a class `Mine`, which differs from `kind` by `text`."""
    return f"{LINE}{STATE}\nclass Mine({kind}):\n    {text}\n"


FINE = [
    "pass",
    "horizon = 1",
    "horizon = np.int64(7)",
    "horizon = jnp.int32(7)",
    "discrete, action_size = True, 3\n    def advance(self, p, a): return p + a, a, a > 1, NO",
    "def observe(self, p): return jnp.int32(9 * p)",
    "def observe(self, p): return np.ones(1) * p",
    "def advance(self, p, a): return p, 1.0, False, True",
    "def advance(self, p, a): return [p, 1, np.bool_(False), 0]",
    "def advance(self, p, a): return jax.lax.cond(a[0] > 0, lambda: p, lambda: -p), a[0], NO, NO",
    "def advance(self, p, a): return p > 0, jnp.int32(1), NO, NO",
    "def __init__(self): self.observe = lambda p: p",
    "def start(self, key): return {'p': jnp.zeros(1), 'key': jax.random.key(0)}\n"
    "    def advance(self, s, a): return {**s, 'p': s['p'] + a}, a[0], NO, NO\n"
    "    def observe(self, s): return s['p']",
    "def start(self, key): return None\n    def advance(self, s, a): return None, a[0], NO, NO\n"
    "    def observe(self, s): return jnp.zeros(1)",
]


@pytest.mark.parametrize("text", FINE)
def test_what_keeps_the_contract_passes(write, text):
    write(variant(text))
    env = envs.make("own:Mine")
    assert isinstance(env, envs.Task)

    def play(key):
        actions = envs.random_actions(env, key, (2,))
        step = lambda states, key: (envs.step_all(env, states, actions, key)[0], None)  # noqa: E731
        return jax.lax.scan(step, jax.vmap(env.reset)(jax.random.split(key)), jax.random.split(key, 3))[0].obs

    assert jax.eval_shape(play, jax.random.PRNGKey(0)).shape == (2, 1)


@pytest.mark.parametrize("kind", ["Ball", "Line"])
def test_functions_and_other_environments_pass(write, kind):
    write(variant("pass", kind) + "\nmake = lambda: Mine()\n")
    assert type(envs.make("own:make")).__name__ == "Mine"
    envs.register("mine", sys.modules["own"].Mine)
    assert type(envs.make("mine")).__name__ == "Mine"


VALUES = "uses the value of an array in Python or NumPy (own.py, line 28), but JAX traces it without values; write it"
WRONG = [  # what a task has instead, from line 27 of own.py on; what is said
    ("observation_size = 3", "Mine.observe returns float32[1] as the observation; expected an array [3], since observ"),
    ("def observe(self, p): return p[0]", "Mine.observe returns float32[] as the observation; expected an array [1]"),
    ("def observe(self, p): return {'p': p}", "Mine.observe returns a dict as the observation; expected an array [1]"),
    ("def observe(self, p): return p[None]", "Mine.observe returns float32[1, 1] as the observation; expected"),
    ("def observe(self, p): p", "Mine.observe returns None as the observation; expected an array [1]"),
    ("def advance(self, p, a): return p, a[0], NO", "Mine.advance returns 3 values; expected 4: next state, reward, t"),
    ("def advance(self, p, a): return p", "Mine.advance returns float32[1]; expected 4: next state, reward, terminati"),
    ("def advance(self, p, a): pass", "Mine.advance returns None; expected 4: next state, reward, termination, succ"),
    ("def advance(self, p, a): return p, a, NO, NO", "Mine.advance returns float32[1] as the reward; expected one"),
    ("def advance(self, p, a): return p, a[0], a > 0, NO", "Mine.advance returns bool[1] as the termination; expected"),
    ("def advance(self, p, a): return p, a[0], NO, a > 0", "Mine.advance returns bool[1] as the success; expected one"),
    ("def advance(self, p, a): return p, None, NO, NO", "Mine.advance returns None as the reward; expected one number"),
    (
        "def start(self, key): return jnp.zeros(1, int)\n    def advance(self, p, a): return p + a, a[0], NO, NO",
        "Mine.advance returns float32[1] as state, and start int32[1]; they must agree",
    ),
    ("def advance(self, p, a): return p[0], a[0], NO, NO", "Mine.advance returns float32[] as state, and start floa"),
    (
        "def advance(self, p, a): return {'p': p}, a[0], NO, NO",
        "Mine.advance returns nothing as state, and start float32[1]; they must agree",
    ),
    ("def start(self, key): return [jnp.ones(1)]\n    def observe(self, s): return s[0]\n"
     "    def advance(self, s, a): return (s[0],), a[0], NO, NO", "Mine.advance returns a state of PyTreeDef((*,)),"),
    ("def advance(self, p, a):\n        return (p if p[0] > 0 else -p), a[0], NO, NO", f"Mine.advance {VALUES}"),
    ("def advance(self, p, a):\n        return np.sin(p), a[0], NO, NO", f"Mine.advance {VALUES} with jax.numpy and"),
    ("def advance(self, p, a):\n        return p, float(a[0]), NO, NO", f"Mine.advance {VALUES}"),
    ("def start(self, key):\n        return [jnp.ones(1) for _ in range(key[0])]", f"Mine.start {VALUES}"),
    ("def observe(self, p):\n        return p[p > 0]", f"Mine.observe {VALUES}"),
    ("def observe(self, p):\n        return self.p", "Mine.observe raises AttributeError: 'Mine' object has no attr"),
    ("def observe(self, p): return self.deep(p)\n    def deep(self, p): return p.no", "(own.py, line 28)"),
    ("def observe(self, p):\n        assert False", "Mine.observe raises AssertionError (own.py, line 28)"),
    ("def observe(self, p):\n        return jnp.ones(3) @ jnp.ones(2)", "got (3,) and (2,). (own.py, line 28)"),
    ("def observe(self): return 0", "Mine.observe raises TypeError: Mine.observe() takes 1"),
    *((f"{size} = {value}", f"Mine.{size} is {value}; expected a whole number, at least 1")
      for size in ("horizon", "observation_size", "action_size") for value in ("None", "0", "4.0", "(1,)")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_a_mistake_in_a_task_is_one_line(write, text, said):
    write(variant(text))
    assert said in refusal("own:Mine")


@pytest.mark.parametrize("part", ["start", "advance", "observe"])
def test_a_part_that_a_task_lacks_is_named(write, part):
    write(LINE.replace(f"def {part}(", f"def other_{part}("))
    assert refusal("own:Line") == f"Line has no {part}; docs/contributing.md says what an environment needs"


def test_a_part_may_be_an_attribute(write):
    write(LINE.replace("def observe(", "def look(") + "    def __init__(self): self.observe = self.look\n")
    assert envs.make("own:Line").observation_size == 1


RESET = "def reset(self, rng): return super().reset(rng).replace"
STEP = "def step(self, state, action): return super().step(state, action).replace"
WRONG_STATES = [
    (f"{RESET}(obs=jnp.zeros(2))", "Mine.reset returns float32[2] as the observation; expected an array [1]"),
    (f"{STEP}(obs=jnp.zeros((1, 1)))", "Mine.step returns float32[1, 1] as the observation; expected an array [1]"),
    (f"{RESET}(reward=jnp.zeros(1))", "Mine.reset returns float32[1] as the reward; expected one number, of shape []"),
    (f"{STEP}(done=jnp.zeros(1))", "Mine.step returns float32[1] as the done; expected one number, of shape []"),
    (f"{RESET}(info={{}})", "Mine.reset returns a state whose info lacks 'termination' (1 where the task ends the "
     "episode, else 0), 'truncation' (1 where the time limit ends it, else 0), 'broken' (1 where"),
    (f"{STEP}(info=None)", "Mine.step returns a state whose info lacks 'termination'"),
    (f"{RESET}(metrics={{}})", "Mine.reset returns a state whose metrics lacks 'success' (1 where the task is solved"),
    (f"{STEP}(info={{**state.info, 'broken': action}})", "Mine.step returns float32[1] as the info['broken']; ex"),
    (f"{STEP}(reward=jnp.complex64(0))", "Mine.step returns complex64[] as state.reward, and reset float32[]; they m"),
    (f"{STEP}(info={{**state.info, 'k': 1.0}})", "Mine.step returns float32[] as state.info['k'], and reset nothing; "),
    ("def reset(self, rng): return jnp.zeros(1), {}", "Mine.reset returns a tuple; expected an envs.State with obs, r"),
    ("def step(self, state, action):\n        return state if action[0] > 0 else state", f"Mine.step {VALUES}"),
    ("horizon = None", "Mine.horizon is None; expected a whole number, at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), WRONG_STATES)
def test_a_mistake_in_another_environment_is_one_line(write, text, said):
    write(variant(text, "Ball"))
    assert said in refusal("own:Mine")


def test_a_task_with_a_step_of_its_own_is_tried_as_a_whole(write):
    write(variant(f"{STEP}(obs=jnp.zeros(2))"))
    assert "Mine.step returns float32[2] as the observation" in refusal("own:Mine")


def test_a_registered_environment_is_tried_too(write):
    write(variant("observation_size = 3"))
    envs.register("mine", lambda: users.imported("own:Mine")())
    assert "Mine.observe returns float32[1] as the observation; expected an array [3]" in refusal("mine")


def test_a_registered_partial_is_named_by_its_file(write):
    write("def make(size):\n    raise RuntimeError('no')")
    envs.register("mine", functools.partial(users.imported("own:make"), size=3))
    assert "raises RuntimeError: no (own.py, line 2)" in refusal("mine")


def test_a_trial_is_made_once(write, monkeypatch):
    tried, checked = [], users.check
    monkeypatch.setattr(users, "check", lambda env: tried.append(env.horizon) or checked(env))
    write(LINE + "\nmake = lambda horizon=5: setattr(line := Line(), 'horizon', horizon) or line\n")
    for settings in ({}, {}, {"horizon": 6}, {"horizon": 6}):
        envs.make("own:make", **settings)
    assert tried == [5, 6]
    assert "Line.horizon is 0" in refusal("own:make", horizon=0) and "Line.horizon is 0" in refusal(
        "own:make", horizon=0
    )


def test_promotion_is_as_in_a_run(write):
    write(variant("def advance(self, p, a): return p + jnp.int32(1), a[0], NO, NO"))
    with jax.numpy_dtype_promotion("strict"):
        envs.make("own:Mine")


# --- modules and constructors ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\ndef f(:\n", "the module 'own' raises SyntaxError: invalid syntax (own.py, line 2)"),
        ("x = 1\nraise RuntimeError('boom\\nbang')", "the module 'own' raises RuntimeError: boom (own.py, line 2)"),
        ("import math\nmath.no_such", "AttributeError: module 'math' has no attribute 'no_such' (own.py, line 2)"),
        ("from math import no_such", "raises ImportError: cannot import name 'no_such' from 'math'"),
        ("import not_there_xyz", "own.py, line 1, imports not_there_xyz, which is not installed"),
        (
            "import importlib\nimportlib.import_module('not_there')",
            "own.py, line 2, imports not_there, which is not installed",
        ),
        ("\nimport own_helper", "own_helper.py, line 3, imports not_there_xyz, which is not installed"),
        ("raise ModuleNotFoundError('pip install it')", "ModuleNotFoundError: pip install it (own.py, line 1)"),
        ("def Mine(size): pass", "Mine() raises TypeError: Mine() missing 1 required positional argument: 'size' (own"),
        ("def Mine():\n    return [][1]", "Mine() raises IndexError: list index out of range (own.py, line 2)"),
        ("class Mine:\n    def __init__(self, size): pass", "argument: 'size' (own.py, line 1)"),
        ("def Mine(**x):\n    raise ValueError('no size')", "Mine() raises ValueError: no size (own.py, line 2)"),
    ],
)  # fmt: skip
def test_a_module_that_fails_is_named_with_its_line(write, text, said):
    write(text)
    write("\n\nimport not_there_xyz.deep\n", "own_helper.py")
    found = refusal("own:Mine")
    assert said in found and "write --env" not in found and found.count("own.py") <= 1


def test_settings_are_in_the_message(write):
    write("def Mine(size):\n    raise RuntimeError('no')")
    assert refusal("own:Mine", size=3) == "Mine(size=3) raises RuntimeError: no (own.py, line 2)"


@pytest.mark.parametrize("name", ["own_absent:Mine", "own_absent.tasks:Mine", "own.absent:Mine"])
def test_a_module_that_is_not_there_is_the_flags_fault(write, name):
    write(LINE)
    assert re.match(
        r"cannot import 'own.*\(No module named 'own.*\); write --env my_module:MyTask", refusal(name)
    )


def test_an_absent_name_says_in_which_file(write, tmp_path):
    write(LINE)
    file = tmp_path / "own.py"
    assert refusal("own:Lime") == f"the module 'own' ({file}) has no 'Lime'; write --env my_module:MyTask"


@pytest.mark.parametrize("file", ["hiding.py", "hiding/__init__.py"])
def test_a_module_that_another_one_hides_must_be_renamed(write, tmp_path, monkeypatch, file):
    write(LINE, file)
    write("x = 1", "elsewhere/hiding.py")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    other = f"{tmp_path}/elsewhere/hiding.py"
    assert refusal("hiding:Line") == (
        f"the module 'hiding' ({other}) has no 'Line'; {file} of the working directory is hidden by {other}; "
        "rename 'hiding' there"
    )


@pytest.mark.parametrize(("file", "name"), [("time.py", "time:Line"), ("json/tasks.py", "json.tasks:Line")])
def test_the_standard_library_hides_modules_too(write, file, name):
    write(LINE, file)
    package = file.partition("/")[0].removesuffix(".py")
    said = rf"{file} of the working directory is hidden by .*{package}.*; rename '{package}' there"
    assert re.search(said, refusal(name))


def test_the_page_lists_what_the_trial_asks_for():
    page = (pathlib.Path(__file__).parents[1] / "docs/contributing.md").read_text()
    needs = page.partition("## Add an environment")[2].partition("To bring a task with the package")[0]
    flags = [name for names in users.FLAGS.values() for name in names]
    missing = [
        word for word in (*users.SIZES, *users.PARTS, *users.FIELDS, *flags) if f"`{word}" not in needs
    ]
    assert needs and not missing
