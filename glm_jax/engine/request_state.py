"""What the engine knows of a request between its place in the queue and its last token."""

import dataclasses
import functools
import math
from typing import Any

from glm_jax.engine.page_pool import PageAllocation
from glm_jax.engine.prefill_batch import PrefillBatch
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request, Token
from glm_jax.engine.slots import FAILURES, Emitted


@dataclasses.dataclass(frozen=True)
class Queued:
    """A request that waits for a slot.

    Attributes:
      answer: tokens that it was given before it was preempted.
    """

    request: Request
    answer: tuple[int, ...] = ()

    @property
    def text(self) -> Prompt:
        """What a step goes on from. An answer so far is the beginning that a prompt can have
        for its answer: its tokens are seen alike, and are at the same positions."""
        prompt = self.request.prompt
        if not self.answer:
            return prompt
        return dataclasses.replace(prompt, prefix=(*prompt.prefix, *self.answer))


@dataclasses.dataclass(frozen=True)
class Admitted:
    """A request that has a slot and pages.

    Attributes:
      allocation: pages for its text and the next token.
      text: what is, or will be, in them, but for the last token.
      end: tokens that it may come to, sop included.
      answer: tokens of the text that are answer, of one that was preempted.
      copy: of one that shares its prompt's pages with another: which page is to be copied onto
        its own; None where the shared pages are all of the prompt.
    """

    request_id: int
    request: Request
    slot: int
    allocation: PageAllocation
    text: Prompt
    end: int
    answer: tuple[int, ...] = ()
    copy: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Admission:
    """Requests that were admitted together.

    Attributes:
      prefilled: those whose texts are to be prefilled.
      followers: those that share the prompt of one of them.
      ready: those that share the prompt of a request that runs.
    """

    prefilled: list[Admitted]
    followers: list[Admitted]
    ready: list[Admitted]


@dataclasses.dataclass
class Prefill:
    """Admitted requests whose texts are on their way through the layers.

    Attributes:
      x: what the next layer takes; None before the embedding.
      cancelled: ids of requests that were given up meanwhile.
    """

    admission: Admission
    batch: PrefillBatch
    x: Any = None
    layers_done: int = 0
    cancelled: set[int] = dataclasses.field(default_factory=set)

    @property
    def admitted(self) -> list[Admitted]:
        """All who enter when it is done."""
        return [*self.admission.prefilled, *self.admission.followers]

    def layers_within(self, budget: float, layers: int) -> int:
        """Return how many of its next layers to run, at least one.

        Args:
          budget: tokens times layers.
          layers: of the model.
        """
        remaining = layers - self.layers_done
        if budget == math.inf:
            return remaining
        return min(remaining, max(1, int(budget) // self.batch.tokens.shape[1]))


@dataclasses.dataclass
class Running:
    """A request whose tokens are generated.

    Attributes:
      allocation: its pages, which are more as it grows.
      answer: tokens that it was given.
      unread: steps that run it and whose tokens have not been read.
    """

    admitted: Admitted
    end_tokens: frozenset[int]
    allocation: PageAllocation
    answer: list[int]
    unread: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes before others where there are too few pages."""
        return self.admitted.request.priority, self.admitted.request_id

    @functools.cached_property
    def _prompt_length(self) -> int:
        return len(self.admitted.request.prompt)

    @property
    def length(self) -> int:
        """Tokens so far, sop included, the last of which the next step runs."""
        return self._prompt_length + len(self.answer)

    @property
    def next_length(self) -> int:
        """Tokens that the next step needs pages for. One that ends before has no more."""
        return min(self.length + self.unread, self.admitted.end - 1)

    @property
    def remaining(self) -> int:
        """Tokens that it may still get."""
        return self.admitted.end - self.length

    def next_token(self, emitted: Emitted, at: tuple[int, int]) -> Token:
        """Return the token that a step gave it, and whether that ends it.

        Args:
          at: row and position in the step, of numpy arrays.
        """
        request, token = self.admitted.request, int(emitted.tokens[at])
        reason, error = None, None
        if failure := int(emitted.failures[at]):
            reason, error = "error", FAILURES[failure](len(self.answer))
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
