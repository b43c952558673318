"""A run among other processes, signals, trackers and switches of JAX: it saves itself, or says what is wrong."""

import csv
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_session import opened

from ooo_rl.algos import iql
from ooo_rl.data.errors import Stopped, UsageError
from ooo_rl.data.runs import checkpoint
from ooo_rl.data.runs import folder as folders
from ooo_rl.data.runs.session import Session

SCRIPT = pathlib.Path(__file__).parents[1] / "algos" / "iql.py"
TINY = {
    "env": "point-mass-wall", "dataset": "none", "hidden": (8, 8), "num_seeds": 1, "batch_size": 8,
    "offline_steps": 0, "online_steps": 80, "num_envs": 8, "utd_ratio": 0.125, "eval_episodes": 1, "name": "it",
}  # fmt: skip


def tiny(place, **changes):
    return iql.Args(**TINY | changes, runs_dir=str(place))


def flags(place, **changes):
    """The same as words of a command."""
    words = []
    for name, value in {**TINY, **changes, "runs_dir": place}.items():
        words += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def process(place, *words, **environment):
    known = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **environment}
    return subprocess.Popen(
        [sys.executable, SCRIPT, *words], cwd=place, env={**os.environ, **known}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process):
    """(Exit code, its one line of error)."""
    _, err = process.communicate(timeout=300)
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "stopped: "))]
    assert len(lines) <= 1 and "Traceback" not in err, err
    return process.returncode, lines[0] if lines else ""


# --- signals, and other processes ---


def test_a_signal_saves_the_run_and_a_living_one_is_left_alone(tmp_path):
    """SIGTERM and SIGINT end a run at the end of a chunk, saved; while it lives nobody else writes there."""
    place = tmp_path / "iql" / "point-mass-wall" / "it"
    endless = flags(tmp_path, online_steps=80_000_000, eval_every=40_000_000, checkpoint_every=8_000)
    running = process(tmp_path, *endless)
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        rows = lambda: (place / "metrics.csv").read_text().count("\n") if place.exists() else 0  # noqa: E731
        before = rows()
        while rows() <= before + 1:
            assert running.poll() is None, running.communicate()
            time.sleep(0.05)
        with pytest.raises(UsageError, match="another process is at work on this run"):
            Session("iql", iql.Args(resume=str(place)), iql.make_plan)
        with pytest.raises(UsageError, match="exists already: choose another --name; a living process"):
            Session("iql", tiny(tmp_path), iql.make_plan)
        running.send_signal(number)
        found, line = ended(running)
        assert found == code and re.match(rf"stopped: by {number.name} after online, step \d+; go on", line)
        step = int(re.search(r"step (\d+)", line)[1])
        last = (place / "metrics.csv").read_text().splitlines()[-1].split(",")
        assert int(last[1]) == step, "the checkpoint is that of the last row"
        running = process(tmp_path, "--resume", str(place))
    running.kill()
    running.wait()


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(folders.time, "strftime", lambda _: "20261126-010203")
    args, names = tiny(tmp_path, name=""), []
    for _ in range(3):
        path = folders.place_of("iql", args)
        folders.create(path, "iql", args, {}, "command", "id")
        names.append(path.name)
    assert names == ["20261126-010203", "20261126-010203-2", "20261126-010203-3"]


def test_a_name_that_another_run_has_taken_meanwhile(tmp_path, monkeypatch):
    """It is chosen when a run begins, and its folder made when its program is compiled."""
    monkeypatch.setattr(folders.time, "strftime", lambda _: "20261126-010203")
    run = Session("iql", tiny(tmp_path, name=""), iql.make_plan)
    run.path.mkdir(parents=True)
    run._create()
    assert run.path.name == "20261126-010203-2" and (run.path / "config.json").exists()
    run.folder.close()


def test_a_machine_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    session, _ = opened(iql, tiny(tmp_path))
    assert json.loads((session.path / "config.json").read_text())["git_commit"] == "unknown"


def test_the_config_says_which_code_and_what_hardware(tmp_path, monkeypatch):
    (tmp_path / "code.py").write_text("x = 0\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["add", "code.py"], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(folders, "__file__", str(tmp_path / "code.py"))
    commit = folders._git_commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "code.py").write_text("x = 1\n")
    assert folders._git_commit() == f"{commit}-dirty"

    class Device(SimpleNamespace):
        __str__ = lambda self: self.place  # noqa: E731

    gpu = Device(place="cuda:0", platform="gpu", device_kind="NVIDIA H100")
    cpu = Device(place="cpu:0", platform="cpu", device_kind="cpu")
    assert [folders._named(device) for device in (gpu, cpu)] == ["cuda:0 (NVIDIA H100)", "cpu:0"]


# --- what a run depends on ---


@pytest.fixture
def rows(tmp_path):
    """A file of 2,000 rows, every reward -2000."""
    rng, path = np.random.default_rng(0), tmp_path / "rows.npz"
    ends = np.arange(2_000) % 20 == 19
    names = "observations", "actions", "rewards", "terminals", "timeouts"
    parts = rng.normal(size=(2_000, 2)), rng.uniform(-1, 1, (2_000, 2)), np.full(2_000, -2e3), 0 * ends, ends
    np.savez(path, **dict(zip(names, parts)))
    return path


def test_resuming_with_another_dataset_is_refused(tmp_path, rows):
    session, _ = opened(iql, tiny(tmp_path, dataset=str(rows), offline_steps=8))
    session.folder.close()
    np.savez(rows, **{**np.load(rows), "rewards": np.ones(2_000)})
    with pytest.raises(UsageError, match=r"the dataset .*rows.npz has changed since the run began"):
        Session("iql", iql.Args(resume=str(session.path)), iql.make_plan)


def test_a_damaged_config_is_one_clear_error(tmp_path):
    session, _ = opened(iql, tiny(tmp_path))
    session.folder.close()
    path = session.path / "config.json"
    whole = json.loads(path.read_text())
    hyper = whole["settings"]["hyper"]
    for damaged in (
        b"\xff\x00", b"", b"[]", b"{", json.dumps(whole)[:-40].encode(),
        *(
            json.dumps({**whole, "settings": {**whole["settings"], **change}}).encode()
            for change in (
                {"num_seeds": "two"}, {"hidden": "wide"}, {"num_seeds": -1}, {"hyper": None}, {"hyper": {"no": 1}},
                {"hyper": {**hyper, "discount": None}}, {"no_such": 1},
            )
        ),
    ):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"damaged|must be|another script"):
            iql.Args(resume=str(session.path))


def test_values_that_the_rewards_allow_are_no_divergence(tmp_path, rows):
    args = tiny(
        tmp_path, dataset=str(rows), offline_steps=8, reward_scale=0.5, sweep=("discount=0.9,0.99,1",)
    )
    session, _ = opened(iql, args)
    horizon = session.env.horizon
    np.testing.assert_allclose(
        [session.health.q_limit(r) for r in range(3)], [1e7, 1e8, 1e6 * horizon], rtol=1e-4
    )
    chunk = session.plan[0]
    fine, huge = (np.float32([-1e4, -1e5, q]) for q in (-1e5, -2e6 * horizon))
    assert session.health.find_broken(chunk, {"q": fine, "nonfinite_at": np.full(3, -1)}, {}) == []
    assert session.health.find_broken(chunk, {"q": huge, "nonfinite_at": np.full(3, -1)}, {}) == [2]
    assert (
        "diverged" in session.health.failed[2]
        and "what rewards up to 1e+03 allow" in session.health.failed[2]
    )


def test_a_failing_evaluation_is_made_by_the_resumed_run(tmp_path, monkeypatch, capsys):
    """From the checkpoint that is saved in its place; once, though a chunk follows, and though none does."""
    evaluate, made = Session._evaluate, []

    def failing(self, chunk, actor, trained):
        made.append(chunk.start + chunk.length)
        if len(made) < 3:
            raise OSError("the disk is full")
        evaluate(self, chunk, actor, trained)

    monkeypatch.setattr(Session, "_evaluate", failing)
    args = tiny(tmp_path, checkpoint_every=40, eval_every=40)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is full"):
            iql.train(args)
        args = iql.Args(resume=str(tmp_path / "iql" / "point-mass-wall" / "it"))
        assert f"the evaluation failed; go on with it by --resume {args.resume}" in capsys.readouterr().err
    result = iql.train(args)
    assert made == [40, 40, 40, 80], "of the failed chunk, twice more, and of the one after it"
    rows = (result.folder / "metrics.csv").read_text()
    assert rows.count("eval/return") == 2 and result.results["phases"]["online"]["return"][0] is not None


def test_after_an_error_that_is_remembered_the_run_can_be_resumed(tmp_path):
    """A notebook remembers the last error, and so all that was alive in it: lock, signals."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped) as remembered, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "_asked_to_stop", lambda _: signal.SIGINT)
        iql.train(tiny(tmp_path, checkpoint_every=40))
    assert signal.getsignal(signal.SIGINT) == before
    result = iql.train(iql.Args(resume=str(tmp_path / "iql" / "point-mass-wall" / "it")))
    assert result.results["phases"] and remembered


def test_this_process_is_not_called_another_one(tmp_path):
    session, _ = opened(iql, tiny(tmp_path))
    with pytest.raises(UsageError, match=r"this Python has the run open still, .* restart it, then --resume"):
        Session("iql", iql.Args(resume=str(session.path)), iql.make_plan)


def test_metrics_that_were_cut_are_not_filled_up(tmp_path):
    result = iql.train(tiny(tmp_path, checkpoint_every=40))
    metrics = result.folder / "metrics.csv"
    metrics.write_bytes(metrics.read_bytes()[:100])
    with pytest.raises(
        UsageError, match=r"metrics.csv has 100 bytes, and had .* put it back, or start a new run"
    ):
        iql.train(iql.Args(resume=str(result.folder)))


def test_agents_that_broke_are_not_begun_with(tmp_path):
    iql.train(tiny(tmp_path, num_seeds=2))
    folder, load = tmp_path / "iql" / "point-mass-wall" / "it", checkpoint._restored

    def broken(*given):
        state, host = load(*given)
        return state, host | {"failed": {"1": "online, step 80: not finite"}}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_restored", broken)
        with pytest.raises(
            UsageError, match="its seed 1 stopped in online, step 80: not finite; take --seed"
        ):
            iql.train(tiny(tmp_path, num_seeds=2, name="on", init_from=str(folder)))
        iql.train(tiny(tmp_path, name="one", init_from=str(folder)))  # of seed 0, which did not


# --- trackers ---


class Wandb:
    """In place of the package."""

    def __init__(self, error=None):
        self.error, self.begun, self.axes, self.logged = error, [], [], []

    def init(self, **settings):
        if self.error:
            raise self.error
        self.begun.append(settings)

    def define_metric(self, name, step_metric):
        self.axes.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)


def test_wandb_without_a_login_uses_up_no_name(tmp_path, monkeypatch):
    error = RuntimeError("No API key configured.\nmore of it")
    monkeypatch.setitem(sys.modules, "wandb", Wandb(error))
    with pytest.raises(UsageError, match=r"--track wandb: No API key configured\.; log in by `wandb login`"):
        opened(iql, tiny(tmp_path, track="wandb"))
    assert not list(tmp_path.rglob("config.json"))


def test_a_resumed_run_goes_on_in_its_wandb_record(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    session, _ = opened(iql, tiny(tmp_path, track="wandb"))
    session.folder.close()
    session.tracker("online", 40, {"q": np.float32([2])})
    opened(iql, iql.Args(resume=str(session.path)))
    first, second = wandb.begun
    assert first["id"] and first["id"] == second["id"] and first["resume"] == second["resume"] == "allow"
    assert wandb.logged == [{"online/step": 40, "online/q/seed0": 2.0}]
    assert wandb.axes == [("online/*", "online/step")]


def test_a_resumed_run_has_each_step_once_in_tensorboard(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, place):
            pathlib.Path(place).mkdir(parents=True)

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=Writer))
    session, state = opened(iql, tiny(tmp_path, track="tensorboard"))
    session.position = 1
    session._log("online", 40, {"q": np.float32([1])})
    session._save(session.plan[0], state)
    session._log("online", 80, {"q": np.float32([2])})  # after the checkpoint: to be forgotten
    session.checkpoints.close()
    session.folder.close()
    assert written == [("online/q", 1.0, 40), ("online/q", 2.0, 80)]
    written.clear()
    session, _ = opened(iql, iql.Args(resume=str(session.path)))
    session._log("online", 80, {"q": np.float32([3])})
    assert written == [("online/q", 1.0, 40), ("online/q", 3.0, 80)]
    with (session.path / "metrics.csv").open() as file:
        assert [(row["step"], row["value"]) for row in csv.DictReader(file)] == [("40", "1.0"), ("80", "3.0")]


# --- JAX's own switches ---

SWITCHES = {
    "JAX_ENABLE_X64": "1", "JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_DEBUG_NANS": "1", "PYTHONIOENCODING": "ascii",
}  # fmt: skip


@pytest.mark.parametrize(
    "switches",
    [SWITCHES, pytest.param({"JAX_DISABLE_JIT": "1"}, marks=pytest.mark.slow)],
    ids=["promotion", "jit"],
)
def test_a_run_ends_well_whatever_jax_is_set_to(tmp_path, switches):
    small = {"env": "probe-match-obs", "online_steps": 8} if "JAX_DISABLE_JIT" in switches else {}
    assert ended(process(tmp_path, *flags(tmp_path, **small), **switches)) == (0, "")
    assert list(tmp_path.glob("iql/*/it/result.json"))


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"JAX_PLATFORMS": "cuda"}, r"JAX finds no device to run on .*unset JAX_PLATFORMS, which is 'cuda'"),
        (
            {"XLA_FLAGS": "--xla_gpu_no_such_flag=1"},
            r"XLA_FLAGS: this version of XLA does not know .*no_such_flag",
        ),
    ],
)
def test_what_jax_cannot_do_is_one_line(tmp_path, switches, message):
    code, line = ended(process(tmp_path, *flags(tmp_path), **switches))
    assert code == 2 and re.search(message, line), line
    assert not list(tmp_path.iterdir())


def test_64_bits_are_refused_in_a_program_of_ones_own(tmp_path):
    jax.config.update("jax_enable_x64", True)
    try:
        with pytest.raises(UsageError, match=r"JAX is set to 64 bits.*JAX_ENABLE_X64"):
            iql.train(tiny(tmp_path))
    finally:
        jax.config.update("jax_enable_x64", False)
    assert not list(tmp_path.iterdir())
