"""The roofline: a step takes at least the longest of its compute, memory, link, network and host
copy times."""

import dataclasses

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one device in a step.

    Attributes:
      flops: of matrix products.
      memory_bytes: weights, cache and optimiser state, each read and written once.
      link_bytes: sent to other devices of the host.
      network_bytes: sent to other hosts.
      host_bytes: copied from and to the host's memory.
    """

    flops: float
    memory_bytes: float
    link_bytes: float
    network_bytes: float = 0.0
    host_bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each resource would take alone."""

    compute: float
    memory: float
    link: float
    network: float
    host: float

    @property
    def seconds(self) -> float:
        """The least time of a step."""
        return max(dataclasses.astuple(self))

    @property
    def limit(self) -> str:
        """The name of the slowest resource."""
        parts = dataclasses.asdict(self)
        return max(parts, key=lambda name: parts[name])


def roofline(work: Work, hardware: ConfigDict) -> Roofline:
    """Return the least time of a step, by resource.

    Args:
      hardware: of a file of `configs/hardware`; rates are in operations or bytes per second.
    """
    over = lambda size, name: size / hardware[name] if size else 0.0
    return Roofline(
        compute=work.flops / hardware.matrix_flops,
        memory=work.memory_bytes / hardware.memory_bandwidth,
        link=over(work.link_bytes, "link_bandwidth"),
        network=over(work.network_bytes, "network_bandwidth"),
        host=over(work.host_bytes, "host_bandwidth"),
    )
