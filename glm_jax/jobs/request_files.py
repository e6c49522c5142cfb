"""Lines of a file as requests: plain texts, or JSON objects with settings of their own."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm_jax.errors import UserError
from glm_jax.generation.text_request import RequestError, TextRequest
from glm_jax.text_files import check_characters, decode, is_json_lines, parse_json, raw_lines

_FREE = ("id", "metadata")  # what may be anything, and comes back as it is


@dataclasses.dataclass(frozen=True)
class Line:
    """One request of a file, or why it is none.

    Attributes:
      index: of the request, from 0; lines without anything do not count.
      number: of the line, from 1.
      id: the request's own, else the line's number.
      metadata: what comes back as it was given; None for nothing.
    """

    index: int
    number: int
    id: Any
    request: TextRequest | None
    error: str | None = None
    metadata: Any = None


def read_lines(path: Path, defaults: TextRequest) -> Iterator[Line]:
    """The requests of a file, one after another.

    Args:
      path: JSON lines where it ends in .jsonl or .json (and .gz or .zst after that), else a text
        each line.
      defaults: settings of those that say nothing else.

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


def _parse(content: bytes, is_json: bool, index: int, number: int, defaults: TextRequest) -> Line:
    own: dict[str, Any] = {}
    try:
        text = decode(content)
        fields: Any = parse_json(text) if is_json else {"text": text}
        if not isinstance(fields, dict):
            raise RequestError("no JSON object")
        own = {name: fields.pop(name) for name in _FREE if name in fields}
        if "text" not in fields:
            raise RequestError("the field 'text' is missing")
        request = defaults.with_fields(fields)
        check_characters(request.text)
        return Line(index, number, own.get("id", number), request, None, own.get("metadata"))
    except UserError as error:
        message = str(error)
    return Line(index, number, own.get("id", number), None, message, own.get("metadata"))
