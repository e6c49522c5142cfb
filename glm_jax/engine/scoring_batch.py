"""Sequences of every length in batches of one shape: several share a row."""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

_MIN_TARGETS = 32


@dataclasses.dataclass(frozen=True)
class ScoredSequence:
    """Tokens, and the targets that are looked up in their scores.

    Attributes:
      tokens, position_ids: int32 [length].
      key_ranges: int32 [length, 4], see `Visibility`.
      indices: int32 [targets], of the tokens whose scores each target is looked up in.
      targets: int32 [targets].
      groups: int32 [targets], the choice that each belongs to.
      adapter: see `Prompt.adapter`.
    """

    tokens: np.ndarray
    position_ids: np.ndarray
    key_ranges: np.ndarray
    indices: np.ndarray
    targets: np.ndarray
    groups: np.ndarray
    adapter: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class ScoringBatch:
    """Rows of sequences.

    Attributes:
      tokens, position_ids: int32 [rows, width].
      key_ranges: int32 [rows, width, 4]; padding sees itself alone.
      adapter_ids: int32 [rows, width].
      indices, targets: int32 [rows, targets].
      slices: of each sequence in it: number, row, first and end of its targets.
      filled: tokens that are no padding.
    """

    tokens: np.ndarray
    position_ids: np.ndarray
    key_ranges: np.ndarray
    adapter_ids: np.ndarray
    indices: np.ndarray
    targets: np.ndarray
    slices: tuple[tuple[int, int, int, int], ...]
    filled: int


def make_batches(
    sequences: Sequence[ScoredSequence],
    width: int,
    rows: int,
    multiple: int = 1,
    max_a_row: int | None = None,
) -> Iterator[ScoringBatch]:
    """Batches of `rows` rows, the longest sequences first; the last batch has fewer.

    Args:
      width: of a row, no less than the longest sequence.
      multiple: the number of rows divides by it.
      max_a_row: maximum number of sequences that share a row.
    """
    bins = _best_fit([len(sequence) for sequence in sequences], width, max_a_row)
    for start in range(0, len(bins), rows):
        some = bins[start : start + rows]
        count = rows
        while count % 2 == 0 and count // 2 >= len(some) and (count // 2) % multiple == 0:
            count //= 2
        yield _fill(sequences, some, width, count)


def _best_fit(lengths: Sequence[int], width: int, max_a_row: int | None = None) -> list[list[int]]:
    """Which sequences share a row: each, longest first, where the least is left over."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # remaining tokens of each row, in order
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        index = bisect.bisect_left(room, (lengths[number], -1))
        if index == len(room):
            bins.append([])
            remaining, row = width, len(bins) - 1
        else:
            remaining, row = room.pop(index)
        bins[row].append(number)
        if len(bins[row]) != max_a_row:
            bisect.insort(room, (remaining - lengths[number], row))
    return bins


def _fill(
    sequences: Sequence[ScoredSequence], bins: list[list[int]], width: int, rows: int
) -> ScoringBatch:
    max_count = max(sum(len(sequences[i].indices) for i in members) for members in bins)
    count = max(_MIN_TARGETS, 1 << (max_count - 1).bit_length())
    if max_count <= width < count:
        count = width
    tokens, positions, adapters = np.zeros((3, rows, width), np.int32)
    indices, targets = np.zeros((2, rows, count), np.int32)
    ranges = np.zeros((rows, width, 4), np.int32)
    ranges[:, :, 0] = np.arange(width)
    ranges[:, :, 1] = np.arange(1, width + 1)
    slices = []
    for row, members in enumerate(bins):
        start = first = 0
        for number in members:
            sequence = sequences[number]
            end, last = start + len(sequence), first + len(sequence.indices)
            tokens[row, start:end] = sequence.tokens
            positions[row, start:end] = sequence.position_ids
            adapters[row, start:end] = sequence.adapter
            ranges[row, start:end] = start + sequence.key_ranges
            indices[row, first:last] = start + sequence.indices
            targets[row, first:last] = sequence.targets
            slices.append((number, row, first, last))
            start, first = end, last
    filled = sum(len(sequences[i]) for members in bins for i in members)
    by_token = (tokens, positions, ranges, adapters)
    return ScoringBatch(*by_token, indices, targets, tuple(slices), filled)
