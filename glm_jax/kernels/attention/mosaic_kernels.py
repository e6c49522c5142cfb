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
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from glm_jax.kernels.attention.arguments import Arguments, saved
from glm_jax.kernels.attention.mosaic_tiles import (
    COLUMN,
    ROWS,
    TILE,
    WARPGROUPS,
    Static,
    Tile,
    add_product,
    along,
    call,
    product,
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
    pad_keys = lambda x: _pad(x, 1, math.lcm(TILE, static.key_block))
    inputs = _Triple(_pad(a.query, 1, TILE), pad_keys(key), pad_keys(value))
    lines = None if lines is None else _pad(lines, 2, TILE)
    return _attention(inputs, _pad(a.visible, 1, TILE), lines, static)[:, :queries]


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
    shape = (ROWS, block)

    def kernel(q_ref: Any, k_ref: Any, v_ref: Any, bounds_ref: Any, *refs: Any) -> None:
        *row_refs, out_ref, sums_ref, (tiles, all_sums), barrier = refs
        at = Tile.of(bounds_ref)
        tile, own_sums = tiles.at[at.warpgroup], all_sums.at[at.warpgroup]

        def compute(pipeline: Any) -> None:
            at.copy_in(barrier, (q_ref, tile))
            of_rows = [at.load(ref) for ref in row_refs]
            start = (zeros((ROWS, head_dim)), zeros((ROWS,)) + _LOWEST, zeros((ROWS,)))
            summed, largest, total, _ = pipeline((*start, of_rows))
            total = jnp.where(total == 0, 1.0, total)
            tile[...] = (summed / along(total, summed.shape, 0)).astype(query.dtype)
            own_sums[...] = largest + jnp.log2(total)
            at.copy_out((tile, out_ref), (own_sums, sums_ref))

        def step(index: Any, keys: Any, values: Any, carry: Any) -> Any:
            summed, largest, total, of_rows = carry
            scores = product(tile, keys.transpose((1, 0)), shape) * scale
            scores = at.hide(scores, of_rows, index, 0)
            new = jnp.maximum(largest, scores.max(axis=1))
            weights = jnp.exp2(scores - along(new, shape, 0))
            shrink = jnp.exp2(largest - new)
            total = total * shrink + weights.sum(axis=1)
            weights = weights * at.drop(static.dropout, of_rows, shape, index, 0)
            summed = summed * along(shrink, summed.shape, 0)
            summed = add_product(summed, weights.astype(query.dtype), values, static)
            return summed, new, total, of_rows

        at.pipeline(step, compute, [(k_ref, block), (v_ref, block)])

    out, sums = call(
        kernel,
        [query, jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)],
        [tiles_like(query), plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)],
        (batch, heads, queries // TILE),
        static,
    )(*inputs, visited_blocks(ranges, inputs.key.shape[1], TILE, block), *_of_rows(ranges, lines))
    out, sums = saved(out, sums)
    return out, (inputs, ranges, lines, out, sums)


def _backward(static: Static, residuals: Any, gradient: Array) -> tuple[Any, ...]:
    inputs, ranges, lines, out, sums = residuals
    wide = gradient.astype(jnp.float32) * out.astype(jnp.float32)
    shifts = jnp.moveaxis(jnp.sum(wide, axis=-1), 1, 2)  # [batch, heads, query]
    of_rows = (sums, shifts, *_of_rows(ranges, lines))
    of_query = _backward_of_query(inputs, gradient, ranges, of_rows, static)
    of_key, of_value = _backward_of_keys(inputs, gradient, ranges, of_rows, static)
    return _Triple(of_query, of_key, of_value), None, None


def _backward_of_query(
    inputs: _Triple, gradient: Array, ranges: Array, of_rows: tuple[Array, ...], static: Static
) -> Array:
    query = inputs.query
    batch, queries, heads, head_dim = query.shape
    factor, block, shape = head_dim**-0.5, ROWS, (ROWS, ROWS)

    def kernel(q_ref: Any, k_ref: Any, v_ref: Any, g_ref: Any, bounds_ref: Any, *refs: Any) -> None:
        *row_refs, of_query_ref, (tiles, gradients), barrier = refs
        at = Tile.of(bounds_ref)
        tile, own_gradient = tiles.at[at.warpgroup], gradients.at[at.warpgroup]

        def compute(pipeline: Any) -> None:
            at.copy_in(barrier, (q_ref, tile), (g_ref, own_gradient))
            of_rows = [at.load(ref) for ref in row_refs]
            summed, _ = pipeline((zeros((ROWS, head_dim)), of_rows))
            tile[...] = (summed * factor).astype(query.dtype)
            at.copy_out((tile, of_query_ref))

        def step(index: Any, keys: Any, values: Any, carry: Any) -> Any:
            summed, (sums, shifts, *of_rows) = carry
            scores = product(tile, keys.transpose((1, 0)), shape) * (factor * _LOG2_E)
            scores = at.hide(scores, of_rows, index, 0)
            weights = jnp.exp2(scores - along(sums, shape, 0))
            of_weights = product(own_gradient, values.transpose((1, 0)), shape)
            of_weights = of_weights * at.drop(static.dropout, of_rows, shape, index, 0)
            of_scores = weights * (of_weights - along(shifts, shape, 0))
            summed = add_product(summed, of_scores.astype(query.dtype), keys, static)
            return summed, [sums, shifts, *of_rows]

        at.pipeline(step, compute, [(k_ref, block), (v_ref, block)])

    [of_query] = call(
        kernel,
        [query],
        [tiles_like(query), tiles_like(query)],
        (batch, heads, queries // TILE),
        static,
    )(*inputs, gradient, visited_blocks(ranges, inputs.key.shape[1], TILE, block), *of_rows)
    return of_query


def _backward_of_keys(
    inputs: _Triple, gradient: Array, ranges: Array, of_rows: tuple[Array, ...], static: Static
) -> tuple[Array, Array]:
    key = inputs.key
    batch, keys, heads, head_dim = key.shape
    factor, block, shape = head_dim**-0.5, ROWS, (ROWS, ROWS)

    def kernel(q_ref: Any, k_ref: Any, v_ref: Any, g_ref: Any, bounds_ref: Any, *refs: Any) -> None:
        *row_refs, of_key_ref, of_value_ref, (tiles, values), barrier = refs
        at = Tile.of(bounds_ref)
        tile, own_values = tiles.at[at.warpgroup], values.at[at.warpgroup]

        def compute(pipeline: Any) -> None:
            at.copy_in(barrier, (k_ref, tile), (v_ref, own_values))
            of_key, of_value = pipeline((zeros((ROWS, head_dim)), zeros((ROWS, head_dim))))
            tile[...] = (of_key * factor).astype(key.dtype)
            own_values[...] = of_value.astype(key.dtype)
            at.copy_out((tile, of_key_ref), (own_values, of_value_ref))

        def step(index: Any, queries: Any, gradients: Any, *rest: Any) -> Any:
            *row_blocks, (of_key, of_value) = rest
            sums, shifts, *of_rows = (plgpu.load(ref, layout=COLUMN) for ref in row_blocks)
            scores = product(tile, queries.transpose((1, 0)), shape) * (factor * _LOG2_E)
            scores = at.hide(scores, of_rows, index, 1)
            weights = jnp.exp2(scores - along(sums, shape, 1))
            drop = at.drop(static.dropout, of_rows, shape, index, 1)
            of_value = add_product(of_value, (weights * drop).astype(key.dtype), gradients, static)
            of_weights = product(own_values, gradients.transpose((1, 0)), shape) * drop
            of_scores = weights * (of_weights - along(shifts, shape, 1))
            return add_product(of_key, of_scores.astype(key.dtype), queries, static), of_value

        at.pipeline(step, compute, [(ref, block) for ref in (q_ref, g_ref, *row_refs)])

    bounds = visited_blocks(ranges, keys, block, TILE, by_keys=True)
    of_key, of_value = call(
        kernel, [key, key], [tiles_like(key), tiles_like(key)], (batch, heads, keys // TILE), static
    )(*inputs, gradient, bounds, *of_rows)
    return of_key, of_value


_attention.defvjp(_forward, _backward)


def _of_rows(ranges: Array, lines: Array | None) -> tuple[Array, ...]:
    return (ranges[..., 0], ranges[..., 1], *(() if lines is None else (lines,)))


def _pad(x: Array, axis: int, size: int) -> Array:
    """Zeros at the end of an axis, to whole tiles."""
    return jnp.pad(x, [(0, -n % size if i == axis else 0) for i, n in enumerate(x.shape)])
