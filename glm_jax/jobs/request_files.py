"""Lines of a file as requests: plain texts, or JSON objects with settings of their own."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm_jax.errors import UserError
from glm_jax.generation.text_request import RequestError, TextRequest
from glm_jax.text_files import check_characters, decode, is_json_lines, parse_json, raw_lines

_FREE = ("id", "metadata")  # fields of any JSON, which answers repeat unchanged


@dataclasses.dataclass(frozen=True)
class Line:
    """One request of a file, or the error of its line.

    Attributes:
      index: of the request, from 0; empty lines do not count.
      number: of the line, from 1.
      id: the request's own id, or the line's number.
      request: None if the line is not a request.
      metadata: the request's own, which its answer repeats; None for none.
    """

    index: int
    number: int
    id: Any
    request: TextRequest | None
    error: str | None = None
    metadata: Any = None


def read_lines(path: Path, defaults: TextRequest) -> Iterator[Line]:
    """Yield the requests of a file.

    Args:
      path: JSON lines if its name ends in .jsonl or .json (then .gz or .zst), otherwise one text
        a line.
      defaults: settings that a line does not have.

    Raises:
      TextFileError: the file cannot be read.
    """
    is_json = is_json_lines(path)
    index = 0
    for number, content in enumerate(raw_lines(path), 1):
        if not content.strip():
            continue
        yield _parse(content, is_json, index, number, defaults)
        index += 1


def read_by_priority(path: Path, defaults: TextRequest) -> Iterator[Line]:
    """Yield the requests of a file as `read_lines`, those of lower priority numbers first.

    The file, which may not fit memory, is read once for each priority, and once before.
    """
    if not is_json_lines(path):
        yield from read_lines(path, defaults)
        return
    priorities = sorted({_priority(line) for line in read_lines(path, defaults)})
    for priority in priorities:
        for line in read_lines(path, defaults):
            if _priority(line) == priority:
                yield line


def _priority(line: Line) -> int:
    return 0 if line.request is None else line.request.priority


def _parse(content: bytes, is_json: bool, index: int, number: int, defaults: TextRequest) -> Line:
    own: dict[str, Any] = {}
    try:
        text = decode(content)
        fields: Any = parse_json(text) if is_json else {"text": text}
        if not isinstance(fields, dict):
            raise RequestError("not a JSON object")
        own = {name: fields.pop(name) for name in _FREE if name in fields}
        if "text" not in fields:
            raise RequestError("the field 'text' is missing")
        request = defaults.with_fields(fields)
        check_characters(request.text)
        return Line(index, number, own.get("id", number), request, None, own.get("metadata"))
    except UserError as error:
        message = str(error)
    return Line(index, number, own.get("id", number), None, message, own.get("metadata"))
