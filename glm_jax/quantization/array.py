"""`QuantizedArray`: what stands in for a float weight, and how it is made."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from glm_jax.errors import UserError
from glm_jax.quantization.packing import pack_int4, unpack_int4


class QuantizationError(UserError):
    """A weight that cannot be quantised the way that was asked for."""


@struct.dataclass
class QuantizedArray:
    """A weight in `bits` bits. Row and group have one scale; value * scale is the weight.

    Attributes:
      values: int8 [..., K, *outputs], or [..., K / 2, *outputs] packed by `pack_int4`.
      scales: float [..., groups, *outputs]; group g scales K/groups neighbouring inputs.
      bits: 8 or 4.
      contraction_axis: negative index of K, so that it outlives stacking and scanning.
    """

    values: Any  # or what describes an array that does not exist yet
    scales: Any
    bits: int = struct.field(pytree_node=False)
    contraction_axis: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the float array that this stands for."""
        shape = list(self.values.shape)
        shape[self.contraction_axis] *= 8 // self.bits
        return tuple(shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def groups(self) -> int:
        return int(self.scales.shape[self.contraction_axis])


def quantize(
    weight: Float[Array, "..."], bits: int, contraction_axis: int, groups: int = 1
) -> QuantizedArray:
    """Symmetric round-to-nearest: the greatest magnitude of a group maps to 2^(bits-1) - 1.

    Scales and quotients are rounded to the weight's dtype, which in float16 gives the
    integers of the original's converter to the bit.

    Args:
      weight: [..., K, *outputs].
      bits: 8 or 4.
      contraction_axis: negative index of K.
      groups: groups along K; 1 is one scale per output row.

    Raises:
      QuantizationError: other bits, or K that does not divide into the groups (and, for
        4 bits, into pairs within each group).
    """
    if bits not in (8, 4):
        raise QuantizationError(f"bits={bits}: weights are quantised to 8 or 4 bits")
    if contraction_axis >= 0:
        raise QuantizationError(f"contraction_axis={contraction_axis}: must be negative")
    size = weight.shape[contraction_axis]
    if size % groups or (bits == 4 and (size // groups) % 2):
        raise QuantizationError(
            f"{size} inputs do not divide into {groups} groups"
            + (" of pairs, as 4 bits need" if bits == 4 else "")
        )
    axis = weight.ndim + contraction_axis
    grouped = weight.reshape(
        (*weight.shape[:axis], groups, size // groups, *weight.shape[axis + 1 :])
    )
    largest = 2 ** (bits - 1) - 1
    wide = grouped.astype(jnp.float32)
    scales = _round_to(jnp.max(jnp.abs(wide), axis=axis + 1) / largest, weight.dtype)
    divisor = jnp.expand_dims(jnp.where(scales == 0, 1.0, scales), axis + 1)
    quotient = _round_to(wide / divisor, weight.dtype)
    rounded = jnp.clip(jnp.round(quotient), -largest, largest).astype(jnp.int8)
    values = rounded.reshape(weight.shape)
    if bits == 4:
        values = pack_int4(values, contraction_axis)
    return QuantizedArray(values, scales.astype(weight.dtype), bits, contraction_axis)


def _round_to(x: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """float32 rounded to `dtype`'s precision, in a way that compilers don't drop."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def dequantize(array: QuantizedArray, dtype: jnp.dtype | type | str) -> Float[Array, "..."]:
    """The float array that `array` stands for; products are rounded to `dtype`."""
    values, axis = array.values, array.contraction_axis
    if array.bits == 4:
        values = unpack_int4(values, axis)
    scales = array.scales.astype(dtype)
    if array.groups > 1:
        scales = jnp.repeat(scales, values.shape[axis] // array.groups, axis=axis)
    return values.astype(dtype) * scales
