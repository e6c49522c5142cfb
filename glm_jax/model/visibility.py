"""Who sees whom, as two or four integers a row and never as an array of seq x seq.

In GLM a row sees a context in full, and of its own piece what lies at or before it
(arXiv:2210.02414, section 2.1). Both are runs of neighbouring keys: in one text or in
packed documents a single run, in several choices after one context two of them.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, ArrayLike, Int, Int32


@struct.dataclass
class Visibility:
    """The keys that each row sees.

    Attributes:
      key_ranges: int32 [batch, seq, 2]: start and end (exclusive) of the keys it sees; or
        [batch, seq, 4]: of the context, then of the row's own piece. An empty range sees
        nothing.
    """

    key_ranges: Int32[Any, "batch seq bounds"]

    @classmethod
    def prefix(cls, context_length: Int[ArrayLike, " batch"], length: int) -> "Visibility":
        """One text a row: all see the first `context_length` keys, then causal."""
        context = jnp.asarray(context_length)[:, None]
        own_end = jnp.broadcast_to(jnp.arange(1, length + 1), (context.shape[0], length))
        return cls(_stack(jnp.zeros_like(own_end), jnp.maximum(context, own_end)))

    @classmethod
    def packed(
        cls, segment_ids: Int[ArrayLike, "batch seq"], context_length: Int[ArrayLike, "batch seq"]
    ) -> "Visibility":
        """Several texts after one another, none of which sees another.

        Args:
          segment_ids: equal and neighbouring within a text, 0 for padding, which sees
            only itself.
          context_length: of the text that the token belongs to.
        """
        segment_ids = jnp.asarray(segment_ids)
        index, start = _piece_starts(segment_ids)
        real = segment_ids > 0
        context_end = jnp.where(real, start + context_length, 0)
        return cls(_stack(jnp.where(real, start, index), jnp.maximum(context_end, index + 1)))

    @classmethod
    def choices(cls, choice_ids: Int[ArrayLike, "batch seq"]) -> "Visibility":
        """Return a context (id 0), then choices (ids 1, 2, ..) that see it but not each other.

        Padding goes at the end under an id of its own.
        """
        choice_ids = jnp.asarray(choice_ids)
        index, start = _piece_starts(choice_ids)
        context = jnp.sum(choice_ids == 0, axis=1, keepdims=True)
        return cls(_stack(jnp.zeros_like(index), context, start, index + 1))


def _piece_starts(ids: Int[Array, "batch seq"]) -> tuple[Array, Array]:
    """Index of each token, and of the first token of its run of equal ids."""
    index = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    is_first = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    first = jnp.where(is_first, index, 0)
    return index, jnp.maximum.accumulate(first, axis=1)


def _stack(*columns: Array) -> Array:
    return jnp.stack(jnp.broadcast_arrays(*columns), axis=-1).astype(jnp.int32)
