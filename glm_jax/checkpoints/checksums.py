"""Checksums of stored arrays, chunk by chunk, and of the files around them.

Every part of a model folder, and every folder of adapters, has a `checksums.json`.
"""

import dataclasses
import itertools
import json
import math
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax import files
from glm_jax.checkpoints.summed_read import SUMMED_BYTES, block_sums
from glm_jax.errors import UserError, system_refusal

CHECKSUMS_FILE = "checksums.json"
# Files up to this size are checked as they are opened; what larger ones hold is arrays, whose
# chunks are checked as they are read.
_SMALL_BYTES = 1 << 20
_PIECE_BYTES = 1 << 21
_CHUNK_SUMS = "CRC-32 of a 64-bit sum per 4 KiB"  # how chunks' checksums are computed


class DamageError(UserError):
    """Stored data that is not what was written; the message names the file or the array."""


def chunk_checksum(chunk: np.ndarray) -> int:
    """Return the checksum of an array, which need not be contiguous."""
    checksum = 0
    for index in pieces(chunk.shape, chunk.itemsize):
        piece = np.ascontiguousarray(chunk[(*index, ...)])
        checksum = piece_checksum(piece.reshape(-1).view(np.uint8), checksum)
    return checksum


def piece_checksum(content: np.ndarray, checksum: int, sums: np.ndarray | None = None) -> int:
    """Return the checksum of a chunk up to the end of one of its `pieces`.

    It is the CRC-32 of sums of 64-bit words modulo 2^64, one for each 4 KiB: an eighth of the time
    that a CRC of all bytes takes.

    Args:
      content: [bytes] uint8, contiguous.
      checksum: up to the piece; 0 before the first.
      sums: its `block_sums`, where they are known.
    """
    sums = block_sums(content) if sums is None else sums
    rest = content[len(sums) * SUMMED_BYTES :]
    return zlib.crc32(rest.data, zlib.crc32(sums.data, checksum))


def pieces(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int | slice, ...]]:
    """Cut an array into pieces that are small enough for a processor's cache.

    Returns:
      The index of each piece, in the order of their bytes in a contiguous array.
    """
    sizes = [itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    axis = next((axis for axis, size in enumerate(sizes) if size <= _PIECE_BYTES), None)
    if axis is None:  # no axes
        yield ()
        return
    count = _PIECE_BYTES // max(sizes[axis], 1)
    for index in np.ndindex(shape[:axis]):
        for start in range(0, shape[axis], count):
            yield (*index, slice(start, start + count))


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The regular grid of chunks that an array is stored in.

    Attributes:
      shape: of the array.
      chunk: of a chunk; those at the array's ends may be smaller.
    """

    shape: tuple[int, ...]
    chunk: tuple[int, ...]

    def overlapping(
        self, region: tuple[slice, ...]
    ) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
        """Yield the index and the place in the array of each chunk that a region has a part in."""
        ranges = [
            range(part.start // size, -(-part.stop // size))
            for part, size in zip(region, self.chunk, strict=True)
        ]
        for index in itertools.product(*ranges):
            yield index, self.place(index)

    def place(self, index: tuple[int, ...]) -> tuple[slice, ...]:
        return tuple(
            slice(i * size, min((i + 1) * size, end))
            for i, size, end in zip(index, self.chunk, self.shape, strict=True)
        )


def chunk_key(name: str, index: tuple[int, ...]) -> str:
    return f"{name}/{'.'.join(map(str, index))}"


def array_checksums(name: str, array: Any, chunks: Chunks) -> dict[str, int]:
    """Return the checksums of an array's chunks by `chunk_key`; of a jax array those that this
    process writes. Chunks lie within its shards."""
    if not hasattr(array, "addressable_shards"):
        array = np.asarray(array)
        pieces = [(tuple(slice(0, size) for size in array.shape), array)]
    else:
        pieces = [
            (whole_slices(shard.index, array.shape), np.asarray(shard.data))
            for shard in array.addressable_shards
            if shard.replica_id == 0
        ]
    return {
        chunk_key(name, index): chunk_checksum(piece[*within(place, region), ...])
        for region, piece in pieces
        for index, place in chunks.overlapping(region)
    }


def whole_slices(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Slices with both their ends."""
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def within(place: tuple[slice, ...], region: tuple[slice, ...]) -> tuple[slice, ...]:
    """Return where a place in an array lies in a region of it that contains it."""
    return tuple(
        slice(a.start - b.start, a.stop - b.start) for a, b in zip(place, region, strict=True)
    )


def write_checksums(folder: Path, paths: Iterable[Path], chunks: dict[str, int]) -> None:
    """Write `checksums.json` of a folder.

    Args:
      paths: the folder's files that it lists, which are all there.
      chunks: by `chunk_key`; see `array_checksums`.
    """
    found = {}
    own = folder / CHECKSUMS_FILE  # of an earlier try
    for path in sorted(path for path in paths if path.is_file() and path != own):
        size = path.stat().st_size
        name = path.relative_to(folder).as_posix()
        found[name] = [size, zlib.crc32(path.read_bytes()) if size <= _SMALL_BYTES else None]
    text = json.dumps({"files": found, "chunk_sums": _CHUNK_SUMS, "chunks": chunks}, indent=0)
    files.write_text(folder / CHECKSUMS_FILE, text + "\n")


def checked_files(folder: Path, may_change: tuple[str, ...] = ()) -> dict[str, int]:
    """Check that a folder's files are there and whole, small ones by their checksums.

    Args:
      may_change: files that a user may edit: that they changed is said on stderr.

    Returns:
      The checksums of the arrays' chunks.

    Raises:
      DamageError: a file, or the list of checksums, is missing, has another size or other content.
      UserError: another version wrote the checksums.
      OSError: a file cannot be read.
    """
    try:
        text = (folder / CHECKSUMS_FILE).read_bytes()
    except FileNotFoundError as error:
        raise damaged(folder / CHECKSUMS_FILE, "it is missing") from error
    try:
        content = json.loads(text)
        listed = {str(name): (int(size), crc) for name, (size, crc) in content["files"].items()}
        chunks: dict[str, int] = dict(content["chunks"])
        has_other_sums = bool(chunks) and content.get("chunk_sums") != _CHUNK_SUMS
    except (
        ValueError,
        OverflowError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise damaged(folder / CHECKSUMS_FILE, "it lists no checksums") from error
    if has_other_sums:
        raise UserError(
            f"{folder} was written by another version, whose checksums are computed otherwise: "
            "write it again with this version"
        )
    for name, (size, crc) in listed.items():
        path = folder / name
        if (changed := _change(path, size, crc)) is None:
            continue
        if name not in may_change or not path.exists():
            raise damaged(path, changed)
        print(f"{path} was edited, or is damaged: {changed}", file=sys.stderr)
    return chunks


def _change(path: Path, size: int, crc: int | None) -> str | None:
    """Return how a file differs from what was written; None where it does not."""
    try:
        found = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError, ValueError):  # no name of a file, the last
        return "it is missing"
    if found != size:
        return f"it has {found} bytes of {size}"
    if crc is not None and zlib.crc32(path.read_bytes()) != crc:
        return "it is not what was written"
    return None


def unreadable(what: Any, error: Exception) -> UserError:
    """Return the error to raise where a library cannot read stored data: a DamageError, but
    where the system refused to read it."""
    refused = system_refusal(error, str(what))
    if refused is None or isinstance(error, FileNotFoundError):
        return damaged(what, str(error)[:300] or type(error).__name__)
    return UserError(refused)


def damaged(what: Any, why: str) -> DamageError:
    return DamageError(f"{what} is damaged: {why}; copy the folder again, or write it again")
