"""What `--q-bias` reports: the discounted return of fresh episodes against a plain loop, and Q of a whole run."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_run import rows_of
from test_sac import static_of
from training import trained

from ooo_rl import envs
from ooo_rl.algos import iql, off2onrl, sac
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs.ends import EndsByReward
from ooo_rl.data.runs.evaluation import check_q_bias, judge
from ooo_rl.data.runs.session import Session
from ooo_rl.envs.rollout import rollout


class Line(envs.Task):
    """From 0 or 3 in steps of 1; the reward is the place. It ends beyond 5, or after 4 steps."""

    horizon, observation_size, action_size = 4, 1, 1

    def start(self, key):
        return jnp.where(jax.random.bernoulli(key), 0.0, 3.0)[None]

    def advance(self, inner, action):
        return inner + 1, inner[0] + action[0], inner[0] >= 5, jnp.bool_(False)

    def observe(self, inner):
        return inner


def played(start, discount=0.5, action=0.25, enough=np.inf):
    """(discounted return, discounted length, terminated, last observation) of one episode, step by step.

    The return ends with a reward that is `enough`, the episode goes on.
    """
    place, value, length, terminated = start, 0.0, 0.0, 0
    for t in range(4):
        if not terminated:
            value, length = value + discount**t * (place + action), length + discount**t
            terminated = int(place + action >= enough or (enough == np.inf and place >= 5))
        place += 1
        if place > 5:
            break
    return value, length, terminated, place


@pytest.mark.parametrize("enough", [np.inf, 4.0])
def test_discounted_returns_are_those_of_a_plain_loop(enough):
    env = Line() if enough == np.inf else EndsByReward(Line(), enough)
    play = jax.jit(lambda key, discount: rollout(env, lambda obs: obs * 0 + 0.25, key, 40, False, discount))
    tally = play(jax.random.PRNGKey(0), 0.5)
    starts = np.asarray(tally["first_obs"])[:, 0]
    assert {*starts} == {0, 3}
    names = "discounted_return", "discounted_length", "terminated"
    found = np.stack([*(tally[name] for name in names), tally["last_obs"][:, 0]], axis=1)
    np.testing.assert_allclose(found, [played(start, enough=enough) for start in starts], rtol=1e-6)
    assert {*np.asarray(tally["terminated"])} == {0, 1}


def test_bias_is_prediction_less_what_followed():
    """Rewards are scaled; Q of the last observation stands for the rest of a truncated episode alone."""
    tally = {
        "length": np.array([2.0, 2.0]), "terminated": np.array([1.0, 0.0]), "discounted_return": np.array([3.0, 3.0]),
        "discounted_length": np.array([1.5, 1.5]), "first_obs": np.array([[1.0], [2.0]]),
        "last_obs": np.array([[7.0], [8.0]]), "return": np.array([4.0, 4.0]),
    }  # fmt: skip
    hyper = sac.Hyper(discount=0.5, reward_scale=2.0, reward_bias=-1.0)
    found = judge(tally, lambda obs: 10 * obs, lambda obs, action: (obs + action)[:, 0], hyper)
    np.testing.assert_allclose(found["predicted_q"], [11, 22])
    np.testing.assert_allclose(found["q_bias"], [11 - 4.5, 22 - (4.5 + 0.25 * 88)])
    assert found.keys() == {"length", "return", "predicted_q", "q_bias"}


def test_a_run_reports_both_for_each_seed_and_evaluation(tmp_path):
    """The probe pays 1 once, so that the bias is Q less the scaled reward."""
    run = trained(
        iql, env="probe-constant-reward", q_bias=True, num_seeds=2, hidden=(8,), batch_size=8, num_envs=4,
        utd_ratio=0.25, offline_steps=0, online_steps=32, eval_every=16, eval_episodes=3, reward_scale=3.0,
        reward_bias=-1.0, runs_dir=str(tmp_path), name="it",
    )  # fmt: skip
    rows = {name: [float(r["value"]) for r in rows_of(run.result.folder) if r["metric"] == f"eval/{name}"]
            for name in ("predicted_q", "q_bias")}  # fmt: skip
    assert len(rows["q_bias"]) == 4
    np.testing.assert_allclose(np.subtract(rows["predicted_q"], rows["q_bias"]), 2, atol=1e-5)
    agent, obs = run.result.agents["agent"], jnp.zeros((1, 1))

    def value(actor, critic):
        return run.nets.critic.apply(critic, obs, run.act(actor, obs)).min()

    expected = jax.jit(jax.vmap(value))(agent.actor.params, agent.critic.params)
    np.testing.assert_allclose(rows["predicted_q"][-2:], expected, rtol=1e-4)
    results = run.result.results["phases"]["online"]
    np.testing.assert_allclose(results["predicted_q"], expected, rtol=1e-4)


def test_an_ensemble_reports_its_own_value(tmp_path):
    """Off2OnRL's Q is the mean over members, which is what its policy climbs."""
    run = trained(
        off2onrl, env="probe-constant-reward", q_bias=True, num_seeds=1, hidden=(8,), critic_hidden=(8,),
        num_members=3, batch_size=8, num_envs=4, utd_ratio=0.25, offline_steps=0, online_steps=32,
        learning_starts=4, eval_every=32, eval_episodes=3, runs_dir=str(tmp_path), name="it",
    )  # fmt: skip
    agent = jax.tree.map(lambda x: x[0], run.result.agents["agent"])
    obs = jnp.zeros((1, 1))
    q = off2onrl.ensemble_q(run.nets, agent.critic.params, obs, run.act(agent.actor.params, obs))
    np.testing.assert_allclose(run.result.results["phases"]["online"]["predicted_q"], q, rtol=1e-4)


def test_what_cannot_be_reported_is_refused():
    nets = static_of(sac).nets
    given = {"q_bias": True, "eval_env": "", "env": "hopper"}
    check_q_bias(SimpleNamespace(**given), nets)
    for changes, part in (({"eval_env": "Hopper-v5"}, nets), ({"env": "none"}, nets), ({}, (1, 2))):
        args = SimpleNamespace(**given | changes)
        with pytest.raises(UsageError, match="--q-bias"):
            check_q_bias(args, part)
        check_q_bias(SimpleNamespace(**vars(args) | {"q_bias": False}), part)
    with pytest.raises(UsageError, match="--q-bias: this method has no critics"):
        Session.static(SimpleNamespace(args=SimpleNamespace(**given)), (1, 2))
