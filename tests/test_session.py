"""What the house does for every script: training from Python, a user's own environment, starting from
another run's agents.
"""

import contextlib
import importlib
import json
import signal
import subprocess
import sys
from dataclasses import fields
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ooo_rl import envs
from ooo_rl.algos import bcq, cql, gde_iql, iql, ooo_iql, sac
from ooo_rl.data import errors
from ooo_rl.data.buffer import Transition
from ooo_rl.data.errors import UsageError
from ooo_rl.data.learner import Learner
from ooo_rl.data.runs import report, settings
from ooo_rl.data.runs import session as session_module
from ooo_rl.data.runs.checkpoint import Checkpoints
from ooo_rl.data.runs.health import Health
from ooo_rl.data.runs.session import Session
from ooo_rl.data.runs.sweep import RunLabel
from ooo_rl.envs.base import Task

SMALL = {
    "env": "point-mass-wall", "hidden": (8, 8), "num_seeds": 2, "batch_size": 16, "num_envs": 8, "utd_ratio": 0.125,
    "offline_steps": 20, "online_steps": 80, "eval_episodes": 1, "eval_every": 1000, "name": "it",
}  # fmt: skip


class Push(Task):
    """Four steps along a line; the reward is what the action pushes."""

    horizon, observation_size, action_size = 4, 1, 1

    def start(self, key):
        return jax.random.uniform(key, (1,))

    def advance(self, inner, action):
        return inner + 0.1 * action, action[0], jnp.bool_(False), jnp.bool_(False)

    def observe(self, inner):
        return inner


@pytest.fixture
def push():
    envs.register("push", Push)
    yield
    envs._REGISTERED.pop("push")


def test_a_registered_environment_trains_from_python_with_defaults_that_run(push, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook", "--not-ours"])
    args = iql.Args(
        env="push",
        runs_dir=str(tmp_path),
        **{k: v for k, v in SMALL.items() if k not in ("env", "offline_steps")},
    )
    assert args.offline_steps == 0  # it has no dataset of ours
    result = iql.train(args)
    assert result.folder == tmp_path / "iql" / "push" / "it" and sys.argv == ["notebook", "--not-ours"]
    assert result.results == json.loads((result.folder / "result.json").read_text())
    assert (
        set(result.results["phases"]) == {"online"} and len(result.results["phases"]["online"]["return"]) == 2
    )
    speed = [result.results[f"{what}_per_second"] for what in ("seed_updates", "env_steps")]
    assert speed[0] / speed[1] == pytest.approx(args.utd_ratio)
    assert result.agents["agent"].actor.params["params"]["MLP_0"]["Dense_0"]["kernel"].shape == (2, 1, 8)
    assert json.loads((result.folder / "config.json").read_text())["command"] == "iql.train(args)"
    again = iql.train(iql.Args(resume=str(result.folder)))
    assert again.results["phases"] == result.results["phases"]
    with pytest.raises(UsageError, match="num_seeds is 2 there and 3 here"):
        iql.Args(resume=str(result.folder), num_seeds=3)


MODULE = """
import jax
import jax.numpy as jnp
from ooo_rl.envs.base import Task

class Push(Task):
    horizon, observation_size, action_size = 4, 1, 1
    def start(self, key):
        return jax.random.uniform(key, (1,))
    def advance(self, inner, action):
        return inner + 0.1 * action, action[0], jnp.bool_(False), jnp.bool_(False)
    def observe(self, inner):
        return inner
"""


def test_an_environment_of_ones_own_module_is_a_flag_even_beside_ones_own_data_py(tmp_path):
    (tmp_path / "my_tasks.py").write_text(MODULE)
    (tmp_path / "data.py").write_text("raise RuntimeError('the data module of the user')")
    script = settings.__file__.replace("data/runs/settings.py", "algos/iql.py")
    words = "--env my_tasks:Push --num-seeds 1 --online-steps 16 --hidden 8 --batch-size 8 --eval-episodes 1 --name it"
    found = subprocess.run(
        [sys.executable, script, *words.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "runs/iql/my_tasks.Push/it/result.json").exists()


def test_evaluations_share_no_key_with_training(push, tmp_path):
    session = Session("iql", iql.Args(env="push", num_seeds=2, runs_dir=str(tmp_path)), iql.make_plan)
    for first, own in zip(np.asarray(session.keys), np.asarray(session.eval_keys)):
        assert not any((part == own).all() for part in np.asarray(jax.random.split(first, 64)))


# --- starting from another run ---


def opened(script, args):
    """(session, state) of a run at its beginning: all that `train` does before the first chunk."""
    session = Session(script.__name__.split(".")[-1], args, script.make_plan)
    nets = script.make_nets(session)
    (initialise,) = session.compile(session.static(nets), script.init_state)
    given = {
        "hyper": session.hyper,
        "offline": session.offline,
        "truncation": session.truncation,
        "key": session.keys,
    }
    state = initialise(*(given[name] for name in initialise.names))
    return session, session.begin(state, partial(script.act, nets))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Method -> (folder with a checkpoint, its state), made on demand."""
    place, made = tmp_path_factory.mktemp("sources"), {}

    def source(name):
        if name not in made:
            script = importlib.import_module(f"ooo_rl.algos.{name}")
            session, state = opened(script, script.Args(**small(script), seed=3, runs_dir=str(place)))
            # as if it had learnt: else a script that draws the same numbers begins with this agent anyway
            state = state.replace(agent=jax.tree.map(lambda x: x + 1, state.agent))
            host = {
                "position": 0,
                "metrics_bytes": 0,
                "phases": {},
                "failed": {},
                "clock": {},
                "agent": "agent",
            }
            session.checkpoints.save(0, state, host)
            made[name] = session.path, state
        return made[name]

    return source


def small(script, **changes):
    values = {**SMALL, "critic_hidden": (8, 8)} | changes
    return {name: value for name, value in values.items() if name in script.Args.__dataclass_fields__}


@pytest.mark.parametrize(
    ("source", "target", "agent", "taken", "anew"),
    [
        ("iql", "ooo_iql", "explorer", ("actor", "critic", "target_critic", "value"), ()),
        ("iql", "pex", "agent", ("actor", "critic", "target_critic", "value"), ()),
        ("cql", "sac", "agent", ("actor", "critic", "target_critic", "alpha"), ()),
        ("cql", "cal_ql", "agent", ("actor", "critic", "target_critic", "alpha", "alpha_prime"), ()),
        ("sac", "cql", "agent", ("actor", "critic", "target_critic", "alpha"), ("alpha_prime",)),
    ],
)
def test_init_from_takes_what_fits_and_says_so(sources, tmp_path, capsys, source, target, agent, taken, anew):
    folder, theirs = sources(source)
    script = importlib.import_module(f"ooo_rl.algos.{target}")
    args = script.Args(**small(script, num_seeds=1), seed=4, init_from=str(folder), runs_dir=str(tmp_path))
    _, state = opened(script, args)
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith(f"{agent} from"))
    assert line.partition("): ")[2].partition(";")[0] == ", ".join(taken)
    assert all(f"{name} (" in line for name in anew) and ("begins anew" in line) == bool(anew)
    ours = getattr(state, agent)
    for name in taken:  # seed 4 is the second of the source's
        wanted = jax.tree.map(lambda x: np.asarray(x)[1:], getattr(theirs.agent, name))
        jax.tree.map(np.testing.assert_array_equal, getattr(ours, name), wanted)


@pytest.mark.parametrize("dataset", ["auto", "own"])
def test_init_from_says_where_no_offline_rows_stay(sources, tmp_path, capsys, dataset):
    folder, _ = sources("iql")
    args = small(iql, offline_steps=0, dataset=dataset, init_from=str(folder))
    opened(iql, iql.Args(**args, seed=3, runs_dir=str(tmp_path)))
    assert ("there are no offline rows" in capsys.readouterr().out) == (dataset == "auto")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"reward_scale": 10.0, "reward_bias": -5.0}, "reward-scale=1, here 10; reward-bias=0, here -5"),
        ({"end_reward": jnp.inf}, "end-reward=-inf, here inf"),
    ],
)
def test_init_from_says_where_q_values_mean_something_else(sources, tmp_path, capsys, changes, said):
    """SAC after CQL must be given CQL's rewards, else every Q-value is wrong."""
    folder, _ = sources("cql")
    args = small(sac, offline_steps=0, critic_hidden=(8, 8)) | changes
    opened(sac, sac.Args(**args, seed=3, init_from=str(folder), runs_dir=str(tmp_path)))
    printed = capsys.readouterr().out
    assert f"its Q-values mean something else ({said})" in printed if said else "Q-values" not in printed


def test_init_from_is_where_the_explorer_starts_though_it_is_not_the_first_to_train(
    sources, tmp_path, capsys
):
    folder, theirs = sources("iql")
    steps = {
        "offline_steps": 0,
        "dataset": "own",
        "retrain_steps": 4,
        "retrain_at": (0, 80),
        "intrinsic": "none",
    }
    args = small(ooo_iql) | steps | {"seed": 3, "init_from": str(folder), "runs_dir": str(tmp_path)}
    session, state = opened(ooo_iql, ooo_iql.Args(**args))
    assert session.plan[0].agent == "exploiter" and "explorer from" in capsys.readouterr().out
    for ours, other in zip(jax.tree.leaves(state.explorer), jax.tree.leaves(theirs.agent), strict=True):
        np.testing.assert_array_equal(ours, other)
    nothing = args | {"online_steps": 0, "retrain_at": (), "name": "nothing"}
    with pytest.raises(UsageError, match="--init-from is where the explorer starts, and no phase"):
        opened(ooo_iql, ooo_iql.Args(**nothing))


def test_what_learns_beside_an_agent_is_found_in_a_state():
    state = gde_iql.State(
        None, Learner.create({"w": jnp.ones(2)}), *[None] * (len(fields(gde_iql.State)) - 2)
    )
    assert [*session_module._learners(state)] == ["explorer"]


def test_after_each_chunk_they_are_looked_at_too():
    run, state = MagicMock(num_runs=1), gde_iql.State(*[None] * len(fields(gde_iql.State)))
    explorer = Learner.create({"w": jnp.ones(2)})
    run.health.find_broken.side_effect = ZeroDivisionError  # all that comes after is not looked at here
    chunk = SimpleNamespace(phase="online", start=0, length=8, acts=True, learns=True, agent="agent")
    with pytest.raises(ZeroDivisionError):
        Session._after(run, chunk, {"q": np.ones(1)}, state.replace(explorer=explorer), None)
    assert run.health.find_broken.call_args.args[3] == {"explorer": explorer}


def test_a_report_needs_positions_alone_unless_it_exports():
    ring = Transition(*(np.arange(24.0).reshape(1, 4, 6) for _ in range(5)))
    maze, body = SimpleNamespace(layout={}), SimpleNamespace()
    for env, export, wanted in ((maze, "", ring.obs[..., :2]), (body, "", None), (body, "ooo/x", ring.obs)):
        run = SimpleNamespace(env=env, args=SimpleNamespace(export=export))
        found = Session._rows_of_report(run, ring)
        assert (found is None) == (wanted is None)
        if found:
            np.testing.assert_array_equal(found.obs, wanted)
            np.testing.assert_array_equal(found.next_obs, wanted)


def test_the_state_of_a_broken_run_is_taken_without_the_others():
    tree = {"w": jnp.arange(12.0).reshape(4, 3), "n": np.arange(4)}
    found = session_module._rows_of([2], tree, 3)
    np.testing.assert_array_equal(found["w"], [[6, 7, 8]])
    np.testing.assert_array_equal(found["n"], [2])


def test_a_resumed_run_frees_its_fresh_state(sources, tmp_path):
    """There may be no room for two. Without a checkpoint it is what the run goes on from."""
    folder, _ = sources("iql")
    checkpoints = Checkpoints(folder)
    fresh = lambda: {"w": jnp.ones((2, 3)), "kept": np.ones((2, 3))}  # noqa: E731
    kept = Checkpoints(tmp_path)
    for at, given in ((kept, fresh()), (checkpoints, fresh())):
        with contextlib.suppress(UsageError):  # that run has another state; what fits is not looked at here
            at.restore(given, 2)
        assert given["w"].is_deleted() == (at is checkpoints)
        at.close()


def test_an_agent_that_no_phase_has_trained_is_not_saved(monkeypatch):
    seen = []
    monkeypatch.setattr(report, "save_policies", lambda run, export, actors: seen.extend(actors) or 1 / 0)
    agents = {
        name: SimpleNamespace(actor=SimpleNamespace(params=np.ones((1, 2))))
        for name in ("explorer", "exploiter")
    }
    run = SimpleNamespace(untrained={"exploiter"}, num_runs=1)
    policies = {**agents, "policy": agents["exploiter"], "teacher": np.ones((1, 2))}
    with pytest.raises(ZeroDivisionError):
        Session.conclude(run, SimpleNamespace(**agents, ring=None), None, policies)
    assert seen == ["explorer", "policy", "teacher"]


def test_a_policy_of_several_parts_fits_whole_or_not_at_all(sources, tmp_path):
    """BCQ's actor moves what its VAE proposes and its critic chooses."""
    folder, _ = sources("bcq")
    args = bcq.Args(**small(bcq, vae_hidden=(9, 9)), seed=3, init_from=str(folder), runs_dir=str(tmp_path))
    with pytest.raises(
        UsageError, match=r"does not fit: vae \(of other shapes\); the kind of policy, the networks"
    ):
        opened(bcq, args)


def test_init_from_says_where_other_data_scale_the_rewards(tmp_path):
    args = iql.Args(return_range=1000)
    (tmp_path / "dataset.json").write_text(json.dumps({"return_quantiles": [0, 10, 20, 30, 100]}))

    def others(theirs=args, **card):
        config = {"format": settings.FORMAT, "settings": settings.to_json(theirs)}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return settings.other_values(str(tmp_path), args, card)

    assert others(cql.Args()) == ["return-range=0, here 1000"]  # CQL has no such setting
    said = "return-range divides by 100, here by 200, since the data are others"
    assert others(return_quantiles=[0, 1, 2, 3, 200]) == [said]
    assert others(return_quantiles=[0, 1, 2, 3, 100.5]) == others(id="none") == []


def test_a_run_that_never_learns_online_says_so(sources, tmp_path, capsys):
    folder, _ = sources("cql")
    for steps, said in ((16, True), (8, False)):
        args = small(sac, num_seeds=1, offline_steps=0, online_steps=16, name=f"after-{steps}")
        args["random_steps"] = steps
        opened(sac, sac.Args(**args, seed=3, init_from=str(folder), runs_dir=str(tmp_path)))
        printed = " ".join(capsys.readouterr().out.split())
        wanted = "no gradient step online: the first one comes after --random-steps 16, and --online-steps is"
        assert (wanted in printed) == said


def test_init_from_refuses_what_is_no_start(sources, tmp_path):
    folder, _ = sources("iql")
    fails = lambda message, **changes: pytest.raises(UsageError, match=message)  # noqa: E731
    with fails("that run has the seeds 3 to 4, not 0"):
        opened(iql, iql.Args(**small(iql), init_from=str(folder), runs_dir=str(tmp_path)))
    with fails(r"does not fit: actor \(of other shapes\), critic \(of other shapes\).*config.json"):
        wide = small(cql, actor_hidden=(9,), critic_hidden=(9,), init_from=str(folder))
        opened(cql, cql.Args(**wide, seed=3, runs_dir=str(tmp_path)))
    other, _ = sources("cql")
    for script, hidden in ((sac, (9,)), (sac, (9, 8)), (iql, (8, 8))):
        with fails(r"the policy of its agent does not fit: actor \(of other shapes\)"):
            wide = small(script, hidden=hidden, offline_steps=0, init_from=str(other))
            opened(script, script.Args(**wide, seed=3, runs_dir=str(tmp_path)))
    with fails("not a run's folder"):
        opened(iql, iql.Args(**small(iql), init_from=str(tmp_path), runs_dir=str(tmp_path)))
    assert not list(tmp_path.glob("*/*")), "a folder was made before the error"


def test_the_score_of_the_kitchen_is_that_of_its_sub_tasks():
    tally = {
        "success": np.array([[0, 1.0]]),
        "return": np.array([[300, 500.0]]),
        "length": np.full((1, 2), 9.0),
    }
    tally["solved"] = np.array([[1, 3.0]])
    evaluate = MagicMock(return_value=tally, has_map=False)
    args = SimpleNamespace(q_bias=False, eval_env="", env="kitchen-mixed")
    run = MagicMock(args=args, evaluate=evaluate, phases={}, failed={}, num_runs=1)
    chunk = SimpleNamespace(phase="online", start=0, length=8, last=True, acts=True, agent="agent")
    Session._evaluate(run, chunk, None, None)
    assert run.phases["online"]["normalized_score"] == [50] and run.phases["online"]["return"] == [400]


def test_a_run_without_a_checkpoint_starts_from_the_other_one_again(sources, tmp_path):
    folder, theirs = sources("iql")
    settings = small(iql, num_seeds=1) | {"seed": 4, "init_from": str(folder), "runs_dir": str(tmp_path)}
    session, _ = opened(iql, iql.Args(**settings))
    session.checkpoints.close()
    session.folder.close()
    _, state = opened(iql, iql.Args(resume=str(session.path)))
    jax.tree.map(
        np.testing.assert_array_equal, state.agent, jax.tree.map(lambda x: np.asarray(x)[1:], theirs.agent)
    )


# --- stopping, and what is refused before anything compiles ---


def test_a_run_whose_every_step_breaks_is_stopped(capsys):
    """For as long as an episode; single steps may break, and a run that has stopped does not count."""
    health = Health([RunLabel(k, "") for k in range(3)], np.full(3, 0.9), 100, 10.0)
    health.failed = {2: "why"}

    def after(start, length, lost):
        chunk = SimpleNamespace(phase="online", start=start, length=length)
        return health.count_broken_worlds(chunk, np.array(lost)), health.find_lost(chunk, np.array(lost))

    assert after(0, 64, [64.0, 63.0, 64.0]) == (127, [])
    assert "online, step 64: 127 worlds broke" in capsys.readouterr().err
    assert after(64, 1, [1.0, 1.0, 0.0]) == (2, [])
    assert after(65, 64, [63.9999, 64.0, 0.0])[1] == [0]  # the mean of a chunk rounds
    said = "online, step 129: in each of the last 129 steps reward, state or action was not finite; look at"
    assert said in health.failed[0] and f"seed 0 stopped in {said}" in capsys.readouterr().err
    assert after(129, 64, [64.0, 64.0, 0.0])[1] == [1]  # 1 + 64 + 64 steps


def test_rewards_that_are_not_finite_end_a_run(tmp_path, monkeypatch):
    class Unpaid(Push):
        def advance(self, inner, action):
            return inner, jnp.nan * action[0], jnp.bool_(False), jnp.bool_(False)

    monkeypatch.setitem(envs._REGISTERED, "unpaid", Unpaid)
    args = {**SMALL, "env": "unpaid", "offline_steps": 0, "dataset": "none", "num_seeds": 1}
    with pytest.raises(
        UsageError, match=r"every seed broke, .* steps reward, state or action was not finite"
    ):
        iql.train(iql.Args(**args, runs_dir=str(tmp_path)))


def test_ctrl_c_that_was_swallowed_ends_the_run_before_its_first_chunk(monkeypatch, capsys):
    """Python prints an exception of JAX's callback in its garbage collector, and goes on."""
    monkeypatch.setattr(errors, "interruptions", [])
    before, reached = signal.signal(signal.SIGINT, signal.default_int_handler), []

    def main():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        reached.append(True)
        next(Session.chunks(SimpleNamespace()))

    try:
        with pytest.raises(SystemExit) as end:
            errors.guarded(main)
    finally:
        signal.signal(signal.SIGINT, before)
    assert reached and end.value.code == 130 and capsys.readouterr().err == "stopped: interrupted\n"


def test_an_ignored_ctrl_c_stays_ignored():
    """So a shell starts what stands before `&` in a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        errors.guarded(lambda: None)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_the_report_is_written_says_how_to_go_on(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "save_policies", lambda *_: None)
    run = SimpleNamespace(
        untrained=set(), num_runs=1, path="runs/it", folder=MagicMock(), _report=interrupted,
        _rows_of_report=lambda ring: ring,
    )  # fmt: skip
    with pytest.raises(errors.Stopped, match="before its report was written; --resume runs/it") as stop:
        Session.conclude(run, SimpleNamespace(ring=None), None, {})
    assert stop.value.code == 130 and run.folder.close.called


def test_a_run_goes_on_in_its_own_script_alone(sources):
    folder, _ = sources("iql")
    with pytest.raises(UsageError, match=r"--resume .*: iql made that run, and this is cql"):
        Session("cql", iql.Args(resume=str(folder)), iql.make_plan)
    with pytest.raises(UsageError, match=r"it is a run of iql, and this is cql"):
        cql.Args(resume=str(folder))


def test_what_a_run_starts_from_is_looked_at_before_anything_compiles(sources, tmp_path, monkeypatch):
    folder, _ = sources("iql")
    monkeypatch.setattr(Session, "compile", None)
    begin = lambda **named: iql.train(iql.Args(**SMALL | named, runs_dir=str(tmp_path)))  # noqa: E731
    with pytest.raises(UsageError, match="that run has the seeds 3 to 4, not 2"):
        begin(init_from=str(folder), seed=2)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UsageError, match="there is no checkpoint yet"):
        begin(init_from=str(tmp_path), seed=3)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # so that an import fails
    with pytest.raises(UsageError, match=r"--track tensorboard: tensorboardX is not installed; pip install"):
        begin(track="tensorboard")


def test_settings_that_change_nothing_are_named(tmp_path, capsys):
    def found(script, **named):
        return {name: str(needed) for name, needed in settings.useless(script.Args(**named)).items()}

    assert found(iql) == found(ooo_iql) == found(cql, lagrange=True, lagrange_gap=5.0) == {}
    assert found(cql, lagrange_gap=5.0) == {"lagrange_gap": "--lagrange"}
    assert found(ooo_iql, intrinsic="count", rnd_lr=1e-3) == {"rnd_lr": "--intrinsic rnd"}
    assert found(ooo_iql, intrinsic="none", sweep=("intrinsic-coef=0.5,1",)) == {
        "intrinsic_coef": "--intrinsic"
    }
    assert found(iql, dataset="none", offline_steps=0, clip_actions=True) == {"clip_actions": "--dataset"}
    named = {**SMALL, "online_steps": 0, "exploration_spread": 5.0}
    named.pop("utd_ratio")
    assert found(iql, **named) == {"exploration_spread": "--online-steps"}
    Session("iql", iql.Args(**named, runs_dir=str(tmp_path)), iql.make_plan)
    assert "--exploration-spread changes nothing without --online-steps\n" in capsys.readouterr().out
