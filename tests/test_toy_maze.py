"""The toy maze against its definition in plain loops, and what makes it hard."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ooo_rl import envs
from ooo_rl.data.errors import UsageError
from ooo_rl.data.recipes import toy_maze as recipe
from ooo_rl.envs import toy_maze
from ooo_rl.envs.rollout import rollout
from ooo_rl.envs.toy_maze import GOAL_RADIUS, GOALS, SIZE, ToyMaze

# By x: in which of the eleven rows of cells, counted from below, that column of cells is walled.
WALLED = {0: [5], 1: [5], 3: [5], 4: [5], 5: [0, 2, 3, 4, 5], 6: [5, 6, 7, 9, 10], 7: [5], 8: [5], 10: [5]}


def walled(x, y):
    return not (0 <= x <= 22 and 0 <= y <= 22) or min(int(y / 2), 10) in WALLED.get(min(int(x / 2), 10), [])


def walked(position, move):
    """The position after a move in ten parts, by the definition, in float64."""
    position = np.float64(position)
    for _ in range(10):
        for axis in (0, 1):
            there = position.copy()
            there[axis] += move[axis] / 10
            position = position if walled(*there) else there
    return position


def test_walls_stop_moves_as_defined():
    rng = np.random.default_rng(0)
    starts = rng.uniform(0, 22, (3000, 2))
    starts = np.float32([p for p in starts if not walled(*p)])
    moves = np.float32(rng.normal(0, 2, starts.shape))
    found = jax.jit(jax.vmap(toy_maze.walk))(starts, moves)
    wanted = np.array([walked(*pair) for pair in zip(starts, moves)])
    # Where a part of a move ends on an edge to the last bit, rounding decides: once in a thousand at most.
    assert (np.abs(found - wanted).max(axis=1) > 1e-4).mean() < 1e-3
    stopped = np.abs(wanted - starts - moves).max(axis=1) > 1e-4
    assert 0.1 < stopped.mean() < 0.9


def test_what_the_actions_do_without_noise():
    env = ToyMaze(noise=0)
    state = env.reset(jax.random.PRNGKey(0)).replace(
        pipeline_state=(jnp.float32([8, 6]), jax.random.PRNGKey(0))
    )
    for action, move in enumerate([(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)]):
        reached = env.step(state, jnp.int32(action))
        np.testing.assert_allclose(reached.obs, (np.float32([8, 6]) + move) / 22, atol=1e-6)
        assert reached.reward == -1 and reached.done == 0


def test_noise_is_drawn_anew_at_each_step_and_in_each_episode():
    env = ToyMaze()

    def episode(key):
        state = env.reset(key)
        states = jax.lax.scan(lambda s, _: (env.step(s, jnp.int32(0)), s.obs), state, None, 3)[1]
        return jnp.diff(states, axis=0).reshape(4) * SIZE  # two steps of staying, on both axes

    moves = np.asarray(jax.jit(jax.vmap(episode))(jax.random.split(jax.random.PRNGKey(0), 4000)))
    assert np.abs(moves.mean(axis=0)).max() < 0.05 and np.abs(moves.std(axis=0) - 0.5).max() < 0.03
    assert np.abs(np.corrcoef(moves.T) - np.eye(4)).max() < 0.06


@pytest.mark.parametrize("goal", [0, 1])
def test_both_goals_end_an_episode_with_reward_0(goal):
    env, key = ToyMaze(noise=0), jax.random.PRNGKey(0)
    state = env.reset(key)
    towards = np.float32([[0, -1], [-1, 0]][goal])  # on the inner side of the goal
    for gap, success in ((GOAL_RADIUS + 0.01, 0), (GOAL_RADIUS - 0.01, 1)):
        at = state.replace(pipeline_state=(jnp.asarray(GOALS[goal] + gap * towards), key))
        reached = env.step(at, jnp.int32(0))
        assert reached.metrics["success"] == reached.info["termination"] == success
        assert reached.reward == success - 1


def test_steps_to_the_goals():
    """Breadth-first search over whole positions, without noise: the left goal is less than half as far."""
    found, frontier, near = {(2, 2): 0}, deque([(2, 2)]), {}
    while frontier:
        place = frontier.popleft()
        for goal in range(2):
            if np.linalg.norm(np.subtract(place, GOALS[goal])) < GOAL_RADIUS:
                near.setdefault(goal, found[place])
        for move in ((0, -1), (0, 1), (-1, 0), (1, 0)):
            there = tuple(np.round(walked(place, move)).astype(int))
            if there not in found and np.abs(walked(place, move) - place - move).max() < 1e-6:
                found[there] = found[place] + 1
                frontier.append(there)
    assert near == {0: 16, 1: 34}


def test_it_ends_after_100_steps_without_termination():
    env = ToyMaze()
    tally = rollout(env, lambda obs: jnp.zeros(len(obs), jnp.int32), jax.random.PRNGKey(0), 64)
    failed = np.asarray(tally["success"]) == 0
    assert failed.any() and (np.asarray(tally["length"])[failed] == 100).all()
    np.testing.assert_array_equal(tally["return"], tally["success"] - tally["length"])


def test_the_layout_is_in_units_of_the_observation():
    env, layout = envs.make("toy-maze"), envs.make("toy-maze").layout
    np.testing.assert_allclose(layout["start"], env.reset(jax.random.PRNGKey(0)).obs)
    assert layout["goals"][0] == layout["goal"] and len(layout["goals"]) == 2
    for (x0, y0), (x1, y1) in np.array(layout["walls"]) * 22:
        middle, along = np.array([x0 + x1, y0 + y1]) / 2, np.array([x1 - x0, y1 - y0])
        across = along[::-1] / 4
        assert walled(*(middle + across)) != walled(*(middle - across))


@pytest.mark.parametrize("bad", [{"horizon": 0}, {"noise": -1}])
def test_settings_that_do_not_exist_are_refused(bad):
    with pytest.raises(ValueError, match="horizon must be positive and noise not negative"):
        envs.make("toy-maze", **bad)


def test_the_data_have_few_good_paths():
    """Of the first 95 % of the rows no episode is good, of the rest all are; the last of each is cut."""
    episodes = recipe.checkpoints(envs.make("toy-maze"), 4000, 0, [])
    returns = np.array([e["rewards"].sum() for e in episodes])
    rows = np.cumsum([len(e["rewards"]) for e in episodes])
    assert rows[-1] == 4000 and 3800 in rows
    slow = rows < 3800
    assert slow.sum() > 30 and (returns[slow] < -30).all()
    assert (returns[rows > 3800] >= -30).all() and (rows > 3800).sum() > 5
    last = np.array([e["observations"][-1] for e in episodes]) * 22
    right, left = (np.linalg.norm(last - goal, axis=1) < 2 for goal in ((20, 20), (2, 16)))
    assert right[slow].mean() > 0.3 and left[rows > 3800][:-1].all()
    for e in episodes:
        assert e["actions"].dtype == np.int32 and e["actions"].min() >= 0 and e["actions"].max() < 5


def test_few_rows_have_no_good_paths():
    episodes = recipe.checkpoints(envs.make("toy-maze"), 9, 0, [])
    assert sum(len(e["rewards"]) for e in episodes) == 9


def test_data_of_policies_that_are_never_slow_cannot_be_made(monkeypatch):
    monkeypatch.setattr(recipe, "record", lambda *_: [{"rewards": np.zeros(9)}] * 2)
    with pytest.raises(UsageError, match="fewer than 3800 are fit"):
        recipe.checkpoints(envs.make("toy-maze"), 4000, 0, [{}] * 4)
