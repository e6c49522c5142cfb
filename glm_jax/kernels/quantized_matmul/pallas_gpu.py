"""The kernel for NVIDIA GPUs from compute capability 8.0 on (Pallas, Triton).

A program multiplies a block of rows with a block of outputs over its share of the inputs.
Packed weights go to registers as they are, become float16 or bfloat16 there, and feed the
matrix units. Where rows are few the inputs are split among programs, so that all
multiprocessors read; what those write is summed afterwards, always in the same order.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from glm_jax.kernels import target
from glm_jax.kernels.dispatch import unmet
from glm_jax.kernels.quantized_matmul.arguments import Arguments, Problem
from glm_jax.kernels.quantized_matmul.triton_blocks import Blocks, candidates, choose
from glm_jax.quantization import QuantizedArray
from glm_jax.quantization.packing import interleaved_planes, split_bytes


@dataclasses.dataclass(frozen=True)
class PallasGPU:
    """Activations in 16 bits and a weight that some block sizes divide.

    Attributes:
      interpret: runs the kernel's program step by step on any device, for tests.
      blocks: sizes that divide the weight's; None for those of `choose`.
    """

    interpret: bool = False
    blocks: Blocks | None = None
    name: str = "pallas"
    platform: str = "cuda"

    def supports(self, arguments: Arguments) -> str | None:
        return unmet(arguments.has_stored_integers) or unmet(
            (arguments.x.dtype != jnp.float32, "activations in 16 bits"),
            *(() if self.interpret else (target.requires_triton(),)),
            (self._blocks(arguments) is not None, "sizes that its blocks divide"),
        )

    def candidates(self, arguments: Arguments) -> Iterator[Blocks]:
        """Yield the blocks that are worth measuring."""
        return candidates(Problem.of(arguments.x, arguments.weight))

    def __call__(self, arguments: Arguments) -> Array:
        blocks = self._blocks(arguments)
        assert blocks is not None
        return matmul(arguments.x, arguments.weight, arguments.bias, blocks, self.interpret)

    def _blocks(self, arguments: Arguments) -> Blocks | None:
        return self.blocks or choose(Problem.of(arguments.x, arguments.weight))


def matmul(
    x: Float[Array, "rows inputs"],
    weight: QuantizedArray,
    bias: Float[Array, " outputs"] | None,
    blocks: Blocks,
    interpret: bool = False,
) -> Float[Array, "rows outputs"]:
    """x [rows, K], float16 or bfloat16, times weight [K, N], plus bias.

    Args:
      blocks: sizes that divide the weight's.
      interpret: runs the kernel's program step by step on any device, for tests.

    Returns:
      float32 [rows, N].
    """
    rows, outputs = x.shape[0], weight.shape[1]
    planes = list(interleaved_planes(x, 8 // weight.bits))
    grid = (outputs // blocks.outputs, pl.cdiv(rows, blocks.rows), blocks.splits)
    column = lambda size: pl.BlockSpec((size, blocks.outputs), lambda n, m, s: (0, n))
    operands = [*planes, weight.values, weight.scales]
    specs = [pl.BlockSpec(plane.shape, lambda n, m, s: (0, 0)) for plane in planes]
    specs += [column(weight.values.shape[0]), column(weight.groups)]
    for extra in (weight.zero_points, None if bias is None else bias[None]):
        if extra is not None:
            operands.append(extra)
            specs.append(column(extra.shape[0]))
    partial = pl.pallas_call(
        functools.partial(
            _kernel,
            blocks=blocks,
            bits=weight.bits,
            group_size=weight.group_size,
            has_zero_points=weight.zero_points is not None,
            has_bias=bias is not None,
        ),
        out_shape=jax.ShapeDtypeStruct((blocks.splits, rows, outputs), jnp.float32),
        grid=grid,
        in_specs=specs,
        out_specs=pl.BlockSpec((None, rows, blocks.outputs), lambda n, m, s: (s, 0, n)),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name=f"quantized_matmul_int{weight.bits}",
    )(*operands)
    return partial[0] if blocks.splits == 1 else jnp.sum(partial, axis=0)


def _kernel(
    *refs: Any,
    blocks: Blocks,
    bits: int,
    group_size: int,
    has_zero_points: bool,
    has_bias: bool,
) -> None:
    per_byte = 8 // bits
    x_refs, (values_ref, scales_ref, *extra, out_ref) = refs[:per_byte], refs[per_byte:]
    zeros_ref = extra[0] if has_zero_points else None
    num_rows, dtype = x_refs[0].shape[0], x_refs[0].dtype
    packed_inputs = blocks.inputs // per_byte
    has_groups = scales_ref.shape[0] > 1
    row_block, split = pl.program_id(1), pl.program_id(2)
    first_row = row_block * blocks.rows
    rows = pl.ds(first_row, blocks.rows)
    row_mask = (first_row + jnp.arange(blocks.rows) < num_rows)[:, None]
    steps = values_ref.shape[0] // (packed_inputs * blocks.splits)

    def body(step: Array, total: Array) -> Array:
        block = split * steps + step
        inputs = pl.ds(block * packed_inputs, packed_inputs)
        packed = triton.load(values_ref.at[inputs, :])
        group = block * blocks.inputs // group_size if has_groups else 0
        planes = (packed,) if bits == 8 else split_bytes(packed)
        product = jnp.zeros((blocks.rows, blocks.outputs), jnp.float32)
        for x_ref, plane in zip(x_refs, planes, strict=True):
            weight = plane.astype(dtype)
            if zeros_ref is not None:
                weight = weight - zeros_ref[group, :].astype(dtype)[None]
            x = triton.load(x_ref.at[rows, inputs], mask=row_mask, other=0.0)
            product += triton.dot(x, weight)
        if has_groups:
            product = product * scales_ref[group, :].astype(jnp.float32)[None]
        return total + product

    total = jnp.zeros((blocks.rows, blocks.outputs), jnp.float32)
    total = jax.lax.fori_loop(0, steps, body, total)
    if not has_groups:
        total = total * scales_ref[0, :].astype(jnp.float32)[None]
    if has_bias:
        bias = extra[-1][0, :].astype(jnp.float32)[None]
        total = total + jnp.where(split == 0, bias, 0.0)
    triton.store(out_ref.at[rows, :], total, mask=row_mask)
