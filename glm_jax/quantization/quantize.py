"""Quantise float weights to integers and scales."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from glm_jax.quantization.array import QuantizedArray
from glm_jax.quantization.formats import QuantizationError
from glm_jax.quantization.packing import pack_int4
from glm_jax.quantization.scheme import Scheme

# Shares of the full range that the search tries.
_MIN_SHARE, _TRIES = 0.5, 16

Bounds = tuple[Array, Array]  # of size 1 along the inputs of a group


def quantize(
    weight: Float[Array, "..."],
    scheme: Scheme,
    contraction_axis: int,
    axes: tuple[str | None, ...] | None = None,
) -> QuantizedArray:
    """Quantise a weight to integers with a scale for each output and group of inputs.

    Scales and quotients are rounded to the weight's dtype. Without search, in float16 and
    symmetric, that gives the integers of the original's converter to the bit. With it, each
    group's range shrinks to the share that leaves the least squared error.

    Args:
      weight: [..., K, *outputs].
      contraction_axis: negative index of K.
      axes: logical axes of [K, *outputs], which the result remembers.

    Raises:
      QuantizationError: K does not divide into groups (and, for 4 bits, into pairs).
    """
    if contraction_axis >= 0:
        raise QuantizationError(f"contraction_axis={contraction_axis}: must be negative")
    size = weight.shape[contraction_axis]
    groups = scheme.format.groups(size, is_row_parallel=False)
    axis = weight.ndim + contraction_axis
    shape = (*weight.shape[:axis], groups, size // groups, *weight.shape[axis + 1 :])
    grouped = weight.reshape(shape)
    bounds = _bounds(grouped, axis + 1, scheme)
    if scheme.search:
        bounds = _search(grouped, bounds, axis + 1, scheme)
    values, scales, zero_points = _round_values(grouped, bounds, scheme)
    integers = values.astype(jnp.int8).reshape(weight.shape)
    return QuantizedArray(
        values=pack_int4(integers, contraction_axis) if scheme.bits == 4 else integers,
        scales=jnp.squeeze(scales, axis + 1).astype(weight.dtype),
        bits=scheme.bits,
        contraction_axis=contraction_axis,
        zero_points=None
        if zero_points is None
        else jnp.squeeze(zero_points, axis + 1).astype(jnp.int8),
        axes=axes,
    )


def _bounds(grouped: Array, axis: int, scheme: Scheme) -> Bounds:
    """Return each group's range, with 0 inside; symmetric without zero points."""
    wide = grouped.astype(jnp.float32)
    if scheme.zero_point:
        low = jnp.minimum(jnp.min(wide, axis=axis, keepdims=True), 0)
        return low, jnp.maximum(jnp.max(wide, axis=axis, keepdims=True), 0)
    largest = jnp.max(jnp.abs(wide), axis=axis, keepdims=True)
    return -largest, largest


def _round_values(
    grouped: Array, bounds: Bounds, scheme: Scheme
) -> tuple[Array, Array, Array | None]:
    """Return integers (as float32), scales and zero points; values out of bounds are clipped."""
    wide = grouped.astype(jnp.float32)
    low, high = bounds
    largest = 2 ** (scheme.bits - 1) - 1
    lowest = -largest - 1 if scheme.zero_point else -largest
    # Symmetric bounds halve exactly, so that this is high / largest to the bit.
    scales = _round_to((high - low) / (largest - lowest), grouped.dtype)
    divisor = jnp.where(scales == 0, 1.0, scales)
    quotient = _round_to(wide / divisor, grouped.dtype)
    zero_points = None
    if scheme.zero_point:
        zero_points = jnp.clip(jnp.round(lowest - low / divisor), lowest, largest)
        quotient = quotient + zero_points
    return jnp.clip(jnp.round(quotient), lowest, largest), scales, zero_points


def _search(grouped: Array, bounds: Bounds, axis: int, scheme: Scheme) -> Bounds:
    """Return bounds times the fraction that minimises each group's squared error."""
    wide = grouped.astype(jnp.float32)
    low, high = bounds

    def attempt(best: tuple[Array, Array], share: Array) -> tuple[tuple[Array, Array], None]:
        smaller = (share * low, share * high)
        values, scales, zero_points = _round_values(grouped, smaller, scheme)
        centred = values if zero_points is None else values - zero_points
        error = jnp.sum((centred * scales - wide) ** 2, axis=axis, keepdims=True)
        is_better = error < best[0]
        return (jnp.where(is_better, error, best[0]), jnp.where(is_better, share, best[1])), None

    start = (jnp.full_like(low, jnp.inf), jnp.ones_like(low))
    (_, share), _ = jax.lax.scan(attempt, start, jnp.linspace(1.0, _MIN_SHARE, _TRIES))
    return share * low, share * high


def _round_to(x: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Round float32 to `dtype`'s precision, in a way that compilers do not remove."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)
