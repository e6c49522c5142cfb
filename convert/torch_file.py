"""Reads PyTorch's zip files of tensors without PyTorch.

Such a file is a zip of uncompressed byte ranges, one per storage, and a pickle that
says which tensor is which range. Only the pickle is read; a tensor's bytes are read when
they are asked for, and held against the zip's checksum.
"""

import dataclasses
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert import torch_pickle
from convert.byte_source import ByteSource, FileBytes, Stream, read
from convert.errors import ConvertError

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


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype[Any]
    size: int


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still on disk."""

    file: "TorchFile"
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.storage.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, allocate: Callable[[tuple[int, ...], Any], np.ndarray] = np.empty) -> np.ndarray:
        """The tensor in memory; nothing of it is kept by the file.

        Args:
          allocate: gives an array of a shape and dtype to read into.

        Raises:
          ConvertError: its bytes are not all there, or not those that were written.
        """
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        steps = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        flat = allocate((sum(steps) + 1,), self.dtype)
        self.file.read_elements(self.storage, self.offset, flat)
        strides = [s * flat.itemsize for s in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides)


class TorchFile:
    """One `torch.save` file.

    Attributes:
      content: the pickled object, with `LazyTensor` in place of tensors, and `Foreign` for
        objects of training code.
      checksum: of the names, sizes and checksums of all its entries: two files with the
        same have the same content.

    Raises:
      ConvertError: the file is missing, truncated, of another format, its parts are not
        where it says, or its pickle asks for what no checkpoint needs.
    """

    def __init__(self, source: ByteSource | Path, is_checked: bool = True):
        """Args:
        is_checked: hold tensors against the zip's checksums.
        """
        self._source = FileBytes(source) if isinstance(source, Path) else source
        self.name, self._is_checked = self._source.name, is_checked
        try:
            stream = io.BufferedReader(Stream(self._source))
            with zipfile.ZipFile(stream) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError) as error:
            raise ConvertError(
                f"{self.name} is truncated or not a PyTorch zip file ({error}): fetch it again"
            ) from error
        self._entries = {entry.filename: entry for entry in entries}
        self._check_sizes(entries)
        pickles = [n for n in self._entries if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ConvertError(f"{self.name} is not a PyTorch file: it holds no data.pkl")
        self._root = pickles[0].removesuffix("data.pkl")
        self._places = {name: self._data_offset(entry) for name, entry in self._entries.items()}
        self._tensor_bytes = 0
        self.content = torch_pickle.load(
            self._read_pickle(pickles[0]),
            self.name,
            self._rebuild_tensor,
            self._open_storage,
            20_000 + self._source.size // 64,
        )

    @property
    def size(self) -> int:
        return self._source.size

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
        if total > self._source.size:
            raise ConvertError(
                f"{self.name}: its entries claim {total} bytes, it has {self._source.size}: it "
                "is truncated or was tampered with"
            )

    def _read_pickle(self, name: str) -> bytes:
        entry = self._entries[name]
        if entry.file_size > _LARGEST_PICKLE:
            raise ConvertError(f"{self.name}: its pickle has {entry.file_size} bytes, too many")
        data = bytes(read(self._source, self._places[name], entry.file_size))
        self._check(name, zlib.crc32(data))
        return data

    def _check(self, name: str, found: int) -> None:
        if self._is_checked and found != self._entries[name].CRC:
            raise ConvertError(
                f"{self.name}: {name} is damaged (its checksum is {found:08x}, "
                f"{self._entries[name].CRC:08x} was written): fetch it again"
            )

    def read_elements(self, storage: _Storage, first: int, elements: np.ndarray) -> None:
        """Fills a flat array; elements of a whole storage are held against its checksum."""
        name = f"{self._root}data/{storage.key}"
        entry = self._entries.get(name)
        if entry is None:
            raise ConvertError(f"{self.name}: the storage {name} is missing")
        item = storage.dtype.itemsize
        if entry.file_size < storage.size * item:
            raise ConvertError(
                f"{self.name}: the storage {name} holds {entry.file_size} bytes, "
                f"its tensors need {storage.size * item}"
            )
        view = memoryview(elements.view(np.uint8).data)
        self._source.read_into(self._places[name] + first * item, view)
        if len(view) == entry.file_size:
            self._check(name, zlib.crc32(view))

    def _data_offset(self, entry: zipfile.ZipInfo) -> int:
        """Where an entry's bytes begin. Looked at for all when a file is opened, so that
        parts in a wrong order are found before anything is converted."""
        if entry.header_offset + LOCAL_HEADER.size > self._source.size:
            raise ConvertError(f"{self.name} is truncated: fetch it again")
        header = read(self._source, entry.header_offset, LOCAL_HEADER.size)
        signature, name_length, extra_length = LOCAL_HEADER.unpack(header)
        if signature != b"PK\x03\x04":
            raise ConvertError(
                f"{self.name}: {entry.filename!r} is not where the file says: it is damaged, or "
                "its parts are in a wrong order"
            )
        place = entry.header_offset + LOCAL_HEADER.size + name_length + extra_length
        if place + entry.file_size > self._source.size:
            raise ConvertError(f"{self.name} is truncated inside {entry.filename!r}")
        return int(place)

    def _open_storage(self, pid: Any) -> _Storage:
        kind, named, key, _, size = pid
        dtype = STORAGES.get(named.name) if isinstance(named, torch_pickle.Global) else None
        if kind != "storage" or not isinstance(size, int) or not isinstance(key, str):
            raise ConvertError(f"{self.name}: its pickle has an unknown kind of storage")
        if dtype is None:
            raise ConvertError(f"{self.name}: its pickle has storages of an unknown dtype")
        return _Storage(key, dtype, size)

    def _rebuild_tensor(
        self, storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any
    ) -> LazyTensor:
        shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
        if len(shape) != len(strides) or min((offset, *shape, *strides)) < 0:
            raise ConvertError(f"{self.name}: a tensor has shape {shape}, strides {strides}")
        steps = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
        if 0 not in shape and offset + sum(steps) >= storage.size:
            raise ConvertError(
                f"{self.name}: a tensor {shape} reaches element {offset + sum(steps)} of a storage "
                f"of {storage.size}"
            )
        tensor = LazyTensor(self, storage, offset, shape, strides)
        self._tensor_bytes += 0 if 0 in shape else tensor.nbytes
        if self._tensor_bytes > self._source.size:
            raise ConvertError(
                f"{self.name}: its tensors claim more than its {self._source.size} bytes"
            )
        return tensor
