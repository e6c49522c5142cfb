"""Blocks that come part by part, put into the form that runs as they come."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from glm_jax.checkpoints.array_reader import Buffers, empty_buffers, placed
from glm_jax.model.layer_stacks import as_layers, split
from glm_jax.model.params import LayerParams
from glm_jax.model.streamed_layers import HOST_MEMORY, OffloadedLayers, is_streamed, resident_count


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
            resident.put(as_layers(part.layers).stacked(0, cut), part.first)
        if streamed is not None and part.end > kept:
            others = as_layers(part.layers).stacked(cut, part.end - part.first)
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
        self._layers += split(layers)

    def finish(self) -> tuple[LayerParams, ...]:
        return tuple(self._layers)


class HostStack:
    """Blocks that come one after another, on their way into one stack that begins in hosts'
    memory: streamed ones', or all of a model on CPUs."""

    def __init__(self, count: int, is_streamed: bool):
        self._count, self._is_streamed = count, is_streamed
        self._described: Any = None
        self._buffers: Any = None  # a tree of `Buffers`

    def room(self, layers: LayerParams, first: int) -> LayerParams:
        """`Buffers` for stacked blocks (arrays or descriptions), from `first` on."""
        if self._buffers is None:
            self._described = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), layers
            )
            self._buffers = jax.tree.map(
                lambda x: empty_buffers(x, (self._count, *x.shape[1:])), self._described
            )

        def part(leaf: Any, buffers: Buffers) -> Buffers:
            end = first + leaf.shape[0]
            return Buffers({d: b[first:end] for d, b in buffers.by_device.items()})

        return jax.tree.map(part, layers, self._buffers)

    def put(self, layers: LayerParams, first: int) -> None:
        """Copies stacked blocks to where they belong, from `first` on."""

        def copy(leaf: Array, buffers: Buffers) -> None:
            for shard in leaf.addressable_shards:
                buffers.by_device[shard.device][:] = np.asarray(shard.data)

        jax.tree.map(copy, layers, self.room(layers, first))

    def finish(self) -> LayerParams:
        """The stack."""
        described, structure = jax.tree.flatten(self._described)
        buffers = jax.tree.leaves(self._buffers)
        self._buffers = None
        stacks = []
        for leaf in described:
            # One after another, so that no more than one is there twice.
            kind = HOST_MEMORY if self._is_streamed and is_streamed(leaf) else None
            shape = (self._count, *leaf.shape[1:])
            stacks.append(placed(leaf, buffers.pop(0), shape, kind))
        return jax.tree.unflatten(structure, stacks)
