"""What the kernel of warps' matrix instructions does in registers: one step's products.

An instruction takes weights of 16 outputs and 16 inputs, and activations of 8 rows. Of a tile of
64 outputs each warp has 16. A thread's 16 bytes of `MosaicArray` are its own operands.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxtyping import Array, Float

from glm_jax.kernels.ptx import address, asm, i32, thread
from glm_jax.kernels.quantized_matmul.mma_form import Form
from glm_jax.kernels.quantized_matmul.mosaic_layout import TILE
from glm_jax.kernels.quantized_matmul.mosaic_plan import Plan

_DEPTH = 16  # inputs of an instruction
_OPERAND = 16  # bytes of weights that a thread loads at once

Values = list[Any]  # of a thread, in registers


def multiply_step(
    here: dict[str, Any], totals: tuple[Float[Array, "64 rows"], ...], plan: Plan, form: Form
) -> tuple[Float[Array, "64 rows"], ...]:
    """Add a step's products to the totals of tiles.

    Args:
      here: what the step takes, in shared memory.
    """
    layout = plgpu.Layout.WGMMA  # also that of the warps' instructions
    shape = (TILE, plan.blocks.rows)
    one = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32), layout=layout)

    @plgpu.inline_mgpu(
        arg_types=((plgpu.RefType(),) * len(here), (layout,) * len(totals)),
        return_type=(one,) * len(totals),
    )
    def multiply(_: Any, refs: Any, totals: Any) -> Any:
        step = _Step(dict(zip(here, refs, strict=True)), plan, form)
        values = [_unpacked(total) for total in totals]
        for group in range(plan.groups):
            values = step.added(group, values)
        return tuple(_packed(*pair) for pair in zip(values, totals, strict=True))

    added: tuple[Array, ...] = multiply(tuple(here.values()), totals)
    return added


def _unpacked(total: Any) -> list[Values]:
    """Return a thread's four values of each 8 rows: of outputs g, g, g + 8, g + 8."""
    flat = [llvm.extractelement(p, i32(i)) for p in total.registers.flat for i in range(2)]
    return [flat[i : i + 4] for i in range(0, len(flat), 4)]


def _packed(values: list[Values], like: Any) -> Any:
    flat = [value for four in values for value in four]
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    registers = np.empty(len(flat) // 2, dtype=object)
    for index in range(len(registers)):
        vector = llvm.mlir_undef(pair)
        for i in range(2):
            vector = llvm.insertelement(vector, flat[2 * index + i], i32(i))
        registers[index] = vector
    return mgpu.FragmentedArray(
        _registers=registers.reshape(like.registers.shape), _layout=like.layout, _is_signed=None
    )


class _Step:
    """A thread's part in a step. Thread 32 w + 4 g + c has outputs 16 w + g (+ 8) of a tile, and
    of products rows 2 c and 2 c + 1 of each 8."""

    def __init__(self, refs: dict[str, Any], plan: Plan, form: Form) -> None:
        self.refs, self.plan, self.form = refs, plan, form
        self.kind = {"float16": "f16", "bfloat16": "bf16"}[str(jnp.dtype(plan.dtype))]
        self.bytes = {name: mgpu.bytewidth(ref.type.element_type) for name, ref in refs.items()}
        number = thread()
        lane, column = arith.divui(number, i32(4)), arith.andi(number, i32(3))
        # g + 16 w of 8 w + g
        output = arith.addi(lane, arith.andi(lane, i32(24)))
        offsets = {
            "values": (number, _OPERAND),
            "sums": (column, 8),
            "scales": (output, self.bytes["scales"]),
            "zeros": (output, self.bytes["scales"]),
        }
        self.base = {
            name: arith.addi(address(ref), arith.muli(offsets[name][0], i32(offsets[name][1])))
            for name, ref in refs.items()
            if name != "x"
        }
        self.words: dict[int, Values] = {}
        self.rows: list[Values] = []
        self._address_rows()

    def _address_rows(self) -> None:
        """Where a thread's 16 bytes lie of the matrices of 8 rows that ldmatrix reads.

        It reads four: 32 neighbouring inputs of 8 rows, or 16 of twice 8. The 16 bytes of a row
        are swizzled as `mma_copies` says.
        """
        number = thread()
        row, matrix = arith.andi(number, i32(7)), arith.divui(number, i32(8))
        self.load_depth = 2 * _DEPTH if self.plan.blocks.rows == 8 else _DEPTH
        chunk = arith.andi(matrix, i32(self.load_depth // 8 - 1))
        column = arith.muli(arith.xori(chunk, row), i32(16))
        if self.plan.blocks.rows > 8:
            row = arith.addi(row, arith.muli(arith.andi(matrix, i32(2)), i32(4)))
        start = arith.addi(
            address(self.refs["x"]), arith.muli(row, i32(2 * self.plan.blocks.inputs))
        )
        self.row_base = {
            bits: arith.addi(start, arith.xori(column, i32(bits)))
            for bits in range(0, 128, 2 * self.load_depth)
        }

    def added(self, group: int, totals: list[list[Values]]) -> list[list[Values]]:
        """Totals with a group's products."""
        if self.plan.blocks.scale_first:
            return self._multiplied(group, totals, self._scaling(group))
        tiles = range(self.plan.blocks.tiles)
        sums = self._sums(group)
        starts = [self._starts(group, tile, sums) for tile in tiles]
        products = self._multiplied(group, starts, lambda _, registers: registers)
        added = []
        for tile, of_tile in enumerate(products):
            scales = [self._number("scales", group, tile, half) for half in range(2)]
            fma = lambda i, *values, s=scales: asm(
                "f", "fma.rn.f32 $0, $1, $2, $3;", [values[0], s[i // 2], values[1]], "fff"
            )
            fours = zip(of_tile, totals[tile], strict=True)
            added.append([[fma(i, new[i], old[i]) for i in range(4)] for new, old in fours])
        return added

    def _sums(self, group: int) -> list[Values]:
        """Return the sum of a group's activations, two for each 8 rows."""
        if "sums" not in self.refs:
            return []
        sums = []
        for row in range(0, self.plan.blocks.rows, 8):
            at = 4 * (group * self.plan.blocks.rows + row)
            text = f"ld.shared.v2.f32 {{$0,$1}}, [$2 + {at}];"
            sums.append(asm("ff", text, [self.base["sums"]], "r", effects=True))
        return sums

    def _starts(self, group: int, tile: int, sums: list[Values]) -> list[Values]:
        """Return where a group's products start, of 16 outputs, less what weights are too large."""
        if not sums:
            return [[mgpu.c(0.0, ir.F32Type.get())] * 4] * (self.plan.blocks.rows // 8)
        excess = [self._excess(group, tile, half) for half in range(2)]
        product = lambda a, b: asm("f", "mul.f32 $0, $1, $2;", [a, b], "ff")
        return [[product(pair[i % 2], excess[i // 2]) for i in range(4)] for pair in sums]

    def _excess(self, group: int, tile: int, half: int) -> Any:
        """Return what a unit of activations takes off products, negative."""
        factor, offset = -self.form.factors[half], self.form.offsets[half]
        if not self.plan.zeros:
            return mgpu.c(factor * offset, ir.F32Type.get())
        zero = self._number("zeros", group, tile, half)
        text = f"fma.rn.f32 $0, $1, {_hex(factor)}, {_hex(factor * offset)};"
        return asm("f", text, [zero], "f")

    def _scaling(self, group: int) -> Any:
        """Return a function of (tile, registers of weights) that gives them scaled."""
        pair = f"cvt.rn.{self.kind}x2.f32 $0, $1, $1;"
        factors = []
        for tile in range(self.plan.blocks.tiles):
            halves = []
            for half in range(2):
                scale = asm("r", pair, [self._number("scales", group, tile, half)], "f")
                excess = mgpu.c(self.form.offsets[half], ir.F32Type.get())
                if self.plan.zeros:
                    zero = self._number("zeros", group, tile, half)
                    excess = asm("f", "add.f32 $0, $1, $2;", [zero, excess], "ff")
                halves.append([asm("r", pair, [excess], "f"), scale])
            factors.append(halves)
        # (weight - excess) * scale; before compute capability 9.0 bfloat16 has fma alone.
        text = "{ .reg .b32 d; sub.rn.f16x2 d, $1, $2; mul.rn.f16x2 $0, d, $3; }"
        if self.kind == "bf16":
            text = (
                "{ .reg .b32 d, minus, nought; mov.b32 minus, 0xbf80bf80; "
                "mov.b32 nought, 0x80008000; fma.rn.bf16x2 d, $2, minus, $1; "
                "fma.rn.bf16x2 $0, d, $3, nought; }"
            )
        return lambda tile, registers: [
            asm("r", text, [register, *factors[tile][index % 2]], "rrr")
            for index, register in enumerate(registers)
        ]

    def _multiplied(
        self, group: int, totals: list[list[Values]], change: Any
    ) -> list[list[Values]]:
        """Totals, [tile][8 rows], with a group's products of weights that `change` changes."""
        totals = [list(of_tile) for of_tile in totals]
        registers = [f"{{{','.join(f'${i}' for i in range(*ends))}}}" for ends in _REGISTERS]
        text = f"mma.sync.aligned.m16n8k16.row.col.f32.{self.kind}.{self.kind}.f32 "
        text += ", ".join(registers) + ";"
        depths = self.plan.group // _DEPTH
        for depth in range(group * depths, (group + 1) * depths):
            rows = self._activations(depth)
            for tile, of_tile in enumerate(totals):
                weights = change(tile, self._weights(tile, depth))
                for block, pair in enumerate(rows):
                    operands = [*weights, *pair, *of_tile[block]]
                    of_tile[block] = asm("ffff", text, operands, "rrrrrrffff")
        return totals

    def _activations(self, depth: int) -> list[Values]:
        """Return the register of 16 inputs, two for each 8 rows."""
        of_load = self.load_depth // _DEPTH
        load, part = divmod(depth, of_load)
        if part == 0:
            self.rows = []
            first = 2 * self.load_depth * load  # bytes
            for row in range(0, self.plan.blocks.rows, 16):
                at = first // 128 * 128 + 2 * self.plan.blocks.inputs * row
                text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, "
                base = self.row_base[first % 128]
                four = asm("rrrr", f"{text}[$4 + {at}];", [base], "r", effects=True)
                self.rows += [four[:2], four[2:]]
        return self.rows if of_load == 1 else self.rows[part : part + 1]

    def _weights(self, tile: int, depth: int) -> Values:
        """Return the four registers of 16 outputs by 16 inputs, from words loaded four at once."""
        bits = self.plan.bits
        count = bits // 4  # words
        load, part = divmod(count * depth, 4)
        if part == 0:
            of_tile = self.plan.blocks.inputs // TILE * bits // 4  # loads
            at = (tile * of_tile + load) * 128 * _OPERAND
            text = f"ld.shared.v4.b32 {{$0,$1,$2,$3}}, [$4 + {at}];"
            self.words[tile] = asm("rrrr", text, [self.base["values"]], "r", effects=True)
        made = []
        for word in self.words[tile][part : part + count]:
            made += asm("r" * (16 // bits), self.form.ptx, [word], "r")
        return made

    def _number(self, name: str, group: int, tile: int, half: int) -> Any:
        """Return a scale or zero point of output g (+ 8), in float32."""
        element = self.refs[name].type.element_type
        output = group * self.plan.blocks.outputs + tile * TILE + 8 * half
        at = f"[$1 + {self.bytes[name] * output}]"
        if isinstance(element, ir.F32Type):
            text = f"ld.shared.f32 $0, {at};"
        elif isinstance(element, ir.F16Type):
            text = f"{{ .reg .b16 h; ld.shared.b16 h, {at}; cvt.f32.f16 $0, h; }}"
        else:
            text = f"{{ .reg .b32 r; ld.shared.u16 r, {at}; shl.b32 r, r, 16; mov.b32 $0, r; }}"
        return asm("f", text, [self.base[name]], "r", effects=True)


# Of an instruction: results, weights, activations, what is added to.
_REGISTERS = ((0, 4), (4, 8), (8, 10), (10, 14))


def _hex(value: float) -> str:
    """Return a float32 in PTX."""
    return f"0f{np.float32(value).view(np.uint32):08X}"
