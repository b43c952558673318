"""What a step of all worlds costs on a GPU and on the host's cores: estimates, which no GPU has confirmed.

docs/physics.md has them in a table, and the command that measures them where a GPU is.
"""

from dataclasses import dataclass
from typing import Any

LEVEL = 1_024  # worlds up to which a step on a GPU takes the same time
LAUNCH_US = 1.4, 2.9  # least time of a launch inside a CUDA graph, assumed: docs/speed.md
UPDATE_MS = 0.15, 0.45  # a gradient step of IQL, 256 units: one seed in the best case, 16 in the worst


@dataclass(frozen=True)
class Cost:
    """launches: of an environment step of 64 worlds on MJX, counted by tests/benchmarks/gpu_cost.py.

    rate: environment steps/s of C MuJoCo on one core of an AMD EPYC, measured: docs/physics.md.
    """

    launches: int
    rate: float

    def mjx_ms(self, worlds: int) -> tuple[float, float]:
        """Milliseconds of a step of so many worlds on an H100: (least, most)."""
        times = max(1.0, worlds / LEVEL) * self.launches / 1e3
        return LAUNCH_US[0] * times, LAUNCH_US[1] * times

    def mujoco_ms(self, worlds: int, cores: int) -> float:
        """Milliseconds of a step of so many worlds on the cores of a host, without the call's own cost."""
        return 1e3 * worlds / (self.rate * min(cores, worlds))


COSTS = {  # by class of task
    "HalfCheetah": Cost(2_467, 39_400),
    "Hopper": Cost(6_875, 16_294),
    "Walker2d": Cost(7_272, 13_081),
    "Ant": Cost(9_984, 6_518),
}


def of(env: Any) -> Cost | None:
    """The cost of an environment's body, None if it is not known."""
    return next((COSTS[kind.__name__] for kind in type(env).__mro__ if kind.__name__ in COSTS), None)
