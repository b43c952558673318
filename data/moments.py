"""Running mean and variance on the device, for what has to be normalised while it is still being collected."""

import jax
from flax import struct


@struct.dataclass
class Moments:
    """Running mean and variance."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array

    def update(self, x: jax.Array) -> "Moments":
        """Merges the rows of `x` [B, ...] in (Chan et al.'s parallel variance)."""
        n, m, v = x.shape[0], x.mean(axis=0), x.var(axis=0)
        total, delta = self.count + n, m - self.mean
        var = (self.var * self.count + v * n + delta**2 * self.count * n / total) / total
        return Moments(self.mean + delta * n / total, var, total)
