"""How the next token is chosen from its logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from glm_jax.errors import UserError


class SamplingError(UserError):
    """Settings that describe no way to choose a token."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: keep only the k likeliest tokens and their equals; 0 keeps all.
      top_p: of those, keep the likeliest whose probabilities sum to p, the one that
        crosses p included; 0 keeps all.
      repetition_penalty: above 1 makes tokens that were there less likely, context included;
        1 for none. This and what follows come before temperature.
      no_repeat_ngram: no n tokens in a row, the last of them generated, come twice; 0 for no
        such ban.
      min_tokens: that are generated before the answer may end.
      banned_tokens: never come.
      banned_sequences: never come as a whole in the answer.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    min_tokens: int = 0
    banned_tokens: tuple[int, ...] = ()
    banned_sequences: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        rules = (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("top_p", 0 <= self.top_p <= 1, "from 0 to 1 (0 keeps all tokens)"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 for none)"),
            ("no_repeat_ngram", self.no_repeat_ngram >= 0, "at least 0 (0 for none)"),
            ("min_tokens", self.min_tokens >= 0, "at least 0"),
            ("banned_sequences", all(self.banned_sequences), "each has a token at least"),
        )
        for name, is_possible, what in rules:
            if not is_possible:
                raise SamplingError(f"{name}={getattr(self, name)}: {what}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @property
    def is_restricted(self) -> bool:
        """Whether something is forbidden or disfavoured before the choice."""
        return (
            self.repetition_penalty != 1
            or self.no_repeat_ngram > 0
            or self.min_tokens > 0
            or bool(self.banned_tokens or self.banned_sequences)
        )


def filter_logits(
    logits: Float[Array, "batch vocab"],
    top_k: Int[Array, " batch"],
    top_p: Float[Array, " batch"],
) -> Float[Array, "batch vocab"]:
    """Logits with -inf for what top-k, then top-p, leaves out. 0 turns either off.

    Settings are arrays, so that one program serves every request.
    """
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    kth = jnp.take_along_axis(ranked, jnp.maximum(top_k - 1, 0)[:, None], axis=-1)
    ranked = jnp.where((top_k[:, None] > 0) & (ranked < kth), -jnp.inf, ranked)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1)[:, :-1]
    before = jnp.pad(before, ((0, 0), (1, 0)))
    uses_top_p = (top_p[:, None] > 0) & (top_p[:, None] < 1)
    ranked = jnp.where(uses_top_p & (before > top_p[:, None]), -jnp.inf, ranked)
    back = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(ranked, back, axis=-1)


def sample(
    logits: Float[Array, "batch vocab"],
    keys: Key[Array, " batch"],
    temperature: Float[Array, " batch"],
    top_k: Int[Array, " batch"],
    top_p: Float[Array, " batch"],
) -> Int[Array, " batch"]:
    """Draws a token per row, each with its own key and settings; temperature above 0."""
    filtered = filter_logits(logits / temperature[:, None], top_k, top_p)
    drawn: Array = jax.vmap(jax.random.categorical)(keys, filtered)
    return drawn.astype(jnp.int32)


def greedy(logits: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """The likeliest token of each row, the first of equals."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
