"""How fast a program can be at best: the slowest of computing, reading memory, exchanging and
copying from hosts."""

import dataclasses

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step asks of a device.

    Attributes:
      flops: of matrix products.
      memory_bytes: read and written once each: weights, cache, optimiser state.
      link_bytes: sent to other devices.
      host_bytes: copied from a host's memory.
    """

    flops: float
    memory_bytes: float
    link_bytes: float
    host_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each of the four would take alone."""

    compute: float
    memory: float
    link: float
    host: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.link, self.host)

    @property
    def limit(self) -> str:
        """Which of them is the largest."""
        parts = dataclasses.asdict(self)
        return max(parts, key=lambda name: parts[name])


def roofline(work: Work, hardware: ConfigDict) -> Roofline:
    """The floor of a step's time on a device of `configs/hardware`."""
    copied = work.host_bytes / hardware.host_bandwidth if work.host_bytes else 0.0
    return Roofline(
        compute=work.flops / hardware.matrix_flops,
        memory=work.memory_bytes / hardware.memory_bandwidth,
        link=work.link_bytes / hardware.link_bandwidth,
        host=copied,
    )
