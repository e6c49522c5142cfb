"""The order of a quantised weight's bytes for the kernel for compute capability 9.0.

A matrix instruction takes 64 outputs by 16 inputs from the registers of 128 threads, each of
which holds eight of the values. The layout is that of the registers: tiles of 64 outputs by 64
inputs, in a tile 16 bytes a thread at a time, in a 32-bit word the values of one thread. A
thread reads words as they lie and masks them; no value moves between threads.

Values are stored without a sign, 2^(bits - 1) above what they are: a mask and a constant make
of them bits of a float's mantissa. For that words of 4-bit values are rotated to the left by two
bits: the mantissa of float16 then holds two values of a half of the word, that of bfloat16 one.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int, Int8

from glm_jax.quantization import QuantizedArray, unpack_int4
from glm_jax.quantization.packing import pack_int4

TILE = 64  # outputs, and inputs, of a tile
LANES = 128  # words of a tile's row
_ROTATION = 2
# Axes of [K, N] in a tile of values: inputs (tile, half, step, 8 inputs, pair, one of the
# pair), outputs (tile, warp, 8 rows, row).
_INPUTS = (2, 2, 2, 4, 2)
_OUTPUTS = (4, 2, 8)
# Where each of those axes goes: tiles first, then the word, then the thread (warp, row, pair)
# and what its 16 bytes hold. The values of a word come last, those in the lowest bits first.
#            nb kb half warp row pair step
_ORDER = {
    # int4: a word is a step of 16 inputs; half and step are the thread's four words.
    4: (6, 0, 7, 9, 4, 1, 2, 5, 3, 8),
    # int8: a word is 8 inputs of two rows; 16 bytes are half of a tile.
    8: (6, 0, 1, 7, 9, 4, 2, 3, 5, 8),
}


@struct.dataclass
class MosaicArray:
    """A weight [K, *outputs] in the kernel's layout; slices of whole tiles are one again.

    Outputs are [*outer, *inner], the inner ones as few as have whole tiles of 64. A device that
    has a part of one of the outer axes, or of the first of the inner ones, then has its own
    outputs in whole tiles too.

    Attributes:
      values: int32 [*outer, inner / 64, K / 64, bits, 128].
      scales: float [groups, *outputs]; group g scales K / groups neighbouring inputs.
      bits: 8 or 4.
      zero_points: of the scales' shape and dtype; None where the weight is symmetric.
      axes: logical axes of [K, *outputs]; see `QuantizedArray`.
    """

    values: Any  # or what jax puts in its place while it transforms a function
    scales: Any
    bits: int = struct.field(pytree_node=False)
    zero_points: Any = None
    axes: tuple[str | None, ...] | None = struct.field(pytree_node=False, default=None)

    layout = "mosaic"

    def flattened(self) -> "MosaicArray":
        """Return the same weight as [K, N], without logical axes."""
        flat = lambda a: None if a is None else a.reshape(a.shape[0], -1)
        return MosaicArray(
            values=self.values.reshape(-1, *self.values.shape[-3:]),
            scales=flat(self.scales),
            bits=self.bits,
            zero_points=flat(self.zero_points),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """[K, *outputs] of the float array that this stands for."""
        return TILE * self.values.shape[-3], *self.scales.shape[1:]

    @property
    def contraction_axis(self) -> int:
        return -len(self.shape)

    @property
    def groups(self) -> int:
        return int(self.scales.shape[0])

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.shape[0] // self.groups


def count_outer(outputs: Sequence[int]) -> int:
    """Return the number of leading axes of the outputs that stay apart; see `MosaicArray`.

    Args:
      outputs: sizes of the axes; their product is a multiple of 64.
    """
    whole = [i for i in range(len(outputs)) if math.prod(outputs[i:]) % TILE == 0]
    return max(whole)


def lay_out(weight: QuantizedArray) -> MosaicArray:
    """Return a weight [K, *outputs], K and all outputs multiples of 64, in the kernel's layout.

    Inverse of `restore`.
    """
    values = weight.values if weight.bits == 8 else unpack_int4(weight.values, 0)
    inputs, *outputs = values.shape
    words, zeros = _words(values.reshape(inputs, -1), weight.bits), weight.zero_points
    return MosaicArray(
        values=words.reshape(*outputs[: count_outer(outputs)], -1, *words.shape[1:]),
        scales=weight.scales,
        bits=weight.bits,
        # Integers of 8 bits are exact in every float type.
        zero_points=None if zeros is None else zeros.astype(weight.scales.dtype),
        axes=weight.axes,
    )


def restore(weight: MosaicArray) -> QuantizedArray:
    """Return the weight [K, *outputs] as it is stored. Inverse of `lay_out`."""
    values, zeros = integers(weight).reshape(weight.shape), weight.zero_points
    return QuantizedArray(
        values=values if weight.bits == 8 else pack_int4(values, 0),
        scales=weight.scales,
        bits=weight.bits,
        contraction_axis=weight.contraction_axis,
        zero_points=None if zeros is None else zeros.astype(jnp.int8),
        axes=weight.axes,
    )


def integers(weight: MosaicArray) -> Int8[Array, "K N"]:
    """Return the weight's integers, with their signs, outputs flattened."""
    bits, words = weight.bits, weight.values
    if bits == 4:
        words = _rotate(words, -_ROTATION)
    order = _ORDER[bits]
    inputs, outputs = weight.shape[0], math.prod(weight.shape[1:])
    apart = (inputs // TILE, *_INPUTS, outputs // TILE, *_OUTPUTS)
    lanes = tuple(apart[axis] for axis in order)
    octets = jax.lax.bitcast_convert_type(words, jnp.uint8)
    if bits == 4:
        octets = jnp.stack([octets & 15, octets >> 4], axis=-1)
    inverse = tuple(order.index(axis) for axis in range(len(order)))
    values = octets.reshape(lanes).transpose(inverse).reshape(inputs, outputs)
    return (values.astype(jnp.int32) - 2 ** (bits - 1)).astype(jnp.int8)


def _words(values: Int8[Array, "K N"], bits: int) -> Int[Array, "N_tiles K_tiles bits lanes"]:
    inputs, outputs = values.shape
    apart = (inputs // TILE, *_INPUTS, outputs // TILE, *_OUTPUTS)
    unsigned = (values.astype(jnp.int32) + 2 ** (bits - 1)).astype(jnp.uint8)
    octets = unsigned.reshape(apart).transpose(_ORDER[bits])
    if bits == 4:
        halves = octets.reshape(-1, 2)
        octets = halves[:, 0] | (halves[:, 1] << 4)
    words = jax.lax.bitcast_convert_type(octets.reshape(-1, 4), jnp.int32)
    if bits == 4:
        words = _rotate(words, _ROTATION)
    return words.reshape(outputs // TILE, inputs // TILE, bits, LANES)


def _rotate(words: Int[Array, "..."], left: int) -> Int[Array, "..."]:
    count = left % 32
    logical = jax.lax.shift_right_logical(words, jnp.int32(32 - count))
    return (words << count) | logical
