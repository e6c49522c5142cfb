"""`QuantizedArray`: a quantised weight."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from glm_jax.quantization.packing import unpack_int4


@struct.dataclass
class QuantizedArray:
    """A weight in `bits` bits: (value - zero point) * scale, by group of inputs and row.

    A group's values lie together and pairs never straddle groups, so that a slice of whole
    groups, with its scales, is a `QuantizedArray` again.

    Attributes:
      values: int8 [..., K, *outputs], or [..., K / 2, *outputs] packed by `pack_int4`.
      scales: float [..., groups, *outputs]; group g scales K/groups neighbouring inputs.
      bits: 8 or 4.
      contraction_axis: negative index of K, so that it outlives stacking and scanning.
      zero_points: int8, of the scales' shape; None where the weight is symmetric.
      axes: logical axes of [K, *outputs], by which products are divided among devices; None
        where they are not known.
    """

    values: Any  # or what describes an array that does not exist yet
    scales: Any
    bits: int = struct.field(pytree_node=False)
    contraction_axis: int = struct.field(pytree_node=False)
    zero_points: Any = None
    axes: tuple[str | None, ...] | None = struct.field(pytree_node=False, default=None)
    layout = "stored"  # the name of the kernel that an array is laid out for, or this

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantised array."""
        shape = list(self.values.shape)
        shape[self.contraction_axis] *= 8 // self.bits
        return tuple(shape)

    @property
    def stored_dtype(self) -> str:
        """What a number is stored as, one of `formats.BITS`."""
        return f"int{self.bits}"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and zero points."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    def flattened(self) -> "QuantizedArray":
        """Return a weight [K, *outputs] as [K, N], without logical axes."""
        outputs = math.prod(self.shape[1:])
        flat = jax.tree.map(lambda a: a.reshape(a.shape[0], outputs), self)
        return dataclasses.replace(flat, contraction_axis=-2, axes=None)

    @property
    def groups(self) -> int:
        return int(self.scales.shape[self.contraction_axis])

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.shape[self.contraction_axis] // self.groups


def dequantize(array: QuantizedArray, dtype: jnp.dtype | type | str) -> Float[Array, "..."]:
    """Return the float array; products are rounded to `dtype`."""
    values, axis = array.values, array.contraction_axis
    if array.bits == 4:
        values = unpack_int4(values, axis)

    def spread(x: Array) -> Array:
        return x if array.groups == 1 else jnp.repeat(x, array.group_size, axis=axis)

    wide = values.astype(dtype)
    if array.zero_points is not None:
        wide = wide - spread(array.zero_points.astype(dtype))
    return wide * spread(array.scales.astype(dtype))
