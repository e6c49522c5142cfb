"""Chooses how a product with a quantised weight is computed."""

from jaxtyping import Array, Float

from glm_jax.kernels.quantized_matmul import reference
from glm_jax.quantization import QuantizedArray


def quantized_matmul(x: Float[Array, "..."], weight: QuantizedArray) -> Float[Array, "..."]:
    """x [..., K] times weight [K, *outputs], accumulated in float32.

    Returns:
      float32 [..., *outputs].

    Raises:
      ValueError: the weight is not [K, *outputs] with x's K.
    """
    if weight.contraction_axis != -len(weight.shape) or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"activations {x.shape} cannot multiply a weight {weight.shape} that contracts "
            f"axis {weight.contraction_axis}"
        )
    return reference.matmul(x, weight)
