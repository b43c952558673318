"""Whether the real experts of the four hands (DAPG) earn in our environments what they earn in
gymnasium-robotics.

    python tests/reproduction/hands.py --policies ../shared/datasets/raw/dapg_policies --json hands.json

Each policy plays `--episodes` episodes with its mean action and with sampled ones, in gymnasium-robotics
(rewards' sign mended, the pen ending when it drops or after 100 steps) and in ours, on each of `--engines`,
an engine and a model such as mujoco:shipped. Success is DAPG's: more than 25 successful steps in an episode
(pen: 20). Returns depend on where an episode begins, and each side draws its own starts; with `--same-starts`
gymnasium-robotics takes ours, and D4RL's contact margins, so that episodes compare one by one:

    python tests/reproduction/hands.py --same-starts --modes mean --engines mujoco:d4rl
"""

import json
import pathlib
import sys
import time
from dataclasses import dataclass

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import parity
import tyro

from ooo_rl import envs
from ooo_rl.data import policy
from ooo_rl.envs import gymnasium_eval

FOLDER = pathlib.Path(__file__).parents[3] / "shared" / "datasets" / "raw" / "dapg_policies"
IDS = {
    "door": "AdroitHandDoor-v1",
    "hammer": "AdroitHandHammer-v1",
    "pen": "AdroitHandPen-v1",
    "relocate": "AdroitHandRelocate-v1",
}


@dataclass(frozen=True)
class Args:
    """Compares returns and successes of the DAPG policies here and in gymnasium-robotics."""

    policies: pathlib.Path = FOLDER
    """folder of policies, <task>.npz"""
    tasks: tuple[str, ...] = tuple(IDS)
    """which tasks"""
    engines: tuple[str, ...] = ("mujoco:shipped", "mujoco:d4rl", "mujoco:mjx")
    """engine:model pairs of ours"""
    modes: tuple[str, ...] = ("mean", "sampled")
    """how actions are taken"""
    episodes: int = 60
    """episodes per policy, engine and mode"""
    gymnasium: bool = True
    """play in gymnasium-robotics too, to compare with"""
    same_starts: bool = False
    """gymnasium-robotics begins where ours does, with D4RL's contact margins"""
    seed: int = 0
    """seed of all starts and noise"""
    json: str = ""
    """file to write the numbers to as well"""


def ours(task: str, engine: str, actor: dict, mode: str, args: Args) -> dict[str, np.ndarray]:
    """Per episode [episodes]: return, successful steps, length."""
    physics, model = engine.split(":")
    env = envs.make(task, physics, model=model)

    def step(carry, key):
        state, alive = carry
        noise = None if mode == "mean" else jax.random.normal(key, (args.episodes, env.action_size))
        reached = jax.vmap(env.step)(state, policy.forward(actor, state.obs, noise, jnp))
        seen = (
            alive * reached.reward,
            alive * reached.metrics["success"],
            alive,
            alive * reached.info["broken"],
        )
        return (reached, alive * (1 - reached.done)), seen

    @jax.jit
    def play(key):
        start, keys = jax.random.split(key)
        state = jax.vmap(env.reset)(jax.random.split(start, args.episodes))
        return jax.lax.scan(step, (state, jnp.ones(args.episodes)), jax.random.split(keys, env.horizon))[1]

    names = ("return", "successes", "length", "broken")
    return {name: np.asarray(part).sum(0) for name, part in zip(names, play(jax.random.PRNGKey(args.seed)))}


def theirs(task: str, actor: dict, mode: str, args: Args) -> dict[str, np.ndarray]:
    """The same in gymnasium-robotics."""
    rng, found, correction = np.random.default_rng(args.seed), [], gymnasium_eval.reward_correction(IDS[task])
    with gymnasium.make(IDS[task], disable_env_checker=True) as env:
        body = env.unwrapped.model.body("Object").id if task == "pen" else None
        for episode in range(args.episodes):
            obs, _ = env.reset(seed=1000 + episode)
            total = np.zeros(3)
            for _ in range(100 if task == "pen" else 200):
                obs, reward, *_, info = env.step(
                    np.clip(policy.act(actor, obs, None if mode == "mean" else rng), -1, 1)
                )
                total += reward + correction(obs), bool(info["success"]), 1
                if body is not None and env.unwrapped.data.xpos[body][2] < 0.075:
                    break
            found.append(total)
    return dict(zip(("return", "successes", "length"), np.array(found).T))


def theirs_from_our_starts(task: str, actor: dict, mode: str, args: Args) -> dict[str, np.ndarray]:
    """The same in gymnasium-robotics with D4RL's margins, episode by episode from the starts of `ours`."""
    rng, found, robotics, start = (
        np.random.default_rng(args.seed),
        [],
        parity.RoboticsHand(task),
        envs.make(task, "mujoco").start,
    )
    keys = jax.random.split(jax.random.split(jax.random.PRNGKey(args.seed))[0], args.episodes)
    begun = jax.tree.map(np.asarray, jax.jit(jax.vmap(start))(keys))
    for episode in range(args.episodes):
        first = jax.tree.map(lambda x, e=episode: x[e], begun)
        robotics.put(np.float64(first.qpos), np.float64(first.qvel), parity.goal_of(first))
        obs, total, ended = robotics.env._get_obs(), np.zeros(3), False
        while not ended and total[2] < (100 if task == "pen" else 200):
            obs, reward, ended = robotics.step(
                np.clip(policy.act(actor, obs, None if mode == "mean" else rng), -1, 1)
            )
            total += reward, robotics.success, 1
        found.append(total)
    return dict(zip(("return", "successes", "length"), np.array(found).T))


def summary(task: str, played: dict[str, np.ndarray]) -> dict:
    n = len(played["return"])
    held = played["successes"] > (20 if task == "pen" else 25)
    return {
        "return": float(played["return"].mean()),
        "return_error": float(played["return"].std(ddof=1) / n**0.5),
        "success": float(held.mean()),
        "any_success": float((played["successes"] > 0).mean()),
        "length": float(played["length"].mean()),
        "dropped": float((played["length"] < played["length"].max()).mean()),
        "broken": float(played.get("broken", np.zeros(1)).sum()),
    }


def main() -> None:
    args, rows = tyro.cli(Args), []
    for task in args.tasks:
        actor = policy.load(args.policies / f"{task}.npz")
        for mode in args.modes:
            base, reference = None, theirs_from_our_starts if args.same_starts else theirs
            for engine in (("gymnasium",) if args.gymnasium else ()) + args.engines:
                began = time.perf_counter()
                played = (
                    reference(task, actor, mode, args)
                    if engine == "gymnasium"
                    else ours(task, engine, actor, mode, args)
                )
                row = {
                    "task": task,
                    "mode": mode,
                    "engine": engine,
                    "episodes": args.episodes,
                    **summary(task, played),
                }
                if engine == "gymnasium":
                    base = {**row, "each": played["return"]}
                elif base and args.same_starts:
                    row["largest_difference"] = float(np.abs(played["return"] - base["each"]).max())
                    row["median_difference"] = float(np.median(np.abs(played["return"] - base["each"])))
                elif base:
                    error = np.hypot(row["return_error"], base["return_error"])
                    row["standard_errors"] = float((row["return"] - base["return"]) / max(error, 1e-9))
                row["seconds"] = time.perf_counter() - began
                rows.append(row)
                apart = f"{row['standard_errors']:+5.1f} s.e." if "standard_errors" in row else ""
                if "median_difference" in row:
                    middle, most = row["median_difference"], row["largest_difference"]
                    apart = f"differ by {middle:.0e} (median), {most:.0e} (most)"
                earned = f"return {row['return']:9.1f} ± {row['return_error']:6.1f}  {apart:>10}"
                shares = f"success {row['success']:4.0%}  any {row['any_success']:4.0%}"
                shares += f"  dropped {row['dropped']:4.0%}"
                end = f"{row['broken']:.0f} broken  {row['seconds']:.0f} s"
                print(f"{task:9} {mode:8} {engine:15} {earned}  {shares}  {end}", flush=True)
                if args.json:
                    content = {"command": " ".join(sys.argv), "rows": rows}
                    pathlib.Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
