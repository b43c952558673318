"""Bad input is refused before anything compiles, with one line that says what to do; good input becomes the
settings it names.
"""

import functools
import itertools
import json
import pathlib
import re
import resource
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ooo_rl.algos import cal_ql, dqn, iql, ooo_cal_ql, ooo_iql, ooo_rlpd, rlpd, td3
from ooo_rl.data.datasets import write as dataset_files
from ooo_rl.data.errors import DatasetError, UsageError
from ooo_rl.data.runs import plan, session
from ooo_rl.data.runs import settings as cli
from ooo_rl.data.runs.program import Compiled
from ooo_rl.data.runs.sweep import RunLabel, grid

REPO = pathlib.Path(__file__).parents[1]
FAMILIES = {  # the shape of the real ones, with numbers that stay
    "point-mass-wall": {
        "hidden": (64, 64), "expectile": 0.9, "temperature": 10.0, "offline_steps": 3_000,
        "online_steps": 960_000, "num_envs": 32,
        "utd_ratio": 1 / 32,
    },
    "point-mass-wall-sparse": {"reward_bias": -1.0},
    "probe": {"hidden": (32, 32), "offline_steps": 1_000, "online_steps": 8_000, "actor_lr": 3e-3},
    "door": {"dropout": 0.1, "offline_steps": 25_000},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache_of_small_programs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def parse(*flags, module=ooo_iql, families=FAMILIES):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FAMILIES", families)
        return cli.parse(module.Args, list(flags))


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs a script with flags that must be refused before anything compiles or any folder is made; returns
    the error.
    """

    def refused(*flags, module=ooo_iql, runs_dir=tmp_path / "runs", families=FAMILIES):
        monkeypatch.setattr(Compiled, "program", lambda *_, **__: pytest.fail("compiled before the error"))
        monkeypatch.setattr(module, "FAMILIES", families)
        monkeypatch.setattr(sys, "argv", ["script", *map(str, flags), "--runs-dir", str(runs_dir)])
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit:
            cli.launch(module.Args, module.train)
        err = capsys.readouterr().err
        lines = [
            line for line in err.splitlines() if line.startswith("error: ")
        ]  # a library may warn while it is imported
        assert exit.value.code == 2 and len(lines) == 1 and "Traceback" not in err, err
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0]

    return refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--env point-mas-wall", r"--env point-mas-wall: .*did you mean point-mass-wall"),
        ("--dataset ooo/point-mass-wall/ovr-v0", r"unknown dataset 'ooo/point-mass-wall/ovr-v0'.*over-v0"),
        ("--dataset absent.npz", "absent.npz: there is no such file"),
        ("--physics mjx", "uses no physics engine"),
        ("--offline-steps -1", "--offline-steps must be at least 0, not -1"),
        ("--online-steps -32", "--online-steps must be at least 0"),
        ("--retrain-steps -5", "--retrain-steps must be at least 0"),
        ("--num-seeds 0", "--num-seeds must be at least 1, not 0"),
        ("--batch-size 0", "--batch-size must be at least 1"),
        ("--eval-episodes 0", "--eval-episodes must be at least 1"),
        ("--hidden 0", "--hidden must be at least 1, not 0"),
        ("--dropout 1", "--dropout must be below 1, not 1"),
        ("--dropout nan", "--dropout must be a number, not nan"),
        ("--discount 1.5", "--discount must be at most 1, not 1.5"),
        ("--sweep discount=0.9,1.5", "--discount must be at most 1, not 1.5"),
        ("--reward-bias nan", "--reward-bias must be a number"),
        ("--expectile 1", "--expectile must be below 1"),
        ("--upsample 1.5", "--upsample"),
        ("--count-bins 0 4", "--count-bins"),
        ("--online-steps 100", "--online-steps 100 is not a multiple of --num-envs 32; the next one is 128"),
        ("--buffer-size 100", "--buffer-size 100 is not a multiple"),
        ("--num-envs 32 --utd-ratio 0.04", "1.28 gradient steps"),
        ("--num-envs 32 --utd-ratio 0.01", "at least 1"),
        ("--sweep actr-lr=1", ": actr-lr is not a traced setting; did you mean actor-lr"),
        (
            "--sweep hidden=8",
            ": hidden is fixed when the program compiles, so it cannot be swept; ",
        ),
        ("--sweep num-seeds=1,2", ": num-seeds is fixed when .*swept is discount, reward-scale, "),
        ("--sweep actor-lr=fast", "write NAME=NUMBER"),
        ("--sweep actor-lr", "write NAME=NUMBER"),
        ("--sweep actor-lr=1e-3 actor_lr=1e-4", "actor-lr is swept twice"),
        ("--retrain-at 3200000", "step 3200000, which is beyond --online-steps 960000"),
        (
            "--retrain-at 33",
            "step 33, where online is to stop, is not a multiple of --num-envs 32; the next one is 64",
        ),
        ("--dataset none --offline-steps 0 --retrain-at 0", "nothing to learn from"),
        ("--dataset none", "--offline-steps 3000 needs --dataset"),
        ("--offline-steps 0 --online-steps 0 --retrain-steps 0", "nothing to do"),
        ("--env none --online-steps 32 --num-envs 32 --dataset x.npz", "--online-steps 32 needs --env"),
        ("--env probe-match-obs --offline-steps 0 --intrinsic count", "--intrinsic count needs a 2-D task"),
        ("--eval-env NoSuch-v1", "--eval-env NoSuch-v1: "),
        (
            "--eval-env Pendulum-v1",
            "--eval-env Pendulum-v1 has 3 observations and 1 actions, the policy 2 and 2",
        ),
        (
            "--env toy-maze --offline-steps 0",
            "--env toy-maze has discrete actions, and this method needs cont",
        ),
        ("--eval-env CartPole-v1", "--eval-env CartPole-v1 has discrete actions, and this method needs cont"),
        ("--export ooo/x --buffer-size 320", "--export needs online steps, and a buffer that holds all"),
        ("--export ooo/a.b", "Malformed dataset ID: ooo/a.b-seed0-v0"),
        ("--export ooo/x --online-steps 0", "--export needs online steps"),
        ("--retrain-at 320 --retrain-steps 0", "--retrain-at needs --retrain-steps"),
        ("--warm-start", "--warm-start needs two --retrain-at"),
        ("--warm-start --retrain-at 320 320", "--warm-start needs two --retrain-at"),
        ("--sync-explorer", "--sync-explorer needs a --retrain-at after which the explorer goes on"),
        ("--upsample 0.0001", "--upsample 0.0001 of --batch-size"),
    ],
)
def test_bad_flags(refused, flags, message):
    assert re.search(message, refused(*flags.split()))


@pytest.mark.parametrize(
    "flags", ["--num-seeds 0", "--env nowhere", "--sweep intrinsic-coef=1", "--online-steps 100"]
)
def test_bad_flags_of_iql(refused, flags):
    refused(*flags.split(), module=iql)


def test_a_method_of_discrete_actions_refuses_others(refused, tmp_path):
    needs = "continuous actions, and this method needs discrete ones"
    refuses = functools.partial(refused, module=dqn, families={})
    assert f"--env point-mass-wall has {needs}" in refuses("--env", "point-mass-wall")
    fresh = "--env", "toy-maze", "--offline-steps", 0
    assert f"--eval-env Pendulum-v1 has {needs}" in refuses(*fresh, "--eval-env", "Pendulum-v1")
    assert "--eval-env CartPole-v1 has 4 observations and 2 actions, the policy 2 and 5" in refuses(
        *fresh, "--eval-env", "CartPole-v1"
    )
    data = "--dataset", write(tmp_path / "c.npz")
    assert needs in refuses(*data, "--online-steps", 0)
    assert "continuous actions, toy-maze has discrete ones" in refuses(*data, "--env", "toy-maze")


def write(path, change=None, obs=2, act=2, n=50):
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(n, obs)), "actions": rng.uniform(-1, 1, (n, act)), "rewards": np.zeros(n),
        "terminals": np.zeros(n, bool), "timeouts": np.arange(n) % 10 == 9,
    }  # fmt: skip
    if change:
        name, row, value = change
        arrays[name][row] = value
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, value in arrays.items():
                file[key] = value
    return path


def test_bad_datasets(refused, tmp_path):
    assert "has 3 observations and 2 actions, point-mass-wall has 2 and 2" in refused(
        "--dataset", write(tmp_path / "a.npz", obs=3)
    )
    assert re.search(
        r"\(row 12\): reward is not finite",
        refused("--dataset", write(tmp_path / "b.npz", ("rewards", 12, np.nan))),
    )
    assert re.search(
        r"\(row 3\): an action lies outside",
        refused("--dataset", write(tmp_path / "c.hdf5", ("actions", 3, 2.0))),
    )
    numbers = write(tmp_path / "n.npz")
    np.savez(numbers, **{**np.load(numbers), "actions": np.arange(50) % 4})
    assert "discrete actions, point-mass-wall has continuous ones" in refused("--dataset", numbers)
    assert "discrete actions, and this method needs continuous ones" in refused(
        "--dataset", numbers, "--online-steps", 0
    )
    path = write(tmp_path / "d.hdf5")
    path.write_bytes(path.read_bytes()[:-500])
    assert "d.hdf5: damaged" in refused("--dataset", path)


def test_an_existing_run_is_refused_and_left_alone(refused, tmp_path):
    folder = tmp_path / "runs/ooo_iql/point-mass-wall/mine"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("precious")
    assert "exists already" in refused("--name", "mine")
    assert (folder / "metrics.csv").read_text() == "precious" and len(list(folder.iterdir())) == 1


def test_a_runs_dir_that_is_a_file(refused, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot make a folder there" in refused(runs_dir=tmp_path / "file")


def test_an_export_over_an_existing_dataset_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari/ooo/x-seed1-v0").mkdir(parents=True)
    assert "ooo/x-seed1-v0 exists already" in refused("--export", "ooo/x")
    assert dataset_files.exists(cli.export_id(parse("--export", "ooo/y"), RunLabel(1, ""))) is False


def test_resume_mismatch_and_no_run(refused, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    assert "not a run's folder" in refused("--resume", folder)
    config = {"format": cli.FORMAT, "settings": cli.to_json(parse("--runs-dir", str(tmp_path / "runs")))}
    (folder / "config.json").write_text(json.dumps(config))
    assert "num_seeds is 5 there and 3 here" in refused("--resume", folder, "--num-seeds", "3")
    (folder / "config.json").write_text(json.dumps({**config, "format": 1, "git_commit": "abc"}))
    assert re.search(
        "a folder of format 1, and this version reads format 2.*commit abc", refused("--resume", folder)
    )
    (folder / "config.json").write_text("{")
    assert "config.json" in refused("--resume", folder)


@pytest.mark.parametrize("flags", ["--env point-mas-wall", "--sweep actr-lr=1 --dataset none"])
def test_exit_code_and_one_line_as_a_process(tmp_path, flags):
    command = [sys.executable, REPO / "algos/ooo_iql.py", *flags.split(), "--runs-dir", tmp_path / "runs"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "room", [pytest.param("none at all", marks=pytest.mark.slow), "for all but checkpoints"]
)
def test_a_full_disk_is_one_clear_error_and_the_last_checkpoint_resumes(tmp_path, room):
    folder = tmp_path / "runs/iql/point-mass-wall/it"
    command = [sys.executable, REPO / "algos/iql.py"]
    flags = (
        "--hidden 32 32 --num-seeds 1 --batch-size 16 --offline-steps 0 --online-steps 9600 --num-envs 8 "
        "--utd-ratio 0.125 --eval-episodes 1 --eval-every 9600 --checkpoint-every 400 --name it"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, *flags.split(), "--runs-dir", tmp_path / "runs"], **pipes)
    steps = lambda: [p for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]  # noqa: E731
    while not any(int(p.name) > 2 for p in steps()):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    # A limit on each file stands in for the disk's: such writes fail alike.
    size = 1 if room == "none at all" else 40_000
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    _, err = process.communicate(timeout=120)
    # The checkpoint library's own threads may complain before and after our line, or leave one of theirs
    # unfinished in front
    # of it; no traceback goes through our files.
    errors = re.findall("error: (no room left.*)", err)
    assert (process.returncode, len(errors)) == (2, 1), err
    assert str(REPO / "data") not in err and str(REPO / "algos") not in err
    assert (room == "none at all") or "checkpoint" in errors[0]
    assert not (folder / "result.json").exists() and steps()
    found = subprocess.run([*command, "--resume", folder], **pipes, timeout=300)
    assert found.returncode == 0, found.stderr
    assert (folder / "result.json").exists()


# --- what the flags become ---


def test_family_defaults_and_explicit_flags():
    args = parse()
    assert (args.env, args.dataset) == ("point-mass-wall", "ooo/point-mass-wall/over-v0")
    assert (args.hidden, args.num_envs, args.intrinsic, args.hyper.expectile) == ((64, 64), 32, "rnd", 0.9)
    args = parse("--expectile", "0.6", "--num-envs", "64", "--intrinsic", "none")
    assert (args.hyper.expectile, args.num_envs, args.intrinsic, args.hyper.temperature) == (
        0.6,
        64,
        "none",
        10.0,
    )
    args = parse("--env", "probe-match-obs", "--offline-steps", "0")
    assert (args.dataset, args.hidden, args.online_steps, args.hyper.actor_lr) == (
        "none",
        (32, 32),
        8_000,
        3e-3,
    )
    assert parse("--offline-steps", "0").dataset == "none"


def test_the_longer_prefix_wins():
    assert (parse().hyper.reward_bias, parse("--env", "point-mass-wall-sparse").hyper.reward_bias) == (0, -1)
    families = {"point-mass-wall": {"batch_size": 7, "expectile": 0.1}, "point": {"batch_size": 3, "seed": 4}}
    for table in (families, dict(reversed(families.items()))):
        args = parse("--offline-steps", "0", "--num-envs", "8", families=table)
        assert (args.batch_size, args.seed, args.hyper.expectile) == (7, 4, 0.1)


@pytest.mark.parametrize("spelling", ["--online-steps 0", "--online-steps=0", "--online_steps 0"])
@pytest.mark.parametrize("name", ["D4RL/door/human-v2", "door-cloned-v1", "data/door-v0_demos_clipped.hdf5"])
def test_a_dataset_alone_needs_no_environment_and_brings_its_family(name, spelling):
    args = parse("--dataset", name, *spelling.split())
    assert (args.env, args.dataset, args.dropout, args.offline_steps) == ("none", name, 0.1, 25_000)


@pytest.mark.parametrize(
    "path",
    ["door_human.npz", "my/door.hdf5", "/home/door/log.h5", "/data/door/log-v0", "~/door-v0", "../pen/x-v0"],
)
def test_the_path_of_a_file_or_folder_chooses_no_settings(path):
    args = parse("--dataset", path, "--online-steps", "0")
    assert (args.dropout, args.offline_steps) == (0.0, 1_000_000)


def test_help_shows_what_is_in_force(capsys):
    def shown(*flags):
        with pytest.raises(SystemExit) as exit:
            parse(*flags, "--help")
        assert exit.value.code == 0
        return re.sub(r"[│\s]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out))

    probe, wall = shown("--env", "probe-match-obs"), shown()
    assert re.search(r"--hidden .{0,120}\(default: 32 32\)", probe) and re.search(
        r"--hidden .{0,120}\(default: 64 64\)", wall
    )
    assert re.search(r"--online-steps .{0,120}\(default: 8000\)", probe) and re.search(
        r"--online-steps .{0,120}\(default: 960000\)", wall
    )


def test_sweep_grid_and_labels():
    args = parse("--sweep", "intrinsic-coef=0,5", "expectile=0.7,0.9", "--num-seeds", "2", "--seed", "3")
    hyper, labels = grid(args)
    assert [label.seed for label in labels] == [3, 4] * 4
    assert [label.setting for label in labels[::2]] == [
        f"intrinsic-coef={c} expectile={e}" for c, e in itertools.product(("0", "5"), ("0.7", "0.9"))
    ]
    np.testing.assert_array_equal(hyper.intrinsic_coef, np.repeat([0, 5], 4))
    np.testing.assert_array_equal(hyper.expectile, np.tile(np.repeat(np.float32([0.7, 0.9]), 2), 2))
    np.testing.assert_array_equal(hyper.discount, np.full(8, np.float32(0.99)))
    assert {x.dtype for x in vars(hyper).values()} == {np.dtype("float32")}
    assert [label.setting for label in grid(parse())[1]] == [""] * 5


@pytest.mark.parametrize("module", [ooo_iql, iql])
def test_config_round_trip(module):
    args = parse(
        "--env",
        "point-mass-wall",
        "--sweep",
        "actor-lr=1e-3,1",
        "--expectile",
        "0.8",
        module=module,
        families=module.FAMILIES,
    )
    text = json.dumps(cli.to_json(args), allow_nan=False)  # other languages' readers know no Infinity
    assert cli.from_json(module.Args, json.loads(text)) == args
    with pytest.raises(UsageError, match=r"another script.*colour"):
        cli.from_json(module.Args, {**cli.to_json(args), "colour": 1})


@settings(max_examples=300)
@given(
    st.integers(0, 60),
    st.integers(0, 400),
    st.integers(0, 90),
    st.integers(0, 90),
    st.sampled_from([1, 3, 8]),
    st.sampled_from(["online", "x"]),
    st.integers(0, 500),
)
def test_chunks_cover_every_step_once(start, length, evaluate_every, save_every, num_envs, phase, idle):
    block = num_envs if phase == "online" else 1
    start, end = start * block, (start + length) * block
    args = SimpleNamespace(eval_every=evaluate_every, checkpoint_every=save_every, num_envs=num_envs)
    found = plan.cut_phase(
        args, plan.Phase(phase, start, end, acts=phase == "online", collected=7, idle=idle)
    )
    assert [c.learns for c in found] == [c.start >= idle for c in found]
    steps = [step for c in found for step in range(c.start, c.start + c.length)]
    assert steps == list(range(start, end))
    assert all(c.length > 0 and c.length % block == 0 and c.phase == phase for c in found)
    assert [c.collected for c in found] == [c.start if phase == "online" else 7 for c in found]
    assert [c.first for c in found] == [i == 0 for i in range(len(found))]
    assert [c.last for c in found] == [i == len(found) - 1 for i in range(len(found))]

    def due(every):
        """Ends of chunks at which something is due: at the first whole block at or after each multiple of
        `every`, and at the end.
        """
        wanted = {-(-step // block) * block for step in range(start + 1, end) if step % every == 0}
        return (wanted | {end}) - {start} if found else set()

    evaluate_every = evaluate_every or max(-(-(end - start) // 4), 1)
    assert {c.start + c.length for c in found if c.evaluate} == due(evaluate_every)
    assert {c.start + c.length for c in found if c.save} == due(save_every or evaluate_every)
    assert all(c.evaluate or c.save or not c.learns for c in found)


def test_the_plan_retrains_where_asked():
    args = replace(
        parse("--online-steps", "320", "--retrain-steps", "4", "--offline-steps", "4"),
        retrain_at=(96, 320),
        eval_every=10**6,
    )
    chunks = plan.cut(args, ooo_iql.make_plan(args))
    assert [(c.phase, c.start, c.length, c.collected) for c in chunks] == [
        ("offline", 0, 4, 0), ("online", 0, 96, 0), ("retrained@96", 0, 4, 96), ("online", 96, 224, 96),
        ("retrained", 0, 4, 320),
    ]  # fmt: skip
    last = plan.cut(args, ooo_iql.make_plan(replace(args, retrain_at=(96,))))
    assert [(c.phase, c.start) for c in last][-2:] == [("retrained", 0), ("online", 96)]


def test_export_to_where_nothing_can_be_written_is_refused_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "file" / "below"))
    with pytest.raises(DatasetError, match="cannot be written"):
        cli.parse(iql.Args, ["--export", "ooo/x", "--buffer-size", "0"])


# --- the bodies' settings ---


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--env hopper --dataset x", {"return_range": 1000.0, "expectile": 0.7, "reward_bias": 0.0}),
        ("--env ant-sparse", {"return_range": 0.0, "offline_steps": 0, "dataset": "none"}),
        (
            "--env antmaze-large-play",
            {"return_range": 0.0, "expectile": 0.9, "temperature": 10.0, "reward_bias": -1.0},
        ),
        ("--env antmaze-umaze", {"dataset": "ooo/antmaze-umaze/noisy-v0"}),
        (
            "--env maze2d-large-missing-data",
            {"temperature": 3.0, "dataset": "ooo/maze2d-large-missing-data/noisy-v0"},
        ),
        ("--dataset D4RL/door/human-v2 --online-steps 0", {"temperature": 0.5, "dropout": 0.1}),
        ("--dataset halfcheetah_medium-v2.hdf5 --online-steps 0", {"return_range": 1000.0}),
        ("--dataset pendulum.hdf5 --online-steps 0", {"temperature": 3.0, "dropout": 0.0}),  # not the pen
    ],
)
def test_settings_of_the_papers_by_family(flags, expected):
    args = cli.parse(iql.Args, flags.split())
    found = {**vars(args), **vars(args.hyper)}
    assert {name: found[name] for name in expected} == expected


def test_a_prefix_in_two_keys_of_a_table_has_the_settings_of_both():
    hyper = cli.parse(cal_ql.Args, ["--env", "pen-binary"]).hyper
    assert hyper == cli.parse(cal_ql.Args, ["--env", "door-binary"]).hyper and hyper.reward_scale == 10


def test_return_range_scales_the_rewards_by_the_datas_returns():
    hyper, _ = grid(iql.Args(env="hopper", dataset="x"))
    card = {"id": "x", "ordered": True, "return_quantiles": [200.0, 1000.0, 1500.0, 2000.0, 4200.0]}

    def scaled(data, size, init_from=""):
        args = SimpleNamespace(init_from=init_from)
        return session.Session.scaled_to(SimpleNamespace(hyper=hyper, card=card, data=data, args=args), size)

    np.testing.assert_allclose(scaled("some", 1000).reward_scale, 0.25)
    np.testing.assert_allclose(scaled(None, 1000).reward_scale, 1.0)
    np.testing.assert_allclose(scaled("some", 0).reward_scale, 1.0)
    np.testing.assert_allclose(scaled(None, 0, "runs/x").reward_scale, 1.0)
    with pytest.raises(
        UsageError, match="--return-range 1000 with --init-from: name the --dataset of that run"
    ):
        scaled(None, 1000, "runs/x")
    card["return_quantiles"] = [5.0] * 5
    with pytest.raises(UsageError, match="every episode of x has the return 5"):
        scaled("some", 1000)
    card["ordered"] = False  # and the quantiles are of single rewards
    with pytest.raises(
        UsageError, match=r"--return-range 1000: the rows of x are in no order.* --reward-scale"
    ):
        scaled("some", 1000)


# --- settings from Python ---


def test_a_call_gives_the_settings_in_force():
    args = iql.Args(env="antmaze-umaze", expectile=0.8, num_seeds=4)
    assert (args.hyper.expectile, args.num_seeds) == (0.8, 4)  # named
    assert (args.hyper.temperature, args.hyper.reward_bias) == (10, -1)  # of the family
    assert (args.hyper.value_lr, args.batch_size) == (3e-4, 256)  # defaults
    assert iql.Args().hidden == iql.FAMILIES["point-mass-wall"]["hidden"]
    assert iql.Args(hyper=iql.Hyper(expectile=0.6)).hyper == iql.Hyper(expectile=0.6)
    assert iql.Args(hyper=iql.Hyper(expectile=0.6), discount=0.5).hyper == iql.Hyper(
        expectile=0.6, discount=0.5
    )


def test_a_call_is_what_the_command_makes_of_the_same_words():
    args = ooo_iql.Args(env="point-mass-wall-sparse", expectile=0.8, retrain_at=(48, 96), num_envs=48)
    flags = "--env point-mass-wall-sparse --expectile 0.8 --retrain-at 48 96 --num-envs 48"
    assert cli.resolved(args) == cli.parse(ooo_iql.Args, flags.split())


def test_changing_one_setting_keeps_the_others():
    args = iql.Args(env="antmaze-umaze", expectile=0.8)
    changed = replace(args, num_seeds=2)
    assert changed == iql.Args(env="antmaze-umaze", expectile=0.8, num_seeds=2)


def test_an_unknown_setting_names_the_near_ones():
    with pytest.raises(UsageError, match="there is no setting 'expectil'; did you mean expectile"):
        iql.Args(expectil=0.5)


@pytest.mark.parametrize("module", [ooo_iql, ooo_cal_ql, ooo_rlpd, td3])
def test_without_a_bonus_none_can_be_frozen(module):
    args = module.Args(env="probe-all", dataset="none", offline_steps=0, frozen_bonus=True, intrinsic="none")
    with pytest.raises(UsageError, match="--frozen-bonus needs a bonus to freeze"):
        cli.resolved(args)


def test_an_empty_resume_is_none():
    for words in (["--resume", ""], ["--resume="]):
        assert parse(*words, "--env", "maze2d-umaze", module=iql, families=iql.FAMILIES) == parse(
            "--env", "maze2d-umaze", module=iql, families=iql.FAMILIES
        )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"keep": "nothing"}, "--keep must be one of all, none, best, not 'nothing'"),
        ({"actor_decay": "Cosine"}, "--actor-decay must be one of"),
        ({"track": "tensorbord"}, "--track must be one of"),
        ({"online_steps": 960.0}, "--online-steps must be a whole number, not 960.0"),
        ({"num_seeds": 2.5}, "--num-seeds must be a whole number, not 2.5"),
        ({"num_seeds": True}, "--num-seeds must be a whole number, not True"),
        ({"hidden": 64}, "--hidden must be a tuple, not 64"),
        ({"dataset": pathlib.Path("x.npz")}, "--dataset must be a string"),
        ({"name": None}, "--name must be a string, not None"),
    ],
)
def test_a_value_of_another_kind_is_refused_in_python(setting, message):
    with pytest.raises(UsageError, match=message):
        cli.resolved(iql.Args(**{"env": "probe-match-obs", "dataset": "none", "offline_steps": 0} | setting))


def test_numbers_of_numpy_are_numbers():
    args = iql.Args(env="probe-match-obs", num_seeds=np.int64(2), expectile=np.float32(0.5))
    cli.check_bounds(args)
    assert json.loads(json.dumps(cli.to_json(args)))["num_seeds"] == 2


def test_a_scale_that_the_data_set_cannot_change_online():
    args = iql.Args(env="hopper", dataset="x", online_change=("reward-scale=1",))
    with pytest.raises(
        UsageError, match="--online-change reward-scale=1: --return-range scales by the data's"
    ):
        cli.check_online_change(args)
    cli.check_online_change(replace(args, return_range=0.0))


@pytest.mark.parametrize("ratio", ["0.5", "0", "-1"])
def test_a_share_of_offline_rows_needs_offline_rows(ratio):
    """Else the flag changes nothing, and nobody hears of it. A script's own share may find none."""
    flags = ["--env", "ant-sparse", "--offline-steps", "0", "--offline-ratio", ratio]
    if float(ratio) > 0:
        with pytest.raises(UsageError, match=r"--offline-ratio 0\.5 needs --dataset, and it is none"):
            cli.parse(td3.Args, flags)
    else:
        assert cli.parse(td3.Args, flags).offline_ratio == float(ratio)
    assert cli.parse(td3.Args, ["--dataset", "own", "--offline-ratio", ratio]).offline_ratio == float(ratio)
    assert cli.parse(rlpd.Args, flags[:4]).offline_ratio == 0.5
    with pytest.raises(UsageError, match=r"--offline-ratio 0\.001 of --batch-size 256 is no row; use 0"):
        cli.parse(td3.Args, ["--dataset", "own", "--offline-ratio", "0.001"])
    with pytest.raises(UsageError, match=r"--offline-ratio 0\.25 needs --dataset"):
        # from Python
        cli.resolved(replace(rlpd.Args(), env="ant-sparse", offline_steps=0, offline_ratio=0.25))
