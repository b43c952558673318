"""PEX: the composite policy, its file and its update against NumPy in float64; offline it is IQL.

Also the probes, and how a policy is added.
"""

import json
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from numerics import adam_first_step, double, ensemble, forward, gradient, mostly_close
from training import trained

from ooo_rl import envs
from ooo_rl.algos import iql, pex
from ooo_rl.data import policy
from ooo_rl.data.buffer import Transition
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs.session import Static

OBS, ACT, BATCH, HIDDEN = 3, 2, 48, (5, 4)
HYPER = pex.Hyper(
    actor_lr=2e-2, critic_lr=3e-2, value_lr=1e-2, target_rate=0.1, reward_scale=2.0, reward_bias=-1.0,
    expectile=0.8, temperature=1.5, inverse_temperature=2.0,
)  # fmt: skip


def static_of(obs_size, action_size, **values):
    """The static part of a run with these settings."""
    args = pex.Args.exactly(values)
    env = envs.make(args.env) if args.env != "auto" else None
    nets = pex.make_nets(SimpleNamespace(args=args, env=env, action_size=action_size))
    obs, action, scalar = jnp.zeros(obs_size), jnp.zeros(action_size), jnp.float32(0)
    return Static(args, env, Transition(obs, action, scalar, obs, scalar), nets)


@pytest.fixture(scope="module")
def made():
    """The static part of a run, an agent, a frozen policy, a batch."""
    static = static_of(OBS, ACT, hidden=HIDDEN)

    # A target that differs from its critics, and biases that are not zero, so that a mix-up shows.
    def shift(tree, k):
        return jax.tree.map(lambda x: x + jax.random.normal(jax.random.PRNGKey(k + 3), x.shape), tree)

    @jax.jit
    def start():
        agent = pex.init_agent(static.nets, static.example, jax.random.PRNGKey(0))
        learners = {"actor": 0, "critic": 1, "value": 3}
        moved = {
            name: getattr(agent, name).replace(params=shift(getattr(agent, name).params, k))
            for name, k in learners.items()
        }
        agent = agent.replace(target_critic=shift(agent.target_critic, 2), **moved)
        return agent, shift(agent.actor.params, 9)

    agent, frozen = start()
    rng = np.random.default_rng(0)
    batch = Transition(
        *(np.float32(x) for x in (
            rng.normal(size=(BATCH, OBS)), rng.uniform(-1, 1, (BATCH, ACT)), rng.normal(size=BATCH),
            rng.normal(size=(BATCH, OBS)), rng.integers(0, 2, BATCH),
        ))
    )  # fmt: skip
    return static, agent, frozen, batch


def composite_of(agent, frozen, inverse_temperature):
    return pex.Composite(frozen, agent.actor.params, agent.critic.params, jnp.float32(inverse_temperature))


def mean_of(actor, obs):
    return np.tanh(forward(actor["params"]["MLP_0"], obs))


def std_of(actor):
    return np.exp(np.clip(actor["params"]["log_std"], -5, 2))


def candidates_of(composite, obs, noise):
    """Both policies' actions [2, ..., A], and the least Q of each [2, ...]."""
    new = composite.new
    sample = mean_of(new, obs) + std_of(new) * noise
    actions = np.stack([np.broadcast_to(mean_of(composite.frozen, obs), sample.shape), sample])
    obs = np.broadcast_to(obs, (*sample.shape[:-1], obs.shape[-1]))
    return actions, np.stack([ensemble(composite.critic, obs, action).min(axis=0) for action in actions])


def test_the_better_mean_without_a_key(made):
    static, agent, frozen, batch = made
    composite = composite_of(agent, frozen, 10.0)
    ours = pex.choose(static.nets, composite, batch.obs)
    actions, q = candidates_of(double(composite), np.float64(batch.obs), 0.0)
    better = q.argmax(axis=0)
    assert 0 < better.mean() < 1
    np.testing.assert_allclose(ours, np.where(better[:, None], actions[1], actions[0]), atol=1e-5)


@pytest.mark.parametrize("inverse_temperature", [0.0, 2.0])
def test_choices_follow_the_softmax(made, inverse_temperature):
    """Actions are of one policy or the other, in the shares that the softmax of the least Q gives."""
    static, agent, frozen, batch = made
    composite = composite_of(agent, frozen, inverse_temperature)
    keys = jax.random.split(jax.random.PRNGKey(1), 2_000)
    ours = np.asarray(jax.jit(jax.vmap(partial(pex.choose, static.nets, composite, batch.obs)))(keys))
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.split(key)[0], (BATCH, ACT)))(keys)
    composite, obs = double(composite), np.float64(batch.obs)
    actions, q = candidates_of(composite, obs, np.float64(noise))
    old = np.abs(ours - mean_of(composite.frozen, obs)).max(axis=-1) < 1e-5
    np.testing.assert_allclose(ours, np.where(old[..., None], actions[0], actions[1]), atol=1e-5)
    expected = (1 / (1 + np.exp(inverse_temperature * (q[1] - q[0])))).mean(axis=0)
    assert inverse_temperature == 0 or np.ptp(expected) > 0.5
    np.testing.assert_allclose(old.mean(axis=0), expected, atol=4 * 0.5 / len(keys) ** 0.5)


def drawn_key(noise):
    """The key with which a saved JAX function samples, where an MLP would add this noise."""
    return jax.random.PRNGKey(noise.view(np.uint32).sum(dtype=np.uint32))


def test_the_saved_composite_policy_chooses_as_it_does(made, tmp_path):
    """Means and clipped samples, of any number of observations; alone and under vmap, as episodes are."""
    static, agent, frozen, batch = made
    composite, obs = composite_of(agent, frozen, 2.0), batch.obs
    choose = jax.jit(partial(pex.choose, static.nets, composite))
    policy.save(tmp_path / "policy.npz", pex.export(static, composite), algo="pex")
    saved = policy.load(tmp_path / "policy.npz")
    assert policy.policy_sizes(saved) == (OBS, ACT)
    means = choose(obs)
    np.testing.assert_allclose(policy.act(saved, obs), means, atol=1e-6)
    np.testing.assert_allclose(policy.act(saved, obs[0]), means[0], atol=1e-6)
    folded = policy.act(saved, obs.reshape(4, -1, OBS))
    np.testing.assert_allclose(folded.reshape(BATCH, ACT), means, atol=1e-6)

    noise = np.random.default_rng(3).standard_normal((BATCH, ACT))
    sample = policy.act(saved, obs, np.random.default_rng(3))
    drawn = choose(obs, drawn_key(noise))
    assert np.abs(drawn).max() > 1
    np.testing.assert_allclose(sample, np.clip(drawn, -1, 1), atol=1e-6)
    old = np.abs(sample - mean_of(frozen, obs)).max(axis=-1) < 1e-5
    assert 0 < old.mean() < 1, "samples of both policies"

    rows, noise = obs[:5], np.float32(noise[:5])
    ours = jax.jit(jax.vmap(lambda obs, noise: policy.forward(saved, obs, noise, jnp)))(rows, noise)
    alone = [choose(row[None], drawn_key(own))[0] for row, own in zip(rows, noise)]
    np.testing.assert_allclose(ours, np.clip(alone, -1, 1), atol=1e-6)
    with pytest.raises(ValueError, match="takes observations"):
        policy.act(saved, obs[:, :1])


def test_its_two_policies_are_saved_as_mlps(made, tmp_path):
    static, agent, frozen, batch = made
    for name, actor in (("frozen", frozen), ("new", agent.actor.params)):
        policy.save(tmp_path / f"{name}.npz", pex.export(static, actor))
        saved, obs = policy.load(tmp_path / f"{name}.npz"), np.float64(batch.obs)
        np.testing.assert_allclose(policy.act(saved, obs), mean_of(double(actor), obs), atol=1e-5)
        np.testing.assert_allclose(np.exp(saved["log_std"]), std_of(actor), rtol=1e-5)


def test_update_with_composite_actions(made):
    static, agent, frozen, batch = made
    key = jax.random.PRNGKey(5)
    ours, metrics = jax.jit(partial(pex.expanded_update, static))(HYPER, agent, frozen, batch, key)
    as_iql, _ = jax.jit(partial(pex.update, static.nets))(HYPER, agent, batch, key)
    for name in ("critic", "target_critic", "value"):  # test_losses.py holds IQL's update against NumPy
        close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, getattr(ours, name), getattr(as_iql, name))

    composite = composite_of(agent, frozen, HYPER.inverse_temperature)
    chosen = pex.choose(static.nets, composite, batch.obs, jax.random.split(key)[0])
    actor, target_critic, batch, chosen = double((agent.actor.params, agent.target_critic, batch, chosen))
    value = forward(double(as_iql.value.params)["params"]["MLP_0"], batch.obs)[..., 0]
    adv = ensemble(target_critic, batch.obs, chosen).min(axis=0) - value
    weight = np.exp(1.5 * adv)
    assert (weight > 100).any() and (weight < 100).any()
    np.testing.assert_allclose(metrics["adv"], adv.mean(), rtol=1e-3)

    def policy_loss(params):
        std = std_of(params)
        noise = (chosen - mean_of(params, batch.obs)) / std
        log_prob = -0.5 * noise**2 - np.log(std) - 0.5 * np.log(2 * np.pi)
        return -np.mean(np.minimum(weight, 100) * log_prob.sum(axis=-1))

    np.testing.assert_allclose(metrics["actor_loss"], policy_loss(actor), rtol=1e-3)
    mostly_close(ours.actor.params, adam_first_step(actor, gradient(policy_loss, actor), 2e-2))


def test_update_with_the_batchs_actions_is_iqls(made):
    static, agent, frozen, batch = made
    static = static._replace(args=pex.Args.exactly({"policy_actions": "buffer"}))
    key = jax.random.PRNGKey(5)
    ours, _ = jax.jit(partial(pex.expanded_update, static))(HYPER, agent, frozen, batch, key)
    theirs, _ = jax.jit(partial(iql.update, static.nets))(HYPER, agent, batch, key)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs))


# --- whole runs ---

TINY = {
    "env": "point-mass-wall", "hidden": (8, 8), "num_seeds": 2, "batch_size": 16, "offline_steps": 40,
    "online_steps": 320, "num_envs": 8, "utd_ratio": 0.125, "eval_episodes": 2, "name": "it",
}  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Folders of a tiny run of PEX, which learns from the 161st step on, and of IQL's offline part."""
    place = str(tmp_path_factory.mktemp("pex"))
    ours = pex.train(pex.Args(**TINY, learning_starts=160, runs_dir=place))
    theirs = trained(iql, whole=False, **TINY | {"online_steps": 0}, runs_dir=place).result
    return ours.folder, theirs.folder


def lines_of(folder, phase):
    return [
        line for line in (folder / "metrics.csv").read_text().splitlines() if line.startswith(f"{phase},")
    ]


def test_offline_it_is_iql(ran):
    """But for rounding: XLA makes two programs of the same update, and some processors round them differently."""
    ours, theirs = ([line.rsplit(",", 1) for line in lines_of(folder, "offline")] for folder in ran)
    assert any(",eval/return" in name for name, _ in ours)
    ours = [(name, value) for name, value in ours if ",eval/" not in name]
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    values = [np.array([float(value) for _, value in lines]) for lines in (ours, theirs)]
    np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-7)


def test_nothing_is_learnt_before_learning_starts(ran):
    lines = [line.split(",") for line in lines_of(ran[0], "online") if ",0,,critic_loss," in line]
    losses = {int(line[1]): float(line[-1]) for line in lines}
    assert losses.keys() == {240, 320} and min(losses.values()) > 0


def test_actions_are_stored_as_they_were_drawn(ran):
    actions = checkpoint_of(ran[0])["ring"]["action"]
    assert actions.shape == (2, 320, 2)
    assert 0.05 < (np.abs(actions) > 1).any(axis=-1).mean() < 0.95


def test_the_offline_policy_is_frozen_and_a_new_one_added(ran):
    state = checkpoint_of(ran[0])
    static = static_of(2, 2, hidden=(8, 8))
    obs = np.random.default_rng(0).uniform(0, 1, (20, 2)).astype(np.float32)
    trained = state["agent"]["actor"], state["agent"]["critic"]
    for seed in (0, 1):
        frozen, new, critic = (
            jax.tree.map(lambda x, k=seed: x[k], part)
            for part in (state["frozen"], *(learner["params"] for learner in trained))
        )
        for name, actor in (("frozen", frozen), ("new", new)):
            saved = policy.load(ran[0] / "policies" / f"{name}_seed{seed}.npz")
            np.testing.assert_allclose(policy.act(saved, obs), pex.act(static.nets, actor, obs), atol=1e-5)
        assert np.abs(pex.act(static.nets, frozen, obs) - pex.act(static.nets, new, obs)).max() > 1e-2
        composite = pex.Composite(frozen, new, critic, jnp.float32(10.0))
        saved = policy.load(ran[0] / "policies" / f"policy_seed{seed}.npz")
        np.testing.assert_allclose(policy.act(saved, obs), pex.choose(static.nets, composite, obs), atol=1e-5)
    counts = [learner["opt"]["count"] for learner in trained]
    assert (counts[0] == 20).all() and (counts[1] == 60).all()


def checkpoint_of(folder):
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        what = ocp.args.Composite(state=ocp.args.StandardRestore())
        return manager.restore(manager.latest_step(), args=what)["state"]


def test_expansion_starts_from_random_parameters_and_keeps_all_else():
    sizes = {"num_envs": 2, "online_steps": 16, "hidden": (4, 4)}
    static = static_of(1, 1, env="probe-match-obs", dataset="none", **sizes)
    first = jax.jit(partial(pex.init_state, static))(jax.random.PRNGKey(0))
    used = jax.tree.map(lambda x: x + 1, first.agent.actor)
    state = first.replace(agent=first.agent.replace(actor=used))
    after = jax.jit(partial(pex.expand, static))(state)
    same = partial(jax.tree.map, np.testing.assert_array_equal)
    same(after.frozen, state.agent.actor.params)
    same(after.agent.replace(actor=0), state.agent.replace(actor=0))
    same((after.env_state, after.ring), (state.env_state, state.ring))
    assert not any(np.any(x) for x in jax.tree.leaves(after.agent.actor.opt))
    kernels = [s.actor.params["params"]["MLP_0"]["Dense_0"]["kernel"] for s in (after.agent, first.agent)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1, "the new policy starts elsewhere than the old one did"


def test_phases_of_the_result(ran):
    result = json.loads((ran[0] / "result.json").read_text())
    assert result["failed"] == {}
    assert all(len(result["phases"][phase]["return"]) == 2 for phase in ("offline", "online"))


def test_what_cannot_run_says_why(tmp_path):
    with pytest.raises(UsageError, match="--learning-starts must be at least 0, not -1"):
        pex.train(pex.Args(**TINY, learning_starts=-1, runs_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())
