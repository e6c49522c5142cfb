"""Adam whose means take two bytes a parameter instead of eight (arXiv:2110.02861).

Each mean is kept as integers with a scale for 128 neighbours, in steps that are finer near
zero: value = scale * (integer / largest)^2, for the mean of gradients with its sign, for that
of their squares by its root. A square that is not zero never becomes zero, or its
parameter would be moved without measure.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float

_BLOCK = 128


@struct.dataclass
class NarrowArray:
    """A float array in 8 bits.

    Attributes:
      values: int8 or uint8, of the array's shape.
      scales: float32 [..., n / 128] where the last axis n divides so, else [..., 1].
    """

    values: Any  # arrays, or what describes them
    scales: Any


@struct.dataclass
class NarrowAdamState:
    """Trees of `NarrowArray` in place of parameters, and how many updates there were."""

    count: Any
    mean: Any
    root_of_squares: Any


def scale_by_narrow_adam(
    beta1: float, beta2: float, epsilon: float
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with `NarrowArray` means."""

    def init(params: Any) -> NarrowAdamState:
        zeros = lambda dtype: jax.tree.map(lambda x: _zeros(x, dtype), params)
        return NarrowAdamState(jnp.zeros((), jnp.int32), zeros(jnp.int8), zeros(jnp.uint8))

    def update(
        gradients: Any, state: NarrowAdamState, params: Any = None
    ) -> tuple[Any, NarrowAdamState]:
        count = optax.safe_increment(state.count)
        correction1 = 1 - beta1 ** count.astype(jnp.float32)
        correction2 = 1 - beta2 ** count.astype(jnp.float32)

        def one(gradient: Array, mean: NarrowArray, root: NarrowArray) -> tuple[Any, ...]:
            first = beta1 * widen(mean) + (1 - beta1) * gradient
            second = beta2 * widen(root) ** 2 + (1 - beta2) * gradient**2
            step = first / correction1 / (jnp.sqrt(second / correction2) + epsilon)
            return step, narrow(first, jnp.int8), narrow(jnp.sqrt(second), jnp.uint8)

        structure: Any
        leaves, structure = jax.tree.flatten(gradients)
        kept = map(structure.flatten_up_to, (state.mean, state.root_of_squares))
        parts = zip(*map(one, leaves, *kept), strict=True)
        steps, means, roots = (jax.tree.unflatten(structure, part) for part in parts)
        return steps, NarrowAdamState(count, means, roots)

    return optax.GradientTransformation(init, update)


def _zeros(x: Any, dtype: Any) -> NarrowArray:
    return NarrowArray(jnp.zeros(x.shape, dtype), jnp.zeros(_scales_shape(x.shape), jnp.float32))


def _scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    *rest, last = shape
    return (*rest, last // _BLOCK if last % _BLOCK == 0 else 1)


def narrow(x: Float[Array, "..."], dtype: Any) -> NarrowArray:
    """x in 8 bits: int8 with a sign, uint8 for what is never negative."""
    largest = jnp.iinfo(dtype).max
    blocks = x.reshape(*_scales_shape(x.shape), -1)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    share = jnp.abs(blocks) / jnp.where(scales == 0, 1.0, scales)[..., None]
    steps = jnp.round(jnp.sqrt(share) * largest)
    if dtype == jnp.uint8:
        steps = jnp.where(share > 0, jnp.maximum(steps, 1.0), 0.0)
    values = (jnp.sign(blocks) * steps).astype(dtype)
    return NarrowArray(values.reshape(x.shape), scales)


def widen(array: NarrowArray) -> Float[Array, "..."]:
    """The float32 array that `array` stands for."""
    largest = jnp.iinfo(array.values.dtype).max
    blocks = array.values.reshape(*array.scales.shape, -1).astype(jnp.float32) / largest
    wide = jnp.sign(blocks) * blocks**2 * array.scales[..., None]
    return wide.reshape(array.values.shape)
