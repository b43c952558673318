"""Opens the files of datasets. Whatever a decoder raises becomes a DatasetError of one line here."""

import contextlib
import errno
import pathlib
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

from ooo_rl.data.errors import DatasetError

SUFFIXES = (".npz", ".hdf5", ".h5")
NUMBERS = "fiub"  # numpy's kinds of types that become float32: floats, integers, bools
WORDS = {"S": "text", "U": "text", "O": "text or Python objects", "c": "complex numbers"}


def is_file(name: str | pathlib.Path) -> bool:
    """Whether `name` ends as the files that hold a dataset alone do; capitals do not matter."""
    return pathlib.PurePath(name).suffix.lower() in SUFFIXES


@contextlib.contextmanager
def decoding(path: pathlib.Path) -> Iterator[None]:
    """Turns what is raised inside into a DatasetError: damaged bytes make decoders raise almost anything.

    Only what reads the file `path` should be inside, since faults of our own would be hidden too.
    """
    try:
        yield
    except DatasetError:
        raise
    except Exception as error:
        raise DatasetError(f"{path}: {_reason(error)}") from None


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[Any]:
    """The open file `path`: numpy's for .npz, h5py's for others. See `decoding` for errors inside."""
    with decoding(path):
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as file:
                yield file
        else:
            with h5py.File(path, "r") as file:
                yield file


def _reason(error: Exception) -> str:
    message = printable(" ".join(str(error).split()))
    message = message if len(message) < 200 else f"{message[:200]} ..."
    number = getattr(error, "errno", None)
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if number == errno.EACCES:
        return "you may not read it (permission denied); change its permissions"
    if number in (errno.EAGAIN, errno.EWOULDBLOCK) or "lock file" in message or "already open" in message:
        return "another program has it open and may be writing it; wait until that program has closed it"
    if isinstance(error, MemoryError):
        return f"does not fit into memory, or is damaged ({message})"
    if "Object arrays" in message:
        return "holds Python objects, not numbers; save plain arrays of numbers"
    return f"damaged or not a file of this type ({message}); copy or download it again"


def printable(text: str | bytes) -> str:
    """`text`, with escapes for what does not print: a damaged file has odd names."""
    if isinstance(text, bytes):  # h5py's names that are not UTF-8
        text = text.decode(errors="backslashreplace")
    return text if text.isprintable() and text.isascii() else ascii(text)[1:-1]


def names(file: Any) -> tuple[list[str], list[str]]:
    """The names of the arrays in an open file, and those of its groups. Nothing is read."""
    if isinstance(file, np.lib.npyio.NpzFile):
        return list(file.files), []
    nodes = {key: file.get(key) for key in file}  # None for a link that leads nowhere
    arrays = [key for key, node in nodes.items() if isinstance(node, h5py.Dataset)]
    return arrays, [key for key, node in nodes.items() if isinstance(node, h5py.Group)]


def numbers(node: Any, where: str) -> np.ndarray:
    """The array at `node`, which is numpy's or h5py's, read into memory.

    Raises DatasetError, which begins with `where`, if it holds no numbers or is a single number.
    """
    if not isinstance(node, np.ndarray | h5py.Dataset):
        raise DatasetError(f"{where} is not an array of numbers")
    if node.dtype.kind not in NUMBERS:
        raise DatasetError(f"{where} holds {WORDS.get(node.dtype.kind, node.dtype)}, not numbers")
    if not node.shape:
        raise DatasetError(f"{where} is a single number; expected one row for each step")
    return node[()] if isinstance(node, h5py.Dataset) else node
