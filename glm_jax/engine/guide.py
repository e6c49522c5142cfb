"""What an answer must be, as the engine sees it: which tokens may come next."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt32

Mask = UInt32[np.ndarray, " words"]  # bit i % 32 of word i // 32 is token i's


@runtime_checkable
class GuideState(Protocol):
    """The grammar of one answer, behind the tokens that it has accepted.

    Attributes:
      error: why it allows nothing any more; None while it works.
    """

    error: str | None

    def allow(self, mask: Mask, /) -> bool:
        """Write which tokens may come next, and return whether the answer may end here.

        Args:
          mask: all of it is written; tokens beyond the grammar's own vocabulary are not allowed.
        """

    def accept(self, token: int, /) -> None:
        """Take an allowed token as the answer's next one."""

    def rollback(self, count: int, /) -> None:
        """Take back the latest tokens."""


@runtime_checkable
class Guide(Protocol):
    """What an answer must be."""

    def start(self) -> GuideState:
        """Return the state before the first token."""
