"""The scripts in tests/benchmarks run, and count what they say they count."""

import importlib
import inspect
import json
import pathlib
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parent / "benchmarks"


def test_physics_measures_every_contestant_and_replays_the_same_simulation(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, BENCHMARKS / "physics.py", "--smoke", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "halfcheetah" in done.stdout
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["env"], row["engine"], row["worlds"]) == ("halfcheetah", "mujoco", 2)
    assert row["recompilations"] == 0 and row["compile_seconds"] > 0
    assert 0 < row["engine_share"] < 1
    assert row["same"] == 1.0  # the bare engine did the work of ours, so their ratio means something
    for who in ("ours", "batch", "rollout", "gymnasium"):
        assert row[who]["best"] >= row[who]["median"] > 0, row[who]
        assert row[who]["note"] == ""


def test_benchmarks_take_turns_if_they_name_the_same_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    turn, order = importlib.import_module("throughput").turn, []

    def measure(name, file):
        with turn(str(file)):
            order.append(name)

    with turn(str(tmp_path / "lock")):
        other = threading.Thread(target=measure, args=("same", tmp_path / "lock"))
        other.start()
        measure("another", tmp_path / "other")
        other.join(0.5)
        assert order == ["another"]  # who named the same file still waits
    other.join(10)
    assert order == ["another", "same"]


# --- all methods ---


def test_methods_are_measured_in_every_phase(tmp_path):
    out = tmp_path / "out.json"
    flags = "--methods iql --seeds 1 --hidden 8 --updates 16 --seconds 0.01 --repeats 2 --json"
    command = [sys.executable, BENCHMARKS / "methods.py", *flags.split(), out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [(row["method"], row["phase"], row["hidden"], row["seeds"]) for row in result["rows"]] == [
        ("iql", "offline", 8, 1), ("iql", "online", 8, 1),
    ]  # fmt: skip
    for row in result["rows"]:
        ours, theirs = row["seed_updates_per_second"], row["usual_seed_updates_per_second"]
        assert (
            len(ours["all"]) == len(theirs["all"]) == 2
            and ours["best"] >= ours["median"] > 0
            and theirs["best"] > 0
        )
        assert row["ratio"] == ours["best"] / theirs["best"] and f"{row['ratio']:.2f}" in done.stdout
        # Nothing came out of a cache.
        assert row["compile_seconds"] > 0.3 and row["compile_cpu_seconds"] > 0.3
    assert (
        result["machine"]["jax"] == jax.__version__
        and result["settings"]["updates"] == 16
        and not list(tmp_path.glob("runs"))
    )


@pytest.fixture(scope="module")
def methods():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("methods")


@pytest.fixture(scope="module")
def rehearsed(methods):
    """The phases of IQL for two seeds, in chunks of 16 updates."""
    return methods.rehearse(importlib.import_module("ooo_rl.algos.iql"), methods.Args(updates=32), 8, 2)


@pytest.mark.parametrize("phase", ["offline", "online"])
def test_the_usual_way_does_the_same_work_as_ours(methods, rehearsed, phase):
    """One chunk of ours is as many of its steps: the first seed ends in the same state."""
    ours, usual = rehearsed[phase], methods.Usual(rehearsed[phase])
    state, metrics = ours.program(jax.tree.map(np.copy, ours.start), *ours.rest, **ours.static)
    other, _ = usual.run(ours.static["length"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-4), state, other)
    assert ours.static == {"length": 16} and metrics["q"].shape == (2,)
    moved = [
        np.abs(np.float64(new) - old).max()
        for new, old in zip(jax.tree.leaves(state.agent), jax.tree.leaves(ours.start.agent))
    ]
    assert max(moved) > 1e-3


def test_a_rate_counts_the_updates_of_all_seeds(methods, rehearsed, monkeypatch):
    """By a clock that ticks once per look: the loops look once before each call, once to begin and once at
    the end.
    """
    ticks = iter(range(10_000))
    monkeypatch.setattr(methods.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(methods.Usual, "run", lambda self, calls, *_: (None, {"nonfinite_at": -1}))
    ours = rehearsed["online"]
    monkeypatch.setattr(ours, "program", lambda state, *_, **__: (state, {"nonfinite_at": np.full(2, -1)}))
    assert ours.measure(4.0) == pytest.approx(3 * 16 * 2 / 4)
    usual = methods.Usual.__new__(methods.Usual)
    usual.phase = ours
    assert usual.measure(4.0) == pytest.approx(3 * 64 / 4)
    assert [int(x) for x in ours.arguments(16) if np.ndim(x) == 0 and isinstance(x, np.integer)] == [16 * 8]


def test_a_phase_that_only_waits_is_no_phase_to_measure(rehearsed, monkeypatch):
    rehearsed["online"].check_that_it_learns()
    monkeypatch.setattr(rehearsed["online"], "program", lambda state, *_, **__: (state, {}))
    with pytest.raises(RuntimeError, match="iql, online makes no update in 16 steps"):
        rehearsed["online"].check_that_it_learns()


@pytest.mark.parametrize("learner", ["critic", "actor"])
def test_a_phase_learns_where_its_values_move(methods, learner):
    phase = methods.Phase.__new__(methods.Phase)
    phase.start, phase.rest, phase.static = {learner: np.zeros(2), "other": np.zeros(2)}, [], {"length": 3}
    for name, learns in ((learner, True), ("other", False)):
        phase.name, phase.program = "it", lambda state, name=name, **_: ({**state, name: np.ones(2)}, {})
        if learns:
            phase.check_that_it_learns()
        else:
            with pytest.raises(RuntimeError, match="it makes no update in 3 steps"):
                phase.check_that_it_learns()


def test_a_part_of_a_method_can_be_left_out(methods):
    script = importlib.import_module("ooo_rl.algos.off2onrl")
    sizes = {}
    for members in (1, 3):
        args = methods.Args(updates=16, change=(f"num_members={members}", "replay=uniform"))
        start = methods.rehearse(script, args, 8, 1)["offline"].start
        sizes[members] = sum(x.size for x in jax.tree.leaves(start.agent.critic.params))
    assert sizes[3] == 3 * sizes[1]
    with pytest.raises(ValueError, match="off2onrl has no setting 'members', which --change names"):
        methods.rehearse(script, methods.Args(change=("members=1",)), 8, 1)


def test_what_stands_for_a_session_takes_what_scripts_give_it(methods):
    """They call `after` with or without the policy to evaluate."""
    for stand_in in (methods.Rehearsal, importlib.import_module("gpu_programs").Shapes):
        for name, given in (("begin", 2), ("after", 3), ("conclude", 3)):
            inspect.signature(getattr(stand_in, name)).bind(*[None] * (given + 1))
        inspect.signature(stand_in.after).bind(*[None] * 4, actor=None)


def test_which_methods_take_many_updates_per_step(methods):
    found = {
        name
        for name in methods.METHODS
        if methods.takes_many(importlib.import_module(f"ooo_rl.algos.{name}"))
    }
    assert {"iql", "ooo_iql", "sac"} <= set(methods.METHODS) - found
    assert ("rlpd" in found) == ("rlpd" in methods.METHODS)
