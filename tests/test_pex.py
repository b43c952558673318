"""PEX: the composite policy and its update against plain NumPy in float64; offline it is IQL to the bit; probes; how a policy is added."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from numerics import adam_first_step, double, ensemble, forward, gradient, mostly_close
from probing import KNOWN, PROBES, SEEDS, STEPS, Probing, random_data, settings, state_value

from algos import iql, pex
from data import cli, policy
from data.buffer import Transition

OBS, ACT, BATCH, HIDDEN = 3, 2, 48, (5, 4)
HYPER = pex.Hyper(
    actor_lr=2e-2, critic_lr=3e-2, value_lr=1e-2, target_rate=0.1, reward_scale=2.0, reward_bias=-1.0, expectile=0.8, temperature=1.5,
    inverse_temperature=2.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def made():
    """Networks, an agent, a frozen policy, a batch."""
    nets = pex.Nets(pex.Actor(HIDDEN, ACT), pex.Critic(HIDDEN), pex.Value(HIDDEN))
    agent = pex.init_agent(nets, OBS, jax.random.PRNGKey(0))
    # A target that differs from its critics, and biases that are not zero, so that a mix-up shows.
    shift = lambda tree, k: jax.tree.map(lambda x: x + jax.random.normal(jax.random.PRNGKey(k + 3), x.shape), tree)  # noqa: E731
    names = ("actor", "critic", "target_critic", "value")
    agent = agent.replace(**{name: shift(getattr(agent, name), k) for k, name in enumerate(names)})
    rng = np.random.default_rng(0)
    batch = Transition(
        *(np.float32(x) for x in (
            rng.normal(size=(BATCH, OBS)), rng.uniform(-1, 1, (BATCH, ACT)), rng.normal(size=BATCH),
            rng.normal(size=(BATCH, OBS)), rng.integers(0, 2, BATCH),
        ))
    )  # fmt: skip
    return nets, agent, shift(agent.actor, 9), batch


def mean_of(actor, obs):
    return np.tanh(forward(actor["params"]["MLP_0"], obs))


def std_of(actor):
    return np.exp(np.clip(actor["params"]["log_std"], -5, 2))


def candidates_of(frozen, new, critic, obs, noise):
    """Both policies' actions [2, B, A], and the least Q of each [2, B]."""
    actions = np.stack([mean_of(frozen, obs), np.clip(mean_of(new, obs) + std_of(new) * noise, -1, 1)])
    return actions, np.stack([ensemble(critic, obs, action).min(axis=0) for action in actions])


def noise_of(key):
    return np.float64(jax.random.normal(key, (BATCH, ACT)))


def test_the_better_mean_without_a_key(made):
    nets, agent, frozen, batch = made
    ours = pex.choose(nets, pex.Composite(frozen, agent.actor, agent.critic, jnp.float32(10.0)), batch.obs)
    agent, frozen = double(agent), double(frozen)
    actions, q = candidates_of(frozen, agent.actor, agent.critic, np.float64(batch.obs), 0.0)
    better = q.argmax(axis=0)
    assert 0 < better.mean() < 1
    np.testing.assert_allclose(ours, np.where(better[:, None], actions[1], actions[0]), atol=1e-5)


@pytest.mark.parametrize("inverse_temperature", [0.0, 2.0])
def test_choices_follow_the_softmax(made, inverse_temperature):
    """Actions are of one policy or the other, and the shares of both over many keys are those of the softmax of the least Q."""
    nets, agent, frozen, batch = made
    composite = pex.Composite(frozen, agent.actor, agent.critic, jnp.float32(inverse_temperature))
    keys = jax.random.split(jax.random.PRNGKey(1), 2_000)
    ours = np.asarray(jax.jit(jax.vmap(partial(pex.choose, nets, composite, batch.obs)))(keys))
    agent, frozen, obs = double(agent), double(frozen), np.float64(batch.obs)
    old = np.abs(ours - mean_of(frozen, obs)).max(axis=-1) < 1e-5
    expected = np.zeros(BATCH)
    for k, key in enumerate(keys):
        actions, q = candidates_of(frozen, agent.actor, agent.critic, obs, noise_of(jax.random.split(key)[0]))
        np.testing.assert_allclose(ours[k], np.where(old[k][:, None], actions[0], actions[1]), atol=1e-5)
        expected += 1 / (1 + np.exp(inverse_temperature * (q[1] - q[0]))) / len(keys)
    told = np.abs(mean_of(frozen, obs)).max(axis=-1) < 0.99  # where clipped samples cannot be taken for the mean
    assert told.sum() > 10 and (inverse_temperature == 0 or np.ptp(expected[told]) > 0.5)
    np.testing.assert_allclose(old.mean(axis=0)[told], expected[told], atol=4 * 0.5 / len(keys) ** 0.5)


def test_update_with_composite_actions(made):
    nets, agent, frozen, batch = made
    key = jax.random.PRNGKey(5)
    args = pex.Args(policy_actions="composite")
    ours, metrics = jax.jit(partial(pex.update_expanded, args, nets))(HYPER, agent, frozen, batch, key)
    as_iql, _ = jax.jit(partial(pex.update, nets))(HYPER, agent, batch, key)
    for name in ("critic", "target_critic", "value", "critic_opt", "value_opt"):  # test_losses.py holds IQL's update against NumPy
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), getattr(ours, name), getattr(as_iql, name))

    chosen = pex.choose(
        nets, pex.Composite(frozen, agent.actor, agent.critic, HYPER.inverse_temperature), batch.obs, jax.random.split(key)[0]
    )
    agent, batch, chosen = double(agent), double(batch), np.float64(chosen)
    value = forward(double(as_iql.value)["params"]["MLP_0"], batch.obs)[..., 0]
    adv = ensemble(agent.target_critic, batch.obs, chosen).min(axis=0) - value
    weight = np.exp(1.5 * adv)
    assert (weight > 100).any() and (weight < 100).any()
    np.testing.assert_allclose(metrics["adv"], adv.mean(), rtol=1e-3)

    def policy_loss(params):
        std = std_of(params)
        log_prob = -0.5 * ((chosen - mean_of(params, batch.obs)) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
        return -np.mean(np.minimum(weight, 100) * log_prob.sum(axis=-1))

    np.testing.assert_allclose(metrics["actor_loss"], policy_loss(agent.actor), rtol=1e-3)
    mostly_close(ours.actor, adam_first_step(agent.actor, gradient(policy_loss, agent.actor), 2e-2))


def test_update_with_the_batchs_actions_is_iqls(made):
    nets, agent, frozen, batch = made
    args, key = pex.Args(policy_actions="buffer"), jax.random.PRNGKey(5)
    ours, _ = jax.jit(partial(pex.update_expanded, args, nets))(HYPER, agent, frozen, batch, key)
    theirs, _ = jax.jit(partial(iql.update, nets))(HYPER, agent, batch, key)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs))


# --- on the probes ---

IQL = {"value_lr": 3e-3, "expectile": 0.98, "temperature": 20.0}
ONLINE = {"online_steps": 8 * STEPS, "offline_steps": 0, "num_envs": 8, "utd_ratio": 0.125, "learning_starts": 800}


def check_composite(probing):
    """As `Probing.check`, for the policy that is evaluated."""
    obs, values, actions = KNOWN[probing.args.env]
    obs = jnp.float32(obs)[:, None]
    for seed in range(SEEDS):
        agent, frozen = jax.tree.map(lambda x, seed=seed: x[seed], (probing.state.agent, probing.state.frozen))
        np.testing.assert_allclose(state_value(probing.setup, agent, obs), values, atol=0.12)
        if actions is not None:
            composite = pex.Composite(frozen, agent.actor, agent.critic, 10.0)
            np.testing.assert_allclose(pex.choose(probing.setup.nets, composite, obs)[:, 0], actions, atol=0.2)


@pytest.mark.parametrize("name", PROBES)
def test_online(name):
    """From scratch: the frozen policy is random, so the composite one must come to prefer the new one."""
    probing = Probing(pex, settings(pex, name, IQL, **ONLINE))
    probing.run("finetune", STEPS)
    check_composite(probing)


@pytest.mark.parametrize("name", PROBES)
def test_offline(name):
    probing = Probing(pex, settings(pex, name, IQL, online_steps=0, offline_steps=STEPS, actor_decay="none"), random_data(name))
    probing.run("pretrain", STEPS)
    probing.check(probing.state.agent, state_value)


# --- whole runs ---

TINY = (
    "--env point-mass-wall --hidden 8 8 --num-seeds 2 --batch-size 16 --offline-steps 40 --online-steps 320 --num-envs 8 "
    "--utd-ratio 0.125 --eval-episodes 2 --name it"
)


def run(script, place, *flags):
    """Folder of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, *TINY.split(), *flags, "--runs-dir", str(place)])
        script.main()
    return place / script.__name__.split(".")[-1] / "point-mass-wall" / "it"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run of PEX and one of IQL with equal settings; PEX learns online from the 161st environment step on."""
    place = tmp_path_factory.mktemp("pex")
    return run(pex, place, "--learning-starts", "160"), run(iql, place)


def lines_of(folder, phase):
    return [line for line in (folder / "metrics.csv").read_text().splitlines() if line.startswith(f"{phase},")]


def test_offline_it_is_iql_to_the_bit(ran):
    ours, theirs = (lines_of(folder, "offline") for folder in ran)
    assert any(",eval/return," in line for line in ours)
    assert ours == theirs


def test_nothing_is_learnt_before_learning_starts(ran):
    losses = {int(line.split(",")[1]): float(line.split(",")[-1]) for line in lines_of(ran[0], "online") if ",0,,critic_loss," in line}
    assert losses.keys() == {80, 160, 240, 320}
    assert losses[80] == losses[160] == 0 and losses[240] > 0 and losses[320] > 0


def test_the_offline_policy_is_frozen_and_a_new_one_added(ran):
    state = checkpoint_of(ran[0])
    nets = pex.Nets(pex.Actor((8, 8), 2), pex.Critic((8, 8)), pex.Value((8, 8)))
    obs = np.random.default_rng(0).uniform(0, 1, (20, 2)).astype(np.float32)
    for seed in (0, 1):
        frozen, new = (
            {"params": jax.tree.map(lambda x, k=seed: x[k], actor["params"])} for actor in (state["frozen"], state["agent"]["actor"])
        )
        for name, actor in (("frozen", frozen), ("new", new)):
            saved = policy.load(ran[0] / "policies" / f"{name}_seed{seed}.npz")
            np.testing.assert_allclose(policy.act(saved, obs), pex.act(nets, actor, obs), atol=1e-5)
        assert np.abs(pex.act(nets, frozen, obs) - pex.act(nets, new, obs)).max() > 1e-2
    assert (state["agent"]["actor_opt"]["count"] == 20).all() and (state["agent"]["critic_opt"]["count"] == 60).all()


def checkpoint_of(folder):
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]


def test_expansion_starts_from_random_parameters_and_keeps_all_else():
    args = pex.Args(env="probe-match-obs", num_envs=2, online_steps=16, hidden=(4, 4), dataset="none")
    setup = pex.make_setup(args, None)
    first = jax.jit(partial(pex.init_state, setup))(jax.random.PRNGKey(0))
    used = jax.tree.map(lambda x: x + 1, (first.agent.actor, first.agent.actor_opt))
    state = first.replace(agent=first.agent.replace(actor=used[0], actor_opt=used[1]))
    after = jax.jit(partial(pex.expand, setup))(state)
    same = partial(jax.tree.map, np.testing.assert_array_equal)
    same(after.frozen, state.agent.actor)
    same(after.agent.replace(actor=0, actor_opt=0), state.agent.replace(actor=0, actor_opt=0))
    assert not any(np.any(x) for x in jax.tree.leaves(after.agent.actor_opt))
    kernels = [s.actor["params"]["MLP_0"]["Dense_0"]["kernel"] for s in (after.agent, first.agent)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1, "the new policy starts elsewhere than the old one did"


def test_phases_of_the_result(ran):
    result = json.loads((ran[0] / "result.json").read_text())
    assert result["failed"] == {} and all(len(result["phases"][phase]["return"]) == 2 for phase in ("offline", "online"))


def test_what_cannot_run_says_why(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["pex", *TINY.split(), "--learning-starts", "-1", "--runs-dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.guarded(pex.main)
    assert "--learning-starts must be at least 0, not -1" in capsys.readouterr().err and not list(tmp_path.iterdir())
