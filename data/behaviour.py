"""Trains behaviour policies with brax's PPO or SAC on our environments, for datasets that no one else's policy can record.

    python data/behaviour.py --env ant-walk --algorithm ppo --steps 8000000 --out ant_walk.npz

brax carries the learning; this file gives it our physics, takes its experience where a dataset wants that, and writes the
policy as a plain .npz (data/policy.py). Host engines run at C speed inside brax's jitted loop like everywhere else.
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

import envs
from data import cli, policy

SETTINGS = {  # for C MuJoCo on a few cores: many updates per step of few environments
    "ppo": {
        "num_envs": 128, "unroll_length": 20, "batch_size": 32, "num_minibatches": 16, "num_updates_per_batch": 6, "learning_rate": 3e-4,
        "entropy_cost": 3e-3, "discounting": 0.98, "gae_lambda": 0.95, "clipping_epsilon": 0.2, "max_grad_norm": 1.0,
    },
    "sac": {
        "num_envs": 8, "batch_size": 256, "grad_updates_per_step": 8, "learning_rate": 3e-4, "discounting": 0.99, "tau": 0.005,
        "min_replay_size": 4096,
    },
}  # fmt: skip
HIDDEN = (256, 256)
STD_MIN = 1e-3  # of brax's tanh-normal distribution


class Recorded(Wrapper):
    """Hands every batch of transitions to `keep(obs, action, reward, next_obs, termination, done)` on the host, arrays [worlds, ...]."""

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
        )
        jax.experimental.io_callback(self.keep, None, *row, ordered=True)
        return following


class Restarting(Wrapper):
    """All environments side by side, each started anew where its episode ended, with new random numbers (brax repeats the first start)."""

    def reset(self, rng):
        begin = jax.vmap(jax.random.split)(rng)
        state = jax.vmap(self.env.reset)(begin[:, 0])
        return state.replace(info={**state.info, **self.books(begin[:, 1], state.obs, jnp.zeros(len(rng)), state.done)})

    @staticmethod
    def books(key, true_obs, steps, done) -> dict:
        """What brax's trainers and `Recorded` look for in a state's info, besides what the environment keeps there."""
        return {"key": key, "true_obs": true_obs, "steps": steps, "episode_done": done, "episode_metrics": {}}

    def step(self, state, action):
        def one(state, action):
            own = {name: value for name, value in state.info.items() if name not in self.books(*[None] * 4)}
            bare = state.replace(info=own, metrics={"success": state.metrics["success"]})
            key, now = jax.random.split(state.info["key"])
            following, reached = envs.step_and_reset(self.env, bare, action, now)
            # The ending belongs to the step that was taken, the rest to the state that comes next.
            ended = {name: reached.info[name] for name in ("termination", "truncation", "broken")}
            info = {**following.info, **ended, **self.books(key, reached.obs, state.info["steps"] + 1, reached.done)}
            return following.replace(reward=reached.reward, done=reached.done, metrics=reached.metrics, info=info)

        return jax.vmap(one)(state, action)


def train(
    env: envs.Env, algorithm: str, steps: int, seed: int = 0, progress: Callable[[int, float], None] = lambda step, score: None,
    keep: Callable | None = None, **settings,
) -> dict:  # fmt: skip
    """Trains on `env` for `steps` environment steps; returns what `save` takes.

    `progress(step, mean return of 32 episodes)` is called about 20 times; `keep` receives all experience (see `Recorded`);
    `settings` replace the defaults of `SETTINGS`.
    """
    if not hasattr(jax, "device_put_replicated"):  # brax 0.14.2 still calls what jax 0.10 took out
        jax.device_put_replicated = lambda tree, devices: jax.tree.map(lambda x: jnp.stack([x] * len(devices)), tree)
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
        environment=training, eval_env=Restarting(env), wrap_env_fn=lambda env, **_: env,  # they are wrapped already
        num_timesteps=steps, episode_length=env.horizon, seed=seed,
        num_evals=21, num_eval_envs=32, normalize_observations=True, network_factory=factory, max_devices_per_host=1,
        progress_fn=lambda step, metrics: progress(step, float(metrics["eval/episode_reward"])), **{**SETTINGS[algorithm], **settings},
    )  # fmt: skip
    return parameters


def save(path: pathlib.Path, parameters: Any, action_size: int, **provenance: str) -> None:
    """Writes brax's `parameters` (normaliser, policy, ...) as a policy.npz: tanh of a normal around the mean."""
    normaliser, network = parameters[0], parameters[1]["params"]
    layers = [(np.asarray(layer["kernel"]), np.asarray(layer["bias"])) for _, layer in sorted(network.items())]
    kernel, bias = layers.pop()
    layers.append((kernel[:, :action_size], bias[:action_size]))
    policy.save(
        path, layers, softplus_head=(kernel[:, action_size:], bias[action_size:], STD_MIN), hidden_activation="relu", output="tanh",
        obs_mean=np.asarray(normaliser.mean), obs_std=np.asarray(normaliser.std), **provenance,
    )  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Trains a behaviour policy with brax and writes it as a policy.npz."""

    env: str
    """environment"""
    out: pathlib.Path
    """file to write"""
    algorithm: Literal["ppo", "sac"] = "sac"
    """brax's trainer"""
    steps: int = 1_000_000
    """environment steps"""
    seed: int = 0
    """seed of everything"""
    physics: Literal["auto", "mjx", "mjx-warp", "mujoco"] = "auto"
    """physics engine"""


def main() -> None:
    args = tyro.cli(Args)
    if args.steps < 1:
        raise cli.UsageError(f"--steps must be at least 1, not {args.steps}")
    if args.out.suffix != ".npz" or not args.out.parent.is_dir():
        raise cli.UsageError(f"--out {args.out}: must be an .npz file in a folder that exists")
    try:
        env = envs.make(args.env, args.physics)
    except ValueError as error:
        raise cli.UsageError(f"--env {args.env}: {error}") from None
    report = lambda step, score: print(f"{step:>12,} steps  return {score:10.2f}", flush=True)  # noqa: E731
    parameters = train(env, args.algorithm, args.steps, args.seed, report)
    save(args.out, parameters, env.action_size, trained_on=args.env, algo=f"brax {args.algorithm}, {args.steps} steps, seed {args.seed}")


if __name__ == "__main__":
    cli.guarded(main)
