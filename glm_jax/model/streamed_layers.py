"""Layers whose weights wait in hosts' memory and are copied to the devices one layer ahead.

A model larger than the devices' memory runs as fast as its layers come over the bus. The original
did the same with BMInf.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from glm_jax.errors import UserError
from glm_jax.model.layer_stacks import Index, Step, as_layers
from glm_jax.model.params import LayerParams

DEVICE_MEMORY, HOST_MEMORY = "device", "pinned_host"
# Blocks on a device while streamed ones run: the one that runs, and the next.
IN_FLIGHT = 2
_GIB = 2**30


class OffloadError(UserError):
    """A limit on weights' memory without room for two blocks, or what streamed blocks cannot do."""


@struct.dataclass
class OffloadedLayers:
    """All blocks, in the order in which they run.

    Attributes:
      resident: blocks on the devices, apart.
      streamed: the blocks after them, stacked; arrays that `is_streamed` names lie in the hosts'
        pinned memory.
    """

    resident: tuple[LayerParams, ...]
    streamed: LayerParams
    is_apart = False
    is_streamed = True

    @property
    def resident_count(self) -> int:
        return len(self.resident)

    @property
    def streamed_count(self) -> int:
        return len(as_layers(self.streamed))

    def __len__(self) -> int:
        return self.resident_count + self.streamed_count

    def run(
        self, step: Step, x: Array, cache: Any, bounds: tuple[Index, Index] | None = None
    ) -> tuple[Array, Any]:
        """As `Layers.run`: while one of the streamed blocks runs the next is on its way."""
        first, end = bounds or (0, len(self))
        count, last = self.resident_count, self.streamed_count - 1
        carry = (x, cache)
        for index, layer in enumerate(self.resident):
            is_within = (first <= index) & (index < end)
            carry = _run_if(is_within, functools.partial(step, layer, index), carry)
        begin, stop = (_within(bound - count, last + 1) for bound in (first, end))

        def two(number: Array, carried: Any) -> Any:
            # Two blocks a turn: with one, that which came would be copied to where that one lay.
            layer, carry = carried
            index = begin + 2 * number
            second = fetch(self.streamed, jnp.minimum(index + 1, last))
            carry = step(layer, index + count, *carry)
            # The third goes to the memory of the first, which has run, while the second runs.
            third = jnp.minimum(index + 2, last)
            second, third, carry = jax.lax.optimization_barrier((second, third, carry))
            following = fetch(self.streamed, third)
            return following, step(second, index + 1 + count, *carry)

        fetched = fetch(self.streamed, _within(begin, last))
        turns = _within(stop - begin, last + 1)
        fetched, carry = jax.lax.fori_loop(0, turns // 2, two, (fetched, carry))
        one = functools.partial(step, fetched, stop - 1 + count)
        return _run_if(turns % 2 == 1, one, carry)

    def scan(self, step: Any, x: Array) -> tuple[Array, Array]:
        raise OffloadError("weights in hosts' memory cannot be trained: leave out the limit")

    def map(self, function: Callable[..., LayerParams], *own: Any) -> "OffloadedLayers":
        count = self.resident_count
        of_streamed = jax.tree.map(lambda x: x[count:], own)
        return OffloadedLayers(
            as_layers(self.resident).map(function, *own), function(self.streamed, *of_streamed)
        )

    def unstacked(self) -> "OffloadedLayers":
        return self

    def stacked(self, first: int, end: int) -> LayerParams:
        raise OffloadError("weights in hosts' memory cannot be stacked: leave out the limit")


def _within(bound: Index, high: int) -> Any:
    """Return a bound in [0, high], of the streamed blocks."""
    return min(max(bound, 0), high) if isinstance(bound, int) else jnp.clip(bound, 0, high)


def _run_if(is_run: bool | Array, run: Callable[..., Any], carry: tuple[Any, ...]) -> Any:
    if isinstance(is_run, bool):
        return run(*carry) if is_run else carry
    return jax.lax.cond(is_run, run, lambda *carry: carry, *carry)


def fetch(streamed: Any, index: int | Int[Array, ""]) -> Any:
    """Copy one entry of a tree of stacks, such as a streamed block, to the devices."""

    def one(stack: Array) -> Array:
        here = jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)
        return jax.device_put(here, jax.memory.Space.Device)

    return jax.tree.map(one, streamed)


def is_streamed(stack: Any) -> bool:
    """Whether a stack of parameters lies in hosts' memory: not where an entry is one row, which is
    small, and which TPUs do not copy out of the middle of a tile."""
    return len(stack.shape) > 2


def resident_count(rest: int, layers: Any, num_layers: int, limit_gib: float) -> int:
    """Count the blocks that can stay on a device whose weights may take `limit_gib`.

    Args:
      rest: bytes a device of embedding and final layernorm, which always stay.
      layers: one or more blocks, stacked; arrays or descriptions of them.

    Raises:
      OffloadError: there is no room for two blocks at a time.
    """
    limit = limit_gib * _GIB
    leaves = jax.tree.leaves(layers)
    stacked = len(as_layers(layers))
    layer = device_bytes([x for x in leaves if is_streamed(x)]) // stacked
    rest += num_layers * (device_bytes(layers) // stacked - layer)
    if rest + num_layers * layer <= limit:
        return num_layers
    count = int((limit - rest) // layer) - IN_FLIGHT
    if count < 0:
        minimum = (rest + IN_FLIGHT * layer) / _GIB
        raise OffloadError(
            f"weight_memory_limit={limit_gib:g}: at least {math.ceil(100 * minimum) / 100} GiB a "
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
