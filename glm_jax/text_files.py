"""How text of users is read: training files, prompts, tasks and data sets all come in here.

A file is UTF-8, plain or packed by gzip or Zstandard, whatever its name says. A byte order mark
at its beginning is no part of it. A line ends at a line feed, or a carriage return and a line
feed, and nowhere else: form feeds and U+2028 belong to the text.
"""

import contextlib
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from glm_jax.errors import UserError

_BOM = b"\xef\xbb\xbf"
_PACKED_SUFFIXES = (".gz", ".zst")
_GZIP = b"\x1f\x8b"
_ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # a frame, or one to skip
# What a file is that begins so, and cannot be read.
_REFUSED = {
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"\x00\x00\xfe\xff": "UTF-32: save it as UTF-8",
    b"\xfd7zXZ\x00": "packed by xz: unpack it, or pack it by gzip or zstd",
    b"BZh91AY&SY": "packed by bzip2: unpack it, or pack it by gzip or zstd",
    b"PK\x03\x04": "a zip archive: unpack it",
}
_PEEKED = max(map(len, _REFUSED))
_FED_BYTES = 1 << 12  # a packed byte can become 30,000: what is unpacked at once stays small
_MAX_DEPTH = 100  # of JSON: what was read can be written again, at whatever depth of calls
_SURROGATE = re.compile("[\ud800-\udfff]")


class TextFileError(UserError):
    """Text that cannot be read: says where and why."""


def is_json_lines(path: Path) -> bool:
    """Whether a file's name, without .gz or .zst, ends in .jsonl or .json."""
    name = path.with_suffix("") if path.suffix.lower() in _PACKED_SUFFIXES else path
    return name.suffix.lower() in (".jsonl", ".json")


def is_packed(path: Path) -> bool:
    """Whether a file is packed by gzip or Zstandard: such a file is read from its beginning.

    Raises:
      TextFileError: as `raw_lines`.
    """
    with _reading(path), path.open("rb") as file:
        return _is_packed(file, path)


def raw_lines(path: Path, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The lines of a file, without their ends, as bytes; `decode` makes text of them.

    Args:
      start, end: only lines that begin in these bytes, [start, end), of a file that is not
        packed; to its end by default.

    Raises:
      TextFileError: the file is missing, a folder, unreadable, in another encoding or damaged;
        a packed one that was cut gives its whole lines first.
    """
    with _reading(path), _opened(path) as stream:
        if start:
            # A line that begins before `start` belongs to the bytes before.
            stream.seek(start - 1)
            stream.readline()
        at = stream.tell() if start else 0
        while end is None or at < end:
            line = stream.readline()
            if not line:
                return
            text = line if at else line.removeprefix(_BOM)
            yield text[:-1].removesuffix(b"\r") if text.endswith(b"\n") else text
            at += len(line)


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a file, without their ends.

    Raises:
      TextFileError: as `raw_lines` and `decode`, with the line's number.
    """
    for number, line in enumerate(raw_lines(path), 1):
        try:
            text = decode(line)
        except TextFileError as error:
            raise TextFileError(f"{path}:{number}: {error}") from error
        yield text


def read_text(path: Path) -> str:
    """All of a file; its lines end at line feeds.

    Raises:
      TextFileError: as `read_lines`.
    """
    with _reading(path), _opened(path) as stream:
        content = stream.read().removeprefix(_BOM)
    try:
        return decode(content).replace("\r\n", "\n")
    except TextFileError:
        for number, line in enumerate(content.split(b"\n"), 1):
            try:
                decode(line)
            except TextFileError as error:
                raise TextFileError(f"{path}:{number}: {error}") from error
        raise


def decode(content: bytes) -> str:
    """UTF-8 as text.

    Raises:
      TextFileError: it is not UTF-8, or has a NUL byte, which no text has.
    """
    if b"\0" in content:
        raise TextFileError("a NUL byte: not text, or not UTF-8")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextFileError(f"not UTF-8 at byte {error.start + 1}") from error


def check_characters(value: Any) -> None:
    """JSON can name halves of characters ("\\ud83d"), which no UTF-8 holds.

    Args:
      value: a text, or what `parse_json` returned.

    Raises:
      TextFileError: a text in it has such a half.
    """
    if isinstance(value, str):
        half = _SURROGATE.search(value)
        if half is not None:
            code = f"\\u{ord(half[0]):04x}"
            raise TextFileError(f"{code} at character {half.start() + 1} is half of a character")
    elif isinstance(value, (list, dict)):
        for item in value:
            check_characters(item)
        if isinstance(value, dict):
            check_characters(list(value.values()))


def read_json(path: Path) -> Any:
    """The one JSON value of a file; see `parse_json`.

    Raises:
      TextFileError: as `read_text` and `parse_json`, with the file.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except TextFileError as error:
        raise TextFileError(f"{path}: {error}") from error


def parse_json(text: str) -> Any:
    """A JSON value; NaN and infinities are none, and nesting is bounded.

    Raises:
      TextFileError: it is not JSON.
    """
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise TextFileError(f"not JSON: nested more than {_MAX_DEPTH} deep") from None
    except ValueError as error:
        raise TextFileError(f"not JSON: {error}") from error
    if text.count("[") + text.count("{") > _MAX_DEPTH:
        _check_depth(value)
    return value


def to_json(value: Any, **options: Any) -> str:
    """A value as JSON; numbers that are not finite, which JSON has not, become null.

    Args:
      options: of `json.dumps`.
    """
    return json.dumps(_without_infinities(value), allow_nan=False, **options)


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_infinities(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        nested = [item for item in level if isinstance(item, (dict, list))]
        level = [x for n in nested for x in (n.values() if isinstance(n, dict) else n)]
        if not level:
            return
    if any(isinstance(item, (dict, list)) for item in level):
        raise TextFileError(f"not JSON: nested more than {_MAX_DEPTH} deep")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Names the file in what goes wrong."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TextFileError(
            f"{path}: cannot be read to its end: cut off or damaged: {error}"
        ) from error
    except OSError as error:
        raise TextFileError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise TextFileError(f"{path!r}: {error}") from error  # a NUL in a name


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file unpacked."""
    with path.open("rb") as file:
        stream = _unpacked(file, path)
        head = stream.peek(_PEEKED)[:_PEEKED]
        for magic, what in _REFUSED.items():
            if head.startswith(magic):
                raise TextFileError(f"{path}: {what}")
        yield stream


def _is_packed(file: io.BufferedReader, path: Path) -> bool:
    head = file.peek(_PEEKED)
    if head.startswith(_GZIP) or _ZSTD.match(head):
        return True
    if path.suffix.lower() in _PACKED_SUFFIXES:
        what = "empty" if not head else "not packed"
        raise TextFileError(f"{path}: {what}, though its name ends in {path.suffix}")
    return False


def _unpacked(file: io.BufferedReader, path: Path) -> Any:
    if not _is_packed(file, path):
        return file
    if file.peek(_PEEKED).startswith(_GZIP):
        return gzip.GzipFile(fileobj=file)
    return io.BufferedReader(_Unzstd(file), 1 << 17)


class _Unzstd(io.RawIOBase):
    """All frames of a file, each of which must end.

    zstandard's own stream reader ends without a word where a frame was cut, and by default
    after the first frame.
    """

    def __init__(self, file: BinaryIO):
        # Here, since all else is of use where an environment lacks the package.
        import zstandard

        self._file = file
        self._new_frame = lambda: zstandard.ZstdDecompressor().decompressobj()
        self._damage = zstandard.ZstdError
        self._frame = self._new_frame()
        self._has_begun = False
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked and self._advance():
            pass
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count

    def _advance(self) -> bool:
        """Unpacks some more; False at the end of the file."""
        packed = self._packed or self._file.read(_FED_BYTES)
        if self._frame.eof:
            self._frame = self._new_frame()
            self._has_begun = False
        if not packed:
            if self._has_begun:
                raise EOFError("the last frame has no end")
            return False
        self._has_begun = True
        try:
            self._unpacked = memoryview(self._frame.decompress(packed))
        except self._damage as error:
            raise EOFError(str(error)) from error
        self._packed = self._frame.unused_data if self._frame.eof else b""
        return True
