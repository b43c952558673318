"""Policies as plain numpy files.

One `.npz` file holds an MLP. Any program can run it, without JAX and without pickle. The file has the
following keys. All arrays of numbers are float32. `D` is the size of an observation, `A` the size of an
action.

========================================  ==========================================================
obs_mean, obs_std, obs_clip               input = clip((obs - obs_mean) / obs_std, -obs_clip, obs_clip)
num_layers, w0, b0, w1, b1 ...            dense layers h @ w + b, `w` [in, out]; the last gives u [A]
hidden_activation                         relu, tanh or none, after every layer but the last
(standard deviation of the noise)         optional; one of these three sets of keys:
log_std                                   1. log standard deviation [A]
wS, bS, log_std_min, log_std_max          2. log standard deviation h @ wS + bS, clipped to these bounds;
                                          h is the last hidden layer
wS, bS, std_min                           3. standard deviation softplus(h @ wS + bS) + std_min (brax)
(latent action)                           optional, for a policy that decodes one; these keys:
num_latent_layers, v0, c0, v1, c1 ...     dense layers h @ v + c of a network before the one above, with the
                                          same activation; the last gives x
latent_max                                z = latent_max * tanh(x); the layer w0 takes the input and z
output_activation                         tanh: tanh(u + noise); clip: u + noise;
                                          tanh_mean: tanh(u) + noise (IQL);
                                          argmax: the number of the largest u, a discrete action []
action_low, action_high                   bounds of an action; clip and tanh_mean clip to them
any other key                             a string that says where the policy comes from
========================================  ==========================================================

A policy that is not an MLP is saved as a compiled JAX function with its parameters (`jax_function`). JAX is
needed to run it. Its file has these keys:

========================================  ==========================================================
jax_mean, jax_sample                      bytes of `jax.export` for (parameters, obs) and
                                          (parameters, obs, key); obs [B, D]
num_parameters, p0, p1 ...                the arrays of the parameters
sizes                                     (D, A)
========================================  ==========================================================

`load` also reads the four policies of hand_dapg, which have other keys (`fc0_w` ... `out_scale`, `log_std`;
matrices [out, in]).

    python data/policy.py --policy policy.npz --env-id AdroitHandDoor-v1 --episodes 10
"""

import functools
import itertools
import os
import pathlib
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# What numpy raises for what is no .npz of plain arrays: a pickle, a single array (.npy), a torn archive.
NO_ARRAYS = (
    OSError, ValueError, EOFError, AttributeError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip

Policy = dict[str, np.ndarray]

ACTIVATIONS = {
    "relu": lambda x, xp: xp.maximum(x, 0),
    "tanh": lambda x, xp: xp.tanh(x),
    "none": lambda x, xp: x,
}
OUTPUTS = ("tanh", "clip", "tanh_mean", "argmax")
REQUIRED = (
    "obs_mean",
    "obs_std",
    "obs_clip",
    "num_layers",
    "hidden_activation",
    "output_activation",
    "action_low",
    "action_high",
)
DAPG = (
    "fc0_w",
    "fc0_b",
    "fc1_w",
    "fc1_b",
    "out_w",
    "out_b",
    "in_shift",
    "in_scale",
    "out_shift",
    "out_scale",
    "log_std",
)
FUNCTION = ("jax_mean", "jax_sample", "num_parameters", "sizes")
NOISE_HEAD = ("wS", "bS")
NOISE_BOUNDS = ("log_std_min", "log_std_max")
LATENT = ("num_latent_layers", "latent_max")
NUMPYS_OWN = {"file", "allow_pickle"}  # arguments of numpy.savez, which cannot be keys of a file
NOT_PROVENANCE = {
    *REQUIRED,
    *NOISE_HEAD,
    *NOISE_BOUNDS,
    *LATENT,
    *FUNCTION,
    *NUMPYS_OWN,
    "std_min",
    "log_std",
}


def act(policy: Policy, obs: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """Actions [..., A] of a loaded `policy` for observations [..., D]: the mean, or with `rng` a sample.

    Discrete actions are numbers [...], from 0 to A - 1.
    Raises ValueError if observations have another size, or if `rng` is given and the policy has no noise.
    """
    noise = None if rng is None else rng.standard_normal((*np.shape(obs)[:-1], policy_sizes(policy)[1]))
    return np.asarray(forward(policy, obs, noise, np))


def forward(policy: Policy, obs: Any, noise: Any, xp: Any) -> Any:
    """`act` with given standard normal `noise` [..., A] (None: the mean), in numpy or jax.numpy (`xp`).

    A saved JAX function draws its own noise. The bits of `noise` are its random seed.
    """
    if np.shape(obs)[-1:] != policy_sizes(policy)[:1]:
        raise ValueError(
            f"the policy takes observations [..., {policy_sizes(policy)[0]}], not {np.shape(obs)}"
        )
    if "jax_mean" in policy:
        return _call(
            policy, obs, None if noise is None else xp.asarray(noise).view(np.uint32).sum(dtype=np.uint32)
        )
    x = xp.clip((obs - policy["obs_mean"]) / policy["obs_std"], -policy["obs_clip"], policy["obs_clip"])
    if "v0" in policy:
        latent = _dense(policy, "v", "c", int(policy["num_latent_layers"]), x, xp)[1]
        x = xp.concatenate([x, policy["latent_max"] * xp.tanh(latent)], axis=-1)
    h, u = _dense(policy, "w", "b", int(policy["num_layers"]), x, xp)
    output = str(policy["output_activation"])
    u = xp.tanh(u) if output == "tanh_mean" else u
    u = u if noise is None else u + _std(policy, h, xp) * noise
    if output == "argmax":
        return u.argmax(axis=-1)
    return xp.tanh(u) if output == "tanh" else xp.clip(u, policy["action_low"], policy["action_high"])


def _dense(policy: Policy, w: str, b: str, num: int, x: Any, xp: Any) -> tuple[Any, Any]:
    """The last hidden layer and the output of the `num` dense layers w0, b0 ... of a `policy`."""
    activation = ACTIVATIONS[str(policy["hidden_activation"])]
    for i in range(num - 1):
        x = activation(x @ policy[f"{w}{i}"] + policy[f"{b}{i}"], xp)
    return x, x @ policy[f"{w}{num - 1}"] + policy[f"{b}{num - 1}"]


def is_discrete(policy: Policy) -> bool:
    """Whether a loaded policy gives numbers of discrete actions."""
    return str(policy.get("output_activation")) == "argmax"


def policy_sizes(policy: Policy) -> tuple[int, int]:
    """The size D of an observation and the size A of an action of a loaded policy."""
    if "sizes" in policy:
        return tuple(map(int, policy["sizes"]))
    first = policy["v0"] if "v0" in policy else policy["w0"]
    return len(first), len(policy[f"b{int(policy['num_layers']) - 1}"])


def _std(policy: Policy, hidden: Any, xp: Any) -> Any:
    if "log_std" in policy:
        return xp.exp(policy["log_std"])
    if "wS" not in policy:
        raise ValueError("this policy has no standard deviation to sample with; act without rng")
    head = hidden @ policy["wS"] + policy["bS"]
    if "std_min" in policy:
        return xp.logaddexp(head, 0.0) + policy["std_min"]
    return xp.exp(xp.clip(head, policy["log_std_min"], policy["log_std_max"]))


def _call(policy: Policy, obs: Any, seed: Any) -> Any:
    """Actions of a saved JAX function: the mean, or a sample if `seed` is given."""
    import jax
    import jax.numpy as jnp

    flat = jnp.asarray(obs, jnp.float32).reshape(-1, int(policy["sizes"][0]))
    parameters = [policy[f"p{i}"] for i in range(int(policy["num_parameters"]))]
    name, more = ("jax_mean", ()) if seed is None else ("jax_sample", (jax.random.PRNGKey(seed),))
    action = _function(policy[name].tobytes())(parameters, flat, *more)
    return action.reshape(*np.shape(obs)[:-1], -1)


@functools.lru_cache(maxsize=16)
def _function(code: bytes) -> Callable:
    """A saved JAX function, read and compiled once.

    JAX cannot vmap such a function, so under vmap it runs on one row after the other.
    """
    import jax

    saved = jax.export.deserialize(bytearray(code))
    return jax.jit(jax.custom_batching.sequential_vmap(saved.call))


def dense_layers(params: dict) -> list[tuple[np.ndarray, np.ndarray]]:
    """The pairs (w [in, out], b [out]) of a Flax module's layers `Dense_0`, `Dense_1` ..., in their order."""
    names = sorted((name for name in params if name.startswith("Dense_")), key=lambda name: int(name[6:]))
    return [(np.asarray(params[name]["kernel"]), np.asarray(params[name]["bias"])) for name in names]


def mlp(
    layers: list[tuple[np.ndarray, np.ndarray]] | dict,
    *,
    latent: tuple[list[tuple[np.ndarray, np.ndarray]], float] | None = None,
    log_std: np.ndarray | None = None,
    gaussian: tuple[float, float, float] | None = None,
    softplus: float | None = None,
    hidden_activation: str = "relu",
    output: str = "tanh",
    obs_mean: np.ndarray | float = 0.0,
    obs_std: np.ndarray | float = 1.0,
    obs_clip: float = np.inf,
) -> Policy:
    """Makes a policy from an MLP with actions in [-1, 1].

    `layers` are pairs (w [in, out], b [out]), or the parameters of a Flax module. The mean and standard
    deviation of observations are [D] or one number.

    The noise has the standard deviation exp(`log_std`) [A], or one that depends on the observation. In the
    second case the last layer has 2 A outputs, and x is their second half. With `gaussian` = (shift, low,
    high) the standard deviation is exp(clip(x + shift, low, high)); with `softplus` it is softplus(x) +
    `softplus`. Without any of the three arguments the policy is deterministic.

    `latent` = (layers of another MLP, latent_max) is for a policy that decodes a latent action: the MLP gives
    latent_max * tanh(its output) [L], and the first of `layers` takes observation and latent action [D + L].

    Raises ValueError for a policy that `load` would refuse.
    """
    layers = dense_layers(layers) if isinstance(layers, dict) else layers
    noise = {} if log_std is None else {"log_std": log_std}
    if gaussian is not None or softplus is not None:
        w, b = layers[-1]
        half = len(b) // 2
        layers = [*layers[:-1], (w[:, :half], b[:half])]
        noise = {"wS": w[:, half:], "bS": b[half:] + (gaussian[0] if gaussian else 0)}
        noise |= dict(zip(NOISE_BOUNDS, gaussian[1:])) if gaussian else {"std_min": softplus}
    before, latent_max = latent or ([], None)
    first = before or layers
    sizes = [np.shape(first[0][0])[0], np.shape(layers[-1][1])[0]] if layers else [0, 0]
    numbers = {
        "obs_mean": np.broadcast_to(obs_mean, sizes[0]),
        "obs_std": np.broadcast_to(obs_std, sizes[0]),
        "obs_clip": [obs_clip],
        **{f"{name}{i}": array for i, layer in enumerate(layers) for name, array in zip("wb", layer)},
        **{f"{name}{i}": array for i, layer in enumerate(before) for name, array in zip("vc", layer)},
        **({"latent_max": latent_max} if before else {}),
        **noise,
        "action_low": -np.ones(sizes[1]),
        "action_high": np.ones(sizes[1]),
    }
    policy = {name: np.asarray(array, np.float32) for name, array in numbers.items()}
    policy |= {"num_layers": np.int32(len(layers))}
    policy |= {"num_latent_layers": np.int32(len(before))} if before else {}
    policy |= {"hidden_activation": np.asarray(hidden_activation), "output_activation": np.asarray(output)}
    _check(policy, "this policy")
    return policy


def jax_function(act: Callable, parameters: Any, obs_size: int) -> Policy:
    """Makes a policy from any function `act(parameters, obs, key)`; D is `obs_size`.

    `act` returns actions [B, A] for observations [B, D]: the mean if `key` is None, else a sample. JAX must
    be able to trace it for any batch size B.

    The JAX version that wrote the file can run it, and later versions can: JAX promises this for half a year.
    """
    import jax

    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, parameters))
    (batch,) = jax.export.symbolic_shape("B")
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    obs, key = jax.ShapeDtypeStruct((batch, obs_size), np.float32), jax.ShapeDtypeStruct((2,), np.uint32)

    def function(leaves, obs, key=None):
        return act(jax.tree.unflatten(tree, leaves), obs, key)

    platforms = ("cpu", "cuda", "rocm", "tpu")
    mean, sample = (
        jax.export.export(jax.jit(function), platforms=platforms)(shapes, obs, *more) for more in ((), (key,))
    )
    return {
        "jax_mean": np.frombuffer(mean.serialize(), np.uint8),
        "jax_sample": np.frombuffer(sample.serialize(), np.uint8),
        "num_parameters": np.int32(len(leaves)),
        **{f"p{i}": x for i, x in enumerate(leaves)},
        "sizes": np.int32([obs_size, mean.out_avals[0].shape[-1]]),
    }


def save(path: str | os.PathLike, policy: Policy, **provenance: str) -> None:
    """Writes a policy that `mlp` or `jax_function` made to the file `path`, completely or not at all.

    `provenance` are strings that say where the policy comes from, such as `algo="iql"`. Raises ValueError
    for a policy that `load` would refuse, and for a provenance whose name has another meaning in the file.
    """
    for name in NOT_PROVENANCE & set(provenance):
        raise ValueError(
            f"a policy's provenance cannot be called {name!r}: this key has another meaning; "
            "choose another name"
        )
    path = pathlib.Path(path)
    policy = policy | {name: np.asarray(str(word)) for name, word in provenance.items()}
    _check(policy, path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **policy)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike) -> Policy:
    """Reads the policy in the file `path`, as `act` takes it.

    Raises ValueError, which says why, if the file is not such a policy.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            policy = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except NO_ARRAYS as error:
        raise ValueError(f"{path}: not an .npz file of plain arrays ({type(error).__name__})") from error
    if set(DAPG) <= set(policy):
        policy = _from_dapg(policy)
    _check(policy, path)
    return policy


def _from_dapg(file: Policy) -> Policy:
    """Converts a policy of hand_dapg from its own keys.

    It has two tanh layers. Observations and the mean action are shifted and scaled. The noise has a constant
    standard deviation.
    """
    layers = [(file[f"{name}_w"].T, file[f"{name}_b"]) for name in ("fc0", "fc1", "out")]
    (w, b), scale = layers.pop(), file["out_scale"]
    layers.append((w * scale, b * scale + file["out_shift"]))
    arrays = {f"{name}{i}": array for i, layer in enumerate(layers) for name, array in zip("wb", layer)}
    # The source divides by scale + 1e-8.
    numbers = {
        "obs_mean": file["in_shift"],
        "obs_std": file["in_scale"] + 1e-8,
        "obs_clip": [np.inf],
        "log_std": file["log_std"],
    }
    sides = {"action_low": -np.ones(len(b)), "action_high": np.ones(len(b))}
    policy = {name: np.asarray(array, np.float32) for name, array in {**numbers, **arrays, **sides}.items()}
    words = {
        "hidden_activation": "tanh",
        "output_activation": "clip",
        "algo": "DAPG",
        "source": "aravindr93/hand_dapg 9a1de23",
    }
    return {**policy, "num_layers": np.int32(3), **{name: np.asarray(word) for name, word in words.items()}}


def _check(policy: Policy, path: str | os.PathLike) -> None:
    """Raises ValueError if `policy` is not valid, for `load`, `save` and `mlp`; `path` begins the message."""
    if "jax_mean" in policy:
        _check_function(policy, path)
        return
    missing = [name for name in REQUIRED if name not in policy]
    if missing:
        raise ValueError(f"{path}: not a policy file, the keys {', '.join(missing)} are missing")
    for name, known in (("hidden_activation", tuple(ACTIVATIONS)), ("output_activation", OUTPUTS)):
        if str(policy[name]) not in known:
            raise ValueError(f"{path}: {name} is {str(policy[name])!r}, not one of {', '.join(known)}")
    for name in ("num_layers", *(["num_latent_layers"] if "num_latent_layers" in policy else [])):
        number = policy[name]
        if number.shape or number.dtype.kind not in "iu" or number < 1:
            raise ValueError(f"{path}: {name} must be a whole number, at least 1, not {number}")
    for name, shapes in _shapes(policy, path).items():
        array = policy[name]
        if array.dtype.kind != "f" or array.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(
                f"{path}: {name} must be floating-point {wanted}, not {array.dtype} {array.shape}"
            )
        if not (np.isfinite(array) | ((name == "obs_clip") & (array == np.inf))).all():
            raise ValueError(f"{path}: {name} is not finite")
    for name in ("obs_std", "obs_clip", *(["latent_max"] if "latent_max" in policy else [])):
        if (policy[name] <= 0).any():
            raise ValueError(f"{path}: {name} must be positive")
    if (policy["action_low"] >= policy["action_high"]).any():
        raise ValueError(f"{path}: action_low must be below action_high")


def _check_function(policy: Policy, path: str | os.PathLike) -> None:
    """`_check` for a saved JAX function."""
    missing = [name for name in FUNCTION if name not in policy]
    if not missing:
        missing = [f"p{i}" for i in range(int(policy["num_parameters"])) if f"p{i}" not in policy]
    if missing:
        raise ValueError(f"{path}: not a policy file, the keys {', '.join(missing)} are missing")
    for i in range(int(policy["num_parameters"])):
        if not np.isfinite(policy[f"p{i}"]).all():
            raise ValueError(f"{path}: p{i} is not finite")


def _shapes(policy: Policy, path: str | os.PathLike) -> dict[str, list[tuple[int, ...]]]:
    """The shapes that each array of numbers may have. They follow from the widths of the weights."""
    noise = [*NOISE_HEAD, *(("std_min",) if "std_min" in policy else NOISE_BOUNDS)] if "wS" in policy else []
    widths = _widths(policy, path, "num_layers", "wb", noise)
    shapes, inputs = _layer_shapes(widths, "wb"), widths[0]
    if "num_latent_layers" in policy or "v0" in policy:
        before = _widths(policy, path, "num_latent_layers", "vc", ["latent_max"])
        inputs = before[0]
        shapes |= {**_layer_shapes(before, "vc"), "latent_max": [(1,), ()]}
        shapes["w0"] = [(inputs + before[-1], widths[1])]

    def vector_or_number(size):
        return [(size,), (1,), ()]

    shapes |= {name: vector_or_number(inputs) for name in ("obs_mean", "obs_std")}
    shapes |= {name: vector_or_number(widths[-1]) for name in ("action_low", "action_high")}
    shapes["obs_clip"] = [(1,), ()]
    if "log_std" in policy:
        shapes["log_std"] = [(widths[-1],)]
    if "wS" in policy:
        shapes |= {"wS": [(widths[-2], widths[-1])], "bS": [(widths[-1],)]}
        shapes |= {name: vector_or_number(widths[-1]) for name in noise[2:]}
    return shapes


def _widths(policy: Policy, path: str | os.PathLike, number: str, letters: str, more: list[str]) -> list[int]:
    """The widths of an MLP's input and of all its layers; ValueError if a layer is missing or no matrix.

    `number` is the key that holds the number of layers, `letters` those of weights and biases, `more` other
    keys that go with them.
    """
    if number not in policy:
        raise ValueError(f"{path}: not a policy file, the key {number} is missing")
    (w, b), num = letters, int(policy[number])
    names = [*(f"{w}{i}" for i in range(num)), *(f"{b}{i}" for i in range(num)), *more]
    missing = [name for name in names if name not in policy]
    if missing:
        raise ValueError(f"{path}: with {number} {num}, the keys {', '.join(missing)} are missing")
    for name in names[:num]:
        if policy[name].ndim != 2 or 0 in policy[name].shape:
            raise ValueError(f"{path}: {name} must be a matrix (in, out), not {policy[name].shape}")
    return [policy[names[0]].shape[0], *(policy[name].shape[1] for name in names[:num])]


def _layer_shapes(widths: list[int], letters: str) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of an MLP's weights and biases."""
    w, b = letters
    shapes = {f"{w}{i}": [pair] for i, pair in enumerate(itertools.pairwise(widths))}
    return shapes | {f"{b}{i}": [(width,)] for i, width in enumerate(widths[1:])}


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
    """random seed of the starts of episodes and of the noise"""
    sample: bool = False
    """sample actions instead of taking their mean"""


def main(args: Args) -> None:
    """The command-line program. Raises ValueError for a mistake that the user can correct."""
    from ooo_rl.envs import gymnasium_eval  # imported here, so that reading policies needs numpy alone

    if args.episodes < 1:
        raise ValueError(f"--episodes must be at least 1, not {args.episodes}")
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {args.seed}")
    policy = load(args.policy)
    takes, gives = policy_sizes(policy)
    obs_size, action_size, _, discrete = gymnasium_eval.check(args.env_id)
    if discrete != is_discrete(policy):
        raise ValueError(
            f"of {args.env_id} and {args.policy}, one has discrete actions and the other has not"
        )
    if (takes, gives) != (obs_size, action_size):
        has = f"{args.env_id} has {obs_size} observations and {action_size} actions"
        raise ValueError(f"{has}, but {args.policy} takes {takes} and gives {gives}")
    rng = np.random.default_rng(args.seed) if args.sample else None
    tally = gymnasium_eval.evaluate(args.env_id, lambda obs: act(policy, obs, rng), args.episodes, args.seed)
    mode = "sampled" if args.sample else "mean"
    print(
        f"{args.policy} in {args.env_id}, {args.episodes} episodes, {mode} actions "
        "(± standard deviation over episodes)"
    )
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
