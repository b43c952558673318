"""The page of claims: what a run's record keeps, when a claim is confirmed, and that the page is its records'."""

import importlib
import json
import pathlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

REPRODUCTION = pathlib.Path(__file__).parent / "reproduction"
sys.path.insert(0, str(REPRODUCTION))
import claims  # noqa: E402
import tables  # noqa: E402
from comparisons import BUDGETS, COMPARISONS, sources, words_of  # noqa: E402

from ooo_rl.data.runs import settings  # noqa: E402


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        ([3, 4, 5], [0, 1, 2], "confirmed"),
        ([0, 1, 2], [3, 4, 5], "contradicted"),
        ([0, 4, 5], [1, 2, 6], "not confirmed"),
        ([3, np.nan, 5], [0, 1, 2], "confirmed"),
        ([np.nan] * 3, [0, 1, 2], "not confirmed"),
    ],
)
def test_verdicts(better, worse, expected):
    said, chance = claims.verdict(np.array(better, float), np.array(worse, float))
    assert said == expected and (chance.startswith("1.00 [1.00, 1.00]") or expected != "confirmed")


def test_every_claim_is_about_runs_that_have_a_budget():
    assert len({c.name for c in claims.CLAIMS}) == len(claims.CLAIMS)
    for claim in claims.CLAIMS:
        assert (claim.comparison, claim.task) in BUDGETS and claim.measure in claims.MEASURES
        for run, phase in (claim.better, claim.worse):
            assert phase in COMPARISONS[claim.comparison][run].rows, f"{claim.name}: {run} has no {phase}"


def test_words_in_capitals_stand_for_others():
    words = words_of("ooo", "point-mass-wall", "sac_ft", lambda run: f"runs/{run}")
    assert words[:2] == ["--num-envs", "48"] and words[-1] == "0"
    assert " ".join(words[-6:]) == "--init-from runs/cql --offline-steps 0 --random-steps 0"
    for (comparison, task), _ in BUDGETS.items():
        for run in COMPARISONS[comparison]:
            left = [w for w in words_of(comparison, task, run, str) if w.isupper() and not w.startswith("-")]
            assert not left or task.startswith("kitchen"), f"{comparison}, {task}, {run}: {left}"


@pytest.mark.parametrize(
    ("comparison", "task"), [key for key in BUDGETS if not key[1].startswith("walker2d")]
)
def test_each_run_is_a_command_that_its_script_takes(comparison, task):
    args = tables.Args(comparison, task)
    for run in COMPARISONS[comparison]:
        script, *words = tables.command(args, run)
        if task.startswith("kitchen") and any(word.isupper() for word in words):
            continue  # the kitchen has a budget for IQL's family only
        method = importlib.import_module(f"ooo_rl.algos.{pathlib.Path(script).stem}")
        assert settings.parse(method.Args, words).name == tables.name_of(args, run)
        assert set(sources(comparison, run)) <= COMPARISONS[comparison].keys()


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


def test_a_record_keeps_what_a_reader_needs_and_no_place_of_this_machine(tmp_path, monkeypatch):
    folder, claim = tmp_path / "iql" / "point-mass-wall" / "table-iql", claims.CLAIMS[0]
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({
        "dataset": "ooo/x-v0", "seeds": [0, 1], "failed": {}, "phases": {"online": {"return": [1.0, None]}},
    }))  # fmt: skip
    command = (
        f"{tmp_path}/algos/iql.py --env x --init-from {tmp_path}/cql/y --runs-dir {tmp_path} --name table-iql"
    )
    (folder / "config.json").write_text(json.dumps({
        "method": "iql", "command": command, "versions": {}, "devices": [], "git_commit": "abc",
    }))  # fmt: skip
    (folder / "metrics.csv").write_text(
        "phase,step,seed,setting,metric,value\nonline,5,0,,eval/return,1\nonline,5,1,,eval/return,2\n"
        "online,5,0,,critic_loss,3\n"
    )
    monkeypatch.setattr(claims, "RECORDS", tmp_path / "results")
    claims.keep(claim, "iql", folder)
    text = claims.record_of(claim, "iql").read_text()
    record = json.loads(text)
    assert (
        record["command"] == "python algos/iql.py --env x --init-from runs/cql/y"
        and str(tmp_path) not in text
    )
    assert record["curves"] == {"online": {"return": {"5": [1.0, 2.0]}}}
    np.testing.assert_array_equal(claims.scores(claim, ("iql", "online")), [1.0, np.nan])
    assert claims.scores(claim, ("ooo_iql", "retrained")) is None
    assert f"| {claim.place} | {claim.says} | {claim.task}" in claims.page(claims.CLAIMS)


def test_the_page_is_that_of_the_records():
    assert claims.PAGE.read_text() == claims.page(claims.CLAIMS)
