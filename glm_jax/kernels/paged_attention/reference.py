"""Attention over pages as the formula says it: the pages of each row put in order first."""

import jax.numpy as jnp
from jaxtyping import Array

from glm_jax.kernels.attention.reference import masked_attention
from glm_jax.kernels.dispatch import PlainFormula
from glm_jax.kernels.paged_attention.arguments import Arguments


class Reference(PlainFormula):
    """Takes everything, and keeps all scores in memory."""

    def __call__(self, arguments: Arguments) -> Array:
        a, query = arguments, arguments.query

        def gather(pages: Array, scales: Array | None) -> Array:
            wide = pages.astype(jnp.float32)
            wide = wide if scales is None else wide * scales[..., None]
            rows = jnp.moveaxis(wide[:, a.tables], 0, 1)
            return rows.reshape(*rows.shape[:2], -1, rows.shape[-1]).astype(query.dtype)

        key, value = gather(a.keys, a.key_scales), gather(a.values, a.value_scales)
        mask = jnp.arange(key.shape[2]) < a.lengths[..., None]
        return masked_attention(query, key, value, mask, a.softmax_dtype)
