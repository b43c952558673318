"""The number of environments that a GPU gets by default, what is said of them, and XLA's options for a GPU."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from ooo_rl import envs
from ooo_rl.algos import iql, ooo_iql, rlpd
from ooo_rl.data.runs import program, settings, worlds
from ooo_rl.envs import estimates


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize(
    ("script", "changes", "num_envs"),
    [
        (iql, {}, 64),  # 1,000,000 steps are 10 episodes of 1,000 steps in each of 100 environments
        (iql, {"online_steps": 250_000}, 16),
        (iql, {"online_steps": 1_000}, 8),
        (iql, {"num_seeds": 40}, 16),  # 1,024 worlds for all
        (iql, {"num_envs": 4}, 4),
        (iql, {"buffer_size": 32 * 1001}, 32),  # a multiple is wanted
        (iql, {"utd_ratio": 1 / 24, "num_envs": 24}, 24),
        (ooo_iql, {"retrain_at": (48, 1_000_000)}, 16),  # the plan stops at step 48
        (rlpd, {}, 16),  # of its 250,000 steps
    ],
)
def test_as_many_environments_as_fill_a_gpu_and_fit_the_plan(gpu, script, changes, num_envs):
    args = script.Args(env="halfcheetah", dataset="none", offline_steps=0, **changes)
    chosen = worlds.chosen(settings.resolved(args), script.make_plan)
    assert chosen.num_envs == num_envs
    assert chosen.online_steps == args.online_steps and chosen.utd_ratio == args.utd_ratio


def test_elsewhere_it_is_eight(gpu, monkeypatch):
    def number(**changes):
        return settings.resolved(iql.Args(dataset="none", offline_steps=0, **changes)).num_envs

    assert number(env="probe-all") == number(env="halfcheetah", physics="mujoco") == worlds.FEW == 8
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert number(env="halfcheetah", physics="mjx") == 8


def test_what_does_not_come_out_is_refused_in_the_words_of_the_usual_number(gpu):
    args = iql.Args(env="halfcheetah", dataset="none", offline_steps=0, utd_ratio=0.3)
    with pytest.raises(settings.UsageError, match=r"8 makes 2.4 gradient .* as with --utd-ratio 0.25"):
        worlds.chosen(settings.resolved(args), iql.make_plan)


@pytest.mark.parametrize(("num_envs", "utd_ratio"), [(49, 1 / 49), (48, 0.0208334), (48, 1 / 48), (8, 2.0)])
def test_a_ratio_may_be_rounded(num_envs, utd_ratio):
    worlds.check_vector_steps(
        SimpleNamespace(num_envs=num_envs, utd_ratio=utd_ratio, online_steps=1, buffer_size=0)
    )


def test_the_header_says_which_engine_is_estimated_to_be_faster(gpu, monkeypatch):
    env = envs.make("halfcheetah", physics="mjx")
    monkeypatch.setattr(estimates, "of", lambda env: estimates.Cost(4.0, 6.0, 10_000.0))
    monkeypatch.setattr(worlds.os, "sched_getaffinity", lambda _: range(16), raising=False)
    args = SimpleNamespace(num_envs=8, utd_ratio=1.0)
    few, many, most = (worlds.described(args, env, n) for n in (5, 100, 512))
    # 40 worlds on 16 cores take 0.25 ms, 800 take 5 ms, 4,096 take 26 ms. 8 updates take 0.56 to 1.76 ms.
    assert few == (
        "40 worlds (8 for each of 5 runs) on mjx: a step of all takes about 4 ms (estimated from an H200 and an EPYC), "
        "69 to 88 % of the time online; --physics mujoco is estimated to take 0.25 ms"
    )
    assert "about 4 ms" in many and "--physics" not in many
    assert "about 16 ms" in most and "--physics mjx-warp is estimated to take 6 ms" in most
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert worlds.described(args, env, 5) == "40 worlds (8 for each of 5 runs) on mjx"


@pytest.mark.parametrize("name", ["halfcheetah-sparse", "hopper"])
def test_a_gpu_steps_a_thousand_worlds_in_the_time_of_one(name):
    cost = estimates.of(envs.make(name))
    assert cost.ms("mjx", 1, 16) == cost.ms("mjx", 1_000, 16) == cost.ms("mjx", 2_048, 16) / 2
    assert cost.ms("mjx-warp", 1, 16) == cost.ms("mjx-warp", 8_192, 16) == cost.ms("mjx-warp", 16_384, 16) / 2
    assert cost.ms("mujoco", 1, 16) == cost.ms("mujoco", 16, 16) == cost.ms("mujoco", 32, 16) / 2


def test_what_has_no_estimate_has_none():
    assert estimates.of(envs.make("maze2d-large")) is None


def test_options_for_a_gpu_are_those_that_xla_knows_and_the_user_does_not_set(monkeypatch):
    lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(2))
    asked = []

    def compile_it(compiler_options):
        asked.append(compiler_options)
        return lowered.compile(compiler_options=compiler_options)

    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_graph_min_graph_size=9")
    monkeypatch.setitem(program.GPU_OPTIONS, "xla_gpu_of_yesterday", True)
    ours = program.compile_for(SimpleNamespace(compile=compile_it), "gpu")
    assert ours(jnp.ones(2)).tolist() == [2, 2]
    kept = {"xla_gpu_command_buffer_scheduling_mode", "xla_gpu_enable_command_buffer"}
    assert set(asked[0]) == kept | {"xla_gpu_of_yesterday"} and set(asked[-1]) == kept
    program.compile_for(SimpleNamespace(compile=compile_it), "cpu")
    assert asked[-1] is None
