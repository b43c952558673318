"""Errors that a user can mend, and how a command ends with one of them."""

import errno
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UsageError(Exception):
    """A flag, dataset or folder that cannot be used. Its message says what is wrong, where, and the mend."""


class DatasetError(ValueError):
    """Data that cannot be learnt from; the message names file, episode and step, and says what to do."""


class Stopped(Exception):
    """The run was asked to stop, by a signal, and has saved itself; `code` is the exit code that tells so."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


interruptions: list[int] = []  # the signals of Ctrl-C that a command got


def _interrupt(number: int, _: Any) -> None:
    interruptions.append(number)
    raise KeyboardInterrupt


def check_interrupted() -> None:
    """Raises KeyboardInterrupt if there was a Ctrl-C before, whose own one was swallowed.

    JAX makes Python's garbage collector call it, and an exception in such a call goes no further.
    """
    if interruptions:
        raise KeyboardInterrupt


def guarded(main: Callable[[], None]) -> None:
    """Runs a command's `main`. An error that the user can mend becomes one line on stderr and exit code 2."""
    own = threading.current_thread() is threading.main_thread()
    if own and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's `&` ignores it
        signal.signal(signal.SIGINT, _interrupt)
    for stream in (sys.stdout, sys.stderr):  # an output that knows ASCII alone gets question marks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
    except (UsageError, DatasetError) as error:
        _fail(error, 2)
    except Stopped as stop:
        _fail(stop, stop.code, "stopped")
    except KeyboardInterrupt:
        _fail("interrupted", 130, "stopped")
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        where = error.filename or "the run folder"
        _fail(f"no room left to write {where} ({error.strerror}); free some, then go on with --resume", 2)


def _fail(message: object, code: int, word: str = "error") -> None:
    sys.stderr.write(f"{word}: {message}\n")  # in one piece: threads of a library may be writing there too
    raise SystemExit(code)
