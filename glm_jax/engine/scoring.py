"""Scoring: log-probabilities of given tokens, many sequences in a batch and none generated."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from glm_jax.config import GLMConfig
from glm_jax.engine.scoring_batch import ScoredSequence, ScoringBatch
from glm_jax.engine.sequence_batches import SequenceBatches, final_hidden
from glm_jax.errors import UserError
from glm_jax.model import glm
from glm_jax.model.params import GLMParams
from glm_jax.sharding import constrain

_CHUNK = 256  # tokens whose scores of the whole vocabulary are there at once
_ROUND = 4096  # sequences that are batched together; their scores come after each round
_Results = tuple[Array, Array, Array, Array]  # of `log_probabilities`


class ScoringError(UserError):
    """A model that gives no numbers."""


def not_finite(kind: str) -> ScoringError:
    """Return what to raise where a model's numbers of some kind are NaN or infinite."""
    return ScoringError(
        f"the model's {kind} are not finite: its weights are damaged, or too "
        "large for its dtype (try --dtype=float32)"
    )


@dataclasses.dataclass(frozen=True)
class Score:
    """Of a sequence.

    Attributes:
      number: its index among the sequences to score.
      log_probabilities: float32 [targets], of its targets, nats.
      are_argmax: bool [targets], whether each target is the most likely token.
      groups: int32 [targets], the sequence's.
      top_tokens: int32 [targets, num_top], the most likely tokens, best first.
      top_log_probabilities: float32 [targets, num_top], theirs.
    """

    number: int
    log_probabilities: np.ndarray
    are_argmax: np.ndarray
    groups: np.ndarray
    top_tokens: np.ndarray
    top_log_probabilities: np.ndarray

    @property
    def sums(self) -> np.ndarray:
        """float64 [groups], log-probabilities of each group's targets together."""
        return np.bincount(self.groups, self.log_probabilities.astype(np.float64))


class Scorer(SequenceBatches[Score]):
    """Scores sequences by a model."""

    def __init__(
        self, params: GLMParams, config: GLMConfig, batch_tokens: int = 4096, num_top: int = 0
    ):
        """
        Args:
          batch_tokens: that are run at once, of all devices together.
          num_top: the number of most likely tokens that each target's score names.
        """
        super().__init__(params, config, batch_tokens)
        self._static = {"num_top": num_top}

    def score(self, sequences: Iterable[ScoredSequence]) -> Iterator[Score]:
        """Yield the score of each sequence, in no order. They are taken some at a time.

        Raises:
          ScoringError: a log-probability is not finite.
        """
        source, start = iter(sequences), 0
        while group := list(itertools.islice(source, _ROUND)):
            yield from self._round(group, start)
            start += len(group)

    def _round(self, sequences: Sequence[ScoredSequence], start: int) -> Iterator[Score]:
        # The next batch is filled and given to the devices before the one before is waited for.
        running: list[tuple[ScoringBatch, _Results]] = []
        for batch in self._batches(sequences):
            running.append((batch, self._run(batch)))
            if len(running) > 1:
                yield from self._results(sequences, start, *running.pop(0))
        for batch, results in running:
            yield from self._results(sequences, start, batch, results)

    @property
    def _program(self) -> Any:
        return log_probabilities

    def _arrays(self, batch: ScoringBatch) -> tuple[Any, ...]:
        sequences = (batch.tokens, batch.position_ids, batch.key_ranges)
        return (*sequences, batch.indices, batch.targets, batch.adapter_ids)

    def _results(
        self, sequences: Sequence[ScoredSequence], start: int, batch: ScoringBatch, output: _Results
    ) -> Iterator[Score]:
        values, *others = map(np.asarray, output)
        for number, row, first, end in batch.slices:
            if not np.isfinite(values[row, first:end]).all():
                raise not_finite("log-probabilities")
            score, hits, *top = (x[row, first:end] for x in (values, *others))
            yield Score(start + number, score, hits, sequences[number].groups, *top)


@functools.partial(jax.jit, static_argnames=("config", "num_top"))
def log_probabilities(
    params: GLMParams,
    config: GLMConfig,
    tokens: Int[ArrayLike, "rows width"],
    position_ids: Int[ArrayLike, "rows width"],
    key_ranges: Int[ArrayLike, "rows width 4"],
    indices: Int[ArrayLike, "rows targets"],
    targets: Int[ArrayLike, "rows targets"],
    adapter_ids: Int[ArrayLike, "rows width"] | None = None,
    num_top: int = 0,
) -> tuple[
    Float[Array, "rows targets"],
    Bool[Array, "rows targets"],
    Int[Array, "rows targets {num_top}"],
    Float[Array, "rows targets {num_top}"],
]:
    """log softmax of the scores at `indices`, of `targets`, and whether they are the largest; and
    the `num_top` most likely tokens there with theirs.

    Scores are computed at indices alone, and of so many at a time that they stay small.

    Args:
      adapter_ids: see `forward`.
    """
    indices, targets = jnp.asarray(indices), jnp.asarray(targets)
    hidden = final_hidden(params, config, tokens, position_ids, key_ranges, adapter_ids)
    chosen = jnp.take_along_axis(hidden, indices[:, :, None], axis=1)
    rows, count = indices.shape
    # The largest power of two that divides the count of targets, and is no more than fits.
    chunk = math.gcd(count, 1 << (max(1, _CHUNK // rows).bit_length() - 1))

    def look_up(part: tuple[Array, Array]) -> _Results:
        states, wanted = part
        scores = glm.logits(params, config, states)
        # A comparison, not a gather: each device holds a part of the vocabulary.
        is_target = jnp.arange(scores.shape[-1], dtype=jnp.int32) == wanted[..., None]
        of_target = jnp.max(jnp.where(is_target, scores, -jnp.inf), axis=-1)
        largest = jnp.max(scores, axis=-1)
        total = jax.nn.logsumexp(scores, axis=-1)
        best, best_tokens = jax.lax.top_k(scores, num_top)
        return of_target - total, of_target == largest, best_tokens, best - total[..., None]

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(rows, count // chunk, chunk, *x.shape[2:]), 1, 0)

    results = jax.lax.map(look_up, (split(chosen), split(targets)))

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1).reshape(rows, count, *x.shape[3:])
        # Whole on every device, so that every process can read all of it.
        return constrain(x, (None,) * x.ndim)

    values, hits, top_tokens, top_values = map(join, results)
    return values, hits, top_tokens, top_values
