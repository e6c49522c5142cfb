"""Products of linears in float8, for training on GPUs that have it.

Operands are quantised to e4m3, gradients to e5m2 (arXiv:2209.05433), each with one scale of its
own numbers: a run's state has no statistics of earlier steps. Scales are powers of two, exact in
every dtype. XLA makes one library product of two dequantised operands; without float8 units, as
on CPU, the same numbers come out of a wider product.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from glm_jax.numerics import dot_general, product_dtype

_FORWARD, _GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2
_MIN_EXPONENT = -100  # a scale and its inverse stay normal numbers of float32 and bfloat16


def _quantize(x: Float[Array, "..."], dtype: Any) -> tuple[Array, Float[Array, ""]]:
    """Return x / scale in `dtype`, and the scale: NaN if x is not finite, which no cast hides."""
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    _, exponent = jnp.frexp(largest / float(jnp.finfo(dtype).max))
    exponent = jnp.maximum(exponent, _MIN_EXPONENT)
    scale = jnp.where(jnp.isfinite(largest), jnp.ldexp(jnp.float32(1), exponent), jnp.nan)
    return (x.astype(jnp.float32) / scale).astype(dtype), scale


def _dequantize(quantized: tuple[Array, Array], dtype: Any) -> Array:
    values, scale = quantized
    return values.astype(dtype) * scale.astype(dtype)


@jax.custom_vjp
def float8_product(x: Float[Array, "..."], kernel: Float[Array, "..."]) -> Float[Array, "..."]:
    """Multiply x [..., inputs] with a kernel [inputs, *outputs], in `product_dtype`."""
    return _forward(x, kernel)[0]


def _forward(x: Array, kernel: Array) -> tuple[Array, Any]:
    quantized = _quantize(x, _FORWARD), _quantize(kernel, _FORWARD)
    left, right = (_dequantize(operand, x.dtype) for operand in quantized)
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    return dot_general(left, right, axes, product_dtype(x)), (*quantized, x[:0], kernel[:0])


def _backward(saved: Any, gradient: Array) -> tuple[Array, Array]:
    *quantized, like_x, like_kernel = saved
    dtype = like_x.dtype
    x, kernel = (_dequantize(operand, dtype) for operand in quantized)
    rounded = _dequantize(_quantize(gradient, _GRADIENT), dtype)
    leading, outputs = tuple(range(x.ndim - 1)), tuple(range(x.ndim - 1, gradient.ndim))
    axes = (outputs, tuple(range(1, kernel.ndim)))
    of_x = dot_general(rounded, kernel, (axes, ((), ())), product_dtype(x))
    of_kernel = dot_general(x, rounded, ((leading, leading), ((), ())))
    return of_x.astype(dtype), of_kernel.astype(like_kernel.dtype)


float8_product.defvjp(_forward, _backward)
