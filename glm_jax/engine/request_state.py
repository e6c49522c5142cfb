"""What the engine knows of a request between its place in the queue and its last token."""

import dataclasses
from typing import Any

from glm_jax.engine.page_pool import PageAllocation
from glm_jax.engine.prefill_batch import PrefillBatch
from glm_jax.engine.request import Request


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
    """A request whose tokens are generated: how many it may still get, and how many it has."""

    admitted: Admitted
    end_tokens: frozenset[int]
    remaining: int
    generated: int = 0
