"""Logit processors: what a request forbids or makes less likely before its next token is chosen.

Settings are arrays with a row for each request, so that one program serves every mixture.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

# Odd numbers without a pattern, for sums that tell runs of tokens apart.
_SUMS = ((0x9E3779B1, 0x85EBCA6B), (0xC2B2AE35, 0x27D4EB2F))


@struct.dataclass
class LogitProcessors:
    """Settings of each row, or of one request.

    Attributes:
      repetition_penalty: divides scores above 0, and multiplies those below, of tokens that
        the context or the answer has already (arXiv:1909.05858, section 4.1); 1 for none.
      presence_penalty: taken off the scores of tokens that the answer has already.
      frequency_penalty: taken off a token's score as often as the answer has it already.
      biased_tokens, biases: tokens, and what is added to the score of each; 0 fills up.
      no_repeat_ngram: no n tokens in a row, the last of them generated, come twice; 0 for no
        such ban.
      min_tokens: that are generated before a token that ends the text may be.
      banned_tokens: true for those that never come.
      banned_sequences: [sequences, width] a row, aligned to the right and filled up with -1:
        the last token of one does not come after its others.
    """

    repetition_penalty: Float[Any, "*rows"]
    presence_penalty: Float[Any, "*rows"]
    frequency_penalty: Float[Any, "*rows"]
    biased_tokens: Int[Any, "*rows biased"]
    biases: Float[Any, "*rows biased"]
    no_repeat_ngram: Int[Any, "*rows"]
    min_tokens: Int[Any, "*rows"]
    banned_tokens: Bool[Any, "*rows vocab"]
    banned_sequences: Int[Any, "*rows sequences width"]


def process_logits(
    logits: Float[Array, "rows vocab"],
    tokens: Int[Array, "rows length"],
    length: Int[Array, " rows"],
    first: Int[Array, " rows"],
    is_text_end: Bool[Array, "rows vocab"],
    processors: LogitProcessors,
) -> Float[Array, "rows vocab"]:
    """Scores with penalties and biases applied, and -inf for what may not come next.

    Args:
      tokens: of context and answer, `length` of them, those from `first` on generated.
      is_text_end: tokens before which an answer's text ends.
    """
    vocab = logits.shape[1]
    index = jnp.arange(tokens.shape[1])
    was = _mark(tokens, index < length[:, None], vocab)
    penalty = processors.repetition_penalty[:, None]
    disfavoured = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(was, disfavoured, logits)
    presence, frequency = processors.presence_penalty, processors.frequency_penalty

    def penalised() -> Array:
        is_answer = (index >= first[:, None]) & (index < length[:, None])
        counts = _add(jnp.zeros_like(logits), tokens, is_answer.astype(logits.dtype))
        return logits - presence[:, None] * (counts > 0) - frequency[:, None] * counts

    is_penalised = jnp.any((presence != 0) | (frequency != 0))
    logits = jax.lax.cond(is_penalised, penalised, lambda: logits)
    logits = _add(logits, processors.biased_tokens, processors.biases)
    may_not_end = (length - first < processors.min_tokens)[:, None]
    banned = processors.banned_tokens | (is_text_end & may_not_end)
    banned |= repeated(tokens, length, first, processors.no_repeat_ngram, vocab)
    banned |= _completed(tokens, length, first, processors.banned_sequences, vocab)
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
    index = jnp.arange(tokens.shape[1])
    column = lambda x: x[:, None]
    is_there = (index >= column(jnp.maximum(first, size - 1))) & (index < column(length))
    is_there &= column((size > 0) & (size <= length))  # no longer than all there is
    return _mark(tokens, is_there & _follows_latest(tokens, length, size - 1), vocab)


def _follows_latest(
    tokens: Int[Array, "rows length"], length: Int[Array, " rows"], count: Int[Array, " rows"]
) -> Bool[Array, "rows length"]:
    """Whether the `count` tokens before each position are the latest ones again.

    Runs of tokens are compared by two sums of 32 bits, such that the work is the same for every
    count; different ones have the same sums once in 2**64.
    """
    width = tokens.shape[1]
    index, end = jnp.arange(width), length[:, None]
    same = jnp.ones(tokens.shape, bool)
    for base, factor in _SUMS:
        powers = np.cumprod(np.r_[1, np.full(width, base)], dtype=np.uint32)
        mixed = tokens.astype(jnp.uint32) * np.uint32(factor)
        mixed = (mixed ^ (mixed >> 15)) * np.uint32(base)
        sums = jnp.cumsum((mixed ^ (mixed >> 13)) * powers[:width], axis=1)
        sums = jnp.pad(sums, ((0, 0), (1, 0)))  # of the tokens before each position
        of_run = lambda stop, sums=sums: (
            jnp.take_along_axis(sums, jnp.clip(stop, 0, width), axis=1)
            - jnp.take_along_axis(sums, jnp.clip(stop - count[:, None], 0, width), axis=1)
        )
        shift = jnp.asarray(powers)[jnp.clip(end - index, 0, width)]
        same &= of_run(jnp.broadcast_to(index, tokens.shape)) * shift == of_run(end)
    return same


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


def _add(to: Array, tokens: Array, values: Array) -> Array:
    """[rows, vocab] with each token's value added in its row."""
    rows = jnp.arange(len(tokens))[:, None]
    return to.at[rows, jnp.clip(tokens, 0, to.shape[1] - 1)].add(values)


def _mark(tokens: Array, which: Array, vocab: int) -> Array:
    """bool [rows, vocab]: whether a token is among those of its row that count."""
    rows = jnp.arange(len(tokens))[:, None]
    marks = jnp.zeros((len(tokens), vocab), bool)
    return marks.at[rows, jnp.clip(tokens, 0, vocab - 1)].max(which)
