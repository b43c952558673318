"""How far online rows are from the data: their likelihood under a VAE of the data (Off2OnRL's Figure 1b, our way).

    python tests/reproduction/shift.py --data ooo/hopper/medium-v0 --online ooo/hopper/tuned-seed0-v0

For each dataset a VAE learns the joint density of states and actions from nine tenths of its episodes. The
log-likelihoods are those of the rows it learnt from, of the tenth that was held out, and of rows that an agent
saw online, which a run's `--export` wrote. Writes a figure with a panel for each dataset, and prints a table.
"""

import pathlib
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

from ooo_rl.data.datasets.validate import Dataset
from ooo_rl.data.figures.style import COLORS, STYLE, save
from ooo_rl.data.recipes import library

ROWS = 5_000  # of each kind, whose likelihood is estimated


@dataclass(frozen=True)
class Args:
    """Estimates log-likelihoods of offline and online rows, and draws them."""

    data: tuple[str, ...]
    """datasets that agents were trained on"""
    online: tuple[str, ...]
    """for each of them, a dataset of rows that such an agent saw online"""
    out: pathlib.Path = pathlib.Path("shift.png")
    """figure to write"""
    steps: int = 20_000
    """gradient steps of each VAE"""
    hidden: int = 256
    """units of each of the two hidden layers"""
    samples: int = 100
    """importance samples of each estimate"""
    seed: int = 0
    """seed of networks, batches and rows"""


class VAE(nn.Module):
    """Gaussian encoder and decoder of a row x [..., size], with a standard deviation of its own per number."""

    size: int
    hidden: int

    def setup(self):
        self.encoder, self.decoder = (
            nn.Sequential([nn.Dense(self.hidden), nn.relu, nn.Dense(self.hidden), nn.relu, nn.Dense(out)])
            for out in (2 * self.size, self.size)
        )
        self.log_std = self.param("log_std", nn.initializers.zeros, (self.size,))

    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        """log p(x, z) / q(z given x) for one z of the encoder: its mean over z is the ELBO."""
        mean, log_std = jnp.split(self.encoder(x), 2, axis=-1)
        log_std = jnp.clip(log_std, -6.0, 2.0)
        z = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        decoded = normal(x, self.decoder(z), jnp.clip(self.log_std, -6.0, 2.0))
        return decoded + normal(z, 0.0, 0.0) - normal(z, mean, log_std)


def normal(x: jax.Array, mean: jax.Array | float, log_std: jax.Array | float) -> jax.Array:
    """Log-density of independent Gaussians, summed over the last axis."""
    terms = -0.5 * ((x - mean) / jnp.exp(log_std)) ** 2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    return terms.sum(axis=-1)


def likelihoods(args: Args, data: np.ndarray, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """log p(x) of each row x under a VAE of `data` [n, size]; in nats, of standardised rows.

    The estimate is the log of the mean of p(x, z) / q(z given x) over `samples` draws of z (Burda et al. 2016).
    """
    vae = VAE(data.shape[1], args.hidden)
    init, keys, last = jax.random.split(jax.random.PRNGKey(args.seed), 3)
    data = jnp.asarray(data)
    parameters = vae.init(init, data[:1], init)
    optimiser = optax.adam(1e-3)

    def step(carry, key):
        pick, draw = jax.random.split(key)
        batch = data[jax.random.randint(pick, (256,), 0, len(data))]
        gradient = jax.grad(lambda p: -vae.apply(p, batch, draw).mean())(carry[0])
        updates, state = optimiser.update(gradient, carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    learn = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
    parameters, _ = learn((parameters, optimiser.init(parameters)), jax.random.split(keys, args.steps))

    @jax.jit
    def estimate(x):
        draws = jax.lax.map(lambda key: vae.apply(parameters, x, key), jax.random.split(last, args.samples))
        return jax.nn.logsumexp(draws, axis=0) - jnp.log(args.samples)

    return {name: np.asarray(estimate(jnp.asarray(x))) for name, x in rows.items()}


def joint(dataset: Dataset) -> np.ndarray:
    """States and actions side by side [n, obs + action]."""
    return np.concatenate([dataset.transitions.obs, dataset.transitions.action], axis=1)


def compare(args: Args, data: str, online: str) -> dict[str, np.ndarray]:
    """Log-likelihoods of learnt, held-out and online rows, under a VAE of most of `data`."""
    rng = np.random.default_rng(args.seed)
    offline, seen = library.load(data), joint(library.load(online))
    rows, held = joint(offline), offline.episode % 10 == 9
    mean, std = rows[~held].mean(axis=0), rows[~held].std(axis=0) + 1e-6
    learnt, kept, seen = ((x - mean) / std for x in (rows[~held], rows[held], seen))
    kinds = {"data, learnt": learnt, "data, held out": kept, "online": seen}
    some = {name: x[rng.choice(len(x), min(ROWS, len(x)), replace=False)] for name, x in kinds.items()}
    return likelihoods(args, learnt, some)


def above(x: np.ndarray, y: np.ndarray) -> float:
    """The share of pairs of a number of x and one of y in which that of x is larger."""
    order = np.searchsorted(np.sort(y), x)
    return float(order.mean() / len(y))


def draw(found: dict[str, dict[str, np.ndarray]], path: pathlib.Path) -> None:
    """A panel for each dataset, with a histogram for each kind of rows.

    The axis is linear up to 10 nats, and logarithmic beyond. Bins are alike in width there.
    """
    bins = np.sinh(np.linspace(*np.arcsinh(np.array([-1e4, 100.0]) / 10), 60)) * 10
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.2 * len(found) + 0.4, 2.9), layout="constrained")
        for ax, (name, kinds) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
            for (kind, x), color in zip(kinds.items(), COLORS):
                weights = np.full(len(x), 1 / len(x))
                ax.hist(
                    np.clip(x, bins[0], bins[-1]),
                    bins,
                    weights=weights,
                    histtype="step",
                    color=color,
                    label=kind,
                )
            ax.set_xscale("symlog", linthresh=10)
            ax.set(
                title=name,
                xlabel="log-likelihood, nats",
                xticks=[-10_000, -100, 0, 100],
                ylabel="share of rows",
            )
        handles, labels = ax.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        save(figure, path)


def main() -> None:
    args = tyro.cli(Args)
    if len(args.data) != len(args.online):
        raise SystemExit(f"error: --online names {len(args.online)} datasets, --data {len(args.data)}")
    found = {}
    print("| data | median, learnt | held out | online | held out above online |\n|---|--:|--:|--:|--:|")
    for data, online in zip(args.data, args.online):
        found[data] = kinds = compare(args, data, online)
        medians = " | ".join(f"{np.median(x):.1f}" for x in kinds.values())
        share = above(kinds["data, held out"], kinds["online"])
        print(f"| {data} | {medians} | {100 * share:.0f} % |", flush=True)
    draw(found, args.out)


if __name__ == "__main__":
    main()
