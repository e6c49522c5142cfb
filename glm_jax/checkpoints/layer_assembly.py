"""Assembles layers that are read part by part into the form that runs."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

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
    parts: Iterable[Part],
    num_layers: int,
    rest: int,
    limit_gib: float,
    is_stacked: bool = False,
) -> LayerParams | tuple[LayerParams, ...] | OffloadedLayers:
    """Gather all blocks on the devices, or on the hosts those that a limit leaves no room for.

    On CPUs they are stacked. On other devices each is put, as it is read, in arrays of its own or
    into the stack: there is no room for both.

    Args:
      parts: in order.
      rest: bytes a device of the weights outside of blocks.
      is_stacked: stack them on every device, if the limit leaves room for all.

    Raises:
      OffloadError: the limit leaves no room for two blocks.
    """
    num_resident = num_layers
    resident: _Apart | DeviceStack | HostStack = _Apart()
    streamed: HostStack | None = None
    for part in parts:
        if part.first == 0:
            num_resident = resident_count(rest, part.layers, num_layers, limit_gib)
            if num_resident < num_layers:
                streamed = HostStack(num_layers - num_resident, True)
            elif _is_on_cpu(part.layers):
                if part.end == num_layers:
                    return part.layers
                resident = HostStack(num_resident, False)
            elif is_stacked:
                resident = DeviceStack(num_resident)
        cut = min(max(num_resident - part.first, 0), part.end - part.first)
        if cut:
            resident.put(as_layers(part.layers).stacked(0, cut), part.first)
        if streamed is not None and part.end > num_resident:
            others = as_layers(part.layers).stacked(cut, part.end - part.first)
            streamed.put(others, part.first + cut - num_resident)
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


class DeviceStack:
    """Stacks blocks on their devices, where each is written into the stack's memory."""

    def __init__(self, count: int):
        self._count = count
        self._stack: Any = None

    def put(self, layers: LayerParams, first: int) -> None:
        if self._stack is None:
            shardings = jax.tree.map(lambda x: x.sharding, layers)
            self._stack = jax.jit(self._zeros, out_shardings=shardings)(layers)
        self._stack = _write(self._stack, layers, jnp.int32(first))

    def _zeros(self, layers: LayerParams) -> LayerParams:
        return jax.tree.map(lambda x: jnp.zeros((self._count, *x.shape[1:]), x.dtype), layers)

    def finish(self) -> LayerParams:
        return self._stack


@functools.partial(jax.jit, donate_argnums=0)
def _write(stack: LayerParams, layers: LayerParams, first: Int[Array, ""]) -> LayerParams:
    write = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, first, 0)
    return jax.tree.map(write, stack, layers)


class HostStack:
    """Stacks blocks one after another in hosts' memory: the streamed ones, or all of a model on
    CPUs."""

    def __init__(self, count: int, is_streamed: bool):
        self._count, self._is_streamed = count, is_streamed
        self._described: Any = None
        self._buffers: Any = None  # a tree of `Buffers`

    def room(self, layers: LayerParams, first: int) -> LayerParams:
        """Return the `Buffers` of stacked blocks (arrays or descriptions) from `first` on."""
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
        """Copy stacked blocks into the stack, from `first` on."""

        def copy(leaf: Array, buffers: Buffers) -> None:
            for shard in leaf.addressable_shards:
                buffers.by_device[shard.device][:] = np.asarray(shard.data)

        jax.tree.map(copy, layers, self.room(layers, first))

    def finish(self) -> LayerParams:
        """Return the stack."""
        described, structure = jax.tree.flatten(self._described)
        buffers = jax.tree.leaves(self._buffers)
        self._buffers = None
        stacks = []
        for leaf in described:
            # One after another, so that at most one array exists twice.
            kind = HOST_MEMORY if self._is_streamed and is_streamed(leaf) else None
            shape = (self._count, *leaf.shape[1:])
            stacks.append(placed(leaf, buffers.pop(0), shape, kind))
        return jax.tree.unflatten(structure, stacks)
