"""The plain formula: dequantise the weight, then multiply."""

import dataclasses

from jaxtyping import Array, Float

from glm_jax.kernels.dispatch import unmet
from glm_jax.kernels.quantized_matmul.arguments import Arguments, add_bias
from glm_jax.numerics import dot_general
from glm_jax.quantization import QuantizedArray, dequantize


@dataclasses.dataclass(frozen=True)
class Reference:
    """Preferred on CPUs, where it is as fast as tiles, for weights that no kernel takes."""

    name: str = "reference"
    platform: str | None = None

    def supports(self, arguments: Arguments) -> str | None:
        return unmet(arguments.is_as_stored)

    def __call__(self, arguments: Arguments) -> Array:
        return add_bias(matmul(arguments.x, arguments.weight), arguments.bias)


def matmul(x: Float[Array, "..."], weight: QuantizedArray) -> Float[Array, "..."]:
    """x [..., K] times weight [K, *outputs], accumulated in float32.

    The weight is rounded to x's dtype, as the original does before its product.

    Returns:
      float32 [..., *outputs].
    """
    kernel = dequantize(weight, x.dtype)
    return dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
