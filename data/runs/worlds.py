"""How many environments a seed has by default, and what it costs to simulate them.

A GPU steps 1,000 MuJoCo models in about the time of one. So where MJX runs on a GPU, the default fills
the GPU, at the same numbers of environment steps and updates. docs/physics.md has the estimates.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax

from ooo_rl import envs
from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs.plan import Phase, cut
from ooo_rl.data.runs.sweep import grid
from ooo_rl.envs import estimates

FEW = 8  # environments per seed where more of them take more time
MOST = 1_024  # environments of all seeds together that a GPU steps in about the time of one
ROUNDING = 1e-3  # of gradient steps per vector step: a flag cannot say 1/48
EPISODES = 10  # that each environment has time for: with fewer, the late states of episodes become rare


def are_cheap(env: str, physics: str) -> bool:
    """Whether more worlds cost next to nothing: MJX simulates them, on a GPU."""
    if jax.default_backend() != "gpu" or env == "none":
        return False
    try:
        return getattr(envs.make(env, physics), "backend", "").startswith("mjx")
    except ValueError:  # `settings.check` says what is wrong
        return False


def chosen(args: Any, make_plan: Callable[[Any], list[Phase]]) -> Any:
    """`args` with the number of environments that --num-envs 0 means where they are cheap.

    That is the largest power of two with which the plan comes out, within MOST and EPISODES, or FEW.
    """
    if args.num_envs:
        return args
    per_seed = MOST // len(grid(args)[1])
    per_seed = min(per_seed, args.online_steps // (EPISODES * envs.make(args.env, args.physics).horizon))
    for num_envs in [n for n in (2**k for k in range(10, 3, -1)) if n <= per_seed]:
        tried = dataclasses.replace(args, num_envs=num_envs)
        try:
            check_vector_steps(tried)
            cut(tried, make_plan(tried))
            return tried
        except UsageError:
            continue
    tried = dataclasses.replace(args, num_envs=FEW)
    check_vector_steps(tried)
    return tried


def check_vector_steps(args: Any) -> None:
    """Raises UsageError if the updates after a step of all environments, or the buffer, do not come out."""
    updates = args.num_envs * args.utd_ratio
    fits = max(1, round(updates))
    if args.online_steps and abs(updates - fits) > ROUNDING:
        raise UsageError(
            f"--utd-ratio {args.utd_ratio} with --num-envs {args.num_envs} makes {updates:.6g} gradient "
            "steps per vector step; their product must be a whole number, at least 1, as with --utd-ratio "
            f"{fits / args.num_envs:.6g}"
        )
    if args.buffer_size % args.num_envs:
        near = -(-args.buffer_size // args.num_envs) * args.num_envs
        raise UsageError(
            f"--buffer-size {args.buffer_size} is not a multiple of --num-envs {args.num_envs}; "
            f"the next one is {near}"
        )


def described(args: Any, env: Any, num_runs: int) -> str:
    """Worlds and engine in a sentence; on a GPU also what they cost, and which engine would cost less."""
    worlds, engine = num_runs * args.num_envs, env.backend
    sentence = f"{worlds} worlds ({args.num_envs} for each of {num_runs} runs) on {engine}"
    cost = estimates.of(env)
    if jax.default_backend() != "gpu" or cost is None:
        return sentence
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    times = {name: cost.ms(name, worlds, cores) for name in ("mjx", "mjx-warp", "mujoco")}
    updates = [args.num_envs * args.utd_ratio * ms for ms in estimates.UPDATE_MS]
    ours, best = times[engine], min(times, key=times.get)
    shares = sorted(100 * ours / (ours + ms) for ms in updates)
    return (
        f"{sentence}: a step of all takes about {ours:.2g} ms (estimated from an H200 and an EPYC), "
        f"{shares[0]:.0f} to {shares[1]:.0f} % of the time online"
        + (f"; --physics {best} is estimated to take {times[best]:.2g} ms" if best != engine else "")
    )
