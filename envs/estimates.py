"""What a step of all worlds costs: on a GPU as measured on an H200, on the host's cores as estimated.

docs/physics.md has the measurements, and the command that makes them.
"""

from dataclasses import dataclass
from typing import Any

UPDATE_MS = 0.07, 0.22  # a gradient step of IQL on an H200, 256 units: of one seed, and of 16 at once


@dataclass(frozen=True)
class Cost:
    """mjx: milliseconds of an environment step of 1,024 worlds on MJX, measured on an H200.

    warp: of 8,192 worlds on MJX-Warp, there. Fewer worlds count as much: 64 took 0.5 to 0.7 times that long.

    rate: environment steps/s of C MuJoCo on one core of an AMD EPYC, measured.
    """

    mjx: float
    warp: float
    rate: float

    def ms(self, engine: str, worlds: int, cores: int) -> float:
        """Milliseconds of a step of so many worlds; `mujoco` on the host's cores, without the call's cost."""
        if engine == "mujoco":
            return 1e3 * worlds / (self.rate * min(cores, worlds))
        time, level = (self.warp, 8_192) if engine == "mjx-warp" else (self.mjx, 1_024)
        return time * max(1.0, worlds / level)


COSTS = {  # by class of task
    "HalfCheetah": Cost(6.2, 5.5, 39_400),
    "Hopper": Cost(13.7, 35.1, 16_294),
    "Walker2d": Cost(22.7, 12.7, 13_081),
    "Ant": Cost(116.2, 21.2, 6_518),
}


def of(env: Any) -> Cost | None:
    """The cost of an environment's body, None if it is not known."""
    return next((COSTS[kind.__name__] for kind in type(env).__mro__ if kind.__name__ in COSTS), None)
