"""Adam whose moments take two bytes a parameter instead of eight (arXiv:2110.02861).

Each moment is stored as 8-bit integers with a scale for each block of 128 neighbours, in steps
that are finer near zero: value = scale * (integer / max)^2. The first moment has a sign; of the
second its square root is stored. A second moment that is not zero never becomes zero, or its
parameter would get an update of any size.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float

_BLOCK = 128


@struct.dataclass
class QuantizedMoment:
    """A float array in 8 bits.

    Attributes:
      values: int8 or uint8, of the array's shape.
      scales: float32 [..., n / 128] if 128 divides the last axis n, else [..., 1].
    """

    values: Any  # arrays, or what describes them
    scales: Any


@struct.dataclass
class QuantizedAdamState:
    """Trees with a `QuantizedMoment` for each parameter.

    Attributes:
      count: int32 [], number of updates.
      mean: of gradients.
      root_of_squares: square root of the mean of their squares.
    """

    count: Any
    mean: Any
    root_of_squares: Any


def scale_by_quantized_adam(
    beta1: float, beta2: float, epsilon: float
) -> optax.GradientTransformation:
    """Return `optax.scale_by_adam` with moments in 8 bits."""

    def init(params: Any) -> QuantizedAdamState:
        zeros = lambda dtype: jax.tree.map(lambda x: _zeros(x, dtype), params)
        return QuantizedAdamState(jnp.zeros((), jnp.int32), zeros(jnp.int8), zeros(jnp.uint8))

    def update(
        gradients: Any, state: QuantizedAdamState, params: Any = None
    ) -> tuple[Any, QuantizedAdamState]:
        count = optax.safe_increment(state.count)
        correction1 = 1 - beta1 ** count.astype(jnp.float32)
        correction2 = 1 - beta2 ** count.astype(jnp.float32)

        def one(gradient: Array, mean: QuantizedMoment, root: QuantizedMoment) -> tuple[Any, ...]:
            first = beta1 * dequantize(mean) + (1 - beta1) * gradient
            second = beta2 * dequantize(root) ** 2 + (1 - beta2) * gradient**2
            step = first / correction1 / (jnp.sqrt(second / correction2) + epsilon)
            return step, quantize(first, jnp.int8), quantize(jnp.sqrt(second), jnp.uint8)

        structure: Any
        leaves, structure = jax.tree.flatten(gradients)
        moments = map(structure.flatten_up_to, (state.mean, state.root_of_squares))
        parts = zip(*map(one, leaves, *moments), strict=True)
        steps, means, roots = (jax.tree.unflatten(structure, part) for part in parts)
        return steps, QuantizedAdamState(count, means, roots)

    return optax.GradientTransformation(init, update)


def _zeros(x: Any, dtype: Any) -> QuantizedMoment:
    return QuantizedMoment(
        jnp.zeros(x.shape, dtype), jnp.zeros(_scales_shape(x.shape), jnp.float32)
    )


def _scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    *rest, last = shape
    return (*rest, last // _BLOCK if last % _BLOCK == 0 else 1)


def quantize(x: Float[Array, "..."], dtype: Any) -> QuantizedMoment:
    """Return x in 8 bits: int8, or uint8 for values that are never negative."""
    largest = jnp.iinfo(dtype).max
    blocks = x.reshape(*_scales_shape(x.shape), -1)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    share = jnp.abs(blocks) / jnp.where(scales == 0, 1.0, scales)[..., None]
    steps = jnp.round(jnp.sqrt(share) * largest)
    if dtype == jnp.uint8:
        steps = jnp.where(share > 0, jnp.maximum(steps, 1.0), 0.0)
    values = (jnp.sign(blocks) * steps).astype(dtype)
    return QuantizedMoment(values.reshape(x.shape), scales)


def dequantize(array: QuantizedMoment) -> Float[Array, "..."]:
    """Return the float32 values."""
    largest = jnp.iinfo(array.values.dtype).max
    blocks = array.values.reshape(*array.scales.shape, -1).astype(jnp.float32) / largest
    values = jnp.sign(blocks) * blocks**2 * array.scales[..., None]
    return values.reshape(array.values.shape)
