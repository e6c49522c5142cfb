"""Attention as the formula says it, with every score in memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from glm_jax.kernels.attention.arguments import Arguments
from glm_jax.kernels.attention.dropout import WeightDropout, factors
from glm_jax.kernels.dispatch import PlainFormula
from glm_jax.numerics import einsum


class Reference(PlainFormula):
    """Takes everything, and keeps all scores in memory."""

    def __call__(self, arguments: Arguments) -> Array:
        a, dtype = arguments, arguments.query.dtype
        mask = ranges_to_mask(a.visible, a.key.shape[2]) if a.has_ranges else a.visible
        key, value = a.key.astype(dtype), a.value.astype(dtype)
        return masked_attention(a.query, key, value, mask, a.softmax_dtype, a.dropout)


def ranges_to_mask(
    key_ranges: Int32[Array, "batch query bounds"], num_keys: int
) -> Bool[Array, "batch query key"]:
    """Return True where the query row may see the key column.

    Args:
      key_ranges: [start, end) of one or two ranges a row.
      num_keys: columns of the result.
    """
    key = jnp.arange(num_keys, dtype=jnp.int32)
    starts, ends = key_ranges[..., None, 0::2], key_ranges[..., None, 1::2]
    return jnp.any((key[:, None] >= starts) & (key[:, None] < ends), axis=-1)


def masked_attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch heads key head_dim"],
    value: Float[Array, "batch heads key head_dim"],
    mask: Bool[Array, "batch query key"],
    softmax_dtype: str,
    dropout: WeightDropout | None = None,
) -> Float[Array, "batch query heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim)) value over the visible keys.

    The query is scaled before the product and scores are float32, so that float16 does
    not overflow (what the original's per-layer query scaling is for). A row that sees
    nothing gets zeros.
    """
    scale = jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    scores = einsum("bqhd,bhkd->bhqk", query * scale, key).astype(softmax_dtype)
    visible = mask[:, None]
    scores = jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
    scores = scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    if dropout is not None:
        batch, heads, queries, keys = weights.shape
        drop = factors(dropout, batch, heads, jnp.arange(queries), jnp.arange(keys))
        weights = weights * drop.astype(weights.dtype)
    attended = einsum("bhqk,bhkd->bqhd", weights.astype(value.dtype), value)
    return attended.astype(query.dtype)
