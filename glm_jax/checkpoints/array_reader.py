"""Arrays of an Orbax checkpoint, each device's slices read straight to where they stay.

Orbax's own restore copies what it reads twice more, into newly allocated memory, which takes
several times as long as reading. TensorStore copies whole chunks, which have left the processor's
cache when they are to be checked: it says only where they are.
"""

import contextlib
import ctypes
import dataclasses
import math
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from glm_jax.checkpoints.checksums import (
    Chunks,
    chunk_checksum,
    chunk_key,
    damaged,
    unreadable,
    whole_slices,
    within,
)
from glm_jax.checkpoints.stored_values import StoredValue, StoredValues
from glm_jax.errors import UserError

_ARRAY = "/.zarray"  # what the store calls an array's description, after its name
_LINE_BYTES = 64  # at which jax takes an array of numpy as it is
_READS_AT_ONCE = 8
# Of glibc's mallopt, and what they are set back to.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_TRIM_DEFAULT, _MMAP_DEFAULT = 32 << 20, 65536


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array that begins on a cache line, which jax takes as it is."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _LINE_BYTES, np.uint8)
    start = -raw.ctypes.data % _LINE_BYTES
    return raw[start : start + size].view(dtype).reshape(shape)


@contextlib.contextmanager
def reusing_memory() -> Iterator[None]:
    """Have the C library reuse the memory that is freed inside: the system would have to clear
    newly allocated memory, which takes longer than to read into it."""
    try:
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, -1)
    except (OSError, AttributeError):  # another C library
        yield
        return
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, _MMAP_DEFAULT)
        library.mallopt(_TRIM_THRESHOLD, _TRIM_DEFAULT)
        library.malloc_trim(0)


@dataclasses.dataclass(frozen=True)
class Buffers:
    """The memory that an array's slices are read into: [slice's shape], by device."""

    by_device: dict[jax.Device, np.ndarray]


def empty_buffers(leaf: Any, shape: tuple[int, ...] | None = None) -> Buffers:
    """Allocate memory for the slices of a described array on this process's devices.

    Args:
      shape: of the whole array; by default the described one's.
    """
    shape = leaf.shape if shape is None else shape
    sharding = leaf.sharding
    by_slice: dict[Any, np.ndarray] = {}
    found = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        key = tuple((part.start, part.stop) for part in index)
        if key not in by_slice:  # a slice that several devices have is read once
            by_slice[key] = aligned_empty(sharding.shard_shape(shape), leaf.dtype)
        found[device] = by_slice[key]
    return Buffers(found)


def read_into(
    folder: Path, target: dict[str, Any], into: dict[str, Any], checksums: dict[str, int]
) -> None:
    """Read the arrays of a checkpoint; each piece of a chunk is checked while it is in the
    processor's cache and others are being read.

    Args:
      folder: of an Orbax checkpoint of zarr arrays in an OCDBT store.
      target: nested dictionaries of `jax.ShapeDtypeStruct` with shardings.
      into: dictionaries alike, of `Buffers`.
      checksums: of the chunks.

    Raises:
      DamageError: a chunk cannot be read, or is not what was written.
    """
    described = jax.tree_util.tree_leaves_with_path(target)
    stores = open_arrays(folder, [array_name(path) for path, _ in described])
    with (
        contextlib.closing(StoredValues(folder)) as values,
        futures.ThreadPoolExecutor(_READS_AT_ONCE) as pool,
    ):
        reads = [
            read
            for (path, leaf), buffers, store in zip(
                described, jax.tree.leaves(into), stores, strict=True
            )
            for read in _chunk_reads(array_name(path), store, leaf, buffers, values, checksums)
        ]
        for _ in pool.map(_ChunkRead.run, reads):
            pass


def array_name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def described_arrays(folder: Path) -> dict[str, Any]:
    """Describe a checkpoint's arrays: nested dictionaries of `jax.ShapeDtypeStruct`.

    By the store's own names: of a damaged checkpoint Orbax's reader leaves threads behind that
    print traces.

    Raises:
      DamageError: there are none, or one cannot be opened.
    """
    try:
        keys = ts.KvStore.open(_store(folder)).result().list().result()
        names = [key.decode().removesuffix(_ARRAY) for key in keys if key.endswith(_ARRAY.encode())]
        described = {
            tuple(name.split(".")): jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype)
            for name, array in zip(names, open_arrays(folder, names), strict=True)
        }
        tree: dict[str, Any] = traverse_util.unflatten_dict(described)
    except UserError:
        raise
    except (ValueError, OSError, TypeError) as error:  # a name may begin with another
        raise unreadable(folder, error) from error
    if not tree:
        raise damaged(folder, "it is no whole checkpoint")
    return tree


def open_arrays(folder: Path, names: list[str]) -> list[Any]:
    """Open the arrays of a checkpoint without reading them.

    Raises:
      DamageError: one cannot be opened.
    """
    opening = [ts.open(_spec(folder, name), open=True) for name in names]
    return [_result(folder, name, store) for name, store in zip(names, opening, strict=True)]


def stored_chunks(store: Any) -> Chunks:
    return Chunks(tuple(store.shape), tuple(store.chunk_layout.read_chunk.shape))


def _spec(folder: Path, name: str) -> dict[str, Any]:
    store = {**_store(folder), "path": f"{name}/"}
    return {"driver": "zarr", "kvstore": store, "fill_missing_data_reads": False}


def _store(folder: Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": folder.absolute().as_uri()}


def _result(folder: Path, name: str, future: Any) -> Any:
    try:
        return future.result()
    except (ValueError, OSError) as error:  # of whatever kind the library finds it to be
        raise unreadable(f"{folder}: {name}", error) from error


def _chunk_reads(
    name: str,
    store: Any,
    leaf: Any,
    buffers: Buffers,
    values: StoredValues,
    checksums: dict[str, int],
) -> Iterator["_ChunkRead"]:
    chunks = stored_chunks(store)
    metadata = store.spec().to_json()["metadata"]
    is_plain = metadata.get("compressor") is None and metadata.get("order", "C") == "C"
    if not is_plain or any(a > b for a, b in zip(chunks.chunk, chunks.shape, strict=True)):
        # What a compressed chunk takes in memory is known when it is too late.
        raise damaged(
            f"{values.folder}: {name}", "it is compressed, or its chunks are larger than it is"
        )
    whole = jax.ShapeDtypeStruct(chunks.chunk, store.dtype.numpy_dtype)
    begun = set()
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        buffer = buffers.by_device[device]
        if buffer.ctypes.data in begun:
            continue
        begun.add(buffer.ctypes.data)
        region = whole_slices(index, leaf.shape)
        for number, place in chunks.overlapping(region):
            key = chunk_key(name, number)
            if key not in checksums:
                raise damaged(f"{values.folder}: {name}", f"its chunk {key} has no checksum")
            value = values.find(key, whole)
            yield _ChunkRead(name, value, whole, place, region, buffer, checksums[key])


@dataclasses.dataclass(frozen=True)
class _ChunkRead:
    """A chunk to read into the part that a buffer, which has a region of the array, has of it.

    Attributes:
      whole: describes the chunk as it is stored, also beyond the end of the array.
    """

    name: str
    value: StoredValue
    whole: jax.ShapeDtypeStruct
    place: tuple[slice, ...]
    region: tuple[slice, ...]
    buffer: np.ndarray
    checksum: int

    def run(self) -> None:
        shared = tuple(
            slice(max(a.start, b.start), min(a.stop, b.stop))
            for a, b in zip(self.place, self.region, strict=True)
        )
        # With `...`, arrays even where they have no axes.
        position: tuple[Any, ...] = (*within(shared, self.region), ...)
        target = self.buffer[position]
        if target.shape == self.whole.shape and target.dtype == self.whole.dtype:
            checksum = self.value.read_into(target)
        else:
            # Of a chunk that belongs to several devices all is read, to be checked.
            whole = np.empty(self.whole.shape, self.whole.dtype)
            self.value.read_into(whole)
            chunk = whole[tuple(slice(part.stop - part.start) for part in self.place)]
            checksum = chunk_checksum(chunk)
            target[...] = chunk[within(shared, self.place)]
        if checksum != self.checksum:
            raise damaged(f"{self.value.folder}: {self.name}", "it is not what was written")


def placed(leaf: Any, buffers: Buffers, shape: tuple[int, ...], kind: str | None) -> jax.Array:
    """Return the array that buffers hold, on its devices; CPUs take the buffers as they are.

    Args:
      leaf: describes how it is sharded.
      kind: of memory.
    """
    pieces = [
        jax.device_put(buffer, SingleDeviceSharding(device, memory_kind=kind))
        for device, buffer in buffers.by_device.items()
    ]
    sharding = leaf.sharding if kind is None else leaf.sharding.with_memory_kind(kind)
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)
