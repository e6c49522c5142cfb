"""The requests that run together, a slot each, and how their next tokens are chosen."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, ArrayLike, Bool, Float, Int, UInt32

from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.engine import sampling as sampling_lib
from glm_jax.engine.generation_settings import MAX_BIASED, SamplingError
from glm_jax.engine.logit_processors import LogitProcessors, process_logits
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
from glm_jax.sharding import activation_sharding, surrounding_mesh

# Room for banned sequences; static, so that no request needs a program of its own.
MAX_SEQUENCES, MAX_SEQUENCE_LENGTH = 32, 8
MAX_TOP_LOGPROBS = 5  # tokens whose log-probabilities a position can have
_NO_NUMBERS, _STUCK = 1, 2
# Why a request ends without a token: what to raise for its n-th.
FAILURES: dict[int, Callable[[int], UserError]] = {
    _NO_NUMBERS: no_numbers,
    _STUCK: nothing_allowed,
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
    """A slot that no request has, of numpy arrays."""
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
    """The row of a request whose text is in the cache.

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
    """
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
    """A request's fields of `Slots` that say how its tokens are chosen, which
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
    """Puts a request into a slot."""
    admitted: Slots = jax.tree.map(lambda all_, one: all_.at[number].set(one), slots, row)
    return admitted


@functools.partial(jax.jit, donate_argnames="slots")
def set_table(slots: Slots, number: Int[ArrayLike, ""], table: Int[Any, " table_size"]) -> Slots:
    """Gives the request in a slot more pages."""
    return dataclasses.replace(slots, table=slots.table.at[number].set(table))


@functools.partial(jax.jit, donate_argnames="slots")
def release(slots: Slots, number: Int[ArrayLike, ""]) -> Slots:
    """Ends the request in a slot."""
    return dataclasses.replace(slots, is_active=slots.is_active.at[number].set(False))


def put_back(slots: Slots, numbers: Int[Any, " rows"], some: Slots) -> Slots:
    """Slots of which those of these numbers have done a step."""
    before, after = _changing(slots), _changing(some)
    return dataclasses.replace(
        slots, **{name: before[name].at[numbers].set(after[name]) for name in before}
    )


def _changing(slots: Slots) -> dict[str, Any]:
    """What `choose` changes."""
    return {
        name: getattr(slots, name)
        for name in ("is_active", "token", "index", "position_id", "tokens")
    }


def choose(
    logits: Float[Array, "slots vocab"],
    slots: Slots,
    allowed: UInt32[Array, "slots words"] | None = None,
) -> tuple[Emitted, Slots]:
    """The next token of each slot, and slots that run it next.

    What no active slot asks for is not computed.

    Args:
      allowed: tokens that may be chosen, as bits (see `sampling.keep_allowed`); None for all.
    """
    length = slots.index + 1
    active = slots.is_active
    is_asked = jnp.any(active & (slots.is_processed | ~slots.sampling.is_greedy))
    chosen, may_choose = jax.lax.cond(
        is_asked if allowed is None else jnp.bool_(True),
        lambda: _choose_as_asked(logits, slots, allowed),
        lambda: (sampling_lib.greedy(logits), jnp.ones_like(active)),
    )
    rows = jnp.arange(len(chosen))
    are_numbers = jnp.all(jnp.isfinite(logits), axis=-1)
    failures = jnp.where(are_numbers, jnp.where(may_choose, 0, _STUCK), _NO_NUMBERS) * active
    goes_on = active & (failures == 0)
    goes_on &= ~slots.is_end[rows, chosen] & (length + 1 < slots.end)
    moved = active.astype(jnp.int32)
    at = jnp.minimum(length, slots.tokens.shape[1] - 1)
    latest = jnp.where(active, chosen, slots.tokens[rows, at])
    changed = dataclasses.replace(
        slots,
        is_active=goes_on,
        token=jnp.where(active, chosen, slots.token),
        index=slots.index + moved,
        position_id=slots.position_id + slots.position_step * moved,
        tokens=slots.tokens.at[rows, at].set(latest),
    )
    emitted = Emitted(
        jnp.where(active, chosen, -1), failures, *_log_probabilities(logits, chosen, slots)
    )
    return jax.tree.map(_everywhere, emitted), changed


def choose_checked(
    logits: Float[Array, "slots new vocab"],
    drafts: Int[Array, "slots drafts"],
    slots: Slots,
    allowed: UInt32[Array, "slots new words"] | None = None,
) -> tuple[Emitted, Slots]:
    """The next tokens of each slot, by `choose` at one position after another, as long as what is
    chosen is the draft that was run at the next one.

    Where there is no token to choose, a slot with drafts stays as it is there, to be run without
    them: they are no part of its text, and may be the reason.

    Args:
      logits: after the slot's token, then after each draft.
      drafts: -1 where there is none.
      allowed: at each of these positions; see `choose`.
    """
    has_drafts = drafts[:, 0] >= 0
    nothing = jax.eval_shape(choose, logits[:, 0], slots)[0]

    def choose_next(carry: Any, inputs: Any) -> Any:
        changing, going = carry
        of_position, next_draft, may_come = inputs
        current = dataclasses.replace(slots, **changing | {"is_active": going})
        emitted, chosen = jax.lax.cond(
            jnp.any(going),
            lambda: choose(of_position, current, may_come),
            lambda: (jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nothing), current),
        )
        moves = going & ~(has_drafts & (emitted.failures > 0))
        emitted = dataclasses.replace(emitted, tokens=jnp.where(moves, emitted.tokens, -1))
        select = lambda new, old: jnp.where(moves.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
        changing = jax.tree.map(select, _changing(chosen), changing)
        goes_on = moves & changing["is_active"] & (changing["token"] == next_draft)
        return (changing, goes_on), emitted

    ran = jnp.pad(drafts, ((0, 0), (0, 1)), constant_values=-1)
    inputs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (logits, ran, allowed))
    (changing, _), emitted = jax.lax.scan(choose_next, (_changing(slots), slots.is_active), inputs)
    emitted = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), emitted)
    # What refused drafts left in pages counts too: it is cleared as a failure's.
    was_run = slots.is_active[:, None] & jnp.pad(
        drafts >= 0, ((0, 0), (1, 0)), constant_values=True
    )
    is_broken = was_run & ~jnp.all(jnp.isfinite(logits), axis=-1)
    failures = _everywhere(jnp.where(is_broken, _NO_NUMBERS, emitted.failures))
    return dataclasses.replace(emitted, failures=failures), dataclasses.replace(slots, **changing)


def _log_probabilities(logits: Array, chosen: Array, slots: Slots) -> tuple[Array, Array, Array]:
    """Log-probabilities of what was chosen; the most likely tokens and theirs, best first."""
    shape = (len(logits), min(MAX_TOP_LOGPROBS, logits.shape[1]))
    is_asked = slots.is_active & slots.wants_log_probability

    def top() -> tuple[Array, Array]:
        best, tokens = jax.lax.top_k(logits, shape[1])
        return tokens.astype(jnp.int32), best

    def compute() -> tuple[Array, Array, Array]:
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        of_chosen = logits[jnp.arange(len(chosen)), chosen] - normaliser
        tokens, best = jax.lax.cond(
            jnp.any(is_asked & slots.wants_top_logprobs),
            top,
            lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape)),
        )
        asked = jnp.where(slots.wants_log_probability, of_chosen, 0)
        return asked, tokens, best - normaliser[:, None]

    nothing = lambda: (jnp.zeros(shape[0]), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    computed: tuple[Array, Array, Array] = jax.lax.cond(jnp.any(is_asked), compute, nothing)
    return computed


def _choose_as_asked(logits: Array, slots: Slots, allowed: Array | None) -> tuple[Array, Array]:
    """Tokens, and whether there was one to choose."""

    def process() -> Array:
        length = slots.index + 1
        changed = process_logits(
            logits, slots.tokens, length, slots.first, slots.is_text_end, slots.logit_processors
        )
        return jnp.where(slots.is_processed[:, None], changed, logits)

    is_any = jnp.any(slots.is_active & slots.is_processed)
    processed = jax.lax.cond(is_any, process, lambda: logits)
    if allowed is not None:
        processed = sampling_lib.keep_allowed(processed, allowed)
    most_likely = sampling_lib.greedy(processed)
    chosen = jax.lax.cond(
        jnp.any(slots.is_active & ~slots.sampling.is_greedy),
        lambda: jnp.where(slots.sampling.is_greedy, most_likely, _draw(processed, slots)),
        lambda: most_likely,
    )
    return chosen, processed[jnp.arange(len(chosen)), most_likely] > -jnp.inf


def _draw(logits: Array, slots: Slots) -> Array:
    def key(seed: Array, number: Array) -> Array:
        return jax.random.fold_in(jax.random.key(seed), number)

    keys = jax.vmap(key)(slots.seed, slots.index + 1 - slots.first)
    return sampling_lib.sample(logits, keys, slots.sampling)


def _everywhere(x: Array) -> Array:
    """On every device, so that every process can read it."""
    if surrounding_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())
