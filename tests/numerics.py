"""What tests of losses share: networks, gradients and Adam in plain NumPy, float64, apart from all code
under test.
"""

import jax
import numpy as np


def forward(dense, x):
    """A ReLU MLP, from Flax's parameters; with LayerNorm where they have it."""
    layers = [dense[f"Dense_{i}"] for i in range(sum(name.startswith("Dense") for name in dense))]
    for i, layer in enumerate(layers[:-1]):
        x = x @ layer["kernel"] + layer["bias"]
        if f"LayerNorm_{i}" in dense:
            norm = dense[f"LayerNorm_{i}"]
            x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6) * norm[
                "scale"
            ] + norm["bias"]
        x = np.maximum(x, 0)
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def ensemble(params, obs, action):
    """Q-values [num, B] of an ensemble critic."""
    stacked = params["params"]["VmapMLP_0"]
    x = np.concatenate([obs, action], axis=-1)
    num = len(stacked["Dense_0"]["bias"])
    return np.stack([forward(jax.tree.map(lambda p, i=i: p[i], stacked), x)[..., 0] for i in range(num)])


def squashed(params, obs, noise):
    """Actions and log densities of a Gaussian policy squashed by tanh, for given standard normal `noise`."""
    mean, log_std = np.split(forward(params["params"]["MLP_0"], obs), 2, axis=-1)
    log_std = np.clip(log_std - 1, -20, 2)
    u = mean + np.exp(log_std) * noise
    density = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi) - np.log1p(-(np.tanh(u) ** 2))
    return np.tanh(u), density.sum(axis=-1)


def gradient(loss, params, step=1e-5):
    """Central differences in every parameter."""
    leaves, tree = jax.tree.flatten(params)
    result = []
    for i, leaf in enumerate(leaves):
        slope = np.zeros_like(leaf)
        for at in np.ndindex(leaf.shape):
            values = []
            for sign in (1, -1):
                moved = [x.copy() for x in leaves]
                moved[i][at] += sign * step
                values.append(loss(jax.tree.unflatten(tree, moved)))
            slope[at] = (values[0] - values[1]) / (2 * step)
        result.append(slope)
    return jax.tree.unflatten(tree, result)


def adam_first_step(params, grads, rate):
    return jax.tree.map(lambda p, g: p - rate * g / (np.abs(g) + 1e-8), params, grads)


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def mostly_close(ours, theirs, largest=0.07):
    """Equal but for a few entries: Adam's first step is the sign of the gradient, so one of about 0 may go
    either way in float32.

    `largest` is twice the largest learning rate.
    """
    errors = np.concatenate(
        [np.abs(np.asarray(a) - b).ravel() for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs))]
    )
    assert np.quantile(errors, 0.95) < 1e-5
    assert errors.max() < largest
