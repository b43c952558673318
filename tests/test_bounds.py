"""The bounds inside which retraining holds Q-values: of task rewards, and never around a bonus."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ooo_rl import envs
from ooo_rl.data.buffer import Transition
from ooo_rl.data.runs.session import Static

NAMES = sorted(p.stem for p in (pathlib.Path(__file__).parents[1] / "algos").glob("[a-z]*.py"))
SCRIPTS = [importlib.import_module(f"ooo_rl.algos.{name}") for name in NAMES]
RETRAINING = [script for script in SCRIPTS if hasattr(script.Args, "frozen_bonus")]


@pytest.mark.parametrize("script", RETRAINING)
@pytest.mark.parametrize(("bound_q", "frozen_bonus"), [(True, False), (True, True), (False, False)])
def test_a_frozen_bonus_is_never_cut_off(script, bound_q, frozen_bonus, monkeypatch):
    """Of a bonus of 10 at each step V is 10 / (1 - discount); bounds of the task's rewards know nothing of it."""
    seen = []

    def record(_, hyper, agent, batch, bonus, q_bounds, key):
        seen.append("of rewards" if any(isinstance(b, jax.core.Tracer) for b in q_bounds) else q_bounds)
        return agent, {"q": bonus.mean()}

    monkeypatch.setattr(script, "update", record)
    env = envs.make("probe-match-obs")
    flags = {"bound_q": bound_q, "frozen_bonus": frozen_bonus, "intrinsic": "rnd"}
    args = script.Args(env="probe-match-obs", online_steps=64, hidden=(8,), **flags)
    session = type(
        "Session", (), {"args": args, "env": env, "obs_size": 1, "action_size": 1, "hyper": args.hyper}
    )
    row = Transition(jnp.zeros(1), jnp.zeros(1), jnp.float32(0), jnp.zeros(1), jnp.float32(0))
    static = Static(args, env, row, script.make_nets(session))

    def retrain(key, hyper):
        given = {"hyper": hyper, "offline": None, "truncation": None, "key": key}
        names = script.init_state.__code__.co_varnames[1 : script.init_state.__code__.co_argcount]
        state = script.init_state(static, *(given[name] for name in names))
        return script.retrain_chunk(static, state, hyper, None, jnp.int32(8), length=2)

    jax.eval_shape(retrain, jax.random.PRNGKey(0), args.hyper)
    expected = (-jnp.inf, jnp.inf) if frozen_bonus or not bound_q else "of rewards"
    assert seen and all(bounds == expected for bounds in seen)


@pytest.mark.parametrize("script", [s for s in SCRIPTS if hasattr(s, "value_range")])
def test_what_q_can_be(script):
    """The worst and the best reward for ever, or once where the episode ends after it."""
    for rewards, discount, expected in (
        ((-1, 0), 0.9, (-10, 0)),
        ((-1, 2), 0.5, (-2, 4)),
        ((1, 2), 0.9, (1, 20)),
        ((-2, -1), 0.9, (-20, -1)),
        ((0, 0), 1.0, (0, 0)),
        ((-1, 1), 1.0, (-np.inf, np.inf)),
        ((0, 1), 1.0, (0, np.inf)),
    ):
        found = script.value_range(*jnp.float32(rewards), jnp.float32(discount))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
