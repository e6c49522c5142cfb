"""Sequences of every length in batches of one shape: several share a row."""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

_LEAST_ASKED = 32


@dataclasses.dataclass(frozen=True)
class ScoredSequence:
    """Tokens, and what is asked of them.

    Attributes:
      tokens, position_ids: int32 [length].
      key_ranges: int32 [length, 4], as of `Visibility`.
      places: int32 [asked], whose scores each target is looked up in.
      targets: int32 [asked].
      groups: int32 [asked], the choice that each belongs to.
    """

    tokens: np.ndarray
    position_ids: np.ndarray
    key_ranges: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of sequences.

    Attributes:
      tokens, position_ids: int32 [rows, width].
      key_ranges: int32 [rows, width, 4]; padding sees itself alone.
      places, targets: int32 [rows, asked].
      slices: of each sequence in it: number, row, first and end of what it asks for.
      filled: tokens that are no padding.
    """

    tokens: np.ndarray
    position_ids: np.ndarray
    key_ranges: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    slices: tuple[tuple[int, int, int, int], ...]
    filled: int


def pack(
    sequences: Sequence[ScoredSequence], width: int, rows: int, multiple: int = 1
) -> Iterator[Batch]:
    """Batches of `rows` rows, the longest sequences first; the last batch has fewer.

    Args:
      width: of a row, no less than the longest sequence.
      multiple: the number of rows divides by it.
    """
    bins = _best_fit([len(sequence) for sequence in sequences], width)
    for start in range(0, len(bins), rows):
        some = bins[start : start + rows]
        count = rows
        while count % 2 == 0 and count // 2 >= len(some) and (count // 2) % multiple == 0:
            count //= 2
        yield _fill(sequences, some, width, count)


def _best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which sequences share a row: each, longest first, where the least is left over."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left of each row, in order
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(room, (lengths[number], -1))
        if place == len(room):
            bins.append([])
            left, row = width, len(bins) - 1
        else:
            left, row = room.pop(place)
        bins[row].append(number)
        bisect.insort(room, (left - lengths[number], row))
    return bins


def _fill(
    sequences: Sequence[ScoredSequence], bins: list[list[int]], width: int, rows: int
) -> Batch:
    most = max(sum(len(sequences[i].places) for i in members) for members in bins)
    asked = max(_LEAST_ASKED, 1 << (most - 1).bit_length())
    if most <= width < asked:
        asked = width
    tokens, positions = np.zeros((2, rows, width), np.int32)
    places, targets = np.zeros((2, rows, asked), np.int32)
    ranges = np.zeros((rows, width, 4), np.int32)
    ranges[:, :, 0] = np.arange(width)
    ranges[:, :, 1] = np.arange(1, width + 1)
    slices = []
    for row, members in enumerate(bins):
        start = first = 0
        for number in members:
            sequence = sequences[number]
            end, last = start + len(sequence), first + len(sequence.places)
            tokens[row, start:end] = sequence.tokens
            positions[row, start:end] = sequence.position_ids
            ranges[row, start:end] = start + sequence.key_ranges
            places[row, first:last] = start + sequence.places
            targets[row, first:last] = sequence.targets
            slices.append((number, row, first, last))
            start, first = end, last
    filled = sum(len(sequences[i]) for members in bins for i in members)
    return Batch(tokens, positions, ranges, places, targets, tuple(slices), filled)
