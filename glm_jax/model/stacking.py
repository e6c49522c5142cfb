"""Blocks that come part by part, put into stacks as they come."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.model.offload import HostStack, OffloadedLayers, resident_count
from glm_jax.model.params import LayerParams


@dataclasses.dataclass(frozen=True)
class Part:
    """Stacked blocks from `first` up to `end`."""

    first: int
    end: int
    layers: LayerParams


def stacked(
    parts: Iterable[Part], num_layers: int, rest: int, limit_gib: float
) -> LayerParams | OffloadedLayers:
    """All blocks: on the devices, or those that a limit has no room for on the hosts.

    Args:
      parts: in order.
      rest: bytes a device of the weights that are no blocks.

    Raises:
      OffloadError: the limit leaves no room for two blocks.
    """
    kept = num_layers
    resident: _DeviceStack | HostStack | None = None
    streamed: HostStack | None = None
    for part in parts:
        if part.first == 0:
            kept = resident_count(rest, part.layers, num_layers, limit_gib)
            if part.end == num_layers == kept:
                return part.layers
            streamed = None if kept == num_layers else HostStack(num_layers - kept, True)
            resident = None if kept == 0 else _stack(part.layers, kept)
        cut = min(max(kept - part.first, 0), part.end - part.first)
        if resident is not None and cut:
            resident.put(_cut(part.layers, 0, cut), part.first)
        if streamed is not None and part.end > kept:
            others = _cut(part.layers, cut, part.end - part.first)
            streamed.put(others, part.first + cut - kept)
    kept_layers = None if resident is None else resident.finish()
    if streamed is not None:
        return OffloadedLayers(kept_layers, streamed.finish())
    assert kept_layers is not None
    return kept_layers


def _stack(layers: LayerParams, count: int) -> "_DeviceStack | HostStack":
    devices = jax.tree.leaves(layers)[0].devices()
    is_cpu = next(iter(devices)).platform == "cpu"
    return HostStack(count, False) if is_cpu else _DeviceStack(count)


def _cut(layers: LayerParams, first: int, end: int) -> Any:
    if (first, end) == (0, len(layers.input_layernorm.scale)):
        return layers
    return jax.tree.map(lambda x: x[first:end], layers)


class _DeviceStack:
    """Blocks that are written into their stack on the devices, in place."""

    def __init__(self, count: int):
        self._count = count
        self._layers: Any = None

    def put(self, layers: LayerParams, first: int) -> None:
        if self._layers is None:
            self._layers = jax.tree.map(self._empty, layers)
        self._layers = jax.tree.map(
            lambda stack, x: _put_one(stack.sharding)(stack, x, first), self._layers, layers
        )

    def _empty(self, x: jax.Array) -> jax.Array:
        return jnp.zeros((self._count, *x.shape[1:]), x.dtype, device=x.sharding)

    def finish(self) -> LayerParams:
        stacked: LayerParams = self._layers
        return stacked


@functools.cache
def _put_one(sharding: jax.sharding.Sharding) -> Any:
    def put(stack: jax.Array, x: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(stack, x, first, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)
