"""How the next tokens of the slots are chosen: one each, or several by drafts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from glm_jax.engine import sampling as sampling_lib
from glm_jax.engine.logit_processors import process_logits
from glm_jax.engine.slots import (
    MAX_TOP_LOGPROBS,
    NO_NUMBERS,
    STUCK,
    Emitted,
    Slots,
    changing_fields,
)
from glm_jax.sharding import surrounding_mesh


def choose(
    logits: Float[Array, "slots vocab"],
    slots: Slots,
    allowed: UInt32[Array, "slots words"] | None = None,
) -> tuple[Emitted, Slots]:
    """Return the next token of each slot, and slots that run it next.

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
    failures = jnp.where(are_numbers, jnp.where(may_choose, 0, STUCK), NO_NUMBERS) * active
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
    """Return the next tokens of each slot, by `choose` at one position after another, as long as
    what is chosen is the draft that was run at the next one.

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
        changing = jax.tree.map(select, changing_fields(chosen), changing)
        goes_on = moves & changing["is_active"] & (changing["token"] == next_draft)
        return (changing, goes_on), emitted

    ran = jnp.pad(drafts, ((0, 0), (0, 1)), constant_values=-1)
    inputs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (logits, ran, allowed))
    (changing, _), emitted = jax.lax.scan(
        choose_next, (changing_fields(slots), slots.is_active), inputs
    )
    emitted = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), emitted)
    # What refused drafts left in pages counts too: it is cleared as a failure's.
    was_run = slots.is_active[:, None] & jnp.pad(
        drafts >= 0, ((0, 0), (1, 0)), constant_values=True
    )
    is_broken = was_run & ~jnp.all(jnp.isfinite(logits), axis=-1)
    failures = _everywhere(jnp.where(is_broken, NO_NUMBERS, emitted.failures))
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
