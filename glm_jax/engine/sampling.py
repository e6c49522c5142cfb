"""Sampling: how the next token is chosen from its logits, as each request asks."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from glm_jax.engine.generation_settings import SamplingError, check_settings
from glm_jax.errors import UserError

_BLOCK = 64
# Below these the most likely token is drawn whatever float32 makes of them: logits that differ
# at all differ by more than this, and no likeliest token of a vocabulary is this unlikely.
_MIN_TEMPERATURE = 1e-6
_MIN_TOP_P = 1e-6


class LogitsError(UserError):
    """Scores that are no numbers: by broken weights, or products beyond a narrow type's range."""

    def __init__(self, where: str):
        """
        Args:
          where: which of the logits, such as "at token 3 of the answer".
        """
        super().__init__(
            f"the model's logits {where} are NaN or infinite: check the checkpoint "
            "(convert.verify), or compute in float32"
        )


def no_numbers(number: int) -> LogitsError:
    """Return what to raise where an answer's logits are no numbers.

    Args:
      number: of the token in the answer, from 0.
    """
    return LogitsError(f"at token {number + 1} of the answer")


def nothing_allowed(number: int) -> SamplingError:
    """Return what to raise where bans leave no token to choose.

    Args:
      number: of the token in the answer, from 0.
    """
    return SamplingError(f"every token is banned at token {number + 1} of the answer: ban less")


def check_banned(tokens: Iterable[int], vocab: int) -> None:
    """Check token ids that must not be chosen.

    Raises:
      SamplingError: a token that is not in the vocabulary.
    """
    for token in tokens:
        if not 0 <= token < vocab:
            raise SamplingError(f"banned token {token} is not in the vocabulary")


@struct.dataclass
class SamplingRows:
    """`Sampling` of each row, or of one request, as far as tokens are drawn by it: arrays, so that
    one program serves every mixture."""

    temperature: Float[Any, "*rows"]
    top_k: Int[Any, "*rows"]
    top_p: Float[Any, "*rows"]
    min_p: Float[Any, "*rows"]
    is_greedy: Bool[Any, "*rows"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen.

    Attributes:
      temperature: divides the logits; 0, and what is as good as 0, takes the likeliest token.
      top_k: keep only the k likeliest tokens and their equals; 0 keeps all.
      top_p: of those, keep the likeliest whose probabilities sum to p, the one that
        crosses p included; 0 keeps all.
      min_p: of those, keep what is at least this times as likely as the likeliest token; 0 keeps
        all.
      repetition_penalty: above 1 makes tokens that were there less likely, context included;
        1 for none. This and what follows come before temperature.
      presence_penalty: taken off the logits of tokens that the answer has already.
      frequency_penalty: taken off a token's logit as often as the answer has it already.
      logit_bias: ids of tokens, each with what is added to its logit.
      no_repeat_ngram: no n tokens in a row, the last of them generated, come twice; 0 for no
        such ban.
      min_tokens: that are generated before the answer's text may end.
      banned_tokens: never come.
      banned_sequences: never come as a whole in the answer.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    no_repeat_ngram: int = 0
    min_tokens: int = 0
    banned_tokens: tuple[int, ...] = ()
    banned_sequences: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        check_settings(self)
        if not all(self.banned_sequences):
            raise SamplingError(f"banned_sequences={self.banned_sequences}: one is empty")

    @property
    def is_greedy(self) -> bool:
        is_narrow = self.top_k == 1 or 0 < self.top_p < _MIN_TOP_P
        return self.temperature < _MIN_TEMPERATURE or is_narrow

    def row(self) -> SamplingRows:
        """Return these settings as arrays, without those of logit processors."""
        return SamplingRows(
            temperature=np.float32(self.temperature or 1),
            top_k=np.int32(self.top_k),
            top_p=np.float32(self.top_p),
            min_p=np.float32(self.min_p),
            is_greedy=np.bool_(self.is_greedy),
        )

    @property
    def has_processors(self) -> bool:
        """Whether logit processors change anything."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.no_repeat_ngram > 0
            or self.min_tokens > 0
            or bool(self.logit_bias or self.banned_tokens or self.banned_sequences)
        )


def filter_logits(
    logits: Float[Array, "batch vocab"],
    top_k: Int[Array, " batch"],
    top_p: Float[Array, " batch"],
) -> Float[Array, "batch vocab"]:
    """Logits with -inf for what top-k, then top-p, leaves out. 0 turns either off.

    Settings are arrays, so that one program serves every request. Nothing is sorted: the
    lowest logit to keep is found bit by bit. Of equal logits where top-p crosses p, the first are
    kept.
    """
    uses_top_k, uses_top_p = top_k > 0, (top_p > 0) & (top_p < 1)
    logits = jax.lax.cond(
        jnp.any(uses_top_k),
        lambda: jnp.where(uses_top_k[:, None], _keep_top_k(logits, top_k), logits),
        lambda: logits,
    )
    return jax.lax.cond(
        jnp.any(uses_top_p),
        lambda: jnp.where(uses_top_p[:, None], _keep_top_p(logits, top_p), logits),
        lambda: logits,
    )


def keep_allowed(
    logits: Float[Array, "rows vocab"], allowed: UInt32[Array, "rows words"]
) -> Float[Array, "rows vocab"]:
    """Logits with -inf for the tokens whose bit is 0: bit i % 32 of word i // 32 is token i's."""
    bits = allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    return jnp.where(bits.reshape(len(logits), -1)[:, : logits.shape[1]] > 0, logits, -jnp.inf)


def _keep_top_k(logits: Array, top_k: Array) -> Array:
    order = _ordered_bits(logits)
    lowest = _crossing(order, jnp.ones_like(logits), top_k - 0.5)
    return jnp.where(order >= lowest[:, None], logits, -jnp.inf)


def _keep_top_p(logits: Array, top_p: Array) -> Array:
    order = _ordered_bits(logits)
    probabilities = jax.nn.softmax(logits, axis=-1)
    lowest = _crossing(order, probabilities, top_p)[:, None]
    equal = order == lowest

    def of_equals() -> Array:
        """Those of the equals before which the probabilities sum to no more than p."""
        above = jnp.sum(jnp.where(order > lowest, probabilities, 0), axis=-1, keepdims=True)
        earlier = jnp.cumsum(equal, axis=-1) - equal
        return equal & (above + earlier * probabilities <= top_p[:, None])

    is_tie = jnp.any(jnp.sum(equal, axis=-1) > 1)
    equal = jax.lax.cond(is_tie, of_equals, lambda: equal)
    return jnp.where((order > lowest) | equal, logits, -jnp.inf)


def _ordered_bits(x: Array) -> Array:
    """uint32 in the order of the floats, -0 and 0 the same."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32) + 0.0, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _crossing(order: Array, weights: Array, target: Array) -> Array:
    """Return the largest value in `order` of each row such that the weights from it upwards sum to
    more than the target; 0 where there is none."""

    def step(i: Array, bits: Array) -> Array:
        candidate = bits | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        above = jnp.sum(jnp.where(order >= candidate[:, None], weights, 0), axis=-1)
        return jnp.where(above > target, candidate, bits)

    return jax.lax.fori_loop(0, 32, step, jnp.zeros(len(order), jnp.uint32))


def _keep_min_p(logits: Array, min_p: Array) -> Array:
    lowest = jnp.max(logits, axis=-1) + jnp.log(min_p)
    return jnp.where(logits >= lowest[:, None], logits, -jnp.inf)


def sample(
    logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"], rows: SamplingRows
) -> Int[Array, " batch"]:
    """Draws a token per row, each with its own key and settings; temperature above 0.

    Temperature comes first, then top-k, top-p, min-p, as in transformers.
    """
    filtered = filter_logits(logits / rows.temperature[:, None], rows.top_k, rows.top_p)
    drawn: Array = jax.vmap(jax.random.categorical)(keys, _keep_min_p(filtered, rows.min_p))
    return drawn.astype(jnp.int32)


def greedy(logits: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """Return the likeliest token of each row, the first of equals."""
    # By blocks: XLA's argmax of a long row takes seven times as long on CPU.
    padded = jnp.pad(logits, ((0, 0), (0, -logits.shape[1] % _BLOCK)), constant_values=-jnp.inf)
    blocks = padded.reshape(len(logits), -1, _BLOCK)
    best = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    within = jnp.argmax(blocks[jnp.arange(len(logits)), best], axis=-1)
    return (best * _BLOCK + within).astype(jnp.int32)
