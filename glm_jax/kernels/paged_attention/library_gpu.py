"""Attention over pages on NVIDIA GPUs by JAX's own Triton kernel.

JAX calls the kernel deprecated and will remove it: where it is gone, plain XLA takes over.
"""

import dataclasses
import functools
import importlib
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from glm_jax.kernels import target
from glm_jax.kernels.dispatch import unmet
from glm_jax.kernels.paged_attention.arguments import Arguments, with_single_queries

_HEAD_DIMS = (64, 128)
_BLOCK = 128  # keys that a program takes at once
_MAX_SPLITS = 8  # programs that share a row's keys


@dataclasses.dataclass(frozen=True)
class LibraryGPU:
    """Takes tables and pages whose sizes are powers of two, on GPUs that Triton compiles for."""

    name: str = "library"
    platform: str = "cuda"

    def supports(self, arguments: Arguments) -> str | None:
        query, keys = arguments.query, arguments.keys
        page_size, head_dim = keys.shape[2:]
        table_size = arguments.tables.shape[1]
        return unmet(
            (arguments.softmax_dtype == "float32", "a softmax in float32"),
            (query.dtype in (jnp.float16, jnp.bfloat16), "queries in float16 or bfloat16"),
            (keys.dtype in (query.dtype, jnp.int8), "keys in the query's dtype or int8"),
            (head_dim in _HEAD_DIMS, "heads of 64 or 128 numbers"),
            (page_size >= 16 and _is_power_of_two(page_size), "pages of a power of two from 16"),
            (_is_power_of_two(table_size), "tables of a power of two of pages"),
            target.requires_triton(),
        ) or (None if _library() is not None else "this version of JAX no longer has the kernel")

    def __call__(self, arguments: Arguments) -> Array:
        single = with_single_queries(arguments)
        query, lengths = single.query, single.lengths
        page_size, table_size = single.keys.shape[2], single.tables.shape[1]
        splits = math.gcd(_MAX_SPLITS, table_size)
        attended: Array = _library().paged_attention(
            # The kernel does not scale.
            query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype),
            single.keys,
            single.values,
            single.tables,
            lengths,
            single.key_scales,
            single.value_scales,
            pages_per_compute_block=max(1, min(table_size // splits, _BLOCK // page_size)),
            k_splits=splits,
        )
        # A row without keys has a sum of nothing over nothing.
        attended = jnp.where((lengths > 0)[:, None, None], attended, 0)
        return attended.reshape(arguments.query.shape).astype(query.dtype)


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


@functools.cache
def _library() -> Any:
    try:
        return importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")
    except ImportError:
        return None
