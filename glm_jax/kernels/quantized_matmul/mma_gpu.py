"""The kernel for compute capability 8.0 and later, of warps' matrix instructions (Mosaic GPU).

It takes the layout of the kernel for 9.0, in which a thread's bytes are its own operands here
too. Outputs lie along M of the instruction, 16, and rows along its N, 8. Programs of four warps,
several a multiprocessor, share all (tile, step) pairs evenly; each copies steps of weights,
activations and scales into shared memory, a few steps ahead of what it multiplies.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from glm_jax.kernels.quantized_matmul import mma_copies, mma_registers
from glm_jax.kernels.quantized_matmul.arguments import Problem
from glm_jax.kernels.quantized_matmul.mma_blocks import choose, device
from glm_jax.kernels.quantized_matmul.mma_form import Form, form_of
from glm_jax.kernels.quantized_matmul.mosaic_blocks import Blocks
from glm_jax.kernels.quantized_matmul.mosaic_layout import LANES, TILE, MosaicArray, integers
from glm_jax.kernels.quantized_matmul.mosaic_plan import Plan, scales_of


def matmul(
    x: Float[Array, "rows inputs"],
    weight: MosaicArray,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "rows outputs"]:
    """x [rows, K], float16 or bfloat16, times weight [K, N], accumulated in float32.

    Args:
      weight: one that `mosaic_blocks.supports` has no reason against.
      blocks: one of `mma_blocks.candidates`; by default `choose` finds one for the device that is
        compiled for.
      interpret: runs the kernel's program step by step on any device, for tests.

    Returns:
      float32 [rows, N].
    """
    if blocks is None:
        blocks = choose(Problem.of(x, weight), *device())
    plan = Plan.of(x, weight, blocks, interpret)
    form = form_of(weight.bits, x.dtype, blocks.scale_first)
    total = plan.add_parts(_call(plan.pad(x), weight, plan, form))
    # [16 outputs, first or last 8, 8, rows]
    scaled = total.reshape(-1, 2, 8, total.shape[1]) / jnp.array(form.factors)[:, None, None]
    return scaled.reshape(total.shape).T[: len(x)]


def _call(x: Array, weight: MosaicArray, plan: Plan, form: Form) -> Array:
    """Parts of the product, [parts, N, rows]; tiles that have fewer leave the rest unwritten."""
    outputs, blocks, stages = weight.shape[1], plan.blocks, plan.blocks.stages
    words = blocks.inputs // TILE * weight.bits * LANES  # of a step's 64 outputs
    of_scales = (stages, plan.groups, blocks.outputs)
    operands = scales_of(weight)
    scratch: dict[str, Any] = {name: plgpu.SMEM(of_scales, a.dtype) for name, a in operands.items()}
    scratch["x"] = plgpu.SMEM((stages, blocks.rows, blocks.inputs), x.dtype)
    scratch["values"] = plgpu.SMEM((stages, blocks.tiles, words), jnp.int32)
    if not blocks.scale_first and (plan.zeros or form.offsets[0]):
        operands["sums"] = plan.sums_of(x)
        scratch["sums"] = plgpu.SMEM((stages, plan.groups, blocks.rows), jnp.float32)
    # Last, as all threads copy them: then no copy by some threads takes a branch.
    operands |= {"x": x, "values": weight.values.reshape(outputs // TILE, -1)}
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan=plan, form=form, names=tuple(operands)),
        out_type=jax.ShapeDtypeStruct((max(plan.division.parts()), outputs, len(x)), jnp.float32),
        scratch_types={"shared": scratch},
        grid=(plan.division.programs,),
        grid_names=("program",),
        kernel_name=f"quantized_matmul_int{weight.bits}",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if plan.interpret else None,
    )
    parts: Array = kernel(*operands.values())
    return parts


def _kernel(
    *refs: Any, plan: Plan, form: Form, names: tuple[str, ...], shared: dict[str, Any]
) -> None:
    blocks, division = plan.blocks, plan.division
    *operands, out = refs
    memory = dict(zip(names, operands, strict=True))
    program = lax.axis_index("program")
    first = program * division.share
    stop = jnp.minimum(first + division.share, division.total)
    ahead = blocks.stages - 1  # steps that are copied while one is multiplied

    def stage(index: Array) -> Array:
        # Without signs the remainder takes fewer instructions.
        return lax.rem((index - first).astype(jnp.uint32), jnp.uint32(blocks.stages)).astype(
            jnp.int32
        )

    def copy(index: Array, tile: Array, step: Array) -> tuple[Array, Array]:
        """Copy a step, if it is this program's; return tile and step of the next copy."""
        pl.when(index < stop)(lambda: _copy(memory, shared, stage(index), tile, step, plan))
        if not plan.interpret:
            mma_copies.end_group()
        is_last = step + 1 == division.steps
        return jnp.where(is_last, tile + 1, tile), jnp.where(is_last, 0, step + 1)

    def one_step(index: Array, carried: Any) -> Any:
        totals, *next_copy = carried
        if not plan.interpret:
            mma_copies.wait(ahead - 1)
        next_copy = copy(index + ahead, *next_copy)  # to where the step before this one was
        here = {name: ref.at[stage(index)] for name, ref in shared.items()}
        multiply = _emulated_step if plan.interpret else mma_registers.multiply_step
        return (multiply(here, totals, plan, form), *next_copy)

    def one_tile(tile: Array, next_copy: Any) -> Any:
        start = tile * division.steps
        steps = jnp.maximum(start, first), jnp.minimum(start + division.steps, stop)
        zero = jnp.zeros((TILE, blocks.rows), jnp.float32)
        if not plan.interpret:
            zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
        totals, *next_copy = lax.fori_loop(*steps, one_step, ((zero,) * blocks.tiles, *next_copy))
        outputs, rows = plan.position(tile)
        part = program - lax.div(start, division.share)
        for index, total in enumerate(totals):
            of_tile = pl.ds((outputs + index) * TILE, TILE)
            out[part, of_tile, pl.ds(rows * blocks.rows, blocks.rows)] = total
        return tuple(next_copy)

    next_copy = lax.div(first, division.steps), lax.rem(first, division.steps)
    for index in range(ahead):
        next_copy = copy(first + index, *next_copy)
    tiles = lax.div(first, division.steps), lax.div(stop - 1, division.steps) + 1
    lax.fori_loop(*tiles, one_tile, next_copy)


def _copy(
    memory: dict[str, Any],
    shared: dict[str, Any],
    stage: Array,
    tile: Array,
    step: Array,
    plan: Plan,
) -> None:
    """Copy what a step takes into shared memory."""
    blocks = plan.blocks
    output, row = plan.position(tile)
    rows, words = pl.ds(row * blocks.rows, blocks.rows), shared["values"].shape[-1]
    # A step has whole groups, or a group whole steps.
    group = lax.div(step, max(1, plan.group_size // blocks.inputs)) * plan.groups
    of_groups = pl.ds(group, plan.groups), pl.ds(output * TILE, blocks.outputs)
    slices = {
        "x": (rows, pl.ds(step * blocks.inputs, blocks.inputs)),
        "values": (pl.ds(output, blocks.tiles), pl.ds(step * words, words)),
        "scales": of_groups,
        "zeros": of_groups,
        "sums": (pl.ds(step * plan.groups, plan.groups), rows),
    }
    for name, ref in memory.items():
        source, target = ref.at[slices[name]], shared[name].at[stage]
        if plan.interpret:
            target[...] = source[...]
        else:
            mma_copies.start(source, target, swizzled=name == "x", once=name == "values")


def _emulated_step(
    here: dict[str, Any], totals: tuple[Array, ...], plan: Plan, form: Form
) -> tuple[Array, ...]:
    """Return what `multiply_step` returns, in plain operations, for the interpreter."""
    blocks, dtype = plan.blocks, plan.dtype
    words = here["values"][...].reshape(blocks.tiles, -1, plan.bits, LANES)
    scales = here["scales"][...].astype(jnp.float32)[..., None]  # [groups, outputs, 1]
    zeros = here["zeros"][...].astype(jnp.float32)[..., None] if plan.zeros else 0 * scales
    array = MosaicArray(values=words, scales=scales[..., 0], bits=plan.bits)
    values = integers(array).T.astype(jnp.float32)
    x = here["x"][...].astype(jnp.float32)
    is_first = lax.broadcasted_iota(jnp.int32, (blocks.outputs, 1), 0) % 16 < 8
    offset, factor = (jnp.where(is_first, *pair) for pair in (form.offsets, form.factors))
    added = jnp.concatenate(totals)
    for group in range(plan.groups):
        inputs = slice(group * plan.group, (group + 1) * plan.group)
        if blocks.scale_first:
            scaled = (values[:, inputs] - zeros[group]).astype(dtype) * scales[group].astype(dtype)
            added += jnp.dot(scaled.astype(jnp.float32), x[:, inputs].T)
            continue
        product = jnp.dot((values[:, inputs] + offset) * factor, x[:, inputs].T)
        if "sums" in here:
            product -= (zeros[group] + offset) * factor * here["sums"][...][group]
        added += product * scales[group]
    return tuple(jnp.split(added, blocks.tiles))
