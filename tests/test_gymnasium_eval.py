"""Evaluation in Gymnasium environments: the numbers are those of a plain loop, and of the published
policies."""

import pathlib
import subprocess
import sys

import gymnasium
import numpy as np
import pytest

from ooo_rl.data import policy
from ooo_rl.envs import gymnasium_eval

SHARED = pathlib.Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(
    not (SHARED / "policies").is_dir(), reason="the shared policies are not beside this project"
)
needs_robotics = pytest.mark.skipif(
    gymnasium_eval.gymnasium_robotics is None, reason="gymnasium_robotics is not installed"
)


def swing(gain):
    """A controller of Pendulum-v1 with actions in [-1, 1] that differ with the observation."""
    return lambda obs: gain * np.sin(3 * obs[..., 2:]) * np.sign(obs[..., :1])


def test_returns_are_those_of_a_plain_loop_with_actions_mapped_to_the_box():
    found = gymnasium_eval.evaluate("Pendulum-v1", swing(0.7), num_episodes=3, seed=5)
    assert found["return"].shape == found["success"].shape == found["length"].shape == (1, 3)
    seeds = np.random.SeedSequence(5).generate_state(3)
    for episode in range(3):
        env = gymnasium.make("Pendulum-v1")
        (obs, _), total, over = env.reset(seed=int(seeds[episode])), 0.0, False
        while not over:
            # The box is [-2, 2]: the map is a factor of 2.
            obs, reward, terminated, truncated, _ = env.step((2 * swing(0.7)(obs)).astype(np.float32))
            total, over = total + reward, terminated or truncated
        assert found["return"][0, episode] == pytest.approx(total, rel=1e-6)
    assert (found["length"] == 200).all() and (found["success"] == 0).all()


def test_policies_act_at_once_and_each_as_if_alone():
    gains, calls = np.array([0.0, 0.4, 1.0])[:, None, None], []

    def act(obs):
        calls.append(obs.shape)
        return gains * np.sin(3 * obs[..., 2:]) * np.sign(obs[..., :1])

    together = gymnasium_eval.evaluate("Pendulum-v1", act, num_episodes=2, seed=0, num_policies=3)
    assert calls == [(3, 2, 3)] * 200
    for i in range(3):
        alone = gymnasium_eval.evaluate("Pendulum-v1", swing(gains[i, 0, 0]), num_episodes=2, seed=0)
        np.testing.assert_array_equal(together["return"][i], alone["return"][0])
    assert len(np.unique(together["return"])) == 6


def test_actions_outside_are_clipped_to_the_box():
    full = gymnasium_eval.evaluate("Pendulum-v1", lambda obs: np.ones((*obs.shape[:-1], 1)), 2, 0)
    beyond = gymnasium_eval.evaluate("Pendulum-v1", lambda obs: np.full((*obs.shape[:-1], 1), 7.0), 2, 0)
    np.testing.assert_array_equal(full["return"], beyond["return"])


def test_a_diverged_policy_gets_nan_and_leaves_the_others_alone():
    def act(obs):
        action = swing(0.7)(obs)
        action[1] = np.nan
        return action

    found = gymnasium_eval.evaluate("Pendulum-v1", act, num_episodes=2, seed=0, num_policies=2)
    alone = gymnasium_eval.evaluate("Pendulum-v1", swing(0.7), num_episodes=2, seed=0)
    np.testing.assert_array_equal(found["return"][0], alone["return"][0])
    assert np.isnan(found["return"][1]).all() and (found["length"][1] == 0).all()


class Corridor(gymnasium.Env):
    """Walk right; a success is passed on the way, and episodes end at different times."""

    observation_space, action_space = (
        gymnasium.spaces.Box(-9, 9, (1,)),
        gymnasium.spaces.Box(np.float32([0.0]), np.float32([4.0])),
    )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = np.float32([self.np_random.uniform(0, 1)])
        return self.x, {}

    def step(self, action):
        self.x = self.x + action / 4
        return self.x, 1.0, bool(self.x[0] > 5), False, {self.key: np.array(2 < self.x[0] < 3)}


@pytest.mark.parametrize("key", gymnasium_eval.SUCCESS_KEYS)
def test_episodes_end_each_at_its_time_and_success_counts_at_any_step(monkeypatch, key):
    monkeypatch.setattr(Corridor, "key", key, raising=False)
    spec = gymnasium.envs.registration.EnvSpec("Corridor-v0", Corridor, max_episode_steps=12)
    monkeypatch.setitem(gymnasium.registry, "Corridor-v0", spec)
    assert gymnasium_eval.check("Corridor-v0") == (1, 1, 12, False)
    speed = np.array([1.0, 0.0, -1.0])[:, None, None]  # 1, 1/2 and 0 to the right per step
    found = gymnasium_eval.evaluate(
        "Corridor-v0", lambda obs: speed + 0 * obs, num_episodes=4, seed=0, num_policies=3
    )
    assert (found["length"][0] == 5).all() and (found["length"][2] == 12).all()
    assert set(found["length"][1]) <= {9, 10}
    np.testing.assert_array_equal(found["return"], found["length"])
    np.testing.assert_array_equal(found["success"], [[1] * 4, [1] * 4, [0] * 4])


class Turnstile(gymnasium.Env):
    """Actions are 3, 4 and 5; the reward is the action."""

    observation_space = gymnasium.spaces.Box(0, 1, (1,))
    action_space = gymnasium.spaces.Discrete(3, start=3)

    def reset(self, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return np.zeros(1, np.float32), float(action), False, False, {}


def test_discrete_actions_are_numbers_from_0_on(monkeypatch):
    spec = gymnasium.envs.registration.EnvSpec("Turnstile-v0", Turnstile, max_episode_steps=4)
    monkeypatch.setitem(gymnasium.registry, "Turnstile-v0", spec)
    assert gymnasium_eval.check("Turnstile-v0") == (1, 3, 4, True)
    choice = np.array([[0], [2]])
    found = gymnasium_eval.evaluate(
        "Turnstile-v0",
        lambda obs: choice + 0 * obs[..., 0].astype(int),
        num_episodes=2,
        seed=0,
        num_policies=2,
    )
    np.testing.assert_array_equal(found["return"], [[12, 12], [20, 20]])
    assert (found["length"] == 4).all()


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("Pendulun-v1", "no Gymnasium environment 'Pendulun-v1'; did you mean Pendulum-v1"),
        ("Pendulum-v9", "did you mean Pendulum-v1"),
        ("Blackjack-v1", "observation space is Tuple"),
        ("Hopper-v2", "Hopper-v2"),
        ("no_such_module:Thing-v0", "cannot be made: ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_evaluated_is_one_clear_error(env_id, message):
    with pytest.raises(ValueError, match=message):
        gymnasium_eval.check(env_id)


@needs_robotics
def test_dict_observations_are_refused_and_the_hand_is_not():
    with pytest.raises(ValueError, match="PointMaze_UMaze-v3: its observation space is Dict"):
        gymnasium_eval.check("PointMaze_UMaze-v3")
    with pytest.raises(ValueError, match="did you mean AdroitHandDoor-v1"):
        gymnasium_eval.check("AdroitHandDor-v1")
    assert gymnasium_eval.check("AdroitHandDoor-v1") == (39, 28, 200, False)


def test_without_the_robotics_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(gymnasium_eval, "gymnasium_robotics", None)
    for env_id in [name for name in gymnasium.registry if name.startswith("Adroit")]:
        monkeypatch.delitem(gymnasium.registry, env_id)
    with pytest.raises(ValueError, match=r"pip install '\.\[robotics\]'"):
        gymnasium_eval.check("AdroitHandDoor-v1")


def d4rl_reward(name, env, obs):
    """The reward of D4RL's hand_v2 tasks, from the simulator's state."""
    sim = env.unwrapped
    palm = (sim.data.site_xpos[sim.model.site("S_grasp").id]).copy()
    if name == "Door":
        hinge = float(sim.data.joint("door_hinge").qpos[0])
        reward = -0.1 * np.linalg.norm(palm - sim.data.site("S_handle").xpos)
        reward += -0.1 * (hinge - 1.57) ** 2 - 1e-5 * (sim.data.qvel**2).sum()
        return reward + 2 * (hinge > 0.2) + 8 * (hinge > 1.0) + 10 * (hinge > 1.35)
    thing = sim.data.body("Object").xpos
    if name == "Hammer":
        head, nail, goal = (sim.data.site(site).xpos for site in ("tool", "S_target", "nail_goal"))
        gap = np.linalg.norm(nail - goal)
        reward = -0.1 * np.linalg.norm(palm - thing) - np.linalg.norm(head - nail)
        reward += -10 * gap - 0.01 * np.linalg.norm(sim.data.qvel)
        return reward + 2 * (thing[2] > 0.04 and head[2] > 0.04) + 25 * (gap < 0.02) + 75 * (gap < 0.01)
    target = sim.data.site("target").xpos
    gap, reward = np.linalg.norm(thing - target), -0.1 * np.linalg.norm(palm - thing)
    if thing[2] > 0.04:
        reward += 1 - 0.5 * np.linalg.norm(palm - target) - 0.5 * gap
    return reward + 10 * (gap < 0.1) + 20 * (gap < 0.05)


@needs_robotics
@pytest.mark.parametrize("name", ["Door", "Hammer", "Relocate"])
def test_corrected_rewards_are_those_of_d4rl(name):
    env = gymnasium.make(f"AdroitHand{name}-v1")
    env.reset(seed=0)
    rng, correction = np.random.default_rng(0), gymnasium_eval.reward_correction(f"AdroitHand{name}-v1")
    for _ in range(50):
        obs, reward, *_ = env.step(rng.uniform(-1, 1, env.action_space.shape))
        assert reward + correction(obs) == pytest.approx(d4rl_reward(name, env, obs), abs=1e-9)


@needs_robotics
def test_only_the_faulty_versions_and_the_dense_rewards_are_corrected(monkeypatch):
    obs = np.arange(46.0)
    for env_id in ("AdroitHandDoorSparse-v1", "AdroitHandPen-v1", "AdroitHandDoor-v2", "Hopper-v5"):
        assert gymnasium_eval.reward_correction(env_id)(obs) == 0
    faulty = dict.fromkeys(("1.2.1", "1.3.0", "1.4.2"), True)
    for version, corrected in (
        faulty | dict.fromkeys(("1.2.0", "1.4.3", "1.4.3.dev0", "2.0"), False)
    ).items():
        monkeypatch.setattr(gymnasium_eval.metadata, "version", lambda _, version=version: version)
        assert (gymnasium_eval.reward_correction("AdroitHandDoor-v1")(obs) != 0) == corrected


@needs_shared
def test_a_published_hopper_reaches_its_published_return():
    """3728 +- 3 over ten episodes, by independent code. The contacts of MuJoCo's versions differ by more."""
    expert = policy.load(SHARED / "policies" / "hopper" / "cs285_expert.npz")
    found = gymnasium_eval.evaluate("Hopper-v4", lambda obs: policy.act(expert, obs), num_episodes=2, seed=0)
    assert (found["length"] == 1000).all()
    assert found["return"].mean() == pytest.approx(3728, abs=20)


@needs_robotics
@needs_shared
def test_the_dapg_door_policy_opens_every_door(tmp_path):
    """3010 over 60 episodes with D4RL's sign of the reward, 100 % of them a success."""
    with np.load(SHARED / "datasets" / "raw" / "dapg_policies" / "door.npz") as raw:
        dapg = dict(raw)
    layers = [(dapg[f"{name}_w"].T, dapg[f"{name}_b"]) for name in ("fc0", "fc1", "out")]
    layers[-1] = (layers[-1][0] * dapg["out_scale"], layers[-1][1] * dapg["out_scale"] + dapg["out_shift"])
    normal = {"obs_mean": dapg["in_shift"], "obs_std": dapg["in_scale"] + 1e-8}
    door = policy.mlp(layers, log_std=dapg["log_std"], hidden_activation="tanh", output="clip", **normal)
    policy.save(tmp_path / "door.npz", door, algo="DAPG")
    door = policy.load(tmp_path / "door.npz")
    np.testing.assert_allclose(
        policy.act(door, dapg["check_obs"]), np.clip(dapg["check_mean"], -1, 1), atol=1e-4
    )
    found = gymnasium_eval.evaluate(
        "AdroitHandDoor-v1", lambda obs: policy.act(door, obs), num_episodes=8, seed=0
    )
    assert (found["success"] == 1).all() and (found["length"] == 200).all()
    assert found["return"].mean() == pytest.approx(3010, abs=60)


def test_the_module_works_without_the_robotics_package():
    """It is an optional extra."""
    hide = "import sys; sys.modules['gymnasium_robotics'] = None"
    program = f"{hide}; from ooo_rl.envs import gymnasium_eval; print(gymnasium_eval.check('Pendulum-v1'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "(3, 1, 200, False)" in done.stdout, done.stderr
