"""Endless packed batches; a batch is a function of the seed and its index.

The mixture is shuffled as a whole and dealt to a fixed number of streams, each of which fills one
or more rows of the batch. A process reads the streams of its devices' rows, so that the batches
are the same for any number of processes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from grain import experimental as grain_experimental

from glm_jax.config import SpecialTokens
from glm_jax.data.objective import KINDS, ObjectiveConfig, make_sample
from glm_jax.data.records import Dataset, Record

_PACKING_BINS = 16
FEATURES = ("tokens", "targets", "loss_weights", "position_ids", "context_length")
State = dict[str, Any]  # of each stream, by its index; plain JSON


def window_length(sequence_length: int) -> int:
    """Return the tokens of text that fit in a sample of this length with sop, eop and masks."""
    return max(1, int((sequence_length - 3) / 1.1))


def group_names(datasets: Sequence[Dataset]) -> list[str]:
    """Return the names of the kinds of samples by dataset, in the order of `TrainBatch.groups`."""
    return [f"{dataset.name}_{kind}" for dataset in datasets for kind in KINDS]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Datasets with weights, and how batches are made of them.

    Attributes:
      datasets: sources of records.
      weights: relative share of the tokens from each dataset.
      special: ids of the tokens that are not text.
      objective: how samples are made.
      sequence_length: tokens of a row.
      rows: of a batch.
      streams: number of streams of samples; divides the rows.
      seed: of shuffling and of the objective.
    """

    datasets: Sequence[Dataset]
    weights: Sequence[float]
    special: SpecialTokens
    objective: ObjectiveConfig
    sequence_length: int
    rows: int
    streams: int
    seed: int


class Batches:
    """An iterator over batches of some streams' rows, with a state to save and restore.

    Its elements have int32 tokens, targets, position_ids, context_length, segment_ids (0 is
    padding) and groups (see `group_names`) and float32 loss_weights, all
    [rows of these streams, sequence_length].
    """

    def __init__(self, mixture: Mixture, streams: Sequence[int] | None = None):
        """Open streams.

        Args:
          streams: their indices, all by default.
        """
        self._rows = mixture.rows // mixture.streams
        numbers = range(mixture.streams) if streams is None else streams
        samples = _samples(mixture)
        self._streams = {number: _stream(mixture, samples, number) for number in numbers}

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return self.next()

    def next(self, multiple: int = 1) -> dict[str, np.ndarray]:
        """Return the next batch, of `multiple` times the mixture's rows; each stream has as many
        rows in it, one after another."""
        count = multiple * self._rows
        rows = [next(stream) for stream in self._streams.values() for _ in range(count)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> State:
        """Return the position of each stream."""
        return {str(number): stream.get_state() for number, stream in self._streams.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the positions in a state.

        Raises:
          KeyError: the state has fewer streams.
        """
        for number, stream in self._streams.items():
            stream.set_state(state[str(number)])


def _samples(mixture: Mixture) -> grain.MapDataset:
    """Make an endless dataset of shuffled samples, mixed by their number of tokens."""

    def of_dataset(index: int, dataset: Dataset) -> grain.MapDataset:
        def sample(content: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
            record = Record.decode(content) if isinstance(content, bytes) else content
            made = make_sample(
                record, mixture.special, mixture.objective, rng, mixture.sequence_length
            ).features()
            groups = made.pop("kinds") + np.int32(index * len(KINDS))
            return made | {"groups": groups}

        source = grain.MapDataset.source(dataset.records).seed(mixture.seed + index)
        return source.shuffle().repeat().random_map(sample)

    parts = [of_dataset(i, dataset) for i, dataset in enumerate(mixture.datasets)]
    if len(parts) == 1:
        return parts[0]
    lengths = [dataset.tokens / len(dataset.records) for dataset in mixture.datasets]
    shares = [weight / length for weight, length in zip(mixture.weights, lengths, strict=True)]
    return grain.MapDataset.mix(parts, [share / sum(shares) for share in shares])


def _stream(mixture: Mixture, samples: grain.MapDataset, number: int) -> Any:
    """Iterate over packed rows of every n-th sample."""
    names = (*FEATURES, "groups")
    packed = grain_experimental.FirstFitPackIterDataset(
        # Samples are too small for grain's reading threads, which would take five times as long.
        samples[number :: mixture.streams].to_iter_dataset(grain.ReadOptions(num_threads=0)),
        length_struct=dict.fromkeys(names, mixture.sequence_length),
        num_packing_bins=_PACKING_BINS,
        shuffle_bins=False,
    )

    def select(row: dict[str, Any]) -> dict[str, np.ndarray]:
        return {name: row[name] for name in names} | {"segment_ids": row["tokens_segment_ids"]}

    return iter(packed.map(select))
