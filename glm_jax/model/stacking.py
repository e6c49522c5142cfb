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
    resident: Any = None
    host: HostStack | None = None
    some: Any = None
    for part in parts:
        if part.first == 0:
            kept = resident_count(rest, part.layers, num_layers, limit_gib)
            host = None if kept == num_layers else HostStack(num_layers - kept)
            if part.end == num_layers == kept:
                return part.layers
        here = max(0, min(part.end, kept) - part.first)
        if here:
            resident = _put(resident, _cut(part.layers, 0, here), part.first, kept)
        if host is not None and part.end > kept:
            some = _cut(part.layers, here, part.end - part.first)
            host.put(some, part.first + here - kept)
    if host is None:
        whole: LayerParams = resident
        return whole
    return OffloadedLayers(resident, host.finish(some))


def _cut(layers: LayerParams, first: int, end: int) -> Any:
    if (first, end) == (0, len(layers.input_layernorm.scale)):
        return layers
    return jax.tree.map(lambda x: x[first:end], layers)


def _put(layers: Any, part: Any, first: int, count: int) -> Any:
    """Writes some layers into the stack of all, which is made for the first of them."""

    def empty(x: jax.Array) -> jax.Array:
        shape = (count, *x.shape[1:])
        return jnp.zeros(shape, x.dtype, device=x.sharding)

    if layers is None:
        layers = jax.tree.map(empty, part)
    return jax.tree.map(lambda stack, x: _put_one(stack.sharding)(stack, x, first), layers, part)


@functools.cache
def _put_one(sharding: jax.sharding.Sharding) -> Any:
    def put(stack: jax.Array, x: jax.Array, first: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(stack, x, first, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)
