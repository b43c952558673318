"""Settings that change as the online phase begins: which, when and how far, in every script; what is refused."""

import ast
import dataclasses
import importlib
import pathlib
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_run import rows_of
from test_sac import random_rows
from training import trained

from ooo_rl.algos import awac, cql, dqn, iql, off2onrl, td3_bc
from ooo_rl.algos import sac as sampling
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs import session, settings
from ooo_rl.data.runs.online_change import check_online_change, online_hyper, online_ratio
from ooo_rl.data.runs.program import Compiled
from ooo_rl.data.runs.sweep import grid

NAMES = sorted(path.stem for path in pathlib.Path(iql.__file__).parent.glob("[a-z]*.py"))


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (iql, "expectil=0.85", "=0.85: expectil is no setting; what can change is expectile"),
        (iql, "batch-size=64", "batch_size is fixed when the program compiles; what can change is"),
        (iql, "offline-ratio=0", "offline_ratio is no setting"),
        (iql, "expectile=1", "--expectile must be below 1, not 1"),
        (iql, "expectile=high", "--online-change expectile=high: write NAME=NUMBER"),
        (iql, "expectile", "--online-change expectile: write NAME=NUMBER"),
        (iql, "expectile=nan", "--expectile must be a number"),
        (iql, "expectile=0.8 expectile=0.9", "expectile changes twice"),
        (iql, "expectile=0.8 --online-steps 0", "--online-change needs --online-steps"),
        (iql, "--online-change-over 100", "--online-change-over 100: no --online-change says what changes"),
        (iql, "expectile=0.8 --online-change-over -1", "--online-change-over must be at least 0"),
        (
            awac,
            "target-max=0 --online-change-over 100",
            "would go from inf to 0, so it cannot change linearly",
        ),
        (td3_bc, "policy-every=4 --online-change-over 100", "only defined for whole numbers, so it cannot"),
        (td3_bc, "policy-every=1.5", "--policy-every must be a whole number"),
        (cql, "offline-ratio=1.5", "--offline-ratio must be at most 1"),
        (cql, "offline-ratio=-1", "a share below 0 means no share"),
        (off2onrl, "cql-weight=1", "--cql-weight has its effect in the offline phase"),
        (dqn, "online-lr=1e-3", "--online-lr is where lr begins online; change lr"),
        (awac, "offline-ratio=0.5", "a share below 0 means no share; set --offline-ratio to begin with"),
        (
            dqn,
            "--dataset none --offline-steps 0 --online-change offline-ratio=0.5",
            "--online-change offline-ratio=0.5 needs --dataset, and it is none",
        ),
        (cql, "diff-clip-min=1 diff-clip-max=0.5", "--diff-clip-min is above --diff-clip-max"),
        (cql, "--diff-clip-min 2 --sweep diff-clip-max=1,3", "--diff-clip-min is above --diff-clip-max"),
        (iql, "reward-scale=-1", "--reward-scale must be at least 0"),
    ],
)
def test_what_cannot_change_is_refused_before_anything_compiles(monkeypatch, script, flags, message):
    monkeypatch.setattr(Compiled, "program", lambda *_, **__: pytest.fail("compiled before the error"))
    words = flags.split() if flags.startswith("--") else ["--online-change", *flags.split()]
    with pytest.raises(UsageError) as error:
        settings.parse(script.Args, words)
    assert message in str(error.value)


def read_while_acting(script):
    """What the chunk that acts, JSRL's `assess` between chunks, or a function that they reach, reads."""
    module = ast.parse(pathlib.Path(script.__file__).read_text())
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    reached, to_do = (
        set(),
        [name for name in ("finetune_chunk", "explore_chunk", "assess") if name in functions],
    )
    while to_do:
        name = to_do.pop()
        reached.add(name)
        names = {node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)}
        to_do += names & functions.keys() - reached
    nodes = [node for name in reached for node in ast.walk(functions[name])]
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_read_while_a_method_acts_cannot_change_online(name):
    script = importlib.import_module(f"ooo_rl.algos.{name}")
    args = settings.resolved(script.Args())
    read = read_while_acting(script)
    assert {"discount", "reward_scale", "reward_bias"} <= read
    for field in dataclasses.fields(args.hyper):
        change = (f"{field.name}={getattr(args.hyper, field.name):g}",)
        refused = False
        try:
            check_online_change(dataclasses.replace(args, online_change=change))
        except UsageError as error:
            refused = "has its effect" in str(error)
        assert refused == (field.name not in read), field.name


def args_of(script, **values):
    return settings.resolved(script.Args(**values))


def test_at_once_and_linearly_from_each_swept_value():
    sweep = {
        "sweep": ("expectile=0.5,0.7",),
        "num_seeds": 2,
        "online_change": ("expectile=0.9", "actor-lr=0"),
    }
    once, over = args_of(iql, **sweep), args_of(iql, **sweep, online_change_over=400)
    hyper = grid(over)[0]
    values = lambda args, added: np.asarray(online_hyper(args, hyper, added).expectile)  # noqa: E731
    for added in (0, 1, 10_000):
        np.testing.assert_allclose(values(once, added), [0.9] * 4, rtol=1e-6)
    np.testing.assert_allclose(values(over, 0), [0.5, 0.5, 0.7, 0.7], rtol=1e-6)
    np.testing.assert_allclose(values(over, 100), [0.6, 0.6, 0.75, 0.75], rtol=1e-6)
    for added in (400, 10_000):
        np.testing.assert_allclose(values(over, added), [0.9] * 4, rtol=1e-6)
    changed = online_hyper(over, hyper, jnp.int32(100))
    np.testing.assert_allclose(changed.actor_lr, 0.75 * hyper.actor_lr, rtol=1e-6)
    same = {name: getattr(changed, name) is value for name, value in vars(hyper).items()}
    assert [name for name, kept in same.items() if not kept] == ["actor_lr", "expectile"]
    none = args_of(iql)
    assert online_hyper(none, hyper, 7).expectile is hyper.expectile


def test_an_infinite_bound_changes_at_once():
    args = args_of(awac, online_change=("target-max=0",))
    np.testing.assert_array_equal(online_hyper(args, args.hyper, jnp.int32(0)).target_max, 0)


def test_annealed_share_of_offline_rows():
    """All of a batch is offline first, then less and less; each row of a kind is as likely as another."""
    given = {"offline_ratio": 1.0, "online_change": ("offline-ratio=0",), "online_change_over": 100}
    args, rng = args_of(cql, **given), np.random.default_rng(0)
    rows = [random_rows(rng, n).replace(reward=np.arange(n, dtype=np.float32) + start)
            for n, start in ((40, 0), (60, 1000))]  # fmt: skip

    rows = jax.tree.map(jnp.asarray, rows)

    @partial(jax.jit, static_argnums=1)
    def draw(added, changes):
        ratio = online_ratio(args, added) if changes else 0.25
        return sampling.sample_batches(*rows, jnp.int32(30), ratio, (50, 3, 16), jax.random.PRNGKey(0)).reward

    for added, offline in ((0, 16), (25, 12), (75, 4), (100, 0), (900, 0)):
        reward = np.asarray(draw(jnp.int32(added), True))
        assert ((reward < 1000).sum(axis=-1) == offline).all()
        assert reward.max() < 1030, "a slot that is not in use"
        for low, high in ((0, 40), (1000, 1030)):
            found = reward[(reward >= low) & (reward < high)]
            assert not len(found) or (
                abs(found.mean() - (low + high - 1) / 2) < 2 and len({*found}) == high - low
            )
    assert ((np.asarray(draw(jnp.int32(0), False)) < 1000).sum(axis=-1) == 4).all()


TINY = {
    "env": "probe-match-obs", "num_seeds": 1, "hidden": (8,), "batch_size": 8, "num_envs": 4, "utd_ratio": 0.25,
    "offline_steps": 0, "online_steps": 64, "eval_every": 16, "checkpoint_every": 16, "name": "it",
}  # fmt: skip


def test_a_run_stops_learning_where_it_is_told_and_resumes_in_the_same_bits(tmp_path):
    """Learning rates go to 0 in 32 steps. Later parameters stand still; a resumed run says the same."""
    change = {"online_change": ("actor-lr=0", "critic-lr=0", "value-lr=0"), "online_change_over": 32}
    after, seen = session.Session.after, []

    def note(self, chunk, metrics, state, actor=None):
        seen.append(jax.device_get(state.agent.critic.params))
        after(self, chunk, metrics, state, actor)

    def stop(self, chunk, *arguments):
        if chunk.start == 16:
            raise KeyboardInterrupt
        after(self, chunk, *arguments)

    def run(place, **more):
        return trained(iql, whole=False, runs_dir=str(tmp_path / place), **TINY, **change, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Session, "after", note)
        whole = run("whole")
        patch.setattr(session.Session, "after", stop)
        with pytest.raises(KeyboardInterrupt):
            run("stopped", like=whole)
    flat = [np.concatenate([x.ravel() for x in jax.tree.leaves(params)]) for params in seen]
    moved = [bool((a != b).any()) for a, b in pairwise(flat)]
    assert moved == [True, False, False]
    folder = tmp_path / "stopped" / whole.result.folder.relative_to(tmp_path / "whole")
    trained(iql, whole=False, like=whole, resume=str(folder))
    assert rows_of(folder) == rows_of(whole.result.folder) and len(rows_of(folder)) > 10
    config = settings.read_config(str(folder), "--resume")["settings"]
    assert config["online_change"] == list(change["online_change"]) and config["online_change_over"] == 32
