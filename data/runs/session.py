"""One run of a method, from its settings to its folder: what every method needs, and no method is about."""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import pathlib
import shlex
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ooo_rl import envs
from ooo_rl.data import buffer
from ooo_rl.data.buffer import Transition
from ooo_rl.data.datasets import choices
from ooo_rl.data.datasets.card import print_card
from ooo_rl.data.datasets.scores import normalized_score
from ooo_rl.data.datasets.validate import Dataset, check_fits
from ooo_rl.data.errors import Stopped, UsageError, check_interrupted
from ooo_rl.data.figures import aggregates
from ooo_rl.data.learner import Learner
from ooo_rl.data.modes import usual_promotion
from ooo_rl.data.recipes import library
from ooo_rl.data.runs import ends, memory, processes, report, worlds
from ooo_rl.data.runs.bounds import flag
from ooo_rl.data.runs.checkpoint import Checkpoints, check_agent, load_agent, save_for_inspection
from ooo_rl.data.runs.evaluation import Evaluator, check_eval_env, check_q_bias
from ooo_rl.data.runs.folder import (
    NoFolder,
    RunFolder,
    create,
    finite_or_none,
    numbers,
    place_of,
    task_of,
    versions,
    write_json,
)
from ooo_rl.data.runs.health import Health
from ooo_rl.data.runs.online_change import online_hyper
from ooo_rl.data.runs.plan import Chunk, Phase, cut
from ooo_rl.data.runs.program import EVERYWHERE, RUNS, Compiled, filled, mesh_for, place, real, scan_mean
from ooo_rl.data.runs.settings import other_values, read_config, resolved, to_json, useless
from ooo_rl.data.runs.sweep import grid
from ooo_rl.data.runs.tracking import Tracker, check_tracker, open_tracker

__all__ = ["Phase", "Result", "Session", "Static", "scan_mean", "start_online"]  # what scripts use

MEASURES = ("success", "return", "length")
Q_MEASURES = ("predicted_q", "q_bias")  # with --q-bias
HASHES = "sha256", "sha256_of_ends"  # of a dataset's card
EVALUATION = 2**31  # makes the key of evaluations from a run's first key
BAR_COLUMNS = (
    TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
    TimeRemainingColumn(),
)  # fmt: skip


class Static(NamedTuple):
    """What is fixed when a method's functions are compiled: their first argument.

    example: one row of experience, all zero, for whatever needs shapes. nets: the method's networks.
    """

    args: Any
    env: envs.Env | None
    example: Transition
    nets: Any


@dataclass(frozen=True)
class Result:
    """What `train` returns.

    folder: the run's. results: what its result.json holds. agents: name -> parameters and optimisers, arrays
    with a leading axis of runs, in the order of `results["seeds"]`.
    """

    folder: pathlib.Path
    results: dict
    agents: dict[str, Any]


class Session:
    """A run of `method`: its seeds and settings, dataset and environment, compiled functions and folder.

    args: the settings in force. hyper: the traced ones, arrays [runs]. keys [runs, 2]: one per run.
    data: the dataset or None. offline: its rows on the device. truncation [N]: its rows that end an episode
    without a termination. env: the environment or None. example: one row of experience, all zero.

    Everything that a user can mend is refused here, before anything compiles and before a folder is made. If
    several processes run this, each has a session, with the same values but for clocks; see `processes`.
    """

    def __init__(self, method: str, args: Any, make_plan: Callable[[Any], list[Phase]]):
        self.began = time.perf_counter()
        with processes.together():
            self.method, self.args = method, worlds.chosen(resolved(args), make_plan)
            self.console = Console()
            self.task = task_of(self.args)
            hyper, self.labels = grid(self.args)
            check_tracker(self.args.track)
            if self.args.init_from and not self.args.resume:
                check_agent(self.args.init_from, self.labels)
            phases = make_plan(self.args)
            self.plan, self.first_agent = cut(self.args, phases), phases[0].agent
            self.untrained = {phase.agent for phase in phases} - {chunk.agent for chunk in self.plan}
            self._find_folder()
        with usual_promotion():
            self.data = processes.first_and_then_others(partial(load_dataset, self.args))
        self.card = self.data.card if self.data else {"id": "none"}
        rows = self.data and self.data.transitions
        with processes.together():
            if self.folder:
                check_same(self.path, self.card)
            self.env = env = None if self.args.env == "none" else envs.make(self.args.env, self.args.physics)
            if env and self.args.end_reward != ends.AS_GIVEN:
                self.env = env = ends.EndsByReward(env, self.args.end_reward)
            self.obs_size = env.observation_size if env else self.card["obs_size"]
            self.action_size = env.action_size if env else self.card["action_size"]
            check_eval_env(self.args, self.obs_size, self.action_size)
        self._agree()
        obs, scalar = jnp.zeros(self.obs_size), jnp.float32(0)
        action = jnp.int32(0) if self.args.actions == "discrete" else jnp.zeros(self.action_size)
        self.example = Transition(obs, action, scalar, obs, scalar)
        self.num_runs = len(self.labels)
        self.mesh = self._layout()
        if self.args.online_steps and getattr(self.env, "backend", "jax") != "jax":
            self.console.print(worlds.described(self.args, self.env, self.num_runs))
        self._say_what_is_idle()
        horizon = getattr(self.env, "horizon", 1000)
        self.health = Health(self.labels, np.asarray(hyper.discount), horizon, self.args.max_q)
        self.hyper = place(hyper, self.mesh, RUNS)
        self.offline = place(rows, self.mesh, EVERYWHERE)
        self.truncation = place(self.data and self.data.truncation, self.mesh, EVERYWHERE)
        first_keys = jnp.stack([jax.random.PRNGKey(label.seed) for label in self.labels])
        self.keys = place(first_keys, self.mesh, RUNS)
        # The same starts for every phase and step. No split of the keys of training comes to these: its
        # k-th part is fold_in(key, k).
        eval_keys = jax.vmap(lambda key: jax.random.fold_in(key, EVALUATION))(first_keys)
        self.eval_keys = place(eval_keys, self.mesh, RUNS)
        self.programs: list[Compiled] = []
        self.q_of: dict[str, Callable] = {}  # agent -> its Q-value, where a script has its own
        self.phases: dict[str, dict[str, list]] = {}  # phase -> measure -> [runs], the last evaluation
        self.work = dict.fromkeys(("updates", "env_steps", "broken_worlds", "run", "online"), 0.0)
        self.before = dict.fromkeys(("wall", "compile", *self.work), 0.0)  # a resumption
        self.stopping: signal.Signals | None = None
        self.tracker: Tracker = lambda *_: None

    def _find_folder(self) -> None:
        """The folder to go on with, locked, or None; and the path of the folder, which process 0 chooses."""
        self.folder, self.path = None, pathlib.Path(self.args.resume).expanduser()
        if self.args.resume:
            theirs = read_config(self.args.resume, "--resume").get("method", self.method)
            if theirs != self.method:
                raise UsageError(f"--resume {self.path}: {theirs} made that run, and this is {self.method}")
            self.folder = self._opened()
        elif processes.is_first():
            self.path = place_of(self.method, self.args)

    def _say_what_is_idle(self) -> None:
        """Names settings that change nothing, and says if the online phase does not learn."""
        for name, needed in useless(self.args).items():
            self.console.print(f"{flag(name)} changes nothing without {needed}", soft_wrap=True)
        if self.args.online_steps and not any(chunk.learns for chunk in self.plan if chunk.acts):
            name = "learning_starts" if hasattr(self.args, "learning_starts") else "random_steps"
            self.console.print(
                f"no gradient step online: the first one comes after {flag(name)} "
                f"{getattr(self.args, name)}, and --online-steps is {self.args.online_steps}"
            )

    def _opened(self) -> RunFolder:
        return (RunFolder if processes.is_first() else NoFolder)(self.path, self.labels)

    def _agree(self) -> None:
        """Makes sure that all processes run the same; those after the first learn its path."""
        if processes.are_several():
            settings = json.dumps([self.method, to_json(self.args)], default=str)
            processes.check_same({
                "setting": hashlib.sha256(settings.encode()).hexdigest(),
                "dataset": [self.card.get(of) for of in HASHES],
                "version of Python or of a package": versions(),
            })  # fmt: skip
            self.path = pathlib.Path(processes.texts(str(self.path))[0])

    def _layout(self) -> Mesh:
        """The devices that the runs are on. Says so where some device, or some place on it, stays idle."""
        devices = jax.devices()
        if devices[0].platform == "cpu" and getattr(self.env, "backend", "").startswith("mjx"):
            # LAPACK's calls on two devices would wait for one another's threads: see envs/engines/euler.py.
            return mesh_for(self.num_runs, processes.in_turn(devices)[: jax.process_count()])
        mesh = mesh_for(self.num_runs)
        idle = -self.num_runs % mesh.size
        if idle or (mesh.size < len(devices) and devices[0].platform != "cpu"):
            self.console.print(
                f"{self.num_runs} runs use {mesh.size} of {len(devices)} devices"
                + (f", on which there is room for {idle} more" if idle else "")
                + "; a number of runs that the devices divide fills them all"
            )
        return mesh

    def static(self, nets: Any) -> Static:
        """The first argument of the method's functions, with these networks."""
        check_q_bias(self.args, nets)
        self.nets = nets
        return Static(self.args, self.env, self.example, nets)

    def scaled_to(self, return_range: float) -> Any:
        """`hyper` with a reward_scale that makes the dataset's returns, best less worst, span `return_range`.

        With 0, or without a dataset, it stays as it is.
        """
        if not return_range or not _has_scale(self, f"--return-range {return_range:g}", ", or use 0"):
            return self.hyper
        if not self.card["ordered"]:
            raise UsageError(
                f"--return-range {return_range:g}: the rows of {self.card['id']} are in no order, so "
                "nobody knows the returns of episodes; use --return-range 0, and --reward-scale"
            )
        worst, best = self.card["return_quantiles"][0], self.card["return_quantiles"][-1]
        if best <= worst:
            raise UsageError(
                f"--return-range {return_range:g}: every episode of {self.card['id']} has the return "
                f"{best:g}; use 0"
            )
        self.hyper = self.hyper.replace(reward_scale=self.hyper.reward_scale * return_range / (best - worst))
        return self.hyper

    def scaled_to_max(self, max_reward: float) -> Any:
        """`hyper` with a reward_scale that makes the dataset's largest reward `max_reward`.

        With 0, or without a dataset, it stays as it is. An agent of another run has values within the bounds
        that its data's rewards give, so it needs these data.
        """
        if not _has_scale(self, "the bounds of V", "") or not max_reward:
            return self.hyper
        largest = self.card["reward_range"][1]
        if largest <= 0:
            raise UsageError(
                f"--max-reward {max_reward:g}: the largest reward of {self.card['id']} is {largest:g}; use 0"
            )
        self.hyper = self.hyper.replace(reward_scale=self.hyper.reward_scale * max_reward / largest)
        return self.hyper

    def compile(self, static: Any, *functions: Callable) -> list[Compiled]:
        """Each `function(static, ...)` of one run, for all runs at once (see `Compiled`).

        The first one makes a run's state. If the devices have no room for all of them, the runs take turns.
        """
        given = {"offline": self.offline, "truncation": self.truncation}
        of_one = {"hyper": self.hyper, "key": self.keys}
        given |= jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), of_one)
        start = partial(functions[0], static)
        with usual_promotion():
            state = jax.eval_shape(start, *(given[name] for name in inspect.signature(start).parameters))
        self.room = memory.room(self.args, self.num_runs, self.mesh, state)
        if self.room < self.num_runs:
            self.console.print(
                f"{self.num_runs} runs take turns on the devices, {self.room} at once; the others wait in "
                "the host's memory",
                soft_wrap=True,
            )
        options = getattr(self.env, "compiler_options", None)
        compiled = [
            Compiled(partial(function, static), self.mesh, room=self.room, options=options)
            for function in functions
        ]
        self.programs += compiled
        return compiled

    def _placed(self, tree: Any) -> Any:
        """`tree` [runs, ...] where its runs are: on the devices, or on the host if they take turns."""
        if self.room < self.num_runs:
            return jax.tree.map(lambda x: filled(np.asarray(x), self.mesh.size), tree)
        return place(tree, self.mesh, RUNS)

    def begin(self, state: Any, act: Callable) -> Any:
        """Makes or opens the folder; returns the state to go on from: `state`, unless there is a checkpoint.

        With `--init-from`, the agent of the plan's first phase is filled from another run, whether this phase
        has steps or not. `act(actor, obs)` gives the actions that evaluations play.
        """
        init = self.first_agent
        if self.args.init_from and init in self.untrained:
            raise UsageError(f"--init-from is where the {init} starts, and no phase of the plan trains it")
        self.evaluate = Evaluator(self.args, self.env, act, self.mesh, self.room)
        if self.args.init_from and not self.args.resume:
            state = self._init_from(state, init)
        if not self.args.resume:
            processes.first_and_then_others(self._create)
        self.checkpoints = Checkpoints(self.path)
        self.health.note_rewards(self.hyper, *self.card.get("reward_range", ()))
        with processes.together():
            found = self.checkpoints.restore(state, self.num_runs) if self.args.resume else None
        host: dict[str, Any] = {"position": 0, "metrics_bytes": None, "phases": {}}
        if found:
            state, host = self._placed(found[0]), found[1]
            self.before, self.health.largest_reward = self.before | host["clock"], host["largest_reward"]
            self.health.failed = {int(r): text for r, text in host["failed"].items()}
        elif self.args.resume and self.args.init_from:
            state = self._init_from(state, init)
        self.done, self.phases = host["position"], host["phases"]
        last = self.plan[self.done - 1]
        self.unevaluated = (last, getattr(state, last.agent)) if host.get("unevaluated") else None
        with processes.together():
            self.folder.go_back(host["metrics_bytes"], self.phases)
            if self.args.resume and processes.is_first():
                # TensorBoard forgets what was logged after the checkpoint, too; W&B shows it twice.
                self.run_id = read_config(self.args.resume, "--resume").get("id", self.path.name)
                self.tracker = open_tracker(self.args, self.path, self.labels, self.task, self.run_id)
        return state

    def _create(self) -> None:
        """Makes the folder of a new run; the processes after the first look whether they see it."""
        if processes.is_first():
            if not self.args.name and not processes.are_several():  # another run may have begun, too
                self.path = place_of(self.method, self.args)
            self.run_id = uuid.uuid4().hex[:12]
            script = sys.argv[0].endswith(f"{self.method}.py")
            command = shlex.join(sys.argv) if script else f"{self.method}.train(args)"
            self.tracker = open_tracker(self.args, self.path, self.labels, self.task, self.run_id)
            create(self.path, self.method, self.args, self.card, command, self.run_id)
        elif not processes.is_shown(self.path / "config.json"):
            raise UsageError(
                f"--runs-dir {self.args.runs_dir}: it does not see {self.path}, which process 0 has made; "
                "name a folder that all machines share, at the same path"
            )
        self.folder = self._opened()

    def _init_from(self, state: Any, name: str) -> Any:
        like = real(getattr(state, name), self.num_runs)
        with processes.together():
            agent, said = load_agent(self.args.init_from, self.labels, like)
        if self.args.dataset == "none":  # as --offline-steps 0 has it, unless a dataset is named
            said += "; there are no offline rows, since no --dataset is named"
        if differ := other_values(self.args.init_from, self.args, self.card):
            said += f"; its Q-values mean something else ({'; '.join(differ)}): give both the same settings"
        self.console.print(f"{name} {said}", soft_wrap=True, highlight=False)
        return state.replace(**{name: self._placed(agent)})

    # --- while it runs ---

    def chunks(self) -> Iterator[Chunk]:
        """What is left of the plan, chunk by chunk, behind a progress bar where there is a terminal.

        After SIGTERM or SIGINT (Ctrl-C) the chunk ends, a checkpoint is saved and the run stops. A second
        SIGINT stops it at once.
        """
        check_interrupted()
        bar = Progress(*BAR_COLUMNS, console=self.console, disable=not self.console.is_terminal)
        with contextlib.ExitStack() as self.held:
            self.held.enter_context(self._stopping_softly())
            self.bar = self.held.enter_context(bar)
            if self.unevaluated:
                chunk, trained = self.unevaluated
                self.row = self.bar.add_task(chunk.phase, total=chunk.length, note="")
                try:
                    self._evaluate(chunk, trained.actor.params, trained)
                except Exception:
                    self._say_unevaluated()
                    self._give_up()
                    raise
            for i, chunk in enumerate(self.plan[self.done :], start=self.done + 1):
                if chunk.first or i == self.done + 1:
                    rest = (c for c in self.plan[i - 1 :] if c.phase == chunk.phase and c.last)
                    end = next(c.start + c.length for c in rest)
                    self.row = self.bar.add_task(
                        chunk.phase, total=end, completed=chunk.start, note="compiling"
                    )
                self.position, self.chunk_began = i, self._run_seconds()
                yield chunk
                self.bar.update(self.row, completed=chunk.start + chunk.length)

    @contextlib.contextmanager
    def _stopping_softly(self) -> Iterator[None]:
        """Takes note of signals to stop. Only the main thread gets them; elsewhere nothing changes."""

        def note(number, _):
            if number == signal.SIGINT and self.stopping:
                self._give_up()
                raise KeyboardInterrupt
            self.stopping = signal.Signals(number)
            print(f"{self.stopping.name}: stopping at the end of this chunk", file=sys.stderr, flush=True)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)  # None: it was not Python's

    def _give_up(self) -> None:
        """Lets go of what only one run can have: signals, terminal, folder.

        After an error this object may live on, as long as a notebook remembers the error.
        """
        self.held.close()
        self.folder.close()

    def _say_unevaluated(self) -> None:
        print(f"the evaluation failed; go on with it by --resume {self.path}", file=sys.stderr)

    def _asked_to_stop(self) -> signal.Signals | None:
        """The signal to stop that this process, or another one, has got; the same in all of them."""
        number = max(int(text) for text in processes.texts(str(int(self.stopping or 0))))
        return signal.Signals(number) if number else None

    def after(self, chunk: Chunk, metrics: dict, state: Any, actor: Any = None) -> None:
        """What is due after each chunk: log, look for broken runs, evaluate, and at last save a checkpoint.

        `actor` are the parameters of the policy to evaluate, by default those of the agent that was trained.
        If the evaluation fails, the error goes on. A resumed run makes it again: from a checkpoint of this
        chunk, or for an `actor`, which is in no checkpoint, from the one before.
        """
        try:
            self._after(chunk, metrics, state, actor)
        except BaseException:
            self._give_up()
            raise

    def _after(self, chunk: Chunk, metrics: dict, state: Any, actor: Any) -> None:
        step, num_runs, trained = chunk.start + chunk.length, self.num_runs, getattr(state, chunk.agent)
        metrics = real(metrics, num_runs)
        seconds = self._run_seconds() - self.chunk_began
        self.work["run"] += seconds
        self.work["online"] += seconds * chunk.acts
        updates_per_step = (self.args.utd_ratio if chunk.acts else 1) * chunk.learns
        self.work["updates"] += num_runs * round(chunk.length * updates_per_step)
        self.work["env_steps"] += num_runs * chunk.length * chunk.acts
        with processes.together():
            self._log(
                chunk.phase, step, {name: value for name, value in metrics.items() if name != "nonfinite_at"}
            )
        self.health.note_ring(self.hyper, state.ring)
        broken = self.health.find_broken(chunk, metrics, trained, _learners(state))
        if chunk.acts:
            lost = np.asarray(metrics["broken_worlds"]) * (chunk.length / self.args.num_envs)
            self.work["broken_worlds"] += self.health.count_broken_worlds(chunk, lost)
            broken += self.health.find_lost(chunk, lost)
        if broken:
            # The run itself goes on.
            saved = _rows_of(broken, state, num_runs)
            with processes.together():
                save_for_inspection(self.path / f"broken_{chunk.phase}_{step}", saved)
            if len(self.health.failed) == num_runs:
                raise UsageError(
                    f"every seed broke, the last in {self.health.failed[broken[-1]]}; lower the learning "
                    f"rates or look into {self.path}"
                )
        try:
            if chunk.evaluate and self.evaluate.possible:
                self._evaluate(chunk, trained.actor.params if actor is None else actor, trained)
        except Exception:
            if actor is None:
                self._save(chunk, state, unevaluated=True)
            self._say_unevaluated()
            raise
        stopping = self._asked_to_stop()
        if chunk.save or stopping:
            self._save(chunk, state)
        if stopping:
            raise Stopped(
                f"by {stopping.name} after {chunk.phase}, step {step}; go on with --resume {self.path}",
                128 + stopping,
            )

    def _save(self, chunk: Chunk, state: Any, unevaluated: bool = False) -> None:
        even = self.num_runs % self.mesh.size == 0
        state = state if even else real(state, self.num_runs)
        with processes.together():
            host = {
                "position": self.position, "metrics_bytes": self.folder.synced(), "phases": self.phases,
                "failed": {str(r): text for r, text in self.health.failed.items()}, "clock": self.clock(),
                "agent": chunk.agent, "largest_reward": self.health.largest_reward,
                "unevaluated": unevaluated,
            }  # fmt: skip
            self.checkpoints.save(self.position, state, host)

    def _log(self, phase: str, step: int, metrics: dict[str, Any]) -> None:
        metrics = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
        self.folder.log(phase, step, metrics)
        self.tracker(phase, step, metrics)

    def _q_of(self, agent: str) -> Callable:
        """(critic, obs, action) -> Q [B] of an agent: the script's `q_of`, or the least of its critics."""
        if agent not in self.q_of:
            module = getattr(self.nets, agent, self.nets).critic  # of this agent, where agents differ
            self.q_of[agent] = lambda critic, *given: module.apply(critic, *given).min(axis=0)
        return self.q_of[agent]

    def _evaluate(self, chunk: Chunk, actor: Any, trained: Any) -> None:
        """Plays the policy; logs what came out, and keeps it as the phase's result so far."""
        step, recorded = chunk.start + chunk.length, chunk.last and self.evaluate.has_map
        if self.args.q_bias:
            hyper = online_hyper(self.args, self.hyper, step) if chunk.acts else self.hyper
            given = actor, self._q_of(chunk.agent), trained.critic.params, hyper, self.eval_keys
            tally = self.evaluate.with_q(*given, record=recorded)
        else:
            tally = self.evaluate(actor, self.eval_keys, record=recorded)
        tally = real(tally, self.num_runs)
        measures = [name for name in (*MEASURES, "solved") if name in tally]
        result = {name: _means(tally[name]) for name in (*measures, *Q_MEASURES) if name in tally}
        # The score of a task with parts is that of the number of solved ones, whatever its rewards are.
        scored = np.asarray(tally.get("solved", tally["return"]), np.float64).mean(axis=1)
        score = normalized_score(self.args.eval_env or self.args.env, scored)
        if score is not None:
            result["normalized_score"] = [finite_or_none(v) for v in np.atleast_1d(score)]
        for values in result.values():
            values[:] = [None if r in self.health.failed else v for r, v in enumerate(values)]
        self.phases[chunk.phase] = result
        with processes.together():
            self._log(chunk.phase, step, {f"eval/{name}": numbers(values) for name, values in result.items()})
            if recorded:
                self.folder.keep_paths(chunk.phase, self.evaluate.paths(tally))
        note = "  ".join(
            f"{name} {aggregates.summarise(numbers(result[name]))['iqm']:.2f}" for name in measures
        )
        self.bar.update(self.row, note=note)
        if not self.console.is_terminal:
            print(f"{chunk.phase:>9} {step:>9,}  {note}", flush=True)

    # --- the end ---

    def _run_seconds(self) -> float:
        return sum(program.run_seconds for program in self.programs)

    def clock(self) -> dict[str, float]:
        """Seconds and work so far, those before a resumption included; work counts all side-by-side runs."""
        compiling = sum(program.compile_seconds for program in self.programs)
        now = {"wall": time.perf_counter() - self.began, "compile": compiling, **self.work}
        return {name: value + self.before[name] for name, value in now.items()}

    def conclude(
        self, state: Any, export: Callable, policies: dict[str, Any], stages: tuple[str, ...] = ()
    ) -> Result:
        """Ends a run: policy files, exported experience, figures, results.

        policies: name -> the agent whose policy is to be saved, or the parameters of one, [runs, ...]. An
            agent whose phases have no steps is not saved.
        export: `export(actor)` makes a policy file's arrays of one run's parameters.
        stages: the three phases of a method that pre-trains, explores and retrains.
        """
        actors = {
            name: agent.actor.params if hasattr(agent, "actor") else agent
            for name, agent in policies.items()
            if name not in self.untrained
        }
        actors = real(actors, self.num_runs)
        with processes.together():
            if processes.is_first():
                report.save_policies(self, export, actors)
        ring = real(self._rows_of_report(state.ring), self.num_runs)
        with processes.together():
            if processes.is_first():
                try:
                    self._report(ring, stages)
                except KeyboardInterrupt:
                    self.folder.close()
                    raise Stopped(f"before its report was written; --resume {self.path}", 130) from None
        processes.is_shown(self.path / "result.json")
        results = json.loads((self.path / "result.json").read_text())
        self.checkpoints.close()
        self.folder.close()
        self.console.print(
            f"wrote {self.path}/: " + ", ".join(self.folder.files()), soft_wrap=True, highlight=False
        )
        agents = {name: part for name, part in vars(state).items() if hasattr(part, "actor")}
        if processes.are_several():
            return Result(self.path, results, real(agents, self.num_runs))
        return Result(self.path, results, jax.tree.map(lambda x: x[: self.num_runs], agents))

    def _rows_of_report(self, ring: Transition | None) -> Transition | None:
        """What the report needs of a ring [runs, ...], which may be too large for the host's memory.

        All of it for `--export`, and positions alone for a map.
        """
        if ring is None or self.args.export:
            return ring
        if not hasattr(self.env, "layout"):
            return None
        return Transition(ring.obs[..., :2], None, None, ring.next_obs[..., :2], None)

    def _report(self, ring: Transition | None, stages: tuple) -> None:
        """Writes exported experience, figures and results."""
        collected = self.args.online_steps
        if self.args.export:
            report.export_experience(self, ring, collected)
        extra = report.draw(self, ring, collected, stages)
        write_json(self.path / "result.json", report.results(self, self.clock(), extra))
        self.console.print(report.table(self))


def _has_scale(session: Session, asked: str, other: str) -> bool:
    """Whether there are data, whose rewards give what is `asked`.

    An agent that another run has trained has learnt with it, so it cannot go on without them, unless there is
    an `other` way.
    """
    if session.data is None and session.args.init_from:
        raise UsageError(f"{asked} with --init-from: name the --dataset of that run{other}")
    return session.data is not None


def check_same(path: pathlib.Path, card: dict) -> None:
    """Raises UsageError if a resumed run's dataset has changed; warns if versions of packages have."""
    try:
        saved = json.loads((path / "dataset.json").read_text())
        config = json.loads((path / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"--resume {path}: dataset.json or config.json is damaged ({error})") from None
    for of in HASHES:
        now = card.get(of)
        if (then := saved.get(of, now)) != now:
            raise UsageError(
                f"--resume {path}: the dataset {card['id']} has changed since the run began (its {of} is "
                f"{now}, and was {then}); put the old one back, or start a new run"
            )
    old, new = config.get("versions", {}), versions()
    changed = [f"{name} {old[name]} -> {new[name]}" for name in new if name in old and old[name] != new[name]]
    if changed:
        print(
            f"other versions than when the run began: {', '.join(changed)}; its numbers may differ",
            file=sys.stderr,
        )


def load_dataset(args: Any) -> Dataset | None:
    """The dataset of `args`, its card printed, checked to fit the environment; None for `--dataset none`."""
    if args.dataset == "none":
        return None
    box = args.action_low, args.action_high
    data = library.load(args.dataset, clip_out_of_range=args.clip_actions, action_box=box)
    if args.env != "none":
        env = envs.make(args.env, args.physics)
        check_fits(data, env.observation_size, env.action_size, args.env, envs.is_discrete(env))
    elif data.discrete != (args.actions == "discrete"):
        advice = ", or --action-low and --action-high if they are continuous" if data.discrete else ""
        raise UsageError(
            f"--dataset {args.dataset} has {choices.kind(data.discrete)} actions, and this method needs "
            f"{args.actions} ones: take another method{advice}"
        )
    print_card(data.card)
    return data if args.end_reward == ends.AS_GIVEN else ends.by_reward(data, args.end_reward)


def start_online(static: Static, key: jax.Array) -> tuple[Any, Transition | None]:
    """(`--num-envs` fresh environments, an empty ring); (None, None) without online steps."""
    args = static.args
    if not args.online_steps:
        return None, None
    env_state = jax.vmap(static.env.reset)(jax.random.split(key, args.num_envs))
    return env_state, buffer.empty(static.example, args.buffer_size or args.online_steps)


def _rows_of(runs: list[int], tree: Any, num_runs: int) -> Any:
    """The rows `runs` of `tree` [places, ...] on the host; the others may be too many for its memory."""
    index = np.array(runs)
    if processes.are_several():
        return jax.tree.map(lambda x: x[index], real(tree, num_runs))
    return jax.device_get(jax.tree.map(lambda x: x[index], tree))


def _learners(state: Any) -> dict[str, Learner]:
    """What learns in a state beside its agents, such as GDE's explorer; by name."""
    found = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: part for name, part in found.items() if isinstance(part, Learner)}


def _means(values: Any) -> list[float | None]:
    """The mean over episodes [runs, episodes] of each run."""
    return [finite_or_none(v) for v in np.asarray(values, np.float64).mean(axis=1)]
