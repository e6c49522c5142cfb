"""Blocks that come part by part, put into the form that runs as they come."""

import dataclasses
from collections.abc import Iterable

import jax

from glm_jax.model.offload import HostStack, OffloadedLayers, resident_count
from glm_jax.model.params import LayerParams, layers_apart, some_layers


@dataclasses.dataclass(frozen=True)
class Part:
    """Stacked blocks from `first` up to `end`."""

    first: int
    end: int
    layers: LayerParams


def gathered(
    parts: Iterable[Part], num_layers: int, rest: int, limit_gib: float
) -> LayerParams | tuple[LayerParams, ...] | OffloadedLayers:
    """All blocks: on the devices, or those that a limit has no room for on the hosts.

    On CPUs they are stacked. On other devices they come apart, and never lie in a stack: for
    both of them there is no room.

    Args:
      parts: in order.
      rest: bytes a device of the weights that are no blocks.

    Raises:
      OffloadError: the limit leaves no room for two blocks.
    """
    kept = num_layers
    resident: _Apart | HostStack = _Apart()
    streamed: HostStack | None = None
    for part in parts:
        if part.first == 0:
            kept = resident_count(rest, part.layers, num_layers, limit_gib)
            if kept < num_layers:
                streamed = HostStack(num_layers - kept, True)
            elif _is_on_cpu(part.layers):
                if part.end == num_layers:
                    return part.layers
                resident = HostStack(kept, False)
        cut = min(max(kept - part.first, 0), part.end - part.first)
        if cut:
            resident.put(some_layers(part.layers, 0, cut), part.first)
        if streamed is not None and part.end > kept:
            others = some_layers(part.layers, cut, part.end - part.first)
            streamed.put(others, part.first + cut - kept)
    if streamed is None:
        return resident.finish()
    assert isinstance(resident, _Apart)
    return OffloadedLayers(resident.finish(), streamed.finish())


def _is_on_cpu(layers: LayerParams) -> bool:
    return next(iter(jax.tree.leaves(layers)[0].devices())).platform == "cpu"


class _Apart:
    """Blocks on the devices, each in arrays of its own."""

    def __init__(self) -> None:
        self._layers: list[LayerParams] = []

    def put(self, layers: LayerParams, first: int) -> None:
        assert first == len(self._layers), "parts come in order"
        self._layers += layers_apart(layers)

    def finish(self) -> tuple[LayerParams, ...]:
        return tuple(self._layers)
