"""Attention over pages on TPUs by JAX's own Mosaic kernel."""

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as library
from jaxtyping import Array, Float, Int32, Shaped

_LANES = 128
_BLOCK = 512  # keys that the kernel takes at once


def is_available(query: Array, keys: Array) -> bool:
    """Whether the kernel takes these dtypes and sizes: float keys, heads of whole lanes."""
    return (
        query.dtype == jnp.bfloat16  # the kernel rounds float32 to it for its products
        and keys.dtype == query.dtype
        and keys.shape[3] % _LANES == 0
        and keys.shape[2] % 16 == 0
    )


def paged_attention(
    query: Float[Array, "batch heads head_dim"],
    keys: Shaped[Array, "heads pages page_size head_dim"],
    values: Shaped[Array, "heads pages page_size head_dim"],
    tables: Int32[Array, "batch table_size"],
    lengths: Int32[Array, " batch"],
    key_scales: None = None,
    value_scales: None = None,
) -> Float[Array, "batch heads head_dim"]:
    """As of `api.paged_attention`, on one device."""
    head_dim, table_size = query.shape[-1], tables.shape[1]
    count = min(table_size, max(1, _BLOCK // keys.shape[2]))
    while table_size % count:
        count -= 1
    attended: Array = library(
        # The kernel does not scale.
        query * jnp.asarray(head_dim**-0.5, query.dtype),
        keys,
        values,
        # A row without keys would leave its results unwritten.
        jnp.maximum(lengths, 1),
        tables,
        pages_per_compute_block=count,
    )
    return jnp.where((lengths > 0)[:, None, None], attended, 0).astype(query.dtype)
