"""Chooses how a product with a quantised weight is computed."""

from typing import Any, TypeGuard

from jaxtyping import Array, Float

from glm_jax.kernels.quantized_matmul import cpu, reference
from glm_jax.kernels.quantized_matmul.cpu import TiledArray
from glm_jax.quantization import QuantizedArray


def is_quantized(weight: Any) -> TypeGuard[QuantizedArray | TiledArray]:
    """Whether a kernel is one that `quantized_matmul` takes, not a float array."""
    return isinstance(weight, QuantizedArray | TiledArray)


def prepare(weight: QuantizedArray | TiledArray) -> QuantizedArray | TiledArray:
    """A weight [K, *outputs] on one CPU device in the layout that multiplies fastest there.

    It stays as it is where the CPU kernel is not built or does not take its shape.
    """
    if isinstance(weight, QuantizedArray) and cpu.can_tile(weight):
        return cpu.tile(weight)
    return weight


def quantized_matmul(
    x: Float[Array, "..."], weight: QuantizedArray | TiledArray
) -> Float[Array, "..."]:
    """x [..., K] times weight [K, *outputs], accumulated in float32.

    A weight in the CPU kernel's layout is multiplied by it; any other is dequantised to
    x's dtype first, as the original does.

    Returns:
      float32 [..., *outputs].

    Raises:
      ValueError: the weight is not [K, *outputs] with x's K.
    """
    is_one = isinstance(weight, TiledArray) or weight.contraction_axis == -len(weight.shape)
    if not is_one or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"activations {x.shape} cannot multiply a weight {weight.shape}")
    if isinstance(weight, TiledArray):
        return cpu.matmul(x, weight)
    return reference.matmul(x, weight)
