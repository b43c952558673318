"""Small positive definite systems without library calls on a GPU.

On a GPU, XLA hands a Cholesky factorisation and its triangular solves to NVIDIA's libraries. A loop that
calls a library cannot be part of a CUDA graph. So the host would start each iteration of MJX's solver, and
wait for it. For the matrices of our bodies (6 to 30 rows) plain array operations are enough, and XLA puts
them into the same graph as everything else. On a CPU, LAPACK is faster.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# XLA may join the elimination of this many columns in one kernel. Without a bound it joins more where it
# reckons that this is faster, and one kernel then computes each number many times: with 14 rows there are as
# many kernels as with 2 and three times the work.
JOINED = 2


def by_backend(*operands: Any, gpu: Callable, other: Callable) -> Any:
    """`gpu(*operands)` in programs for a GPU, `other(*operands)` in all others.

    The choice is made when a program is lowered. So it is right for programs that are compiled for another
    device than JAX's own, too.
    """
    return jax.lax.platform_dependent(*operands, cuda=gpu, rocm=gpu, default=other)


def factor(a: jax.Array) -> jax.Array:
    """What `solve` needs of a symmetric positive definite matrix `a` [n, n], as an array [n, n].

    On a GPU that is the inverse of the Cholesky factor, elsewhere the factor itself, as LAPACK leaves it.
    Only the upper triangle of `a` is read. If `a` is not positive definite, the result has NaNs.
    """
    return by_backend(a, gpu=inverse_factor, other=_library_factor)


def solve(factored: jax.Array, b: jax.Array) -> jax.Array:
    """The solution x [n] of `a @ x = b` [n], where `factored` [n, n] is `factor(a)`."""
    return by_backend(factored, b, gpu=solve_by_inverse, other=_library_solve)


def inverse_factor(a: jax.Array) -> jax.Array:
    """The lower triangle W [n, n] with `W.T @ W` = the inverse of `a` [n, n].

    Gaussian elimination turns [a, I] into [L.T, W], where L is the Cholesky factor of `a` and W its inverse.
    Row j of both is final when the columns before j are eliminated. Only the rest takes part from there on.
    """
    n, done = a.shape[0], []
    rest = jnp.concatenate([a, jnp.eye(n, dtype=a.dtype)], 1)
    for j in range(n):
        row = rest[0] * jax.lax.rsqrt(rest[0, 0])
        done.append(row[n - j :])
        # The matrix is symmetric. So the column below the diagonal is the row beside it.
        rest = rest[1:, 1:] - row[1 : n - j, None] * row[1:]
        if j % JOINED == JOINED - 1:
            rest = jax.lax.optimization_barrier(rest)
    return jnp.stack(done)


def solve_by_inverse(inverse: jax.Array, b: jax.Array) -> jax.Array:
    """The solution x [n] of `a @ x = b` [n], where `inverse` [n, n] is `inverse_factor(a)`."""
    # Sums, because a matrix product could become a library call, or lose digits.
    half = jnp.sum(inverse * b, 1)
    return jnp.sum(inverse * half[:, None], 0)


def _library_factor(a: jax.Array) -> jax.Array:
    return jax.scipy.linalg.cho_factor(a)[0]


def _library_solve(factored: jax.Array, b: jax.Array) -> jax.Array:
    return jax.scipy.linalg.cho_solve((factored, False), b)
