"""What floats the kernel of warps' matrix instructions makes of the bits of a `MosaicArray`.

Masks and permutes put two integers without a sign into a register of two floats: into the
mantissas of a power of two, or in float16 of nothing, as subnormal numbers, which the matrix
units take as they are. What is too much is taken off later: where rows are few off the products,
by the sums of activations; where they are many off the weights.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from glm_jax.kernels.quantized_matmul.mosaic_registers import conversion, raw_form


@dataclasses.dataclass(frozen=True)
class Form:
    """A weight w, as its bits become a float: (w + offset) * factor.

    Attributes:
      ptx: makes of a word, $N, the registers $0 to $N-1.
      offsets, factors: of the first 8 and of the last 8 of each 16 outputs.
    """

    ptx: str
    offsets: tuple[float, float]
    factors: tuple[float, float] = (1.0, 1.0)


def form_of(bits: int, dtype: Any, scale_first: bool) -> Form:
    """Return the form of a weight's integers.

    Args:
      dtype: of activations, float16 or bfloat16.
      scale_first: without factors, for weights that are scaled before they are multiplied.
    """
    is_half = jnp.dtype(dtype) == jnp.float16
    if bits == 4:
        if is_half and scale_first:
            return Form(_HALF_OF_4, (264.0, 24.0))
        offset, factors = raw_form(dtype)
        return Form(conversion(4, str(jnp.dtype(dtype)), raw=True), (offset, offset), factors)
    if not is_half:
        return Form(_BFLOAT_OF_8, (0.0, 0.0))
    if scale_first:
        return Form(_half_of_8("0x64646464"), (1152.0, 1152.0))  # beside the high byte of 1024
    return Form(_half_of_8("0"), (128.0, 128.0), (2.0**-24, 2.0**-24))


# On 256 in the first 8 outputs, on 16 in the last 8. In lop3 0xea is (a & b) | c.
_HALF_OF_4 = (
    "{ .reg .b32 r; shf.r.wrap.b32 r, $4, $4, 8; "
    "lop3.b32 $0, $4, 0x003c003c, 0x5c005c00, 0xea; "
    "lop3.b32 $1, $4, 0x03c003c0, 0x4c004c00, 0xea; "
    "lop3.b32 $2, r, 0x003c003c, 0x5c005c00, 0xea; "
    "lop3.b32 $3, r, 0x03c003c0, 0x4c004c00, 0xea; }"
)
# Seven bits on 128, less what the eighth, inverted, makes of 128: 128 or 256; 0xae is
# (~a & b) | c. Before compute capability 9.0 only fma subtracts two bfloat16 at once: times -1.
_BFLOAT_OF_8 = (
    "{ .reg .b32 odd, s0, s1, minus; mov.b32 minus, 0xbf80bf80; shr.u32 odd, $2, 8; "
    "lop3.b32 $0, $2, 0x007f007f, 0x43004300, 0xea; "
    "lop3.b32 $1, odd, 0x007f007f, 0x43004300, 0xea; "
    "lop3.b32 s0, $2, 0x00800080, 0x43004300, 0xae; "
    "lop3.b32 s1, odd, 0x00800080, 0x43004300, 0xae; "
    "fma.rn.bf16x2 $0, s0, minus, $0; fma.rn.bf16x2 $1, s1, minus, $1; }"
)


def _half_of_8(high: str) -> str:
    """Bytes beside four others."""
    return f"{{ prmt.b32 $0, $2, {high}, 0x4240; prmt.b32 $1, $2, {high}, 0x4341; }}"
