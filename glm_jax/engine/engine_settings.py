"""How much an engine does at once."""

import dataclasses

from glm_jax.config import GLMConfig
from glm_jax.engine.page_pool import PAGE_SIZE
from glm_jax.engine.prompt import PromptError


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """How much an engine does at once.

    Attributes:
      slots: requests that run together; rounded up to what the mesh divides.
      max_length: tokens of a request, prompt, sop and answer; the model's positions by default.
      cache_tokens: that the cache has room for, of all requests together; by default 512 a
        slot, or max_length where that is less, and never less than one longest request.
      page_size: tokens of a page.
      prefill_width: tokens of prompts that are prefilled at once, unless one is longer.
      prefill_budget: tokens that are prefilled between two steps at most, in whole layers;
        None fills all slots before the next step, which is best where no one waits for tokens.
      speculate: draft tokens of each request that a step checks at most (see `speculation`).
      compiles_guided: whether `warm_up` compiles the programs of guided requests too, which else
        their first step does.
    """

    slots: int = 16
    max_length: int | None = None
    cache_tokens: int | None = None
    page_size: int = PAGE_SIZE
    prefill_width: int = 512
    prefill_budget: int | None = None
    speculate: int = 0
    compiles_guided: bool = False

    def longest(self, config: GLMConfig) -> int:
        """Tokens of a request at most.

        Raises:
          PromptError: more than the model has positions.
        """
        longest = self.max_length or config.max_sequence_length
        if longest > config.max_sequence_length:
            raise PromptError(
                f"max_length={longest} is past the model's {config.max_sequence_length} positions"
            )
        return longest

    def prefill_steps(self, num_layers: int, width: int) -> int:
        """Return within how many steps a prefill batch of this width has run through its layers."""
        if self.prefill_budget is None:
            return 1
        return -(-num_layers // max(1, self.prefill_budget * num_layers // width))

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            lowest = 0 if name in ("speculate", "compiles_guided") else 1
            if value is not None and value < lowest:
                raise PromptError(f"{name}={value}: at least {lowest}")
