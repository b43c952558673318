"""How many runs there is room for at once, found from the shapes of a run's state before it is made."""

import math
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ooo_rl.data.errors import UsageError
from ooo_rl.data.runs import processes

SHARE = 0.8  # of the free memory that we plan with: the rest is for the evaluation and for fragments
# Gradients, batches and activations, in multiples of what a run holds beside its ring. Measured with 256
# units and batches of 256: IQL 1.3, RLPD 2.4, CQL 16.
WORK = 16
GIB = 2**30


def size(tree: Any) -> int:
    """The bytes of a tree of arrays, or of their shapes."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def of_work(state: Any) -> int:
    """The bytes that the compiled chunks need beside the `state` of a run, which they change in place."""
    return WORK * (size(state) - size(getattr(state, "ring", None)))


def of_device(device: Any) -> int | None:
    """The bytes that are free on a device; None if it does not tell."""
    if device.platform == "cpu":
        return of_host()
    try:
        found = device.memory_stats() or {}
    except RuntimeError:  # one for which we only compile
        return None
    return found["bytes_limit"] - found.get("bytes_in_use", 0) if "bytes_limit" in found else None


def of_host() -> int | None:
    """The bytes that are free in this machine's memory, or in the share of it that a container has."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return None
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return free
    # What files have left in memory is given back when it is needed.
    used = int(used) - int(stat.get("inactive_file", 0)) - int(stat.get("active_file", 0))
    return min(free, int(limit) - used) if limit.isdecimal() else free


def room(args: Any, num_runs: int, mesh: Mesh, state: Any) -> int:
    """The number of runs that are to be on the devices of `mesh` at once; the others wait in host memory.

    `state` is one run's; what all runs share is in its place already. Raises UsageError if more runs, or
    larger ones, are asked for than there is memory for.
    """
    own, per_device, need = processes.own_devices(mesh), math.ceil(num_runs / mesh.size), size(state)
    free, on_cpu = of_device(own[0]), own[0].platform == "cpu"
    fit = math.ceil(args.runs_at_once / mesh.size) or per_device
    with processes.together():
        if not args.runs_at_once and free is not None:
            if on_cpu:  # its devices share one memory, and each works on one run at a time
                fit = max(int(SHARE * free / len(own) - of_work(state)) // need, 0)
            else:
                fit = int(SHARE * free) // (need + of_work(state))
            if fit < 1 or (on_cpu and fit < per_device):  # runs that wait would wait in the same memory
                raise _too_many(args, num_runs, fit * mesh.size, need, free)
    # All processes take the same number, that of the one with the least memory.
    fit = min(int(text) for text in processes.texts(str(fit)))
    with processes.together():
        host, waiting = of_host(), 2 * size(state)  # the states before a chunk, and those after it
        if fit < per_device and host is not None and num_runs * waiting > SHARE * host:
            most = max(fit * mesh.size, int(SHARE * host) // waiting)
            raise _too_many(args, num_runs, most, waiting, host)
    turns = math.ceil(per_device / min(fit, per_device))
    return math.ceil(per_device / turns) * mesh.size


def _too_many(args: Any, num_runs: int, fit: int, need: int, free: int) -> UsageError:
    """What is too large, and the flags that make parts of it."""
    said = f"{num_runs} runs take {need / GIB:.2g} GiB of memory each, and {free / GIB:.2g} GiB are free"
    settings, seeds = num_runs // args.num_seeds, fit // (num_runs // args.num_seeds)
    if not fit:
        return UsageError(f"{said}: not even one does; take a smaller --buffer-size, --num-envs or --hidden")
    if not seeds:
        return UsageError(f"{said}: {fit} fit; --sweep fewer settings at a time than these {settings}")
    parts = [(args.seed + k, min(seeds, args.num_seeds - k)) for k in range(0, args.num_seeds, seeds)]
    flags = "; ".join(f"--seed {first} --num-seeds {number}" for first, number in parts[:4])
    more = f"; and {len(parts) - 4} more" if len(parts) > 4 else ""
    return UsageError(f"{said}: {fit} fit; make {len(parts)} experiments of it, by {flags}{more}")
