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
from glm_jax.engine.scoring_batch import ScoredSequence, ScoringBatch, make_batches
from glm_jax.engine.stepwise import Steps
from glm_jax.errors import UserError
from glm_jax.model import glm
from glm_jax.model.params import GLMParams
from glm_jax.model.visibility import Visibility
from glm_jax.sharding import constrain, mesh_of, on_mesh, row_shards

_CHUNK = 256  # tokens whose scores of the whole vocabulary are there at once
_MIN_WIDTH = 512
_ROUND = 4096  # sequences that are batched together; their scores come after each round
_Results = tuple[Array, Array, Array, Array]  # of `log_probabilities`


class ScoringError(UserError):
    """A model that gives no log-probabilities."""


@dataclasses.dataclass
class Padding:
    """How many tokens were run, and how many of them were no padding."""

    run: int = 0
    filled: int = 0

    @property
    def share(self) -> float:
        return 1 - self.filled / self.run if self.run else 0.0


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


class Scorer:
    """Scores sequences by a model.

    Attributes:
      padding: of all that was scored.
    """

    def __init__(
        self, params: GLMParams, config: GLMConfig, batch_tokens: int = 4096, num_top: int = 0
    ):
        """
        Args:
          batch_tokens: that are run at once, of all devices together.
          num_top: the number of most likely tokens that each target's score names.
        """
        self._params, self._config, self._batch_tokens = params, config, batch_tokens
        self._num_top, self._mesh = num_top, mesh_of(params)
        self._compiled = set[tuple[int, ...]]()
        self.padding = Padding()

    def score(self, sequences: Iterable[ScoredSequence]) -> Iterator[Score]:
        """The score of each sequence, in no order. They are taken some at a time.

        Raises:
          ScoringError: a log-probability is not finite.
        """
        source, start = iter(sequences), 0
        while group := list(itertools.islice(source, _ROUND)):
            yield from self._round(group, start)
            start += len(group)

    def steps(self, sequences: Sequence[ScoredSequence]) -> Steps[list[Score]]:
        """Score sequences a batch at a time, and return their scores in order.

        Raises:
          ScoringError: a log-probability is not finite.
        """
        scores: list[Score] = []
        for batch in self._batches(sequences):
            shape = (*batch.tokens.shape, *batch.targets.shape)
            if shape not in self._compiled:
                self._compiled.add(shape)
                yield functools.partial(self._compile, batch)
            scores += _scores(sequences, 0, batch, self._run(batch))
            yield None
        return sorted(scores, key=lambda score: score.number)

    def _round(self, sequences: Sequence[ScoredSequence], start: int) -> Iterator[Score]:
        # The next batch is filled and given to the devices before the one before is waited for.
        running: list[tuple[ScoringBatch, _Results]] = []
        for batch in self._batches(sequences):
            running.append((batch, self._run(batch)))
            if len(running) > 1:
                yield from _scores(sequences, start, *running.pop(0))
        for batch, results in running:
            yield from _scores(sequences, start, batch, results)

    def _batches(self, sequences: Sequence[ScoredSequence]) -> Iterator[ScoringBatch]:
        longest = max(map(len, sequences))
        # A row is no longer than what is run at once, but as long as the longest sequence.
        max_width = max(longest, self._batch_tokens)
        width = min(-(-max(longest, _MIN_WIDTH) // 128) * 128, max_width)
        shards = row_shards(self._mesh)
        rows = shards
        while rows * 2 * width <= self._batch_tokens:
            rows *= 2
        return make_batches(sequences, width, rows, shards)

    def _run(self, batch: ScoringBatch) -> _Results:
        self.padding.run += batch.tokens.size
        self.padding.filled += batch.filled
        with on_mesh(self._mesh):
            return log_probabilities(*self._arguments(batch))

    def _compile(self, batch: ScoringBatch) -> object:
        with on_mesh(self._mesh):
            return log_probabilities.lower(*self._arguments(batch)).compile()

    def _arguments(self, batch: ScoringBatch) -> tuple[Any, ...]:
        sequences = (batch.tokens, batch.position_ids, batch.key_ranges)
        targets = (batch.indices, batch.targets)
        return (self._params, self._config, *sequences, *targets, self._num_top)


def _scores(
    sequences: Sequence[ScoredSequence],
    start: int,
    batch: ScoringBatch,
    results: _Results,
) -> Iterator[Score]:
    values, *others = map(np.asarray, results)
    for number, row, first, end in batch.slices:
        if not np.isfinite(values[row, first:end]).all():
            raise ScoringError(
                "the model's log-probabilities are not finite: its weights are damaged, or too "
                "large for its dtype (try --dtype=float32)"
            )
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
    """
    tokens, indices, targets = map(jnp.asarray, (tokens, indices, targets))
    visibility = Visibility(constrain(jnp.asarray(key_ranges), ("batch", "seq", None)))
    tokens = constrain(tokens, ("batch", "seq"))
    hidden, _ = glm.forward_hidden(params, config, tokens, position_ids, visibility)
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
