"""Two processes that run one experiment leave what one leaves, and end together. So do runs that take turns."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from test_resume import assert_same

from ooo_rl.algos import iql
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs import memory, processes, session

PLACE = pathlib.Path("iql") / "probe-match-obs" / "it"
STOP_AT = 2  # the chunk after which a run that is to be stopped is asked to
CODE = f"""
import os, signal
from ooo_rl.algos import iql
from ooo_rl.data.runs import session, settings
after = session.Session.after

def then_stop(self, *arguments):
    after(self, *arguments)
    if self.position == {STOP_AT} and "STOP" in os.environ:
        os.kill(os.getpid(), signal.SIGTERM)

session.Session.after = then_stop
settings.launch(iql.Args, iql.train)
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of 400 rows."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("rows") / "rows.npz"
    ends = np.arange(400) % 20 == 19
    names = "observations", "actions", "rewards", "terminals", "timeouts"
    parts = rng.uniform(size=(400, 1)), rng.uniform(-1, 1, (400, 1)), np.full(400, -1.0), 0 * ends, ends
    np.savez(path, **dict(zip(names, parts)))
    return path


@pytest.fixture(scope="module")
def settings(rows):
    """Three seeds that learn online and from the rows: five chunks, two evaluations."""
    return {
        "env": "probe-match-obs", "dataset": str(rows), "hidden": (8,), "num_seeds": 3, "batch_size": 8,
        "offline_steps": 0, "online_steps": 40, "num_envs": 8, "utd_ratio": 0.125, "eval_episodes": 2,
        "eval_every": 24, "checkpoint_every": 8, "name": "it",
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """Folder of a finished run of this process."""
    return iql.train(iql.Args(**settings, runs_dir=str(tmp_path_factory.mktemp("whole")))).folder


@pytest.fixture(scope="module")
def whole_alone(settings, tmp_path_factory):
    """Folder of a finished run of another process."""
    place = tmp_path_factory.mktemp("alone")
    assert alone(*words(settings, place)) == 0
    return place / PLACE


def interrupted(settings, place, **changes):
    """Folder of a run of one process that has stopped after a chunk."""
    after = session.Session.after

    def stop(self, chunk, *arguments):
        after(self, chunk, *arguments)
        if self.position == STOP_AT + 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(session.Session, "after", stop)
        iql.train(iql.Args(**settings, **changes, runs_dir=str(place)))
    return place / PLACE


def words(settings, place):
    """The same as words of a command."""
    flags = []
    for name, value in {**settings, "runs_dir": place}.items():
        flags += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else (value,))]
    return flags


USUAL = {"XLA_FLAGS": ""}  # not those of conftest.py: only so do any numbers of devices agree to the bit


def alone(*words, devices=1, **environment):
    """The exit code of one process."""
    known = {**os.environ, **USUAL, "JAX_NUM_CPU_DEVICES": str(devices), **environment}
    done = subprocess.run([sys.executable, "-c", CODE, *words], env=known, capture_output=True, check=False)
    return done.returncode


def two(*words, devices=1, other=(), **environment):
    """[(exit code, output, errors)] of two processes; process 1 has the flags `other` and the environment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    known = {
        "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **USUAL,
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, *words, *more], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **known, **own, "JAX_PROCESS_ID": str(number)},
        )
        for number, (more, own) in enumerate((((), {}), (other, environment)))
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    texts = [
        ["\n".join(line for line in text.splitlines() if "[Gloo]" not in line) for text in o] for o in outputs
    ]
    return [(process.returncode, *text) for process, text in zip(started, texts)]


def said(errors):
    return [line for line in errors.splitlines() if line.startswith(("error: ", "stopped: "))]


def test_two_processes_stop_at_a_signal_to_one_and_one_process_goes_on(settings, whole_alone, tmp_path):
    """They have a device each, with two of the three seeds and the third one twice."""
    first, second = two(*words(settings, tmp_path), STOP="1")
    folder = tmp_path / PLACE
    line = f"stopped: by SIGTERM after online, step 24; go on with --resume {folder}"
    assert first[0] == second[0] == 143 and said(first[2]) == [line]
    assert "dataset" in first[1] and second[1:] == ("", "")
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert checkpoint.name == str(STOP_AT + 1)
    assert alone("--resume", str(folder)) == 0
    assert_same(folder, whole_alone)


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_began(settings, whole_alone, tmp_path):
    """They have two devices each, and use three of the four; each writes its part of the checkpoints."""
    folder = tmp_path / PLACE
    assert alone(*words(settings, tmp_path), STOP="1") == 143
    first, second = two("--resume", str(folder), devices=2)
    assert first[0] == second[0] == 0, (first, second)
    assert f"wrote {folder}/: " in first[1] and second[1:] == ("", "")
    assert len([*(folder / "checkpoints").rglob("ocdbt.process_*")]) == 2
    assert_same(folder, whole_alone)
    iql.train(iql.Args(resume=str(folder)))  # of their checkpoint
    assert_same(folder, whole_alone)


def test_an_error_of_one_process_ends_both_with_one_line(settings, tmp_path):
    first, second = two(*words(settings, tmp_path), other=("--dataset", "absent.npz"))
    assert first[0] == second[0] == 2 and second[1:] == ("", "")
    assert said(first[2]) == ["error: process 1: absent.npz: there is no such file"]
    assert not (tmp_path / PLACE).exists()


@pytest.mark.parametrize(
    ("told", "error", "expected"),
    [
        (["", ""], None, None),
        (["", "no room"], None, "process 1: no room"),
        (["no room", ""], UsageError("no room"), "^no room"),
        (["its own", "no room"], UsageError("its own"), "^its own"),
    ],
)
def test_what_goes_wrong_in_one_process_is_raised_in_all(monkeypatch, told, error, expected):
    monkeypatch.setattr(processes, "are_several", lambda: True)
    asked = []
    monkeypatch.setattr(processes, "texts", lambda own: asked.append(own) or told)
    refused = pytest.raises(UsageError, match=expected) if expected else contextlib.nullcontext()
    with refused, processes.together():
        if error:
            raise error
    assert asked == [told[0]]


SLURM = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
BY_HAND = {"JAX_COORDINATOR_ADDRESS": "node1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (1, 0)),
        (BY_HAND, (4, 3)),
        (SLURM, (2, 1)),
        ({**SLURM, "SLURM_NTASKS": "1"}, (1, 0)),
        ({**SLURM, "JAX_NUM_PROCESSES": "1"}, (1, 0)),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, (1, 0)),  # in a batch script, outside of srun
        (
            {"JAX_PROCESS_ID": "0"},
            "JAX_PROCESS_ID is set, and so must be JAX_COORDINATOR_ADDRESS and JAX_NUM_",
        ),
        ({**BY_HAND, "JAX_PROCESS_ID": "4"}, "process '4' of '4': JAX_PROCESS_ID must be from 0"),
        ({**BY_HAND, "JAX_NUM_PROCESSES": "two"}, "process '3' of 'two'"),
        (
            {**BY_HAND, "JAX_COORDINATOR_ADDRESS": "node1"},
            "JAX_COORDINATOR_ADDRESS=node1: it must be host:port",
        ),
    ],
)
def test_what_the_environment_tells_of_other_processes(monkeypatch, environment, expected):
    for name in {*SLURM, *BY_HAND}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, tuple):
        assert processes._count_and_number() == expected
    else:
        with pytest.raises(UsageError, match=expected):
            processes.join()


def test_processes_that_differ_are_told_apart(monkeypatch):
    monkeypatch.setattr(processes, "texts", lambda own: [own, own.replace("abc", "abd"), own])
    processes.check_same({"setting": "x", "dataset": None})
    with pytest.raises(
        UsageError, match="process 1 has another dataset than process 0; start all by the same"
    ):
        processes.check_same({"setting": "x", "dataset": "abc"})


def test_few_runs_are_spread_over_all_processes():
    devices = [SimpleNamespace(process_index=p, id=(p, i)) for p in (0, 1) for i in (0, 1, 2)]
    assert [d.id for d in processes.in_turn(devices)] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]


# --- memory ---


def test_runs_that_take_turns_end_in_the_same_bits(settings, whole, tmp_path, capsys):
    """Two of the three seeds at once, then the third; stopped and resumed in between."""
    folder = interrupted(settings, tmp_path, runs_at_once=2)
    assert "3 runs take turns on the devices, 2 at once" in " ".join(capsys.readouterr().out.split())
    iql.train(iql.Args(resume=str(folder)))
    assert_same(folder, whole)


class State(NamedTuple):
    """Of a run; its ring takes half a GiB."""

    ring: jax.ShapeDtypeStruct = jax.ShapeDtypeStruct((2**27,), np.float32)
    agent: jax.ShapeDtypeStruct | None = None


def test_what_files_have_left_in_a_containers_memory_is_free(tmp_path, monkeypatch):
    """The kernel counts the pages of files that were read or written as used, and gives them back."""
    files = {
        "proc/meminfo": "MemTotal: 64 kB\nMemAvailable: 999999999 kB\n",
        "sys/fs/cgroup/memory.max": "1000\n", "sys/fs/cgroup/memory.current": "900\n",
        "sys/fs/cgroup/memory.stat": "anon 300\nactive_file 200\ninactive_file 400\n",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    here = SimpleNamespace(Path=lambda name: tmp_path / name.strip("/"))
    monkeypatch.setattr(memory, "pathlib", here)
    assert memory.of_host() == 700
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert memory.of_host() == 999999999 * 1024


@pytest.mark.parametrize(
    ("free", "seeds", "sweep", "expected"),
    [
        (100, 4, 1, 4),
        (5, 5, 1, "5 runs take 0.5 GiB of memory each, and 2.5 GiB are free: 4 fit; make 2 experiments"),
        (10, 5, 2, "8 fit; make 2 experiments of it, by --seed 7 --num-seeds 4; --seed 11 --num-seeds 1"),
        (5, 1, 6, "4 fit; --sweep fewer settings at a time than these 6"),
        (1, 2, 1, "not even one does; take a smaller --buffer-size"),
    ],
)  # fmt: skip
def test_on_a_cpu_too_many_runs_are_refused(monkeypatch, free, seeds, sweep, expected):
    """`free` counts the halves of GiB."""
    monkeypatch.setattr(memory, "of_host", lambda: free * memory.GIB // 2)
    args, mesh = SimpleNamespace(num_seeds=seeds, seed=7, runs_at_once=0), jax.make_mesh((1,), ("runs",))
    asked = [args, seeds * sweep, mesh, State()]
    if isinstance(expected, int):
        assert memory.room(*asked) == expected
    else:
        with pytest.raises(UsageError, match=expected):
            memory.room(*asked)


def test_on_an_accelerator_they_take_turns(monkeypatch):
    """Of ten runs, seven of which fit, five take the first turn; where the host is small, all are refused."""
    device = SimpleNamespace(
        platform="gpu", process_index=0, memory_stats=lambda: {"bytes_limit": 9 * memory.GIB // 2}
    )
    mesh = SimpleNamespace(devices=np.array([device]), size=1)
    args = SimpleNamespace(num_seeds=10, seed=0, runs_at_once=0)
    monkeypatch.setattr(memory, "of_host", lambda: 100 * memory.GIB)
    assert memory.room(args, 10, mesh, State()) == 5
    assert memory.room(args, 7, mesh, State()) == 7
    agent = jax.ShapeDtypeStruct((2**22,), np.float32)  # 1/64 GiB, and WORK times as much to learn with
    assert memory.room(args, 9, mesh, State(agent=agent)) == 3, "four fit"
    monkeypatch.setattr(memory, "of_host", lambda: memory.GIB)
    with pytest.raises(UsageError, match=r"10 runs take 1 GiB of memory each, and 1 GiB are free: 7 fit"):
        memory.room(args, 10, mesh, State())
