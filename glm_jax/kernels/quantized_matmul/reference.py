"""The plain truth: dequantise the weight, then multiply."""

from jaxtyping import Array, Float

from glm_jax.numerics import dot_general
from glm_jax.quantization import QuantizedArray, dequantize


def matmul(x: Float[Array, "..."], weight: QuantizedArray) -> Float[Array, "..."]:
    """x [..., K] times weight [K, *outputs], accumulated in float32.

    The weight is rounded to x's dtype, as the original does before its product.

    Returns:
      float32 [..., *outputs].
    """
    kernel = dequantize(weight, x.dtype)
    return dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
