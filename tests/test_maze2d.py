"""Maze2D against MuJoCo's C engine on D4RL's model, its rewards and resets, and D4RL's controller against published returns."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from envs import maze2d
from envs.maze2d import MAZES, Maze2D
from envs.waypoints import WaypointController, next_cell, shortest_paths

ALL = pytest.mark.parametrize("maze", list(MAZES))


def c_model(maze):
    """D4RL's model, edited for MuJoCo 3.17.0 to move as in the MuJoCo 2 of D4RL: margins add up now, so that the ball alone has the 0.002
    that used to be the larger one, and the ball's mobility is averaged over three axes."""
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
        <joint name="x" type="slide" axis="1 0 0"/><joint name="y" type="slide" axis="0 1 0"/></body>{walls}</worldbody>
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


def errors(maze, states=3000, steps=1000):
    """Largest difference from the C engine (over random states, at each step of a run from one), and steps with contacts in each."""
    env, model, rng = Maze2D(maze), c_model(maze), np.random.default_rng(0)
    data, dtype = mujoco.MjData(model), jnp.zeros(()).dtype
    # Positions are up to 0.05 inside a wall with the ball's centre, 0.15 with its edge: deeper than it ever gets.
    place = env.cells[rng.integers(len(env.cells), size=states)] + maze2d.CENTRE + rng.uniform(-0.55, 0.55, (states, 2))
    start = np.concatenate([place, rng.uniform(-7, 7, (states, 2))], 1).astype(dtype)
    action = rng.uniform(-1, 1, (states, 2)).astype(dtype)
    ours = jax.jit(jax.vmap(lambda s, a: env.advance(s, a)[0]))(start, action)
    theirs, touched = zip(*[c_step(model, data, s, a) for s, a in zip(start, action)])
    random = np.abs(ours - np.array(theirs)).max()

    held = np.repeat(rng.uniform(-1, 1, (steps // 25, 2)), 25, 0).astype(dtype)
    state = np.asarray(env.start(jax.random.PRNGKey(0)))
    ours = jax.jit(lambda s: jax.lax.scan(lambda s, a: (env.advance(s, a)[0],) * 2, s, held)[1])(state)
    theirs, bumps = [], 0
    for a in held:
        state, walls = c_step(model, data, state, a)
        theirs.append(state)
        bumps += walls > 0
    return random, np.abs(ours - np.array(theirs)).max(1), np.sum(np.array(touched) > 0), bumps


@ALL
def test_one_step_is_the_c_engines(maze):
    random, _, touched, _ = errors(maze, steps=25)
    assert random < 5e-5
    assert touched > 300


def test_in_float64_it_is_the_c_engines_to_rounding():
    """One step from random states, and 1000 steps open loop, where bumps multiply what rounding errors there are."""
    code = "import test_maze2d as t; [print(*(f'{x:.2e}' for x in (r, *run[[99, -1]], n, b))) for r, run, n, b in map(t.errors, t.MAZES)]"
    here = pathlib.Path(__file__).parent
    environment = {**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout
    for row in printed.splitlines():
        random, run100, run1000, touched, bumps = map(float, row.split())
        assert random < 1e-11
        assert run100 < 1e-9
        assert run1000 < 1e-4
        assert touched > 300
        assert bumps > 50
    assert len(printed.splitlines()) == len(MAZES)


@ALL
def test_rewards_horizon_and_that_nothing_terminates(maze):
    env, dense = Maze2D(maze), Maze2D(maze, reward="dense", horizon=3)
    assert env.horizon == {"open": 150, "umaze": 300, "medium": 600, "large": 800}[maze]
    step, dense_step = jax.jit(env.step), jax.jit(dense.step)
    goal = {"open": (2, 3), "umaze": (1, 1), "medium": (6, 6), "large": (7, 9)}[maze]
    for offset in np.random.default_rng(0).uniform(-0.5, 0.5, (20, 2)):
        state = step(env.reset_to(np.add(goal, offset), np.zeros(2)), jnp.zeros(2))
        distance = np.linalg.norm(np.asarray(state.obs[:2], np.float64) - goal)
        assert state.reward == state.metrics["success"] == (distance <= 0.5)
        dense_state = dense_step(dense.reset_to(np.add(goal, offset), np.zeros(2)), jnp.zeros(2))
        np.testing.assert_allclose(dense_state.reward, np.exp(-distance), rtol=1e-5)
        np.testing.assert_array_equal(dense_state.obs, state.obs)
    state = dense.reset_to(goal, np.zeros(2))
    for i in range(3):
        state = dense_step(state, jnp.zeros(2))
        assert (state.info["termination"], state.info["truncation"], state.metrics["success"]) == (0, i == 2, 1)


@ALL
def test_episodes_start_evenly_in_all_free_cells(maze):
    env = Maze2D(maze)
    obs = np.asarray(jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.PRNGKey(0), 20000)).obs)
    cells, counts = np.unique(np.round(obs[:, :2]).astype(int), axis=0, return_counts=True)
    assert [MAZES[maze][r][c] for r, c in cells].count("G") == 1
    assert {MAZES[maze][r][c] for r, c in cells} <= {"O", "G"}
    expected = 20000 / (sum(map(len, MAZES[maze])) - "".join(MAZES[maze]).count("#"))
    assert np.sum((counts - expected) ** 2 / expected) < len(cells) + 4 * (2 * len(cells)) ** 0.5  # chi-squared, four deviations
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
            a[0] == b[0] and min(a[1], b[1]) < column + maze2d.CENTRE < max(a[1], b[1]) and a[0] < row for a, b in layout["walls"]
        )
        assert env.walls[row, column] == (crossed % 2 == 0)  # the border, where the count starts, is wall


def test_shortest_paths_and_where_there_are_none():
    free = np.array([list(row) for row in (".....", ".###.", ".#.#.", "....#", "##...")]) == "."
    table = shortest_paths(free)
    lengths = {}
    for start in map(tuple, np.argwhere(free)):
        for goal in map(tuple, np.argwhere(free)):
            cell, lengths[start, goal] = start, 0
            while cell != goal:
                ahead = tuple(map(int, next_cell(table, cell, goal))) if lengths[start, goal] == 0 else tuple(table[*cell, *goal].tolist())
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


def controller_returns(maze, key, episodes, chains):
    """Returns [chains * episodes] of the controller if it keeps its plan across resets, and if it plans in each episode."""
    env = Maze2D(maze)
    controller = WaypointController(env.walls)

    def episode(plan, key, anew):
        reset_key, plan_key, act_key = jax.random.split(key, 3)
        state = env.reset(reset_key)
        fresh = controller.plan(state.obs[:2], env.goal, plan_key)
        plan = jax.tree.map(lambda new, old: jnp.where(anew, new, old), fresh, plan)

        def step(carry, key):
            state, plan = carry
            action, plan = controller.act(plan, state.obs[:2], state.obs[2:], key)
            state = env.step(state, action)
            return (state, plan), state.reward

        (_, plan), rewards = jax.lax.scan(step, (state, plan), jax.random.split(act_key, env.horizon))
        return plan, rewards.sum()

    def chain(key, anew):
        none_yet = jax.tree.map(jnp.zeros_like, controller.plan(jnp.zeros(2), env.goal, key))
        first_or_anew = (jnp.arange(episodes) == 0) | anew
        return jax.lax.scan(lambda plan, x: episode(plan, *x), none_yet, (jax.random.split(key, episodes), first_or_anew))[1]

    keys, anew = jax.random.split(key, 2 * chains), jnp.repeat(jnp.array([False, True]), chains)
    return np.asarray(jax.jit(jax.vmap(chain))(keys, anew)).reshape(2, -1)


@pytest.mark.parametrize(
    ("maze", "d4rl", "anew", "uncertainty"), [("umaze", 161.86, 222.5, 2.5), ("medium", 277.39, 421.0, 6.9), ("large", 273.99, 549.5, 8.3)]
)
def test_the_controllers_returns(maze, d4rl, anew, uncertainty):
    """D4RL's reference maxima are means over 100 episodes of a controller that plans once and, by mistake, never again: from the second
    episode on it steers straight for the goal. `anew`, of one with a plan per episode, is from a plain loop over the C engine."""
    stubborn, fresh = controller_returns(maze, jax.random.PRNGKey(0), 100, 4)
    assert abs(stubborn.mean() - d4rl) < 3 * stubborn.std() * (1 / 100 + 1 / 400) ** 0.5
    assert abs(fresh.mean() - anew) < 3 * (fresh.var() / 400 + uncertainty**2) ** 0.5
    assert fresh.min() > 0  # every episode reaches the goal


def test_bad_settings():
    for bad in ({"maze": "small"}, {"reward": "cost"}, {"horizon": 0}):
        with pytest.raises(ValueError, match="got"):
            Maze2D(**bad)
