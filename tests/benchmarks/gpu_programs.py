"""The programs that a run compiles, found without running one, and compiled for a GPU that is not there.

A script's own `train` goes through its plan. Each compiled function notes the shapes it is called with, and
answers with the shapes of its results, so nothing is computed and no dataset is read. Then each program is
compiled as `Compiled` does it for a run, with a described card in the place of a device.
"""

import contextlib
import functools
import importlib
import io
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from types import SimpleNamespace
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"  # what is compiled for a GPU is compiled on a CPU

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from gpu_thunks import Counting, Speed, instructions, parse
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from methods import Rehearsal

from ooo_rl import envs
from ooo_rl.data.buffer import Transition
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs import evaluation, session
from ooo_rl.data.runs.program import EVERYWHERE, RUNS, Compiled, at_once
from ooo_rl.data.runs.settings import DEFAULT_ENVS
from ooo_rl.envs.physics_task import PhysicsTask

CARDS = pathlib.Path(__file__).parent / "gpus"
ROWS = 100_000  # of the dataset that a run is told it has
USUAL = {"learns": True, "record": False, "fqe": False}  # static settings that a program is not named after
STEPS = 100  # environment steps in one program

INSTALL = (  # without what the programs need to run, such as cuBLAS; ptxas comes with nvcc
    f"pip install --no-deps --target cuda_compiler jax-cuda12-plugin=={jax.__version__} "
    f"jax-cuda12-pjrt=={jax.__version__} nvidia-cuda-nvcc-cu12, then set PYTHONPATH=cuda_compiler"
)


class Card:
    """A described GPU, by the name of its file in gpus/, or by the path of another such file.

    mesh: of one such device. options: for XLA's compiler.
    Raises UsageError if the file is no description, or if XLA's compiler for CUDA is not there.
    """

    def __init__(self, name: str):
        path = CARDS / f"{name}.txtpb" if (CARDS / f"{name}.txtpb").is_file() else pathlib.Path(name)
        if not path.is_file():
            known = ", ".join(sorted(path.stem for path in CARDS.glob("*.txtpb")))
            raise UsageError(f"--card {name}: neither one of {known}, nor a file")
        text = path.read_text()
        self.name = _entry(path, text, 'name: "([^"]*)"')
        bandwidth, cores, units, clock = (
            float(_entry(path, text, rf"{key}: ([\d.]+)"))
            for key in ("memory_bandwidth", "core_count", "fpus_per_core", "clock_rate_ghz")
        )
        self.speed = Speed(bandwidth, 2e9 * cores * units * clock)  # a multiplication and an addition a cycle
        # Without a GPU, XLA cannot time Triton's products against cuBLAS's, and would take Triton's untimed.
        self.options = {"xla_gpu_enable_triton_gemm": False}
        if re.search(r"\bmajor: 9\b", text):  # else XLA misses a table, which our estimate does without
            self.options["xla_gpu_collect_cost_model_stats"] = True
        try:
            topology = topologies.get_topology_desc(platform="cuda", target_config=text, topology="1x1x1")
        except Exception as error:  # of several types, by what is missing
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UsageError(
                f"XLA cannot compile for {path} here ({reason}); its compiler: {INSTALL}"
            ) from None
        self.mesh = Mesh(np.array(topology.devices), ("runs",))


def _entry(path: pathlib.Path, text: str, pattern: str) -> str:
    if found := re.search(rf"^\s*{pattern}", text, re.MULTILINE):
        return found[1]
    raise UsageError(f"--card {path}: it has no line {pattern.partition(':')[0]}; see those in {CARDS}")


def shapes(tree, mesh: Mesh, spec):
    """`tree` with shapes and types in the place of arrays, as if `place` had put it there."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=sharding), tree
    )


class Noted(Compiled):
    """Compiled; a call notes its arguments, computes nothing, and returns the shapes of its results."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.noted: dict[tuple, tuple[list, dict]] = {}  # what static settings but the length are -> a call

    @property
    def name(self) -> str:
        return getattr(self.function, "func", self.function).__name__

    def __call__(self, *arguments, **static):
        axes = tuple(None if name in self.shared else 0 for name in self.names[: len(arguments)])
        given = [
            shapes(x, self.mesh, EVERYWHERE if axis is None else RUNS) for x, axis in zip(arguments, axes)
        ]
        kind = tuple(sorted((name, value) for name, value in static.items() if name != "length"))
        _, known = self.noted.get(kind, (None, {}))
        if static.get("length", 0) >= known.get("length", 0):  # the longest chunk stands for all
            self.noted[kind] = given, static
        return jax.eval_shape(at_once(partial(self.function, **static), axes), *given)


class Shapes(Rehearsal):
    """A run through its plan in which arrays are shapes; each policy that is evaluated plays once."""

    def begin(self, state, act):
        self.evaluate = evaluation.Evaluator(self.args, self.env, act, self.mesh)
        return super().begin(state, act)

    def after(self, chunk, metrics, state, actor=None):
        actor = getattr(state, chunk.agent).actor.params if actor is None else actor
        self.evaluate.rollout(actor, self.keys, record=False)


@dataclass(frozen=True)
class Program:
    """A program to compile. width: seeds, or worlds. length: the steps that its main loop must have; 0: any."""

    name: str
    width: int
    compiled: Compiled
    arguments: list
    static: dict
    length: int


def of_method(name: str, card: Card, num_seeds: int, **settings) -> list[Program]:
    """The programs of algos/`name`.py, in the order of its functions, with these settings and its defaults.

    Settings that the method does not have are left out. Its table of settings by environment is, too. A
    method of discrete actions runs in the toy maze.
    """
    script, made = importlib.import_module(f"ooo_rl.algos.{name}"), []
    known = {field.name for kind in (script.Args, script.Hyper) for field in fields(kind)}

    def note(*arguments, **more):
        made.append(Noted(*arguments, **more))
        return made[-1]

    patches = {
        script: {"Session": Shapes},
        evaluation: {"Compiled": note},
        session: {
            "Compiled": note,
            "mesh_for": lambda *_: card.mesh,
            "place": lambda tree, *_: tree,  # it stays on the host until a call takes its shape
            "load_dataset": lambda args: None if args.dataset == "none" else zero_rows(args),
        },
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for module, parts in patches.items():
            stack.enter_context(mock.patch.multiple(module, **parts))
        given = {key: value for key, value in settings.items() if key in known}
        if (kind := script.Args.actions) != "continuous":
            given["env"] = DEFAULT_ENVS[kind]
        script.train(script.Args.exactly({"num_seeds": num_seeds, **given}))
    found = []
    for program in made:
        for kind, (arguments, static) in program.noted.items():
            marks = "".join(f"[{key}={value}]" for key, value in kind if USUAL.get(key) != value)
            length = static.get("length", 0)
            found.append(
                Program(f"{name}/{program.name}{marks}", num_seeds, program, arguments, static, length)
            )
    return found


def zero_rows(args) -> SimpleNamespace:
    """What a script needs of a dataset that fits the environment."""
    env, zeros = envs.make(args.env, args.physics), partial(np.zeros, dtype=np.float32)
    obs, scalar = zeros((ROWS, env.observation_size)), zeros(ROWS)
    action = np.zeros(ROWS, np.int32) if envs.is_discrete(env) else zeros((ROWS, env.action_size))
    card = {"id": "rows of zeros", "return_quantiles": [0.0, 1.0], "reward_range": [0.0, 1.0]}
    return SimpleNamespace(
        transitions=Transition(obs, action, scalar, obs, scalar), truncation=np.zeros(ROWS, bool), card=card
    )


@functools.cache
def bodies() -> tuple[str, ...]:
    """One environment of each MuJoCo model."""
    found = {}
    for name in envs.names():
        env = envs.make(name)
        if isinstance(env, PhysicsTask):
            model = np.empty(mujoco.mj_sizeModel(env.model), np.uint8)
            mujoco.mj_saveModel(env.model, None, model)
            found.setdefault((model.tobytes(), env.frame_skip), name)
    return tuple(found.values())


def physics_of(name: str) -> str:
    """The engine that an environment has on a GPU."""
    return "mjx" if isinstance(envs.make(name), PhysicsTask) else "auto"


def of_body(name: str, card: Card, worlds: int) -> Program:
    """Steps of so many worlds under random actions; who ends an episode begins another one."""
    env = envs.make(name, physics_of(name))

    def step(state, *, length):
        def one(carry, _):
            env_state, key = carry
            key, action_key, reset_key = jax.random.split(key, 3)
            action = jax.random.uniform(action_key, (worlds, env.action_size), minval=-1.0)
            env_state, reached = envs.step_all(env, env_state, action, reset_key)
            return (env_state, key), reached.reward.mean()

        return jax.lax.scan(one, state, None, length)

    keys = jax.eval_shape(jax.random.PRNGKey, 0)
    start = jax.eval_shape(lambda key: (jax.vmap(env.reset)(jax.random.split(key, worlds)), key), keys)
    alone = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), start)
    state = shapes(alone, card.mesh, RUNS)
    return Program(f"{name}/step", worlds, Compiled(step, card.mesh), [state], {"length": STEPS}, STEPS)


@dataclass(frozen=True)
class Cost:
    """What a program does. steps: of its main loop, 1 if it has none. step: the counts of one of them.

    The main loop has more than half of all launches. whole: the counts of one call. memory: bytes by kind.
    seconds: of compilation.
    """

    steps: int
    step: dict
    whole: dict
    memory: dict
    seconds: float


@contextlib.contextmanager
def dumping(options: dict) -> Iterator[pathlib.Path]:
    """A folder into which XLA writes what it compiles, with these options."""
    compile_it = jax.stages.Lowered.compile
    with tempfile.TemporaryDirectory() as folder:

        def compile_and_dump(self, compiler_options=None):
            all_options = {**(compiler_options or {}), **options, "xla_dump_to": folder}
            return compile_it(self, compiler_options=all_options)

        with mock.patch.object(jax.stages.Lowered, "compile", compile_and_dump):
            yield pathlib.Path(folder)


def texts(folder: pathlib.Path) -> tuple[str, str]:
    """XLA's list of thunks, and what it says about them, of the only program in a folder of its dumps."""

    def text(pattern: str) -> str:
        paths = list(folder.glob(pattern))
        if len(paths) != 1:
            raise ValueError(f"XLA wrote {len(paths)} files {pattern}, not one; is a compilation cache on?")
        return paths[0].read_text()

    after = "*thunk_sequence_after_thunk_passes.txt"  # not there where no pass changed a thing
    sequence = text(after if any(folder.glob(after)) else "*thunk_sequence.txt")
    return sequence, text("*thunk_metadata.txt")


def cost(program: Program, card: Card, loops: tuple[int, ...]) -> Cost:
    """Compiles a program and counts; `loops` as in Counting."""
    began = time.perf_counter()
    with dumping(card.options) as folder:
        compiled = program.compiled.program(*program.arguments, **program.static)
        seconds, thunks = time.perf_counter() - began, parse(*texts(folder))
    counting = Counting(instructions(compiled.as_text()), loops, card.speed)
    whole = counting.count(thunks)
    main, steps, graph = counting.main_loop(thunks) or (None, 1, False)
    step = whole if main is None else counting.count(main.parts["body"], graph)
    if 2 * steps * step["launches"] <= whole["launches"]:
        step, steps = whole, 1
    if program.length and steps != program.length:
        raise ValueError(f"{program.name}: its main loop has {steps} steps, not {program.length}")
    memory, parts = compiled.memory_analysis(), ("argument", "output", "alias", "temp")
    sizes = {part: getattr(memory, f"{part}_size_in_bytes") for part in parts}
    sizes["peak"] = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]
    return Cost(steps, dict(step), dict(whole), sizes, seconds)
