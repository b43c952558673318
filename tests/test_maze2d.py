"""Maze2D against MuJoCo's C engine on D4RL's model, its rewards and resets, and D4RL's controller against
published returns."""

import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from ooo_rl.envs import maze2d
from ooo_rl.envs.maze2d import MAZES, Maze2D
from ooo_rl.envs.waypoints import WaypointController, next_cell, shortest_paths

ALL = pytest.mark.parametrize("maze", list(MAZES))


def c_model(maze):
    """D4RL's model, edited for MuJoCo 3.17.0 to move as in the MuJoCo 2 of D4RL.

    Margins add up now, so the ball alone has the 0.002 that used to be the larger one. The ball's mobility is
    averaged over three axes.
    """
    walls = "".join(
        f'<geom type="box" size=".5 .5 .2" pos="{r + 1} {c + 1} 0"/>'
        for r, row in enumerate(MAZES[maze])
        for c, mark in enumerate(row)
        if mark == "#"
    )
    model = mujoco.MjModel.from_xml_string(
        f"""<mujoco><compiler inertiafromgeom="true" angle="radian"/>
        <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
        <default><joint damping="1" limited="false"/>
        <geom friction=".5 .1 .1" density="1000" margin="0" condim="1" contype="2" conaffinity="1"/></default>
        <worldbody><geom type="plane" size="40 40 .25" pos="0 0 -.1" contype="1" conaffinity="0"/>
        <body pos="1.2 1.2 0"><geom type="sphere" size=".1" contype="1" margin="0.002"/>
        <joint name="x" type="slide" axis="1 0 0"/><joint name="y" type="slide" axis="0 1 0"/></body>{walls}
        </worldbody>
        <actuator><motor joint="x" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
        <motor joint="y" ctrlrange="-1 1" ctrllimited="true" gear="100"/></actuator></mujoco>"""
    )
    model.body_invweight0[1, 0] = 2 / 3 / model.body_mass[1]
    return model


def c_step(model, data, state, action):
    """The C engine's next (x, y, vx, vy), and how many walls the ball touched (the ground it always does)."""
    data.qpos, data.qvel, data.ctrl = state[:2], np.clip(state[2:], -5, 5), action
    mujoco.mj_step(model, data)
    return np.concatenate([data.qpos, data.qvel]), data.ncon - 1


class Place(NamedTuple):
    """What tells the tasks apart, in arrays of the same shapes for all mazes, so that one program serves them
    all."""

    blocks: jax.Array  # walls, and walls beyond them
    cells: jax.Array  # where episodes start, each equally often
    goal: jax.Array


def place_of(maze):
    env = Maze2D(maze)
    more = np.subtract(Maze2D("large").blocks.shape, env.blocks.shape)
    blocks = np.pad(env.blocks, [(0, n) for n in more], constant_values=True)
    number = np.lcm.reduce([len(Maze2D(name).cells) for name in MAZES])
    cells = np.tile(env.cells, (number // len(env.cells), 1))
    return Place(*map(jnp.asarray, (blocks, cells, env.goal)))


def at(place, reward="sparse", horizon=1):
    """The task of a `Place`, which may be traced."""
    env = Maze2D("large", reward, horizon)
    env.blocks, env.cells, env.goal = place
    return env


@jax.jit
def one_steps(place, states, actions):
    """The states [n, 4] after one step."""
    return jax.vmap(lambda state, action: at(place).advance(state, action)[0])(states, actions)


@jax.jit
def open_loop(place, state, actions):
    """The states [steps, 4] along the way."""
    return jax.lax.scan(lambda s, a: (at(place).advance(s, a)[0],) * 2, state, actions)[1]


@jax.jit
def three_still_steps(place, positions):
    """The three states after each of `positions` [n, 2], sparsely and densely rewarded, each [n, 3, ...]."""

    def follow(env, position):
        still = lambda state, _: (env.step(state, jnp.zeros(2)),) * 2  # noqa: E731
        return jax.lax.scan(still, env.reset_to(position, jnp.zeros(2)), None, 3)[1]

    kinds = (at(place, reward, 3) for reward in ("sparse", "dense"))
    return [jax.vmap(lambda position, env=env: follow(env, position))(positions) for env in kinds]


@jax.jit
def starts(place):
    """Observations [20_000, 4] at the beginning of episodes."""
    return jax.vmap(at(place).reset)(jax.random.split(jax.random.PRNGKey(0), 20_000)).obs


def random_steps(maze, number=3000):
    """Largest difference from the C engine over steps from random states, and how many of these touch a
    wall."""
    env, model, rng = Maze2D(maze), c_model(maze), np.random.default_rng(0)
    data, dtype = mujoco.MjData(model), jnp.zeros(()).dtype
    # Positions are up to 0.05 inside a wall with the ball's centre, 0.15 with its edge: deeper than it ever
    # gets.
    cells = env.cells[rng.integers(len(env.cells), size=number)]
    position = cells + maze2d.CENTRE + rng.uniform(-0.55, 0.55, (number, 2))
    start = np.concatenate([position, rng.uniform(-7, 7, (number, 2))], 1).astype(dtype)
    action = rng.uniform(-1, 1, (number, 2)).astype(dtype)
    theirs, touched = zip(*[c_step(model, data, s, a) for s, a in zip(start, action)])
    ours = one_steps(place_of(maze), start, action)
    return np.abs(ours - np.array(theirs)).max(), np.sum(np.array(touched) > 0)


def long_run(maze, steps=1000):
    """Difference from the C engine after each step of a run, and the number of steps with contacts."""
    env, model, rng = Maze2D(maze), c_model(maze), np.random.default_rng(0)
    data, dtype = mujoco.MjData(model), jnp.zeros(()).dtype
    held = np.repeat(rng.uniform(-1, 1, (steps // 25, 2)), 25, 0).astype(dtype)
    state = np.asarray(env.start(jax.random.PRNGKey(0)))
    ours, theirs, bumps = open_loop(place_of(maze), state, held), [], 0
    for action in held:
        state, walls = c_step(model, data, state, action)
        theirs.append(state)
        bumps += walls > 0
    return np.abs(ours - np.array(theirs)).max(1), bumps


@ALL
def test_one_step_is_the_c_engines(maze):
    error, touched = random_steps(maze)
    assert error < 5e-5
    assert touched > 300


def test_in_float64_it_is_the_c_engines_to_rounding():
    """One step from random states, and 1000 steps open loop, where bumps multiply what rounding errors there
    are."""
    code = (
        "import json, test_maze2d as t\n"
        "for maze in t.MAZES:\n"
        "    (error, touched), (run, bumps) = t.random_steps(maze), t.long_run(maze)\n"
        "    print(json.dumps([float(x) for x in (error, run[99], run[-1], touched, bumps)]))"
    )
    environment = {**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": str(pathlib.Path(__file__).parent)}
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("[")]
    assert len(rows) == len(MAZES)
    for error, run100, run1000, touched, bumps in rows:
        assert error < 1e-11
        assert run100 < 1e-9
        assert run1000 < 1e-4
        assert touched > 300
        assert bumps > 50


@ALL
def test_rewards_horizon_and_that_nothing_terminates(maze):
    assert Maze2D(maze).horizon == {"open": 150, "umaze": 300, "medium": 600, "large": 800}[maze]
    goal = {"open": (2, 3), "umaze": (1, 1), "medium": (6, 6), "large": (7, 9)}[maze]
    offsets = np.random.default_rng(0).uniform(-0.5, 0.5, (20, 2))
    sparse, dense = three_still_steps(place_of(maze), np.float32([*np.add(goal, offsets), goal]))
    distance = np.linalg.norm(np.float64(sparse.obs[..., :2]) - goal, axis=-1)
    assert 0 < (distance <= 0.5).sum() < distance.size
    np.testing.assert_array_equal(sparse.reward, distance <= 0.5)
    np.testing.assert_array_equal(sparse.metrics["success"], distance <= 0.5)
    np.testing.assert_allclose(dense.reward, np.exp(-distance), rtol=1e-5)
    np.testing.assert_array_equal(dense.obs, sparse.obs)
    assert (dense.metrics["success"][-1] == 1).all()
    for states in (sparse, dense):
        assert not states.info["termination"].any()
        np.testing.assert_array_equal(states.info["truncation"], np.tile([0.0, 0.0, 1.0], (21, 1)))


@ALL
def test_episodes_start_evenly_in_all_free_cells(maze):
    obs = np.asarray(starts(place_of(maze)))
    cells, counts = np.unique(np.round(obs[:, :2]).astype(int), axis=0, return_counts=True)
    assert [MAZES[maze][r][c] for r, c in cells].count("G") == 1
    assert {MAZES[maze][r][c] for r, c in cells} <= {"O", "G"}
    expected = 20000 / (sum(map(len, MAZES[maze])) - "".join(MAZES[maze]).count("#"))
    assert (
        np.sum((counts - expected) ** 2 / expected) < len(cells) + 4 * (2 * len(cells)) ** 0.5
    )  # chi-squared, four deviations
    noise = obs[:, :2] - np.round(obs[:, :2])
    assert np.abs(noise).max() <= 0.1 + 1e-5
    np.testing.assert_allclose(noise.std(0), 0.1 / 3**0.5, rtol=0.02)
    np.testing.assert_allclose(obs[:, 2:].std(0), 0.1, rtol=0.02)
    np.testing.assert_allclose(obs.mean(0)[2:], 0, atol=0.003)


@ALL
def test_the_layout_outlines_the_walls(maze):
    """Crossing outlines from a free cell, one is in a wall after an odd number of them."""
    env, layout = Maze2D(maze), Maze2D(maze).layout
    x0, x1, y0, y1 = layout["bounds"]
    assert (x1 - x0, y1 - y0) == pytest.approx(env.walls.shape)
    assert layout["goal"] == tuple(env.goal)
    for row, column in np.ndindex(env.walls.shape):
        crossed = sum(
            a[0] == b[0] and min(a[1], b[1]) < column + maze2d.CENTRE < max(a[1], b[1]) and a[0] < row
            for a, b in layout["walls"]
        )
        assert env.walls[row, column] == (crossed % 2 == 0)  # the border, where the count starts, is wall


def test_shortest_paths_and_where_there_are_none():
    free = np.array([list(row) for row in (".....", ".###.", ".#.#.", "....#", "##...")]) == "."
    table, cells = shortest_paths(free), np.argwhere(free)
    pairs = np.repeat(cells, len(cells), 0), np.tile(cells, (len(cells), 1))
    np.testing.assert_array_equal(
        jax.vmap(next_cell, (None, 0, 0))(table, *pairs), table[*pairs[0].T, *pairs[1].T]
    )
    lengths = {}
    for start in map(tuple, cells):
        for goal in map(tuple, cells):
            cell, lengths[start, goal] = start, 0
            while cell != goal:
                ahead = tuple(table[*cell, *goal].tolist())
                assert free[ahead]
                assert abs(ahead[0] - cell[0]) + abs(ahead[1] - cell[1]) == 1
                cell = ahead
                lengths[start, goal] += 1
    assert lengths[(2, 4), (3, 3)] == 12
    assert lengths[(2, 2), (4, 4)] == 4
    assert all(lengths[a, b] == lengths[b, a] for a, b in lengths)
    assert table[1, 2, 0, 4].tolist() == [0, 2]  # out of a wall, on the side of the goal
    apart = shortest_paths(np.array([[True, False, True]]))
    assert apart[0, 0, 0, 2].tolist() == [0, 0]


HELD = (  # maze, D4RL's reference maximum, the return with a plan per episode, and the uncertainty of that
    ("umaze", 161.86, 222.5, 2.5),
    ("medium", 277.39, 421.0, 6.9),
    ("large", 273.99, 549.5, 8.3),
)


def controller_returns(place, table, horizon, keys, anew, episodes=100):
    """Returns [chains, episodes] of the controller in the maze of `place`.

    It plans in each episode where `anew` [chains], and else keeps its plan across resets. `table` are the
    shortest ways, `keys` [chains, 2]. The arguments are traced, and the mazes' programs are one.
    """
    env, controller = at(place, horizon=10_000), WaypointController(Maze2D("large").walls)
    controller.table = table

    def episode(plan, key, anew):
        reset_key, plan_key, act_key = jax.random.split(key, 3)
        state = env.reset(reset_key)
        fresh = controller.plan(state.obs[:2], env.goal, plan_key)
        plan = jax.tree.map(lambda new, old: jnp.where(anew, new, old), fresh, plan)

        def step(carry, x):
            (state, plan), (key, t) = carry, x
            action, following = controller.act(plan, state.obs[:2], state.obs[2:], key)
            new, going_on = (env.step(state, action), following), t < horizon
            carry = jax.tree.map(lambda new, old: jnp.where(going_on, new, old), new, carry)
            return carry, going_on * new[0].reward

        longest = max(maze2d.HORIZONS.values())
        times = jax.random.split(act_key, longest), jnp.arange(longest)
        (_, plan), rewards = jax.lax.scan(step, (state, plan), times)
        return plan, rewards.sum()

    def chain(key, anew):
        none_yet = jax.tree.map(jnp.zeros_like, controller.plan(jnp.zeros(2), env.goal, key))
        plans_now = (jnp.arange(episodes) == 0) | anew
        return jax.lax.scan(
            lambda plan, x: episode(plan, *x), none_yet, (jax.random.split(key, episodes), plans_now)
        )[1]

    return jax.vmap(chain)(keys, anew)


@pytest.fixture(scope="module")
def returns():
    """maze -> returns [2, 400]: of four chains that keep their plans, and of four that do not."""
    mazes = [row[0] for row in HELD]
    tables = [shortest_paths(~Maze2D(maze).walls) for maze in mazes]
    shape = tables[-1].shape
    tables = [np.pad(table, [(0, n) for n in np.subtract(shape, table.shape)]) for table in tables]
    places = jax.tree.map(lambda *parts: jnp.stack(parts), *map(place_of, mazes))
    horizons = jnp.array([maze2d.HORIZONS[maze] for maze in mazes])
    keys, anew = jax.random.split(jax.random.PRNGKey(0), 8), jnp.repeat(jnp.array([False, True]), 4)
    play = jax.jit(jax.vmap(controller_returns, (0, 0, 0, None, None)))
    return dict(
        zip(mazes, np.asarray(play(places, jnp.stack(tables), horizons, keys, anew)).reshape(3, 2, 400))
    )


@pytest.mark.parametrize(("maze", "d4rl", "anew", "uncertainty"), HELD)
def test_the_controllers_returns(returns, maze, d4rl, anew, uncertainty):
    """D4RL's reference maxima are means over 100 episodes of a controller that plans once and, by mistake,
    never again.

    From the second episode on it steers straight for the goal. `anew`, of one with a plan per episode, is
    from a plain loop over the C engine.
    """
    stubborn, fresh = returns[maze]
    assert abs(stubborn.mean() - d4rl) < 3 * stubborn.std() * (1 / 100 + 1 / 400) ** 0.5
    assert abs(fresh.mean() - anew) < 3 * (fresh.var() / 400 + uncertainty**2) ** 0.5
    assert fresh.min() > 0  # every episode reaches the goal


def test_bad_settings():
    for bad in ({"maze": "small"}, {"reward": "cost"}, {"horizon": 0}):
        with pytest.raises(ValueError, match="got"):
            Maze2D(**bad)


def test_a_state_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"needs qpos \(2,\) and qvel \(2,\), not \(3,\) and \(2,\)"):
        Maze2D("umaze").reset_to(np.zeros(3), np.zeros(2))
