"""Attention over ranges of keys, or a mask, for each query."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from glm_jax.kernels.attention.arguments import Arguments
from glm_jax.kernels.attention.blockwise import Blockwise
from glm_jax.kernels.attention.cpu import CPUBlocks
from glm_jax.kernels.attention.dropout import WeightDropout
from glm_jax.kernels.attention.library import Library
from glm_jax.kernels.attention.library_tpu import LibraryTPU
from glm_jax.kernels.attention.mosaic import Mosaic
from glm_jax.kernels.attention.reference import Reference
from glm_jax.kernels.dispatch import dispatch

# Keys up to which all scores at once are no more than a block.
_FEW_KEYS = 128
_IN_BLOCKS = (Library(), LibraryTPU(), Blockwise())
_BY_NAME = (Mosaic(),)  # training asks for it where its check has passed
IMPLEMENTATIONS = ("cpu", "library", "mosaic", "blockwise", "reference")


def attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch heads key head_dim"],
    value: Float[Array, "batch heads key head_dim"],
    visible: Int32[Array, "batch query bounds"] | Bool[Array, "batch query key"],
    softmax_dtype: str = "float32",
    dropout: WeightDropout | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch query heads head_dim"]:
    """Compute softmax(query key^T / sqrt(head_dim)) value over the keys that each query sees.

    Queries with ranges go block by block: no array of queries x keys, and keys that no query
    sees are not read; on one CPU device in float32 by a kernel of our own. A mask, which is such an
    array itself, and a softmax in less than float32 take the formula as it stands.

    Args:
      visible: for each query, [start, end) of one or two ranges of keys; or a mask, true where
        the query may see the key.
      softmax_dtype: dtype of the scores and their softmax.
      dropout: of the softmax's weights, in training.
      implementation: one of `IMPLEMENTATIONS`; None for the fastest that takes the arguments on
        the platform that is compiled for, "mosaic" apart, which a caller has to check first.

    Returns:
      [batch, query, heads, head_dim] in the query's dtype; zeros for queries that see nothing.

    Raises:
      BackendError: the named implementation does not take the arguments here.
    """
    arguments = Arguments(query, key, value, visible, dropout, softmax_dtype)
    in_blocks, whole = _IN_BLOCKS, (Reference(),)
    few_first = (*whole, *in_blocks) if key.shape[2] <= _FEW_KEYS else (*in_blocks, *whole)
    return dispatch("attention", (CPUBlocks(), *few_first, *_BY_NAME), arguments, implementation)


def isolated_attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch heads key head_dim"],
    value: Float[Array, "batch heads key head_dim"],
    key_ranges: Int32[Array, "batch query 2"],
    softmax_dtype: str = "float32",
) -> Float[Array, "batch query heads head_dim"]:
    """`attention` for sequences of different requests in one row: a value that is NaN or infinite
    reaches the queries that see it, and no other. Backends multiply the values of a whole block,
    and NaN times the weight 0 of a masked key is NaN.
    """
    is_finite = jnp.all(jnp.isfinite(value), axis=-1)  # [batch, heads, key]
    attended = attention(
        query, key, jnp.where(is_finite[..., None], value, 0), key_ranges, softmax_dtype
    )
    counts = jnp.pad(jnp.cumsum(~is_finite, axis=-1), ((0, 0), (0, 0), (1, 0)))
    start, end = (jnp.take_along_axis(counts, key_ranges[:, None, :, i], axis=-1) for i in (0, 1))
    sees_it = jnp.swapaxes(end > start, 1, 2)[..., None]
    return jnp.where(sees_it, jnp.asarray(jnp.nan, attended.dtype), attended)
