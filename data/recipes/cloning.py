"""Behaviour cloning: fits a policy to the actions of recorded episodes. Some datasets hold its roll-outs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ooo_rl.data.policy import Policy, mlp

HIDDEN = (256, 256)
BATCH, RATE = 256, 1e-3
LOG_STD = (-3.0, 0.0)  # bounds of the actions' log standard deviation


def clone(episodes: list[dict], seed: int, steps: int = 5_000, hidden: tuple[int, ...] = HIDDEN) -> Policy:
    """Fits a Gaussian policy to the actions of `episodes` by maximum likelihood.

    `episodes` are as `datasets.write.write_minari` takes them. A network with tanh layers gives the mean
    from standardised observations. One learnt vector gives the log standard deviation, the same for all
    observations. Adam takes `steps` steps on batches of 256 rows; its rate falls from 1e-3 to 0. Returns a
    policy as `data.policy.load` does.
    """
    obs = np.concatenate([e["observations"][:-1] for e in episodes]).astype(np.float32)
    action = np.concatenate([e["actions"] for e in episodes]).astype(np.float32)
    mean, std = obs.mean(0), obs.std(0) + 1e-3
    rows = jnp.asarray((obs - mean) / std), jnp.asarray(action)
    params = _fit(
        rows,
        _init(jax.random.PRNGKey(seed), (obs.shape[1], *hidden, action.shape[1])),
        jax.random.PRNGKey(seed + 1),
        steps,
    )
    fitted = mlp(
        [(np.asarray(w), np.asarray(b)) for w, b in params["layers"]],
        log_std=np.clip(np.asarray(params["log_std"]), *LOG_STD),
        hidden_activation="tanh",
        output="clip",
        obs_mean=mean,
        obs_std=std,
    )
    return fitted | {"algo": np.asarray(f"behaviour cloning, {steps} steps, seed {seed}")}


def _init(key: jax.Array, sizes: tuple[int, ...]) -> dict:
    keys = jax.random.split(key, len(sizes) - 1)
    layers = [
        (jax.random.normal(k, (a, b)) / a**0.5, jnp.zeros(b)) for k, a, b in zip(keys, sizes, sizes[1:])
    ]
    layers[-1] = (0.01 * layers[-1][0], layers[-1][1])
    return {"layers": layers, "log_std": jnp.full(sizes[-1], -1.0)}


def loss(params: dict, obs: jax.Array, action: jax.Array) -> jax.Array:
    """The mean negative log-likelihood of the actions [N, A] for `obs` [N, D], without its constant term."""
    h = obs
    for w, b in params["layers"][:-1]:
        h = jnp.tanh(h @ w + b)
    w, b = params["layers"][-1]
    log_std = jnp.clip(params["log_std"], *LOG_STD)
    return (0.5 * ((action - h @ w - b) / jnp.exp(log_std)) ** 2 + log_std).sum(-1).mean()


@partial(jax.jit, static_argnames="steps")
def _fit(rows: tuple[jax.Array, jax.Array], params: dict, key: jax.Array, steps: int) -> dict:
    optimiser = optax.adam(optax.cosine_decay_schedule(RATE, steps))

    def step(carry, key):
        params, state = carry
        chosen = jax.random.randint(key, (BATCH,), 0, len(rows[0]))
        updates, state = optimiser.update(jax.grad(loss)(params, *(column[chosen] for column in rows)), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimiser.init(params)), jax.random.split(key, steps))[0][0]
