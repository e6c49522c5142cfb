"""Reading of users' text: training files, prompts, tasks and data sets.

A file is UTF-8, plain or compressed by gzip or Zstandard, whatever its name. A byte order mark at
its beginning is skipped. A line ends at a line feed, or at a carriage return and a line feed;
form feeds and U+2028 are text.
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

from glm_jax.errors import UserError, parser_refusal

_BOM = b"\xef\xbb\xbf"
_COMPRESSED_SUFFIXES = (".gz", ".zst")
_GZIP = b"\x1f\x8b"
_ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # a frame, or one to skip
# Formats that cannot be read, by their first bytes.
_REFUSED = {
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"\x00\x00\xfe\xff": "UTF-32: save it as UTF-8",
    b"\xfd7zXZ\x00": "compressed by xz: decompress it, or use gzip or zstd",
    b"BZh91AY&SY": "compressed by bzip2: decompress it, or use gzip or zstd",
    b"PK\x03\x04": "a zip archive: extract it",
}
_PEEK_BYTES = max(map(len, _REFUSED))
_CHUNK_BYTES = 1 << 12  # small, as a compressed byte can become 30,000
_MAX_DEPTH = 100  # of JSON, so that a value can be written again without deep recursion
_SURROGATE = re.compile("[\ud800-\udfff]")


class TextFileError(UserError):
    """Text that cannot be read; the message says where and why."""


def is_json_lines(path: Path) -> bool:
    """Return True if a file's name, without .gz or .zst, ends in .jsonl or .json."""
    name = path.with_suffix("") if path.suffix.lower() in _COMPRESSED_SUFFIXES else path
    return name.suffix.lower() in (".jsonl", ".json")


def is_compressed(path: Path) -> bool:
    """Return True if a file is compressed, so that it can be read from its beginning only.

    Raises:
      TextFileError: see `raw_lines`.
    """
    with _reading(path), path.open("rb") as file:
        return _is_compressed(file, path)


def raw_lines(path: Path, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Yield the lines of a file as bytes, without line ends; see `decode`.

    Args:
      start, end: yield the lines that begin in the bytes [start, end) of a plain file; None for
        all to its end.

    Raises:
      TextFileError: the file is missing, a folder, unreadable, in another encoding or damaged;
        of a truncated compressed file the complete lines come first.
    """
    with _reading(path), _opened(path) as stream:
        if start:
            # A line that begins before `start` belongs to the part before.
            stream.seek(start - 1)
            stream.readline()
        offset = stream.tell() if start else 0
        while end is None or offset < end:
            line = stream.readline()
            if not line:
                return
            text = line if offset else line.removeprefix(_BOM)
            yield text[:-1].removesuffix(b"\r") if text.endswith(b"\n") else text
            offset += len(line)


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file, without line ends.

    Raises:
      TextFileError: see `raw_lines` and `decode`; names the line.
    """
    for number, line in enumerate(raw_lines(path), 1):
        try:
            text = decode(line)
        except TextFileError as error:
            raise TextFileError(f"{path}:{number}: {error}") from error
        yield text


def read_text(path: Path) -> str:
    """Read a whole file, with line feeds as line ends.

    Raises:
      TextFileError: see `read_lines`.
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
    """Decode UTF-8.

    Raises:
      TextFileError: the bytes are not UTF-8, or have a NUL, which no text has.
    """
    if b"\0" in content:
        raise TextFileError("a NUL byte: not text, or not UTF-8")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextFileError(f"not UTF-8 at byte {error.start + 1}") from error


def check_characters(value: Any) -> None:
    """Check for unpaired surrogates, which JSON can express ("\\ud83d") and UTF-8 cannot.

    Args:
      value: a string, or a value of `parse_json`.

    Raises:
      TextFileError: a string in it has an unpaired surrogate.
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
    """Read the JSON value of a file.

    Raises:
      TextFileError: see `read_text` and `parse_json`; names the file.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except TextFileError as error:
        raise TextFileError(f"{path}: {error}") from error


def parse_json(text: str) -> Any:
    """Parse a JSON value; NaN and infinities are errors, and nesting is bounded.

    Raises:
      TextFileError: the text is not JSON.
    """
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise TextFileError(f"not JSON: nested more than {_MAX_DEPTH} deep") from None
    except ValueError as error:
        raise TextFileError(f"not JSON: {parser_refusal(error)}") from error
    if text.count("[") + text.count("{") > _MAX_DEPTH:
        _check_depth(value)
    return value


def to_json(value: Any, **options: Any) -> str:
    """Format a value as JSON; numbers that are not finite, which JSON cannot express, become null.

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
        raise ValueError(f"{text} is not a finite number")
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
    """Name the file in errors."""
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
    """Open a file and decompress it."""
    with path.open("rb") as file:
        stream = _decompressed(file, path)
        head = stream.peek(_PEEK_BYTES)[:_PEEK_BYTES]
        for magic, what in _REFUSED.items():
            if head.startswith(magic):
                raise TextFileError(f"{path}: {what}")
        yield stream


def _is_compressed(file: io.BufferedReader, path: Path) -> bool:
    head = file.peek(_PEEK_BYTES)
    if head.startswith(_GZIP) or _ZSTD.match(head):
        return True
    if path.suffix.lower() in _COMPRESSED_SUFFIXES:
        what = "empty" if not head else "not compressed"
        raise TextFileError(f"{path}: {what}, though its name ends in {path.suffix}")
    return False


def _decompressed(file: io.BufferedReader, path: Path) -> Any:
    if not _is_compressed(file, path):
        return file
    if file.peek(_PEEK_BYTES).startswith(_GZIP):
        return gzip.GzipFile(fileobj=file)
    return io.BufferedReader(_Unzstd(file), 1 << 17)


class _Unzstd(io.RawIOBase):
    """A stream of all frames of a Zstandard file, each of which must be complete.

    zstandard's own stream reader ends without an error in a truncated frame, and by default after
    the first frame.
    """

    def __init__(self, file: BinaryIO):
        # Here, so that the module can be used without this package.
        import zstandard

        self._file = file
        self._new_frame = lambda: zstandard.ZstdDecompressor().decompressobj()
        self._damage = zstandard.ZstdError
        self._frame = self._new_frame()
        self._has_begun = False
        self._compressed = b""
        self._decompressed = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decompressed and self._advance():
            pass
        count = min(len(buffer), len(self._decompressed))
        buffer[:count] = self._decompressed[:count]
        self._decompressed = self._decompressed[count:]
        return count

    def _advance(self) -> bool:
        """Decompress the next chunk; return False at the end of the file."""
        chunk = self._compressed or self._file.read(_CHUNK_BYTES)
        if self._frame.eof:
            self._frame = self._new_frame()
            self._has_begun = False
        if not chunk:
            if self._has_begun:
                raise EOFError("the last frame has no end")
            return False
        self._has_begun = True
        try:
            self._decompressed = memoryview(self._frame.decompress(chunk))
        except self._damage as error:
            raise EOFError(str(error)) from error
        self._compressed = self._frame.unused_data if self._frame.eof else b""
        return True
