"""Converts a tile of a weight to floats on a GPU of compute capability 9.0 (Pallas, Mosaic GPU).

XLA's own conversion reads each word once for each of its values; here a thread reads a word once,
turns its values into floats two an instruction, and whole rows are written.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from glm_jax.kernels.quantized_matmul import mosaic_registers
from glm_jax.kernels.quantized_matmul.mosaic_blocks import Blocks, ConvertedTiles, Division
from glm_jax.kernels.quantized_matmul.mosaic_gpu import Step, scales_by_tile, swizzled
from glm_jax.kernels.quantized_matmul.mosaic_layout import LANES, TILE, MosaicArray
from glm_jax.kernels.quantized_matmul.mosaic_plan import Plan, scales_of

_STEPS = (512, 256, 128, 64)  # inputs of a program


def convert(
    weight: MosaicArray,
    inputs: Array,
    outputs: Array,
    tiles: ConvertedTiles,
    dtype: Any,
    interpret: bool = False,
) -> Float[Array, "tile_outputs tile_inputs"]:
    """Return a tile of a weight [K, N], turned, in float16 or bfloat16.

    Args:
      inputs, outputs: the first of the tile's.
    """
    size = weight.group_size
    step = next(s for s in _STEPS if tiles.inputs % s == 0 and (s % size == 0 or size % s == 0))
    blocks = Blocks(8, 1, 1, step, 1, 1, scale_first=True)
    has_zeros = weight.zero_points is not None
    division = Division(1, 1, 1, 1)
    plan = Plan(blocks, division, weight.bits, size, jnp.dtype(dtype), has_zeros, interpret)
    operands = {"values": weight.values, **scales_by_tile(weight)}
    of_scales = (plan.groups, 1, TILE)
    shared = {name: plgpu.SMEM(of_scales, a.dtype) for name, a in scales_of(weight).items()}
    shared["values"] = plgpu.SMEM((1, step // TILE, weight.bits, LANES), jnp.int32)
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan=plan, names=tuple(operands)),
        out_type=jax.ShapeDtypeStruct((tiles.outputs, tiles.inputs), dtype),
        scratch_types={
            "shared": shared,
            "floats": swizzled((TILE, step), dtype, plan),
            "full": plgpu.Barrier(num_arrivals=len(operands)),
        },
        grid=(tiles.outputs // TILE, tiles.inputs // step),
        grid_names=("output", "block"),
        kernel_name=f"convert_int{weight.bits}",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    starts = jnp.stack([outputs // TILE, inputs // TILE]).astype(jnp.int32)
    floats: Array = kernel(starts, *operands.values())
    return floats


def _kernel(
    starts: Any,
    *refs: Any,
    plan: Plan,
    names: tuple[str, ...],
    shared: dict[str, Any],
    floats: Any,
    full: Any,
) -> None:
    *operands, out = refs
    step = plan.blocks.inputs
    row, block = lax.axis_index("output"), lax.axis_index("block")
    output, first = starts[0] + row, starts[1] + block * (step // TILE)
    groups = pl.ds(lax.div(first * TILE, plan.group_size), plan.groups)
    slices = {
        "values": (pl.ds(output, 1), pl.ds(first, step // TILE)),
        "scales": (groups, pl.ds(output, 1)),
        "zeros": (groups, pl.ds(output, 1)),
    }
    for name, ref in zip(names, operands, strict=True):
        plgpu.copy_gmem_to_smem(ref.at[slices[name]], shared[name], full)
    plgpu.barrier_wait(full)
    here = Step(shared, 0, plan)
    load = mosaic_registers.emulate if plan.interpret else mosaic_registers.load
    tiles = max(1, plan.chunk // TILE)
    for start in range(0, step // TILE, tiles):
        words = shared["values"].at[0, pl.ds(start, tiles)]
        parts = load(words, plan.bits, plan.dtype, plan.chunk, False)
        for index, part in enumerate(parts):
            column = start * TILE + index * plan.chunk
            floats[:, pl.ds(column, plan.chunk)] = here.scaled(part, column // plan.group, 0)
    plgpu.commit_smem()
    written = out.at[pl.ds(row * TILE, TILE), pl.ds(block * step, step)]
    plgpu.copy_smem_to_gmem(floats, written)
    plgpu.wait_smem_to_gmem(0)
