"""Float weights to integers and scales."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from glm_jax.quantization.array import QuantizedArray
from glm_jax.quantization.packing import pack_int4
from glm_jax.quantization.scheme import QuantizationError, Scheme
from glm_jax.sharding import LogicalAxes

# Shares of the full range that the search tries; below a half nothing was ever best.
_NARROWEST, _TRIES = 0.5, 16


def quantize(
    weight: Float[Array, "..."],
    scheme: Scheme,
    contraction_axis: int,
    axes: LogicalAxes | None = None,
) -> QuantizedArray:
    """Rounds a weight to integers with a scale per output row and group of inputs.

    Scales and quotients are rounded to the weight's dtype. Without search, in float16 and
    symmetric, that gives the integers of the original's converter to the bit. With it, each
    group's range is narrowed to that share which leaves the least squared error.

    Args:
      weight: [..., K, *outputs].
      contraction_axis: negative index of K.
      axes: logical axes of the last dimensions, [K, *outputs].

    Raises:
      QuantizationError: K does not divide into groups (and, for 4 bits, into pairs).
    """
    if contraction_axis >= 0:
        raise QuantizationError(f"contraction_axis={contraction_axis}: must be negative")
    size = weight.shape[contraction_axis]
    group_size = scheme.group_size or size
    if size % group_size or (scheme.bits == 4 and group_size % 2):
        raise QuantizationError(
            f"{size} inputs do not divide into groups of {group_size}"
            + (" made of pairs, as 4 bits need" if scheme.bits == 4 else "")
        )
    axis = weight.ndim + contraction_axis
    shape = (*weight.shape[:axis], size // group_size, group_size, *weight.shape[axis + 1 :])
    grouped = weight.reshape(shape)
    share = _search(grouped, axis + 1, scheme) if scheme.search else jnp.float32(1)
    values, scales, zero_points = _round_values(grouped, axis + 1, scheme, share)
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


def _round_values(
    grouped: Array, axis: int, scheme: Scheme, share: Array
) -> tuple[Array, Array, Array | None]:
    """Integers (as float32), and scales and zero points of size 1 along `axis`.

    Args:
      share: of the full range that is kept; what lies outside is clipped.
    """
    wide = grouped.astype(jnp.float32)
    lowest, highest = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    zero_points = None
    if scheme.zero_point:
        low = share * jnp.minimum(jnp.min(wide, axis=axis, keepdims=True), 0)
        high = share * jnp.maximum(jnp.max(wide, axis=axis, keepdims=True), 0)
        scales = _round_to((high - low) / (highest - lowest), grouped.dtype)
    else:
        largest = jnp.max(jnp.abs(wide), axis=axis, keepdims=True)
        scales = _round_to(share * largest / highest, grouped.dtype)
        lowest = -highest
    divisor = jnp.where(scales == 0, 1.0, scales)
    quotient = _round_to(wide / divisor, grouped.dtype)
    if scheme.zero_point:
        zero_points = jnp.clip(jnp.round(lowest - low / divisor), lowest, highest)
        quotient = quotient + zero_points
    return jnp.clip(jnp.round(quotient), lowest, highest), scales, zero_points


def _search(grouped: Array, axis: int, scheme: Scheme) -> Array:
    """The share of each group's range with the least squared error, size 1 along `axis`."""
    wide = grouped.astype(jnp.float32)

    def attempt(best: tuple[Array, Array], share: Array) -> tuple[tuple[Array, Array], None]:
        values, scales, zero_points = _round_values(grouped, axis, scheme, share)
        centred = values if zero_points is None else values - zero_points
        error = jnp.sum((centred * scales - wide) ** 2, axis=axis, keepdims=True)
        is_better = error < best[0]
        return (jnp.where(is_better, error, best[0]), jnp.where(is_better, share, best[1])), None

    shape = (*grouped.shape[:axis], 1, *grouped.shape[axis + 1 :])
    start = (jnp.full(shape, jnp.inf), jnp.ones(shape))
    (_, share), _ = jax.lax.scan(attempt, start, jnp.linspace(1.0, _NARROWEST, _TRIES))
    return share


def _round_to(x: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """float32 rounded to `dtype`'s precision, in a way that compilers don't drop."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)
