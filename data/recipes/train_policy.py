"""Trains behaviour policies with brax's PPO or SAC, for datasets that no existing policy can record.

    python data/recipes/train_policy.py --env ant-walk --algorithm ppo --steps 8000000 --out ant_walk.npz

brax does the learning. This file gives it our environments and their physics. It collects the experience if
a dataset needs it, and it writes the policy as a plain .npz file (data/policy.py). Engines on the host run
at C speed inside brax's jitted loop, as they do elsewhere.
"""

import functools
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from brax.envs.base import Wrapper
from flax import linen as nn

from ooo_rl import envs
from ooo_rl.data import policy
from ooo_rl.data.errors import UsageError, guarded

SETTINGS = {  # for C MuJoCo on a few cores: few environments, and many updates per step
    "ppo": {
        "num_envs": 128, "unroll_length": 20, "batch_size": 32, "num_minibatches": 16,
        "num_updates_per_batch": 6, "learning_rate": 3e-4, "entropy_cost": 3e-3, "discounting": 0.98,
        "gae_lambda": 0.95, "clipping_epsilon": 0.2, "max_grad_norm": 1.0,
    },
    "sac": {
        "num_envs": 8, "batch_size": 256, "grad_updates_per_step": 8, "learning_rate": 3e-4,
        "discounting": 0.99, "tau": 0.005, "min_replay_size": 4096,
    },
}  # fmt: skip
HIDDEN = (256, 256)
STD_MIN = 1e-3  # least standard deviation of brax's tanh-normal distribution


class Recorded(Wrapper):
    """Passes every batch of transitions to a function on the host.

    The function is `keep(obs, action, reward, next_obs, termination, done, broken)`; its arguments are arrays
    [worlds, ...]. Where `broken` is 1, the next observation is no real one.
    """

    def __init__(self, env: Any, keep: Callable):
        super().__init__(env)
        self.keep = keep

    def step(self, state, action):
        following = self.env.step(state, action)
        row = (
            state.obs,
            jnp.clip(action, -1, 1),
            following.reward,
            following.info["true_obs"],
            following.info["termination"],
            following.done,
            following.info["broken"],
        )
        jax.experimental.io_callback(self.keep, None, *row, ordered=True)
        return following


class Restarting(Wrapper):
    """Runs many environments side by side, and restarts each one when its episode ends.

    A restart uses new random numbers. brax's own wrapper repeats the first start.
    """

    def reset(self, rng):
        begin = jax.vmap(jax.random.split)(rng)
        state = jax.vmap(self.env.reset)(begin[:, 0])
        return state.replace(
            info={**state.info, **self.books(begin[:, 1], state.obs, jnp.zeros(len(rng)), state.done)}
        )

    @staticmethod
    def books(key, true_obs, steps, done) -> dict:
        """The entries of a state's info that brax's trainers and `Recorded` need beside the environment's."""
        return {"key": key, "true_obs": true_obs, "steps": steps, "episode_done": done, "episode_metrics": {}}

    def step(self, state, action):
        def one(state, action):
            own = {name: value for name, value in state.info.items() if name not in self.books(*[None] * 4)}
            bare = state.replace(info=own, metrics={"success": state.metrics["success"]})
            key, now = jax.random.split(state.info["key"])
            following, reached = envs.step_and_reset(self.env, bare, action, now)
            # These flags belong to the step that was taken, the rest of info to the state that comes next.
            ended = {name: reached.info[name] for name in ("termination", "truncation", "broken")}
            info = {
                **following.info,
                **ended,
                **self.books(key, reached.obs, state.info["steps"] + 1, reached.done),
            }
            return following.replace(
                reward=reached.reward, done=reached.done, metrics=reached.metrics, info=info
            )

        return jax.vmap(one)(state, action)


def train(
    env: envs.Env, algorithm: str, steps: int, seed: int = 0,
    progress: Callable[[int, float], None] = lambda step, score: None,
    keep: Callable | None = None, **settings,
) -> dict:  # fmt: skip
    """Trains on `env` for `steps` environment steps. Returns brax's parameters, as `save` takes them.

    `algorithm` is "ppo" or "sac". `progress(step, mean return of 32 episodes)` is called about 20 times.
    `keep` receives all experience (see `Recorded`). `settings` override those in `SETTINGS`. Raises
    UsageError if the actions of `env` are discrete, or if SAC has too few steps.
    """
    settings = {**SETTINGS[algorithm], **settings}
    if envs.is_discrete(env):
        raise UsageError(
            f"{type(env).__name__} has discrete actions, and brax's PPO and SAC here are for continuous "
            "ones; algos/dqn.py learns such tasks"
        )
    if algorithm == "sac" and steps <= (first := settings["min_replay_size"]):
        raise UsageError(
            f"SAC collects {first} steps before it learns: --steps (of a dataset: --transitions) must be "
            f"above {first}, not {steps}"
        )
    if not hasattr(jax, "device_put_replicated"):  # brax 0.14.2 still calls it; jax 0.10 removed it
        jax.device_put_replicated = lambda tree, devices: jax.tree.map(
            lambda x: jnp.stack([x] * len(devices)), tree
        )
    from brax.training.agents.ppo import networks as ppo_networks
    from brax.training.agents.ppo import train as ppo
    from brax.training.agents.sac import networks as sac_networks
    from brax.training.agents.sac import train as sac

    training = Restarting(env) if keep is None else Recorded(Restarting(env), keep)
    if algorithm == "ppo":
        run, sizes = ppo.train, {"policy_hidden_layer_sizes": HIDDEN, "value_hidden_layer_sizes": HIDDEN}
        factory = functools.partial(ppo_networks.make_ppo_networks, **sizes, activation=nn.relu)
    else:
        run, factory = sac.train, functools.partial(sac_networks.make_sac_networks, hidden_layer_sizes=HIDDEN)
    _, parameters, _ = run(
        environment=training, eval_env=Restarting(env),
        wrap_env_fn=lambda env, **_: env,  # the environments are wrapped already
        num_timesteps=steps, episode_length=env.horizon, seed=seed,
        num_evals=21, num_eval_envs=32, normalize_observations=True, network_factory=factory,
        max_devices_per_host=1,
        progress_fn=lambda step, metrics: progress(step, float(metrics["eval/episode_reward"])),
        **settings,
    )  # fmt: skip
    return parameters


def save(path: pathlib.Path, parameters: Any, **provenance: str) -> None:
    """Writes brax's `parameters` (normaliser, policy, ...) as a policy file. An action is tanh(u + noise)."""
    normaliser, network = parameters[0], parameters[1]["params"]
    layers = [
        (np.asarray(layer["kernel"]), np.asarray(layer["bias"])) for _, layer in sorted(network.items())
    ]
    made = policy.mlp(
        layers,
        softplus=STD_MIN,
        hidden_activation="relu",
        output="tanh",
        obs_mean=np.asarray(normaliser.mean),
        obs_std=np.asarray(normaliser.std),
    )
    policy.save(path, made, **provenance)


@dataclass(frozen=True)
class Args:
    """Trains a behaviour policy with brax and writes it as a .npz file."""

    env: str
    """environment"""
    out: pathlib.Path
    """file to write"""
    algorithm: Literal["ppo", "sac"] = "sac"
    """brax's trainer"""
    steps: int = 1_000_000
    """environment steps"""
    seed: int = 0
    """random seed of everything"""
    physics: Literal["auto", "mjx", "mjx-warp", "mujoco"] = "auto"
    """physics engine"""


def main() -> None:
    args = tyro.cli(Args)
    if args.steps < 1:
        raise UsageError(f"--steps must be at least 1, not {args.steps}")
    if args.out.suffix != ".npz" or not args.out.parent.is_dir():
        raise UsageError(f"--out {args.out}: must be an .npz file in a folder that exists")
    try:
        env = envs.make(args.env, args.physics)
    except ValueError as error:
        raise UsageError(f"--env {args.env}: {error}") from None
    report = lambda step, score: print(f"{step:>12,} steps  return {score:10.2f}", flush=True)  # noqa: E731
    parameters = train(env, args.algorithm, args.steps, args.seed, report)
    save(
        args.out,
        parameters,
        trained_on=args.env,
        algo=f"brax {args.algorithm}, {args.steps} steps, seed {args.seed}",
    )


if __name__ == "__main__":
    guarded(main)
