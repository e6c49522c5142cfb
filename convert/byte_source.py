"""Bytes that can be read at any offset: of a file, of several files as one, of a range."""

import bisect
import io
import os
import threading
from collections.abc import Sequence
from typing import Any, Protocol

from etils import epath

from convert.errors import ConvertError, SourceError


class ByteSource(Protocol):
    """Attributes:
    name: for messages.
    size: in bytes.
    """

    name: str
    size: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from `offset` on; from any thread.

        Raises:
          ConvertError: the source ends before.
        """


def read(source: ByteSource, offset: int, size: int) -> bytearray:
    buffer = bytearray(size)
    source.read_into(offset, memoryview(buffer))
    return buffer


def _check_end(source: ByteSource, needed: int) -> None:
    if needed > source.size:
        raise ConvertError(
            f"{source.name} ends at byte {source.size}, {needed} are needed: it is truncated, "
            "fetch it again"
        )


class FileBytes:
    """A file: a local one, or one behind a URL that etils opens (gs://, s3://)."""

    def __init__(self, path: epath.PathLike):
        self.name = os.fspath(path)
        self._lock = threading.Lock()
        try:
            self._file = epath.Path(path).open("rb")
            self.size = self._file.seek(0, io.SEEK_END)
        except FileNotFoundError as error:
            raise ConvertError(f"{self.name} is missing") from error
        except OSError as error:
            raise ConvertError(f"{self.name} cannot be read: {error.strerror or error}") from error
        self._is_local = "://" not in self.name

    def read_into(self, offset: int, buffer: memoryview) -> None:
        _check_end(self, offset + len(buffer))
        done = 0
        while done < len(buffer):
            try:
                count = self._read_part(offset + done, buffer[done:])
            except OSError as error:
                why = error.strerror or str(error)
                raise SourceError(
                    f"{self.name} cannot be read at byte {offset + done}: {why}; when it can, give "
                    "the same command again"
                ) from error
            if not count:
                raise ConvertError(f"{self.name} became shorter while it was read")
            done += count

    def _read_part(self, offset: int, buffer: memoryview) -> int:
        if self._is_local:
            return os.preadv(self._file.fileno(), [buffer], offset)
        with self._lock:
            self._file.seek(offset)
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class JoinedBytes:
    """Parts one after another, read as one."""

    def __init__(self, name: str, parts: Sequence[ByteSource]):
        self.name, self._parts = name, parts
        self._ends = [0]
        for part in parts:
            self._ends.append(self._ends[-1] + part.size)
        self.size = self._ends[-1]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset + len(buffer) > self.size:
            raise ConvertError(
                f"{self.name} ends at byte {self.size} of its {len(self._parts)} parts, "
                f"{offset + len(buffer)} are needed: the parts after {self._parts[-1].name} "
                "are missing"
            )
        done = 0
        while done < len(buffer):
            index = bisect.bisect_right(self._ends, offset + done) - 1
            count = min(len(buffer) - done, self._ends[index + 1] - offset - done)
            start = offset + done - self._ends[index]
            self._parts[index].read_into(start, buffer[done : done + count])
            done += count


class RangeBytes:
    """A range of another source, such as a file in an archive."""

    def __init__(self, source: ByteSource, name: str, offset: int, size: int):
        self._source, self._offset = source, offset
        self.name, self.size = name, size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        _check_end(self, offset + len(buffer))
        self._source.read_into(self._offset + offset, buffer)


class Stream(io.RawIOBase):
    """A source as a file object, for the standard library's readers of archives."""

    def __init__(self, source: ByteSource):
        self._source, self._position = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}[whence]
        if base + offset < 0:
            raise ValueError("negative seek")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        remaining = max(self._source.size - self._position, 0)
        target = memoryview(buffer).cast("B")[:remaining]
        self._source.read_into(self._position, target)
        self._position += len(target)
        return len(target)
