"""Read PyTorch's zip files of tensors without PyTorch.

Such a file is a zip of uncompressed byte ranges, one per storage, and a pickle that describes
each tensor as a view of a range. Only the pickle is read when a file is opened; a tensor's bytes
are read on request, and compared with the zip's checksum.
"""

import dataclasses
import io
import math
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert import torch_pickle
from convert.byte_source import ByteSource, FileBytes, Stream, read
from convert.errors import ConvertError
from convert.file_kinds import known_kind

STORAGES: dict[str, np.dtype[Any]] = {
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "ShortStorage": np.dtype(np.int16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "BoolStorage": np.dtype(np.bool_),
}
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., name length, extra length
_LARGEST_PICKLE = 1 << 26
_MAX_RANK = 16
# Views of the same bytes could make tensors of any size: all together have at most this many times
# the file's bytes.
_MAX_REPEATS = 16
_SMALL_BYTES = 1 << 22
_BLOCK_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class Storage:
    key: str
    dtype: np.dtype[Any]
    size: int


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still on disk."""

    file: "TorchFile"
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.storage.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored_checksum(self) -> tuple[int, ...]:
        """A key of its content, without reading: the storage's checksum and the view of it."""
        checksum = self.file.entry_of(self.storage).CRC
        return checksum, self.offset, *self.shape, *self.strides

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after another, in the order of its axes."""
        expected = 1
        for n, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if n != 1 and stride != expected:
                return False
            expected *= n
        return True

    def read(self, allocate: Callable[[tuple[int, ...], Any], np.ndarray] = np.empty) -> np.ndarray:
        """Read the tensor into memory, contiguous.

        Args:
          allocate: returns the array that it is read into, from its shape and dtype.

        Raises:
          ConvertError: its bytes are truncated or damaged.
        """
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        whole = allocate(self.shape, self.dtype)
        if self.is_contiguous:
            self.file.read_elements(self.storage, self.offset, whole.reshape(-1))
        else:
            self._read_view(whole)
        return whole

    def _read_view(self, whole: np.ndarray) -> None:
        """Fill an array of the tensor's shape, in blocks along its axis of the largest stride.

        The bytes between a view's elements can be many times its own.
        """
        order = sorted(range(len(self.shape)), key=lambda axis: -self.strides[axis])
        shape, strides = ([x[axis] for axis in order] for x in (self.shape, self.strides))
        target = whole.transpose(order)
        row = _span(shape[1:], strides[1:])
        count = shape[0]  # rows to read at once: all where they overlap
        if row <= strides[0]:
            count = max(1, _BLOCK_BYTES // (strides[0] * self.dtype.itemsize))
        for first in range(0, shape[0], count):
            size = min(count, shape[0] - first)
            flat = np.empty((size - 1) * strides[0] + row, self.dtype)
            self.file.read_elements(self.storage, self.offset + first * strides[0], flat)
            steps = [stride * flat.itemsize for stride in strides]
            rows = np.lib.stride_tricks.as_strided(flat, (size, *shape[1:]), steps)
            target[first : first + size] = rows


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Count the elements from a view's first to its last."""
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


class TorchFile:
    """One `torch.save` file.

    Attributes:
      content: the pickled object, with `LazyTensor` in place of tensors, and `Foreign` for
        objects of training code.
      checksum: of the names, sizes and checksums of all entries, equal for equal content.
      source: the bytes of the file.
      saved_as: the name that the file was saved as, without its suffix.

    Raises:
      ConvertError: the file is missing, truncated or of another format, its entries are not at
        their offsets, or its pickle names a function or class that no checkpoint needs.
    """

    def __init__(self, source: ByteSource | Path, is_checked: bool = True):
        """Args:
        is_checked: compare tensors with the zip's checksums.
        """
        self.source = FileBytes(source) if isinstance(source, Path) else source
        self.name, self._is_checked = self.source.name, is_checked
        try:
            stream = io.BufferedReader(Stream(self.source))
            with zipfile.ZipFile(stream) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError) as error:
            kind = known_kind(self.source, "zip")
            kind = kind or f"is truncated or not a PyTorch zip file ({error}): fetch it again"
            raise ConvertError(f"{self.name} {kind}") from error
        self._entries = {entry.filename: entry for entry in entries}
        self._check_sizes(entries)
        pickles = [n for n in self._entries if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ConvertError(f"{self.name} is not a PyTorch file: it holds no data.pkl")
        self.saved_as = pickles[0].removesuffix("/data.pkl")
        self._offsets = {name: self._data_offset(entry) for name, entry in self._entries.items()}
        self._refuse_big_endian()
        self._lock, self._checked = threading.Lock(), set[str]()
        self._read_bytes = self._tensor_bytes = 0
        self.content = torch_pickle.load(
            self._read_pickle(pickles[0]),
            self.name,
            self._rebuild_tensor,
            self._open_storage,
            20_000 + self.source.size // 64,
        )

    @property
    def size(self) -> int:
        return self.source.size

    @property
    def checksum(self) -> str:
        text = "".join(f"{e.filename} {e.file_size} {e.CRC}\n" for e in self._entries.values())
        return f"{zlib.crc32(text.encode()):08x}"

    def _check_sizes(self, entries: list[zipfile.ZipInfo]) -> None:
        for entry in entries:
            is_plain = entry.compress_type == zipfile.ZIP_STORED
            if not is_plain or entry.file_size != entry.compress_size:
                raise ConvertError(
                    f"{self.name}: {entry.filename!r} is compressed, which PyTorch never does: "
                    "the file is refused"
                )
            if ".." in entry.filename.split("/") or entry.filename.startswith("/"):
                raise ConvertError(
                    f"{self.name}: the name {entry.filename!r} leads out of the archive: the "
                    "file is refused"
                )
        total = sum(entry.file_size for entry in entries)
        if total > self.source.size:
            raise ConvertError(
                f"{self.name}: its entries claim {total} bytes, it has {self.source.size}: it "
                "is truncated or was tampered with"
            )

    def _refuse_big_endian(self) -> None:
        entry = self._entries.get(f"{self.saved_as}/byteorder")
        if entry is not None and entry.file_size < 100:
            order = bytes(read(self.source, self._offsets[entry.filename], entry.file_size))
            if order != b"little":
                raise ConvertError(
                    f"{self.name} was written by a machine of another byte order ({order!r}): "
                    "save it again on a little-endian one"
                )

    def _read_pickle(self, name: str) -> bytes:
        entry = self._entries[name]
        if entry.file_size > _LARGEST_PICKLE:
            raise ConvertError(f"{self.name}: its pickle has {entry.file_size} bytes, too many")
        data = bytes(read(self.source, self._offsets[name], entry.file_size))
        self._check(name, zlib.crc32(data))
        return data

    def _check(self, name: str, checksum: int) -> None:
        if self._is_checked and checksum != self._entries[name].CRC:
            raise ConvertError(
                f"{self.name}: {name} is damaged (its checksum is {checksum:08x}, "
                f"{self._entries[name].CRC:08x} was written): fetch it again"
            )

    def read_elements(self, storage: Storage, first: int, elements: np.ndarray) -> None:
        """Fill a flat array with elements of a storage from `first` on; check the whole storage."""
        name = self.entry_of(storage).filename
        view = memoryview(elements.view(np.uint8).data)
        self.source.read_into(self._offsets[name] + first * storage.dtype.itemsize, view)
        if len(view) == self._entries[name].file_size:
            self._check(name, zlib.crc32(view))
        elif self._is_checked:
            self._check_whole(name)

    def entry_of(self, storage: Storage) -> zipfile.ZipInfo:
        """Return the zip's entry of a storage.

        Raises:
          ConvertError: it is missing or too short.
        """
        name = f"{self.saved_as}/data/{storage.key}"
        entry = self._entries.get(name)
        if entry is None:
            raise ConvertError(f"{self.name}: the storage {name} is missing")
        needed = storage.size * storage.dtype.itemsize
        if entry.file_size < needed:
            raise ConvertError(
                f"{self.name}: the storage {name} holds {entry.file_size} bytes, "
                f"its tensors need {needed}"
            )
        return entry

    def _check_whole(self, name: str) -> None:
        """Check an entry of which only a part is read, once for all of its parts."""
        with self._lock:
            if name in self._checked:
                return
            size, checksum = self._entries[name].file_size, 0
            buffer = memoryview(bytearray(min(size, _BLOCK_BYTES)))
            for start in range(0, size, _BLOCK_BYTES):
                part = buffer[: min(_BLOCK_BYTES, size - start)]
                self.source.read_into(self._offsets[name] + start, part)
                checksum = zlib.crc32(part, checksum)
            self._check(name, checksum)
            self._checked.add(name)

    def _data_offset(self, entry: zipfile.ZipInfo) -> int:
        """Return the offset of an entry's bytes.

        All are checked when a file is opened, so that parts in a wrong order are noticed before
        anything is converted.
        """
        if entry.header_offset + LOCAL_HEADER.size > self.source.size:
            raise ConvertError(f"{self.name} is truncated: fetch it again")
        header = read(self.source, entry.header_offset, LOCAL_HEADER.size)
        signature, name_length, extra_length = LOCAL_HEADER.unpack(header)
        if signature != b"PK\x03\x04":
            raise ConvertError(
                f"{self.name}: {entry.filename!r} is not where the file says: it is damaged, or "
                "its parts are in a wrong order"
            )
        offset = entry.header_offset + LOCAL_HEADER.size + name_length + extra_length
        if offset + entry.file_size > self.source.size:
            raise ConvertError(f"{self.name} is truncated inside {entry.filename!r}")
        return int(offset)

    def _open_storage(self, pid: Any) -> Storage | torch_pickle.Foreign:
        kind, named, key, _, size = pid
        is_storage = kind == "storage" and isinstance(named, torch_pickle.Global)
        if not is_storage or not isinstance(size, int) or not isinstance(key, str):
            raise ConvertError(f"{self.name}: its pickle has an unknown kind of storage")
        dtype = STORAGES.get(named.name)
        if dtype is None:
            return torch_pickle.Foreign(f"{named.module}.{named.name}")
        return Storage(key, dtype, size)

    def _rebuild_tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any
    ) -> LazyTensor | torch_pickle.Foreign:
        if not isinstance(storage, Storage):
            return torch_pickle.Foreign("a tensor of a dtype that is not read")
        if rest[2:] and rest[2]:
            return torch_pickle.Foreign("a tensor that is negated or conjugated when it is read")
        if max(len(shape), len(strides)) > _MAX_RANK:
            raise ConvertError(f"{self.name}: a tensor has {len(shape)} axes")
        numbers = (offset, *shape, *strides)
        if not all(isinstance(n, int) and 0 <= n < 2**63 for n in numbers):
            raise ConvertError(f"{self.name}: a tensor's shape or strides are no sizes")
        if len(shape) != len(strides):
            raise ConvertError(f"{self.name}: a tensor has shape {shape}, strides {strides}")
        span = 0 if 0 in shape else _span(shape, strides)
        if span and offset + span > storage.size:
            last = offset + span - 1
            raise ConvertError(
                f"{self.name}: a tensor {shape} reaches element {last} of a storage "
                f"of {storage.size}"
            )
        tensor = LazyTensor(self, storage, offset, tuple(shape), tuple(strides))
        item = storage.dtype.itemsize
        self._count(math.prod(max(n, 1) for n in shape) * item, span * item)
        return tensor

    def _count(self, tensor: int, span: int) -> None:
        """Bound the bytes of reading all tensors, given the next one's.

        One tensor is at most as large as the file, or small; all together, which may share storages
        or repeat elements, at most `_MAX_REPEATS` times as large.
        """
        self._tensor_bytes += tensor
        self._read_bytes += span
        size = max(self.source.size, _SMALL_BYTES)
        if (
            tensor > size
            or self._tensor_bytes > _MAX_REPEATS * size
            or self._read_bytes > _MAX_REPEATS * self.source.size
        ):
            raise ConvertError(
                f"{self.name}: its tensors claim more than its {self.source.size} bytes"
            )
