"""The kernel for compute capability 9.0 (Pallas, Mosaic GPU).

Outputs lie along M of the matrix instruction, 64 at least, and rows along its N, 8 at least, so
that few rows cost little. One warpgroup copies tiles of weights, activations and scales into
shared memory, several steps ahead; the others turn integers into floats in registers, which are
the instruction's operand, and multiply. Programs, one a multiprocessor, share all (tile, step)
pairs evenly, whatever the shape; a tile that several worked on comes back in parts, which are
added in one order.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import backend
from jaxtyping import Array, Float

from glm_jax.kernels.quantized_matmul import mosaic_registers
from glm_jax.kernels.quantized_matmul.arguments import Problem
from glm_jax.kernels.quantized_matmul.mosaic_blocks import (
    COPYING_REGISTERS,
    Blocks,
    aligned_rows,
    choose,
)
from glm_jax.kernels.quantized_matmul.mosaic_layout import LANES, TILE, MosaicArray
from glm_jax.kernels.quantized_matmul.mosaic_plan import Plan, scales_of

_untyped: Any = plgpu  # what its annotations get wrong


def matmul(
    x: Float[Array, "rows inputs"],
    weight: MosaicArray,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "rows outputs"]:
    """x [rows, K], float16 or bfloat16, times weight [K, N], accumulated in float32.

    Args:
      weight: one that `supports` has no reason against.
      blocks: sizes that divide the weight's; by default `choose` finds them for the device that
        is compiled for.
      interpret: runs the kernel's program step by step on any device, for tests.

    Returns:
      float32 [rows, N].
    """
    if blocks is None:
        blocks = choose(Problem.of(x, weight), backend.get_default_device().core_count)
    plan = Plan.of(x, weight, blocks, interpret)
    return plan.add_parts(_call(plan.pad(x), weight, plan)).T[: len(x)]


def _call(x: Array, weight: MosaicArray, plan: Plan) -> Array:
    """Parts of the product, [parts, N, rows]; tiles that have fewer leave the rest unwritten."""
    blocks, stages = plan.blocks, plan.blocks.stages
    operands = {"x": x, "values": weight.values, **scales_by_tile(weight)}
    of_values = (stages, blocks.output_tiles, blocks.inputs // TILE, weight.bits, LANES)
    of_scales = (stages, plan.groups, blocks.output_tiles, TILE)
    scratch = {name: plgpu.SMEM(of_scales, a.dtype) for name, a in scales_of(weight).items()}
    scratch["x"] = swizzled((stages, blocks.rows, blocks.inputs), x.dtype, plan)
    scratch["values"] = plgpu.SMEM(of_values, jnp.int32)
    if plan.sums:
        operands["sums"] = _aligned(plan.sums_of(x), blocks.rows)
        of_sums = (stages, plan.groups, aligned_rows(blocks.rows))
        scratch["sums"] = plgpu.SMEM(of_sums, jnp.float32)
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan=plan, names=tuple(operands)),
        out_type=jax.ShapeDtypeStruct(
            (max(plan.division.parts()), weight.shape[1], len(x)), jnp.float32
        ),
        scratch_types={
            "shared": scratch,
            "full": plgpu.Barrier(num_arrivals=len(operands), num_barriers=stages),
            "empty": plgpu.Barrier(num_arrivals=blocks.consumers, num_barriers=stages),
        },
        grid=(plan.division.programs,),
        grid_names=("program",),
        num_threads=blocks.consumers + 1,
        thread_name="warpgroup",
        kernel_name=f"quantized_matmul_int{weight.bits}",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if plan.interpret else None,
    )
    parts: Array = kernel(*operands.values())
    return parts


def _aligned(sums: Array, rows: int) -> Array:
    """Put zeros behind each block's rows of sums [groups, rows]; see `aligned_rows`."""
    by_block = sums.reshape(len(sums), -1, rows)
    padding = aligned_rows(rows) - rows
    return jnp.pad(by_block, ((0, 0), (0, 0), (0, padding))).reshape(len(sums), -1)


def scales_by_tile(weight: MosaicArray) -> dict[str, Float[Array, "groups tiles 64"]]:
    """`scales_of` a weight, those of each tile's outputs apart."""
    return {name: a.reshape(len(a), -1, TILE) for name, a in scales_of(weight).items()}


def swizzled(shape: tuple[int, ...], dtype: Any, plan: Plan) -> Any:
    """Shared memory for an operand of wgmma, [..., rows, inputs], of which 128 bytes of a row, or
    64, are swizzled."""
    columns = min(plan.chunk, TILE)
    transforms = _untyped.TilingTransform((8, columns)), _untyped.SwizzleTransform(2 * columns)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _kernel(
    *refs: Any, plan: Plan, names: tuple[str, ...], shared: dict[str, Any], full: Any, empty: Any
) -> None:
    blocks, division = plan.blocks, plan.division
    *operands, out = refs
    memory = dict(zip(names, operands, strict=True))
    warpgroup = lax.axis_index("warpgroup")
    first = lax.axis_index("program") * division.share
    stop = jnp.minimum(first + division.share, division.total)

    @pl.when(warpgroup == blocks.consumers)
    def copy() -> None:
        if not plan.interpret:
            plgpu.set_max_registers(COPYING_REGISTERS, action="decrease")
        _copy(memory, shared, full, empty, first, stop, plan)

    @pl.when(warpgroup < blocks.consumers)
    def multiply() -> None:
        if not plan.interpret:
            plgpu.set_max_registers(blocks.registers, action="increase")

        def one(tile: Array, _: None) -> None:
            outputs, rows = plan.position(tile)
            start = tile * division.steps
            steps = (jnp.maximum(start, first), jnp.minimum(start + division.steps, stop))
            totals = _multiply(shared, full, empty, first, steps, warpgroup, plan)
            part = lax.axis_index("program") - lax.div(start, division.share)
            for index, total in enumerate(totals):
                output = (outputs + warpgroup * blocks.tiles + index) * TILE
                rows_here = pl.ds(rows * blocks.rows, blocks.rows)
                out[part, pl.ds(output, TILE), rows_here] = total

        tiles = lax.div(first, division.steps), lax.div(stop - 1, division.steps) + 1
        lax.fori_loop(*tiles, one, None)


def _copy(
    memory: dict[str, Any],
    shared: dict[str, Any],
    full: Any,
    empty: Any,
    first: Array,
    stop: Array,
    plan: Plan,
) -> None:
    """Copy the operands of each of a program's steps into shared memory.

    Args:
      memory, shared: the operands in global memory and, by stage, in shared memory.
      full, empty: barriers of stages: all operands are there; all warpgroups have read them.
      first, stop: the program's steps, numbered over all tiles.
    """
    blocks = plan.blocks

    def wait(index: Array, _: None = None) -> None:
        plgpu.barrier_wait(empty.at[lax.rem(index, blocks.stages)])

    def one(index: Array, _: None) -> None:
        stage = lax.rem(index, blocks.stages)
        pl.when(index >= blocks.stages)(lambda: wait(index))
        of_tile = plan.division.steps
        tile, step = lax.div(first + index, of_tile), lax.rem(first + index, of_tile)
        output, row = plan.position(tile)
        outputs, rows = pl.ds(output, blocks.output_tiles), pl.ds(row * blocks.rows, blocks.rows)
        tiles, aligned = blocks.inputs // TILE, aligned_rows(blocks.rows)
        groups = pl.ds(lax.div(step * blocks.inputs, plan.group_size), plan.groups)
        slices = {
            "x": (rows, pl.ds(step * blocks.inputs, blocks.inputs)),
            "values": (outputs, pl.ds(step * tiles, tiles)),
            "scales": (groups, outputs),
            "zeros": (groups, outputs),
            "sums": (pl.ds(step * plan.groups, plan.groups), pl.ds(row * aligned, aligned)),
        }
        for name, ref in memory.items():
            source = ref.at[slices[name]]
            plgpu.copy_gmem_to_smem(source, shared[name].at[stage], full.at[stage])

    count = stop - first
    lax.fori_loop(0, count, one, None)
    lax.fori_loop(jnp.maximum(count - blocks.stages, 0), count, wait, None)


def _multiply(
    shared: dict[str, Any],
    full: Any,
    empty: Any,
    first: Array,
    steps: tuple[Array, Array],
    warpgroup: Array,
    plan: Plan,
) -> tuple[Array, ...]:
    """Products of a warpgroup's tiles over some steps, each [64, rows]; arguments as `_copy`'s."""
    blocks = plan.blocks

    def one(step: Array, totals: Any, accumulators: Any = None) -> Any:
        stage = lax.rem(step - first, blocks.stages)
        plgpu.barrier_wait(full.at[stage])
        here = Step({name: ref.at[stage] for name, ref in shared.items()}, warpgroup, plan)
        if blocks.scale_first:
            totals = here.accumulate(accumulators or totals)
        else:
            totals = here.add_to(totals)
        plgpu.barrier_arrive(empty.at[stage])
        return totals

    shape = (TILE, blocks.rows)
    if blocks.scale_first and not plan.interpret:

        def scoped(*accumulators: Any) -> tuple[Array, ...]:
            loop = functools.partial(one, accumulators=accumulators)
            lax.fori_loop(*steps, loop, None)
            return tuple(accumulator[...] for accumulator in accumulators)

        kinds = [plgpu.WGMMAAccumulatorRef(shape, jnp.float32)] * blocks.tiles
        totals: tuple[Array, ...] = pl.run_scoped(scoped, *kinds)
        return totals
    zero = jnp.zeros(shape, jnp.float32)
    if not plan.interpret:
        zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
    totals = lax.fori_loop(*steps, one, (zero,) * blocks.tiles)
    return tuple(total / plan.factors(total) for total in totals)


@dataclasses.dataclass(frozen=True)
class Step:
    """A warpgroup's part in a step.

    Attributes:
      refs: the step's operands in shared memory, by name.
      warpgroup: index; its tiles of 64 outputs follow each other.
    """

    refs: dict[str, Any]
    warpgroup: Array | int
    plan: Plan

    def add_to(self, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        """Totals [64, rows] of tiles with the step's products, scaled group by group."""
        plan, added = self.plan, list(totals)
        pairs = [(g, t) for g in range(plan.groups) for t in range(plan.blocks.tiles)]
        for (group, tile), part in zip(pairs, self._products(pairs), strict=True):
            if plan.sums:
                of_rows = self.refs["sums"].at[group, pl.ds(0, plan.blocks.rows)]
                sums = self._broadcast(of_rows, 0, part)
                part = part - self._excess(group, tile, part) * sums
            added[tile] += part * self._of_outputs("scales", group, tile, part)
        return tuple(added)

    def accumulate(self, accumulators: tuple[Any, ...]) -> tuple[Array, ...] | None:
        """Multiplies the step's scaled weights into accumulators, one for each tile."""
        plan, operand, totals = self.plan, self._operands(), list(accumulators)
        for chunk in range(plan.blocks.inputs // plan.chunk):
            for tile in range(plan.blocks.tiles):
                values, x = operand(tile, chunk)
                values = self.scaled(values, chunk * plan.chunk // plan.group, tile)
                if plan.interpret:
                    totals[tile] += _dot(values, x)
                else:
                    plgpu.wgmma(accumulators[tile], values, x.T)
                    plgpu.wgmma_wait(1)
        if plan.interpret:
            return tuple(totals)
        plgpu.wgmma_wait(0)
        return None

    def scaled(self, values: Array, group: int, tile: int) -> Array:
        """Weights [64, chunk] of one group, less their zero points, times their scales."""
        if self.plan.zeros:
            values = values - self._of_outputs("zeros", group, tile, values)
        return values * self._of_outputs("scales", group, tile, values)

    def _excess(self, group: int, tile: int, like: Array) -> Array | float:
        """How much larger weights are, as they are multiplied, than what they stand for."""
        plan = self.plan
        offset, _ = plan.form
        if plan.zeros:
            return plan.factors(like) * (offset + self._of_outputs("zeros", group, tile, like))
        return plan.factors(like) * offset

    def _products(self, pairs: list[tuple[int, int]]) -> list[Array]:
        """Products of groups and tiles, [64, rows] each. One is multiplied while the next
        converts."""
        plan, operand = self.plan, self._operands()
        chunks = plan.group // plan.chunk
        if plan.interpret:
            of_group = lambda group: range(group * chunks, (group + 1) * chunks)
            sums = [[_dot(*operand(i, c)) for c in of_group(group)] for group, i in pairs]
            return [functools.reduce(jnp.add, chunks_of_group) for chunks_of_group in sums]

        def scoped(*accumulators: Any) -> list[Array]:
            done = []
            for number, (group, tile) in enumerate(pairs):
                for chunk in range(chunks):
                    values, x = operand(tile, group * chunks + chunk)
                    plgpu.wgmma(accumulators[number], values, x.T)
                if number:
                    before = accumulators[number - 1]
                    done.append(plgpu.wgmma_accumulator_load(before, wait_n=chunks))
            done.append(plgpu.wgmma_accumulator_load(accumulators[-1], wait_n=0))
            return done

        kind = plgpu.WGMMAAccumulatorRef((TILE, plan.blocks.rows), jnp.float32)
        products: list[Array] = pl.run_scoped(scoped, *[kind] * len(pairs))
        return products

    def _operands(self) -> Any:
        """Return a function of (tile, chunk) to weights [64, chunk] and shared x [rows, chunk]."""
        plan, loaded = self.plan, dict[tuple[int, int], list[Array]]()
        tiles = max(1, plan.chunk // TILE)
        load = mosaic_registers.emulate if plan.interpret else mosaic_registers.load

        def operand(tile: int, chunk: int) -> tuple[Array, Any]:
            first, part = divmod(chunk * plan.chunk, tiles * TILE)
            if (tile, first) not in loaded:
                values = self.refs["values"].at[self._output(tile), pl.ds(first * tiles, tiles)]
                loaded[tile, first] = load(values, plan.bits, plan.dtype, plan.chunk, plan.raw)
            x = self.refs["x"].at[:, pl.ds(chunk * plan.chunk, plan.chunk)]
            return loaded[tile, first][part // plan.chunk], x

        return operand

    def _output(self, tile: int) -> Array | int:
        """Return the index of one of the warpgroup's tiles among the program's."""
        return self.warpgroup * self.plan.blocks.tiles + tile

    def _of_outputs(self, name: str, group: int, tile: int, like: Array) -> Array:
        """Return a group's scales or zero points of a tile's 64 outputs, in the shape of `like`."""
        return self._broadcast(self.refs[name].at[group, self._output(tile)], 1, like)

    def _broadcast(self, ref: Any, axis: int, like: Array) -> Array:
        """Return a vector of shared memory, broadcast along the `axis` that it lacks."""
        if self.plan.interpret:
            vector = ref[...]
        else:
            vector = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(axis), optimized=False)
        return lax.broadcast_in_dim(vector.astype(like.dtype), like.shape, (1 - axis,))


def _dot(values: Array, x: Any) -> Array:
    """Return what wgmma adds, in the interpreter, which has no operand in registers."""
    return jnp.dot(values, x[...].T, preferred_element_type=jnp.float32)
