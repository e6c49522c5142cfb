"""A model's layers, one interface over the forms in which their weights lie.

Stacked on a leading axis is the form that is stored and trained in a loop; apart is the form that
runs without copying weights; streamed from hosts' memory is in `streamed_layers`. `as_layers`
gives the interface of what `GLMParams.layers` holds.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from glm_jax.model.params import GLMParams, LayerParams, LinearParams, map_layer_linears

Index = int | Array
# step(layer, index, x, cache) -> x, cache: the layer's own cache where layers are apart, else that
# of all layers.
Step = Callable[[LayerParams, Index, Array, Any], tuple[Array, Any]]


@runtime_checkable
class Layers(Protocol):
    """A model's layers, in the order in which they run; `len` counts them.

    Attributes:
      is_apart: each layer has arrays of its own, and so has the cache that belongs to it.
      is_streamed: weights wait in hosts' memory.
    """

    @property
    def is_apart(self) -> bool: ...

    @property
    def is_streamed(self) -> bool: ...

    def __len__(self) -> int: ...

    def run(
        self, step: Step, x: Array, cache: Any, bounds: tuple[Index, Index] | None = None
    ) -> tuple[Array, Any]:
        """Run `step` over the layers from the first bound up to the second, by default all.

        Args:
          cache: of all layers, a tuple where they are apart; None without a cache.

        Returns:
          The last layer's x, and the cache with what the layers wrote.
        """

    def scan(self, step: Callable[..., tuple[Array, Array]], x: Array) -> tuple[Array, Array]:
        """Run `step(x, layer, index) -> x, output` over all layers, to be differentiated.

        Returns:
          The last x, and the outputs stacked over layers.
        """

    def map(self, function: Callable[..., LayerParams], *own: Any) -> Any:
        """Return the layers in the same form, each changed by `function(layer, *own)`, which
        takes a single layer or stacked ones.

        Args:
          own: trees of arrays stacked over all layers, of which each layer is given its part.
        """

    def unstacked(self) -> Any:
        """Return the layers apart; streamed ones stay as they are."""

    def stacked(self, first: int, end: int) -> LayerParams:
        """Return the layers from `first` up to `end`, stacked."""


@dataclasses.dataclass(frozen=True)
class StackedLayers:
    """Layers in one `LayerParams`, which the cache of all of them follows.

    A loop compiles one layer for all, and copies each layer's weights out of the stack in every
    pass, as no kernel or library call takes a slice.
    """

    layers: LayerParams
    is_apart = False
    is_streamed = False

    def __len__(self) -> int:
        return int(jax.tree.leaves(self.layers)[0].shape[0])

    def run(
        self, step: Step, x: Array, cache: Any, bounds: tuple[Index, Index] | None = None
    ) -> tuple[Array, Any]:
        first, end = bounds or (0, len(self))
        one = lambda index, carry: step(take(self.layers, index), index, *carry)
        return jax.lax.fori_loop(first, end, one, (x, cache))

    def scan(self, step: Callable[..., tuple[Array, Array]], x: Array) -> tuple[Array, Array]:
        one = lambda x, scanned: step(x, *scanned)
        return jax.lax.scan(one, x, (self.layers, jnp.arange(len(self))))

    def map(self, function: Callable[..., LayerParams], *own: Any) -> LayerParams:
        return function(self.layers, *own)

    def unstacked(self) -> tuple[LayerParams, ...]:
        return split(self.layers)

    def stacked(self, first: int, end: int) -> LayerParams:
        if (first, end) == (0, len(self)):
            return self.layers
        return jax.tree.map(lambda x: x[first:end], self.layers)


@dataclasses.dataclass(frozen=True)
class LayersApart:
    """Layers in a tuple, unrolled: every kernel and library call takes weights where they lie."""

    layers: tuple[LayerParams, ...]
    is_apart = True
    is_streamed = False

    def __len__(self) -> int:
        return len(self.layers)

    def run(
        self, step: Step, x: Array, cache: Any, bounds: tuple[Index, Index] | None = None
    ) -> tuple[Array, Any]:
        caches = [None] * len(self) if cache is None else list(cache)
        for index in range(*(bounds or (0, len(self)))):
            # XLA would weigh fusions across layers, in a time that doubles with each.
            x = jax.lax.optimization_barrier(x)
            x, caches[index] = step(self.layers[index], index, x, caches[index])
        return x, None if cache is None else tuple(caches)

    def scan(self, step: Callable[..., tuple[Array, Array]], x: Array) -> tuple[Array, Array]:
        step = jax.jit(step)  # traced and lowered once for all layers
        outputs = []
        for index, layer in enumerate(self.layers):
            x, output = step(x, layer, index)
            outputs.append(output)
        return x, jnp.stack(outputs)

    def map(self, function: Callable[..., LayerParams], *own: Any) -> tuple[LayerParams, ...]:
        return tuple(map(function, self.layers, *map(split, own)))

    def unstacked(self) -> tuple[LayerParams, ...]:
        return self.layers

    def stacked(self, first: int, end: int) -> LayerParams:
        return jax.tree.map(lambda *parts: jnp.stack(parts), *self.layers[first:end])


@functools.singledispatch
def as_layers(layers: Any) -> Layers:
    """Return the `Layers` that `GLMParams.layers` holds."""
    return layers


as_layers.register(LayerParams, StackedLayers)
as_layers.register(tuple, LayersApart)


def take(stack: Any, index: Index) -> Any:
    """One entry of a tree of stacks."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stack)


def map_linears(
    function: Callable[[str, LinearParams], LinearParams], params: GLMParams
) -> GLMParams:
    """Apply `function(name, linear)` to the four linears of the layers, in any form."""
    changed = as_layers(params.layers).map(functools.partial(map_layer_linears, function))
    return dataclasses.replace(params, layers=changed)


def unstack_layers(params: GLMParams) -> GLMParams:
    """Layers apart, for unrolled programs."""
    layers = as_layers(params.layers).unstacked()
    return params if layers is params.layers else dataclasses.replace(params, layers=layers)


def stack_layers(params: GLMParams) -> GLMParams:
    """Layers stacked again, the form that is stored; the reverse of `unstack_layers`."""
    layers = as_layers(params.layers)
    return dataclasses.replace(params, layers=layers.stacked(0, len(layers)))


def split(stacked: Any) -> tuple[Any, ...]:
    """Return a tree of stacks as a tuple of trees, one for each entry of the stacks."""
    return transposed(apart(stacked), jax.tree.leaves(stacked)[0].shape[0])


def transposed(columns: Any, count: int) -> tuple[Any, ...]:
    """Return a tree with tuples of `count` for leaves as a tuple of `count` trees."""
    return tuple(
        jax.tree.map(lambda c, i=i: c[i], columns, is_leaf=lambda c: type(c) is tuple)
        for i in range(count)
    )


def described_apart(params: GLMParams) -> GLMParams:
    """`unstack_layers` of what describes arrays on a mesh."""

    def of_layer(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding: Any = x.sharding
        own = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=own)

    count = len(as_layers(params.layers))
    return dataclasses.replace(params, layers=(jax.tree.map(of_layer, params.layers),) * count)


def described_stack(layer: LayerParams, count: int) -> LayerParams:
    """Return a stack of `count` layers like one that is described on a mesh."""

    def of_stack(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding: Any = x.sharding
        own = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
        return jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=own)

    return jax.tree.map(of_stack, layer)


@jax.custom_vjp
def _unstack(x: Array) -> tuple[Array, ...]:
    return tuple(x[i] for i in range(len(x)))


@jax.jit
def apart(stacks: Any) -> Any:
    """Return a tree of stacks as one of tuples of their entries."""
    return jax.tree.map(_unstack, stacks)


# A stack of the parts; the transposes of slices would be sums of padded arrays.
_unstack.defvjp(lambda x: (_unstack(x), None), lambda _, parts: (jnp.stack(parts),))
