"""The scripts in tests/benchmarks run, and count what they say they count."""

import json
import pathlib
import subprocess
import sys

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
    assert row["same"] == 1.0  # the bare engine did the work of ours, so their ratio means something
    for who in ("ours", "batch", "rollout", "gymnasium"):
        assert row[who]["best"] >= row[who]["median"] > 0, row[who]
        assert row[who]["note"] == ""
