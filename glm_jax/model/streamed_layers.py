"""Blocks whose weights wait in the memory of hosts and come to the devices one ahead.

What the original did by BMInf: a model larger than the devices' memory runs, as fast as its
blocks come over the bus.
"""

import math
from typing import Any

import jax
from flax import struct
from jaxtyping import Array, Int

from glm_jax.errors import UserError
from glm_jax.model.params import LayerParams

DEVICE_MEMORY, HOST_MEMORY = "device", "pinned_host"
# Blocks that are on a device while streamed ones run: that which runs, and the next.
IN_FLIGHT = 2
_GIB = 2**30


class OffloadError(UserError):
    """A limit that not even a model of two blocks at a time keeps to."""


@struct.dataclass
class OffloadedLayers:
    """All blocks, in the order in which they run.

    Attributes:
      resident: blocks on the devices, apart.
      streamed: the blocks after them, stacked; what `is_streamed` in the hosts' pinned memory.
    """

    resident: tuple[LayerParams, ...]
    streamed: LayerParams

    @property
    def resident_count(self) -> int:
        return len(self.resident)

    @property
    def streamed_count(self) -> int:
        return _count(self.streamed)


def _count(layers: LayerParams) -> int:
    return int(layers.input_layernorm.scale.shape[0])


def fetch(streamed: Any, index: int | Int[Array, ""]) -> Any:
    """One of the streamed blocks, or of what is kept for each, on its way to the devices."""

    def one(stack: Array) -> Array:
        here = jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)
        copied: Array = jax.device_put(here, jax.memory.Space.Device)
        return copied

    return jax.tree.map(one, streamed)


def is_streamed(stack: Any) -> bool:
    """Whether a stack of parameters leaves the device: not where an entry is one row, which
    is small, and which TPUs do not copy out of the middle of a tile."""
    return len(stack.shape) > 2


def resident_count(rest: int, layers: Any, num_layers: int, limit_gib: float) -> int:
    """How many blocks stay on a device, so that its weights take no more than a limit.

    Args:
      rest: bytes a device of what always stays: embedding, final layernorm.
      layers: some blocks, stacked; arrays or descriptions of them.

    Raises:
      OffloadError: there is no room for two blocks at a time.
    """
    limit = limit_gib * _GIB
    leaves = jax.tree.leaves(layers)
    layer = device_bytes([x for x in leaves if is_streamed(x)]) // _count(layers)
    rest += num_layers * (device_bytes(layers) // _count(layers) - layer)
    if rest + num_layers * layer <= limit:
        return num_layers
    count = int((limit - rest) // layer) - IN_FLIGHT
    if count < 0:
        least = (rest + IN_FLIGHT * layer) / _GIB
        raise OffloadError(
            f"weight_memory_limit={limit_gib:g}: at least {math.ceil(100 * least) / 100} GiB a "
            f"device, for the embedding and {IN_FLIGHT} blocks at a time; give more, or fewer bits"
        )
    return count


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays, or of descriptions of them, on one device's own memory."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if leaf.sharding.memory_kind != HOST_MEMORY
    )
