"""Attention over pages as the formula says it: the pages of each row put in order first."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from glm_jax.kernels.attention.reference import masked_attention


def paged_attention(
    query: Float[Array, "batch heads head_dim"],
    keys: Shaped[Array, "heads pages page_size head_dim"],
    values: Shaped[Array, "heads pages page_size head_dim"],
    tables: Int32[Array, "batch table_size"],
    lengths: Int32[Array, " batch"],
    key_scales: Float[Array, "heads pages page_size"] | None = None,
    value_scales: Float[Array, "heads pages page_size"] | None = None,
    softmax_dtype: str = "float32",
) -> Float[Array, "batch heads head_dim"]:
    """As of `api.paged_attention`, on one device and with every score in memory."""

    def gather(pages: Array, scales: Array | None) -> Array:
        wide = pages.astype(jnp.float32)
        wide = wide if scales is None else wide * scales[..., None]
        rows = jnp.moveaxis(wide[:, tables], 0, 1)
        return rows.reshape(*rows.shape[:2], -1, rows.shape[-1]).astype(query.dtype)

    key, value = gather(keys, key_scales), gather(values, value_scales)
    mask = jnp.arange(key.shape[2]) < lengths[:, None]
    return masked_attention(query[:, None], key, value, mask[:, None], softmax_dtype)[:, 0]
