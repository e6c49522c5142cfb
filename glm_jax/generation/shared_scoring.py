"""Scores of several answers in one batch: the one that runs takes along those that wait.

In the same way embeddings of several answers are computed in one batch.
"""

import dataclasses
from collections.abc import Sequence
from typing import Generic, TypeVar

from glm_jax.engine.scoring import ScoringError
from glm_jax.engine.scoring_batch import ScoredSequence
from glm_jax.engine.sequence_batches import Numbered, SequenceBatches
from glm_jax.engine.stepwise import Steps, replayable
from glm_jax.generation.driver import Search

_Result = TypeVar("_Result")
_Score = TypeVar("_Score", bound=Numbered)


@dataclasses.dataclass(eq=False)
class _Waiting(Generic[_Score]):
    """A sequence that waits for its score."""

    sequence: ScoredSequence
    score: _Score | None = None


class SharedScorer(Generic[_Score]):
    """A scorer, or an embedder, of answers that one driver works on."""

    def __init__(self, scorer: SequenceBatches[_Score], batch_tokens: int):
        """
        Args:
          batch_tokens: of the sequences that are scored together, unless one answer has more.
        """
        self._scorer, self._batch_tokens = scorer, batch_tokens
        self._waiting: list[_Waiting[_Score]] = []

    @replayable
    def steps(self, sequences: Sequence[ScoredSequence]) -> Steps[list[_Score]]:
        """Score sequences and return their scores in order; see `SequenceBatches.steps`.

        They wait from the first step on, which does nothing else.
        """
        own = [_Waiting[_Score](sequence) for sequence in sequences]
        self._waiting += own
        try:
            yield None
            while missing := [each for each in own if each.score is None]:
                yield from self._score(missing)
            return [each.score for each in own if each.score is not None]
        finally:  # also where the answer is cancelled
            self._waiting = [each for each in self._waiting if each not in own]

    def _score(self, own: Sequence[_Waiting[_Score]]) -> Steps[None]:
        room = self._batch_tokens - sum(len(each.sequence) for each in own)
        chosen = list(own)
        for each in self._waiting:
            if each.score is None and each not in own and len(each.sequence) <= room:
                chosen.append(each)
                room -= len(each.sequence)
        try:
            scores = yield from self._scorer.steps([each.sequence for each in chosen])
        except ScoringError:  # which may be another answer's
            if len(chosen) == len(own):
                raise
            scores = yield from self._scorer.steps([each.sequence for each in own])
        for each, score in zip(chosen, scores, strict=False):
            each.score = score


class Scoring(Search[_Result]):
    """An answer by `SharedScorer.steps`, whose sequences wait as soon as it is submitted."""

    def next_work(self) -> Steps[None] | None:
        if self._steps is not None:
            next(self._steps)
        return super().next_work()
