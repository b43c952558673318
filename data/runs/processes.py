"""Several processes, on one machine or on many, that run one experiment together.

All of them run the same script. JAX connects them (`jax.distributed`), and the runs are spread over the
devices of all. Process 0 alone prints and writes; the others need to see the folder that it writes, because
each reads and writes its part of a checkpoint there. A process that was started alone has nothing to do here.
"""

import collections
import contextlib
import json
import os
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ooo_rl.data.errors import DatasetError, UsageError

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
CLUSTERS = (  # whose variables JAX reads, too: a sign of it, the number of processes, this one's
    ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID"),
    ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)
SHOWN_SECONDS = 20  # within which a network's file system shows what another machine has written
WAIT_SECONDS = 60  # that a process which has ended waits for the others, before all are ended
LONGEST_TEXT = 4000  # bytes of what one process tells the others


def join() -> None:
    """Connects this process to those that were started with it, if its environment tells of any.

    By hand, JAX_COORDINATOR_ADDRESS is host:port of process 0, where the port is free, JAX_NUM_PROCESSES the
    number of processes, and JAX_PROCESS_ID this one's, from 0. Started by SLURM's `srun` or by Open MPI's
    `mpirun`, a process needs none of them, but JAX_NUM_PROCESSES=1 makes it run alone. From here on all but
    process 0 are silent, unless they crash.
    """
    count, number = _count_and_number()
    if count == 1:
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from the session
    if number == 0:
        print(
            f"waiting for {count - 1} more processes; {COUNT}=1 runs one alone", file=sys.stderr, flush=True
        )
    try:
        jax.distributed.initialize(
            num_processes=count, process_id=number, shutdown_timeout_seconds=WAIT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"the {count} processes do not come together ({str(error).splitlines()[0]}); set {ADDRESS}, "
            f"{COUNT} and {NUMBER} for each of them, or {COUNT}=1 to run this one alone"
        ) from None
    if not is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)


def _count_and_number() -> tuple[int, int]:
    """The number of processes that were started together, and this one's, as the environment tells them."""
    given = {name: os.environ[name] for name in (ADDRESS, COUNT, NUMBER) if name in os.environ}
    names = next((names for sign, *names in CLUSTERS if {sign, *names} <= os.environ.keys()), ())
    count, number = (
        given.get(ours, os.environ.get(of)) for ours, of in zip((COUNT, NUMBER), names or ("", ""))
    )
    if given.get(COUNT) == "1" or (not given and count in (None, "1")):
        return 1, 0
    if count is None or number is None or (not names and ADDRESS not in given):
        missing = [name for name in (ADDRESS, COUNT, NUMBER) if name not in given]
        raise UsageError(f"{' and '.join(given)} is set, and so must be {' and '.join(missing)}")
    if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
        raise UsageError(f"process {number!r} of {count!r}: {NUMBER} must be from 0 to {COUNT} - 1")
    if not re.fullmatch(r".+:\d+", given.get(ADDRESS, "host:0")):
        raise UsageError(f"{ADDRESS}={given[ADDRESS]}: it must be host:port of process 0")
    return int(count), int(number)


def are_several() -> bool:
    """Whether JAX was told of other processes."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return not are_several() or jax.process_index() == 0


def in_turn(devices: list) -> list:
    """`devices`, one of each process in turn, so that few of them are spread over all processes."""
    turns, seen = [], collections.Counter()
    for device in devices:
        turns.append((seen[device.process_index], device.process_index))
        seen[device.process_index] += 1
    return [device for _, device in sorted(zip(turns, devices), key=lambda pair: pair[0])]


def own_devices(mesh: Mesh) -> list:
    """The devices of `mesh` that are this process's."""
    return [device for device in mesh.devices.flat if device.process_index == jax.process_index()]


def on_host(x: Any) -> np.ndarray:
    """The whole of an array on the host of every process, wherever its parts are."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def texts(own: str) -> list[str]:
    """What each process gives, from process 0 on; all must ask."""
    if not are_several():
        return [own]
    row = np.frombuffer(own.encode()[:LONGEST_TEXT].ljust(LONGEST_TEXT, b"\0"), np.uint8)[None]
    devices = in_turn(jax.devices())[: jax.process_count()]
    split = NamedSharding(Mesh(devices, ("processes",)), PartitionSpec("processes"))
    rows = on_host(jax.make_array_from_callback((len(devices), LONGEST_TEXT), split, lambda _: row))
    return [bytes(row).decode(errors="replace").rstrip("\0") for row in rows]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An error within, in one process, is one in all of them: none waits for another that has gone.

    What is within must not wait for other processes, since one of them may have left it.
    """
    wrong = None
    try:
        yield
    except (Exception, SystemExit) as error:
        if not are_several():
            raise
        wrong = error
    told = texts("" if wrong is None else _in_words(wrong)) if are_several() else []
    if wrong is not None:
        raise wrong
    for number, text in enumerate(told):
        if text:
            raise UsageError(f"process {number}: {text}")


def _in_words(error: BaseException) -> str:
    if isinstance(error, SystemExit):  # from the parser of the flags, which has said why
        return "it has ended; was it started with the same flags?"
    return str(error) if isinstance(error, UsageError | DatasetError) else f"{type(error).__name__}: {error}"


def first_and_then_others(function: Callable[[], Any]) -> Any:
    """`function()`, which may leave files on a disk that others share; so the first process does it alone."""
    result = None
    for turn in (True, False) if are_several() else (True,):
        with together():
            if is_first() == turn:
                result = function()
    return result


def is_shown(path: pathlib.Path) -> bool:
    """Whether the file `path`, which process 0 has written, is to be seen here."""
    last = time.monotonic() + SHOWN_SECONDS
    while not path.is_file():
        if time.monotonic() > last:
            return False
        time.sleep(0.1)
    return True


def check_same(facts: dict[str, Any]) -> None:
    """Raises UsageError, in all processes, if one of them has other `facts` than process 0."""
    first, *others = [json.loads(text) for text in texts(json.dumps(facts))]
    for number, theirs in enumerate(others, start=1):
        if differing := [name for name in first if theirs[name] != first[name]]:
            raise UsageError(
                f"process {number} has another {' and another '.join(differing)} than process 0; start all "
                f"by the same command, or each for itself, with {COUNT}=1"
            )
