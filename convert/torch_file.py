"""Reads and writes PyTorch's zip files of tensors without PyTorch.

Such a file is a zip of uncompressed byte ranges, one per storage, and a pickle that
says which tensor is which range. Only the pickle is read; tensors are views of a
memory map. The unpickler admits what tensors need and nothing else.
"""

import dataclasses
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.errors import ConvertError

_STORAGES: dict[str, np.dtype[Any]] = {
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
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., name length, extra length


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

    def read(self) -> np.ndarray:
        """A read-only view of the file's bytes; pages load as they are touched."""
        flat = self.file.storage(self.storage)
        item = flat.itemsize
        return np.lib.stride_tricks.as_strided(
            flat[self.offset :], self.shape, [s * item for s in self.strides], writeable=False
        )


class TorchFile:
    """One `torch.save` file, mapped.

    Attributes:
      content: the pickled object, with `LazyTensor` in place of tensors.

    Raises:
      ConvertError: the file is missing, truncated, of another format, or its pickle asks
        for anything but tensors and plain containers.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._zip = zipfile.ZipFile(path)
        except FileNotFoundError as error:
            raise ConvertError(f"{path} is missing") from error
        except (zipfile.BadZipFile, ValueError) as error:
            raise ConvertError(
                f"{path} is truncated or not a PyTorch zip file ({error}): fetch it again"
            ) from error
        pickles = [n for n in self._zip.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ConvertError(f"{path} is not a PyTorch file: it holds no data.pkl")
        self._root = pickles[0].removesuffix("data.pkl")
        with self._zip.open(pickles[0]) as stream:
            try:
                self.content = _TensorUnpickler(stream, self).load()
            except ConvertError:
                raise
            except Exception as error:  # a broken pickle can raise anything
                raise ConvertError(f"{path}: its pickle cannot be read ({error})") from error

    def storage(self, storage: _Storage) -> np.ndarray:
        """The elements of a storage as a one-dimensional view of the file."""
        name = f"{self._root}data/{storage.key}"
        try:
            entry = self._zip.getinfo(name)
        except KeyError as error:
            raise ConvertError(f"{self.path}: the storage {name} is missing") from error
        needed = storage.size * storage.dtype.itemsize
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < needed:
            raise ConvertError(
                f"{self.path}: the storage {name} holds {entry.file_size} bytes, "
                f"its tensors need {needed} uncompressed"
            )
        begin = self._data_offset(entry)
        if begin + needed > len(self._map):
            raise ConvertError(f"{self.path} is truncated inside {name}: fetch it again")
        return np.frombuffer(self._map, storage.dtype, storage.size, begin)

    def _data_offset(self, entry: zipfile.ZipInfo) -> int:
        header = self._map[entry.header_offset : entry.header_offset + _LOCAL_HEADER.size]
        if len(header) < _LOCAL_HEADER.size:
            raise ConvertError(f"{self.path} is truncated: fetch it again")
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        if signature != b"PK\x03\x04":
            raise ConvertError(f"{self.path}: the zip entry {entry.filename} is damaged")
        return int(entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length)


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, stream: Any, file: TorchFile):
        super().__init__(stream, encoding="utf-8")
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise ConvertError(
            f"{self._file.path}: its pickle asks for {module}.{name}, which no tensor needs; "
            "the file is refused and nothing of it was run"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(size, int):
            raise ConvertError(f"{self._file.path}: unknown persistent object {kind!r}")
        return _Storage(str(key), dtype, size)

    def _rebuild_tensor(
        self, storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any
    ) -> LazyTensor:
        shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
        if len(shape) != len(strides) or min((offset, *shape, *strides)) < 0:
            raise ConvertError(f"{self._file.path}: a tensor has shape {shape}, strides {strides}")
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if 0 not in shape and last >= storage.size:
            raise ConvertError(
                f"{self._file.path}: a tensor {shape} reaches element {last} of a storage "
                f"of {storage.size}"
            )
        return LazyTensor(self._file, storage, offset, shape, strides)


_ALIGNMENT = 64
_TORCH_STORAGE = {dtype: name for name, dtype in _STORAGES.items()}


def write_torch_file(path: Path, module: dict[str, np.ndarray]) -> None:
    """Writes `{"module": {name: tensor}}` as `torch.save` would, for `torch.load`.

    Raises:
      ConvertError: a dtype that PyTorch has no storage for.
    """
    root = path.name.removesuffix(".pt")
    partial = path.with_name(path.name + ".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, data: bytes | memoryview) -> None:
            entry = zipfile.ZipInfo(f"{root}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.extra = _padding(archive.start_dir, entry.filename)
            archive.writestr(entry, data)

        add("data.pkl", _pickle_module(module))
        add(".format_version", b"1")
        add(".storage_alignment", str(_ALIGNMENT).encode())
        add("byteorder", b"little")
        for key, tensor in enumerate(module.values()):
            contiguous = np.ascontiguousarray(tensor).reshape(-1)
            add(f"data/{key}", contiguous.view(np.uint8).data)
        add("version", b"3\n")
    partial.rename(path)


def _padding(header_offset: int, name: str) -> bytes:
    """A zip extra field that puts the entry's data on a multiple of the alignment."""
    start = header_offset + _LOCAL_HEADER.size + len(name.encode()) + 4
    size = -start % _ALIGNMENT
    return struct.pack("<2sH", b"FB", size) + b"Z" * size


def _pickle_module(module: dict[str, np.ndarray]) -> bytes:
    """Pickle protocol 2, by its opcodes: the classes that it names need not be here."""

    def text(value: str) -> bytes:
        data = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(data)) + data

    def integer(value: int) -> bytes:
        if value < 2**31:
            return pickle.BININT + struct.pack("<i", value)
        data = value.to_bytes(value.bit_length() // 8 + 1, "little")
        return pickle.LONG1 + bytes([len(data)]) + data

    def integers(values: tuple[int, ...]) -> bytes:
        return pickle.MARK + b"".join(map(integer, values)) + pickle.TUPLE

    def tensor(key: int, array: np.ndarray) -> bytes:
        if array.dtype not in _TORCH_STORAGE:
            raise ConvertError(f"PyTorch has no storage for {array.dtype}")
        strides = tuple(int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim))
        storage = _global("torch", _TORCH_STORAGE[array.dtype])
        pid = text("storage") + storage + text(str(key)) + text("cpu") + integer(array.size)
        arguments = (
            (pickle.MARK + pid + pickle.TUPLE + pickle.BINPERSID)
            + integer(0)
            + integers(array.shape)
            + integers(strides)
            + pickle.NEWFALSE
            + (_global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE)
        )
        rebuild = _global("torch._utils", "_rebuild_tensor_v2")
        return rebuild + pickle.MARK + arguments + pickle.TUPLE + pickle.REDUCE

    items = b"".join(text(n) + tensor(k, a) for k, (n, a) in enumerate(module.items()))
    tensors = pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    whole = pickle.EMPTY_DICT + text("module") + tensors + pickle.SETITEM
    return pickle.PROTO + b"\x02" + whole + pickle.STOP


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
