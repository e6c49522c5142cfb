"""What a request forbids or disfavours before its next token is chosen, on the device.

Settings are arrays with a row for each request, so that one program serves every mixture.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class Restrictions:
    """Settings of each row, or of one request.

    Attributes:
      repetition_penalty: divides scores above 0, and multiplies those below, of tokens that
        the context or the answer has already (arXiv:1909.05858, section 4.1); 1 for none.
      no_repeat_ngram: no n tokens in a row, the last of them generated, come twice; 0 for no
        such ban.
      min_tokens: that are generated before an end token may be.
      banned_tokens: true for those that never come.
      banned_sequences: [sequences, width] a row, aligned to the right and filled up with -1:
        the last token of one does not come after its others.
    """

    repetition_penalty: Float[Any, "*rows"]
    no_repeat_ngram: Int[Any, "*rows"]
    min_tokens: Int[Any, "*rows"]
    banned_tokens: Bool[Any, "*rows vocab"]
    banned_sequences: Int[Any, "*rows sequences width"]


def restrict(
    logits: Float[Array, "rows vocab"],
    tokens: Int[Array, "rows length"],
    length: Int[Array, " rows"],
    first: Int[Array, " rows"],
    is_end: Bool[Array, "rows vocab"],
    restrictions: Restrictions,
) -> Float[Array, "rows vocab"]:
    """Scores with the penalty applied, and -inf for what may not come next.

    Args:
      tokens: of context and answer, `length` of them, those from `first` on generated.
      is_end: tokens that end an answer.
    """
    vocab = logits.shape[1]
    places = jnp.arange(tokens.shape[1])
    was = _mark(tokens, places < length[:, None], vocab)
    penalty = restrictions.repetition_penalty[:, None]
    disfavoured = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(was, disfavoured, logits)
    may_not_end = (length - first < restrictions.min_tokens)[:, None]
    banned = restrictions.banned_tokens | (is_end & may_not_end)
    banned |= repeated(tokens, length, first, restrictions.no_repeat_ngram, vocab)
    banned |= _completed(tokens, length, first, restrictions.banned_sequences, vocab)
    return jnp.where(banned, -jnp.inf, logits)


def repeated(
    tokens: Int[Array, "rows length"],
    length: Int[Array, " rows"],
    first: Int[Array, " rows"],
    size: Int[Array, " rows"],
    vocab: int,
) -> Bool[Array, "rows vocab"]:
    """Tokens that would end `size` tokens in a row that were there before, the last of which
    was generated; none where size is 0."""
    places = jnp.arange(tokens.shape[1])
    column = lambda x: x[:, None]
    same = (places >= column(jnp.maximum(first, size - 1))) & (places < column(length))
    same &= column(size > 0)

    def compare(back: Array, same: Array) -> Array:
        latest = jnp.take_along_axis(tokens, column(jnp.maximum(length - back, 0)), axis=1)
        return same & ((jnp.roll(tokens, back, axis=1) == latest) | (back >= column(size)))

    same = jax.lax.fori_loop(1, jnp.max(size), compare, same)
    return _mark(tokens, same, vocab)


def _completed(
    tokens: Int[Array, "rows length"],
    length: Int[Array, " rows"],
    first: Int[Array, " rows"],
    sequences: Int[Array, "rows sequences width"],
    vocab: int,
) -> Bool[Array, "rows vocab"]:
    """Tokens that would complete a sequence of which the answer ends in all the others."""
    before = jnp.arange(1 - sequences.shape[2], 0) + length[:, None]
    latest = jnp.take_along_axis(tokens, jnp.maximum(before, 0), axis=1)
    latest = jnp.where(before >= first[:, None], latest, -2)
    others, last = sequences[..., :-1], sequences[..., -1]
    fits = jnp.all((others == latest[:, None]) | (others == -1), axis=-1)
    return _mark(last, fits & (last >= 0), vocab)


def _mark(tokens: Array, which: Array, vocab: int) -> Array:
    """bool [rows, vocab]: whether a token is among those of its row that count."""
    rows = jnp.arange(len(tokens))[:, None]
    marks = jnp.zeros((len(tokens), vocab), bool)
    return marks.at[rows, jnp.clip(tokens, 0, vocab - 1)].max(which)
