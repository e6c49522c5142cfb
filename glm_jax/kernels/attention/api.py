"""Chooses how attention is computed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from glm_jax.kernels.attention import blockwise, cpu, library, reference
from glm_jax.kernels.attention.dropout import WeightDropout

# Keys up to which all scores at once are no more than a block.
_FEW_KEYS = 128
_QUERY_BLOCK, _KEY_BLOCK = 256, 256
# On accelerators a product of one row becomes a sum, for which XLA transposes all values.
_LEAST_ROWS = 8


def attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Array,
    value: Array,
    visible: Int32[Array, "batch query bounds"] | Bool[Array, "batch query key"],
    softmax_dtype: str = "float32",
    key_scales: Float[Array, "batch heads key"] | None = None,
    value_scales: Float[Array, "batch heads key"] | None = None,
    dropout: WeightDropout | None = None,
) -> Float[Array, "batch query heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim)) value over the keys that each row may see.

    Rows with ranges go block by block: no array of queries x keys, and keys that no row
    sees are not read; on one CPU device by kernels of our own. A mask, which is such an
    array itself, and a softmax in less than float32 take the formula as it stands.

    Args:
      key, value: [batch, heads, key, head_dim], float, or int8 with scales.
      visible: per row, [start, end) of one or two ranges of keys; or a mask, true where
        the row may see the key.
      softmax_dtype: dtype of the scores and their softmax.
      dropout: of the softmax's weights, in training.

    Returns:
      [batch, query, heads, head_dim] in the query's dtype.
    """
    scales = (key_scales, value_scales)
    elsewhere = functools.partial(_attention, softmax_dtype=softmax_dtype)
    if softmax_dtype != "float32":
        return elsewhere(query, key, value, visible, *scales, dropout)
    attended: Array
    if dropout is None and cpu.takes(query, key, visible):
        attended = jax.lax.platform_dependent(
            query,
            key,
            value,
            visible,
            *scales,
            cpu=cpu.attention,
            default=functools.partial(elsewhere, dropout=None),
        )
    elif key_scales is None and cpu.blocks_take(query, key, visible):
        attended = jax.lax.platform_dependent(
            query,
            key,
            value,
            visible,
            dropout,
            cpu=cpu.blocks,
            default=lambda q, k, v, ranges, drop: elsewhere(q, k, v, ranges, *scales, drop),
        )
    else:
        attended = elsewhere(query, key, value, visible, *scales, dropout)
    return attended


def isolated_attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch heads key head_dim"],
    value: Float[Array, "batch heads key head_dim"],
    key_ranges: Int32[Array, "batch query 2"],
    softmax_dtype: str = "float32",
) -> Float[Array, "batch query heads head_dim"]:
    """`attention` for sequences of different requests in one row: a value that is NaN or infinite
    reaches the queries that see it, and no other. Backends multiply the values of a whole block,
    and NaN times the weight 0 of a masked key is NaN.
    """
    is_finite = jnp.all(jnp.isfinite(value), axis=-1)  # [batch, heads, key]
    attended = attention(
        query, key, jnp.where(is_finite[..., None], value, 0), key_ranges, softmax_dtype
    )
    counts = jnp.pad(jnp.cumsum(~is_finite, axis=-1), ((0, 0), (0, 0), (1, 0)))
    start, end = (jnp.take_along_axis(counts, key_ranges[:, None, :, i], axis=-1) for i in (0, 1))
    sees_it = jnp.swapaxes(end > start, 1, 2)[..., None]
    return jnp.where(sees_it, jnp.asarray(jnp.nan, attended.dtype), attended)


def _attention(
    query: Array,
    key: Array,
    value: Array,
    visible: Array,
    key_scales: Array | None,
    value_scales: Array | None,
    dropout: WeightDropout | None,
    softmax_dtype: str,
) -> Array:
    num_keys, is_mask = key.shape[2], visible.dtype == bool
    if is_mask or softmax_dtype != "float32" or num_keys <= _FEW_KEYS:
        if key_scales is not None and value_scales is not None:
            key = (key * key_scales[..., None]).astype(query.dtype)
            value = (value * value_scales[..., None]).astype(query.dtype)
        mask = visible if is_mask else reference.ranges_to_mask(visible, num_keys)
        return reference.masked_attention(
            query, key.astype(query.dtype), value.astype(query.dtype), mask, softmax_dtype, dropout
        )

    def in_blocks(query: Array, key: Array, value: Array, ranges: Array, rows: int) -> Array:
        block = min(_QUERY_BLOCK, max(query.shape[1], rows))
        return blockwise.attention(
            query, key, value, ranges, key_scales, value_scales, dropout, block, _KEY_BLOCK
        )

    alone = functools.partial(in_blocks, rows=1)
    backends: dict[str, Any] = {
        "cpu": alone,
        "default": functools.partial(in_blocks, rows=_LEAST_ROWS),
    }
    # The library has no dropout.
    if key_scales is None and dropout is None and library.is_available(query, visible):
        key, value = key.astype(query.dtype), value.astype(query.dtype)
        backends["cuda"] = library.attention
    attended: Array = jax.lax.platform_dependent(query, key, value, visible, **backends)
    return attended
