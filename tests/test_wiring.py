"""What `train` hands to its programs, and what these store, in each script. No program of a run compiles here.

The probes cannot tell any of this. They terminate at each of their ends, no buffer of theirs is ever full, and
they have neither scaled rewards nor dropout.
"""

import ast
import importlib
import inspect
import pathlib
from functools import partial
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sac import random_rows

from ooo_rl.algos import bcq, iql, jsrl, ooo_iql, sac
from ooo_rl.data.runs.session import Session

NAMES = sorted(path.stem for path in pathlib.Path(iql.__file__).parent.glob("[a-z]*.py"))
SCRIPTS = {name: importlib.import_module(f"ooo_rl.algos.{name}") for name in NAMES}
of_each = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
STEPS = {"env": "point-mass-wall", "offline_steps": 8, "online_steps": 480, "num_envs": 48}


def functions_of(script):
    return [f for f in ast.parse(inspect.getsource(script)).body if isinstance(f, ast.FunctionDef)]


@of_each
def test_online_rows_are_what_the_environment_reached(script):
    """A time limit is no termination, the next observation is not that of the next episode, broken rows are named."""
    (acting,) = (f for f in functions_of(script) if "envs.step_all" in ast.unparse(f))
    calls = [node for node in ast.walk(acting) if isinstance(node, ast.Call)]
    given = {ast.unparse(call.func): [ast.unparse(value) for value in call.args] for call in calls}
    row = given.get("Transition") or given["Rows"]
    insert = given.get("buffer.insert") or given["n_step.insert"]
    ended = "1 - reached.info['termination']"
    assert row[2:4] == ["reached.reward", "reached.obs"] and insert[-1] == "reached.info['broken']"
    assert row[4] == ended or (row[4] == "discount" and ended in ast.unparse(acting))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "per_iql"])  # tests of its own
def test_a_full_ring_has_no_more_rows_than_slots(name):
    """Each place that draws among the `added` rows draws among the ring's slots at most."""
    places = inspect.getsource(SCRIPTS[name]).count("jnp.minimum(added, buffer.size(")
    assert places >= {"ooo_iql": 2, "ooo_rlpd": 2, "td3": 2}.get(name, 1)


@pytest.mark.parametrize("ratio", [-1.0, 0.25])
def test_a_ring_that_has_wrapped_around_is_sampled_alike(ratio):
    """Long after it is full each of its rows is as likely as another. (The other files have copies.)"""
    ring = random_rows(np.random.default_rng(0), 60).replace(reward=np.arange(60, dtype=np.float32))
    ring = jax.tree.map(jnp.asarray, ring)
    offline = ring.replace(reward=ring.reward - 100)
    draw = jax.jit(partial(sac.sample_batches, offline, ring), static_argnums=(1, 2))
    reward = np.asarray(draw(jnp.int32(6_000), ratio, (300, 16), jax.random.PRNGKey(0)).reward)
    counts = np.bincount(reward[reward >= 0].astype(int), minlength=60)
    assert counts.min() > 0.5 * counts.mean()


def wired(script, place, monkeypatch, **settings):
    """(Program, its arguments by name) of each call in `train`, and what `conclude` got."""
    calls, state = [], MagicMock()

    def program(function):
        names = [*inspect.signature(function).parameters][1:]  # without what is fixed

        def call(*inputs, **static):
            calls.append((function.__name__, dict(zip(names, inputs)) | static))
            return (state, {}) if function.__name__.endswith("_chunk") else state

        return call

    monkeypatch.setattr(Session, "compile", lambda self, static, *functions: [program(f) for f in functions])
    monkeypatch.setattr(Session, "begin", lambda self, state, act: state)
    monkeypatch.setattr(Session, "chunks", lambda self: iter(self.plan))
    monkeypatch.setattr(Session, "after", lambda *_, **__: None)
    concluded = MagicMock()
    monkeypatch.setattr(Session, "conclude", lambda self, *given, **_: concluded(*given))
    script.train(script.Args(**settings, num_seeds=1, runs_dir=str(place)))
    return calls, concluded.call_args.args


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of two episodes, which return 0 and 4."""
    path, place = tmp_path_factory.mktemp("rows") / "rows.npz", np.arange(8)
    obs = np.float32(place)[:, None] * np.ones((1, 2), np.float32)
    ends = place % 4 == 3
    rest = {"rewards": np.float32(place >= 4), "terminals": ends, "timeouts": 0 * ends}
    np.savez(path, observations=obs, next_observations=obs + 1, actions=0.01 * obs, **rest)
    return str(path)


def scale_of(script):
    return next(
        (name for name in ("return_range", "max_reward") if name in script.Args.__dataclass_fields__), ""
    )


@pytest.mark.parametrize("name", [name for name in NAMES if scale_of(SCRIPTS[name])])
def test_the_scale_of_rewards_reaches_every_phase(name, rows, tmp_path, monkeypatch):
    script, scale = SCRIPTS[name], scale_of(SCRIPTS[name])
    calls, _ = wired(script, tmp_path, monkeypatch, **STEPS, dataset=rows, **{scale: 12.0})
    scales = [(ran, float(given["hyper"].reward_scale[0])) for ran, given in calls if ran.endswith("_chunk")]
    expected = 12.0 / 4 if scale == "return_range" else 12.0  # the returns span 4; the largest reward is 1
    assert len(set(scales)) >= 2 and {each for _, each in scales} == {expected}, scales


@pytest.mark.parametrize(("keep", "left"), [("all", 8), ("best", 4), ("none", 0)])
def test_fine_tuning_goes_on_with_the_rows_that_are_kept(keep, left, rows, tmp_path, monkeypatch):
    calls, _ = wired(iql, tmp_path, monkeypatch, **STEPS, dataset=rows, keep=keep)
    given = {ran: given["offline"] for ran, given in calls if ran.endswith("_chunk")}
    sizes = {ran: 0 if offline is None else len(offline.reward) for ran, offline in given.items()}
    assert sizes == {"pretrain_chunk": 8, "finetune_chunk": left}


@pytest.mark.parametrize("warm", [False, True])
def test_each_retraining_begins_anew_unless_warm(warm, rows, tmp_path, monkeypatch):
    steps = STEPS | {"retrain_at": (240, 480), "retrain_steps": 8}
    calls, _ = wired(ooo_iql, tmp_path, monkeypatch, **steps, dataset=rows, warm_start=warm)
    ran = [name for name, _ in calls]
    assert ran.count("retrain_chunk") >= 2 and ran.count("init_state") == (1 if warm else 3)
    made = [given.get("only") for name, given in calls if name == "init_state"]
    assert made == [None, *["exploiter"] * (len(made) - 1)], "a second ring is made"


@pytest.mark.parametrize(("stops", "synced"), [((240, 480), 1), ((240, 384), 2)])
def test_the_explorer_takes_over_the_exploiter_only_where_it_goes_on(
    stops, synced, rows, tmp_path, monkeypatch
):
    copied = []
    monkeypatch.setattr(jnp, "copy", lambda x: copied.append(x) or x)
    steps = STEPS | {"retrain_at": stops, "retrain_steps": 8, "online_steps": 480}
    wired(ooo_iql, tmp_path, monkeypatch, **steps, dataset=rows, sync_explorer=True)
    assert len(copied) == synced


@pytest.mark.parametrize(
    ("window", "said"), [(5, "4 evaluations online lead to stage 0 of 9"), (1, "stage 4 of 9")]
)
def test_jsrl_says_how_far_its_evaluations_lead(window, said, rows, tmp_path, monkeypatch, capsys):
    wired(jsrl, tmp_path, monkeypatch, **STEPS, dataset=rows, eval_every=0, window=window)
    assert said in " ".join(capsys.readouterr().out.split())


def test_bcq_saves_the_policy_of_its_last_step(rows, tmp_path, monkeypatch):
    """`phi` bounds how far the policy moves an action, and may change online."""
    seen = []
    monkeypatch.setattr(bcq, "acting", lambda agent, hyper: seen.append(float(hyper.phi[0])) or len(seen))
    _, given = wired(bcq, tmp_path, monkeypatch, **STEPS, dataset=rows, online_change=("phi=0.2",))
    assert seen[0] != pytest.approx(0.2) and seen[-1] == pytest.approx(0.2)
    assert given[-1] == {"policy": len(seen)}, "not the policy of the last call"
