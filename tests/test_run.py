"""Whole tiny runs: what they leave on disk, what --sweep adds, how one seed's failure stays its own, and
every switch once.
"""

import csv
import dataclasses
import json
import math
import os
import sys

import numpy as np
import pytest
from training import trained

from ooo_rl.algos import iql, ooo_iql
from ooo_rl.data import policy
from ooo_rl.data.datasets.validate import check_fits
from ooo_rl.data.errors import DatasetError, UsageError
from ooo_rl.data.recipes import library
from ooo_rl.data.runs.settings import parse

TINY = (
    "--env point-mass-wall --hidden 16 16 --num-seeds 2 --batch-size 32 --offline-steps 40 "
    "--online-steps 320 --num-envs 8 "
    "--utd-ratio 0.125 --eval-episodes 2 --eval-every 1000"
)
KEYS = {
    "method", "env", "dataset", "num_seeds", "phases", "wall_seconds", "seed_updates_per_second",
    "env_steps_per_second", "compile_seconds",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def datasets_path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        if "MINARI_DATASETS_PATH" not in os.environ:
            patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        yield


def run(runs_dir, name, *flags, module=ooo_iql, **how):
    """(The run's folder, what `trained` returned)."""
    flags = [
        *TINY.split(),
        *(["--retrain-steps", "40"] if module is ooo_iql else []),
        *flags,
        "--name",
        name,
        "--runs-dir",
        str(runs_dir),
    ]
    args = parse(module.Args, flags)
    done = trained(module, **how, **{f.name: getattr(args, f.name) for f in dataclasses.fields(args)})
    return runs_dir / module.__name__.split(".")[-1] / "point-mass-wall" / name, done


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def rows_of(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def check_schema(folder, method, phases, runs=2, env="point-mass-wall"):
    result = result_of(folder)
    assert result.keys() >= KEYS and result["num_seeds"] == 2
    assert (result["method"], result["env"]) == (method, env)
    assert {name for name, found in result["phases"].items() if found} == set(phases)
    for name in phases:
        assert result["phases"][name].keys() == {"success", "return", "length"}
        for values in result["phases"][name].values():
            assert len(values) == runs and all(v is None or math.isfinite(v) for v in values)
        for measure, values in result["phases"][name].items():
            logged = [
                float(r["value"])
                for r in rows_of(folder)
                if (r["phase"], r["metric"]) == (name, f"eval/{measure}")
            ][-runs:]
            np.testing.assert_array_equal(logged, [math.nan if v is None else v for v in values])
    assert result["wall_seconds"] > result["compile_seconds"] >= 0 and result["seed_updates_per_second"] > 0
    assert (result["env_steps_per_second"] > 0) == ("online" in phases)
    with_map = ("figures/map.png", "paths.npz") if env == "point-mass-wall" else ()
    for name in ("config.json", "dataset.json", "figures/success.png", *with_map):
        assert (folder / name).stat().st_size > 0
    assert not list(folder.rglob("*.tmp*"))
    return result


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two settings x two seeds, of which the second setting breaks; and the same with a second setting that
    does not.
    """
    place, found, done = tmp_path_factory.mktemp("swept"), {}, None
    patch = pytest.MonkeyPatch()
    patch.setenv("MINARI_DATASETS_PATH", str(place / "minari"))
    flags = "--retrain-at 160 320 --sync-explorer --track tensorboard --export"
    for name, values in (("broken", "3e-4,inf"), ("healthy", "3e-4,1e-3")):
        out, err = (place / f"{name}.{stream}" for stream in ("out", "err"))
        with out.open("w") as stdout, err.open("w") as stderr, pytest.MonkeyPatch.context() as streams:
            streams.setattr(sys, "stdout", stdout)
            streams.setattr(sys, "stderr", stderr)
            streams.setenv("COLUMNS", "200")
            words = "--sweep", f"critic-lr={values}", *flags.split(), f"ooo/{name}"
            folder, done = run(place, name, *words, like=done)
        found[name] = folder, out.read_text(), err.read_text()
    yield found
    patch.undo()


PHASES = ("offline", "online", "retrained@160", "retrained")


def test_schema_and_a_row_per_setting(swept):
    folder, out, err = swept["healthy"]
    result = check_schema(folder, "ooo_iql", PHASES, runs=4)
    assert result["seeds"] == [0, 1, 0, 1] and result["failed"] == {} and err == ""
    assert [s["setting"] for s in result["settings"]] == ["critic-lr=0.0003", "critic-lr=0.001"]
    for s, part in zip(result["settings"], (slice(0, 2), slice(2, 4))):
        assert s["phases"] == {p: {m: v[part] for m, v in result["phases"][p].items()} for p in PHASES}
    table = [line for line in out.splitlines() if "critic-lr=" in line and "│" in line]
    assert len(table) == 2 * len(PHASES)
    assert set(result["crossings"]) == set(PHASES) and len(result["shortest_paths"]) == 4


def test_metrics_are_tidy(swept):
    rows = rows_of(swept["healthy"][0])
    assert rows[0].keys() == {"phase", "step", "seed", "setting", "metric", "value"}
    keys = [tuple(row[k] for k in ("phase", "step", "seed", "setting", "metric")) for row in rows]
    assert len(keys) == len(set(keys)) and all(math.isfinite(float(row["value"])) for row in rows)
    assert {row["phase"] for row in rows} == set(PHASES) and "nonfinite_at" not in {
        row["metric"] for row in rows
    }
    assert {int(row["step"]) for row in rows if row["phase"] == "online"} == {160, 320}
    assert {"eval/success", "critic_loss", "bonus"} <= {
        row["metric"] for row in rows if row["phase"] == "offline"
    }


def test_a_broken_run_is_named_and_stops_alone(swept):
    folder, out, err = swept["broken"]
    result = check_schema(folder, "ooo_iql", PHASES, runs=4)
    lines = err.splitlines()
    assert [line[:6] for line in lines] == ["seed 0", "seed 1"] and "critic-lr=0.0003" not in err
    for line in lines:
        assert (
            "critic-lr=inf stopped in offline, step 40: " in line
            and "critic_loss" in line
            and "parameter .actor.params[" in line
        )
    assert result["failed"].keys() == {"2", "3"} and "offline, step 40" in result["failed"]["2"]
    for found in result["phases"].values():
        for values in found.values():
            assert None not in values[:2] and values[2:] == [None, None]
    assert [p.name for p in folder.glob("broken_*")] == ["broken_offline_40"] and list(
        (folder / "broken_offline_40").iterdir()
    )
    assert "nan" in out
    assert sorted(p.name for p in (folder / "policies").iterdir()) == [
        f"{agent}_seed{k}_critic-lr=0.0003.npz" for agent in ("exploiter", "explorer") for k in (0, 1)
    ]


def test_the_other_runs_are_as_without_it(swept):
    parts = [
        [r for r in rows_of(folder) if r["setting"] == "critic-lr=0.0003"] for folder, _, _ in swept.values()
    ]
    assert parts[0] == parts[1] and len(parts[0]) > 50
    files = [sorted((folder / "policies").glob("*lr=0.0003.npz")) for folder, _, _ in swept.values()]
    for a, b in zip(*files):
        with np.load(a) as ours, np.load(b) as theirs:
            names = [name for name in ours.files if ours[name].dtype.kind == "f"]
            assert names and all((ours[name] == theirs[name]).all() for name in names)


def test_policies_load_and_act(swept):
    path = swept["healthy"][0] / "policies" / "exploiter_seed0_critic-lr=0.0003.npz"
    loaded = policy.load(path)
    action = policy.act(loaded, np.zeros((3, 2), np.float32))
    assert action.shape == (3, 2) and np.abs(action).max() <= 1


def test_exported_experience_is_a_dataset(swept):
    for seed in (0, 1):
        data = library.load(f"ooo/broken-seed{seed}-critic-lr-0_0003-v0")
        assert data.card["transitions"] == 320 and data.card["episodes"] >= 8
        check_fits(data, 2, 2, "point-mass-wall")
    with pytest.raises(DatasetError):
        library.load("ooo/broken-seed0-critic-lr-inf-v0")
    again = library.load("ooo/healthy-seed1-critic-lr-0_0003-v0").transitions
    np.testing.assert_array_equal(data.transitions.obs, again.obs)
    assert (library.load("ooo/broken-seed0-critic-lr-0_0003-v0").transitions.obs != again.obs).any()


def test_tensorboard_files(swept):
    names = sorted(p.name for p in (swept["healthy"][0] / "tensorboard").iterdir())
    assert names == [f"seed{k}_critic-lr={v}" for k in (0, 1) for v in ("0.0003", "0.001")]
    assert all(p.stat().st_size > 100 for p in (swept["healthy"][0] / "tensorboard").rglob("events.*"))


def test_when_every_seed_breaks_the_run_says_so(tmp_path, capsys):
    with pytest.raises(UsageError, match=r"every seed broke.*offline, step 40"):
        run(tmp_path, "it", "--critic-lr", "inf", "--retrain-steps", "0", "--online-steps", "0")
    (folder,) = tmp_path.rglob("broken_offline_40")
    assert not (folder.parent / "result.json").exists() and capsys.readouterr().err.count("stopped in") == 2


@pytest.mark.parametrize(
    ("flags", "phases"),
    [
        ("--offline-steps 0 --intrinsic none --no-bound-q --warm-start --retrain-at 160 320", PHASES[1:]),
        (
            "--intrinsic rnd --rnd-variant code --frozen-bonus --upsample 0.1 --buffer-size 160",
            ("offline", "online", "retrained"),
        ),
        pytest.param(
            "--online-steps 0 --intrinsic rnd --dropout 0.1", ("offline", "retrained"), marks=pytest.mark.slow
        ),
    ],
)
def test_switches_of_ooo_iql(tmp_path, flags, phases):
    folder, _ = run(tmp_path, "it", *flags.split(), whole=False)
    assert {r["phase"] for r in rows_of(folder)} == set(phases)
    bonus = [
        float(r["value"]) for r in rows_of(folder) if r["metric"] == "bonus" and r["phase"] == phases[-1]
    ]
    assert all(b > 0 for b in bonus) if "--frozen-bonus" in flags else bonus == [0.0] * len(bonus)


def test_iql_on_data_alone(tmp_path):
    folder, _ = run(tmp_path, "it", "--online-steps", "0", module=iql)
    result = check_schema(folder, "iql", ("offline",))
    assert result["dataset"] == "ooo/point-mass-wall/over-v0"
    assert "settings" not in result and result["seeds"] == [0, 1]
