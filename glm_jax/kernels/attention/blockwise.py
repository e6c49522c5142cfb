"""Attention block by block in plain XLA: no array of queries x keys beyond one block.

Blocks of keys that no row of a block of queries sees are not read at all. Forward as
"FlashAttention-2" (arXiv:2307.08691, algorithm 1), a running softmax over blocks of keys;
backward as its algorithm 2, from the saved logarithms of the softmax's sums.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from glm_jax.kernels.attention.arguments import Arguments, padded, saved
from glm_jax.kernels.attention.dropout import WeightDropout, factors
from glm_jax.kernels.attention.reference import ranges_to_mask
from glm_jax.kernels.dispatch import unmet
from glm_jax.numerics import einsum

LOWEST = -1e30  # of a row that has seen nothing; finite, so that differences are numbers


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """Takes ranges and a softmax in float32.

    Attributes:
      query_block, key_block: sizes of a block; that of queries is smaller where they are fewer.
    """

    query_block: int = 256
    key_block: int = 256
    name: str = "blockwise"
    platform: None = None

    def supports(self, arguments: Arguments) -> str | None:
        return unmet(
            (arguments.has_ranges, "ranges of keys, no mask"),
            (arguments.softmax_dtype == "float32", "a softmax in float32"),
        )

    def __call__(self, arguments: Arguments) -> Array:
        queries = min(self.query_block, arguments.query.shape[1])
        return _attention(arguments, queries, self.key_block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attention(arguments: Arguments, query_block: int, key_block: int) -> Array:
    return _forward(arguments, query_block, key_block)[0]


def _forward(arguments: Arguments, query_block: int, key_block: int) -> tuple[Array, Any]:
    query, key_ranges, dropout = arguments.query, arguments.visible, arguments.dropout
    batch, num_queries, heads, head_dim = query.shape
    scaled = query * jnp.asarray(head_dim**-0.5, query.dtype)
    keys = (padded(arguments.key, 2, key_block), padded(arguments.value, 2, key_block))

    def of_queries(block: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        rows, ranges, numbers = block
        first, last = _bounds(ranges, key_block, keys[0].shape[2])

        def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            largest, total, summed = carry
            k, v = (_slice(a, i, key_block) for a in keys)
            scores = _scores(rows, k, ranges, i * key_block)
            new, total, weights, shrink = add_to_softmax(largest, total, scores)
            weights = weights * _dropout_factors(dropout, weights.shape, numbers[0], i * key_block)
            part = einsum("bhqk,bhkd->bhqd", weights.astype(rows.dtype), v.astype(rows.dtype))
            return new, total, summed * shrink[..., None] + part

        rows_shape = (batch, heads, rows.shape[1])
        start = (
            jnp.full(rows_shape, LOWEST),
            jnp.zeros(rows_shape),
            jnp.zeros((*rows_shape, head_dim)),
        )
        largest, total, summed = jax.lax.fori_loop(first, last, step, start)
        total = jnp.where(total == 0, 1, total)
        return (summed / total[..., None]).astype(query.dtype), largest + jnp.log(total)

    by_query = (scaled, key_ranges, jnp.arange(num_queries)[None])
    outputs, log_sums = _map(of_queries, by_query, query_block)
    output = jnp.moveaxis(_join(outputs, 2)[:, :, :num_queries], 1, 2)
    output, log_sums = saved(output, _join(log_sums, 2)[:, :, :num_queries])
    return output, (arguments, output, log_sums)


def _backward(
    query_block: int, key_block: int, residuals: Any, gradient: Array
) -> tuple[Arguments]:
    arguments, output, log_sums = residuals
    query, key, value = arguments.query, arguments.key, arguments.value
    key_ranges, dropout = arguments.visible, arguments.dropout
    factor = query.shape[-1] ** -0.5
    scaled = query * jnp.asarray(factor, query.dtype)
    wide = gradient.astype(jnp.float32)
    shift = jnp.sum(wide * output.astype(jnp.float32), axis=-1)
    numbers = jnp.arange(query.shape[1])[None]
    by_query = (scaled, key_ranges, gradient, jnp.moveaxis(log_sums, 1, 2), shift, numbers)
    padded_queries = tuple(padded(a, 1, query_block) for a in by_query)
    keys, values = padded(key, 2, key_block), padded(value, 2, key_block)

    def weights_of(rows: tuple[Array, ...], k: Array, v: Array, offset: Array) -> Any:
        q, ranges, g, log_sum, delta, numbers = rows
        scores = _scores(q, k, ranges, offset)
        log_sum, delta = (jnp.moveaxis(a, 1, 2)[..., None] for a in (log_sum, delta))
        weights = jnp.where(scores == LOWEST, 0, jnp.exp(scores - log_sum))
        drop = _dropout_factors(dropout, weights.shape, numbers[0], offset)
        of_scores = weights * (einsum("bqhd,bhkd->bhqk", g, v) * drop - delta)
        return (weights * drop).astype(q.dtype), of_scores.astype(q.dtype)

    def of_queries(rows: tuple[Array, ...]) -> Array:
        first, last = _bounds(rows[1], key_block, keys.shape[2])

        def step(i: Array, total: Array) -> Array:
            k, v = _slice(keys, i, key_block), _slice(values, i, key_block)
            _, of_scores = weights_of(rows, k, v, i * key_block)
            return total + einsum("bhqk,bhkd->bqhd", of_scores, k)

        return jax.lax.fori_loop(first, last, step, jnp.zeros(rows[0].shape))

    def of_keys(index: Array) -> tuple[Array, Array]:
        k, v = _slice(keys, index, key_block), _slice(values, index, key_block)

        def step(i: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
            rows = tuple(
                jax.lax.dynamic_slice_in_dim(a, i * query_block, query_block, 1)
                for a in padded_queries
            )
            weights, of_scores = weights_of(rows, k, v, index * key_block)
            return (
                totals[0] + einsum("bhqk,bqhd->bhkd", of_scores, rows[0]),
                totals[1] + einsum("bhqk,bqhd->bhkd", weights, rows[2]),
            )

        count = padded_queries[0].shape[1] // query_block
        return jax.lax.fori_loop(0, count, step, (jnp.zeros(k.shape), jnp.zeros(k.shape)))

    of_query = _join(_map(of_queries, by_query, query_block), 1)[:, : query.shape[1]] * factor
    of_key, of_value = jax.lax.map(of_keys, jnp.arange(keys.shape[2] // key_block))
    trim = lambda a: _join(a, 2)[:, :, : key.shape[2]]
    return (
        jax.tree.map(lambda _: None, arguments).replace(
            query=of_query.astype(query.dtype),
            key=trim(of_key).astype(key.dtype),
            value=trim(of_value).astype(value.dtype),
        ),
    )


_attention.defvjp(_forward, _backward)


def add_to_softmax(largest: Array, total: Array, scores: Array) -> tuple[Array, ...]:
    """Add a block of keys to a running softmax.

    Args:
      largest, total: of each row, the largest score and the sum of weights so far.
      scores: [..., key] of the block; `LOWEST` where the row does not see the key.

    Returns:
      The new `largest` and `total`, the block's weights, and what earlier ones are multiplied by.
    """
    new = jnp.maximum(largest, jnp.max(scores, axis=-1))
    weights = jnp.where(scores == LOWEST, 0, jnp.exp(scores - new[..., None]))
    shrink = jnp.exp(largest - new)
    return new, total * shrink + jnp.sum(weights, axis=-1), weights, shrink


def _scores(query: Array, key: Array, ranges: Array, offset: Array) -> Array:
    """float32 [batch, heads, query, key]; the lowest where the row does not see the key."""
    scores = einsum("bqhd,bhkd->bhqk", query, key.astype(query.dtype))
    visible = ranges_to_mask(ranges - offset, key.shape[2])
    return jnp.where(visible[:, None], scores, LOWEST)


def _dropout_factors(
    dropout: WeightDropout | None, shape: tuple[int, ...], rows: Array, first_key: Array
) -> Array | float:
    """Return what dropout multiplies a block's weights [batch, heads, query, key] by."""
    batch, heads, _, keys = shape
    if dropout is None:
        return 1.0
    return factors(dropout, batch, heads, rows, first_key + jnp.arange(keys))


def _bounds(ranges: Array, key_block: int, num_keys: int) -> tuple[Array, Array]:
    """First and last (exclusive) block of keys that any row sees."""
    starts, ends = ranges[..., 0::2], ranges[..., 1::2]
    seen = starts < ends
    first = jnp.min(jnp.where(seen, starts, num_keys)) // key_block
    last = -(-jnp.max(jnp.where(seen, ends, 0)) // key_block)
    return jnp.maximum(first, 0), jnp.minimum(last, num_keys // key_block)


def _slice(x: Array, index: Array, block: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, 2)


def _map(function: Any, arrays: tuple[Array, ...], block: int) -> Any:
    """Apply `function` to blocks of axis 1; results are stacked."""

    def split(x: Array) -> Array:
        blocks = padded(x, 1, block).reshape(len(x), -1, block, *x.shape[2:])
        return jnp.moveaxis(blocks, 1, 0)

    if arrays[0].shape[1] <= block:
        whole = function(tuple(padded(a, 1, block) for a in arrays))
        return jax.tree.map(lambda a: a[None], whole)
    return jax.lax.map(function, jax.tree.map(split, arrays))


def _join(blocks: Array, axis: int) -> Array:
    """Stacked blocks [count, ..] as one array, joined along `axis` of a block."""
    moved = jnp.moveaxis(blocks, 0, axis)
    return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])
