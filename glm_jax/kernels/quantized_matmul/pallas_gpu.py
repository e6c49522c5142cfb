"""The kernel for NVIDIA GPUs from compute capability 8.0 on (Pallas, Triton).

A program multiplies a block of rows with a block of outputs over its share of the inputs.
Packed weights go to registers as they are, become float16 or bfloat16 there, and feed the
matrix units. Where rows are few the inputs are split among programs, so that all
multiprocessors read; what those write is summed afterwards, always in the same order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from glm_jax.kernels.quantized_matmul.tuning import Blocks, Problem, lookup
from glm_jax.quantization import QuantizedArray

_DTYPES = ("float16", "bfloat16")
_DEFAULT_CAPABILITY = 8.0


def blocks_for(
    rows: int, weight: QuantizedArray, compute_capability: float | None
) -> Blocks | None:
    """Block sizes for x [rows, K] times weight [K, N]; None where the kernel does not fit."""
    inputs, outputs = weight.shape
    problem = Problem(rows, inputs, outputs, weight.group_size, weight.bits)
    return lookup(problem, compute_capability or _DEFAULT_CAPABILITY)


def takes_dtype(dtype: Any) -> bool:
    """Whether the matrix units take x as it is; float32 would lose bits there."""
    return jnp.dtype(dtype).name in _DTYPES


def matmul(
    x: Float[Array, "rows inputs"],
    weight: QuantizedArray,
    bias: Float[Array, " outputs"] | None,
    blocks: Blocks,
    interpret: bool = False,
) -> Float[Array, "rows outputs"]:
    """x [rows, K], float16 or bfloat16, times weight [K, N], plus bias.

    Args:
      blocks: of `blocks_for`.
      interpret: runs the kernel's program step by step on any device, for tests.

    Returns:
      float32 [rows, N].
    """
    rows, inputs = x.shape
    outputs = weight.shape[1]
    per_byte = 8 // weight.bits
    # Inputs that share bytes lie in planes of their own, each read in one run.
    planes = x.reshape(rows, inputs // per_byte, per_byte).transpose(2, 0, 1)
    grid = (outputs // blocks.outputs, pl.cdiv(rows, blocks.rows), blocks.splits)
    column = lambda size: pl.BlockSpec((size, blocks.outputs), lambda n, m, s: (0, n))
    operands, specs = (
        [planes, weight.values, weight.scales],
        [
            pl.BlockSpec(planes.shape, lambda n, m, s: (0, 0, 0)),
            column(weight.values.shape[0]),
            column(weight.groups),
        ],
    )
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
    x_ref: Any,
    values_ref: Any,
    scales_ref: Any,
    *rest: Any,
    blocks: Blocks,
    bits: int,
    group_size: int,
    has_zero_points: bool,
    has_bias: bool,
) -> None:
    *extra, out_ref = rest
    zeros_ref = extra[0] if has_zero_points else None
    dtype = x_ref.dtype
    packed_inputs = blocks.inputs * bits // 8
    has_groups = scales_ref.shape[0] > 1
    row_block, split = pl.program_id(1), pl.program_id(2)
    row = row_block * blocks.rows + jnp.arange(blocks.rows)
    row_mask = (row < x_ref.shape[1])[:, None]
    steps = values_ref.shape[0] // (packed_inputs * blocks.splits)

    def body(step: Array, total: Array) -> Array:
        block = split * steps + step
        inputs = pl.ds(block * packed_inputs, packed_inputs)
        packed = triton.load(values_ref.at[inputs, :])
        group = block * blocks.inputs // group_size if has_groups else 0
        planes = [packed] if bits == 8 else [packed >> 4, (packed << 4) >> 4]
        product = jnp.zeros((blocks.rows, blocks.outputs), jnp.float32)
        for i, plane in enumerate(planes):
            weight = plane.astype(dtype)
            if zeros_ref is not None:
                weight = weight - zeros_ref[group, :].astype(dtype)[None]
            x = triton.load(
                x_ref.at[row_block * 0 + i, pl.ds(row_block * blocks.rows, blocks.rows), inputs],
                mask=row_mask,
                other=0.0,
            )
            product += pl.dot(x, weight)
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
    rows = pl.ds(row_block * blocks.rows, blocks.rows)
    triton.store(out_ref.at[rows, :], total, mask=row_mask)
