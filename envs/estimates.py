"""What a step of all worlds costs on a GPU and on the host's cores: estimates, which no GPU has confirmed.

docs/physics.md says where each number is from, and has the command that measures them where a GPU is.
"""

from dataclasses import dataclass
from typing import Any

LEVEL = 1_024  # worlds up to which a step on a GPU takes the same time
UPDATE_MS = 0.15, 0.45  # a gradient step of IQL, 256 units: of one seed in the best case, of 16 in the worst


@dataclass(frozen=True)
class Cost:
    """us: the least and the most that MJX takes for a step on an H100. rate: steps/s of C MuJoCo on a core."""

    us: tuple[float, float]
    rate: float

    def mjx_ms(self, worlds: int) -> tuple[float, float]:
        """Milliseconds of a step of so many worlds on a GPU: (least, most)."""
        times = max(1.0, worlds / LEVEL)
        return self.us[0] * times / 1e3, self.us[1] * times / 1e3

    def mujoco_ms(self, worlds: int, cores: int) -> float:
        """Milliseconds of a step of so many worlds on the cores of a host, without the call's own cost."""
        return 1e3 * worlds / (self.rate * min(cores, worlds))


# By class of task. Steps/s of the bare C engine with one world: docs/physics.md, "Speed".
COSTS = {}


def of(env: Any) -> Cost | None:
    """The cost of an environment's body, None if it is not known."""
    return next((COSTS[kind.__name__] for kind in type(env).__mro__ if kind.__name__ in COSTS), None)
