"""The requests that run together, a slot each, and how their next tokens are chosen."""

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

from glm_jax.config import GLMConfig
from glm_jax.engine import sampling as sampling_lib
from glm_jax.engine.generation_settings import SamplingError
from glm_jax.engine.logit_processors import Restrictions, restrict
from glm_jax.engine.request import Request
from glm_jax.engine.sampling import Sampling, check_banned, no_numbers, nothing_allowed
from glm_jax.errors import UserError
from glm_jax.sharding import activation_sharding, surrounding_mesh

# Room for banned sequences; static, so that no request needs a program of its own.
MOST_SEQUENCES, LONGEST_SEQUENCE = 32, 8
ALTERNATIVES = 5  # likeliest tokens that are told of a place
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
      index: its place in the sequence.
      position_id, position_step: its position, and how far the next one's is.
      first: place of the first generated token.
      end: the place that no token is generated for any more.
      tokens: [width] of context, sop and answer, up to index.
      table: [table_size] pages of the sequence in order.
      seed: of the draws, with a token's number in the answer.
      temperature, top_k, top_p, is_greedy: see `Sampling`.
      is_restricted: whether the restrictions say anything.
      is_end: [vocab], tokens that end the answer.
      wants_log_probability: of its tokens.
      wants_alternatives: beside it, the likeliest tokens of each place.
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
    temperature: Float[Any, "*slots"]
    top_k: Int[Any, "*slots"]
    top_p: Float[Any, "*slots"]
    is_greedy: Bool[Any, "*slots"]
    is_restricted: Bool[Any, "*slots"]
    restrictions: Any
    is_end: Bool[Any, "*slots vocab"]
    wants_log_probability: Bool[Any, "*slots"]
    wants_alternatives: Bool[Any, "*slots"]


@struct.dataclass
class Emitted:
    """What a step gives each slot.

    Attributes:
      tokens: -1 where there is none.
      failures: 0, or which of `FAILURES` ends the request instead of its token.
      log_probabilities: nats; the model's, before any restriction or temperature. 0 where
        none were asked for.
      alternatives, alternative_log_probabilities: of the likeliest tokens, best first.
    """

    tokens: Int[Any, " slots"]
    failures: Int[Any, " slots"]
    log_probabilities: Float[Any, " slots"]
    alternatives: Int[Any, "slots some"]
    alternative_log_probabilities: Float[Any, "slots some"]


def empty_slot(config: GLMConfig, width: int, table_size: int) -> Slots:
    """A slot that no request has, of numpy arrays."""
    zero, vocab = np.int32(0), config.vocab_size
    return Slots(
        **dict.fromkeys(("token", "index", "position_id", "position_step", "first", "end"), zero),
        is_active=np.bool_(False),
        tokens=np.zeros(width, np.int32),
        table=np.zeros(table_size, np.int32),
        **sampling_row(Sampling(), 0, vocab),
        is_end=np.zeros(vocab, bool),
        wants_log_probability=np.bool_(False),
        wants_alternatives=np.bool_(False),
    )


def request_row(
    empty: Slots, request: Request, pages: Sequence[int], end: int, ends: Sequence[int], sop: int
) -> Slots:
    """The row of a request whose prompt is in the cache.

    Args:
      empty: an `empty_slot`.
      end: the place that no token is generated for any more.
      ends: tokens that end the answer.
    """
    prompt, vocab = request.prompt, len(empty.is_end)
    tokens, table = np.zeros_like(empty.tokens), np.zeros_like(empty.table)
    tokens[: len(prompt)] = prompt.tokens(sop)
    table[: len(pages)] = pages
    is_end = np.zeros(vocab, bool)
    is_end[list(ends)] = True
    row: Slots = empty.replace(  # type: ignore[attr-defined]
        is_active=np.bool_(True),
        token=tokens[len(prompt) - 1],
        index=np.int32(len(prompt) - 1),
        position_id=np.int32(prompt.position_ids()[-1]),
        position_step=np.int32(prompt.position_step),
        first=np.int32(len(prompt)),
        end=np.int32(end),
        tokens=tokens,
        table=table,
        **sampling_row(request.sampling, request.seed, vocab),
        is_end=is_end,
        wants_log_probability=np.bool_(request.log_probabilities),
        wants_alternatives=np.bool_(request.alternatives),
    )
    return row


def check_sampling(sampling: Sampling, vocab: int) -> None:
    """
    Raises:
      SamplingError: more, or longer, banned sequences than a slot has room for, or a token
        that is not in the vocabulary.
    """
    check_banned((*sampling.banned_tokens, *itertools.chain(*sampling.banned_sequences)), vocab)
    if len(sampling.banned_sequences) > MOST_SEQUENCES or any(
        len(sequence) > LONGEST_SEQUENCE for sequence in sampling.banned_sequences
    ):
        raise SamplingError(
            f"banned sequences: at most {MOST_SEQUENCES}, of at most {LONGEST_SEQUENCE} tokens"
        )


def sampling_row(sampling: Sampling, seed: int, vocab: int) -> dict[str, Any]:
    """A request's fields of `Slots` that say how its tokens are chosen, which
    `check_sampling` lets pass."""
    banned = np.zeros(vocab, bool)
    sequences = np.full((MOST_SEQUENCES, LONGEST_SEQUENCE), -1, np.int32)
    banned[list(sampling.banned_tokens)] = True
    for row, sequence in zip(sequences, sampling.banned_sequences, strict=False):
        row[-len(sequence) :] = sequence
    return dict(
        seed=np.uint32(seed),
        temperature=np.float32(sampling.temperature or 1),
        top_k=np.int32(sampling.top_k),
        top_p=np.float32(sampling.top_p),
        is_greedy=np.bool_(sampling.is_greedy),
        is_restricted=np.bool_(sampling.is_restricted),
        restrictions=Restrictions(
            repetition_penalty=np.float32(sampling.repetition_penalty),
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
def release(slots: Slots, number: Int[ArrayLike, ""]) -> Slots:
    """Ends the request in a slot."""
    released: Slots = slots.replace(is_active=slots.is_active.at[number].set(False))  # type: ignore[attr-defined]
    return released


def put_back(slots: Slots, numbers: Int[Any, " rows"], some: Slots) -> Slots:
    """Slots of which those of these numbers have done a step: what `choose` changes."""
    changes = ("is_active", "token", "index", "position_id", "tokens")
    changed: Slots = slots.replace(  # type: ignore[attr-defined]
        **{name: getattr(slots, name).at[numbers].set(getattr(some, name)) for name in changes}
    )
    return changed


def choose(logits: Float[Array, "slots vocab"], slots: Slots) -> tuple[Emitted, Slots]:
    """The next token of each slot, and slots that run it next.

    What no active slot asks for is not computed.
    """
    length = slots.index + 1
    active = slots.is_active
    chosen, may_choose = jax.lax.cond(
        jnp.any(active & (slots.is_restricted | ~slots.is_greedy)),
        lambda: _choose_as_asked(logits, slots),
        lambda: (sampling_lib.greedy(logits), jnp.ones_like(active)),
    )
    rows = jnp.arange(len(chosen))
    are_numbers = jnp.all(jnp.isfinite(logits), axis=-1)
    failures = jnp.where(are_numbers, jnp.where(may_choose, 0, _STUCK), _NO_NUMBERS) * active
    goes_on = active & (failures == 0)
    goes_on &= ~slots.is_end[rows, chosen] & (length + 1 < slots.end)
    moved = active.astype(jnp.int32)
    at = jnp.minimum(length, slots.tokens.shape[1] - 1)
    kept = jnp.where(active, chosen, slots.tokens[rows, at])
    changed = slots.replace(  # type: ignore[attr-defined]
        is_active=goes_on,
        token=chosen,
        index=slots.index + moved,
        position_id=slots.position_id + slots.position_step * moved,
        tokens=slots.tokens.at[rows, at].set(kept),
    )
    emitted = Emitted(jnp.where(active, chosen, -1), failures, *_told(logits, chosen, slots))
    return jax.tree.map(_everywhere, emitted), changed


def _told(logits: Array, chosen: Array, slots: Slots) -> tuple[Array, Array, Array]:
    """Log-probabilities of what was chosen; the likeliest tokens and theirs, best first."""
    shape = (len(logits), min(ALTERNATIVES, logits.shape[1]))
    is_asked = slots.is_active & slots.wants_log_probability

    def likeliest() -> tuple[Array, Array]:
        best, places = jax.lax.top_k(logits, shape[1])
        return places.astype(jnp.int32), best

    def compute() -> tuple[Array, Array, Array]:
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        of_chosen = logits[jnp.arange(len(chosen)), chosen] - normaliser
        places, best = jax.lax.cond(
            jnp.any(is_asked & slots.wants_alternatives),
            likeliest,
            lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape)),
        )
        told = jnp.where(slots.wants_log_probability, of_chosen, 0)
        return told, places, best - normaliser[:, None]

    nothing = lambda: (jnp.zeros(shape[0]), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    found: tuple[Array, Array, Array] = jax.lax.cond(jnp.any(is_asked), compute, nothing)
    return found


def _choose_as_asked(logits: Array, slots: Slots) -> tuple[Array, Array]:
    """Tokens, and whether there was one to choose."""

    def restricted() -> Array:
        length = slots.index + 1
        changed = restrict(
            logits, slots.tokens, length, slots.first, slots.is_end, slots.restrictions
        )
        return jnp.where(slots.is_restricted[:, None], changed, logits)

    is_any = jnp.any(slots.is_active & slots.is_restricted)
    allowed = jax.lax.cond(is_any, restricted, lambda: logits)
    likeliest = sampling_lib.greedy(allowed)
    chosen = jax.lax.cond(
        jnp.any(slots.is_active & ~slots.is_greedy),
        lambda: jnp.where(slots.is_greedy, likeliest, _draw(allowed, slots)),
        lambda: likeliest,
    )
    return chosen, allowed[jnp.arange(len(chosen)), likeliest] > -jnp.inf


def _draw(logits: Array, slots: Slots) -> Array:
    def key(seed: Array, number: Array) -> Array:
        return jax.random.fold_in(jax.random.key(seed), number)

    keys = jax.vmap(key)(slots.seed, slots.index + 1 - slots.first)
    return sampling_lib.sample(logits, keys, slots.temperature, slots.top_k, slots.top_p)


def _everywhere(x: Array) -> Array:
    """On every device, so that every process can read it."""
    if surrounding_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())
