"""Scoring: log-probabilities of given tokens, many sequences in a batch and none generated."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from glm_jax.config import GLMConfig
from glm_jax.engine.scoring_batch import ScoredSequence, ScoringBatch, make_batches
from glm_jax.errors import UserError
from glm_jax.model import glm
from glm_jax.model.params import GLMParams
from glm_jax.model.visibility import Visibility
from glm_jax.sharding import constrain, mesh_of, on_mesh, row_shards

_CHUNK = 256  # tokens whose scores of the whole vocabulary are there at once
_MIN_WIDTH = 512
_ROUND = 4096  # sequences that are batched together; their scores come after each round


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
    """

    number: int
    log_probabilities: np.ndarray
    are_argmax: np.ndarray
    groups: np.ndarray

    @property
    def sums(self) -> np.ndarray:
        """float64 [groups], log-probabilities of each group's targets together."""
        return np.bincount(self.groups, self.log_probabilities.astype(np.float64))


class Scorer:
    """Scores sequences by a model.

    Attributes:
      padding: of all that was scored.
    """

    def __init__(self, params: GLMParams, config: GLMConfig, batch_tokens: int = 4096):
        """
        Args:
          batch_tokens: that are run at once, of all devices together.
        """
        self._params, self._config, self._batch_tokens = params, config, batch_tokens
        self._mesh = mesh_of(params)
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

    def _round(self, sequences: Sequence[ScoredSequence], start: int) -> Iterator[Score]:
        longest = max(map(len, sequences))
        # A row is no longer than what is run at once, but as long as the longest sequence.
        max_width = max(longest, self._batch_tokens)
        width = min(-(-max(longest, _MIN_WIDTH) // 128) * 128, max_width)
        shards = row_shards(self._mesh)
        rows = shards
        while rows * 2 * width <= self._batch_tokens:
            rows *= 2
        # The next batch is filled and given to the devices before the one before is waited for.
        running: list[tuple[ScoringBatch, tuple[Array, Array]]] = []
        for batch in make_batches(sequences, width, rows, shards):
            running.append((batch, self._run(batch)))
            if len(running) > 1:
                yield from _scores(sequences, start, *running.pop(0))
        for batch, results in running:
            yield from _scores(sequences, start, batch, results)

    def _run(self, batch: ScoringBatch) -> tuple[Array, Array]:
        self.padding.run += batch.tokens.size
        self.padding.filled += batch.filled
        with on_mesh(self._mesh):
            return log_probabilities(
                self._params,
                self._config,
                batch.tokens,
                batch.position_ids,
                batch.key_ranges,
                batch.indices,
                batch.targets,
            )


def _scores(
    sequences: Sequence[ScoredSequence],
    start: int,
    batch: ScoringBatch,
    results: tuple[Array, Array],
) -> Iterator[Score]:
    values, hits = map(np.asarray, results)
    for number, row, first, end in batch.slices:
        if not np.isfinite(values[row, first:end]).all():
            raise ScoringError(
                "the model's log-probabilities are not finite: its weights are damaged, or too "
                "large for its dtype (try --dtype=float32)"
            )
        groups = sequences[number].groups
        yield Score(start + number, values[row, first:end], hits[row, first:end], groups)


@functools.partial(jax.jit, static_argnames="config")
def log_probabilities(
    params: GLMParams,
    config: GLMConfig,
    tokens: Int[ArrayLike, "rows width"],
    position_ids: Int[ArrayLike, "rows width"],
    key_ranges: Int[ArrayLike, "rows width 4"],
    indices: Int[ArrayLike, "rows targets"],
    targets: Int[ArrayLike, "rows targets"],
) -> tuple[Float[Array, "rows targets"], Bool[Array, "rows targets"]]:
    """log softmax of the scores at `indices`, of `targets`, and whether they are the largest.

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

    def look_up(part: tuple[Array, Array]) -> tuple[Array, Array]:
        states, wanted = part
        scores = glm.logits(params, config, states)
        # A comparison, not a gather: each device holds a part of the vocabulary.
        is_target = jnp.arange(scores.shape[-1], dtype=jnp.int32) == wanted[..., None]
        of_target = jnp.max(jnp.where(is_target, scores, -jnp.inf), axis=-1)
        largest = jnp.max(scores, axis=-1)
        return of_target - jax.nn.logsumexp(scores, axis=-1), of_target == largest

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(rows, count // chunk, chunk, *x.shape[2:]), 1, 0)

    values, hits = jax.lax.map(look_up, (split(chosen), split(targets)))
    # Whole on every device, so that every process can read all of it.
    join = lambda x: constrain(jnp.moveaxis(x, 0, 1).reshape(rows, count), (None, None))
    return join(values), join(hits)
