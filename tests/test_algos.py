"""One contract for every file of algos/: its parts and settings, what a tiny run leaves behind, and that a run is its seeds and settings.

Files are found by themselves. Each makes two tiny runs, which its tests share: two seeds at two discounts, and one of these four alone.
"""

import ast
import dataclasses
import importlib
import inspect
import json
import pathlib
import re
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Literal, get_args, get_origin, get_type_hints

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_run import check_schema, rows_of

import envs
from data import cli, datasets, policy
from data.program import Compiled

REPO = pathlib.Path(__file__).parents[1]
NAMES = sorted(p.stem for p in (REPO / "algos").glob("*.py") if p.stem != "__init__")
SHARED = {  # settings that the house reads, or that a user may expect of any script
    "env", "num_seeds", "seed", "eval_every", "eval_episodes", "eval_env", "checkpoint_every", "runs_dir", "name", "resume", "physics",
    "track", "sweep", "max_q", "dataset", "clip_actions", "export", "offline_steps", "online_steps", "num_envs", "utd_ratio", "buffer_size",
    "batch_size", "hidden", "hyper",
}  # fmt: skip
DATASETS = ("kitchen",)  # families of settings that belong to data, not to an environment of ours
TINY = {  # of these, a script gets the flags it has; phases are two chunks long, each of ten steps or more
    "env": "point-mass-wall", "hidden": "16 16", "critic_hidden": "16 16", "batch_size": 32, "num_envs": 8, "utd_ratio": 0.25,
    "offline_steps": 80, "online_steps": 160, "retrain_steps": 80, "random_steps": 16, "learning_starts": 16, "eval_episodes": 2,
    "eval_every": 1000, "checkpoint_every": 40, "ensemble": 3, "target_subset": 2, "policy_every": 2, "num_samples": 3,
    "retrain_ensemble": 3, "rnd_units": 16,
}  # fmt: skip
DISCOUNTS = (0.9, 0.99)


@pytest.fixture(scope="module", params=NAMES)
def script(request):
    return importlib.import_module(f"algos.{request.param}")


def name_of(script):
    return script.__name__.split(".")[-1]


def fields_of(script):
    """Field -> default, the traced ones included."""
    fields = {f.name: getattr(script.Args(), f.name) for f in dataclasses.fields(script.Args)}
    return {**fields, **{f.name: getattr(script.Hyper(), f.name) for f in dataclasses.fields(script.Hyper)}}


def kinds_of(script):
    return {**get_type_hints(script.Args), **get_type_hints(script.Hyper)}


# --- parts and settings ---


def test_it_has_the_parts_that_a_reader_looks_for(script):
    for part in ("Args", "Hyper", "State", "Setup"):
        assert inspect.isclass(getattr(script, part)), part
    for part in ("make_setup", "init_state", "update", "act", "main"):
        assert inspect.isfunction(getattr(script, part)), part
    assert script.Args.__dataclass_params__.frozen and fields_of(script).keys() >= SHARED | {"discount"}
    assert not {f.name for f in dataclasses.fields(script.Args)} & {f.name for f in dataclasses.fields(script.Hyper)}
    assert all(isinstance(getattr(script.Hyper(), f.name), float) for f in dataclasses.fields(script.Hyper)), "what is traced is a float"
    assert f"python algos/{name_of(script)}.py" in script.__doc__, "a command to run"
    assert inspect.getsource(script).endswith('\n\nif __name__ == "__main__":\n    cli.guarded(main)\n')


@pytest.mark.parametrize("part", ["Args", "Hyper"])
def test_every_setting_is_explained(script, part):
    (body,) = (node.body for node in ast.parse(inspect.getsource(script)).body if isinstance(node, ast.ClassDef) and node.name == part)
    for i, node in enumerate(body):
        if isinstance(node, ast.AnnAssign):
            following = body[i + 1] if i + 1 < len(body) else None
            said = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant) and isinstance(following.value.value, str)
            assert said and following.value.value.strip(), f"{node.target.id} has no line of its own that says what it is"


def fits(value, kind):
    """Whether `value` may stand where the annotation is `kind`."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(v, get_args(kind)[0]) for v in value)
    return type(value) is kind or (kind is float and type(value) is int)


def test_settings_of_families_are_settings_of_the_script(script):
    kinds = kinds_of(script)
    assert {"point-mass-wall", "probe"} <= script.SETTINGS.keys()
    for family, settings in script.SETTINGS.items():
        assert any(name.startswith(family) for name in envs.names()) or family.startswith(DATASETS), f"{family} is a prefix of nothing"
        for name, value in settings.items():
            assert name in kinds, f"{family}: there is no setting {name}"
            assert name not in ("env", "hyper", "resume", "name"), f"{family}: {name} is no matter of a family"
            assert fits(value, kinds[name]), f"{family}: {name} is {kinds[name]}, not {value!r}"


def of_family(script, env):
    """What SETTINGS say of an environment, the longer prefix last."""
    found = {}
    for family in sorted(script.SETTINGS, key=len):
        if env == family or (env.startswith(family) and not env[len(family)].isalnum()):
            found |= script.SETTINGS[family]
    return found


def nets_of(setup):
    """The networks of a Setup; the first ones, where its agents differ."""
    return next(part for part in setup if hasattr(part, "actor"))


def parse(script, *flags):
    return cli.parse(script.Args, script.SETTINGS, list(flags))


def test_every_environment_has_settings_that_can_run(script, monkeypatch):
    monkeypatch.setattr(Compiled, "program", lambda *_, **__: pytest.fail("compiled something"))
    for env in envs.names():
        if datasets.own(env) == "none" and of_family(script, env).get("offline_steps", script.Args().offline_steps) != 0:
            with pytest.raises(cli.UsageError, match=f"needs --dataset; {env} has none of its own"):
                parse(script, "--env", env)
            args = parse(script, "--env", env, "--dataset", "mine.hdf5")
        else:
            args = parse(script, "--env", env)
        found = {**vars(args), **vars(args.hyper)}
        expected = {"env": env, **of_family(script, env)}
        assert {name: found[name] for name in expected} == expected, env
        assert cli.from_json(script.Args, json.loads(json.dumps(cli.to_json(args)))) == args
        setup = script.make_setup(args, None)
        assert (setup.obs_size, nets_of(setup).actor.action_size) == (setup.env.observation_size, setup.env.action_size)


@pytest.mark.parametrize("env", ["point-mass-wall", "maze2d-large-missing-data", "probe-match-obs"])
def test_help_shows_what_is_in_force(script, monkeypatch, capsys, env):
    monkeypatch.setattr(sys, "argv", [f"{name_of(script)}.py", "--env", env, "--help"])
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as exit:
        cli.guarded(script.main)
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" │\n") for line in capsys.readouterr().out.splitlines()]
    entries, flag = {}, ""
    for line in lines:
        flag = line.split()[0].rstrip(",") if line.startswith("--") else flag
        entries[flag] = f"{entries.get(flag, '')} {line}"
    assert exit.value.code == 0
    for name, default in {**fields_of(script), **of_family(script, env)}.items():
        if name not in ("hyper", "sweep"):
            entry = entries["--" + name.replace("_", "-")]
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default) or "''"
            assert f"(default: {shown})" in entry, entry
            assert len(entry) > len(name) + len(shown) + 25, f"{entry}: no word of what it is"


# --- a tiny run ---


class Watched(Compiled):
    """Compiled, counting its traces and its calls by static arguments."""

    def __init__(self, function, *arguments, **settings):
        self.traces, self.calls = 0, Counter()

        def traced(*inputs, **static):
            self.traces += 1
            return function(*inputs, **static)

        super().__init__(traced, *arguments, **settings)

    def __call__(self, *arguments, **static):
        self.calls[tuple(static.items())] += 1
        return super().__call__(*arguments, **static)


def run(script, runs_dir, *flags, whole=True):
    """A finished run: its folder, the Setup, and the programs with which it was made. If not `whole`, it is trained and nothing else."""
    settings = {f"--{name.replace('_', '-')}": str(value).split() for name, value in TINY.items() if name in fields_of(script)}
    flags = [word for flag, values in settings.items() for word in (flag, *values)] + [*flags, "--runs-dir", str(runs_dir), "--name", "it"]
    setups, programs, make_setup = [], [], script.make_setup
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_setup", lambda *inputs: setups.append(make_setup(*inputs)) or setups[-1])
        patch.setattr(script, "Compiled", lambda *a, **k: programs.append(Watched(*a, **k)) or programs[-1])
        if not whole:
            patch.setattr(script, "Evaluator", lambda *_: SimpleNamespace(possible=False))
            patch.setattr(script, "report", SimpleNamespace(conclude=lambda run, *_: run.close()))
        patch.setattr(sys, "argv", ["script", *flags])
        script.main()
    return SimpleNamespace(folder=runs_dir / name_of(script) / "point-mass-wall" / "it", setup=setups[-1], programs=programs)


@pytest.fixture(scope="module")
def together(script, tmp_path_factory):
    """Seeds 0 and 1, at both discounts: runs 0 to 3 are the seeds at the one discount, then at the other."""
    values = ",".join(map(str, DISCOUNTS))
    return run(script, tmp_path_factory.mktemp("together"), "--num-seeds", "2", "--sweep", f"discount={values}")


@pytest.fixture(scope="module")
def alone(script, tmp_path_factory):
    """Seed 1 at the first discount."""
    flags = "--num-seeds", "1", "--seed", "1", "--discount", str(DISCOUNTS[0])
    return run(script, tmp_path_factory.mktemp("alone"), *flags, whole=False)


def phases_of(script):
    return ("offline", "online", *(["retrained"] if "retrain_steps" in fields_of(script) else []))


LABELS = [(seed, f"discount={d}") for d in DISCOUNTS for seed in (0, 1)]


def checkpoint_of(folder):
    """State in the last checkpoint, as nested dictionaries."""
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]


def test_a_run_leaves_its_record(script, together):
    result = check_schema(together.folder, name_of(script), phases_of(script), runs=4)
    assert result["seeds"] == [0, 1, 0, 1] and result["failed"] == {} and result["broken_worlds"] == 0
    assert [s["setting"] for s in result["settings"]] == [f"discount={d}" for d in DISCOUNTS]
    for name in ("success", "return", "length", "q", "map"):
        assert (together.folder / "figures" / f"{name}.png").stat().st_size > 1000
    assert (together.folder / "figures" / "framework.png").exists() == ("retrained" in phases_of(script))
    config = json.loads((together.folder / "config.json").read_text())
    assert config["method"] == name_of(script) and cli.from_json(script.Args, config["settings"]) == together.setup.args
    assert checkpoint_of(together.folder)["key"].shape == (4, 2)


def test_metrics_are_tidy_and_tell_the_mean_q(script, together):
    rows = rows_of(together.folder)
    keys = [tuple(row[k] for k in ("phase", "step", "seed", "setting", "metric")) for row in rows]
    assert len(keys) == len(set(keys)) and all(np.isfinite(float(row["value"])) for row in rows)
    steps = {"offline": [40, 80], "online": [40, 80, 120, 160], "retrained": [40, 80]}
    found = {
        phase: {(int(r["step"]), int(r["seed"]), r["setting"]) for r in rows if (r["phase"], r["metric"]) == (phase, "q")}
        for phase in steps
    }
    assert found == {
        phase: {(step, *label) for step in (steps[phase] if phase in phases_of(script) else []) for label in LABELS} for phase in steps
    }


def test_each_phase_is_one_program_for_all_seeds_settings_and_chunks(script, together):
    chunks = [p for p in together.programs if any(dict(static).get("length") for static in p.calls)]
    assert len(chunks) == len(phases_of(script))
    for program in chunks:
        assert len(program.calls) == len(program.programs) == program.traces == 1
        assert min(program.calls.values()) >= 2
    assert all(program.traces <= 1 for program in together.programs)


def actors_of(state):
    """Parameters of all policies in a checkpoint: those of agents, and those that stand alone."""
    parts = {name: part for name, part in state.items() if isinstance(part, dict)}
    agents = {name: part["actor"] for name, part in parts.items() if "actor" in part}
    return agents | {name: part for name, part in parts.items() if part.keys() == {"params"}}


def test_saved_policies_are_those_of_the_last_checkpoint(script, together):
    obs = np.random.default_rng(0).uniform(0, 1, (20, 2)).astype(np.float32)
    actors, nets, folder = actors_of(checkpoint_of(together.folder)), nets_of(together.setup), together.folder / "policies"
    act = jax.jit(lambda actor: script.act(nets, actor, obs))
    files = {path.name for path in folder.glob("*")}
    saved = {name.partition("_seed")[0] for name in files}
    assert saved and files == {f"{name}_seed{seed}_{setting}.npz" for name in saved for seed, setting in LABELS}
    for name in saved:
        for r, (seed, setting) in enumerate(LABELS):
            ours = policy.act(policy.load(folder / f"{name}_seed{seed}_{setting}.npz"), obs)
            theirs = [act(jax.tree.map(lambda x, r=r: x[r], actor)) for actor in actors.values()]
            matches = [np.abs(ours - action).max() < 1e-5 for action in theirs]
            assert sum(matches) == 1, f"{name}: {dict(zip(actors, matches))}"


def values_of(folder, seed, setting):
    return {
        (r["phase"], int(r["step"]), r["metric"]): float(r["value"])
        for r in rows_of(folder)
        if (int(r["seed"]), r["setting"]) == (seed, setting)
    }


def test_a_seed_and_setting_among_others_is_that_one_alone(script, together, alone):
    ours, theirs = values_of(together.folder, *LABELS[1]), values_of(alone.folder, 1, "")
    assert theirs.keys() == {key for key in ours if not key[2].startswith("eval/")}
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-4, atol=1e-4, err_msg=str(key))
    for other in (LABELS[0], LABELS[3]):  # another seed; another discount
        values = values_of(together.folder, *other)
        assert max(abs(values[key] - theirs[key]) for key in theirs if key[2] == "q") > 1e-3, f"{other} does not differ at all"
