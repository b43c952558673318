"""A run killed at any moment, and resumed, ends in the same bits as one left alone; what cannot be resumed
says why.
"""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from ooo_rl.algos import iql, ooo_iql
from ooo_rl.data.runs.settings import launch, parse

REPO = pathlib.Path(__file__).parents[1]
COMMON = (
    "--env point-mass-wall --hidden 16 16 --num-seeds 3 --batch-size 32 --offline-steps 160 "
    "--online-steps 800 --num-envs 8 "
    "--utd-ratio 0.125 --eval-episodes 2 --eval-every 160 --checkpoint-every 80 --name it"
)
BODY = (
    "--env hopper --physics mujoco --hidden 8 --num-seeds 2 --batch-size 16 --offline-steps 0 "
    "--online-steps 800 --num-envs 4 "
    "--utd-ratio 0.25 --eval-episodes 1 --eval-every 400 --checkpoint-every 80 --name it"
)
FLAGS = [*COMMON.split(), "--retrain-steps", "160"]
TIMING = ("wall_seconds", "seed_updates_per_second", "env_steps_per_second", "compile_seconds")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for runs, whose processes share compiled programs and datasets."""
    place = tmp_path_factory.mktemp("resume")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        # Not the flags of conftest.py: only so do any numbers of devices agree to the bit.
        patch.setenv("XLA_FLAGS", "")
        yield place


def start(place, method, *flags, devices=2):
    (place / "log").touch()
    with (place / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, REPO / f"algos/{method}.py", *flags], cwd=place, stdout=log, stderr=log,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)},
        )  # fmt: skip


def finish(place, process):
    assert process.wait(timeout=300) == 0, (place / "log").read_text()[-3000:]


@pytest.fixture(scope="module")
def undisturbed(place):
    """Folder of a finished run."""
    finish(place, start(place, "ooo_iql", *FLAGS, "--runs-dir", "whole"))
    return place / "whole" / "ooo_iql" / "point-mass-wall" / "it"


def phase_of(folder):
    """The phase that the run last wrote of."""
    path = folder / "metrics.csv"
    lines = path.read_text().splitlines() if path.exists() else []
    return lines[-1].split(",")[0] if lines else ""


def kill_when(process, condition):
    """SIGKILL as soon as `condition` holds; False if the process ended before."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    process.kill()
    process.wait()
    return True


def arrays(path):
    with np.load(path) as file:
        return {key: file[key] for key in file.files if file[key].dtype.kind in "fiub"}


def assert_same(folder, expected, rounding=0.0):
    """All alike to the bit; the logged means may differ by `rounding`, relative to their size."""
    logs = [(f / "metrics.csv").read_text().splitlines()[1:] for f in (folder, expected)]
    ours, theirs = ([line.rsplit(",", 1) for line in lines] for lines in logs)
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    values = [np.array([float(value) for _, value in lines]) for lines in (ours, theirs)]
    np.testing.assert_allclose(*values, rtol=rounding)
    results = [json.loads((f / "result.json").read_text()) for f in (folder, expected)]
    for result in results:
        for key in TIMING:
            assert result.pop(key) > 0
    assert results[0] == results[1]
    names = sorted(p.relative_to(expected) for p in expected.rglob("*.npz"))
    assert names == sorted(p.relative_to(folder) for p in folder.rglob("*.npz")) and len(names) > 1
    for name in names:
        ours, theirs = arrays(folder / name), arrays(expected / name)
        assert ours.keys() == theirs.keys() and ours
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=f"{name}: {key}")


def test_a_run_killed_in_every_phase_ends_in_the_same_bits(place, undisturbed):
    """Its three seeds go on on another number of devices each time."""
    rng, folder = random.Random(0), place / "killed" / "ooo_iql" / "point-mass-wall" / "it"
    process = start(place, "ooo_iql", *FLAGS, "--runs-dir", "killed")
    assert kill_when(process, (folder / "config.json").exists), (
        "the run ended before it could be killed as it began"
    )
    stops = ("offline", "any", 1), ("online", "checkpoint", 3), ("retrained", "checkpoint", 2)
    for phase, moment, devices in stops:
        process = start(place, "ooo_iql", "--resume", folder, devices=devices)
        seen, delay = [], rng.uniform(0, 0.3)

        def condition(phase=phase, moment=moment, seen=seen, delay=delay):
            if phase_of(folder) != phase:
                return bool(seen)  # gone by: at once
            seen.append(time.monotonic())
            if moment == "checkpoint":
                return any("tmp" in p.name for p in (folder / "checkpoints").glob("*"))
            return time.monotonic() > seen[0] + delay

        assert kill_when(process, condition) or moment == "any", f"no checkpoint was caught in {phase}"
    finish(place, start(place, "ooo_iql", "--resume", folder, devices=1))
    # The policies have the same bits. But some processors sum a loss otherwise where one device has all seeds.
    assert_same(folder, undisturbed, rounding=1e-6)


@pytest.mark.slow
def test_a_body_of_the_c_engine_goes_on_in_the_same_bits(place):
    """Its float64 state is in the checkpoint, though JAX has no float64 here."""
    flags = BODY.split()
    finish(place, start(place, "iql", *flags, "--runs-dir", "body"))
    folder = place / "body-killed" / "iql" / "hopper" / "it"
    process = start(place, "iql", *flags, "--runs-dir", "body-killed")
    steps = lambda: [p for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]  # noqa: E731
    caught = lambda: phase_of(folder) == "online" and steps()  # noqa: E731
    assert kill_when(process, caught), "the run ended before a checkpoint was seen"
    finish(place, start(place, "iql", "--resume", folder))
    assert_same(folder, place / "body" / "iql" / "hopper" / "it")


@pytest.fixture
def copy(undisturbed, tmp_path):
    return pathlib.Path(shutil.copytree(undisturbed, tmp_path / "copy"))


def resume(monkeypatch, folder, *flags, module=ooo_iql):
    monkeypatch.setattr(sys, "argv", ["script", "--resume", str(folder), *flags])
    launch(module.Args, module.train)


def refused(monkeypatch, capsys, folder, *flags, module=ooo_iql):
    with pytest.raises(SystemExit) as exit:
        resume(monkeypatch, folder, *flags, module=module)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert exit.value.code == 2 and len(errors) == 1
    return errors[0]


def test_resuming_a_finished_run_changes_nothing(monkeypatch, copy, undisturbed):
    resume(monkeypatch, copy)
    assert_same(copy, undisturbed)


def test_an_interrupted_write_of_paths_or_metrics_is_mended(monkeypatch, copy, undisturbed):
    with (copy / "metrics.csv").open("a") as file:
        file.write("retrained,200,0,,q,0.")
    (copy / "paths.tmp.npz").write_bytes(b"PK")
    (copy / "result.tmp").write_text("{")
    resume(monkeypatch, copy)
    (copy / "paths.tmp.npz").unlink()
    assert_same(copy, undisturbed)


@pytest.mark.parametrize("flag", ["--num-seeds 4", "--expectile 0.5", "--hidden 8 8", "--dataset none"])
def test_other_settings_are_refused_by_name(monkeypatch, capsys, undisturbed, flag):
    message = refused(monkeypatch, capsys, undisturbed, *flag.split())
    name, _, value = flag[2:].partition(" ")
    assert f"{name.replace('-', '_')} is " in message and value.split()[0] in message


def test_the_same_settings_may_be_repeated(undisturbed):
    folder = str(undisturbed)
    assert parse(ooo_iql.Args, ["--resume", folder, "--num-seeds", "3"]).resume == folder


def test_what_is_no_run_is_refused(monkeypatch, capsys, undisturbed, tmp_path):
    assert "not a run's folder" in refused(monkeypatch, capsys, tmp_path)
    assert "not a run's folder" in refused(monkeypatch, capsys, tmp_path / "absent")
    assert "another script" in refused(monkeypatch, capsys, undisturbed, module=iql)


@pytest.mark.parametrize("damage", ["emptied", "garbled", "missing", "host"])
def test_a_damaged_checkpoint_is_one_clear_error(monkeypatch, capsys, copy, damage):
    (checkpoint,) = [p for p in (copy / "checkpoints").iterdir() if p.name.isdigit()]
    before = (copy / "metrics.csv").read_bytes()
    if damage == "host":
        for path in (checkpoint / "host").rglob("metadata"):
            path.write_text("{")
    else:
        for path in (checkpoint / "state" / "ocdbt.process_0" / "d").iterdir():
            {
                "emptied": lambda p: p.write_bytes(b""),
                "garbled": lambda p: p.write_bytes(b"\x00" * 999),
                "missing": pathlib.Path.unlink,
            }[damage](path)
        for path in (checkpoint / "state" / "d").iterdir():
            path.write_bytes(b"")
    assert "damaged" in refused(monkeypatch, capsys, copy)
    assert (copy / "metrics.csv").read_bytes() == before
