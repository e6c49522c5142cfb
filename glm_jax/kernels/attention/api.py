"""Chooses how attention is computed."""

from jaxtyping import Array, Bool, Float, Int32

from glm_jax.kernels.attention import reference


def attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch heads key head_dim"],
    value: Float[Array, "batch heads key head_dim"],
    visible: Int32[Array, "batch query 4"] | Bool[Array, "batch query key"],
    softmax_dtype: str = "float32",
) -> Float[Array, "batch query heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim)) value over the keys that each row may see.

    Args:
      visible: per row, [start, end) of the context it sees and [start, end) of its own
        piece, as key indices; or a mask, true where the row may see the key.
      softmax_dtype: dtype of the scores and their softmax.

    Returns:
      [batch, query, heads, head_dim] in the query's dtype.
    """
    is_mask = visible.dtype == bool
    mask = visible if is_mask else reference.ranges_to_mask(visible, key.shape[2])
    return reference.masked_attention(query, key, value, mask, softmax_dtype)
