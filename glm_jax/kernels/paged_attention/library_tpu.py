"""Attention over pages on TPUs by JAX's own Mosaic kernel."""

import dataclasses

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention as library
from jaxtyping import Array

from glm_jax.kernels.dispatch import unmet
from glm_jax.kernels.paged_attention.arguments import Arguments, with_single_queries

_LANES = 128
_BLOCK = 512  # keys that the kernel takes at once


@dataclasses.dataclass(frozen=True)
class LibraryTPU:
    """Takes bfloat16 in heads of whole lanes."""

    name: str = "library"
    platform: str = "tpu"

    def supports(self, arguments: Arguments) -> str | None:
        query, keys = arguments.query, arguments.keys
        return unmet(
            (arguments.softmax_dtype == "float32", "a softmax in float32"),
            # The kernel rounds float32 to it for its products.
            (query.dtype == keys.dtype == jnp.bfloat16, "bfloat16"),
            (keys.shape[3] % _LANES == 0, f"heads of a multiple of {_LANES} numbers"),
            (keys.shape[2] % 16 == 0, "pages of a multiple of 16 keys"),
        )

    def __call__(self, arguments: Arguments) -> Array:
        single = with_single_queries(arguments)
        query, keys, lengths = single.query, single.keys, single.lengths
        table_size = single.tables.shape[1]
        count = min(table_size, max(1, _BLOCK // keys.shape[2]))
        while table_size % count:
            count -= 1
        attended: Array = library(
            # The kernel does not scale.
            query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype),
            keys,
            single.values,
            # A row without keys would leave its results unwritten.
            jnp.maximum(lengths, 1),
            single.tables,
            pages_per_compute_block=count,
        )
        attended = jnp.where((lengths > 0)[:, None, None], attended, 0)
        return attended.reshape(arguments.query.shape).astype(query.dtype)
