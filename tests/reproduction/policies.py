"""Whether real policies, trained by others in Gymnasium, earn in our environments what they earn there.

    python tests/reproduction/policies.py --policies ../shared/policies --json policies.json

Each policy plays `--episodes` episodes with its mean action (and, for the C engine, with sampled ones) in
ours and in Gymnasium's v4 task. Gymnasium runs with the contact margins of its own XML under today's MuJoCo;
`--halved` gives it ours (docs/locomotion.md), so that physics and code are the same and only the random
starts differ.
"""

import json
import pathlib
import sys
from dataclasses import dataclass

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ooo_rl import envs
from ooo_rl.data import policy
from ooo_rl.data.datasets import scores
from ooo_rl.envs.rollout import rollout

IDS = {"halfcheetah": "HalfCheetah-v4", "hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "ant": "Ant-v4"}


@dataclass(frozen=True)
class Args:
    """Compares returns of real policies here and in Gymnasium."""

    policies: pathlib.Path = pathlib.Path(__file__).parents[3] / "shared" / "policies"
    """folder of policies, <body>/<name>.npz"""
    bodies: tuple[str, ...] = tuple(IDS)
    """which bodies"""
    names: tuple[str, ...] = ()
    """only files whose name is one of these; none: all"""
    engines: tuple[str, ...] = ("mujoco",)
    """our engines"""
    episodes: int = 20
    """episodes per policy, engine and mode"""
    modes: tuple[str, ...] = ("mean", "sampled")
    """how actions are taken"""
    halved: bool = True
    """give Gymnasium's model the contact margins of ours"""
    json: str = ""
    """file to write the numbers to as well"""
    seed: int = 0
    """seed of all starts and noise"""


def ours(body: str, engine: str, actor: dict, mode: str, args: Args) -> np.ndarray:
    """Returns [episodes] in our environment."""
    env = envs.make(body, engine)

    def act(obs):
        # The noise is drawn from the observation's own bits, so that the policy stays a function of it.
        bits = jax.lax.bitcast_convert_type(obs.sum(axis=-1), jnp.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.PRNGKey(args.seed + 1), bits)
        noise = (
            None if mode == "mean" else jax.vmap(lambda key: jax.random.normal(key, (env.action_size,)))(keys)
        )
        return policy.forward(actor, obs, noise, jnp)

    return np.asarray(
        jax.jit(lambda key: rollout(env, act, key, args.episodes))(jax.random.PRNGKey(args.seed))["return"]
    )


def theirs(body: str, actor: dict, mode: str, args: Args) -> np.ndarray:
    """Returns [episodes] in Gymnasium's."""
    rng, found = np.random.default_rng(args.seed), []
    with gymnasium.make(IDS[body], disable_env_checker=True) as env:
        if args.halved:
            env.unwrapped.model.geom_margin[:] *= 0.5
        for episode in range(args.episodes):
            (obs, _), total, over = env.reset(seed=1000 + episode), 0.0, False
            while not over:
                action = np.clip(policy.act(actor, obs, None if mode == "mean" else rng), -1, 1)
                obs, reward, terminated, truncated, _ = env.step(action)
                total, over = total + reward, terminated or truncated
            found.append(total)
    return np.array(found)


def main() -> None:
    args = tyro.cli(Args)
    rows = []
    for body in args.bodies:
        for file in sorted((args.policies / body).glob("*.npz")):
            if "trajectories" in file.stem or (args.names and file.stem not in args.names):
                continue
            actor = policy.load(file)
            for mode in args.modes:
                base = theirs(body, actor, mode, args)
                for engine in args.engines:
                    got = ours(body, engine, actor, mode, args)
                    error = float(np.hypot(got.std(ddof=1), base.std(ddof=1)) / args.episodes**0.5)
                    away = float((got.mean() - base.mean()) / max(error, 1e-9))
                    row = {"body": body, "policy": file.stem, "mode": mode, "engine": engine}
                    row |= {"episodes": args.episodes, "standard_errors": away}
                    row |= {"ours": float(got.mean()), "ours_std": float(got.std(ddof=1))}
                    row |= {"gymnasium": float(base.mean()), "gymnasium_std": float(base.std(ddof=1))}
                    row["score"] = float(scores.normalized_score(body, [got.mean()])[0])
                    rows.append(row)
                    values = f"{row['ours']:8.1f} ± {row['ours_std']:6.1f}"
                    values += f"  Gymnasium {row['gymnasium']:8.1f} ± {row['gymnasium_std']:6.1f}"
                    run = f"{body:12} {file.stem:14} {mode:8} {engine:7}"
                    print(f"{run} {values}  {away:+.1f} standard errors", flush=True)
    if args.json:
        pathlib.Path(args.json).write_text(
            json.dumps({"command": " ".join(sys.argv), "rows": rows}, indent=1) + "\n"
        )
    print(
        f"{sum(abs(row['standard_errors']) <= 2 for row in rows)} of {len(rows)} within two standard errors"
    )


if __name__ == "__main__":
    main()
