"""Puts our functions in the place of MJX's while a function is traced."""

import contextlib
import threading
from collections.abc import Iterator


class Replacement:
    """Dictionaries of MJX (a table, or `vars` of a module) whose entries are ours for a while.

    A call gives a context manager, which is a decorator as well: `jax.jit(exact_contacts()(mjx.step))`. A
    function that is compiled inside keeps our functions, and one that is compiled outside keeps MJX's own.
    So pass a different function object to `jax.jit` for each, as the decorator does. Uses may be nested.
    Other threads that trace MJX at the same time see the same functions.

    Args:
      places: pairs (dictionary, our entries in it).
    """

    def __init__(self, *places: tuple[dict, dict]):
        self.places, self.lock = places, threading.Lock()
        self.holders = 0  # the number of open uses
        self.upstream = []  # for each place MJX's own entries, from before the first use

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if self.holders == 0:
                self.upstream = [{name: table.get(name) for name in ours} for table, ours in self.places]
                for table, ours in self.places:
                    table.update(ours)
            self.holders += 1
        try:
            yield
        finally:
            with self.lock:
                self.holders -= 1
                if self.holders == 0:
                    for (table, _), upstream in zip(self.places, self.upstream):
                        table.update(upstream)
                        for name in [name for name, known in upstream.items() if known is None]:
                            del table[name]
