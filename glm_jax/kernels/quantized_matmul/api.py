"""Products with weights that are quantised, or laid out for a kernel."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from glm_jax.kernels.dispatch import Backend, BackendError, dispatch
from glm_jax.kernels.quantized_matmul import cpu, measured, mosaic_prepare, sharded
from glm_jax.kernels.quantized_matmul.arguments import Arguments
from glm_jax.kernels.quantized_matmul.cpu import CPUKernel, CPUTransposed, TiledArray, take_outputs
from glm_jax.kernels.quantized_matmul.mosaic import (
    Mma,
    Mosaic,
    MosaicConverted,
    MosaicConvertedTransposed,
    MosaicTiles,
    MosaicTilesTransposed,
)
from glm_jax.kernels.quantized_matmul.mosaic_layout import MosaicArray
from glm_jax.kernels.quantized_matmul.pallas_gpu import PallasGPU
from glm_jax.kernels.quantized_matmul.pallas_tpu import PallasTPU
from glm_jax.kernels.quantized_matmul.reference import Reference
from glm_jax.kernels.quantized_matmul.xla import XLA, XLATransposed
from glm_jax.quantization import QuantizedArray

__all__ = [
    "MosaicArray",
    "TiledArray",
    "Weight",
    "prepare",
    "quantized_matmul",
    "take_outputs",
    "transposed_matmul",
]

Weight = QuantizedArray | TiledArray | MosaicArray

BACKENDS: tuple[Backend[Arguments], ...] = (
    CPUKernel(),
    Mosaic(),
    Mma(),
    MosaicTiles(),
    MosaicConverted(),
    PallasGPU(),
    PallasTPU(),
    Reference(platform="cpu"),
    XLA(),
    Reference(),
)
_TRANSPOSED: tuple[Backend[Arguments], ...] = (
    CPUTransposed(),
    MosaicTilesTransposed(),
    MosaicConvertedTransposed(),
    XLATransposed(),
)


def prepare(
    weight: Weight | Array, activation_bits: int | None = None, layout: str | None = None
) -> Weight | Array:
    """Return a weight [K, *outputs] on one CPU device in the layout that multiplies fastest there.

    It stays as it is where the CPU kernel is not built or does not take its shape.

    Args:
      activation_bits: 8 for integer products; see `TiledArray`.
      layout: "mosaic" for the kernels for compute capability 8.0 to 9.0, on any device.

    Raises:
      BackendError: the layout is another, or its kernel does not take the weight.
    """
    if layout is not None:
        if layout != "mosaic":
            raise BackendError(f"quantized_matmul: no layout is called {layout!r}; expected mosaic")
        return mosaic_prepare.prepare(weight)
    if not isinstance(weight, TiledArray | MosaicArray) and cpu.can_tile(weight):
        return cpu.tile(weight, activation_bits)
    return weight


def quantized_matmul(
    x: Float[Array, "..."],
    weight: Weight,
    bias: Float[Array, "..."] | None = None,
    implementation: str | None = None,
) -> Float[Array, "..."]:
    """x [..., K] times weight [K, *outputs] plus bias [*outputs], accumulated in float32.

    Under a mesh of several devices each multiplies its own part of a weight that knows its
    logical axes, and partial sums are all-reduced; weights never move. Differentiable in x and
    bias; the weight is a constant.

    Args:
      implementation: a name of `BACKENDS`; None for the fastest that takes the arguments on the
        platform that the program is compiled for.

    Returns:
      float32 [..., *outputs].

    Raises:
      ValueError: the weight is not [K, *outputs] with x's K.
      BackendError: the named implementation does not take the arguments here.
    """
    if weight.contraction_axis != -len(weight.shape) or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"activations {x.shape} cannot multiply a weight {weight.shape}")
    return _matmul(x, weight, bias, implementation)


def transposed_matmul(y: Float[Array, "..."], weight: Weight) -> Float[Array, "..."]:
    """y [..., *outputs] times the transpose of weight [K, *outputs], accumulated in float32.

    Returns:
      [..., K] in y's dtype, to which weights are rounded too.
    """
    if sharded.applies(weight):
        return sharded.transposed_matmul(_transposed, y, weight)
    return _transposed(y, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x: Array, weight: Weight, bias: Array | None, implementation: str | None) -> Array:
    product = functools.partial(_product, implementation=implementation)
    if sharded.applies(weight):
        return sharded.matmul(product, x, weight, bias)
    return product(x, weight, bias)


def _forward(
    x: Array, weight: Weight, bias: Array | None, implementation: str | None
) -> tuple[Array, Any]:
    # An empty array remembers a dtype.
    like = lambda a: None if a is None else jnp.zeros((0,), a.dtype)
    return _matmul(x, weight, bias, implementation), (weight, like(x), like(bias))


def _backward(_: str | None, saved: Any, gradient: Array) -> tuple[Array, None, Array | None]:
    weight, x, bias = saved
    leading = tuple(range(gradient.ndim - len(weight.shape) + 1))
    of_bias = None if bias is None else jnp.sum(gradient, axis=leading).astype(bias.dtype)
    # Rounded first: the all-reduce of the result then moves half of the bytes.
    return transposed_matmul(gradient.astype(x.dtype), weight), None, of_bias


_matmul.defvjp(_forward, _backward)


def _product(x: Array, weight: Weight, bias: Array | None, implementation: str | None) -> Array:
    """x times weight plus bias on one device."""
    rows = x.reshape(-1, x.shape[-1])
    bias = None if bias is None else bias.reshape(-1)
    arguments = Arguments(rows, weight.flattened(), bias)
    backends = measured.preferred(BACKENDS, arguments)
    product = dispatch("quantized_matmul", backends, arguments, implementation)
    return product.reshape(*x.shape[:-1], *weight.shape[1:])


def _transposed(y: Array, weight: Weight) -> Array:
    """y [..., *outputs] times the transpose of weight on one device, [..., K]."""
    inputs, *outputs = weight.shape
    arguments = Arguments(y.reshape(-1, math.prod(outputs)), weight.flattened())
    product = dispatch("transposed quantized_matmul", _TRANSPOSED, arguments)
    return product.reshape(*y.shape[: y.ndim - len(outputs)], inputs)
