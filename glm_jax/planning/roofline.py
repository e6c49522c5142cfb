"""How fast a program can be at best: the slowest of computing, reading memory and exchanging."""

import dataclasses

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step asks of a device.

    Attributes:
      flops: of matrix products.
      memory_bytes: read and written once each: weights, cache, optimiser state.
      link_bytes: sent to other devices.
    """

    flops: float
    memory_bytes: float
    link_bytes: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each of the three would take alone."""

    compute: float
    memory: float
    link: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.link)

    @property
    def limit(self) -> str:
        """Which of them is the largest."""
        parts = dataclasses.asdict(self)
        return max(parts, key=lambda name: parts[name])


def roofline(work: Work, hardware: ConfigDict) -> Roofline:
    """The floor of a step's time on a device of `configs/hardware`."""
    return Roofline(
        compute=work.flops / hardware.matrix_flops,
        memory=work.memory_bytes / hardware.memory_bandwidth,
        link=work.link_bytes / hardware.link_bandwidth,
    )
