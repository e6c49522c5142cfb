"""Packed integers to float16 or bfloat16 in a thread's registers, two values an instruction.

The conversion unit is slow, so bits do it: an integer without a sign, masked into the mantissa
of a power of two, is that power plus the integer; what is too much is subtracted, exactly. A
register holds two floats, of neighbouring inputs.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float

from glm_jax.kernels.quantized_matmul.mosaic_layout import LANES, TILE, MosaicArray, integers

# PTX of one word, $N, to N registers, $0 to $N-1. In lop3 0xea is (a & b) | c, 0xae (~a & b) | c.
_PTX = {
    # Values 0 and 2 at the mantissa's low end on 1024; 1 and 3 are 16 times as much there.
    (4, "float16"): """{
        .reg .b32 upper, even, odd, sixteenth;
        mov.b32 even, 0x64086408;
        mov.b32 odd, 0xd480d480;
        mov.b32 sixteenth, 0x2c002c00;
        shr.u32 upper, $4, 8;
        lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
        lop3.b32 $2, upper, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 $3, upper, 0x00f000f0, 0x64006400, 0xea;
        sub.rn.f16x2 $0, $0, even;
        fma.rn.f16x2 $1, $1, sixteenth, odd;
        sub.rn.f16x2 $2, $2, even;
        fma.rn.f16x2 $3, $3, sixteenth, odd;
    }""",
    # A mantissa of 7 bits has room for one value: on 128.
    (4, "bfloat16"): """{
        .reg .b32 w1, w2, w3, base;
        mov.b32 base, 0x43084308;
        shr.u32 w1, $4, 4;
        shr.u32 w2, $4, 8;
        shr.u32 w3, $4, 12;
        lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 $1, w1, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 $2, w2, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 $3, w3, 0x000f000f, 0x43004300, 0xea;
        sub.rn.bf16x2 $0, $0, base;
        sub.rn.bf16x2 $1, $1, base;
        sub.rn.bf16x2 $2, $2, base;
        sub.rn.bf16x2 $3, $3, base;
    }""",
    # Bytes beside the high byte of 1024.
    (8, "float16"): """{
        .reg .b32 base;
        mov.b32 base, 0x64806480;
        prmt.b32 $0, $2, 0x64646464, 0x4240;
        prmt.b32 $1, $2, 0x64646464, 0x4341;
        sub.rn.f16x2 $0, $0, base;
        sub.rn.f16x2 $1, $1, base;
    }""",
    # Seven bits on 128, less what the eighth, inverted, makes of 128: 128 or 256.
    (8, "bfloat16"): """{
        .reg .b32 odd, s0, s1;
        shr.u32 odd, $2, 8;
        lop3.b32 $0, $2, 0x007f007f, 0x43004300, 0xea;
        lop3.b32 $1, odd, 0x007f007f, 0x43004300, 0xea;
        lop3.b32 s0, $2, 0x00800080, 0x43004300, 0xae;
        lop3.b32 s1, odd, 0x00800080, 0x43004300, 0xae;
        sub.rn.bf16x2 $0, $0, s0;
        sub.rn.bf16x2 $1, $1, s1;
    }""",
}


def load(tile: Any, bits: int, dtype: Any, inputs: int) -> list[Float[Array, "64 inputs"]]:
    """A tile [bits, 128] of `MosaicArray.values` in shared memory as operands of wgmma.

    Args:
      inputs: of an operand: 64, or 32 for two.
    """
    strided = plgpu.Layout.WG_STRIDED((bits, LANES), vec_size=4)
    name = str(jnp.dtype(dtype))
    one = plgpu.ShapeDtypeStruct((TILE, inputs), dtype, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(strided,), return_type=[one] * (TILE // inputs))
    def convert(_: Any, words: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        element = ir.F16Type.get() if name == "float16" else ir.BF16Type.get()
        pair = ir.VectorType.get((2,), element)
        made = []
        for vector in words.registers.flat:
            for index in range(4):
                word = llvm.extractelement(vector, mgpu.c(index, i32))
                made += _convert_word(word, bits, name)
        # Each of eight columns of inputs, then each of the halves of a warp's 16 outputs.
        pairs = np.empty((TILE // inputs, inputs // 8, 2), dtype=object)
        for place, register in zip(np.ndindex(pairs.shape), made, strict=True):
            pairs[place] = llvm.bitcast(pair, register)
        layout = mgpu.WGMMA_LAYOUT
        shape = layout.registers_shape((TILE, inputs))
        return [
            mgpu.FragmentedArray(_registers=part.reshape(shape), _layout=layout, _is_signed=None)
            for part in pairs
        ]

    floats: list[Array] = convert(plgpu.load(tile, layout=strided))
    return floats


def _convert_word(word: Any, bits: int, dtype: str) -> list[Any]:
    count = 16 // bits
    i32 = ir.IntegerType.get_signless(32)
    struct = llvm.StructType.get_literal([i32] * count)
    constraints = ",".join(["=&r"] * count + ["r"])
    results = llvm.inline_asm(
        struct, [word], _PTX[bits, dtype], constraints, asm_dialect=0, has_side_effects=False
    )
    return [llvm.extractvalue(i32, results, [index]) for index in range(count)]


def emulate(tile: Any, bits: int, dtype: Any, inputs: int) -> list[Float[Array, "64 inputs"]]:
    """What `load` returns, in plain operations, for the interpreter."""
    one = MosaicArray(values=tile[...][None, None], scales=jnp.ones((1, TILE)), bits=bits)
    return jnp.split(integers(one).T.astype(dtype), TILE // inputs, axis=1)
