"""Policies as plain numpy files: one `.npz` holds an MLP that any program can run, without JAX and without pickle.

The keys of a file, all arrays float32; `D` observations, `A` actions:

========================================  ====================================================================
obs_mean, obs_std, obs_clip               input = clip((obs - obs_mean) / obs_std, -obs_clip, obs_clip)
num_layers, w0, b0, w1, b1 ...            dense layers h @ w + b, `w` being [in, out]
hidden_activation                         relu, tanh or none, after every layer but the last, which gives u [A]
log_std                                   optional [A]: standard deviation of the action's noise, or instead
wS, bS, log_std_min, log_std_max          the same from the last hidden layer, clipped to these bounds, or instead
wS, bS, std_min                           the standard deviation softplus(h @ wS + bS) + std_min (brax's policies)
output_activation                         tanh: tanh(u + noise); clip: u + noise; tanh_mean: tanh(u) + noise (IQL)
action_low, action_high                   bounds; the last two are clipped to them
anything else                             strings that say where the policy is from
========================================  ====================================================================

`load` also takes the four policies of hand_dapg in their own keys (`fc0_w` ... `out_scale`, `log_std`, matrices [out, in]).

    python data/policy.py --policy policy.npz --env-id AdroitHandDoor-v1 --episodes 10
"""

import os
import pathlib
import sys
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np

Policy = dict[str, np.ndarray]

ACTIVATIONS = {"relu": lambda x, xp: xp.maximum(x, 0), "tanh": lambda x, xp: xp.tanh(x), "none": lambda x, xp: x}
OUTPUTS = ("tanh", "clip", "tanh_mean")
REQUIRED = ("obs_mean", "obs_std", "obs_clip", "num_layers", "hidden_activation", "output_activation", "action_low", "action_high")
DAPG = ("fc0_w", "fc0_b", "fc1_w", "fc1_b", "out_w", "out_b", "in_shift", "in_scale", "out_shift", "out_scale", "log_std")
NOISE_HEAD = ("wS", "bS")
NOISE_BOUNDS = ("log_std_min", "log_std_max")
NOT_PROVENANCE = {
    *REQUIRED,
    *NOISE_HEAD,
    *NOISE_BOUNDS,
    "std_min",
    "log_std",
    "file",
    "allow_pickle",
}  # the last two mean something to numpy.savez


def act(policy: Policy, obs: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """Actions [..., A] of a loaded `policy` for observations [..., D]: the mean, or with `rng` a sample."""
    noise = None if rng is None else rng.standard_normal((*np.shape(obs)[:-1], policy_sizes(policy)[1]))
    return forward(policy, obs, noise, np)


def forward(policy: Policy, obs: Any, noise: Any, xp: Any) -> Any:
    """`act` with the standard normal `noise` [..., A] given (None: the mean), in numpy or jax.numpy (`xp`)."""
    if np.shape(obs)[-1:] != policy_sizes(policy)[:1]:
        raise ValueError(f"the policy takes observations [..., {policy_sizes(policy)[0]}], not {np.shape(obs)}")
    h = xp.clip((obs - policy["obs_mean"]) / policy["obs_std"], -policy["obs_clip"], policy["obs_clip"])
    last = int(policy["num_layers"]) - 1
    for i in range(last):
        h = ACTIVATIONS[str(policy["hidden_activation"])](h @ policy[f"w{i}"] + policy[f"b{i}"], xp)
    output = str(policy["output_activation"])
    u = h @ policy[f"w{last}"] + policy[f"b{last}"]
    u = xp.tanh(u) if output == "tanh_mean" else u
    u = u if noise is None else u + _std(policy, h, xp) * noise
    return xp.tanh(u) if output == "tanh" else xp.clip(u, policy["action_low"], policy["action_high"])


def policy_sizes(policy: Policy) -> tuple[int, int]:
    """(observation size D, action size A) of a loaded policy."""
    return len(policy["w0"]), len(policy[f"b{int(policy['num_layers']) - 1}"])


def _std(policy: Policy, hidden: Any, xp: Any) -> Any:
    if "log_std" in policy:
        return xp.exp(policy["log_std"])
    if "wS" not in policy:
        raise ValueError("this policy has no standard deviation to sample with; act without rng")
    head = hidden @ policy["wS"] + policy["bS"]
    if "std_min" in policy:
        return xp.logaddexp(head, 0.0) + policy["std_min"]
    return xp.exp(xp.clip(head, policy["log_std_min"], policy["log_std_max"]))


def save(
    path: str | os.PathLike,
    layers: list[tuple[np.ndarray, np.ndarray]],
    *,
    log_std: np.ndarray | None = None,
    log_std_head: tuple[np.ndarray, np.ndarray, float, float] | None = None,
    softplus_head: tuple[np.ndarray, np.ndarray, float] | None = None,
    hidden_activation: str = "relu",
    output: str = "tanh",
    obs_mean: np.ndarray | float = 0.0,
    obs_std: np.ndarray | float = 1.0,
    obs_clip: float = np.inf,
    **provenance: str,
) -> None:
    """Writes a policy with actions in [-1, 1] to `path`, whole or not at all.

    `layers` are pairs (w [in, out], b [out]); `log_std` is [A], or `log_std_head` is (wS, bS, log_std_min, log_std_max), or
    `softplus_head` is (wS, bS, std_min); the mean and standard deviation of observations are [D] or one number. `provenance` are
    strings such as `algo="iql"`. A policy that `load` would refuse is a ValueError.
    """
    for name in NOT_PROVENANCE & set(provenance):
        raise ValueError(f"a policy's provenance cannot be called {name!r}: that name has a meaning of its own")
    sizes = [np.shape(layers[0][0])[0], np.shape(layers[-1][1])[0]] if layers else [0, 0]
    numbers = {
        "obs_mean": np.broadcast_to(obs_mean, sizes[0]),
        "obs_std": np.broadcast_to(obs_std, sizes[0]),
        "obs_clip": [obs_clip],
        **{f"{name}{i}": array for i, layer in enumerate(layers) for name, array in zip("wb", layer)},
        **({} if log_std is None else {"log_std": log_std}),
        **({} if log_std_head is None else dict(zip((*NOISE_HEAD, *NOISE_BOUNDS), log_std_head))),
        **({} if softplus_head is None else dict(zip((*NOISE_HEAD, "std_min"), softplus_head))),
        "action_low": -np.ones(sizes[1]),
        "action_high": np.ones(sizes[1]),
    }
    policy = {name: np.asarray(array, np.float32) for name, array in numbers.items()}
    policy["num_layers"] = np.int32(len(layers))
    words = {"hidden_activation": hidden_activation, "output_activation": output, **provenance}
    policy |= {name: np.asarray(str(word)) for name, word in words.items()}
    path = pathlib.Path(path)
    _check(policy, path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **policy)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike) -> Policy:
    """The policy in file `path`, as `act` takes it. A file that is not such a policy is a ValueError that says why."""
    try:
        with np.load(path, allow_pickle=False) as file:
            policy = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        # A pickle, a lone array (.npy), a torn archive: numpy has another exception for each.
        raise ValueError(f"{path}: not an .npz file of plain arrays ({type(error).__name__})") from error
    if set(DAPG) <= set(policy):
        policy = _from_dapg(policy)
    _check(policy, path)
    return policy


def _from_dapg(file: Policy) -> Policy:
    """A policy of hand_dapg: two tanh layers between a shift and scale of observations and of the mean, noise of constant spread."""
    layers = [(file[f"{name}_w"].T, file[f"{name}_b"]) for name in ("fc0", "fc1", "out")]
    (w, b), scale = layers.pop(), file["out_scale"]
    layers.append((w * scale, b * scale + file["out_shift"]))
    arrays = {f"{name}{i}": array for i, layer in enumerate(layers) for name, array in zip("wb", layer)}
    # The source divides by scale + 1e-8.
    numbers = {"obs_mean": file["in_shift"], "obs_std": file["in_scale"] + 1e-8, "obs_clip": [np.inf], "log_std": file["log_std"]}
    sides = {"action_low": -np.ones(len(b)), "action_high": np.ones(len(b))}
    policy = {name: np.asarray(array, np.float32) for name, array in {**numbers, **arrays, **sides}.items()}
    words = {"hidden_activation": "tanh", "output_activation": "clip", "algo": "DAPG", "source": "aravindr93/hand_dapg 9a1de23"}
    return {**policy, "num_layers": np.int32(3), **{name: np.asarray(word) for name, word in words.items()}}


def _check(policy: Policy, path: str | os.PathLike) -> None:
    """Raises the ValueError that `load` and `save` promise."""
    missing = [name for name in REQUIRED if name not in policy]
    if missing:
        raise ValueError(f"{path}: not a policy file, the keys {', '.join(missing)} are missing")
    for name, known in (("hidden_activation", tuple(ACTIVATIONS)), ("output_activation", OUTPUTS)):
        if str(policy[name]) not in known:
            raise ValueError(f"{path}: {name} is {str(policy[name])!r}, not one of {', '.join(known)}")
    if policy["num_layers"].shape or policy["num_layers"].dtype.kind not in "iu" or policy["num_layers"] < 1:
        raise ValueError(f"{path}: num_layers must be a whole number, at least 1, not {policy['num_layers']}")
    for name, shapes in _shapes(policy, path).items():
        array = policy[name]
        if array.dtype.kind != "f" or array.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{path}: {name} must be floating-point {wanted}, not {array.dtype} {array.shape}")
        if not (np.isfinite(array) | ((name == "obs_clip") & (array == np.inf))).all():
            raise ValueError(f"{path}: {name} is not finite")
    for name in ("obs_std", "obs_clip"):
        if (policy[name] <= 0).any():
            raise ValueError(f"{path}: {name} must be positive")
    if (policy["action_low"] >= policy["action_high"]).any():
        raise ValueError(f"{path}: action_low must be below action_high")


def _shapes(policy: Policy, path: str | os.PathLike) -> dict[str, list[tuple[int, ...]]]:
    """The shapes that each array of numbers may have, going from the widths of the weights."""
    last = int(policy["num_layers"]) - 1
    weights = [f"w{i}" for i in range(last + 1)]
    noise = [*NOISE_HEAD, *(("std_min",) if "std_min" in policy else NOISE_BOUNDS)] if "wS" in policy else []
    names = weights + [f"b{i}" for i in range(last + 1)] + noise
    missing = [name for name in names if name not in policy]
    if missing:
        raise ValueError(f"{path}: with num_layers {last + 1}, the keys {', '.join(missing)} are missing")
    for name in weights:
        if policy[name].ndim != 2 or 0 in policy[name].shape:
            raise ValueError(f"{path}: {name} must be a matrix (in, out), not {policy[name].shape}")
    widths = [policy["w0"].shape[0], *(policy[name].shape[1] for name in weights)]

    def vector_or_number(size):
        return [(size,), (1,), ()]

    shapes = {name: vector_or_number(widths[0]) for name in ("obs_mean", "obs_std")}
    shapes |= {name: vector_or_number(widths[-1]) for name in ("action_low", "action_high")}
    shapes["obs_clip"] = [(1,), ()]
    for i in range(last + 1):
        shapes |= {f"w{i}": [(widths[i], widths[i + 1])], f"b{i}": [(widths[i + 1],)]}
    if "log_std" in policy:
        shapes["log_std"] = [(widths[-1],)]
    if "wS" in policy:
        shapes |= {"wS": [(widths[-2], widths[-1])], "bS": [(widths[-1],)]}
        shapes |= {name: vector_or_number(widths[-1]) for name in noise[2:]}
    return shapes


@dataclass(frozen=True)
class Args:
    """Plays a saved policy in a Gymnasium environment and prints its return, success and episode length."""

    policy: str
    """the policy's .npz file"""
    env_id: str
    """id of the environment, e.g. Hopper-v5 or AdroitHandDoor-v1"""
    episodes: int = 10
    """episodes to play"""
    seed: int = 0
    """seed of the episodes' starts and of the noise"""
    sample: bool = False
    """sample actions instead of taking their mean"""


def main(args: Args) -> None:
    """The command-line program; a ValueError of anything that the user can mend."""
    from envs import gymnasium_eval  # here, so that those who only read policies need numpy alone

    if args.episodes < 1:
        raise ValueError(f"--episodes must be at least 1, not {args.episodes}")
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {args.seed}")
    policy = load(args.policy)
    takes, gives = policy_sizes(policy)
    obs_size, action_size, _ = gymnasium_eval.check(args.env_id)
    if (takes, gives) != (obs_size, action_size):
        has = f"{args.env_id} has {obs_size} observations and {action_size} actions"
        raise ValueError(f"{has}, but {args.policy} takes {takes} and gives {gives}")
    rng = np.random.default_rng(args.seed) if args.sample else None
    tally = gymnasium_eval.evaluate(args.env_id, lambda obs: act(policy, obs, rng), args.episodes, args.seed)
    mode = "sampled" if args.sample else "mean"
    print(f"{args.policy} in {args.env_id}, {args.episodes} episodes, {mode} actions (± standard deviation over episodes)")
    print(f"return  {tally['return'].mean():10.2f} ± {tally['return'].std():.2f}")
    print(f"success {tally['success'].mean():10.2%}")
    print(f"length  {tally['length'].mean():10.1f}")


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
