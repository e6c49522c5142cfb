"""How fast a program can be at best: the slowest of computing, reading memory, exchanging
within hosts and between them, and copying from a host."""

import dataclasses

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step asks of a device.

    Attributes:
      flops: of matrix products.
      memory_bytes: read and written once each: weights, cache, optimiser state.
      link_bytes: sent to other devices of the host.
      network_bytes: sent to other hosts.
      host_bytes: copied from a host's memory.
    """

    flops: float
    memory_bytes: float
    link_bytes: float
    network_bytes: float = 0.0
    host_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each of the five would take alone."""

    compute: float
    memory: float
    link: float
    network: float
    host: float

    @property
    def seconds(self) -> float:
        return max(dataclasses.astuple(self))

    @property
    def limit(self) -> str:
        """Which of them is the largest."""
        parts = dataclasses.asdict(self)
        return max(parts, key=lambda name: parts[name])


def roofline(work: Work, hardware: ConfigDict) -> Roofline:
    """The floor of a step's time on a device of `configs/hardware`."""
    over = lambda size, name: size / hardware[name] if size else 0.0
    return Roofline(
        compute=work.flops / hardware.matrix_flops,
        memory=work.memory_bytes / hardware.memory_bandwidth,
        link=over(work.link_bytes, "link_bandwidth"),
        network=over(work.network_bytes, "network_bandwidth"),
        host=over(work.host_bytes, "host_bandwidth"),
    )
