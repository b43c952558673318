"""n-step returns from a ring and from a dataset, against a plain walk through each environment's history."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ooo_rl.algos import gde_cql, gde_iql, gde_td3_bc, per_iql
from ooo_rl.data import buffer, n_step
from ooo_rl.data.buffer import Transition
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs.session import Session

ENVS, BLOCKS, STEPS = 3, 5, 12  # the ring holds the last 5 of 12 steps of 3 environments
LONGEST = {3: 3, 5: 5, 8: 5, 12: 2}  # steps after which the histories were read -> of the longest window then
HYPER = SimpleNamespace(discount=0.9, reward_scale=2.0, reward_bias=-0.5)


def play(seed):
    """Steps of all environments, lists of dictionaries: two fifths of rows end something, or break.

    A return that has "ended" terminates within its episode, which goes on (see --end-reward).
    """
    rng = np.random.default_rng(seed)
    steps = []
    for t in range(STEPS):
        number = 100.0 * seed + 10 * t + np.arange(ENVS)
        kind = rng.choice(
            ["on", "terminated", "ended", "truncated", "broken"], ENVS, p=[0.6, 0.1, 0.1, 0.1, 0.1]
        )
        kind = np.full(ENVS, "broken") if t == 9 else kind
        steps.append({"number": number, "reward": rng.normal(size=ENVS), "kind": kind})
    return steps


def rows_of(step):
    obs = np.float32(step["number"])[:, None]
    discount = np.float32(~np.isin(step["kind"], ["terminated", "ended"]))
    return Transition(obs, -obs, np.float32(step["reward"]), obs + 0.5, discount)


def filled(steps, upto):
    """The ring after `upto` steps of all environments."""
    ring = n_step.linked(buffer.empty(jax.tree.map(lambda x: x[0], rows_of(steps[0])), ENVS * BLOCKS),
                         jnp.zeros(ENVS * BLOCKS))  # fmt: skip
    for t, step in enumerate(steps[:upto]):
        last = np.float32(np.isin(step["kind"], ["terminated", "truncated", "broken"]))
        broken = np.float32(step["kind"] == "broken")
        ring = INSERT(ring, rows_of(step), jnp.int32(t * ENVS), last, broken)
    return ring


INSERT = jax.jit(n_step.insert)


def at_slot(steps, t, e):
    """(step, environment) of the row that lies in the place of environment e's row of step t."""
    sound = np.flatnonzero(steps[t]["kind"] != "broken")
    if steps[t]["kind"][e] != "broken":
        return t, e
    return (t, sound[0]) if len(sound) else at_slot(steps, t - 1, ENVS - 1)


def walk(steps, upto, t, e, n):
    """The n-step return from the place of environment e's row of step t, as (number, return, next obs, weight)."""
    window = [at_slot(steps, t, e)]
    while (
        len(window) < n
        and steps[t]["kind"][e] == "on"
        and t + 1 < upto
        and steps[t + 1]["kind"][e] != "broken"
    ):
        t += 1
        window.append((t, e))
    reward = sum(0.9**k * (2 * steps[a]["reward"][b] - 0.5) for k, (a, b) in enumerate(window))
    a, b = window[-1]
    weight = 0.9 ** (len(window) - 1) * (steps[a]["kind"][b] not in ("terminated", "ended"))
    first = steps[window[0][0]]["number"][window[0][1]]
    return first, reward, steps[a]["number"][b] + 0.5, weight, len(window)


@pytest.mark.parametrize("n", [1, 3, 7])
@pytest.mark.parametrize("upto", [3, BLOCKS, 8, STEPS])
def test_returns_are_those_of_a_walk(n, upto):
    """For each slot in use, of two seeds at once: before the ring is full, just then, and after."""
    histories = [play(1), play(2)]
    rings = jax.tree.map(lambda *x: jnp.stack(x), *[filled(steps, upto) for steps in histories])
    used = np.arange(min(upto, BLOCKS) * ENVS).reshape(-1, ENVS)
    read = jax.vmap(partial(n_step.n_step, HYPER, stride=ENVS, n=n), in_axes=(0, None, None))
    ours = jax.jit(read)(rings, jnp.asarray(used), jnp.int32(upto * ENVS))
    lengths = []
    for seed, steps in enumerate(histories):
        for block, e in np.ndindex(used.shape):
            t = max(s for s in range(upto) if s % BLOCKS == block)
            number, reward, next_obs, weight, length = walk(steps, upto, t, e, n)
            place = seed, block, e
            assert ours.obs[place][0] == number == -ours.action[place][0]
            np.testing.assert_allclose(ours.reward[place], reward, rtol=1e-5, atol=1e-6)
            assert ours.next_obs[place][0] == next_obs
            np.testing.assert_allclose(ours.discount[place], weight, rtol=1e-6)
            lengths.append(length)
    assert max(lengths) == min(n, LONGEST[upto]) and (n == 1 or len({*lengths}) > 1)


def test_returns_from_a_dataset():
    """Two episodes, the first truncated, the second terminated: windows of three steps."""
    number = jnp.arange(6.0)
    rows = Transition(
        number[:, None], number[:, None], number, number[:, None] + 1, jnp.float32([1, 1, 1, 1, 1, 0])
    )
    rows = n_step.linked(rows, jnp.array([False, True, False, False, False, False]))
    plain = SimpleNamespace(discount=0.5, reward_scale=1.0, reward_bias=0.0)
    ours = n_step.n_step(plain, rows, jnp.arange(6), 6, 1, 3)
    np.testing.assert_allclose(ours.reward, [0.5, 1, 2 + 1.5 + 1, 3 + 2 + 1.25, 4 + 2.5, 5])
    np.testing.assert_allclose(ours.next_obs[:, 0], [2, 2, 5, 6, 6, 6])
    np.testing.assert_allclose(ours.discount, [0.5, 1, 0.25, 0, 0, 0])


@pytest.mark.parametrize("script", [gde_iql, gde_td3_bc, gde_cql, per_iql])
def test_rows_in_no_order_are_refused(script, tmp_path, monkeypatch):
    """Where offline rows are learnt from by windows, and only there."""
    monkeypatch.setattr(Session, "compile", lambda *_: (_ for _ in ()).throw(InterruptedError))
    rng, path = np.random.default_rng(0), tmp_path / "rows.npz"
    obs, next_obs, actions = rng.uniform(-0.1, 0.1, (3, 40, 2))
    np.savez(
        path, observations=obs, next_observations=next_obs, actions=actions, rewards=-np.ones(40),
        terminals=np.zeros(40),
    )  # fmt: skip
    given = {"env": "point-mass-wall", "dataset": str(path), "runs_dir": str(tmp_path)}
    given |= {} if script is per_iql else {"offline_ratio": 0.5}
    with pytest.raises(UsageError, match=r"--n-steps 3: the rows of --dataset .*rows\.npz are in no order"):
        script.train(script.Args(**given, n_steps=3, name="a"))
    for fine in ({"n_steps": 1}, {"n_steps": 3, "online_steps": 0}):
        with pytest.raises(InterruptedError):
            script.train(script.Args(**given | fine, name=f"b{len(fine)}"))
