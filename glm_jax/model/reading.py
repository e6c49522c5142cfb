"""Arrays of an Orbax checkpoint, each device's slices read straight to where they stay.

Orbax's own restore copies what it reads twice more, into memory that must be had anew, which
takes several times as long as reading.
"""

import contextlib
import ctypes
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import SingleDeviceSharding

_LINE_BYTES = 64  # at which jax takes an array of numpy as it is
_READS_AT_ONCE = 8
# Of glibc's mallopt, and what they are set back to.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_TRIM_DEFAULT, _MMAP_DEFAULT = 32 << 20, 65536


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that begins on a cache line, which jax takes as it is."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _LINE_BYTES, np.uint8)
    start = -raw.ctypes.data % _LINE_BYTES
    array: np.ndarray = raw[start : start + size].view(dtype).reshape(shape)
    return array


@contextlib.contextmanager
def reusing_memory() -> Iterator[None]:
    """The C library keeps the memory that is freed inside, to use it again: the system would
    have to clear what it gave anew, which takes longer than to read into it."""
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
    """Where an array's slices are read to: [slice's shape], by device."""

    by_device: dict[jax.Device, np.ndarray]


def empty_buffers(leaf: Any, shape: tuple[int, ...] | None = None) -> Buffers:
    """Room for the slices that devices here have of a described array.

    Args:
      shape: of all of it, where that is not the described one's.
    """
    shape = leaf.shape if shape is None else shape
    sharding = leaf.sharding
    by_slice: dict[Any, np.ndarray] = {}
    found = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        key = tuple((part.start, part.stop) for part in index)
        if key not in by_slice:  # what several devices have is read once
            by_slice[key] = aligned_empty(sharding.shard_shape(shape), leaf.dtype)
        found[device] = by_slice[key]
    return Buffers(found)


def read_into(folder: Path, target: dict[str, Any], into: dict[str, Any]) -> None:
    """Reads the arrays of a checkpoint.

    Args:
      folder: of an Orbax checkpoint of zarr arrays in an OCDBT store.
      target: nested dictionaries of `jax.ShapeDtypeStruct` with shardings.
      into: dictionaries alike, of `Buffers`.
    """
    limit = {"limit": _READS_AT_ONCE}
    context = ts.Context({"file_io_concurrency": limit, "cache_pool": {"total_bytes_limit": 0}})
    described = jax.tree_util.tree_leaves_with_path(target)
    opening = [ts.open(_spec(folder, path), open=True, context=context) for path, _ in described]
    writing = []
    for (_, leaf), buffers, store in zip(described, jax.tree.leaves(into), opening, strict=True):
        writing += _start(store.result(), leaf, buffers)
    for written in writing:
        written.result()


def _spec(folder: Path, path: Any) -> dict[str, Any]:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    store = {"driver": "ocdbt", "base": folder.absolute().as_uri(), "path": f"{name}/"}
    return {"driver": "zarr", "kvstore": store}


def _start(store: Any, leaf: Any, buffers: Buffers) -> list[Any]:
    if store.dtype.numpy_dtype != leaf.dtype:
        store = ts.cast(store, ts.dtype(leaf.dtype))
    begun = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        buffer = buffers.by_device[device]
        if id(buffer) not in begun:
            begun[id(buffer)] = ts.array(buffer).write(store[index])
    return list(begun.values())


def placed(leaf: Any, buffers: Buffers, shape: tuple[int, ...], kind: str | None) -> jax.Array:
    """The array that buffers hold, on its devices; CPUs take the buffers as they are.

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
