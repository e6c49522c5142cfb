"""A weight is an interface: what multiplies activations, in whatever form its numbers are stored.

A parameter tree holds a weight as a plain array, as an array that `quantized_matmul` takes, or as
one of the classes below. `as_weight` gives the interface of each; a new form registers itself
there, and no call site asks which form it has.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from glm_jax.kernels.quantized_matmul.api import (
    MosaicArray,
    TiledArray,
    quantized_matmul,
    take_outputs,
    transposed_matmul,
)
from glm_jax.model.float8 import float8_product
from glm_jax.numerics import dot_general, product_dtype, uses_float8
from glm_jax.quantization import QuantizedArray
from glm_jax.sharding import LogicalAxes, is_for_cpu, surrounding_mesh

Dropout = Callable[[Array], Array]
Layout = Callable[[Any], Any]


@runtime_checkable
class Weight(Protocol):
    """A weight [inputs, *outputs].

    Attributes:
      shape: [inputs, *outputs], of the numbers that it stands for.
      axes: their logical axes; None where they are not known.
      nbytes: bytes of all its arrays.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def axes(self) -> LogicalAxes | None: ...

    @property
    def nbytes(self) -> int: ...

    def matmul(
        self,
        x: Float[Array, "..."],
        bias: Float[Array, "..."] | None = None,
        adapter_dropout: Dropout | None = None,
    ) -> Float[Array, "..."]:
        """Multiply x [..., inputs] with the weight and add bias [*outputs].

        Args:
          adapter_dropout: applied to the inputs of a low-rank pair, if there is one.

        Returns:
          [..., *outputs], float32 but for `product_dtype`.
        """

    def transposed_matmul(self, y: Float[Array, "..."]) -> Float[Array, "..."]:
        """Multiply y [..., *outputs] with the transpose: float32 [..., inputs]."""

    def laid_out(self, layout: Layout) -> Any:
        """Return the same weight for a parameter tree, its arrays changed by `layout`, which
        takes an array or a QuantizedArray; the weight itself where it has a layout already."""


@runtime_checkable
class Embedding(Weight, Protocol):
    """A weight [vocab, embed]: rows are the embeddings of tokens, the transpose gives logits."""

    def take_rows(self, rows: Int[Array, "*indices"]) -> Float[Array, "*indices embed"]: ...


class _Base:
    """The parts of `Weight` that most forms share; their arrays are the leaves of a pytree."""

    @property
    def axes(self) -> LogicalAxes | None:
        return None

    @property
    def nbytes(self) -> int:
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))


@struct.dataclass
class DenseWeight(_Base):
    """A plain array of floats."""

    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def matmul(
        self, x: Array, bias: Array | None = None, adapter_dropout: Dropout | None = None
    ) -> Array:
        multiply = float8_product if uses_float8() else _product
        product = multiply(x, self.array.astype(x.dtype))
        return product if bias is None else product.astype(jnp.float32) + bias

    def transposed_matmul(self, y: Array) -> Array:
        outputs, own = _output_axes(y, self.shape)
        return dot_general(y, self.array.astype(y.dtype), ((outputs, own), ((), ())))

    def take_rows(self, rows: Array) -> Array:
        if rows.size == 1 and surrounding_mesh() is not None:
            # One row alone would be a slice, for which every device would be sent the whole table.
            return self.array[jnp.repeat(rows, 2, axis=-1)][..., :1, :]
        return self.array[rows]

    def laid_out(self, layout: Layout) -> Any:
        return layout(self.array)


@struct.dataclass
class KernelWeight(_Base):
    """An array that a kernel of `quantized_matmul` takes: quantised, or laid out for it."""

    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def axes(self) -> LogicalAxes | None:
        return self.array.axes

    def matmul(
        self, x: Array, bias: Array | None = None, adapter_dropout: Dropout | None = None
    ) -> Array:
        return quantized_matmul(x, self.array, bias)

    def transposed_matmul(self, y: Array) -> Array:
        return transposed_matmul(y, self.array).astype(jnp.float32)

    def laid_out(self, layout: Layout) -> Any:
        return layout(self.array) if self.array.layout == "stored" else self.array


def _used(inner: Array, is_used: Array | None) -> Array:
    return inner if is_used is None else jnp.where(is_used, inner, 0)


@struct.dataclass
class LowRank:
    """A pair of matrices: down [inputs, rank], up [rank, *outputs]."""

    down: Any
    up: Any

    def matmul(self, x: Array, is_used: Bool[Array, "..."] | None = None) -> Array:
        """Multiply x [..., inputs] with down and up.

        Args:
          is_used: [..., rank], the ranks that count for each x; all by default.
        """
        down, up = self.down.astype(x.dtype), self.up.astype(x.dtype)
        inner = _used(_product(x, down), is_used)
        return _product(inner.astype(x.dtype), up)

    def transposed_matmul(self, y: Array, is_used: Bool[Array, "..."] | None = None) -> Array:
        """Multiply y [..., *outputs] with the transposes of up and down; `is_used` as above."""
        outputs, own = _output_axes(y, self.up.shape)
        inner = dot_general(y, self.up.astype(y.dtype), ((outputs, own), ((), ())))
        inner, down = _used(inner, is_used), self.down.astype(y.dtype)
        return dot_general(inner.astype(y.dtype), down, (((inner.ndim - 1,), (1,)), ((), ())))


@struct.dataclass
class AdaptedWeight(_Base):
    """Stands for frozen + scale * down up, a sum that is never materialised."""

    frozen: Any
    pair: LowRank
    scale: float = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return as_weight(self.frozen).shape

    @property
    def axes(self) -> LogicalAxes | None:
        return as_weight(self.frozen).axes

    def matmul(
        self, x: Array, bias: Array | None = None, adapter_dropout: Dropout | None = None
    ) -> Array:
        dropped = x if adapter_dropout is None else adapter_dropout(x)
        product = as_weight(self.frozen).matmul(x, bias)
        return product + self.scale * self.pair.matmul(dropped)

    def transposed_matmul(self, y: Array) -> Array:
        product = as_weight(self.frozen).transposed_matmul(y)
        return product + self.scale * self.pair.transposed_matmul(y)

    def laid_out(self, layout: Layout) -> "AdaptedWeight":
        frozen = as_weight(self.frozen).laid_out(layout)
        return AdaptedWeight(frozen, self.pair, self.scale)


@struct.dataclass
class MultiAdaptedWeight(_Base):
    """A weight with the low-rank pairs of several adapters, of which each token uses one or none.

    The pairs are joined along the rank. One product runs all of them, and a mask sets to zero what
    is not the token's own: the program is the same whichever adapters are in use.

    Attributes:
      frozen: the weight without adapters.
      pair: down [inputs, ranks], up [ranks, *outputs], the adapters' scales in up.
      ranks: of each adapter; 0 of one that does not change this weight.
      adapter_ids: int32 [...], of the x [..., inputs] that are multiplied: from 1 on, 0 for none.
        None where none of them uses an adapter.
    """

    frozen: Any
    pair: LowRank
    ranks: tuple[int, ...] = struct.field(pytree_node=False)
    adapter_ids: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return as_weight(self.frozen).shape

    @property
    def axes(self) -> LogicalAxes | None:
        return as_weight(self.frozen).axes

    @property
    def _is_used(self) -> Array:
        owners = np.repeat(np.arange(1, len(self.ranks) + 1), self.ranks)
        return self.adapter_ids[..., None] == owners

    def matmul(
        self, x: Array, bias: Array | None = None, adapter_dropout: Dropout | None = None
    ) -> Array:
        product = as_weight(self.frozen).matmul(x, bias)
        return product if self.adapter_ids is None else product + self.pair.matmul(x, self._is_used)

    def transposed_matmul(self, y: Array) -> Array:
        product = as_weight(self.frozen).transposed_matmul(y)
        if self.adapter_ids is None:
            return product
        return product + self.pair.transposed_matmul(y, self._is_used)

    def laid_out(self, layout: Layout) -> "MultiAdaptedWeight":
        return dataclasses.replace(self, frozen=as_weight(self.frozen).laid_out(layout))


@struct.dataclass
class TransposedWeight(_Base):
    """An embedding [vocab, embed] whose transpose [embed, vocab] is laid out for a kernel."""

    kernel: TiledArray

    @property
    def shape(self) -> tuple[int, ...]:
        inputs, *outputs = self.kernel.shape
        return (*outputs, inputs)

    def matmul(
        self, x: Array, bias: Array | None = None, adapter_dropout: Dropout | None = None
    ) -> Array:
        product = transposed_matmul(x, self.kernel).astype(jnp.float32)
        return product if bias is None else product + bias

    def transposed_matmul(self, y: Array) -> Array:
        return quantized_matmul(y, self.kernel)

    def take_rows(self, rows: Array) -> Array:
        return take_outputs(self.kernel, rows)

    def laid_out(self, layout: Layout) -> "TransposedWeight":
        return self


@functools.singledispatch
def as_weight(leaf: Any) -> Any:
    """Return the `Weight` that a leaf of a parameter tree stands for."""
    return DenseWeight(leaf)


as_weight.register(QuantizedArray, KernelWeight)
as_weight.register(TiledArray, KernelWeight)
as_weight.register(MosaicArray, KernelWeight)
as_weight.register(AdaptedWeight, lambda weight: weight)
as_weight.register(MultiAdaptedWeight, lambda weight: weight)
as_weight.register(TransposedWeight, lambda weight: weight)


@functools.singledispatch
def with_adapter_ids(leaf: Any, adapter_ids: Int[Array, "..."]) -> Any:
    """Return a weight of a parameter tree for tokens that use these adapters: itself where it has
    none to choose from."""
    return leaf


@with_adapter_ids.register
def _(leaf: MultiAdaptedWeight, adapter_ids: Array) -> MultiAdaptedWeight:
    return dataclasses.replace(leaf, adapter_ids=adapter_ids)


def _output_axes(y: Array, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the axes of the outputs in y and in a weight of that shape."""
    count = len(shape) - 1
    return tuple(range(y.ndim - count, y.ndim)), tuple(range(1, len(shape)))


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    """x [..., inputs] times a kernel [inputs, *outputs], in `product_dtype`.

    The kernel's gradient comes out in the kernel's own layout. JAX's own is transposed, and costs
    a transpose of the gradient that flows back besides.
    """
    return dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), product_dtype(x))


def _product_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    rounded = gradient.astype(x.dtype)
    leading, outputs = tuple(range(x.ndim - 1)), tuple(range(x.ndim - 1, gradient.ndim))
    axes = (outputs, tuple(range(1, kernel.ndim)))
    of_x = dot_general(rounded, kernel, (axes, ((), ())), product_dtype(x))
    # The smaller of the two is the one that is transposed. Not on CPU, where XLA takes the result's
    # transpose into the product, which is then a fifth slower.
    is_wide = x.shape[-1] > math.prod(kernel.shape[1:]) and not is_for_cpu()
    first, second = (rounded, x) if is_wide else (x, rounded)
    of_kernel = dot_general(first, second, ((leading, leading), ((), ())))
    if is_wide:
        of_kernel = jnp.moveaxis(of_kernel, -1, 0)
    return of_x.astype(x.dtype), of_kernel.astype(kernel.dtype)


_product.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _product_backward)
