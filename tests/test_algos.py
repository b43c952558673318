"""One contract for every file of algos/: its parts and settings, what a tiny run leaves behind, and that a
run is its seeds and settings.

Files are found by themselves. Each compiles once, for a run whose parts all tests here look at: two seeds at
two discounts, on the five probes, whose values and best actions are known by hand. The data lack one of the
probes, which can be learnt online alone. Two short runs of the same programs follow it.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
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
from probing import check, random_rows
from test_run import check_schema, rows_of
from training import trained

from ooo_rl import envs
from ooo_rl.data import policy
from ooo_rl.data.errors import UsageError
from ooo_rl.data.recipes import library
from ooo_rl.data.runs import session, settings
from ooo_rl.data.runs.bounds import bounds_of
from ooo_rl.data.runs.program import Compiled

REPO = pathlib.Path(__file__).parents[1]
NAMES = sorted(p.stem for p in (REPO / "algos").glob("*.py") if p.stem != "__init__")
DISCOUNTS = (0.8, 0.9)
UNSEEN = ("reward is obs",)  # the probe that the data lack
STEPS, CHUNK = 1_600, 80  # of each phase
OPTIMISED = {"xla_backend_optimization_level": 1}  # so many steps are worth it (conftest.py)
PROBES = {"continuous": "probe-all", "discrete": "probe-all-discrete"}  # by the kind of a method's actions
TASK = {"batch_size": 64, "eval_episodes": 2, "name": "it"}
TASK |= {"num_seeds": 2, "sweep": ("discount=" + ",".join(map(str, DISCOUNTS)),), "eval_every": CHUNK}


@pytest.fixture(scope="module", params=NAMES)
def script(request):
    return importlib.import_module(f"ooo_rl.algos.{request.param}")


def name_of(script):
    return script.__name__.split(".")[-1]


def fields_of(script):
    """Field -> default, the traced ones included."""
    return {f.name: f.default for kind in (script.Args, script.Hyper) for f in dataclasses.fields(kind)}


def kinds_of(script):
    return {**get_type_hints(script.Args), **get_type_hints(script.Hyper)}


def families_of(script):
    """Prefix -> settings; a prefix that stands in two keys has those of both."""
    families = {}
    for key, found in script.FAMILIES.items():
        for prefix in (key,) if isinstance(key, str) else key:
            families[prefix] = families.get(prefix, {}) | found
    return families


# --- parts and settings ---


def test_it_has_the_parts_that_a_reader_looks_for(script):
    for part in ("Args", "Hyper", "State"):
        assert inspect.isclass(getattr(script, part)), part
    for part in ("make_plan", "make_nets", "init_state", "update", "act", "export", "train"):
        assert inspect.isfunction(getattr(script, part)), part
    assert issubclass(script.Args, settings.Experiment) and issubclass(script.Hyper, settings.Traced)
    assert script.Args.__dataclass_params__.frozen
    assert not {f.name for f in dataclasses.fields(script.Args)} & {
        f.name for f in dataclasses.fields(script.Hyper)
    }
    assert all(isinstance(f.default, float) for f in dataclasses.fields(script.Hyper)), (
        "what is traced is a float"
    )
    assert f"python algos/{name_of(script)}.py" in script.__doc__, "a command to run"
    assert inspect.getsource(script).endswith('\n\nif __name__ == "__main__":\n    launch(Args, train)\n')


@pytest.mark.parametrize("part", ["Args", "Hyper"])
def test_every_setting_is_explained_and_bounded(script, part):
    (body,) = (
        node.body
        for node in ast.parse(inspect.getsource(script)).body
        if isinstance(node, ast.ClassDef) and node.name == part
    )
    for i, node in enumerate(body):
        if isinstance(node, ast.AnnAssign):
            following = body[i + 1] if i + 1 < len(body) else None
            said = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            assert said and following.value.value.strip(), (
                f"{node.target.id} has no line that says what it is"
            )
    kind = getattr(script, part)
    numbers = {f.name for f in dataclasses.fields(kind) if _is_number(f.default)}
    assert numbers <= bounds_of(kind).keys(), "numbers without bounds beside them"


def test_settings_that_change_online_reach_it(script):
    """The step of a chunk that acts asks for its settings once, and uses no others."""
    functions = [
        node for node in ast.parse(inspect.getsource(script)).body if isinstance(node, ast.FunctionDef)
    ]
    acting = [node for node in functions if "added + args.num_envs" in ast.unparse(node)]
    assert acting or not any(phase.acts for phase in script.make_plan(script.Args()))
    for node in acting:
        inner = [part for part in node.body if isinstance(part, ast.FunctionDef)]
        names = [
            part
            for function in inner
            for part in ast.walk(function)
            if isinstance(part, ast.Name | ast.Attribute)
        ]
        asked = [ast.unparse(name) for name in names]
        once = asked.count("hyper") == asked.count("online_hyper") == 1
        assert once, f"{node.name}: its step begins with now = online_hyper(args, hyper, added), and asks now"
        assert "args.offline_ratio" not in asked, f"{node.name}: write online_ratio(args, added)"


def _is_number(value):
    parts = value if isinstance(value, tuple) and value else (value,)
    return all(isinstance(part, int | float) and not isinstance(part, bool) for part in parts)


def fits(value, kind):
    """Whether `value` may stand where the annotation is `kind`."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(v, get_args(kind)[0]) for v in value)
    return type(value) is kind or (kind is float and type(value) is int)


def test_settings_of_families_are_settings_of_the_script(script):
    kinds, families = kinds_of(script), families_of(script)
    assert {settings.DEFAULT_ENVS[script.Args.actions], "probe"} <= families.keys()
    for family, found in families.items():
        assert any(name.startswith(family) for name in envs.names()), f"{family} is a prefix of nothing"
        for name, value in found.items():
            assert name in kinds, f"{family}: there is no setting {name}"
            assert name not in ("env", "hyper", "resume", "name"), (
                f"{family}: {name} is no matter of a family"
            )
            assert fits(value, kinds[name]), f"{family}: {name} is {kinds[name]}, not {value!r}"


def of_family(script, env):
    """What FAMILIES say of an environment, the longer prefix last."""
    found, families = {}, families_of(script)
    for family in sorted(families, key=len):
        if env == family or (env.startswith(family) and not env[len(family)].isalnum()):
            found |= families[family]
    return found


def parse(script, *flags):
    return settings.parse(script.Args, list(flags))


MAKE = functools.cache(envs.make)  # each environment once for all scripts


def test_every_environment_has_settings_that_can_run(script, monkeypatch):
    monkeypatch.setattr(Compiled, "program", lambda *_, **__: pytest.fail("compiled something"))
    monkeypatch.setattr(envs, "make", MAKE)
    for env in envs.names():
        made, own = MAKE(env), library.only_one_for(env)
        if envs.is_discrete(made) != (script.Args.actions == "discrete"):
            with pytest.raises(UsageError, match=f"this method needs {script.Args.actions} ones"):
                parse(script, "--env", env, "--dataset", "mine.hdf5")
            continue
        if own == "none" and of_family(script, env).get("offline_steps", script.Args.offline_steps) != 0:
            with pytest.raises(UsageError, match=f"needs --dataset; {env} has none of its own"):
                parse(script, "--env", env)
            args = parse(script, "--env", env, "--dataset", "mine.hdf5")
        else:
            args = parse(script, "--env", env)
        found = {**vars(args), **vars(args.hyper)}
        expected = {"env": env, **of_family(script, env)}
        assert {name: found[name] for name in expected} == expected, env
        assert settings.from_json(script.Args, json.loads(json.dumps(settings.to_json(args)))) == args
        nets = script.make_nets(SimpleNamespace(args=args, env=made, action_size=made.action_size))
        assert actor_of(nets).action_size == made.action_size


def actor_of(nets):
    """The policy's module; where agents differ, the first one's."""
    return (
        nets.actor if hasattr(nets, "actor") else next(part for part in nets if hasattr(part, "actor")).actor
    )


@pytest.mark.parametrize("env", ["point-mass-wall", "maze2d-large-missing-data", "probe-match-obs"])
def test_help_shows_what_is_in_force(script, monkeypatch, capsys, env):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as exit:
        parse(script, "--env", env, "--help")
    text = capsys.readouterr().out
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" │\n") for line in text.splitlines()]
    entries, flag = {}, ""
    for line in lines:
        flag = line.split()[0].rstrip(",") if line.startswith("--") else flag
        entries[flag] = f"{entries.get(flag, '')} {line}"
    assert exit.value.code == 0
    for name, default in {**fields_of(script), **of_family(script, env)}.items():
        if name not in ("hyper", "sweep", "online_change"):
            entry = entries["--" + name.replace("_", "-")]
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default) or "''"
            assert f"(default: {shown})" in entry, entry
            assert len(entry) > len(name) + len(shown) + 25, f"{entry}: no word of what it is"


# --- a run ---


def settings_of(script, steps, **changes):
    """The settings of a run whose phases all have `steps` steps."""
    names = [
        name for name in ("offline_steps", "online_steps", "retrain_steps") if hasattr(script.Args, name)
    ]
    args = (
        TASK
        | {"env": PROBES[script.Args.actions]}
        | dict.fromkeys(names, steps)
        | {"checkpoint_every": STEPS}
        | changes
    )
    if not any(phase.name == "offline" for phase in script.make_plan(script.Args(**args))):
        args["offline_steps"] = 0  # it has no such phase
    return args


@pytest.fixture(scope="module")
def rows_of_kinds(tmp_path_factory):
    """The kind of actions -> a file of rows, made when it is asked for."""
    folder = tmp_path_factory.mktemp("rows")
    return functools.cache(lambda kind: random_rows(folder / f"{kind}.npz", PROBES[kind], without=UNSEEN))


@pytest.fixture(scope="module")
def rows(script, rows_of_kinds):
    return rows_of_kinds(script.Args.actions)


@pytest.fixture(scope="module")
def together(script, rows, tmp_path_factory):
    """Seeds 0 and 1, at both discounts: runs 0 to 3 are the seeds at the one discount, then at the other."""
    place = tmp_path_factory.mktemp("together")
    args = settings_of(script, STEPS, dataset=rows, runs_dir=str(place))
    return trained(script, **args, options=OPTIMISED)


def short_run(script, place, rows, seed, like=None):
    """One chunk of each phase, four of the online one, from `seed` on; its ring is that of the long run."""
    steps = {"online_steps": 4 * CHUNK, "buffer_size": STEPS, "checkpoint_every": 2 * CHUNK, "seed": seed}
    args = settings_of(script, CHUNK, **steps, dataset=rows, runs_dir=str(place))
    return trained(script, whole=False, like=like, **args).result.folder


@pytest.fixture(scope="module")
def short(script, rows, together, tmp_path_factory):
    """Folders of two short runs: of the seeds 0 and 1, and of the seeds 1 and 2."""
    return [short_run(script, tmp_path_factory.mktemp(f"from{k}"), rows, k, together) for k in (0, 1)]


def phases_of(script):
    """The phases of the run, in their order."""
    plan = script.make_plan(script.Args(**settings_of(script, STEPS)))
    return tuple(dict.fromkeys(phase.name for phase in plan if phase.end > phase.start))


SETTINGS = [f"discount={d}" for d in DISCOUNTS]
LABELS = [(seed, setting) for setting in SETTINGS for seed in (0, 1)]


def checkpoint_of(folder):
    """State in the last checkpoint, as nested dictionaries."""
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        what = ocp.args.Composite(state=ocp.args.StandardRestore())
        return manager.restore(manager.latest_step(), args=what)["state"]


def test_a_run_leaves_its_record(script, together):
    result = check_schema(
        together.result.folder, name_of(script), phases_of(script), 4, PROBES[script.Args.actions]
    )
    assert result["seeds"] == [0, 1, 0, 1] and result["failed"] == {} and result["broken_worlds"] == 0
    assert [s["setting"] for s in result["settings"]] == SETTINGS
    learns_q = any(row["metric"] == "q" for row in rows_of(together.result.folder))
    for name in ("success", "return", "length", *["q"] * learns_q):
        assert (together.result.folder / "figures" / f"{name}.png").stat().st_size > 1000
    config = json.loads((together.result.folder / "config.json").read_text())
    args = settings.from_json(script.Args, config["settings"])
    assert config["method"] == name_of(script) and args.name == "it" and config["format"] == settings.FORMAT
    assert checkpoint_of(together.result.folder)["key"].shape == (4, 2)


def test_it_solves_the_probes(script, together):
    """What the data show after the offline phase, and all of them after each later one."""
    assert together.ended.keys() == set(phases_of(script))
    for phase, (agents, actors) in together.ended.items():
        unseen, discounts = UNSEEN if phase == "offline" else (), np.repeat(DISCOUNTS, 2)
        own = getattr(script, "ensemble_q", None)
        check(together.nets, agents, actors, together.act, discounts, phase, unseen, own)


def test_train_returns_folder_results_and_agents(script, together):
    assert together.result.results == json.loads((together.result.folder / "result.json").read_text())
    saved = checkpoint_of(together.result.folder)
    assert together.result.agents
    for name, agent in together.result.agents.items():
        for ours, theirs in zip(
            jax.tree.leaves(agent.actor.params), jax.tree.leaves(saved[name]["actor"]["params"])
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_metrics_are_tidy_and_there_after_each_chunk(script, together):
    rows = rows_of(together.result.folder)
    keys = [tuple(row[k] for k in ("phase", "step", "seed", "setting", "metric")) for row in rows]
    assert len(keys) == len(set(keys)) and all(np.isfinite(float(row["value"])) for row in rows)
    learning = Counter(
        (r["phase"], int(r["step"]), int(r["seed"]), r["setting"]) for r in rows if "eval/" not in r["metric"]
    )
    steps = range(CHUNK, STEPS + 1, CHUNK)
    assert learning.keys() == set(itertools.product(phases_of(script), steps, (0, 1), SETTINGS))
    config = json.loads((together.result.folder / "config.json").read_text())
    plan = script.make_plan(settings.from_json(script.Args, config["settings"]))
    for phase in phases_of(script):
        idle = max(part.idle for part in plan if part.name == phase)
        for learns in (False, True):  # all of what there is to log, or none
            chunks = {
                n for (name, step, *_), n in learning.items() if name == phase and (step > idle) == learns
            }
            assert len(chunks) == (learns or idle > 0), phase


def test_each_phase_is_one_program_for_all_seeds_settings_and_chunks(script, together):
    chunks = [p for p in together.programs if any(dict(static).get("length") for static in p.calls)]
    assert len(chunks) == len(phases_of(script))
    for program in chunks:
        kinds = {dict(static).get("learns", True) for static in program.calls}  # its own program for each
        assert len(program.calls) == len(program.programs) == program.traces == len(kinds)
        assert sum(program.calls.values()) == STEPS // CHUNK
    for program in together.programs:  # the first also makes a new exploiter alone, for each retraining
        assert program in chunks or program.traces <= max(1, len(program.calls))


def actors_of(script, state):
    """Parameters of all policies in a checkpoint: those of agents, and those that stand alone or learn alone."""
    if hasattr(script, "acting"):  # a policy that is made of several parts of the agent
        learners = {k: SimpleNamespace(**v) if "opt" in v else v for k, v in state["agent"].items()}
        hyper = script.Args(**settings_of(script, STEPS)).hyper
        hyper = jax.tree.map(lambda x: np.full(len(LABELS), x, np.float32), hyper)
        return {"policy": script.acting(SimpleNamespace(**learners), hyper)}
    parts = {name: part for name, part in state.items() if isinstance(part, dict)}
    agents = {name: part["actor"]["params"] for name, part in parts.items() if "actor" in part}
    learners = {name: part["params"] for name, part in parts.items() if part.keys() == {"params", "opt"}}
    alone = {name: part for name, part in parts.items() if part.keys() - {"statistics"} == {"params"}}
    alone.pop("tried", None)  # it may have become the teacher
    return agents | learners | alone


ALIASES = {"policy": ("agent", "explorer"), "new": ("agent",)}  # a policy's file -> its part of a state


def test_saved_policies_are_those_of_the_last_checkpoint(script, together):
    obs = np.random.default_rng(0).uniform(0, 1, (20, 6)).astype(np.float32)
    actors, folder = (
        actors_of(script, checkpoint_of(together.result.folder)),
        together.result.folder / "policies",
    )
    nets = (
        together.nets
        if hasattr(together.nets, "actor")
        else next(n for n in together.nets if hasattr(n, "actor"))
    )
    act = jax.jit(lambda actor: script.act(nets, actor, obs))
    files = {path.name for path in folder.glob("*")}
    saved = {name.partition("_seed")[0] for name in files}
    assert saved and files == {
        f"{name}_seed{seed}_{setting}.npz" for name in saved for seed, setting in LABELS
    }
    for name in saved:
        for r, (seed, setting) in enumerate(LABELS):
            loaded = policy.load(folder / f"{name}_seed{seed}_{setting}.npz")
            ours = policy.act(loaded, obs)
            own = {part: jax.tree.map(lambda x, r=r: x[r], actor) for part, actor in actors.items()}
            theirs = {part: act(actor) for part, actor in own.items()}
            if "jax_mean" in loaded:  # a policy that is composed of several: each action is one of theirs
                nearest = np.min([np.abs(ours - action).max(axis=1) for action in theirs.values()], axis=0)
                assert nearest.max() < 1e-5, name
                continue
            part = next(part for part in (name, *ALIASES.get(name, ())) if part in own)
            assert np.abs(ours - theirs.pop(part)).max() < 1e-5, f"{name} is not {part}"
            alike = [other for other, action in theirs.items() if np.abs(ours - action).max() < 1e-5]
            assert not alike or policy.is_discrete(loaded), f"{name} is also {alike}"  # choices may be alike
            if loaded.keys() & {"log_std", "wS"}:  # it has noise
                key = jax.random.PRNGKey(r)
                noise = np.asarray(jax.random.normal(key, ours.shape))
                noisy = np.clip(script.act(nets, own[part], obs, key), -1, 1)
                assert np.abs(policy.forward(loaded, obs, noise, np) - noisy).max() < 1e-5, name


def values_of(folder, seed, setting):
    return {
        (r["phase"], int(r["step"]), r["metric"]): float(r["value"])
        for r in rows_of(folder)
        if (int(r["seed"]), r["setting"]) == (seed, setting)
    }


def test_a_run_is_its_seed_and_setting_whatever_runs_beside_it(short):
    """Seed 1 beside seed 0 is that beside seed 2; the others differ, ten times as much as rounding does."""
    ours, theirs = ({label: values_of(folder, *label) for label in LABELS[1::2]} for folder in short)
    assert ours[LABELS[1]].keys() == theirs[LABELS[1]].keys()
    rounding = max(apart(ours[label], theirs[label]) for label in ours)
    assert rounding < 1e-4
    learns_q = any(metric == "q" for *_, metric in ours[LABELS[1]])
    for other in (LABELS[0], *[LABELS[3]] * learns_q):  # another seed; another discount
        assert apart(values_of(short[0], *other), ours[LABELS[1]]) > max(10 * rounding, 1e-5), other


def apart(values, others):
    """The largest difference of two runs' metrics, relative where they are beyond 1."""
    return max(abs(values[key] - other) / max(1, abs(other)) for key, other in others.items())


def test_a_run_that_stops_goes_on_to_the_same_bits(script, rows, together, short, tmp_path):
    """It stops in the midst of its online phase and of episodes, after a checkpoint there."""
    after = session.Session.after

    def stop(self, chunk, *arguments):
        middle = [c for c in self.plan if c.acts] or self.plan
        if chunk == middle[-1]:
            raise KeyboardInterrupt
        after(self, chunk, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(session.Session, "after", stop)
        short_run(script, tmp_path, rows, 0, together)
    folder = tmp_path / short[0].relative_to(short[0].parents[2])
    stopped = len((folder / "metrics.csv").read_bytes())
    trained(script, whole=False, like=together, resume=str(folder))
    assert (folder / "metrics.csv").read_bytes() == (short[0] / "metrics.csv").read_bytes()
    assert stopped < (folder / "metrics.csv").stat().st_size


def test_learning_is_what_it_was(script, short):
    """Metrics of the short run as they were recorded: a change of a loss, of the keys' use or of JAX shows
    here.

    `python tests/test_algos.py METHOD` records them anew, for a change that is wanted.
    """
    with np.load(GOLDEN, allow_pickle=False) as golden:
        keys, values = golden[f"{name_of(script)}/keys"], golden[f"{name_of(script)}/values"]
    ours = golden_rows(short[0])
    assert list(ours) == [str(key) for key in keys]
    kinds, largest = [(key.split()[0], key.split()[-1]) for key in ours], {}
    for kind, value in zip(kinds, np.abs(values)):
        largest[kind] = max(largest.get(kind, 0), value)
    # A metric that is small in all rows has to have its size, too.
    room = [min(GOLDEN_TOLERANCE, largest[kind] / 2) for kind in kinds]
    apart = np.abs(np.subtract(list(ours.values()), values)) > GOLDEN_TOLERANCE * np.abs(values) + room
    assert not apart.any(), [(key, ours[key], was) for key, was, far in zip(ours, values, apart) if far]


GOLDEN = REPO / "tests" / "golden.npz"
# Other machines round otherwise, and 80 steps let that grow; other versions of JAX also compile otherwise, and
# then a method may collect other rows.
GOLDEN_TOLERANCE = 1e-2 if jax.__version__ == "0.10.2" else 5e-2


def golden_rows(folder):
    """Phase, step, seed, setting and metric -> value, of what learning itself logs."""
    return {
        f"{r['phase']} {r['step']} {r['seed']} {r['setting']} {r['metric']}": float(r["value"])
        for r in rows_of(folder)
        if not r["metric"].startswith("eval/")
    }


def record_golden(names, place):
    """Writes the short runs of the methods `names` into GOLDEN; the others there stay."""
    arrays = {}
    if GOLDEN.exists():
        with np.load(GOLDEN, allow_pickle=False) as golden:
            arrays = {
                key: golden[key] for key in golden.files if key.split("/")[0] in set(NAMES) - set(names)
            }
    for name in names:
        script = importlib.import_module(f"ooo_rl.algos.{name}")
        rows = random_rows(place / "random.npz", PROBES[script.Args.actions], without=UNSEEN)
        found = golden_rows(short_run(script, place, rows, 0))
        arrays |= {f"{name}/keys": np.array(list(found)), f"{name}/values": np.float32(list(found.values()))}
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        record_golden(sys.argv[1:] or NAMES, pathlib.Path(place))
    print(f"wrote {GOLDEN}", file=sys.stderr)
