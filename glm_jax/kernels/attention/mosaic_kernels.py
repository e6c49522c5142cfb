"""The kernels of mosaic.py.

Three kernels, forward as "FlashAttention-2" (arXiv:2307.08691), algorithm 1, and backward as its
algorithm 2 in two: of queries, and of keys and values. In each a warpgroup copies blocks to
shared memory (TMA) ahead of two that multiply them (wgmma). A tile visits only the blocks
between the first and the last that it shares a visible key with, and compares numbers of keys
with ranges only in blocks that are not visible as a whole. Dropout's factors come from the
hash of dropout.py, in registers, so that they are those of every other backend.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from glm_jax.kernels.attention.arguments import Arguments, padded, saved
from glm_jax.kernels.attention.mosaic_tiles import (
    COLUMN,
    ROWS,
    TILE,
    WARPGROUPS,
    Products,
    Static,
    Tile,
    along,
    call,
    tiles_like,
    visited_blocks,
    zeros,
)

_LOWEST = -1e30  # of a row that has seen nothing; finite, so that differences are numbers
_LOG2_E = math.log2(math.e)


def on_one_device(static: Static, arguments: Arguments, lines: Array | None) -> Array:
    a, queries = arguments, arguments.query.shape[1]
    # As projections give them: the transpose that made them [heads, key] falls away.
    key, value = (jnp.swapaxes(x, 1, 2) for x in (a.key, a.value))
    pad_keys = lambda x: padded(x, 1, math.lcm(TILE, static.key_block))
    inputs = _Triple(padded(a.query, 1, TILE), pad_keys(key), pad_keys(value))
    lines = None if lines is None else padded(lines, 2, TILE)
    return _attention(inputs, padded(a.visible, 1, TILE), lines, static)[:, :queries]


class _Triple(NamedTuple):
    """Each [batch, length, heads, head_dim], lengths whole tiles."""

    query: Array
    key: Array
    value: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(inputs: _Triple, ranges: Array, lines: Array | None, static: Static) -> Array:
    return _forward(inputs, ranges, lines, static)[0]


def _forward(
    inputs: _Triple, ranges: Array, lines: Array | None, static: Static
) -> tuple[Array, Any]:
    query = inputs.query
    batch, queries, heads, head_dim = query.shape
    scale, block = head_dim**-0.5 * _LOG2_E, static.key_block
    shape, products = (ROWS, block), Products(static.interpret)

    def kernel(
        q_ref: Any, k_ref: Any, v_ref: Any, bounds_ref: Any, rows_ref: Any, *refs: Any
    ) -> None:
        out_ref, sums_ref, (tiles, all_sums), barrier, turn = refs
        at = Tile.of(bounds_ref, last_first=True)
        tile, own_sums = tiles.at[at.warpgroup], all_sums.at[at.warpgroup]

        def take_turns() -> None:
            # While one warpgroup multiplies, the other computes weights.
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def compute(pipeline: Any) -> None:
            at.copy_in(barrier, (q_ref, tile))
            start = (zeros((ROWS, head_dim)), zeros((ROWS,)) + _LOWEST, zeros((ROWS,)))
            pl.when(at.warpgroup == 1)(take_turns)
            summed, largest, total, _ = pipeline((*start, at.load(rows_ref)))
            pl.when(at.warpgroup == 0)(take_turns)
            total = jnp.where(total == 0, 1.0, total)
            factor = along(static.scale / total, summed.shape, 0)
            tile[...] = (summed * factor).astype(query.dtype)
            own_sums[...] = largest + jnp.log2(total)
            at.copy_out((tile, out_ref), (own_sums, sums_ref))

        def step(index: Any, keys: Any, values: Any, *rest: Any) -> Any:
            keys_read, values_read, (summed, largest, total, numbers) = rest
            starts, ends, *lines = numbers

            def multiply(sums: Any) -> Array:
                sums = products.start(sums, tile, keys)
                take_turns()
                return products.finish(sums)

            scores = products.scoped(multiply, shape, 1)
            plgpu.barrier_arrive(keys_read)
            scores = at.hide(scores, lambda: starts, lambda: ends, index, 0)
            new = jnp.maximum(largest, scores.max(axis=1) * scale)
            weights = jnp.exp2(scores * scale - along(new, shape, 0))
            shrink = jnp.exp2(largest - new)
            total = total * shrink + weights.sum(axis=1)
            if static.dropout is not None:
                is_kept = at.are_kept(static, lines[0], shape, index, 0)
                # The barrier has it done before two weights share a register.
                weights = lax.optimization_barrier(jnp.where(is_kept, weights, 0.0))
            weights = weights.astype(query.dtype)
            summed = summed * along(shrink, summed.shape, 0)
            carry = summed, new, total, weights
            summed, new, total, weights = lax.optimization_barrier(carry)
            take_turns()
            summed = products.added(summed, weights, values)
            plgpu.barrier_arrive(values_read)
            return summed, new, total, numbers

        operands = [at.blocks(k_ref, block), at.blocks(v_ref, block)]
        at.pipeline(step, compute, operands, stages=2)

    out, sums = call(
        kernel,
        [query, jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)],
        [tiles_like(query), plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)],
        [plgpu.Barrier(num_arrivals=WARPGROUPS)],
        (batch, heads, queries // TILE),
        static,
    )(
        *inputs,
        visited_blocks(ranges, inputs.key.shape[1], TILE, block),
        _of_rows(ranges, lines, heads),
    )
    out, sums = saved(out, sums)
    return out, (inputs, ranges, lines, out, sums)


def _backward(static: Static, residuals: Any, gradient: Array) -> tuple[Any, ...]:
    inputs, ranges, lines, out, sums = residuals
    wide = gradient.astype(jnp.float32) * out.astype(jnp.float32)
    shifts = jnp.moveaxis(jnp.sum(wide, axis=-1), 1, 2)  # [batch, heads, query]
    floats = lax.bitcast_convert_type(jnp.stack([sums, shifts], 2), jnp.int32)
    of_rows = jnp.concatenate([floats, _of_rows(ranges, lines, sums.shape[1])], 2)
    of_query = _backward_of_query(inputs, gradient, ranges, of_rows, static)
    of_key, of_value = _backward_of_keys(inputs, gradient, ranges, of_rows, static)
    return _Triple(of_query, of_key, of_value), None, None


def _backward_of_query(
    inputs: _Triple, gradient: Array, ranges: Array, of_rows: Array, static: Static
) -> Array:
    query = inputs.query
    batch, queries, heads, head_dim = query.shape
    factor, block, shape = head_dim**-0.5, ROWS, (ROWS, ROWS)
    products = Products(static.interpret)

    def kernel(q_ref: Any, k_ref: Any, v_ref: Any, g_ref: Any, bounds_ref: Any, *refs: Any) -> None:
        rows_ref, of_query_ref, (tiles, gradients), barrier = refs
        at = Tile.of(bounds_ref, last_first=True)
        tile, own_gradient = tiles.at[at.warpgroup], gradients.at[at.warpgroup]

        def compute(pipeline: Any) -> None:
            at.copy_in(barrier, (q_ref, tile), (g_ref, own_gradient))
            sums, shifts, *integers = at.load(rows_ref)
            numbers = _float(sums), _float(shifts), *integers
            run = lambda sums: pipeline((sums, numbers))[0]
            [summed] = products.accumulate(run, (ROWS, head_dim), 1)
            tile[...] = (summed * factor).astype(query.dtype)
            at.copy_out((tile, of_query_ref))

        def step(index: Any, keys: Any, values: Any, *rest: Any) -> Any:
            keys_read, values_read, ([summed], numbers) = rest
            sums, shifts, starts, ends, *lines = numbers

            def multiply(scores: Any, of_weights: Any) -> Array:
                scores = products.start(scores, tile, keys)
                of_weights = products.start(of_weights, own_gradient, values)
                scores = products.finish(scores, running=1)
                scores = at.hide(scores, lambda: starts, lambda: ends, index, 0)
                weights = jnp.exp2(scores * (factor * _LOG2_E) - along(sums, shape, 0))
                of_weights = products.finish(of_weights)
                plgpu.barrier_arrive(values_read)
                if static.dropout is not None:
                    is_kept = at.are_kept(static, lines[0], shape, index, 0)
                    of_weights = jnp.where(is_kept, of_weights * static.scale, 0.0)
                return weights * (of_weights - along(shifts, shape, 0))

            of_scores = products.scoped(multiply, shape, 2)
            summed = products.add(summed, of_scores.astype(query.dtype), keys)
            products.wait()
            plgpu.barrier_arrive(keys_read)
            return (summed,), numbers

        operands = [at.blocks(k_ref, block), at.blocks(v_ref, block)]
        at.pipeline(step, compute, operands, stages=4)

    [of_query] = call(
        kernel,
        [query],
        [tiles_like(query), tiles_like(query)],
        [],
        (batch, heads, queries // TILE),
        static,
    )(*inputs, gradient, visited_blocks(ranges, inputs.key.shape[1], TILE, block), of_rows)
    return of_query


def _backward_of_keys(
    inputs: _Triple, gradient: Array, ranges: Array, of_rows: Array, static: Static
) -> tuple[Array, Array]:
    key = inputs.key
    batch, keys, heads, head_dim = key.shape
    factor, block, shape = head_dim**-0.5, ROWS, (ROWS, ROWS)
    products = Products(static.interpret)

    def kernel(q_ref: Any, k_ref: Any, v_ref: Any, g_ref: Any, bounds_ref: Any, *refs: Any) -> None:
        rows_ref, of_key_ref, of_value_ref, (tiles, values), barrier = refs
        at = Tile.of(bounds_ref)
        tile, own_values = tiles.at[at.warpgroup], values.at[at.warpgroup]

        def compute(pipeline: Any) -> None:
            at.copy_in(barrier, (k_ref, tile), (v_ref, own_values))
            of_key, of_value = products.accumulate(pipeline, (ROWS, head_dim), 2)
            tile[...] = (of_key * factor).astype(key.dtype)
            own_values[...] = (of_value * static.scale).astype(key.dtype)
            at.copy_out((tile, of_key_ref), (own_values, of_value_ref))

        def step(index: Any, queries: Any, gradients: Any, *rest: Any) -> Any:
            numbers, queries_read, gradients_read, numbers_read, (of_key, of_value) = rest
            load = lambda i: plgpu.load(numbers.at[i], layout=COLUMN)

            def multiply(scores: Any, of_weights: Any) -> Array:
                nonlocal of_value
                scores = products.start(scores, tile, queries)
                of_weights = products.start(of_weights, own_values, gradients)
                scores = products.finish(scores, running=1)
                scores = at.hide(scores, lambda: load(2), lambda: load(3), index, 1)
                sums = along(_float(load(0)), shape, 1)
                weights = jnp.exp2(scores * (factor * _LOG2_E) - sums)
                if static.dropout is not None:
                    # The sign says what is dropped: that takes no registers.
                    is_kept = at.are_kept(static, load(4), shape, index, 1)
                    weights = jnp.where(is_kept, weights, -weights)
                kept = jnp.maximum(weights, 0.0) if static.dropout else weights
                of_value = products.add(of_value, kept.astype(key.dtype), gradients)
                of_weights = products.finish(of_weights, running=1)
                shifts = along(_float(load(1)), shape, 1)
                plgpu.barrier_arrive(numbers_read)
                if static.dropout is None:
                    return weights * (of_weights - shifts)
                of_weights = jnp.where(weights > 0, of_weights * static.scale, 0.0)
                return jnp.abs(weights) * (of_weights - shifts)

            of_scores = products.scoped(multiply, shape, 2)
            of_key = products.add(of_key, of_scores.astype(key.dtype), queries)
            products.wait(running=1)
            plgpu.barrier_arrive(gradients_read)
            products.wait()
            plgpu.barrier_arrive(queries_read)
            return of_key, of_value

        operands = [at.blocks(ref, block) for ref in (q_ref, g_ref)]
        operands.append(at.blocks_of_numbers(rows_ref, block))
        at.pipeline(step, compute, operands, stages=2)

    bounds = visited_blocks(ranges, keys, block, TILE, by_keys=True)
    of_key, of_value = call(
        kernel,
        [key, key],
        [tiles_like(key), tiles_like(key)],
        [],
        (batch, heads, keys // TILE),
        static,
    )(*inputs, gradient, bounds, of_rows)
    return of_key, of_value


_attention.defvjp(_forward, _backward)


def _of_rows(ranges: Array, lines: Array | None, heads: int) -> Array:
    """int32 [batch, heads, 2 or 3, query]: each query's range, and the hash of its weights."""
    numbers = [jnp.repeat(ranges[:, None, :, i], heads, axis=1) for i in (0, 1)]
    if lines is not None:
        numbers.append(lax.bitcast_convert_type(lines, jnp.int32))
    return jnp.stack(numbers, axis=2)


def _float(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.float32)
