"""A user's own environment: imported, built, and tried once before a run begins.

Whatever is wrong with it becomes one ValueError, which says where, what was found and what was expected. The
trial traces shapes alone (`jax.eval_shape`) and compiles nothing, unless a size calls `reset`, as brax's do.
"""

import contextlib
import importlib
import inspect
import operator
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ooo_rl.envs.base import Env, Task, is_discrete

SIZES = "observation_size", "action_size", "horizon"
PARTS = "start", "advance", "observe"  # of a Task
FIELDS = "obs", "reward", "done", "metrics", "info"  # what is read of a State
FLAGS = {  # what a State must tell, and where; float32 0/1
    "info": {
        "termination": "1 where the task ends the episode, else 0",
        "truncation": "1 where the time limit ends it, else 0",
        "broken": "1 where the physics failed, else 0",
    },
    "metrics": {"success": "1 where the task is solved, else 0"},
}
PAGE = "docs/contributing.md says what an environment needs"
NOT_TRACED = (  # Python or NumPy asked for the value of an array that has none yet
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)

_passed: dict[tuple[int, str], Callable] = {}  # tasks that passed their trial; MJX takes seconds to trace


# --- finding and building it ---


def imported(name: str) -> Callable[..., Env]:
    """The class or function `my_package.my_module:MyTask`; the working directory is searched last."""
    module, _, attribute = name.partition(":")
    if not module or module.startswith("."):
        raise ValueError(f"{name!r} names no module to import; write --env my_module:MyTask")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(_not_found(module, error)) from None
    except Exception as error:
        raise ValueError(_failure(f"the module {module!r}", error, module)) from None
    if not hasattr(found, attribute):
        advice = _hidden(module) or "write --env my_module:MyTask"
        raise ValueError(f"the module {module!r} ({_file(found)}) has no {attribute!r}; {advice}")
    if not callable(task := getattr(found, attribute)):
        raise ValueError(f"{name} is not an environment: it is neither a class nor a function")
    return task


def build(name: str, task: Callable[..., Env], physics: str, settings: dict) -> Env:
    """The environment that `task` makes with `settings`, and with `physics` if it has such a parameter."""
    if "physics" in inspect.signature(task).parameters:
        settings = {**settings, "physics": physics}
    elif physics != "auto":
        raise ValueError(f"{name} has no parameter `physics`; leave --physics auto, not {physics}")
    # A class that lacks a part of brax's contract cannot even be called.
    missing = sorted(getattr(task, "__abstractmethods__", ()))
    if not missing:
        given = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        try:
            env = task(**settings)
            missing = [part for part in ("reset", "step", *SIZES) if not hasattr(env, part)]
        except Exception as error:
            call = f"{getattr(task, '__name__', name)}({given})"
            raise ValueError(_failure(call, error, task)) from None
    if missing:
        raise ValueError(f"{name} is not an environment: it has no {', '.join(missing)}; {PAGE}")
    trial = id(task), repr(settings)
    if trial not in _passed:
        check(env)
        _passed[trial] = task  # kept alive, so that no other task gets its id
    return env


def _not_found(module: str, error: ModuleNotFoundError) -> str:
    """What to do if an import failed: `module` itself is not there, or it imports what is not there."""
    if f"{module}.".startswith(f"{error.name}."):
        advice = _hidden(module) or "write --env my_module:MyTask"
        return f"cannot import {module!r} from the working directory ({error}); {advice}"
    if not error.name:  # raised by hand
        return _failure(f"the module {module!r}", error, module)
    frames = traceback.extract_tb(error.__traceback__)
    last = [frame for frame in frames if "importlib" not in frame.filename][-1]
    return f"{_line(last.filename, last.lineno)}, imports {error.name}, which is not installed"


def _hidden(module: str) -> str:
    """Says, if so, that `module` of the working directory is hidden by one that was found before it."""
    path, package = pathlib.Path(*module.split(".")), module.partition(".")[0]
    by = sys.modules.get(module) or sys.modules.get(package)
    for own in (path.with_suffix(".py"), path / "__init__.py"):
        if by and own.is_file() and own.resolve() != pathlib.Path(_file(by)).resolve():
            return f"{own} of the working directory is hidden by {_file(by)}; rename {package!r} there"
    return ""


def _file(module: Any) -> str:
    return getattr(module, "__file__", None) or f"{module.__name__}, without a file"


# --- the trial ---


def check(env: Any) -> None:
    """Raises ValueError for the first part of the contract that `env` does not keep."""
    kind = type(env).__name__
    for name in SIZES:
        if not _is_count(size := getattr(env, name)):
            raise ValueError(f"{kind}.{name} is {size!r}; expected a whole number, at least 1")
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # as in a run
        whole = isinstance(env, Task) and (type(env).reset, type(env).step) == (Task.reset, Task.step)
        _check_parts(env, kind) if whole else _check_states(env, kind)


def _check_parts(env: Task, kind: str) -> None:
    """A task of which we know how `reset` and `step` are put together."""
    own = {**{part: getattr(type(env), part) for part in PARTS}, **vars(env)}
    if missing := [part for part in PARTS if own[part] is getattr(Task, part)]:
        raise ValueError(f"{kind} has no {', '.join(missing)}; {PAGE}")
    inner = _traced(env, "start", _key())
    _check_obs(f"{kind}.observe", _traced(env, "observe", inner), env)
    result = _traced(env, "advance", inner, _action(env))
    several = isinstance(result, tuple | list)
    if not several or len(result) != 4:
        found = f"{len(result)} values" if several else _shown(result)
        expected = "4: next state, reward, termination, success"
        raise ValueError(f"{kind}.advance returns {found}; expected {expected}")
    for name, number in zip(("reward", "termination", "success"), result[1:]):
        _check_scalar(f"{kind}.advance", name, number)
    _check_same(f"{kind}.advance", "start", inner, result[0])


def _check_states(env: Any, kind: str) -> None:
    """Any other environment, as brax's API has it."""
    first = _traced(env, "reset", _key())
    _check_state(f"{kind}.reset", first, env)
    following = _traced(env, "step", first, _action(env))
    _check_state(f"{kind}.step", following, env)
    _check_same(f"{kind}.step", "reset", first, following)


def _check_state(where: str, state: Any, env: Any) -> None:
    if not all(hasattr(state, field) for field in FIELDS):
        raise ValueError(f"{where} returns {_shown(state)}; expected an envs.State with {', '.join(FIELDS)}")
    _check_obs(where, state.obs, env)
    for name in ("reward", "done"):
        _check_scalar(where, name, getattr(state, name))
    for field, flags in FLAGS.items():
        held = getattr(state, field)
        held = held if isinstance(held, Mapping) else {}
        if missing := [f"{name!r} ({meaning})" for name, meaning in flags.items() if name not in held]:
            raise ValueError(f"{where} returns a state whose {field} lacks {', '.join(missing)}; {PAGE}")
        for name in flags:
            _check_scalar(where, f"{field}[{name!r}]", held[name])


def _check_obs(where: str, obs: Any, env: Any) -> None:
    size = operator.index(env.observation_size)
    if getattr(obs, "shape", None) != (size,):
        raise ValueError(
            f"{where} returns {_shown(obs)} as the observation; expected an array [{size}], since "
            f"observation_size is {size}"
        )


def _check_scalar(where: str, name: str, number: Any) -> None:
    if getattr(number, "shape", None) != ():
        raise ValueError(f"{where} returns {_shown(number)} as the {name}; expected one number, of shape []")


def _check_same(where: str, start: str, old: Any, new: Any) -> None:
    """A state must keep its structure, shapes and dtypes, or no `lax.scan` could carry it.

    A narrower dtype is fine: where an episode begins anew, both are joined, and become the wider one.
    """
    before, after = _leaves(old), _leaves(new)
    for name in {**before, **after}:
        was, becomes = before.get(name), after.get(name)
        alike = None not in (was, becomes) and was.shape == becomes.shape
        if not alike or not _holds(was.dtype, becomes.dtype):
            was, becomes = ("nothing" if leaf is None else _shown(leaf) for leaf in (was, becomes))
            raise ValueError(f"{where} returns {becomes} as {name}, and {start} {was}; they must agree")
    if (was := jax.tree.structure(old)) != (becomes := jax.tree.structure(new)):
        raise ValueError(f"{where} returns a state of {becomes}, and {start} of {was}; they must agree")


def _holds(wide: Any, dtype: Any) -> bool:
    """Whether `dtype` joined with `wide` becomes `wide`; random keys can be joined with nothing else."""
    keys = any(jnp.issubdtype(each, jax.dtypes.extended) for each in (wide, dtype))
    return dtype == wide if keys else jnp.promote_types(wide, dtype) == wide


def _leaves(state: Any) -> dict[str, Any]:
    """The arrays of a state, by name."""
    paths = jax.tree_util.tree_leaves_with_path(state)
    return {f"state{jax.tree_util.keystr(path)}": leaf for path, leaf in paths}


def _traced(env: Any, method: str, *args: Any) -> Any:
    """What `method` returns for arguments of these shapes, as shapes."""
    try:
        return jax.eval_shape(lambda *args: getattr(env, method)(*args), *args)
    except Exception as error:
        raise ValueError(_failure(f"{type(env).__name__}.{method}", error, type(env))) from None


def _key() -> Any:
    return jax.eval_shape(jax.random.PRNGKey, 0)


def _action(env: Any) -> jax.ShapeDtypeStruct:
    if is_discrete(env):
        return jax.ShapeDtypeStruct((), jnp.int32)
    return jax.ShapeDtypeStruct((operator.index(env.action_size),), jnp.float32)


def _is_count(size: Any) -> bool:
    try:
        return operator.index(size) >= 1
    except TypeError:
        return False


def _shown(found: Any) -> str:
    """An array as float32[3], anything else as its type."""
    if hasattr(found, "dtype"):
        return f"{found.dtype}{list(found.shape)}"
    return "None" if found is None else f"a {type(found).__name__}"


# --- errors of the user's code ---


def _failure(what: str, error: Exception, of: Any) -> str:
    """What happened in `what`, in one line; `of` (a module's name, class or function) is the user's own."""
    where = _place(error, of)
    if isinstance(error, NOT_TRACED):
        return (
            f"{what} uses the value of an array in Python or NumPy ({where}), but JAX traces it without "
            "values; write it with jax.numpy and jax.lax, such as jnp.where instead of `if`"
        )
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    said = ": ".join([type(error).__name__, *text.strip().splitlines()[:1]])
    return f"{what} raises {said} ({where})"


def _place(error: Exception, of: Any) -> str:
    """The last line of the user's own package that failed; else the line where `of` is defined."""
    if isinstance(error, SyntaxError) and error.filename:
        return _line(error.filename, error.lineno)
    of = getattr(of, "func", of)  # of a functools.partial
    package = (of if isinstance(of, str) else of.__module__).partition(".")[0]
    for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package:
            return _line(frame.f_code.co_filename, line)
    with contextlib.suppress(OSError, TypeError):  # its source is not at hand
        return _line(inspect.getfile(of), inspect.getsourcelines(of)[1])
    return f"in {package}"


def _line(file: str, number: int | None) -> str:
    return f"{file.removeprefix(os.getcwd() + os.sep)}, line {number}"
