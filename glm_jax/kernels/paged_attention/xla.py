"""Attention over pages in plain XLA: some pages of every row at a time, a running softmax."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from glm_jax.kernels.attention.blockwise import LOWEST, add_to_softmax
from glm_jax.kernels.dispatch import unmet
from glm_jax.kernels.paged_attention.arguments import Arguments
from glm_jax.numerics import einsum

_BLOCK = 256  # keys of each row that are taken at once


@dataclasses.dataclass(frozen=True)
class XLA:
    """Takes a softmax in float32. Pages past the longest row's are not read."""

    name: str = "xla"
    platform: None = None

    def supports(self, arguments: Arguments) -> str | None:
        return unmet((arguments.softmax_dtype == "float32", "a softmax in float32"))

    def __call__(self, arguments: Arguments) -> Array:
        return _attention(arguments)


def _attention(arguments: Arguments) -> Array:
    query, keys, lengths = arguments.query, arguments.keys, arguments.lengths
    page_size, head_dim = keys.shape[2:]
    count = max(1, min(_BLOCK // page_size, arguments.tables.shape[1]))
    tables = jnp.pad(arguments.tables, ((0, 0), (0, -arguments.tables.shape[1] % count)))
    width = count * page_size
    scaled = query * jnp.asarray(head_dim**-0.5, query.dtype)

    def take(pages: Array | None, block: Array) -> Any:
        """[heads, batch, width, ..] of a block of each row's pages."""
        if pages is None:
            return None
        block_tables = jax.lax.dynamic_slice_in_dim(tables, block * count, count, 1)
        # The barrier keeps a conversion of what is taken from becoming one of all pages.
        taken = jax.lax.optimization_barrier(pages[:, block_tables])
        return taken.reshape(*taken.shape[:2], width, *taken.shape[4:])

    def step(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, summed = carry
        k, v, k_scale, v_scale = (
            take(pages, block)
            for pages in (keys, arguments.values, arguments.key_scales, arguments.value_scales)
        )
        scores = einsum("bqhd,hbkd->bhqk", scaled, k.astype(query.dtype))
        if k_scale is not None:
            scores = scores * jnp.swapaxes(k_scale, 0, 1)[:, :, None]
        is_seen = block * width + jnp.arange(width) < lengths[..., None]  # [batch, new, width]
        scores = jnp.where(is_seen[:, None], scores, LOWEST)
        new, total, weights, shrink = add_to_softmax(largest, total, scores)
        # What an earlier request left may be NaN, and NaN times the weight 0 is NaN.
        is_any_row = jnp.any(is_seen, axis=1)  # [batch, width]
        v = jnp.where(is_any_row[..., None], v, 0)
        if v_scale is not None:
            v_scale = jnp.swapaxes(jnp.where(is_any_row, v_scale, 0), 0, 1)
            weights = weights * v_scale[:, :, None]
        part = einsum("bhqk,hbkd->bhqd", weights.astype(query.dtype), v.astype(query.dtype))
        return new, total, summed * shrink[..., None] + part

    shape = tuple(query.shape[i] for i in (0, 2, 1))
    start = (jnp.full(shape, LOWEST), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
    blocks = -(-jnp.max(lengths, initial=0) // width)
    _, total, summed = jax.lax.fori_loop(0, blocks, step, start)
    attended = summed / jnp.where(total == 0, 1, total)[..., None]
    return jnp.swapaxes(attended, 1, 2).astype(query.dtype)
