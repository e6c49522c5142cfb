"""Attention over pages on GPUs of compute capability 9.0 (Pallas, Mosaic GPU).

A program takes one head of one row and a part of the row's pages. It copies pages by TMA, by their
numbers in the row's table, some ahead of what it multiplies; all of the row's new queries are rows
of one operand of wgmma, 64 wide, so that several cost what one does. int8 is converted in registers
on its way to shared memory, and its scales multiply scores and weights. Parts of a row are combined
afterwards, in one order. No GPU has run it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import backend
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array

from glm_jax.kernels import ptx
from glm_jax.kernels.paged_attention.arguments import Arguments
from glm_jax.kernels.paged_attention.mosaic import HEAD_DIM, PAGE, QUERIES

_WRITTEN = 8  # of which results are written at once: rows of a tile in shared memory
_PROGRAMS = 2  # on a multiprocessor at once
_STAGES = 3  # pages in a program's shared memory, so that there is room for two programs
_ROUNDS = 3  # of these, at least, or the last would leave many multiprocessors idle
_untyped: Any = plgpu  # what its annotations get wrong
_UNSEEN = -1e30  # a score, finite so that differences are numbers


def attention(arguments: Arguments, interpret: bool = False, parts: int | None = None) -> Array:
    """Compute `api.paged_attention` for arguments that `MosaicGPU` takes.

    Args:
      parts: of each row's pages, for different programs; by default so many that they fill the
        device that is compiled for, a few times.
    """
    a = arguments
    (batch, new, heads, _), table_size = a.query.shape, a.tables.shape[1]
    if parts is None:
        device = backend.get_default_device()
        programs = _ROUNDS * _PROGRAMS * getattr(device, "core_count", 1)
        parts = min(table_size, -(-programs // (batch * heads)))
    written = -(-new // _WRITTEN) * _WRITTEN
    # Powers of two are the hardware's own.
    factor = jnp.asarray(HEAD_DIM**-0.5 * math.log2(math.e), a.query.dtype)
    query = jnp.swapaxes(a.query * factor, 1, 2)
    query = jnp.pad(query, ((0, 0), (0, 0), (0, written - new), (0, 0)))
    lengths = jnp.pad(a.lengths, ((0, 0), (0, QUERIES - new)))
    partial, sums = _call(a, query, lengths, parts, interpret)
    sums = jnp.where((a.lengths > 0)[:, None, None], sums[..., :new], _UNSEEN)
    # Of a part without keys there is no sum, and what stands for its result was not written.
    largest = jnp.max(sums, axis=2, keepdims=True)
    weights = jnp.where(sums <= _UNSEEN, 0, jnp.exp2(sums - largest))
    attended = jnp.where(weights[..., None] > 0, partial[..., :new, :].astype(jnp.float32), 0)
    total = jnp.sum(weights, axis=2)
    attended = jnp.sum(attended * weights[..., None], axis=2)
    attended = attended / jnp.where(total == 0, 1, total)[..., None]
    return jnp.swapaxes(attended, 1, 2).astype(a.query.dtype)


def _call(
    a: Arguments, query: Array, lengths: Array, parts: int, interpret: bool
) -> tuple[Array, Array]:
    """Results [batch, heads, parts, written, head_dim] of parts of each row's pages, and for each
    query the logarithm (base 2) of its weights' sum, [batch, heads, parts, 64]."""
    (batch, heads, written, head_dim), dtype = query.shape, query.dtype
    is_int8 = a.key_scales is not None
    swizzled: Any = (_untyped.TilingTransform((8, 64)), _untyped.SwizzleTransform(128))
    of_floats = lambda *shape: plgpu.SMEM(shape, dtype, transforms=swizzled)
    page = (_STAGES, PAGE, head_dim)
    shared: dict[str, Any] = {"query": of_floats(QUERIES, head_dim)}
    operands = {"keys": a.keys, "values": a.values}
    if is_int8:
        operands |= {"key_scales": a.key_scales, "value_scales": a.value_scales}
        integers: Any = (_untyped.TilingTransform((8, head_dim)), _untyped.SwizzleTransform(128))
        of_page = plgpu.SMEM(page, jnp.int8, transforms=integers)
        shared |= dict.fromkeys(("keys", "values"), of_page)
        shared |= {name: plgpu.SMEM(page[:2], jnp.float32) for name in list(operands)[2:]}
        shared |= {name: of_floats(PAGE, head_dim) for name in ("float_keys", "float_values")}
    else:
        shared |= {name: of_floats(*page) for name in operands}
    run = plgpu.kernel(
        functools.partial(_kernel, names=tuple(operands), parts=parts, interpret=interpret),
        out_type=[
            jax.ShapeDtypeStruct((batch, heads, parts, written, head_dim), dtype),
            jax.ShapeDtypeStruct((batch, heads, parts, QUERIES), jnp.float32),
        ],
        scratch_types={
            "shared": shared,
            "full": plgpu.Barrier(num_arrivals=len(operands), num_barriers=_STAGES),
            "arrived": plgpu.Barrier(num_arrivals=1),
        },
        # Threads reduce by shuffles: without scratch, two programs have room.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        grid=(batch, heads, parts),
        grid_names=("batch", "heads", "part"),
        kernel_name="paged_attention",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    bounds = jnp.min(a.lengths, 1, where=a.lengths > 0, initial=2**30), jnp.max(a.lengths, 1)
    partial, sums = run(query, a.tables, lengths, jnp.stack(bounds, 1), *operands.values())
    return partial, sums


def _kernel(
    query_ref: Any,
    tables_ref: Any,
    lengths_ref: Any,
    bounds_ref: Any,
    *refs: Any,
    names: tuple[str, ...],
    parts: int,
    interpret: bool,
    shared: dict[str, Any],
    full: Any,
    arrived: Any,
) -> None:
    *operands, out_ref, sums_ref = refs
    memory = dict(zip(names, operands, strict=True))
    row, head, part = map(lax.axis_index, ("batch", "heads", "part"))
    row_layout, column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    written = query_ref.shape[2]
    pages = lax.div(bounds_ref[row, 1] + (PAGE - 1), PAGE)
    share = lax.div(pages + (parts - 1), parts)
    first = part * share
    count = jnp.clip(pages - first, 0, share)
    dtype, shape = query_ref.dtype, (QUERIES, PAGE)

    def cast(x: Array, layout: Any) -> Array:
        return x if interpret else plgpu.layout_cast(x, layout)

    def fetch(index: Any, stage: Any) -> None:
        page = tables_ref[row, first + index]
        for name, ref in memory.items():
            plgpu.copy_gmem_to_smem(ref.at[head, page], shared[name].at[stage], full.at[stage])

    def load(ref: Any, layout: Any) -> Array:
        return plgpu.load(ref, layout=layout, optimized=False)

    def hide(scores: Array, first_key: Any) -> Array:
        """Scores, `_UNSEEN` where the query does not see the key."""

        def hidden() -> Array:
            keys = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
            ends = lax.broadcast_in_dim(lengths, shape, [0])
            return jnp.where(keys + first_key < ends, scores, _UNSEEN)

        return lax.cond(first_key + PAGE <= bounds_ref[row, 0], lambda: scores, hidden)

    def floats(name: str, stage: Any) -> Any:
        """Return a page in shared memory, as wgmma takes it."""
        if len(names) == 2:
            return shared[name].at[stage]
        buffer = shared[f"float_{name}"]
        buffer[...] = _convert(shared[name].at[stage], dtype, interpret)
        return buffer

    def step(index: Any, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        largest, total, summed, stage = carry
        plgpu.barrier_wait(full.at[stage])
        keys, values = floats("keys", stage), floats("values", stage)
        if len(names) > 2:
            plgpu.commit_smem()
        scores = _product(shared["query"], keys.transpose((1, 0)), shape)
        if len(names) > 2:
            scales = load(shared["key_scales"].at[stage], column)
            scores = scores * lax.broadcast_in_dim(scales, shape, [1])
        scores = hide(scores, (first + index) * PAGE)
        new = jnp.maximum(largest, jnp.max(scores, axis=1))
        # Not of what a query has seen nothing of: its weights are 0.
        base = jnp.maximum(new, _UNSEEN / 2)
        weights = jnp.exp2(scores - lax.broadcast_in_dim(base, shape, [0]))
        shrink = jnp.exp2(largest - new)
        total = total * shrink + jnp.sum(weights, axis=1)
        if len(names) > 2:
            scales = load(shared["value_scales"].at[stage], column)
            weights = weights * lax.broadcast_in_dim(scales, shape, [1])
        summed = summed * lax.broadcast_in_dim(shrink, summed.shape, [0])
        summed = _add_product(summed, weights.astype(dtype), values, interpret)
        pl.when(index + _STAGES < count)(lambda: fetch(index + _STAGES, stage))
        # Counted, for a remainder of 3 takes a multiplication and more.
        return new, total, summed, jnp.where(stage == _STAGES - 1, 0, stage + 1)

    lengths = load(lengths_ref.at[row], row_layout)
    start = (
        cast(jnp.full((QUERIES,), _UNSEEN, jnp.float32), row_layout),
        cast(jnp.zeros((QUERIES,), jnp.float32), row_layout),
        cast(jnp.zeros((QUERIES, HEAD_DIM), jnp.float32), plgpu.Layout.WGMMA),
    )

    @pl.when(count > 0)
    def attend() -> None:
        # Rows of the operand behind the queries are anything: no row touches another.
        here = shared["query"].at[pl.ds(0, written)]
        plgpu.copy_gmem_to_smem(query_ref.at[row, head], here, arrived)
        lax.fori_loop(0, jnp.minimum(count, _STAGES), lambda index, _: fetch(index, index), None)
        plgpu.barrier_wait(arrived)
        largest, total, summed, _ = lax.fori_loop(0, count, step, (*start, jnp.int32(0)))
        divisor = lax.broadcast_in_dim(jnp.where(total == 0.0, 1.0, total), summed.shape, [0])
        shared["query"][...] = (summed / divisor).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(here, out_ref.at[row, head, part])
        sums = jnp.where(
            total == 0.0, _UNSEEN, largest + jnp.log2(jnp.where(total == 0.0, 1.0, total))
        )
        sums_ref[row, head, part] = sums
        plgpu.wait_smem_to_gmem(0)

    @pl.when(count <= 0)
    def nothing() -> None:
        sums_ref[row, head, part] = start[0]


def _product(left: Any, right: Any, shape: tuple[int, ...]) -> Array:
    def compute(sums: Any) -> Array:
        plgpu.wgmma(sums, left, right)
        return sums[...]

    product: Array = pl.run_scoped(compute, _untyped.ACC(shape, jnp.float32))
    return product


def _add_product(total: Array, left: Array, right: Any, interpret: bool) -> Array:
    if interpret:  # which has no wgmma of registers, nor sums that start from something
        return total + jnp.dot(left, right[...], preferred_element_type=jnp.float32)
    added: Array = pl.run_state(lambda sums: plgpu.wgmma(sums, left, right))(
        _untyped.ACC.init(total)
    )
    return added


# Bytes, their signs inverted, beside the high byte of 1024; less 1152.
_BYTES = (
    "{ .reg .b32 base, word; mov.b32 base, 0x64806480; xor.b32 word, $2, 0x80808080; "
    "prmt.b32 $0, word, 0x64646464, 0x4140; prmt.b32 $1, word, 0x64646464, 0x4342; "
    "sub.rn.f16x2 $0, $0, base; sub.rn.f16x2 $1, $1, base; }"
)


def _convert(ref: Any, dtype: Any, interpret: bool) -> Array:
    """Return a page of int8 in shared memory as floats in registers, two values an instruction."""
    if interpret:
        return ref[...].astype(dtype)
    layout = plgpu.Layout.WGMMA_UPCAST_2X
    loaded = plgpu.load(ref, layout=layout)
    if dtype == jnp.bfloat16:
        return loaded.astype(dtype)  # the compiler's own is as fast

    @plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(ref.shape, dtype, layout=layout),
    )
    def convert(_: Any, integers: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        words = ir.VectorType.get((2,), i32)
        floats = ir.VectorType.get((4,), ir.F16Type.get())
        registers = np.empty_like(integers.registers)
        for place, register in np.ndenumerate(integers.registers):
            both = llvm.mlir_undef(words)
            halves = ptx.asm("rr", _BYTES, [llvm.bitcast(i32, register)], "r")
            for index, half in enumerate(halves):
                both = llvm.insertelement(both, half, ptx.i32(index))
            registers[place] = llvm.bitcast(floats, both)
        return mgpu.FragmentedArray(_registers=registers, _layout=integers.layout, _is_signed=None)

    converted: Array = convert(loaded)
    return converted
