"""The requests that run together, a slot each."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Bool, Float, Int, UInt32

from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.engine.generation_settings import MAX_BIASED, SamplingError
from glm_jax.engine.logit_processors import LogitProcessors
from glm_jax.engine.page_pool import page_table
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request
from glm_jax.engine.sampling import (
    Sampling,
    SamplingRows,
    check_banned,
    no_numbers,
    nothing_allowed,
)
from glm_jax.errors import UserError
from glm_jax.sharding import activation_sharding

# Room for banned sequences; static, so that no request needs a program of its own.
MAX_SEQUENCES, MAX_SEQUENCE_LENGTH = 32, 8
MAX_TOP_LOGPROBS = 5  # tokens whose log-probabilities a position can have
NO_NUMBERS, STUCK = 1, 2
# Why a request ends without a token: what to raise for its n-th.
FAILURES: dict[int, Callable[[int], UserError]] = {
    NO_NUMBERS: no_numbers,
    STUCK: nothing_allowed,
}


@struct.dataclass
class Slots:
    """What the device knows of each request; all [slots, ..], or without `slots` of one.

    Attributes:
      is_active: whether a request is there and goes on.
      token: the next to run, whose key and value are not in the cache yet.
      index: of that token in the sequence.
      position_id, position_step: its position, and how far the next one's is.
      first: index of the first generated token.
      end: sequence length at which generation stops (exclusive).
      tokens: [width] of context, sop and answer, up to index.
      table: [table_size] pages of the sequence in order, those that it has so far.
      seed: of the draws, with a token's number in the answer.
      sampling: how tokens are drawn.
      is_processed: whether logit processors change anything.
      logit_processors: their settings.
      is_end: [vocab], tokens that end the answer.
      is_text_end: [vocab], tokens before which its text ends: these, and eod.
      adapter_id: see `Prompt.adapter`.
      wants_log_probability: of its tokens.
      wants_top_logprobs: beside it, those of the most likely tokens at each position.
    """

    is_active: Bool[Any, "*slots"]
    token: Int[Any, "*slots"]
    index: Int[Any, "*slots"]
    position_id: Int[Any, "*slots"]
    position_step: Int[Any, "*slots"]
    first: Int[Any, "*slots"]
    end: Int[Any, "*slots"]
    tokens: Int[Any, "*slots width"]
    table: Int[Any, "*slots table_size"]
    seed: UInt32[Any, "*slots"]
    sampling: SamplingRows
    is_processed: Bool[Any, "*slots"]
    logit_processors: Any
    is_end: Bool[Any, "*slots vocab"]
    is_text_end: Bool[Any, "*slots vocab"]
    adapter_id: Int[Any, "*slots"]
    wants_log_probability: Bool[Any, "*slots"]
    wants_top_logprobs: Bool[Any, "*slots"]


@struct.dataclass
class Emitted:
    """What a step gives each slot: [slots, new], a column for each position that it ran, or [slots]
    of one position.

    Attributes:
      tokens: -1 where there is none, and from there on.
      failures: 0, or which of `FAILURES` there was instead of a token. It ends the request, unless
        drafts were run behind its token.
      log_probabilities: nats; the model's, before any logit processor or temperature. 0 where
        none were asked for.
      top_tokens, top_logprobs: the most likely tokens, best first.
    """

    tokens: Int[Any, "*slots"]
    failures: Int[Any, "*slots"]
    log_probabilities: Float[Any, "*slots"]
    top_tokens: Int[Any, "*slots top"]
    top_logprobs: Float[Any, "*slots top"]


def empty_slot(config: GLMConfig, width: int, table_size: int) -> Slots:
    """Return a slot that no request has, of numpy arrays."""
    vocab = config.vocab_size
    numbers = ("token", "index", "position_id", "position_step", "first", "end", "adapter_id")
    zeros: dict[str, Any] = dict.fromkeys(numbers, np.int32(0))
    return Slots(
        **zeros,
        is_active=np.bool_(False),
        tokens=np.zeros(width, np.int32),
        table=np.zeros(table_size, np.int32),
        **sampling_row(Sampling(), 0, vocab),
        is_end=np.zeros(vocab, bool),
        is_text_end=np.zeros(vocab, bool),
        wants_log_probability=np.bool_(False),
        wants_top_logprobs=np.bool_(False),
    )


def request_row(
    empty: Slots,
    request: Request,
    text: Prompt,
    pages: Sequence[int],
    end: int,
    special: SpecialTokens,
) -> Slots:
    """Return the row of a request whose text is in the cache.

    Args:
      empty: an `empty_slot`.
      text: its prompt, and the answer so far of one that goes on.
      end: sequence length at which generation stops (exclusive).
    """
    vocab, tokens = len(empty.is_end), np.zeros_like(empty.tokens)
    tokens[: len(text)] = text.tokens(special.sop)
    ends = special.end_tokens if request.end_tokens is None else request.end_tokens
    is_end, is_text_end = np.zeros((2, vocab), bool)
    is_end[list(ends)] = True
    is_text_end[list(special.text_ends(ends))] = True
    sampling = request.sampling
    if request.guide is not None:  # `guidance` knows where the answer may end
        sampling = dataclasses.replace(sampling, min_tokens=0)
    return dataclasses.replace(
        empty,
        is_active=np.bool_(True),
        token=tokens[len(text) - 1],
        index=np.int32(len(text) - 1),
        position_id=np.int32(text.position_ids()[-1]),
        position_step=np.int32(text.position_step),
        first=np.int32(len(request.prompt)),
        end=np.int32(end),
        tokens=tokens,
        table=page_table(pages, len(empty.table)),
        **sampling_row(sampling, request.seed, vocab),
        is_end=is_end,
        is_text_end=is_text_end,
        adapter_id=np.int32(text.adapter),
        wants_log_probability=np.bool_(request.log_probabilities),
        wants_top_logprobs=np.bool_(request.top_logprobs),
    )


def check_sampling(sampling: Sampling, vocab: int) -> None:
    """Check that a slot has room for a request's settings.

    Raises:
      SamplingError: more, or longer, banned sequences than a slot has room for, or a token
        that is not in the vocabulary.
    """
    check_banned((*sampling.banned_tokens, *itertools.chain(*sampling.banned_sequences)), vocab)
    for token in dict(sampling.logit_bias):
        if token >= vocab:
            raise SamplingError(f"logit_bias: token {token} is not in the vocabulary")
    if len(sampling.banned_sequences) > MAX_SEQUENCES or any(
        len(sequence) > MAX_SEQUENCE_LENGTH for sequence in sampling.banned_sequences
    ):
        raise SamplingError(
            f"banned sequences: at most {MAX_SEQUENCES}, of at most {MAX_SEQUENCE_LENGTH} tokens"
        )


def sampling_row(sampling: Sampling, seed: int, vocab: int) -> dict[str, Any]:
    """Return a request's fields of `Slots` that say how its tokens are chosen, which
    `check_sampling` lets pass."""
    banned = np.zeros(vocab, bool)
    sequences = np.full((MAX_SEQUENCES, MAX_SEQUENCE_LENGTH), -1, np.int32)
    banned[list(sampling.banned_tokens)] = True
    biased, biases = np.zeros(MAX_BIASED, np.int32), np.zeros(MAX_BIASED, np.float32)
    for number, (token, bias) in enumerate(dict(sampling.logit_bias).items()):
        biased[number], biases[number] = token, bias
    for row, sequence in zip(sequences, sampling.banned_sequences, strict=False):
        row[-len(sequence) :] = sequence
    return dict(
        seed=np.uint32(seed),
        sampling=sampling.row(),
        is_processed=np.bool_(sampling.has_processors),
        logit_processors=LogitProcessors(
            repetition_penalty=np.float32(sampling.repetition_penalty),
            presence_penalty=np.float32(sampling.presence_penalty),
            frequency_penalty=np.float32(sampling.frequency_penalty),
            biased_tokens=biased,
            biases=biases,
            no_repeat_ngram=np.int32(sampling.no_repeat_ngram),
            min_tokens=np.int32(sampling.min_tokens),
            banned_tokens=banned,
            banned_sequences=sequences,
        ),
    )


def empty_slots(row: Slots, count: int, mesh: Mesh | None) -> Slots:
    """`count` slots like `row`, divided over the devices that divide rows."""

    def repeat(x: Any) -> Array:
        shape = (count, *np.shape(x))
        axes = ("batch", *(None,) * np.ndim(x))
        device = None if mesh is None else activation_sharding(mesh, axes)
        return jnp.zeros(shape, np.asarray(x).dtype, device=device)

    slots: Slots = jax.tree.map(repeat, row)
    return slots


@functools.partial(jax.jit, donate_argnames="slots")
def admit(slots: Slots, number: Int[ArrayLike, ""], row: Slots) -> Slots:
    """Put a request into a slot."""
    admitted: Slots = jax.tree.map(lambda all_, one: all_.at[number].set(one), slots, row)
    return admitted


@functools.partial(jax.jit, donate_argnames="slots")
def set_table(slots: Slots, number: Int[ArrayLike, ""], table: Int[Any, " table_size"]) -> Slots:
    """Give the request in a slot more pages."""
    return dataclasses.replace(slots, table=slots.table.at[number].set(table))


@functools.partial(jax.jit, donate_argnames="slots")
def release(slots: Slots, number: Int[ArrayLike, ""]) -> Slots:
    """End the request in a slot."""
    return dataclasses.replace(slots, is_active=slots.is_active.at[number].set(False))


def put_back(slots: Slots, numbers: Int[Any, " rows"], some: Slots) -> Slots:
    """Slots of which those of these numbers have done a step."""
    before, after = changing_fields(slots), changing_fields(some)
    return dataclasses.replace(
        slots, **{name: before[name].at[numbers].set(after[name]) for name in before}
    )


def changing_fields(slots: Slots) -> dict[str, Any]:
    """Return what `choosing.choose` changes."""
    return {
        name: getattr(slots, name)
        for name in ("is_active", "token", "index", "position_id", "tokens")
    }
