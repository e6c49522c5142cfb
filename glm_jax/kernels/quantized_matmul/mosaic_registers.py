"""Packed integers to float16 or bfloat16 in a thread's registers, two values an instruction.

The conversion unit is slow, so bits do it: an integer without a sign, masked into the mantissa
of a power of two, is that power plus the integer; what is too much is subtracted, exactly. A
register holds two floats, of neighbouring inputs.

Half of the instructions are those subtractions. `raw` values go without: what is too much is
taken off the product instead, by the sum of the activations (`raw_form`). In float16 they are
subnormal numbers, which the matrix units take as they are; so nothing large cancels.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float

from glm_jax.kernels import ptx
from glm_jax.kernels.quantized_matmul.mosaic_layout import TILE, MosaicArray, integers


def raw_form(dtype: Any) -> tuple[float, tuple[float, float]]:
    """Return what raw 4-bit values are: (integer + offset) * factor.

    Returns:
      The offset, and the factors of the first 8 and last 8 of each 16 outputs.
    """
    return (8.0, (2.0**-22, 2.0**-18)) if dtype == jnp.float16 else (40.0, (1.0, 1.0))


def conversion(bits: int, dtype: str, raw: bool) -> str:
    """PTX of one word, $N, to N registers, $0 to $N-1.

    In lop3 0xc0 is a & b, 0xea (a & b) | c, 0xae (~a & b) | c.
    """
    if bits == 8:
        return _BYTES[dtype]
    if dtype == "bfloat16":
        # 32 and four bits below it; a mantissa of 7 bits has room for one value.
        lines = ["mov.b32 r0, $4;"]
        lines += [f"shf.r.wrap.b32 r{i}, $4, $4, {4 * i};" for i in range(1, 4)]
        lines += [f"lop3.b32 ${i}, r{i}, 0x003c003c, 0x42004200, 0xea;" for i in range(4)]
        if not raw:
            lines += ["mov.b32 base, 0x42204220;"]
            lines += [f"sub.rn.bf16x2 ${i}, ${i}, base;" for i in range(4)]
        return _block("r0, r1, r2, r3, base", lines)
    # Two values of a half word lie in the mantissa: on 256 and on 16, or on nothing.
    masks = ("0x003c003c", "0x03c003c0")
    powers = ("0", "0") if raw else ("0x5c005c00", "0x4c004c00")
    function = "0xc0" if raw else "0xea"
    lines = ["mov.b32 r0, $4;", "shf.r.wrap.b32 r1, $4, $4, 8;"]
    for i in range(4):
        source, mask, power = f"r{i // 2}", masks[i % 2], powers[i % 2]
        lines.append(f"lop3.b32 ${i}, {source}, {mask}, {power}, {function};")
    if not raw:
        lines += ["mov.b32 base0, 0x5c205c20;", "mov.b32 base1, 0x4e004e00;"]  # 264 and 24
        lines += [f"sub.rn.f16x2 ${i}, ${i}, base{i % 2};" for i in range(4)]
    return _block("r0, r1, base0, base1", lines)


def _block(registers: str, lines: list[str]) -> str:
    return "{ .reg .b32 " + registers + "; " + " ".join(lines) + " }"


_BYTES = {
    # Bytes beside the high byte of 1024.
    "float16": _block(
        "base",
        [
            "mov.b32 base, 0x64806480;",
            "prmt.b32 $0, $2, 0x64646464, 0x4240;",
            "prmt.b32 $1, $2, 0x64646464, 0x4341;",
            "sub.rn.f16x2 $0, $0, base;",
            "sub.rn.f16x2 $1, $1, base;",
        ],
    ),
    # Seven bits on 128, less what the eighth, inverted, makes of 128: 128 or 256.
    "bfloat16": _block(
        "odd, s0, s1",
        [
            "shr.u32 odd, $2, 8;",
            "lop3.b32 $0, $2, 0x007f007f, 0x43004300, 0xea;",
            "lop3.b32 $1, odd, 0x007f007f, 0x43004300, 0xea;",
            "lop3.b32 s0, $2, 0x00800080, 0x43004300, 0xae;",
            "lop3.b32 s1, odd, 0x00800080, 0x43004300, 0xae;",
            "sub.rn.bf16x2 $0, $0, s0;",
            "sub.rn.bf16x2 $1, $1, s1;",
        ],
    ),
}


def load(
    tiles: Any, bits: int, dtype: Any, inputs: int, raw: bool
) -> list[Float[Array, "64 inputs"]]:
    """Tiles [tiles, bits, 128] of `MosaicArray.values` in shared memory as operands of wgmma.

    Args:
      tiles: of the same outputs and neighbouring inputs.
      inputs: of an operand; those of all tiles, or a half of one tile's.
      raw: leaves 4-bit values as `raw_form` says.
    """
    count = tiles.shape[0] * TILE // inputs
    strided = plgpu.Layout.WG_STRIDED(tiles.shape, vec_size=4)
    one = plgpu.ShapeDtypeStruct((TILE, inputs), dtype, layout=plgpu.Layout.WGMMA)
    name = str(jnp.dtype(dtype))
    text, registers = conversion(bits, name, raw), "r" * (16 // bits)

    @plgpu.inline_mgpu(arg_types=(strided,), return_type=[one] * count)
    def convert(_: Any, words: Any) -> Any:
        element = ir.F16Type.get() if name == "float16" else ir.BF16Type.get()
        pair = ir.VectorType.get((2,), element)
        converted = []
        for vector in words.registers.flat:
            for index in range(4):
                word = llvm.extractelement(vector, ptx.i32(index))
                converted += ptx.asm(registers, text, [word], "r")
        # Each of eight columns of inputs, then each of the halves of a warp's 16 outputs.
        pairs = np.empty((count, inputs // 8, 2), dtype=object)
        for indices, register in zip(np.ndindex(pairs.shape), converted, strict=True):
            pairs[indices] = llvm.bitcast(pair, register)
        layout = mgpu.WGMMA_LAYOUT
        shape = layout.registers_shape((TILE, inputs))
        return [
            mgpu.FragmentedArray(_registers=part.reshape(shape), _layout=layout, _is_signed=None)
            for part in pairs
        ]

    floats: list[Array] = convert(plgpu.load(tiles, layout=strided))
    return floats


def emulate(
    tiles: Any, bits: int, dtype: Any, inputs: int, raw: bool
) -> list[Float[Array, "64 inputs"]]:
    """Return what `load` returns, by plain operations for the interpreter, as raw float32."""
    one = MosaicArray(values=tiles[...][None], scales=jnp.ones((1, TILE)), bits=bits)
    values = integers(one).T.astype(jnp.float32)
    if raw:
        offset, factors = raw_form(dtype)
        first = lax.broadcasted_iota(jnp.int32, values.shape, 0) % 16 < 8
        values = (values + offset) * jnp.where(first, *factors)
    values = values if raw else values.astype(dtype)
    return jnp.split(values, values.shape[1] // inputs, axis=1)
