"""--end-reward: the return ends at rows that pay enough, in the data and online, and nowhere else."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ooo_rl import envs
from ooo_rl.algos import iql
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs.ends import EndsByReward
from ooo_rl.data.runs.session import Session
from ooo_rl.envs.base import Task


class Counted(Task):
    """Pays 1, 2, 3, ... and ends after six steps, or by a termination at the fifth."""

    horizon, observation_size, action_size = 6, 1, 1

    def __init__(self, ends=True):
        self.ends = ends

    def start(self, key):
        return jnp.zeros(1)

    def advance(self, inner, action):
        inner = inner + 1
        return inner, inner[0], self.ends & (inner[0] >= 5), inner[0] >= 5

    def observe(self, inner):
        return inner


def played(env, steps=6):
    """[(termination, truncation, done)] of each step."""
    state, found = env.reset(jax.random.PRNGKey(0)), []
    for _ in range(steps):
        state = env.step(state, jnp.zeros(1))
        found.append(
            (*(float(state.info[name]) for name in ("termination", "truncation")), float(state.done))
        )
    return found


def test_a_reward_ends_the_return_and_not_the_episode():
    going_on = [(0, 0, 0)] * 3
    assert played(Counted(), 5) == [(0, 0, 0)] * 4 + [(1, 0, 1)]
    assert played(EndsByReward(Counted(), 4), 5) == [*going_on, (1, 0, 0), (1, 0, 1)]
    assert played(EndsByReward(Counted(ends=False), 6)) == [(0, 0, 0)] * 5 + [(1, 0, 1)]


def test_with_inf_each_end_is_a_truncation():
    assert played(EndsByReward(Counted(), np.inf), 5) == [(0, 0, 0)] * 4 + [(0, 1, 1)]
    assert played(EndsByReward(Counted(ends=False), np.inf)) == [(0, 0, 0)] * 5 + [(0, 1, 1)]


def test_a_broken_world_ends_no_return():
    class Broken(Counted):
        def advance(self, inner, action):
            return inner + jnp.nan, jnp.float32(9), jnp.bool_(False), jnp.bool_(False)

    # It pays 0, in the place of the reward that was lost; so this is no sign of an end.
    assert played(EndsByReward(Broken(), 0), 1) == [(0, 1, 1)]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A file of two episodes, which pay 0 to 3 and 2 to 5; the first terminates, the second is cut off."""
    monkeypatch.setitem(envs._REGISTERED, "counted", Counted)
    path = tmp_path / "rows.npz"
    reward = np.array([0, 1, 2, 3, 2, 3, 4, 5], np.float32)
    end = np.arange(8) % 4 == 3
    np.savez(
        path, observations=reward[:, None], next_observations=reward[:, None] + 1, rewards=reward,
        actions=np.zeros((8, 1)),
        terminals=end & (np.arange(8) < 4), timeouts=end & (np.arange(8) >= 4),
    )  # fmt: skip
    return {"env": "counted", "dataset": str(path), "num_seeds": 1, "hidden": (8,), "runs_dir": str(tmp_path)}


@pytest.mark.parametrize(
    ("least", "discount", "truncation"),
    [
        (-np.inf, (1, 1, 1, 0, 1, 1, 1, 1), (0, 0, 0, 0, 0, 0, 0, 1)),
        (4, (1, 1, 1, 1, 1, 1, 0, 0), (0, 0, 0, 1, 0, 0, 0, 0)),
        (np.inf, (1,) * 8, (0, 0, 0, 1, 0, 0, 0, 1)),
    ],
)
def test_rows_of_a_dataset_end_by_their_reward(rows, least, discount, truncation):
    session = Session("iql", iql.Args(**rows, end_reward=least), iql.make_plan)
    np.testing.assert_array_equal(session.offline.discount, discount)
    np.testing.assert_array_equal(session.truncation, truncation)
    assert isinstance(session.env, EndsByReward) == (least > -np.inf)


def test_what_cannot_be_is_refused(rows):
    with pytest.raises(UsageError, match="--export writes the environment's own ends"):
        iql.train(iql.Args(**rows, end_reward=4, export="ooo/counted"))


ALGOS = sorted((pathlib.Path(__file__).parents[1] / "algos").glob("[a-z]*.py"))


@pytest.mark.parametrize("method", [path.stem for path in ALGOS if not path.stem.endswith("dqn")])
def test_a_success_that_is_worth_something_ends_the_return_of_a_binary_hand(method):
    """A success pays 0, a failure -1. A success worth 5 would add up to 500 while it lasts, were it no end."""
    args = importlib.import_module(f"ooo_rl.algos.{method}").Args(env="door-binary")
    assert args.hyper.reward_bias == 0 or args.end_reward == 0
