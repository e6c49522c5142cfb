"""Products with weights that are quantised, or laid out for a kernel."""

import math
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from glm_jax.kernels.quantized_matmul import backends, cpu, sharded, xla
from glm_jax.kernels.quantized_matmul.cpu import TiledArray, take_outputs
from glm_jax.quantization import QuantizedArray

__all__ = ["TiledArray", "Weight", "is_quantized", "prepare", "quantized_matmul", "take_outputs"]

Weight = QuantizedArray | TiledArray


def is_quantized(weight: Any) -> TypeGuard[Weight]:
    """Whether a kernel is one that `quantized_matmul` takes, not a float array."""
    return isinstance(weight, Weight)


def prepare(
    weight: Weight | Array, activation_bits: int | None = None
) -> QuantizedArray | TiledArray | Array:
    """A weight [K, *outputs] on one CPU device in the layout that multiplies fastest there.

    It stays as it is where the CPU kernel is not built or does not take its shape.

    Args:
      activation_bits: 8 for integer products; see `TiledArray`.
    """
    if not isinstance(weight, TiledArray) and cpu.can_tile(weight):
        return cpu.tile(weight, activation_bits)
    return weight


def quantized_matmul(
    x: Float[Array, "..."], weight: Weight, bias: Float[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """x [..., K] times weight [K, *outputs] plus bias [*outputs], accumulated in float32.

    The backend follows the platform that the program is compiled for, the shapes, and on
    GPUs the compute capability. Under a mesh of several devices each multiplies its own
    part of a weight that knows its logical axes, and sums of parts are exchanged, never
    weights. Differentiable in x and bias; the weight is a constant.

    Returns:
      float32 [..., *outputs].

    Raises:
      ValueError: the weight is not [K, *outputs] with x's K.
    """
    is_one = isinstance(weight, TiledArray) or weight.contraction_axis == -len(weight.shape)
    if not is_one or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"activations {x.shape} cannot multiply a weight {weight.shape}")
    return _matmul(x, weight, bias)


def transposed_matmul(y: Float[Array, "..."], weight: Weight) -> Float[Array, "..."]:
    """y [..., *outputs] times the transpose of weight [K, *outputs], accumulated in float32.

    Returns:
      [..., K] in y's dtype, to which weights are rounded too.
    """
    if isinstance(weight, QuantizedArray) and sharded.applies(weight):
        return sharded.transposed_matmul(_transposed, y, weight)
    return _transposed(y, weight)


@jax.custom_vjp
def _matmul(x: Array, weight: Weight, bias: Array | None) -> Array:
    if isinstance(weight, QuantizedArray) and sharded.applies(weight):
        return sharded.matmul(_product, x, weight, bias)
    return _product(x, weight, bias)


def _forward(x: Array, weight: Weight, bias: Array | None) -> tuple[Array, Any]:
    # An empty array remembers a dtype.
    like = lambda a: None if a is None else jnp.zeros((0,), a.dtype)
    return _matmul(x, weight, bias), (weight, like(x), like(bias))


def _backward(saved: Any, gradient: Array) -> tuple[Array, None, Array | None]:
    weight, x, bias = saved
    leading = tuple(range(gradient.ndim - len(weight.shape) + 1))
    of_bias = None if bias is None else jnp.sum(gradient, axis=leading).astype(bias.dtype)
    # Rounded first: the all-reduce of the result then moves half of the bytes.
    return transposed_matmul(gradient.astype(x.dtype), weight), None, of_bias


_matmul.defvjp(_forward, _backward)


def _product(x: Array, weight: Weight, bias: Array | None) -> Array:
    """x times weight plus bias on one device."""
    rows = x.reshape(-1, x.shape[-1])
    bias = None if bias is None else bias.reshape(-1)
    if isinstance(weight, TiledArray):
        product = cpu.matmul(rows, weight).reshape(len(rows), -1)
        product = product if bias is None else product + bias.astype(jnp.float32)
    else:
        product = backends.matmul(rows, _flatten(weight), bias)
    return product.reshape(*x.shape[:-1], *weight.shape[1:])


def _transposed(gradient: Array, weight: Weight) -> Array:
    """gradient [..., *outputs] times the transpose of weight on one device, [..., K]."""
    inputs, *outputs = weight.shape
    rows = gradient.reshape(-1, math.prod(outputs))
    if isinstance(weight, TiledArray):
        product = cpu.transposed_matmul(rows, weight)
    else:
        product = xla.transposed_matmul(rows, _flatten(weight))
    return product.reshape(*gradient.shape[: gradient.ndim - len(outputs)], inputs)


def _flatten(weight: QuantizedArray) -> QuantizedArray:
    """[K, *outputs] as [K, N]."""
    outputs = math.prod(weight.shape[1:])
    flat: QuantizedArray = jax.tree.map(lambda a: a.reshape(a.shape[0], outputs), weight)
    return flat.replace(contraction_axis=-2, axes=None)  # type: ignore[attr-defined]
