"""The pages of results: what a run's record keeps, when a claim is confirmed, and that all comes from records."""

import dataclasses
import importlib
import itertools
import json
import pathlib
import re
import sys
import types
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

REPRODUCTION = pathlib.Path(__file__).parent / "reproduction"
sys.path.insert(0, str(REPRODUCTION))
import claims  # noqa: E402
import pages  # noqa: E402
import records  # noqa: E402
import shift  # noqa: E402
import tables  # noqa: E402
from comparisons import BUDGETS, COMPARISONS, MADE_BY, runs_of, sources, words_of  # noqa: E402

from ooo_rl.data.learner import Learner, Moments  # noqa: E402
from ooo_rl.data.runs import settings, worlds  # noqa: E402
from ooo_rl.data.runs.plan import cut  # noqa: E402


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        ([3, 4, 5], [0, 1, 2], "confirmed"),
        ([0, 1, 2], [3, 4, 5], "contradicted"),
        ([0, 4, 5], [1, 2, 6], "not confirmed"),
        ([2, 4, 5], [0, 1, 3], "not confirmed"),
        ([3, np.nan, 5], [0, 1, 2], "not confirmed"),
        ([np.nan] * 3, [0, 1, 2], "not confirmed"),
    ],
)
def test_verdicts(better, worse, expected):
    said, chance = pages.verdict(np.array(better, float), np.array(worse, float))
    assert said == expected and (chance.startswith("1.00 [1.00, 1.00]") or expected != "confirmed")


def test_how_often_chance_alone_gives_a_verdict():
    """Of the 20 ways to deal six results out to two policies of three seeds, one in twenty on each side."""
    ways = [(better, set(range(6)) - set(better)) for better in itertools.combinations(range(6), 3)]
    said = [pages.verdict(*(np.array([*seeds], float) for seeds in way))[0] for way in ways]
    assert {each: said.count(each) for each in said} == {
        "confirmed": 1,
        "contradicted": 1,
        "not confirmed": 18,
    }


def test_each_claim_has_its_part_of_the_page():
    parts = {claim.name: claim.section for claim in claims.CLAIMS}
    assert parts["num-envs-iql-8-hopper-medium"] == "num_envs" and parts["gde-iql-hopper-medium"] == "papers"
    assert all((part == "defects") == name.startswith("defect-") for name, part in parts.items())


def test_every_claim_is_about_runs_that_have_a_budget():
    assert len({c.name for c in claims.CLAIMS}) == len(claims.CLAIMS)
    for claim in claims.CLAIMS:
        assert (claim.comparison, claim.task) in BUDGETS and claim.measure in records.MEASURES
        for run, phase in (claim.better, claim.worse):
            assert run in runs_of(claim.comparison, claim.task), claim.name
            assert phase in COMPARISONS[claim.comparison][run].rows, f"{claim.name}: {run} has no {phase}"


def test_recorded_commands_are_those_of_the_comparisons():
    """Else a page names numbers that its command would no longer give, and a finished run is never run again."""
    for comparison, task in BUDGETS:
        for run in COMPARISONS[comparison]:
            record, maker = records.read(comparison, task, run), MADE_BY.get((comparison, task, run))
            if record and maker:
                assert record["command"] == f"python {maker}"
            elif record:
                args = tables.Args(comparison, task, seeds=len(record["seeds"]))
                script, *words = tables.command(args, run)
                words = records._what(words, tables.folder_of(args, run))
                command = ["python", f"algos/{pathlib.Path(script).name}", *words]
                assert record["command"].split() == command, (comparison, task, run)


def test_words_in_capitals_stand_for_others():
    words = words_of("ooo", "point-mass-wall", "sac_ft", lambda run: f"runs/{run}")
    assert words[:2] == ["--num-envs", "48"] and words[-1] == "0"
    assert " ".join(words[-6:]) == "--init-from runs/cql --offline-steps 0 --random-steps 0"
    # only these tasks have budgets for some of the runs alone
    lacks = {task for c, task in BUDGETS if len(runs_of(c, task)) < len(COMPARISONS[c])}
    assert lacks == {"kitchen-complete", "kitchen-mixed", "halfcheetah-sparse"}
    assert runs_of("ooo", "halfcheetah-sparse") == ["rlpd", "ooo_rlpd"]


@pytest.mark.parametrize(
    ("comparison", "task"), [key for key in BUDGETS if not key[1].startswith("walker2d")]
)
def test_each_run_is_a_command_that_its_script_takes(comparison, task):
    args = tables.Args(comparison, task)
    for run in runs_of(comparison, task):
        script, *words = tables.command(args, run)
        method = importlib.import_module(f"ooo_rl.algos.{pathlib.Path(script).stem}")
        found = worlds.chosen(settings.resolved(settings.parse(method.Args, words)), method.make_plan)
        assert found.name == tables.name_of(args, run) and cut(found, method.make_plan(found))
        assert set(sources(comparison, run)) <= COMPARISONS[comparison].keys()


def test_a_run_without_a_budget_is_refused_and_the_default_is_those_with_one(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(tables, "carry_out", lambda args, run: made.append(run))
    words = ["tables.py", "--task", "halfcheetah-sparse", "--out", str(tmp_path), "--runs-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*words, "--methods", "rlpd", "iql"])
    with pytest.raises(SystemExit, match="iql is neither one of rlpd, ooo_rlpd, which have a budget"):
        tables.main()
    monkeypatch.setattr(sys, "argv", [*words, "--methods", "awac"])  # no run of OOO's comparison
    tables.main()
    assert made == ["awac"]
    monkeypatch.setattr(sys, "argv", words)
    tables.main()
    assert made == ["awac", "rlpd", "ooo_rlpd"]


def test_a_run_is_carried_out_after_those_that_it_starts_from(tmp_path, monkeypatch):
    made = []

    def instead(words, **_):
        name = words[words.index("--name") + 1]
        folder = next(tables.folder_of(args, run) for run in COMPARISONS["gde"] if name.endswith(f"-{run}"))
        folder.mkdir(parents=True)
        (folder / "result.json").write_text("{}")
        made.append(name)
        return SimpleNamespace(returncode=0)

    args = tables.Args("gde", "hopper-medium", runs_dir=tmp_path, out=tmp_path / "out")
    monkeypatch.setattr(tables.subprocess, "run", instead)
    tables.carry_out(args, "re_iql")
    tables.carry_out(args, "pex")
    assert made == [f"gde-hopper-medium-{run}" for run in ("pre", "re_iql", "pex")]


CHANGED = [(c, run) for c, runs in COMPARISONS.items() for run, found in runs.items() if found.changes]


@pytest.mark.parametrize(("comparison", "name"), CHANGED)
def test_a_change_is_made_in_a_copy_of_the_script(comparison, name, tmp_path, monkeypatch):
    task, run = next(task for c, task in BUDGETS if c == comparison), COMPARISONS[comparison][name]
    args, ran = tables.Args(comparison, task, runs_dir=tmp_path, out=tmp_path / "out"), []
    monkeypatch.setattr(
        tables.subprocess, "run", lambda words, **_: ran.append(words[1]) or SimpleNamespace(returncode=0)
    )
    tables.carry_out(args, name)
    copy, ours = pathlib.Path(ran[-1]), (tables.REPO / f"algos/{run.script}.py").read_text()
    assert copy.name == f"{run.script}.py" and copy.is_relative_to(tmp_path)
    theirs = copy.read_text().splitlines()
    compile("\n".join(theirs), copy.name, "exec")
    lines = [pair for pair in zip(ours.splitlines(), theirs, strict=True) if pair[0] != pair[1]]
    assert len(lines) == len(run.changes)
    assert all(a in line and b in new for (a, b), (line, new) in zip(run.changes, lines))
    assert all(said in tables.shown(args, name) for said in tables.said(run))
    with pytest.raises(ValueError, match="0 times"):
        tables.changed(dataclasses.replace(run, changes=(("no such line", ""),)))


def test_the_deviation_of_an_rnd_normalised_twice_is_a_square_root(monkeypatch):
    script = types.ModuleType("changed")
    monkeypatch.setitem(sys.modules, "changed", script)  # where its dataclasses look for their types
    exec(tables.changed(COMPARISONS["ooo"]["rnd_twice"]), script.__dict__)
    script.novelty = lambda static, rnd, batch: batch.reward  # in place of the errors
    script.rnd_errors = lambda static, predictor, rnd, batch: jnp.zeros(1)
    static = SimpleNamespace(args=SimpleNamespace(intrinsic="rnd"))
    rnd = script.RND(Learner.create({}), {}, Moments.fresh(), Moments.fresh())
    for errors in np.random.default_rng(0).normal(0, 16, (400, 64)):
        batch = SimpleNamespace(obs=jnp.zeros(64), reward=jnp.float32(errors))
        rnd = script.learn_rnd(static, rnd, batch, 0.0)
    assert float(jnp.sqrt(rnd.error.var)) == pytest.approx(4, rel=0.05)


def finished(folder: pathlib.Path, command: str, values: list, curve: dict[int, list]) -> pathlib.Path:
    """A run's folder, with what `values` its seeds reached, and their returns at each step of `curve`."""
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({
        "dataset": "ooo/x-v0", "seeds": list(range(len(values))), "failed": {},
        "phases": {"online": {"return": values, "success": values}}, "wall_seconds": 7,
    }))  # fmt: skip
    card = {"id": "ooo/x-v0", "transitions": 1234, "sha256": "ab", "source": f"{folder}/x.hdf5"}
    (folder / "dataset.json").write_text(json.dumps(card))
    (folder / "config.json").write_text(json.dumps({
        "method": "iql", "command": command, "versions": {}, "devices": ["cpu:0"], "git_commit": "abc",
    }))  # fmt: skip
    rows = [
        f"online,{step},{seed},,eval/{measure},{value}"
        for step, found in curve.items()
        for seed, value in enumerate(found)
        for measure in ("return", "success")
    ]
    text = "\n".join(["phase,step,seed,setting,metric,value", *rows, "online,5,0,,critic_loss,3", ""])
    (folder / "metrics.csv").write_text(text)
    return folder


def test_a_record_keeps_what_a_reader_needs_and_no_place_of_this_machine(tmp_path, monkeypatch):
    claim = claims.CLAIMS[0]
    command = (
        f"{tmp_path}/algos/iql.py --env x --init-from {tmp_path}/cql/y --runs-dir {tmp_path} --name table-iql"
    )
    folder = finished(
        tmp_path / "iql" / "point-mass-wall" / "table-iql", command, [1.0, None], {5: [1, "nan"]}
    )
    monkeypatch.setattr(records, "FOLDER", tmp_path / "results")
    records.keep(claim.comparison, claim.task, "iql", folder)
    text = records.path_of(claim.comparison, claim.task, "iql").read_text()
    record = json.loads(text)
    assert (
        record["command"] == "python algos/iql.py --env x --init-from runs/cql/y --name table-iql"
        and str(tmp_path) not in text
    )
    assert record["curves"]["online"]["return"] == {"5": [1.0, None]} and "NaN" not in text
    assert record["dataset"] == {"id": "ooo/x-v0", "transitions": 1234, "sha256": "ab"}
    np.testing.assert_array_equal(pages.scores(claim, ("iql", "online")), [1.0, np.nan])
    assert pages.scores(claim, ("ooo_iql", "retrained")) is None
    row = next(r for r in pages.claims_page(claims.CLAIMS).splitlines() if f"| {claim.says} |" in r)
    assert claim.task in row.split(" | ")[-1], "without the other run's record the claim is not tested"
    assert pages.regret(record) == "-"  # a single evaluation has no area


def test_the_record_of_a_run_that_was_cut_off_says_where(tmp_path, monkeypatch):
    """The last evaluation of all seeds counts, and not one that was being written."""
    monkeypatch.setattr(records, "FOLDER", tmp_path / "results")
    curve = {10: [0, 1], 20: [2, 3], 30: [4]}
    folder = finished(tmp_path / "a" / "b" / "c", "algos/iql.py --env x", [], curve)
    (folder / "result.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["settings"] = {"seed": 5, "num_seeds": 2, "online_steps": 4000}
    (folder / "config.json").write_text(json.dumps(config))
    key = "ooo", "point-mass-wall", "iql"
    records.keep(*key, folder)
    record = records.read(*key)
    assert record["phases"]["online"]["return"] == [2, 3] and record["seeds"] == [5, 6]
    assert record["stopped"] == {"phase": "online", "step": 20, "planned": 4000}
    assert "| 2.50 [2.00, 3.00] at step 20 of 4,000 |" in pages.runs_page()


def test_a_claim_stands_in_the_columns_of_its_verdicts(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FOLDER", tmp_path / "results")
    found = [c for c in claims.CLAIMS if c.says == "GDE ends above JSRL"]
    for name, gde in {"halfcheetah-medium": [7, 8, 9], "point-mass-wall": [0, 1, 2]}.items():
        for run, values in {"gde": gde, "jsrl": [3, 4, 5]}.items():
            records.keep("gde", name, run, finished(tmp_path / name / "x" / run, "algos/x.py", values, {}))
    found = [dataclasses.replace(c, measure="return") for c in found]
    row = (
        "halfcheetah-medium (8.00, 4.00) |  | point-mass-wall (1.00, 4.00) | hopper-medium; walker2d-medium |"
    )
    assert pages.short_table(found).endswith(f"| GDE, Table 2 | GDE ends above JSRL | {row}")
    assert pages.counts(found).endswith("| GDE | 1 | 0 | 1 | 2 |")
    rows = [line.split(" | ")[2:] for line in pages.details_page(found).splitlines() if "JSRL" in line]
    assert [(r[0], r[-1]) for r in rows] == [
        ("halfcheetah-medium, return", "confirmed |"), ("point-mass-wall, return", "contradicted |")
    ]  # fmt: skip


def test_the_page_of_runs_has_scores_regret_and_commands(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FOLDER", tmp_path / "results")
    key, curve = ("ooo", "point-mass-wall", "iql"), {10: [0, 1], 30: [1, 1]}
    records.keep(*key, finished(tmp_path / "a" / "b" / "c", "algos/iql.py --env x", [0.5, 1.0], curve))
    assert pages.regret(records.read(*key)) == "0.25 [0.00, 0.50]"
    text = pages.runs_page()
    assert "## OOO: point-mass-wall" in text and "    python algos/iql.py --env x\n" in text
    assert "`ooo/x-v0`, 1,234 rows" in text
    assert (
        "| [IQL](ooo-point-mass-wall-iql.json) | 2 | - | 0.75 [0.50, 1.00] | - | 0.25 [0.00, 0.50] | cpu:0 |"
        in text
    )


def test_a_record_keeps_the_share_of_offline_rows_for_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FOLDER", tmp_path / "results")
    folder = finished(tmp_path / "a" / "b" / "c", "algos/off2onrl.py", [1.0, 2.0], {10: [1, 2]})
    with (folder / "metrics.csv").open("a") as file:
        file.write("online,5,0,,offline_share,0.75\nonline,5,1,,offline_share,0.5\n")
    records.keep("off2onrl", "hopper-random", "off2onrl", folder)
    record = records.read("off2onrl", "hopper-random", "off2onrl")
    assert record["logged"] == {"online": {"offline_share": {"5": [0.75, 0.5]}}}
    assert list(record["curves"]["online"]) == ["return", "success"]
    drawn = [(row["phase"], row["setting"], row["step"], row["seed"], row["value"]) for row in pages.shares()]
    assert drawn == [("hopper", "random", "5", 0, 0.75), ("hopper", "random", "5", 1, 0.5)]


def test_runs_that_learnt_from_other_copies_of_a_dataset_are_told_apart():
    def record(**card):
        return {"dataset": {"id": "ooo/x-v0", "transitions": 1234, **card}}

    same = {"iql": record(sha256="ab"), "sac": {"dataset": {}}, "pex": record()}
    assert pages.data_of(same) == "`ooo/x-v0`, 1,234 rows"
    copies = "copies, by their sha256: ab: iql; not recorded: pex; cd: awac, bcq"
    differing = same | {"awac": record(sha256="cd"), "bcq": record(sha256="cd")}
    assert pages.data_of(differing) == f"`ooo/x-v0`, 1,234 rows ({copies})"


def test_likelihoods_under_a_vae_are_those_of_the_density_it_learnt():
    """Of standard normal rows, whose mean log-likelihood is known; those of rows elsewhere are far below."""
    rng = np.random.default_rng(0)
    learnt, held, other = (rng.normal(size=(2000, 3)).astype(np.float32) for _ in range(3))
    args = shift.Args((), (), steps=1500, hidden=16, samples=50)
    found = shift.likelihoods(args, learnt, {"held": held, "other": other + 4})
    exact = -0.5 * (3 * np.log(2 * np.pi) + (held**2).sum(axis=1))
    np.testing.assert_allclose(found["held"].mean(), exact.mean(), atol=0.15)
    assert np.corrcoef(found["held"], exact)[0, 1] > 0.9 and found["other"].mean() < exact.mean() - 10
    assert shift.above(np.array([1.0, 3.0]), np.array([0.0, 2.0, 3.0])) == 3 / 6


def test_a_run_that_failed_leaves_gaps_and_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FOLDER", tmp_path / "results")
    claim = next(c for c in claims.CLAIMS if c.measure == "q_bias")
    key, curve = (claim.comparison, claim.task, "cql"), {10: [0, "nan"], 30: [1, "nan"]}
    records.keep(*key, finished(tmp_path / "a" / "b" / "c", "algos/cql.py", [1.0, None], curve))
    record = records.read(*key) | {"failed": {"1": "diverged"}}
    assert "| 1 of 2 | - | 1.00 | - | 0.50 |" in pages.row(*key, record)
    assert pages.scores(claim, ("cql", "online")) is None  # the run did not measure the bias of Q


def test_records_of_sources_are_kept_once_and_failures_are_told(tmp_path, monkeypatch):
    """`re_iql` starts from `pre`, which has a record; `on_iql` leaves no result."""
    tried, command = [], "algos/iql.py --env hopper"

    def carry_out(where, run):
        tried.append(run)
        for made in (*sources("gde", run), run):
            if made != "on_iql" and not (folder := tables.folder_of(where, made)).exists():
                finished(folder, command, [1.0, 2.0, 3.0], {5: [1, 2, 3]})

    monkeypatch.setattr(records, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(pages, "write", lambda _: [])
    monkeypatch.setattr(claims.tables, "carry_out", carry_out)
    monkeypatch.setattr(
        sys, "argv", ["claims.py", "--only", "gde-on-iql", "gde-re-iql", "--runs-dir", str(tmp_path / "runs")]
    )
    old = records.path_of("gde", "hopper-medium", "pre")
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    with pytest.raises(SystemExit, match=r"no result from .*gde-hopper-medium-on_iql"):
        claims.main()
    assert old.read_text() == "{}" and sorted(tried) == ["on_iql"] * 4 + ["re_iql"] * 4
    assert records.read("gde", "hopper-medium", "re_iql")["phases"]["online"]["return"] == [1, 2, 3]
    assert records.read("gde", "halfcheetah-medium", "pre") and not records.read(
        "gde", claims.CHEETAH, "on_iql"
    )


def test_what_takes_days_is_made_only_by_name(monkeypatch):
    tried = set()
    monkeypatch.setattr(pages, "write", lambda _: [])
    monkeypatch.setattr(claims.tables, "carry_out", lambda where, run: tried.add(where.task))
    monkeypatch.setattr(sys, "argv", ["claims.py"])
    with pytest.raises(SystemExit, match="no result"):
        claims.main()
    assert "hopper-medium" in tried and not any(task.endswith("-full") for task in tried)
    named = [
        w for line in claims.__doc__.splitlines() if "--only " in line for w in [line.split("--only ")[1]]
    ]
    assert all(any(c.name.startswith(name) for c in claims.CLAIMS) for name in named) and named


def test_no_two_runs_of_a_task_came_out_alike():
    """A defect put back where nothing uses it leaves the numbers of the run without it. Policies that never
    earn anything are alike.
    """
    for comparison, task in BUDGETS:
        found: dict[str, str] = {}
        for run in COMPARISONS[comparison]:
            record = records.read(comparison, task, run)
            returns = record and json.dumps([curve["return"] for curve in record["curves"].values()])
            if returns and len(set(re.findall(r"-?[\d.]+(?=[,\]])", returns))) > 1:
                assert returns not in found, (task, run, found[returns])
                found[returns] = run


def test_the_pages_are_those_of_the_records():
    for path, text in pages.texts(claims.CLAIMS).items():
        assert path.read_text() == text, f"{path.name}: run tests/reproduction/claims.py --only-page"
    assert pages.FIGURE.exists() and pages.panels()
