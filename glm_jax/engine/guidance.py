"""Guided answers: masks of the tokens that a request's grammar allows next.

The engine starts a step's forward pass, has the masks made here on the host while the device runs,
and then has tokens chosen under them. What a grammar is, and which tokens spell it, is not known
here.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt32

from glm_jax.engine.generation_settings import SamplingError
from glm_jax.engine.guide import Guide, Mask
from glm_jax.engine.request import Request, Token


class GuidedAnswer:
    """One answer under its grammar, with its end tokens and its minimum length."""

    def __init__(self, guide: Guide, ends: Iterable[int], min_tokens: int):
        """
        Args:
          min_tokens: see `Sampling`; an answer ends earlier where its grammar allows only the end.
        """
        self._state, self._ends = guide.start(), np.array(sorted(ends), np.int64)
        self._min_tokens, self._count = min_tokens, 0

    def resume(self, answer: Sequence[int]) -> None:
        """Take tokens that the answer has already."""
        for token in answer:
            self._state.accept(token)
        self._count += len(answer)

    def fill(self, masks: UInt32[np.ndarray, "new words"], drafts: Sequence[int]) -> None:
        """Write the mask of each position of a step.

        Args:
          masks: of the next token, then of the one after each draft. Those after a draft that is
            not allowed, or ends the answer, are left as they are: nothing is chosen there.
          drafts: -1 after the last.
        """
        accepted = 0
        for mask, draft in zip(masks, [*drafts, -1], strict=True):
            self._fill_one(mask, self._count + accepted)
            is_end = draft in self._ends
            if draft < 0 or is_end or not mask[draft >> 5] >> (draft & 31) & 1:
                break
            self._state.accept(draft)
            accepted += 1
        if accepted:
            self._state.rollback(accepted)

    def _fill_one(self, mask: Mask, count: int) -> None:
        may_end = self._state.allow(mask)
        words, bits = self._ends >> 5, (1 << (self._ends & 31)).astype(np.uint32)
        np.bitwise_and.at(mask, words, ~bits)
        if may_end and (count >= self._min_tokens or not mask.any()):
            np.bitwise_or.at(mask, words, bits)

    def take(self, token: Token) -> Token:
        """Accept a step's token, and return it, with the grammar's error where that is why there is
        none."""
        if token.finish_reason == "error":
            if isinstance(token.error, SamplingError):
                return dataclasses.replace(token, error=self._error())
        elif token.finish_reason != "stop":
            self.resume([token.token])
        return token

    def _error(self) -> SamplingError:
        if self._state.error is not None:
            return SamplingError(self._state.error)
        return SamplingError(
            f"no token of what the answer must be is left at its token {self._count + 1}: ban less"
        )


class Guidance:
    """The guided answers of an engine's running requests, by slot."""

    def __init__(self, vocab: int):
        """
        Args:
          vocab: size of the model's vocabulary.
        """
        self._words = -(-vocab // 32)
        self._answers: dict[int, GuidedAnswer] = {}

    @property
    def has_answers(self) -> bool:
        """Whether a running request is guided."""
        return bool(self._answers)

    def begin(
        self, slot: int, request: Request, ends: Iterable[int], answer: Sequence[int] = ()
    ) -> None:
        """Take the request of a slot, guided or not.

        Args:
          answer: tokens that it was given before it was preempted.
        """
        self.end(slot)
        if request.guide is not None:
            guided = GuidedAnswer(request.guide, ends, request.sampling.min_tokens)
            guided.resume(answer)
            self._answers[slot] = guided

    def end(self, slot: int) -> None:
        """Forget the request of a slot."""
        self._answers.pop(slot, None)

    def take(self, slot: int, token: Token) -> Token:
        """Take a token of a slot's request; see `GuidedAnswer.take`."""
        answer = self._answers.get(slot)
        return token if answer is None else answer.take(token)

    def making(
        self, slots: Sequence[int], drafts: Int[np.ndarray, "rows drafts"] | None
    ) -> Callable[[], UInt32[np.ndarray, "rows new words"]] | None:
        """Return what makes a step's `masks`; None where no running request is guided."""
        return functools.partial(self.masks, slots, drafts) if self._answers else None

    def masks(
        self, slots: Sequence[int], drafts: Int[np.ndarray, "rows drafts"] | None
    ) -> UInt32[np.ndarray, "rows new words"]:
        """Return what each position of a step may choose from; all tokens in rows without a guide.

        Args:
          slots: of the step's rows.
          drafts: that it runs.
        """
        count = 1 if drafts is None else 1 + drafts.shape[1]
        masks = np.full((len(slots), count, self._words), ~np.uint32(0), np.uint32)
        for row, slot in enumerate(slots):
            if (answer := self._answers.get(slot)) is not None:
                of_row: Any = () if drafts is None else drafts[row].tolist()
                answer.fill(masks[row], of_row)
        return masks
