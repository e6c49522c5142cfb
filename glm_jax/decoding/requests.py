"""Lines of a file as requests: plain texts, or JSON objects with settings of their own."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_jax.decoding.beams import BeamSearch
from glm_jax.decoding.sampling import Sampling
from glm_jax.decoding.settings import SETTINGS, GenerationSettings, Setting
from glm_jax.errors import UserError, shown
from glm_jax.text_files import check_characters, decode, is_json_lines, parse_json, raw_lines

_FIELDS = SETTINGS | {"text": Setting(str, "", 0, 0, "with blanks")}
_FREE = ("id", "metadata")  # what may be anything, and comes back as it is


class RequestError(UserError):
    """A line that is no request; the message names the field."""


@dataclasses.dataclass(frozen=True)
class TextRequest(GenerationSettings):
    """A text with blanks and how to fill them."""

    text: str = ""

    def choice(self, encode: Callable[[str], Sequence[int]]) -> Sampling | BeamSearch:
        """How tokens are chosen.

        Args:
          encode: a tokenizer's.

        Raises:
          SamplingError: a banned text that is no token.
          RequestError: beams beside what they do not take.
          UserError: a banned text that the tokenizer cannot encode.
        """
        if self.num_beams != 1:
            self._check_beams()
            return BeamSearch(
                self.num_beams, self.length_penalty, self.no_repeat_ngram, self.min_tokens
            )
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram=self.no_repeat_ngram,
            min_tokens=self.min_tokens,
            banned_tokens=self.banned_tokens,
            banned_sequences=tuple(tuple(encode(text)) for text in self.banned_texts),
        )

    def _check_beams(self) -> None:
        for name, setting in SETTINGS.items():
            value = getattr(self, name)
            if not setting.is_for_search and value != setting.default:
                raise RequestError(
                    f"{name}={value} beside num_beams={self.num_beams}: a search for the "
                    "best answers takes no such setting"
                )

    def with_fields(self, fields: Mapping[str, Any]) -> "TextRequest":
        """The same with some settings replaced.

        Raises:
          RequestError: an unknown field.
          SamplingError: a value of another type, or out of range.
        """
        changes = {}
        for name, value in fields.items():
            if name not in _FIELDS:
                raise RequestError(
                    f"unknown field {shown(name)}; what is yours goes under 'metadata'"
                )
            changes[name] = _FIELDS[name].checked(name, value)
        return dataclasses.replace(self, **changes)


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
    given: dict[str, Any] = {}
    try:
        text = decode(content)
        fields: Any = parse_json(text) if is_json else {"text": text}
        if not isinstance(fields, dict):
            raise RequestError("no JSON object")
        given = {name: fields.pop(name) for name in _FREE if name in fields}
        if "text" not in fields:
            raise RequestError("the field 'text' is missing")
        request = defaults.with_fields(fields)
        check_characters(request.text)
        return Line(index, number, given.get("id", number), request, None, given.get("metadata"))
    except UserError as error:
        message = str(error)
    return Line(index, number, given.get("id", number), None, message, given.get("metadata"))
