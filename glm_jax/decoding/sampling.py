"""How the next token is chosen from its logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from glm_jax.errors import UserError


class SamplingError(UserError):
    """Settings that describe no way to choose a token."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of one request.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: keep only the k likeliest tokens and their equals; 0 keeps all.
      top_p: of those, keep the likeliest whose probabilities sum to p, the one that
        crosses p included; 0 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise SamplingError(f"temperature={self.temperature}: at least 0")
        if self.top_k < 0:
            raise SamplingError(f"top_k={self.top_k}: at least 0 (0 keeps all tokens)")
        if not 0 <= self.top_p <= 1:
            raise SamplingError(f"top_p={self.top_p}: from 0 to 1 (0 keeps all tokens)")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


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
