"""Attention over pages on NVIDIA GPUs by JAX's own Triton kernel.

JAX calls the kernel deprecated and will remove it: where it is gone, plain XLA takes over.
"""

import functools
import importlib
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from glm_jax.kernels import target

_HEAD_DIMS = (64, 128)
_BLOCK = 128  # keys that a program takes at once
_MOST_SPLITS = 8  # programs that share a row's keys


def is_available(query: Array, keys: Array, tables: Array) -> bool:
    """Whether the kernel takes this GPU, these dtypes and sizes."""
    page_size, head_dim = keys.shape[2:]
    return (
        query.dtype in (jnp.float16, jnp.bfloat16)
        and keys.dtype in (query.dtype, jnp.int8)
        and head_dim in _HEAD_DIMS
        and page_size >= 16
        and page_size & (page_size - 1) == 0
        and tables.shape[1] & (tables.shape[1] - 1) == 0
        and target.compute_capability() >= target.TRITON_CAPABILITY
        and _library() is not None
    )


@functools.cache
def _library() -> Any:
    try:
        return importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")
    except ImportError:
        return None


def paged_attention(
    query: Float[Array, "batch heads head_dim"],
    keys: Shaped[Array, "heads pages page_size head_dim"],
    values: Shaped[Array, "heads pages page_size head_dim"],
    tables: Int32[Array, "batch table_size"],
    lengths: Int32[Array, " batch"],
    key_scales: Float[Array, "heads pages page_size"] | None = None,
    value_scales: Float[Array, "heads pages page_size"] | None = None,
) -> Float[Array, "batch heads head_dim"]:
    """As of `api.paged_attention`, on one device, for tables of a power of two of pages."""
    head_dim = query.shape[-1]
    page_size, table_size = keys.shape[2], tables.shape[1]
    splits = math.gcd(_MOST_SPLITS, table_size)
    attended: Array = _library().paged_attention(
        # The kernel does not scale.
        query * jnp.asarray(head_dim**-0.5, query.dtype),
        keys,
        values,
        tables,
        lengths,
        key_scales,
        value_scales,
        pages_per_compute_block=max(1, min(table_size // splits, _BLOCK // page_size)),
        k_splits=splits,
    )
    # A row without keys has a sum of nothing over nothing.
    return jnp.where((lengths > 0)[:, None, None], attended, 0).astype(query.dtype)
