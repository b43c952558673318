"""Plays random actions for long, and counts the worlds that broke and the numbers that were not finite.

python tests/reproduction/random_steps.py --steps 1000000
"""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import tyro

from ooo_rl import envs

TASKS = (
    "halfcheetah",
    "hopper",
    "walker2d",
    "ant",
    "halfcheetah-sparse",
    "ant-sparse",
    "maze2d-large",
    "antmaze-umaze",
    "antmaze-large-diverse",
)


@dataclass(frozen=True)
class Args:
    """Counts broken worlds and non-finite numbers under random actions."""

    envs: tuple[str, ...] = TASKS
    """environments"""
    physics: str = "auto"
    """engine"""
    steps: int = 1_000_000
    """environment steps per environment"""
    worlds: int = 200
    """worlds side by side"""


def main() -> None:
    args = tyro.cli(Args)
    for name in args.envs:
        env = envs.make(
            name, args.physics if args.physics == "auto" or not name.startswith("maze2d") else "auto"
        )

        def step(carry, key, env=env):
            state, counts = carry
            act, reset = jax.random.split(key)
            action = jax.random.uniform(act, (args.worlds, env.action_size), minval=-1.0, maxval=1.0)
            state, reached = envs.step_all(env, state, action, reset)
            bad = ~jnp.isfinite(jnp.concatenate([reached.obs, reached.reward[:, None]], axis=1)).all(axis=1)
            now = jnp.stack([reached.info["broken"].sum(), bad.sum(), reached.done.sum()])
            return (state, counts + now), None

        state = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.PRNGKey(0), args.worlds))
        began = time.perf_counter()
        keys = jax.random.split(jax.random.PRNGKey(1), -(-args.steps // args.worlds))
        play = lambda s, k, step=step: jax.lax.scan(step, (s, jnp.zeros(3)), k)[0]  # noqa: E731
        _, counts = jax.jit(play, compiler_options=env.compiler_options)(state, keys)
        broken, bad, ends = (int(x) for x in counts)
        taken = len(keys) * args.worlds
        seconds = time.perf_counter() - began
        counted = f"{broken} worlds broke, {bad} rows not finite, {ends} episodes"
        print(f"{name:22} {env.backend:7} {taken:,} steps: {counted}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
