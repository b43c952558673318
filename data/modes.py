"""JAX's switches as a user may have set them, and what our code makes of each."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import jax

from ooo_rl.data.errors import UsageError

DEVICE_COUNT = "--xla_force_host_platform_device_count"
HARMLESS = ("--xla_backend_optimization_level", DEVICE_COUNT)  # XLA knows these


@contextlib.contextmanager
def usual_promotion() -> Iterator[None]:
    """Ranks and types of arrays are promoted as usual, even where the user's own code forbids it."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def use_float32() -> None:
    """Takes back JAX_ENABLE_X64 in a process that is ours: all programs compute in float32."""
    jax.config.update("jax_enable_x64", False)


def use_all_cores() -> None:
    """Makes each core of a CPU one of JAX's devices, unless the user has said how many there are to be."""
    told = "JAX_NUM_CPU_DEVICES" in os.environ or DEVICE_COUNT in os.environ.get("XLA_FLAGS", "")
    if not told:
        ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        with contextlib.suppress(RuntimeError):  # JAX has been used: its devices stay as they are
            jax.config.update("jax_num_cpu_devices", len(ours))


def check_jax() -> None:
    """Raises UsageError if JAX computes in 64 bits, or has no device to run on, with the reason."""
    if jax.config.jax_enable_x64:
        raise UsageError(
            "JAX is set to 64 bits, and our programs compute in float32: unset JAX_ENABLE_X64, or call "
            'jax.config.update("jax_enable_x64", False) before training'
        )
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second one where a platform's plugin is not there
        asked = os.environ.get("JAX_PLATFORMS", "")
        advice = f"unset JAX_PLATFORMS, which is {asked!r}, or" if asked else "look at its installation:"
        reason = next(iter(str(error).splitlines()), "none of those asked for")
        raise UsageError(
            f"JAX finds no device to run on ({reason}); {advice} pip install 'jax[cuda12]' for a GPU"
        ) from None


def check_xla_flags() -> None:
    """Raises UsageError if XLA_FLAGS has a flag that this XLA does not know: XLA would kill the process."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    if all(flag.startswith(HARMLESS) for flag in flags):
        return
    asked = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], capture_output=True, text=True
    )
    lines = [line for line in asked.stderr.splitlines() if "nknown flag" in line]
    if asked.returncode and lines:
        unknown = lines[0].partition("XLA_FLAGS:")[2].strip() or lines[0]
        raise UsageError(f"XLA_FLAGS: this version of XLA does not know {unknown}; take it out of XLA_FLAGS")
