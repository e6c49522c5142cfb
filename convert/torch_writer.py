"""Write PyTorch's zip files of tensors without PyTorch, tensor by tensor."""

import contextlib
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from convert.errors import ConvertError
from convert.torch_file import LOCAL_HEADER, STORAGES
from glm_jax.files import replacing

_ALIGNMENT = 64
_TORCH_STORAGE = {dtype: name for name, dtype in STORAGES.items()}


class TorchWriter:
    """A `torch.save` file of `{"module": {name: tensor}}`, for `torch.load`.

    A context manager: at its end the file is whole, or after an error does not exist.

    Raises:
      ConvertError: PyTorch has no storage of a dtype.
    """

    def __init__(self, path: Path, module: Mapping[str, tuple[tuple[int, ...], Any]]):
        """Args:
        module: shape and dtype of each tensor, in the order of writing.
        """
        self._root = path.name.removesuffix(".pt")
        self._remaining = list(module.items())
        self._written = 0
        pickled = _pickle_module(module)
        self._contexts = contextlib.ExitStack()
        partial = self._contexts.enter_context(replacing(path))
        self._archive = zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED)
        self._contexts.push(self._close)
        self._add("data.pkl", pickled)
        self._add(".format_version", b"1")
        self._add(".storage_alignment", str(_ALIGNMENT).encode())
        self._add("byteorder", b"little")

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Write the next tensor."""
        expected, (shape, dtype) = self._remaining.pop(0)
        if (name, tensor.shape, tensor.dtype) != (expected, shape, np.dtype(dtype)):
            raise ValueError(f"{name} {tensor.shape} {tensor.dtype}: {expected} was announced")
        contiguous = np.ascontiguousarray(tensor).reshape(-1)
        self._add(f"data/{self._written}", contiguous.view(np.uint8).data)
        self._written += 1

    def __enter__(self) -> "TorchWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._contexts.__exit__(kind, error, trace)

    def _close(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._remaining:
            raise ValueError(f"{self._remaining[0][0]} was announced and not written")
        if kind is None:
            self._add("version", b"3\n")
        self._archive.close()

    def _add(self, name: str, data: bytes | memoryview) -> None:
        entry = zipfile.ZipInfo(f"{self._root}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
        entry.extra = _padding(self._archive.start_dir, entry.filename)
        self._archive.writestr(entry, data)


def _padding(header_offset: int, name: str) -> bytes:
    """Return a zip extra field that aligns the entry's data."""
    start = header_offset + LOCAL_HEADER.size + len(name.encode()) + 4
    size = -start % _ALIGNMENT
    return struct.pack("<2sH", b"FB", size) + b"Z" * size


def _pickle_module(module: Mapping[str, tuple[tuple[int, ...], Any]]) -> bytes:
    """Pickle with protocol 2, by opcodes: the classes that it names need not be installed."""

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

    def tensor(key: int, shape: tuple[int, ...], dtype: Any) -> bytes:
        dtype = np.dtype(dtype)
        if dtype not in _TORCH_STORAGE:
            raise ConvertError(f"PyTorch has no storage for {dtype}")
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        storage = _global("torch", _TORCH_STORAGE[dtype])
        pid = text("storage") + storage + text(str(key)) + text("cpu") + integer(math.prod(shape))
        arguments = (
            (pickle.MARK + pid + pickle.TUPLE + pickle.BINPERSID)
            + integer(0)
            + integers(shape)
            + integers(strides)
            + pickle.NEWFALSE
            + (_global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE)
        )
        rebuild = _global("torch._utils", "_rebuild_tensor_v2")
        return rebuild + pickle.MARK + arguments + pickle.TUPLE + pickle.REDUCE

    items = b"".join(text(n) + tensor(k, *a) for k, (n, a) in enumerate(module.items()))
    tensors = pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    whole = pickle.EMPTY_DICT + text("module") + tensors + pickle.SETITEM
    return pickle.PROTO + b"\x02" + whole + pickle.STOP


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
