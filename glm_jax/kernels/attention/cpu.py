"""Attention on CPU: C++ kernels (`jax.ffi`).

`attention` is for few queries over a key/value cache, `paged_attention` for one over pages.
XLA on CPU copies the cache for each reader of what was just written to it, and multiplies
single queries on one thread; the kernels read the visible part of the cache once, on all
threads, as it is stored.

`blocks` is for many queries, with a gradient: training and prefill in float32.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from glm_jax.kernels import cpu_library
from glm_jax.kernels.attention.dropout import WeightDropout
from glm_jax.sharding import surrounding_mesh

LIBRARY = "libglm_jax_attention"
_TARGET, _PAGED = "glm_jax_attention", "glm_jax_paged_attention"
_MOST_QUERIES = 8  # above it scores are products of matrices, which XLA is good at
_LANES = 16
_DTYPES = ("float32", "bfloat16", "int8")


_FORWARD, _BACKWARD = "glm_jax_attention_forward", "glm_jax_attention_backward"


def is_available() -> bool:
    """Whether the kernels were built; warns once where not."""
    path = Path(__file__).with_name(LIBRARY)
    return (
        cpu_library.register(path, "GlmJaxAttention", _TARGET)
        and cpu_library.register(path, "GlmJaxPagedAttention", _PAGED)
        and cpu_library.register(path, "GlmJaxAttentionForward", _FORWARD)
        and cpu_library.register(path, "GlmJaxAttentionBackward", _BACKWARD)
    )


def takes(query: Array, key: Array, visible: Array) -> bool:
    """Whether `attention` is for these: few queries, one range each, whole vectors of a
    stored dtype, on a device that is not one of a mesh."""
    return (
        query.shape[1] <= _MOST_QUERIES
        and query.shape[1] < key.shape[2]  # without a cache there may be a gradient
        and visible.dtype != bool
        and visible.shape[-1] == 2
        and query.shape[3] % _LANES == 0
        and str(key.dtype) in _DTYPES
        and surrounding_mesh() is None
        and is_available()
    )


def attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Array,
    value: Array,
    key_ranges: Int32[Array, "batch query 2"],
    key_scales: Float[Array, "batch heads key"] | None,
    value_scales: Float[Array, "batch heads key"] | None,
    widest: int = cpu_library.WIDEST,
) -> Float[Array, "batch query heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim)) value over each row's range of keys, in float32.

    Args:
      key, value: [batch, heads, key, head_dim], float32, bfloat16, or int8 with scales.
      key_ranges: [start, end) a row.
      widest: bits of the widest vectors to use (512, 256 or less), for tests.

    Returns:
      [batch, query, heads, head_dim] in the query's dtype; zeros for rows that see nothing.
    """
    none = jnp.zeros((0,), jnp.float32)
    attended: Array = jax.ffi.ffi_call(
        _TARGET, jax.ShapeDtypeStruct(query.shape, jnp.float32), vmap_method="sequential"
    )(
        query.astype(jnp.float32),
        key,
        value,
        key_ranges.astype(jnp.int32),
        none if key_scales is None else key_scales,
        none if value_scales is None else value_scales,
        widest=np.int64(widest),
    )
    return attended.astype(query.dtype)


def takes_pages(query: Array, keys: Array) -> bool:
    """Whether `paged_attention` is for these: whole vectors of a stored dtype, on a device
    that is not one of a mesh."""
    return (
        query.shape[-1] % _LANES == 0
        and str(keys.dtype) in _DTYPES
        and surrounding_mesh() is None
        and is_available()
    )


def paged_attention(
    query: Float[Array, "batch heads head_dim"],
    keys: Array,
    values: Array,
    tables: Int32[Array, "batch table_size"],
    lengths: Int32[Array, " batch"],
    key_scales: Float[Array, "heads pages page_size"] | None = None,
    value_scales: Float[Array, "heads pages page_size"] | None = None,
    widest: int = cpu_library.WIDEST,
) -> Float[Array, "batch heads head_dim"]:
    """`attention` over the first `lengths` keys of each row, in the pages of its table.

    Args:
      keys, values: [heads, pages, page_size, head_dim], float32, bfloat16, or int8 with scales.
      tables: pages of each row in order.

    Returns:
      [batch, heads, head_dim] in the query's dtype; zeros for rows of length 0.
    """
    none = jnp.zeros((0,), jnp.float32)
    attended: Array = jax.ffi.ffi_call(
        _PAGED, jax.ShapeDtypeStruct(query.shape, jnp.float32), vmap_method="sequential"
    )(
        query.astype(jnp.float32),
        keys,
        values,
        tables,
        lengths,
        none if key_scales is None else key_scales,
        none if value_scales is None else value_scales,
        widest=np.int64(widest),
    )
    return attended.astype(query.dtype)


def blocks_take(query: Array, key: Array, visible: Array) -> bool:
    """Whether `blocks` is for these: ranges, whole vectors, float32, and no mesh."""
    return (
        visible.dtype != bool
        and query.shape[3] % _LANES == 0
        and query.dtype == key.dtype == jnp.float32
        and surrounding_mesh() is None
        and is_available()
    )


def blocks(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch heads key head_dim"],
    value: Float[Array, "batch heads key head_dim"],
    key_ranges: Int32[Array, "batch query bounds"],
    dropout: WeightDropout | None = None,
    widest: int = cpu_library.WIDEST,
) -> Float[Array, "batch query heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim)) value, block by block; all float32.

    Args:
      key_ranges: [start, end) of one or two ranges a row.
      dropout: of the weights.
      widest: see `attention`.

    Returns:
      [batch, query, heads, head_dim]; zeros for rows that see nothing.
    """
    # As projections give them: the transpose that made them [heads, key] falls away.
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    return _blocks(query, key, value, key_ranges, dropout, widest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blocks(
    query: Array,
    key: Array,
    value: Array,
    key_ranges: Array,
    dropout: WeightDropout | None,
    widest: int,
) -> Array:
    return _blocks_forward(query, key, value, key_ranges, dropout, widest)[0]


def _blocks_forward(
    query: Array,
    key: Array,
    value: Array,
    key_ranges: Array,
    dropout: WeightDropout | None,
    widest: int,
) -> tuple[Array, Any]:
    batch, queries, heads, _ = query.shape
    results = (
        jax.ShapeDtypeStruct(query.shape, jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    )
    call = jax.ffi.ffi_call(_FORWARD, results, vmap_method="sequential")
    dropping = dropout or WeightDropout(jnp.uint32(0), 0.0)
    inputs = (query, key, value, key_ranges, dropping.seed)
    out, log_sums = call(*inputs, **_attributes(dropping, widest))
    return out, (*inputs[:4], dropping, out, log_sums)


def _attributes(dropout: WeightDropout, widest: int) -> dict[str, Any]:
    return {
        "most_kept": np.int64(dropout.most),
        "kept_factor": np.float32(1 / (1 - dropout.rate)),
        "widest": np.int64(widest),
    }


def _blocks_backward(widest: int, kept: Any, gradient: Array) -> tuple[Any, ...]:
    *inputs, dropout, out, log_sums = kept
    results = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in inputs[:3]]
    call = jax.ffi.ffi_call(_BACKWARD, results, vmap_method="sequential")
    of_inputs = call(*inputs, dropout.seed, out, log_sums, gradient, **_attributes(dropout, widest))
    return (*of_inputs, None, None)


_blocks.defvjp(_blocks_forward, _blocks_backward)
