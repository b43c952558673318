"""TD3, and what OOO's code calls so: against NumPy in float64, on the probes, and where values explode."""

import json
import sys
from functools import cache, partial
from itertools import pairwise
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import adam_first_step, double, ensemble, forward, gradient, mostly_close
from probing import check, random_rows
from test_run import rows_of
from training import trained

from ooo_rl.algos import td3
from ooo_rl.data import policy
from ooo_rl.data.buffer import Transition
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs import sweep

OBS, ACT, BATCH, HIDDEN = 3, 2, 48, (5, 4)
EXAMPLE = Transition(jnp.zeros(OBS), jnp.zeros(ACT), jnp.float32(0), jnp.zeros(OBS), jnp.float32(0))
SETTINGS = {
    "actor_lr": 2e-2, "critic_lr": 3e-2, "target_rate": 0.1, "reward_scale": 2.0, "reward_bias": -1.0,
    "target_noise": 0.6, "target_noise_clip": 0.5,
}  # fmt: skip
BOUNDS = (-2.5, 2.0)


@cache
def make(gaussian=False):
    """Networks, an agent, a batch, its bonuses."""
    variant = {"variant": "code" if gaussian else "paper"}
    args = td3.Args.exactly({"hidden": HIDDEN, "critic_hidden": HIDDEN} | variant)
    nets = td3.make_nets(SimpleNamespace(args=args, action_size=ACT))

    # Targets that differ from their networks, and biases that are not zero, so that a mix-up shows.
    def shift(tree, k):
        return jax.tree.map(lambda x: x + 0.5 * jax.random.normal(jax.random.PRNGKey(k + 7), x.shape), tree)

    @jax.jit
    def start():
        agent = td3.init_agent(nets, EXAMPLE, jax.random.PRNGKey(0))
        return td3.Agent(
            agent.actor.replace(params=shift(agent.actor.params, 0)),
            agent.critic.replace(params=shift(agent.critic.params, 1)),
            shift(agent.target_actor, 2),
            shift(agent.target_critic, 3),
        )

    rng = np.random.default_rng(0)
    batch = Transition(
        *(np.float32(x) for x in (
            rng.normal(size=(BATCH, OBS)), rng.uniform(-1, 1, (BATCH, ACT)), rng.normal(size=BATCH),
            rng.normal(size=(BATCH, OBS)), rng.integers(0, 2, BATCH),
        ))
    )  # fmt: skip
    return nets, start(), batch, np.float32(rng.uniform(0, 0.5, BATCH))


def noise_of(key):
    """What `td3.act` draws with this key for a batch."""
    return np.float64(jax.random.normal(key, (BATCH, ACT)))


def mean_action(actor, obs):
    return np.tanh(forward(actor["params"]["MLP_0"], obs))


def sampled_action(actor, obs, noise):
    """Of the code's variant, whose deviation, the same everywhere, is added before the squashing."""
    return np.tanh(
        forward(actor["params"]["MLP_0"], obs) + np.exp(actor["params"]["log_std_before_tanh"]) * noise
    )


def target_of(batch, hyper, bonus, agent, next_action):
    next_q = ensemble(agent.target_critic, batch.next_obs, next_action).min(axis=0)
    free = 2.0 * batch.reward - 1.0 + hyper.discount * batch.discount * next_q
    assert (free < BOUNDS[0]).any() and (free > BOUNDS[1]).any(), "bounds that bound nothing"
    return np.clip(free, *BOUNDS) + bonus


def check_critics(ours, metrics, agent, batch, target):
    def bellman(params):
        return np.mean(((ensemble(params, batch.obs, batch.action) - target) ** 2).sum(axis=0))

    np.testing.assert_allclose(metrics["critic_loss"], bellman(agent.critic.params), rtol=1e-4)
    np.testing.assert_allclose(metrics["q"], target.mean(), rtol=1e-4)
    mostly_close(ours.critic.params, descended(bellman, agent.critic.params, 3e-2))


def descended(loss, params, rate):
    """After Adam's first step."""
    return adam_first_step(params, gradient(loss, params), rate)


def moved(new, old):
    return jax.tree.map(lambda new, old: 0.1 * new + 0.9 * old, new, old)


def test_update_of_td3():
    nets, agent, batch, bonus = make()
    hyper, key = td3.Hyper(**SETTINGS, policy_every=1.0), jax.random.PRNGKey(5)
    ours, metrics = jax.jit(partial(td3.update, nets))(hyper, agent, batch, bonus, BOUNDS, key)
    agent, batch = double(agent), double(batch)

    noise = 0.6 * noise_of(jax.random.split(key)[0])
    action = mean_action(agent.target_actor, batch.next_obs) + np.clip(noise, -0.5, 0.5)
    assert (np.abs(noise) > 0.5).any() and (np.abs(action) > 1).any()
    check_critics(ours, metrics, agent, batch, target_of(batch, hyper, bonus, agent, np.clip(action, -1, 1)))

    def policy_loss(params, critic=double(ours.critic.params)):
        return -ensemble(critic, batch.obs, mean_action(params, batch.obs))[0].mean()

    q = ensemble(double(ours.critic.params), batch.obs, mean_action(agent.actor.params, batch.obs))
    assert 0 < np.mean(q[0] < q[1]) < 1, "the first critic should not be the least one everywhere"
    np.testing.assert_allclose(metrics["actor_loss"], policy_loss(agent.actor.params), rtol=1e-4)
    mostly_close(ours.actor.params, descended(policy_loss, agent.actor.params, 2e-2))
    mostly_close(ours.target_critic, moved(double(ours.critic.params), agent.target_critic))
    mostly_close(ours.target_actor, moved(double(ours.actor.params), agent.target_actor))


def test_update_of_what_ooo_calls_td3():
    """No delay, whatever --policy-every; samples in the target; the policy climbs both old critics."""
    nets, agent, batch, bonus = make(gaussian=True)
    hyper, key = td3.Hyper(**SETTINGS, policy_every=7.0), jax.random.PRNGKey(5)
    ours, metrics = jax.jit(partial(td3.update, nets))(hyper, agent, batch, bonus, BOUNDS, key)
    agent, batch = double(agent), double(batch)
    next_noise, noise = (noise_of(k) for k in jax.random.split(key))
    next_action = sampled_action(agent.actor.params, batch.next_obs, next_noise)
    check_critics(ours, metrics, agent, batch, target_of(batch, hyper, bonus, agent, next_action))

    def policy_loss(params):
        return -ensemble(agent.critic.params, batch.obs, sampled_action(params, batch.obs, noise)).mean()

    np.testing.assert_allclose(metrics["actor_loss"], policy_loss(agent.actor.params), rtol=1e-4)
    mostly_close(ours.actor.params, descended(policy_loss, agent.actor.params, 2e-2))
    mostly_close(ours.target_critic, moved(double(ours.critic.params), agent.target_critic))


@pytest.mark.parametrize("before", [0, 3 * 2**23])  # beyond 2^24 not all whole numbers are float32
def test_policy_and_targets_wait_for_their_turn(before):
    """With a delay of 3, two updates move the critics alone, and the third is Adam's first of the policy."""
    nets, agent, batch, bonus = make()
    opt = agent.critic.opt._replace(count=jnp.int32(before))
    agent = agent.replace(critic=agent.critic.replace(opt=opt))
    hyper = td3.Hyper(**SETTINGS, policy_every=3.0)
    step = jax.jit(lambda agent, key: td3.update(nets, hyper, agent, batch, bonus, BOUNDS, key)[0])
    seen = [agent]
    for key in jax.random.split(jax.random.PRNGKey(1), 6):
        seen.append(step(seen[-1], key))

    def same(part):
        """Whether each update left `part(agent)` as it was."""
        pairs = [[jax.tree.leaves(part(agent)) for agent in pair] for pair in pairwise(seen)]
        return [all(bool((x == y).all()) for x, y in zip(*pair)) for pair in pairs]

    slow = same(lambda agent: (agent.actor, agent.target_actor, agent.target_critic))
    assert slow == [True, True, False, True, True, False]
    assert not any(same(lambda agent: agent.critic.params))
    assert [int(a.critic.opt.count) for a in seen] == list(range(before, before + 7))
    assert [int(a.actor.opt.count) for a in seen] == [0, 0, 0, 1, 1, 1, 2]
    after, agent = seen[3], double(seen[2])

    def policy_loss(params, critic=double(after.critic.params)):
        return -ensemble(critic, double(batch).obs, mean_action(params, double(batch).obs))[0].mean()

    mostly_close(after.actor.params, descended(policy_loss, agent.actor.params, 2e-2))


def test_actions():
    key, (nets, agent, batch, _) = jax.random.PRNGKey(3), make()
    actor, obs = agent.actor.params, np.float64(batch.obs)
    mean, noise = mean_action(double(actor), obs), noise_of(key)
    np.testing.assert_allclose(td3.act(nets, actor, batch.obs), mean, atol=1e-5)
    noisy = np.clip(mean + 0.8 * noise, -1, 1)
    np.testing.assert_allclose(td3.act(nets, actor, batch.obs, key, 0.8), noisy, atol=1e-5)
    nets, agent, *_ = make(gaussian=True)
    actor = agent.actor.params
    np.testing.assert_allclose(td3.act(nets, actor, batch.obs), mean_action(double(actor), obs), atol=1e-5)
    sample = sampled_action(double(actor), obs, noise)
    np.testing.assert_allclose(td3.act(nets, actor, batch.obs, key, 0.8), sample, atol=1e-5)


@pytest.mark.parametrize("gaussian", [False, True])
def test_saved_policy_is_the_mean_action(tmp_path, gaussian):
    nets, agent, batch, _ = make(gaussian)
    policy.save(tmp_path / "policy.npz", td3.export(agent.actor.params), algo="td3")
    saved = policy.load(tmp_path / "policy.npz")
    actions = td3.act(nets, agent.actor.params, batch.obs)
    np.testing.assert_allclose(policy.act(saved, batch.obs), actions, atol=1e-5)


# --- on the probes ---


@pytest.mark.slow
def test_what_ooo_calls_td3_online_and_retrained_without_the_bonus(tmp_path):
    """With random offline rows in the buffer. The explorer's bonus keeps out of what is retrained."""
    steps = {"online_steps": 480, "retrain_steps": 1_600, "offline_steps": 0}
    args = {"env": "probe-all", "num_seeds": 2, "variant": "code", "intrinsic": "rnd", **steps}
    args |= {"dataset": random_rows(tmp_path / "rows.npz"), "runs_dir": str(tmp_path), "name": "it"}
    run = trained(td3, whole=False, **args)
    bonus = {
        phase: [
            float(r["value"])
            for r in rows_of(run.result.folder)
            if (r["phase"], r["metric"]) == (phase, "bonus")
        ]
        for phase in run.ended
    }
    assert min(bonus["online"][-2:]) > 0 and set(bonus["retrained"]) == {0.0}
    agents, actors = run.ended["retrained"]
    check(run.nets, agents, actors, run.act, (0.9, 0.9), "retrained")


# --- batches, and runs that diverge ---


def test_offline_rows_are_drawn_like_all_others_unless_told():
    def rows(value, n):
        return Transition(*(jnp.full((n, *shape), value) for shape in ((1,), (1,), (), (1,), ())))

    offline, ring = rows(1.0, 300), rows(0.0, 400)
    for ratio, expected in ((td3.Args.offline_ratio, 300 / 400), (0.25, 0.25), (1.0, 1.0)):
        draw = partial(td3.sample_batches, offline, ring, jnp.int32(100), ratio, (50, 64))
        batch = jax.jit(draw)(jax.random.PRNGKey(0))
        assert batch.reward.shape == (50, 64)
        np.testing.assert_allclose(batch.reward.mean(), expected, atol=0.03)


TINY = {
    "env": "point-mass-wall", "hidden": (8, 8), "critic_hidden": (8, 8), "num_seeds": 2, "batch_size": 16,
    "online_steps": 320, "random_steps": 0, "num_envs": 8, "utd_ratio": 0.125, "eval_episodes": 2,
    "name": "it",
}  # fmt: skip


@pytest.fixture(scope="module")
def exploded(tmp_path_factory):
    """A run whose second setting has values without a bound: a discount of 3, which --sweep else refuses.

    It acts well below its limit, and breaks in retraining. An episode has 150 steps that cost 1 each, and
    the limit is twice that.
    """
    place = tmp_path_factory.mktemp("exploded")
    fast = {"retrain_steps": 400, "policy_every": 1, "target_rate": 0.5, "critic_lr": 1e-2, "max_q": 2}
    args = td3.Args(**TINY, **fast, sweep=("discount=0.9,3",), runs_dir=str(place))
    with (place / "err").open("w") as stderr, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        patch.setattr(sweep, "bounds_of", lambda kind: {})
        td3.train(args)
    return place / "td3" / "point-mass-wall" / "it", (place / "err").read_text()


def test_a_run_whose_values_explode_is_named_and_the_others_go_on(exploded):
    folder, err = exploded
    result = json.loads((folder / "result.json").read_text())
    assert result["failed"].keys() == {"2", "3"} and set(result["phases"]) == {"online", "retrained"}
    for seed, line in enumerate(err.splitlines()):
        assert line.startswith(f"seed {seed} discount=3 stopped in retrained, step ")
        assert line.endswith("beyond 300, which is --max-q 2 times what rewards up to 1 allow")
        assert "diverged, the mean Q-value is " in line
        assert abs(float(line.split("is ")[1].split(",")[0])) > 300
    assert len(err.splitlines()) == 2
    for measure in result["phases"]["retrained"].values():
        assert [v is None for v in measure] == [False, False, True, True]
    assert all(v is not None for v in result["phases"]["online"]["return"])
    names = {f"{name}_seed{k}_discount=0.9.npz" for name in ("policy", "exploiter") for k in (0, 1)}
    assert {p.name for p in (folder / "policies").iterdir()} == names
    assert (folder / "figures" / "q.png").stat().st_size > 0 and list(folder.glob("broken_retrained_*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy_every": 0}, "--policy-every must be at least 1, not 0"),
        ({"policy_every": 1.5}, "--policy-every must be a whole number, not 1.5"),
        ({"policy_every": np.inf}, "--policy-every must be a whole number, not inf"),
        ({"sweep": ("policy-every=1,1.5",)}, "--policy-every must be a whole number, not 1.5"),
        ({"target_noise_clip": -1}, "--target-noise-clip must be at least 0, not -1"),
        ({"exploration_noise": np.nan}, "--exploration-noise must be a number, not nan"),
        (
            {"dataset": "own", "env": "probe-match-obs", "offline_steps": 10},
            "--offline-steps 10 needs --dataset; probe-match-obs has none of its own",
        ),
    ],
)
def test_what_cannot_run_says_why(changes, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        td3.train(td3.Args(**TINY | changes, runs_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())
