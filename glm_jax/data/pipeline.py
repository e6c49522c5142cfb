"""Endless packed batches, each a function of the seed and its number."""

from typing import Any

import grain
import numpy as np
from grain import experimental as grain_experimental

from glm_jax.config import SpecialTokens
from glm_jax.data.objective import ObjectiveConfig, make_sample

_PACKING_BINS = 16


def window_length(sequence_length: int) -> int:
    """The longest run of text that a sample of this length holds, sop and masks counted."""
    return max(1, int((sequence_length - 3) / 1.1))


def packed_batches(
    windows: list[np.ndarray],
    special: SpecialTokens,
    objective: ObjectiveConfig,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
) -> grain.DatasetIterator:
    """Shuffled epochs of samples, several packed into each row.

    Args:
      windows: token arrays.

    Returns:
      An iterator whose state can be saved and set. Its elements hold int32 tokens,
      targets, position_ids, context_length and segment_ids (0 is padding) and float32
      loss_weights, all [batch_size, sequence_length].
    """

    def sample(window: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return make_sample(window, special, objective, rng, sequence_length).features()

    samples = (
        grain.MapDataset.source(windows)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(sample)
        # Samples are too small for grain's reading threads: they cost five times the work.
        .to_iter_dataset(grain.ReadOptions(num_threads=0))
    )
    names = ("tokens", "targets", "loss_weights", "position_ids", "context_length")
    packed = grain_experimental.FirstFitPackIterDataset(
        samples,
        length_struct=dict.fromkeys(names, sequence_length),
        num_packing_bins=_PACKING_BINS,
        shuffle_bins=False,
    )

    def select(row: dict[str, Any]) -> dict[str, np.ndarray]:
        return {name: row[name] for name in names} | {"segment_ids": row["tokens_segment_ids"]}

    return iter(packed.map(select).batch(batch_size, drop_remainder=True))
