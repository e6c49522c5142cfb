"""Embedding: the mean of a text's final hidden states, many texts in a batch.

The text stands alone in a context with [gMASK] behind it, as the context of a prompt does: each of
its tokens sees all of it. The mean is over the text's own tokens, after the final layer norm.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.engine.scoring import not_finite
from glm_jax.engine.scoring_batch import ScoredSequence, ScoringBatch
from glm_jax.engine.sequence_batches import SequenceBatches, final_hidden
from glm_jax.model.params import GLMParams
from glm_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Embedding:
    """Of a text.

    Attributes:
      number: its index among the texts to embed.
      values: float32 [embed].
    """

    number: int
    values: np.ndarray


def embedded_sequence(
    tokens: Sequence[int], special: SpecialTokens, adapter: int = 0
) -> ScoredSequence:
    """Return a text as `Embedder` takes it.

    Args:
      tokens: of the text, at least one.
      adapter: see `Prompt.adapter`.
    """
    count = len(tokens)
    index = np.arange(count + 1, dtype=np.int32)
    key_ranges = np.zeros((count + 1, 4), np.int32)
    key_ranges[:, 1] = count + 1
    nothing = np.zeros(count, np.int32)
    return ScoredSequence(
        tokens=np.array([*tokens, special.gmask], np.int32),
        position_ids=index,
        key_ranges=key_ranges,
        indices=index[:count],
        targets=nothing,
        groups=nothing,
        adapter=adapter,
    )


class Embedder(SequenceBatches[Embedding]):
    """Embeds texts, which are `embedded_sequence`s, by a model."""

    max_a_row = 64

    @property
    def _program(self) -> Any:
        return mean_hidden

    def _arrays(self, batch: ScoringBatch) -> tuple[Any, ...]:
        ranges = np.zeros((len(batch.tokens), self.max_a_row, 2), np.int32)
        for (_, row, first, end), column in _with_columns(batch):
            start = batch.indices[row, first]
            ranges[row, column] = start, start + end - first
        return batch.tokens, batch.position_ids, batch.key_ranges, ranges, batch.adapter_ids

    def _results(
        self, sequences: Sequence[ScoredSequence], start: int, batch: ScoringBatch, output: Any
    ) -> Iterator[Embedding]:
        means = np.asarray(output)
        for (number, row, _, _), column in _with_columns(batch):
            if not np.isfinite(means[row, column]).all():
                raise not_finite("hidden states")
            yield Embedding(start + number, means[row, column])


def _with_columns(batch: ScoringBatch) -> Iterator[tuple[tuple[int, int, int, int], int]]:
    """Yield the slices of a batch, and the number of each within its row."""
    counts = dict[int, int]()
    for each in batch.slices:
        row = each[1]
        yield each, counts.get(row, 0)
        counts[row] = counts.get(row, 0) + 1


@functools.partial(jax.jit, static_argnames="config")
def mean_hidden(
    params: GLMParams,
    config: GLMConfig,
    tokens: Int[ArrayLike, "rows width"],
    position_ids: Int[ArrayLike, "rows width"],
    key_ranges: Int[ArrayLike, "rows width 4"],
    ranges: Int[ArrayLike, "rows ranges 2"],
    adapter_ids: Int[ArrayLike, "rows width"] | None = None,
) -> Float[Array, "rows ranges embed"]:
    """Mean final hidden states over ranges of each row, in float32.

    Args:
      ranges: first index and end (exclusive) of each; an empty one has zeros.
      adapter_ids: see `forward`.
    """
    hidden = final_hidden(params, config, tokens, position_ids, key_ranges, adapter_ids)
    first, end = jnp.moveaxis(jnp.asarray(ranges)[..., None], 2, 0)
    index = jnp.arange(hidden.shape[1], dtype=jnp.int32)
    weights = ((index >= first) & (index < end)) / jnp.maximum(end - first, 1)
    means = jnp.einsum(
        "rnw,rwe->rne",
        weights.astype(jnp.float32),
        hidden.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    # Whole on every device, so that every process can read all of it.
    return constrain(means, (None,) * 3)
