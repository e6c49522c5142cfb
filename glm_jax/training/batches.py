"""Batches of a run's data on its mesh: each process makes the rows of its devices."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from glm_jax.config import ConfigError
from glm_jax.data import documents, pipeline
from glm_jax.data.objective import ObjectiveConfig
from glm_jax.data.pipeline import Batches, Mixture
from glm_jax.data.records import Dataset, open_dataset
from glm_jax.sharding import activation_sharding, row_shards
from glm_jax.tokenizer import Tokenizer
from glm_jax.training.state import TrainBatch


def open_mixture(
    source: ConfigDict, config: ConfigDict, tokenizer: Tokenizer, rows: int
) -> Mixture:
    """Open the files or prepared folders of a config's `data` or `evaluation`.

    Args:
      source: `config.data` or `config.evaluation`.
      rows: that all micro-batches are multiples of.

    Raises:
      ConfigError, DataError: the config names no data, or data that cannot be used.
    """
    data = config.data
    datasets, weights = _datasets(source, data.sequence_length, tokenizer)
    return Mixture(
        datasets=datasets,
        weights=weights,
        special=tokenizer.special_tokens,
        objective=ObjectiveConfig(**data.objective.to_dict()),
        sequence_length=data.sequence_length,
        rows=rows,
        streams=data.streams or rows,
        seed=config.seed,
    )


def _datasets(
    source: ConfigDict, length: int, tokenizer: Tokenizer
) -> tuple[list[Dataset], list[float]]:
    if source.files:
        files = documents.find_files(source.files)
        if source.kind == "instructions":
            return [documents.tokenize_instructions(files, tokenizer)], [1.0]
        return [documents.tokenize(files, tokenizer, pipeline.window_length(length))], [1.0]
    datasets, weights = [], []
    for part in source.mixture.split(","):
        folder, _, weight = part.strip().rpartition(":")
        try:
            weights.append(float(weight))
        except ValueError as error:
            raise ConfigError(
                f"mixture={source.mixture!r}: {part!r} is not FOLDER:WEIGHT, such as data/en:0.6"
            ) from error
        if not folder or weights[-1] <= 0:
            raise ConfigError(f"mixture={source.mixture!r}: {part!r} needs a folder and a weight")
        datasets.append(open_dataset(Path(folder), tokenizer))
    return datasets, weights


def describe(mixture: Mixture, rows: int) -> str:
    """Describe in a line how often a run of `rows` rows sees its data."""
    length, weights = mixture.sequence_length, mixture.weights
    lines = []
    for dataset, weight in zip(mixture.datasets, weights, strict=True):
        seen = rows * length * weight / sum(weights) / dataset.tokens
        line = f"{dataset.name}: {len(dataset.records)} records, {dataset.tokens} tokens, "
        line += f"each seen about {seen:.2g} times"
        if isinstance(dataset.records, list):
            too_long = sum(len(record.tokens) > length - 3 for record in dataset.records)
            line += f"; {too_long} too long for {length} tokens and cut" if too_long else ""
        lines.append(line)
    return "data: " + "; ".join(lines)


class MeshBatches:
    """Batches on the mesh.

    Attributes:
      groups: names of the kinds of samples by dataset.
    """

    def __init__(self, mixture: Mixture, mesh: Mesh):
        """Open the streams of this process.

        Raises:
          ConfigError: the rows do not divide over the mesh or the streams.
        """
        parts = row_shards(mesh)
        if mixture.rows % parts:
            raise ConfigError(
                f"a micro-batch of {mixture.rows} rows does not divide over the {parts} devices "
                "of the data and fsdp axes; with a batch that grows these are the rows that "
                "data.initial_batch_size, ramp_increment and micro_batch_size have in common"
            )
        if mixture.rows % mixture.streams:
            raise ConfigError(
                f"data.streams={mixture.streams} does not divide a micro-batch of {mixture.rows}"
            )
        self._sharding = activation_sharding(mesh, (None, "batch", "seq"))
        self._rows = mixture.rows
        self._batches = Batches(mixture, self._own_streams(mixture))
        self.groups = pipeline.group_names(mixture.datasets)

    def _own_streams(self, mixture: Mixture) -> Sequence[int]:
        shape = (1, mixture.rows, mixture.sequence_length)
        indices: Any = self._sharding.addressable_devices_indices_map(shape).values()
        bounds = [index[1].indices(mixture.rows)[:2] for index in indices]
        first, last = min(b[0] for b in bounds), max(b[1] for b in bounds)
        each = mixture.rows // mixture.streams
        if first % each or last % each:
            raise ConfigError(
                f"data.streams={mixture.streams}: rows {first} to {last} of this process are not "
                "whole streams; set as many streams as rows"
            )
        return range(first // each, last // each)

    def next(self, accumulation: int, rows: int | None = None) -> TrainBatch:
        """Return the next batch, [accumulation, rows, sequence_length].

        Args:
          rows: of a micro-batch, a multiple of the mixture's; these by default.
        """
        rows = rows or self._rows
        parts = [self._batches.next(rows // self._rows) for _ in range(accumulation)]

        def place(name: str) -> jax.Array:
            local = np.stack([part[name] for part in parts])
            shape = (accumulation, rows, local.shape[2])
            return jax.make_array_from_process_local_data(self._sharding, local, shape)

        return TrainBatch(**{name: place(name) for name in parts[0]})

    def get_state(self) -> dict[str, Any]:
        """Return the state of this process's streams; `processes.gather` joins them."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
          ConfigError: the state has another number of streams.
        """
        try:
            self._batches.set_state(state)
        except KeyError as error:
            raise ConfigError(
                f"the checkpoint has {len(state)} data streams: set data.streams={len(state)}"
            ) from error
