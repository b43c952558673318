"""Fitted Q evaluation of policies whose values are known by hand; its command; what it refuses."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ooo_rl.data import policy
from ooo_rl.data.buffer import Transition
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs import fqe

QUICK = {
    "num_seeds": 2,
    "lr": 3e-3,
    "hidden": (32, 32),
    "discount": 0.8,
    "batch_size": 64,
    "target_every": 20,
}


def constant(action, log_std=None):
    """The policy that always plays `action`."""
    weights = [(np.zeros((1, 1)), np.arctanh([action]))]
    return policy.mlp(weights, output="tanh_mean", log_std=log_std)


def walks(n=4_000):
    """Two steps from 0 to 1 to the end, by random actions; the reward is the action at 0, and 1 less it at 1.

    Every other episode is cut off after its first step.
    """
    rng = np.random.default_rng(0)
    action = np.float32(rng.uniform(-1, 1, (n, 1)))
    obs = np.float32(np.arange(n) % 3 == 1)[:, None]
    episode = np.arange(n) // 3 * 2 + (np.arange(n) % 3 == 2)
    reward = np.where(obs == 0, action, 1 - action)[:, 0]
    rows = Transition(obs, action, reward, np.float32(obs + 1), np.float32(obs[:, 0] == 0))
    return SimpleNamespace(discrete=False, transitions=rows, episode=np.int32(episode), card={"id": "walks"})


@pytest.mark.parametrize("action", [0.5, -0.5])
def test_values_of_two_policies_on_the_same_rows(action):
    """action + 0.8 (1 - action), though the rows are of neither policy; Q knows other actions, too."""
    seen = []
    settings = fqe.Settings(**QUICK, steps=1_000)
    found = fqe.fitted_q(constant(action), walks(), settings, lambda *looked: seen.append(looked))
    np.testing.assert_allclose(found.values, action + 0.8 * (1 - action), atol=0.06)
    assert [steps for steps, _ in seen] == list(range(100, 1_001, 100)) and found.history[-1][0] == 1_000
    obs, other = np.zeros((2, 1), np.float32), np.float32([[0.9], [-0.9]])
    np.testing.assert_allclose(found.q(obs, other), [other[:, 0] + 0.8 * (1 - action)] * 2, atol=0.1)


def test_samples_and_scaled_rewards():
    """Rewards a^2 of samples with deviation 0.5 around 0: the mean is their variance, 0 for the mean action."""
    data = walks()
    action = data.transitions.action[:, 0]
    data.transitions = Transition(
        np.zeros_like(data.transitions.obs), data.transitions.action, action**2, data.transitions.obs,
        np.zeros(len(action), np.float32),
    )  # fmt: skip
    values = []
    for sample in (False, True):
        settings = fqe.Settings(**QUICK, steps=600, sample=sample, reward_scale=2.0, reward_bias=0.5)
        values.append(fqe.fitted_q(constant(0.0, np.log([0.5])), data, settings).values.mean())
    np.testing.assert_allclose(values, [0.5, 0.5 + 2 * 0.5**2], atol=0.12)  # clipped samples: a little less


def test_the_target_is_renewed_when_it_is_told():
    """Without a renewal Q' stays near 0, where it began."""
    settings = fqe.Settings(**QUICK | {"target_every": 10_000}, steps=600)
    np.testing.assert_allclose(fqe.fitted_q(constant(0.5), walks(), settings).values, 0.5, atol=0.1)


def test_what_does_not_fit_is_refused():
    wide, one = policy.mlp([(np.zeros((2, 1)), np.zeros(1))]), constant(0.5)
    numbers = policy.mlp([(np.zeros((1, 1)), np.zeros(1))], output="argmax")
    for saved, settings, words in (
        (wide, {}, "walks has 1 observations and 1 actions, but the policy takes 2 and gives 1"),
        (numbers, {}, "fitted Q evaluation is for continuous actions"),
        (one, {"steps": 0}, "--steps must be at least 1, not 0"),
        (one, {"sample": True}, "--sample: this policy has no standard deviation to sample with"),
        (one, {"seed": 2**32 - 1, "num_seeds": 2}, "--seed 4294967295 with --num-seeds 2 goes beyond"),
    ):
        with pytest.raises(UsageError, match=words):
            fqe.fitted_q(saved, walks(), fqe.Settings(**settings))


def test_the_command(tmp_path):
    rows = walks(600).transitions
    names = "observations", "actions", "rewards", "next_observations", "terminals"
    parts = rows.obs, rows.action, rows.reward, rows.next_obs, rows.discount == 0
    np.savez(tmp_path / "walks.npz", **dict(zip(names, parts)))
    policy.save(tmp_path / "policy.npz", constant(0.5))
    flags = "--policy policy.npz --dataset walks.npz --steps 20 --num-seeds 2 --hidden 8"
    done = [
        subprocess.run(
            [sys.executable, fqe.__file__, *words.split()], cwd=tmp_path, capture_output=True, text=True
        )
        for words in (flags, flags.replace("policy.npz", "other.npz"), f"{flags} --discount 2")
    ]
    assert done[0].returncode == 0, done[0].stderr
    headings = [line for line in done[0].stdout.splitlines() if line.startswith("gradient steps, then")]
    assert len(headings) == 1
    steps, *values = done[0].stdout.splitlines()[-1].split()
    assert steps == "20" and len(values) == 2 and np.isfinite(np.float64(values)).all()
    assert done[1].returncode == 2 and done[1].stderr == "error: --policy other.npz: there is no such file\n"
    assert done[2].returncode == 2 and done[2].stderr == "error: --discount must be below 1, not 2.0\n"
    assert "gradient steps, then" not in done[2].stdout
