"""Parameters with the optimiser that moves them, running moments, and how a network's weights begin."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class Learner:
    """Parameters and the state of their optimiser, Adam.

    The learning rate is traced, so it is an argument of each step.
    """

    params: Any
    opt: optax.ScaleByAdamState

    @classmethod
    def create(cls, params: Any) -> "Learner":
        """Before the first step."""
        return cls(params, optax.scale_by_adam().init(params))

    def descend(
        self, loss: Callable, learning_rate: jax.Array | float, *arguments: Any, has_aux: bool = False
    ):
        """One step of Adam down the gradient of `loss(params, *arguments)`.

        Returns (what the loss returned, the learner after the step). With `has_aux` the loss returns a pair,
        and only its first part is descended.
        """
        value, grads = jax.value_and_grad(loss, has_aux=has_aux)(self.params, *arguments)
        direction, opt = optax.scale_by_adam().update(grads, self.opt)
        return value, Learner(jax.tree.map(lambda p, d: p - learning_rate * d, self.params, direction), opt)


@struct.dataclass
class Moments:
    """Running mean and variance, to normalise data while it is still being collected."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array

    @classmethod
    def fresh(cls, *shape: int) -> "Moments":
        """The moments before the first row: mean 0 and variance 1, with almost no weight."""
        return cls(jnp.zeros(shape), jnp.ones(shape), jnp.float32(1e-4))

    def update(self, x: jax.Array) -> "Moments":
        """Merges the rows of `x` [B, ...] in (Chan et al.'s parallel variance)."""
        n, m, v = x.shape[0], x.mean(axis=0), x.var(axis=0)
        total, delta = self.count + n, m - self.mean
        var = (self.var * self.count + v * n + delta**2 * self.count * n / total) / total
        return Moments(self.mean + delta * n / total, var, total)


def orthogonal(scale: float) -> Callable:
    """Flax initialiser: `scale` times a random (semi-)orthogonal matrix.

    The matrix is the polar factor of a Gaussian one. The usual initialiser takes the Q of a QR decomposition,
    which has the same distribution. But several batched QRs in one program, which vmapped seeds make, can
    deadlock XLA's CPU thread pool (seen with jax 0.10.2 on two cores). Newton's iteration for the polar
    factor needs only matrix products. Its columns are orthonormal to about 1e-6.
    """

    def init(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
        tall, thin = max(shape), min(shape)
        # Division by the largest expected singular value puts all where the iteration converges.
        start = jax.random.normal(key, (tall, thin), dtype) / (1.1 * (tall**0.5 + thin**0.5))
        product = partial(jnp.matmul, precision="highest")
        x = jax.lax.fori_loop(0, 40, lambda _, x: 1.5 * x - 0.5 * product(x, product(x.T, x)), start)
        return scale * (x if shape == (tall, thin) else x.T)

    return init
