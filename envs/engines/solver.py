"""MJX's constraint solver with fewer operations, and without the host on a GPU.

Newton's method takes a few steps, and each step searches along a line for its length. MJX 3.17 runs 50
iterations of every line search, whether they are needed or not. In random play the slowest of 64 worlds needs
about 17. `lean_solver()` puts three things into MJX while a function is traced:

* a line search that ends when it has ended in every world;
* in worlds in which Newton's method is at its end, no further line search, since others wait for it;
* on a GPU, Cholesky factors without library calls (cholesky.py).

On a CPU all results have the same bits as MJX's own. MJX's functions still do the arithmetic, so that a
change in them is a change here. Reverse-mode derivatives are not possible, as MJX's solver has none either
with more than one iteration.
"""

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from mujoco.mjx._src import forward, smooth, solver

from ooo_rl.envs.engines import cholesky
from ooo_rl.envs.engines.replaced import Replacement

# On a GPU: iterations of a line search between two looks at whether all worlds are done. A look and the copy
# after it cost two launches, and an iteration three. On a CPU the superfluous iterations cost more.
TURNS = 5

# While a step of Newton's method is traced: if this world needs it. `line_search` gets no more from MJX than
# its own numbers.
_needed = contextvars.ContextVar("needed", default=True)


def line_search(cond: Callable, body: Callable, init: Any, max_iter: int) -> Any:
    """`solver._while_loop_scan`, which applies `body` to the pytree `init` while `cond` of it is true.

    MJX's version goes on to `max_iter`, the bound that `cond` knows as well. All numbers are packed into one
    array, because a GPU needs several launches for each array of a loop.
    """
    packed, unpack = ravel_pytree(init)
    needed = _needed.get()

    def goes_on(packed):
        return cond(unpack(packed)) & needed

    def turn(packed):
        return ravel_pytree(body(unpack(packed)))[0]

    def turns(packed):
        packed = turn(packed)
        for _ in range(TURNS - 1):
            # The barrier keeps XLA from computing an iteration again inside the next one.
            packed = jax.lax.optimization_barrier(packed)
            packed = jnp.where(goes_on(packed), turn(packed), packed)
        return packed

    search = functools.partial(cholesky.by_backend, gpu=turns, other=turn)
    return unpack(jax.lax.while_loop(goes_on, search, packed))


def newton(cond: Callable, body: Callable, init: solver.Context) -> solver.Context:
    """`lax.while_loop`, as `solver.solve` calls it, where `init` is the state of MJX's solver.

    Under `vmap`, `body` computes a step in every world, and drops it where `cond` is false. The line searches
    there have no turn.
    """

    def step(context):
        before = _needed.set(cond(context))
        try:
            return body(context)
        finally:
            _needed.reset(before)

    return jax.lax.while_loop(cond, step, init)


def factor(a: jax.Array) -> tuple[jax.Array, bool]:
    """`jax.scipy.linalg.cho_factor`, as MJX calls it."""
    return cholesky.factor(a), False


def solve(factored: tuple[jax.Array, bool], b: jax.Array) -> jax.Array:
    """`jax.scipy.linalg.cho_solve`, as MJX calls it."""
    return cholesky.solve(factored[0], b)


class Seen:
    """A module as MJX sees it: some names are ours, all others are the module's own."""

    def __init__(self, module: Any, **ours: Any):
        self._module = module
        vars(self).update(ours)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


_linalg = Seen(jax.scipy.linalg, cho_factor=factor, cho_solve=solve)
_with_factors = Seen(jax, scipy=Seen(jax.scipy, linalg=_linalg))
_with_loop = Seen(_with_factors, lax=Seen(jax.lax, while_loop=newton))

lean_solver = Replacement(
    (vars(solver), {"jax": _with_loop, "_while_loop_scan": line_search}),
    (vars(smooth), {"jax": _with_factors}),
    (vars(forward), {"jax": _with_factors}),
)
