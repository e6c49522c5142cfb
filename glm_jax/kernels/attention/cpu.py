"""Attention of few queries over a key/value cache on CPU: a C++ kernel (`jax.ffi`).

XLA on CPU copies the cache for each reader of what was just written to it, and multiplies
single queries on one thread. The kernel reads the visible part of the cache once, on all
threads, as it is stored.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from glm_jax.kernels import cpu_library

LIBRARY = "libglm_jax_attention.so"
_TARGET = "glm_jax_attention"
_MOST_QUERIES = 8  # above it scores are products of matrices, which XLA is good at
_LANES = 16
_DTYPES = ("float32", "bfloat16", "int8")


def is_available() -> bool:
    """Whether the kernel was built; warns once where not."""
    path = Path(__file__).with_name(LIBRARY)
    return cpu_library.register(path, "GlmJaxAttention", _TARGET)


def takes(query: Array, key: Array, visible: Array) -> bool:
    """Whether the kernel is for these: few queries, one range each, whole vectors of a
    stored dtype, on a device that is not one of a mesh."""
    return (
        query.shape[1] <= _MOST_QUERIES
        and query.shape[1] < key.shape[2]  # without a cache there may be a gradient
        and visible.dtype != bool
        and visible.shape[-1] == 2
        and query.shape[3] % _LANES == 0
        and str(key.dtype) in _DTYPES
        and jax.sharding.get_abstract_mesh().size <= 1
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
