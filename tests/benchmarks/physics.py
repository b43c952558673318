"""How fast our environments step, with nothing learnt, against the bare engine and against Gymnasium, on
whatever device JAX finds.

One pass is `--length` steps of all worlds. Four contestants make it in turns, so that a machine that others
use too treats them alike:

==========  ===========================================================================================
ours        one jitted scan of vmapped `envs.step_and_reset`, which draws the actions and starts fallen
            worlds anew
Batch       `mujoco.batch.Batch`: one call of `frame_skip` steps per step of the environment, from
            Python, without JAX
rollout     `mujoco.rollout`: one call for `BLOCK` steps of the environment, on as many threads as Batch
Gymnasium   its vector environment of the same task, `vectorization_mode="sync"`: one thread, at most
            `GYMNASIUM_WORLDS` worlds
==========  ===========================================================================================

An engine's speed depends on what it simulates: a body on the ground has more contacts than one that flies. So
Batch plays after what ours played: it steps the same model (`env.model`, halved contact margins and all) from
the same states, under the same random controls (drawn for every step, uniform over the actuators' range), and
where a world of ours ended, it puts its own into the same new state. With the engine `mujoco` these are the
very same simulations, and the column "same" has the share of worlds whose last positions agree to 1e-6; MJX
rounds differently, so that its simulations depart from Batch's, but controls and restarts are shared. All
start in motion, `--length` steps after a reset, and each pass starts there again. Draws and resets cost time
in ours alone: Batch finds both done, hence ours / Batch is the share of the engine's speed that is left.

The rollout cannot start worlds anew. It goes on from Batch's states after every block, so that a fallen body
lies there for less than a block; of the hands' scenes it has one for all worlds. Gymnasium plays the same
actions, starts worlds anew by its own rule, goes on from pass to pass, and has models of its own:
AntMaze_Large-v4 makes as many MuJoCo steps per step as our AntMaze, but half as long ones and with stronger
motors. Maze2D is computed without an engine; Batch and rollout there step the MuJoCo model of
PointMaze_Large-v3, from its own starts.

MJX on a CPU takes up to a minute to compile for each shape, so there it is measured with `--mjx-worlds`
alone. What would take longer than `--budget` is left out, or measured with a single pass, and the table says
so. Programs are compiled as a run's are, for a GPU with the options of `data/runs/program.py`. Compilation is
not part of any rate, and no cache shortens it, unless `--cached` allows one.

    python tests/benchmarks/physics.py --json out.json
    python tests/benchmarks/physics.py --envs antmaze-large-diverse --engines mujoco --worlds 64
    python tests/benchmarks/physics.py --envs door hammer pen relocate --engines mujoco mujoco:mjx mjx
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any
from unittest import mock

import gymnasium
import jax
import mujoco
import mujoco.rollout
import numpy as np
import tyro
from mujoco.batch import Batch, SimulationError
from rich.console import Console
from rich.table import Table
from throughput import machine, turn

from ooo_rl import envs
from ooo_rl.data.runs.program import compile_for
from ooo_rl.envs import gymnasium_eval
from ooo_rl.envs.physics_task import PhysicsTask, Scene

ON_CPU = jax.default_backend() == "cpu"
THEIRS = {  # the same task in Gymnasium
    "halfcheetah": "HalfCheetah-v4", "hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "ant": "Ant-v4",
    "antmaze-large-diverse": "AntMaze_Large-v4", "maze2d-large": "PointMaze_Large-v3",
    "door": "AdroitHandDoor-v1", "hammer": "AdroitHandHammer-v1", "pen": "AdroitHandPen-v1",
    "relocate": "AdroitHandRelocate-v1",
}  # fmt: skip
GYMNASIUM_WORLDS = 64
BLOCK = 16  # steps of the environment in one call of mujoco.rollout
NO_ENGINE = "jax"  # stands for the engine where an environment has none
NO_ROBOTICS = "no gymnasium-robotics"
RIVALS = ("batch", "rollout", "gymnasium")


@dataclass(frozen=True)
class Args:
    """Steps per second of our environments, against the bare engine and Gymnasium."""

    envs: tuple[str, ...] = tuple(THEIRS)
    """names of environments (`envs.names()`); those that Gymnasium lacks are compared with the bare engine
    alone"""
    engines: tuple[str, ...] = ("mujoco", "mjx") + (
        ("mjx-warp",) if not ON_CPU and importlib.util.find_spec("warp") else ()
    )
    """engines behind our environments, or engine:model of a hand or the kitchen, such as mujoco:mjx; Maze2D
    has none and is measured once"""
    worlds: tuple[int, ...] = (1, 8, 64, 256) if ON_CPU else (1, 8, 64, 256, 1024, 4096, 16384)
    """worlds side by side"""
    mjx_worlds: tuple[int, ...] | None = (8,) if ON_CPU else None
    """of those, the ones to measure MJX with; None: all"""
    alone: bool = False
    """measure ours without the bare engine and Gymnasium"""
    length: int = 48
    """steps in one pass"""
    seconds: float = 0.4
    """least length of one measurement: passes are repeated to fill it"""
    repeats: int = 3
    """measurements of each rate"""
    budget: float = 120.0 if ON_CPU else 300.0
    """most seconds for one contestant at one number of worlds: beyond it a single pass is made, or none"""
    cached: bool = False
    """take programs from JAX's compilation cache (JAX_COMPILATION_CACHE_DIR); compile times then mean
    nothing
    """
    lock: str = ""
    """file that several benchmarks name which run side by side: they compile at once and measure in turns"""
    json: str = ""
    """write settings, machine and all measurements to this file"""
    smoke: bool = False
    """only see whether it works: halfcheetah with mujoco, 2 worlds, short passes"""


class Compilations:
    """How many programs JAX has compiled so far in this process."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, *_, **__) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


COMPILATIONS = Compilations()


@dataclass
class Tape:
    """What ours did in one pass, for others to play after.

    start: qpos, qvel and the solver's warm start of n worlds, each [n, .]; actions, controls [length, n, nu];
    restarts: for each step, None or (worlds [k], their new qpos [k, nq], their new qvel [k, nv], their new
    scenes [k, m]); final [n, nq]: qpos at the end, None where no one can tell; scene, scenes [n, m]: in what
    the worlds' models differ at the start, of tasks where they do.
    """

    start: tuple[np.ndarray, np.ndarray, np.ndarray]
    actions: np.ndarray
    controls: np.ndarray
    restarts: list[tuple | None]
    final: np.ndarray | None
    scene: Scene | None = None
    scenes: np.ndarray | None = None


class Ours:
    """One environment at one number of worlds, compiled; a call is one pass, the same at every call."""

    def __init__(self, name: str, engine: str, worlds: int, length: int):
        physics, _, model = engine.partition(":")
        self.env = envs.make(
            name, physics="auto" if engine == NO_ENGINE else physics, **({"model": model} if model else {})
        )
        self.worlds, self.length, self.key = worlds, length, jax.random.PRNGKey(1)
        self.state = jax.jit(jax.vmap(self.env.reset))(jax.random.split(jax.random.PRNGKey(0), worlds))
        self.options = self.env.compiler_options
        began = time.perf_counter()
        lowered = jax.jit(self._pass, compiler_options=self.options).lower(self.state, self.key)
        self.program = compile_for(lowered, jax.default_backend())
        self.compile_seconds, self.recompilations = time.perf_counter() - began, 0

    def _draw(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One step's actions [worlds, action_size], and the keys for what begins after it."""
        now, after = jax.random.split(key)
        return jax.random.uniform(
            now, (self.worlds, self.env.action_size), minval=-1.0, maxval=1.0
        ), jax.random.split(after, self.worlds)

    def _pass(self, state: envs.State, key: jax.Array, watch: Callable = lambda state, actions: None):
        def step(state, key):
            actions, after = self._draw(key)
            following, reached = jax.vmap(partial(envs.step_and_reset, self.env))(state, actions, after)
            return following, (reached.done > 0, envs.tally(reached), watch(state, actions))

        return jax.lax.scan(step, state, jax.random.split(key, self.length))

    def __call__(self) -> tuple[envs.State, tuple[jax.Array, dict, None]]:
        before = COMPILATIONS.count
        result = jax.block_until_ready(self.program(self.state, self.key))
        self.recompilations += COMPILATIONS.count - before
        return result

    def engine_share(self) -> float | None:
        """The share of a pass in which C MuJoCo steps; what is left is ours. None on another engine."""
        if self.env.backend != "mujoco":
            return None
        spent, step = [], Batch.step

        def timed(batch: Batch, *args, **kwargs):
            began = time.perf_counter()
            try:
                return step(batch, *args, **kwargs)
            finally:
                spent.append(time.perf_counter() - began)

        with mock.patch.object(Batch, "step", timed):
            began = time.perf_counter()
            self()
            whole = time.perf_counter() - began
        return sum(spent) / whole

    def tape(self) -> Tape:
        """Makes a pass and writes down what happened; draws and resets are repeated from their keys."""
        after, (done, *_) = self()
        actions, keys = jax.jit(jax.vmap(self._draw))(jax.random.split(self.key, self.length))
        if not isinstance(self.env, PhysicsTask):
            return Tape((), np.asarray(actions), np.asarray(actions, np.float64), [None] * self.length, None)
        begin = jax.jit(jax.vmap(self.env.reset))
        restarts = []
        for ended, key in zip(np.asarray(done), keys):
            which = np.flatnonzero(ended)
            if len(which):
                new = begin(key)
                restarts.append(
                    (which, *(part[which] for part in self._parts(new)[:2]), scenes_of(new, which))
                )
            else:
                restarts.append(None)
        control = lambda state, actions: jax.vmap(self.env.control)(actions, state.pipeline_state)  # noqa: E731
        again = jax.jit(partial(self._pass, watch=control), compiler_options=self.options)
        controls = np.asarray(again(self.state, self.key)[1][2], np.float64)
        parts = self._parts(self.state), np.asarray(actions), controls, restarts, self._parts(after)[0]
        return Tape(*parts, self.env.engine.scene, scenes_of(self.state, slice(None)))

    def _parts(self, state: envs.State) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """qpos, qvel and warm start of the worlds, with all the digits that the engine has."""
        inner, model = state.pipeline_state, self.env.model
        body = getattr(inner, "body", inner)
        if self.env.backend != "mujoco":
            return tuple(np.asarray(part, np.float64) for part in (body.qpos, body.qvel, body.inner))
        numbers = np.ascontiguousarray(body.inner).view(np.float64)
        return tuple(np.split(numbers, np.cumsum([model.nq, model.nv, model.nv]), axis=1)[:3])


def scenes_of(state: envs.State, which) -> np.ndarray | None:
    """What the models of some worlds have of their own [k, m]."""
    inner = state.pipeline_state
    scenes = getattr(getattr(inner, "body", inner), "scene", None)
    return None if scenes is None else np.asarray(scenes, np.float64)[which]


class BatchPlayer:
    """Plays a tape after with `Batch`; a call is one pass."""

    def __init__(self, model: mujoco.MjModel, frame_skip: int, tape: Tape):
        self.tape, self.frame_skip, self.batch = tape, frame_skip, Batch(model, len(tape.start[0]))
        self.qpos, self.qvel, self.warmstart, self.ctrl, self.time = map(
            self.batch.bind, ("qpos", "qvel", "qacc_warmstart", "ctrl", "time")
        )
        self.fresh = self.batch.state.copy()

    def __call__(self, watch: Callable[[int], Any] = lambda step: None) -> None:
        """`watch` is called before every step."""
        self.batch.state[:] = self.fresh
        self.qpos[:], self.qvel[:], self.warmstart[:] = self.tape.start
        self.set_scenes(slice(None), self.tape.scenes)
        for step, (controls, restart) in enumerate(zip(self.tape.controls, self.tape.restarts)):
            watch(step)
            self.ctrl[:] = controls
            with contextlib.suppress(
                SimulationError
            ):  # such a world stays what it was until it starts anew, as ours did
                self.batch.step(nstep=self.frame_skip)
            if restart is not None:
                which, qpos, qvel, scenes = restart
                self.qpos[which], self.qvel[which], self.warmstart[which] = qpos, qvel, 0.0
                self.set_scenes(which, scenes)

    def set_scenes(self, which: Any, scenes: np.ndarray | None) -> None:
        for field, row, values in [] if scenes is None else self.tape.scene.split(self.batch.model, scenes):
            self.batch.expand(field)[which, row] = values

    def same(self) -> float | None:
        """Share of worlds whose positions are now those of the tape's end."""
        if self.tape.final is None:
            return None
        return float((np.abs(self.qpos - self.tape.final).max(1) < 1e-6).mean())


class RolloutPlayer:
    """Plays a tape after with `mujoco.rollout`, block by block, from the states that a BatchPlayer was in; a
    call is one pass."""

    def __init__(self, player: BatchPlayer):
        model, tape = player.batch.model, player.tape
        if mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_FULLPHYSICS) != 1 + model.nq + model.nv:
            raise ValueError("the state is more than time, positions and velocities")
        self.model, threads = model, player.batch.nthread
        self.pool = mujoco.rollout.Rollout(nthread=threads)
        self.data = [mujoco.MjData(model) for _ in range(threads)]
        self.blocks = []

        def watch(step: int) -> None:
            if step % BLOCK == 0:
                state = np.concatenate([player.time[:, None], player.qpos, player.qvel], axis=1)
                controls = np.repeat(tape.controls[step : step + BLOCK], player.frame_skip, axis=0)
                self.blocks.append(
                    (state, np.ascontiguousarray(controls.swapaxes(0, 1)), player.warmstart.copy())
                )

        player(watch)

    def __call__(self) -> None:
        for state, controls, warmstart in self.blocks:
            self.pool.rollout(self.model, self.data, state, controls, initial_warmstart=warmstart)


@contextlib.contextmanager
def quiet():
    """No warnings about environments and XML files that are old on purpose, neither on the screen nor in a
    MUJOCO_LOG.TXT."""
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        mujoco.set_mju_user_warning(None)


class GymnasiumPlayer:
    """Gymnasium's vector environment under the actions of a tape; a call is one pass, which goes on where the
    last one ended."""

    def __init__(self, env_id: str, tape: Tape):
        with quiet():
            self.vector = gymnasium.make_vec(
                env_id, num_envs=tape.actions.shape[1], vectorization_mode="sync"
            )
        self.vector.reset(seed=0)
        self.actions = tape.actions

    def __call__(self) -> None:
        for actions in self.actions:
            self.vector.step(actions)


def point_mass(tape: Tape) -> tuple[mujoco.MjModel, int, Tape]:
    """Model and frame skip of PointMaze_Large-v3, and the tape with its starts in the place of ours."""
    with quiet():
        env = gymnasium.make(THEIRS["maze2d-large"])
    starts = np.stack([env.reset(seed=i)[0]["observation"] for i in range(tape.actions.shape[1])])
    inner = env.unwrapped.point_env
    return (
        inner.model,
        inner.frame_skip,
        replace(tape, start=(starts[:, :2], starts[:, 2:], np.zeros((len(starts), 2)))),
    )


class Contest:
    """All contestants of one environment at one number of worlds: the rates of those that run, the reasons of
    those that do not.

    `known` remembers what contestants needed at earlier numbers of worlds: name -> (worlds, seconds to set
    up, seconds of a pass).
    """

    def __init__(self, args: Args, name: str, worlds: int, known: dict[str, tuple[int, float, float]]):
        self.args, self.name, self.worlds, self.known = args, name, worlds, known
        self.passes: dict[str, Callable] = {}
        self.rates: dict[str, list[float]] = {}
        self.reasons: dict[str, str] = {}

    def enter(
        self,
        who: str,
        build: Callable[[], Callable],
        settle: Callable[[Any, Any], None] = lambda contestant, result: None,
    ):
        """Builds a contestant, makes its first pass, and returns it; None if it cannot be built or would take
        too long.

        `settle` gets it and the result of that pass, if more passes are to come.
        """
        if who in self.known:
            before, setup, seconds = self.known[who]
            # An accelerator may have room for more worlds in the same time, cores have not.
            seconds *= self.worlds / before if ON_CPU or not who.startswith("mjx") else 1
            if setup + seconds > self.args.budget:
                self.reasons[who] = f"skipped: about {setup + seconds:,.0f} s"
                return None
        began = time.perf_counter()
        try:
            contestant = build()
            built = time.perf_counter()
            result = contestant()
        except Exception as error:  # one engine's failure must not cost the others' numbers
            self.reasons[who] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:80]}"
            return None
        seconds = time.perf_counter() - built
        self.known[who] = self.worlds, built - began, seconds
        self.rates[who] = []
        if self.args.repeats * max(seconds, self.args.seconds) > self.args.budget:
            self.reasons[who] = "one pass"
            self.rates[who].append(self.args.length * self.worlds / seconds)
        else:
            settle(contestant, result)
            self.passes[who] = contestant
        return contestant

    def run(self) -> None:
        """All turns of all contestants."""
        for _ in range(self.args.repeats):
            for who, contestant in self.passes.items():
                count, began = 0, time.perf_counter()
                while (elapsed := time.perf_counter() - began) < self.args.seconds or not count:
                    contestant()
                    count += 1
                self.rates[who].append(count * self.args.length * self.worlds / elapsed)

    def summary(self, who: str) -> dict:
        """Rates of one contestant, in steps of the environment per second, all worlds together; and what
        there is to say."""
        found = {"note": self.reasons.get(who, "")}
        if rates := self.rates.get(who):
            found |= {"best": max(rates), "median": statistics.median(rates), "all": rates}
        return found


def compare(args: Args, name: str, engines: tuple[str, ...], worlds: int, known: dict) -> list[dict]:
    """One row per engine."""
    contest = Contest(args, name, worlds, known)
    ours: dict[str, Ours] = {}

    def settle(contestant: Ours, result) -> None:
        # Its later passes begin where the first ended: in motion, and with arrays that came out of a program.
        contestant.state = result[0]

    for engine in engines:
        if engine.startswith("mjx") and args.mjx_worlds is not None and worlds not in args.mjx_worlds:
            contest.reasons[engine] = "left out: --mjx-worlds"
        elif entered := contest.enter(engine, partial(Ours, name, engine, worlds, args.length), settle):
            ours[engine] = entered
    leader = next(iter(ours), None)
    same = None
    if args.alone or leader is None:
        contest.reasons |= dict.fromkeys(RIVALS, "--alone" if args.alone else "nothing of ours to play after")
    else:
        same = invite(contest, ours[leader])
    with turn(args.lock):
        contest.run()

    rows = []
    for engine in engines:
        row = {"env": name, "engine": engine, "worlds": worlds, "ours": contest.summary(engine)}
        if engine in ours:
            row |= {
                "compile_seconds": ours[engine].compile_seconds,
                "recompilations": ours[engine].recompilations,
                "engine_share": ours[engine].engine_share(),
            }
            row["same"] = same if engine == leader and engine.partition(":")[0] == "mujoco" else None
        for who in RIVALS:
            row[who] = contest.summary(who)
            if "best" in row["ours"] and "best" in row[who]:
                row[f"ours_per_{who}"] = row["ours"]["best"] / row[who]["best"]
                row[f"ours_per_{who}_of_medians"] = row["ours"]["median"] / row[who]["median"]
        rows.append(row)
    return rows


def invite(contest: Contest, leader: Ours) -> float | None:
    """Lets the rivals enter, to play after a pass of `leader`; returns `BatchPlayer.same`."""
    name, tape, same = contest.name, leader.tape(), None
    if isinstance(leader.env, PhysicsTask):
        bare = leader.env.model, leader.env.frame_skip, tape
    elif name == "maze2d-large" and gymnasium_eval.gymnasium_robotics is not None:
        bare = point_mass(tape)
    else:
        bare = None
    if bare is None:
        contest.reasons |= dict.fromkeys(
            ("batch", "rollout"), "no MuJoCo model" if name != "maze2d-large" else NO_ROBOTICS
        )
    elif player := contest.enter("batch", lambda: BatchPlayer(*bare)):
        same = player.same()
        contest.enter("rollout", lambda: RolloutPlayer(player))
    else:
        contest.reasons["rollout"] = "needs Batch"
    if name not in THEIRS:
        contest.reasons["gymnasium"] = "no such task"
    elif gymnasium_eval.gymnasium_robotics is None and ("Maze" in THEIRS[name] or "Hand" in THEIRS[name]):
        contest.reasons["gymnasium"] = NO_ROBOTICS
    elif contest.worlds > GYMNASIUM_WORLDS:
        contest.reasons["gymnasium"] = f"only to {GYMNASIUM_WORLDS}"
    else:
        contest.enter("gymnasium", lambda: GymnasiumPlayer(THEIRS[name], tape))
    return same


def versions() -> dict[str, str]:
    """Of what is measured here, besides what `machine` tells."""
    found = {}
    for package in ("mujoco", "mujoco-mjx", "warp-lang", "gymnasium", "gymnasium-robotics"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def show(console: Console, rows: list[dict]) -> None:
    """The rows of one environment."""
    table = Table(title=rows[0]["env"])
    for name in ("worlds", "engine", "steps/s", "median", "share", "compile s", "again", "same"):
        table.add_column(name, justify="right")
    for name in ("Batch", "rollout", "Gymnasium"):
        table.add_column(name, justify="right")
        table.add_column("ratio", justify="right")
    for i, row in enumerate(rows):
        ours = row["ours"]
        cells = [
            f"{row['worlds']:,}",
            row["engine"],
            _rate(ours),
            f"{ours['median']:,.0f}" if "median" in ours else "",
        ]
        cells.append("" if row.get("engine_share") is None else f"{row['engine_share']:.0%}")
        cells += (
            [f"{row['compile_seconds']:.1f}", str(row["recompilations"])]
            if "compile_seconds" in row
            else ["", ""]
        )
        cells.append(f"{row['same']:.0%}" if row.get("same") is not None else "")
        for who in RIVALS:
            cells += [_rate(row[who]), f"{row[f'ours_per_{who}']:.2f}" if f"ours_per_{who}" in row else ""]
        table.add_row(*cells, end_section=i + 1 == len(rows) or rows[i + 1]["worlds"] != row["worlds"])
    console.print(table)


def _rate(summary: dict) -> str:
    if "best" not in summary:
        return summary["note"]
    return f"{summary['best']:,.0f}" + (f" ({summary['note']})" if summary["note"] else "")


def main() -> None:
    args, began = tyro.cli(Args), time.perf_counter()
    if args.smoke:
        args = replace(
            args, envs=("halfcheetah",), engines=("mujoco",), worlds=(2,), length=20, seconds=0.02, repeats=2
        )
    unknown = [name for name in args.envs if name not in envs.names()]
    if unknown or min(args.worlds, default=0) < 1 or args.length < 1 or args.repeats < 1:
        sys.exit(
            f"no such environment: {', '.join(unknown)}"
            if unknown
            else "worlds, length and repeats must be positive"
        )
    jax.config.update("jax_enable_compilation_cache", args.cached)
    console = Console() if sys.stdout.isatty() else Console(width=180)
    here, command = machine() | versions(), " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    device = f"{here['devices']} x {here['device']} ({here['backend']})"
    console.print(f"{device}; host {here['cpu']}, {here['cores']} cores", highlight=False)
    names = ("jax", "mujoco", "mujoco-mjx", "warp-lang", "gymnasium", "gymnasium-robotics", "python")
    console.print(", ".join(f"{name} {here[name]}" for name in names), highlight=False)

    result = {"command": command, "settings": vars(args), "machine": here, "rows": []}
    for name in args.envs:
        engines = args.engines if isinstance(envs.make(name), PhysicsTask) else (NO_ENGINE,)
        rows, known = [], {}
        for worlds in sorted(args.worlds):
            with console.status(f"{name}, {worlds} worlds"):
                new = compare(args, name, engines, worlds, known)
            rows += new
            result |= {"rows": result["rows"] + new, "seconds": time.perf_counter() - began}
            if args.json:
                pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
        show(console, rows)
    console.print(
        f"Steps of the environment per second, all worlds together, best of {args.repeats}; ratio: ours to "
        "theirs. share: of a pass, C MuJoCo's own steps. again: programs that repeated passes compiled; same: "
        "worlds that Batch moved as ours.\n"
        "(one pass): --budget has no room for more.",
        highlight=False,
    )
    console.print(f"{command}: {time.perf_counter() - began:.0f} s", highlight=False)


if __name__ == "__main__":
    main()
