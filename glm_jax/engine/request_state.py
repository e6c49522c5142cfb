"""What the engine knows of a request between its place in the queue and its last token."""

import dataclasses
from typing import Any

from glm_jax.engine.page_pool import PageAllocation
from glm_jax.engine.prefill_batch import PrefillBatch
from glm_jax.engine.request import Request, Token
from glm_jax.engine.slots import FAILURES, Emitted


@dataclasses.dataclass(frozen=True)
class Admitted:
    """A request that has a slot and pages.

    Attributes:
      end: tokens that it may come to, sop included, for which it has pages.
    """

    request_id: int
    request: Request
    slot: int
    allocation: PageAllocation
    end: int


@dataclasses.dataclass
class Prefill:
    """Admitted requests whose prompts are on their way through the layers.

    Attributes:
      x: what the next layer takes; None before the embedding.
      cancelled: ids of requests that were given up meanwhile.
    """

    admitted: list[Admitted]
    batch: PrefillBatch
    x: Any = None
    layers_done: int = 0
    cancelled: set[int] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True)
class Running:
    """A request whose tokens are generated, and how many it may still get."""

    admitted: Admitted
    end_tokens: frozenset[int]
    remaining: int

    def next_token(self, emitted: Emitted, at: tuple[int, int]) -> Token:
        """The token that a step gave it, and whether that ends it.

        Args:
          at: row and position in the step, of numpy arrays.
        """
        request, token = self.admitted.request, int(emitted.tokens[at])
        reason, error = None, None
        if failure := int(emitted.failures[at]):
            generated = self.admitted.end - len(request.prompt) - self.remaining
            reason, error = "error", FAILURES[failure](generated)
        elif token in self.end_tokens:
            reason = "stop"
        elif self.remaining == 1:
            reason = "length"
        top: tuple[tuple[int, float], ...] = ()
        if request.top_logprobs:
            columns = emitted.top_tokens[at], emitted.top_logprobs[at]
            top = tuple(zip(*(x.tolist() for x in columns), strict=True))
        log_probability = float(emitted.log_probabilities[at])
        return Token(self.admitted.request_id, token, log_probability, reason, top, error)
