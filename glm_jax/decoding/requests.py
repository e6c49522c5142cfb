"""Lines of a file as requests: plain texts, or JSON objects with settings of their own."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_jax.decoding.beams import BeamSearch
from glm_jax.decoding.sampling import Sampling
from glm_jax.errors import UserError
from glm_jax.text_files import check_characters, decode, is_json_lines, parse_json, raw_lines

_KINDS: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "repetition_penalty": (int, float),
    "no_repeat_ngram": (int,),
    "min_tokens": (int,),
    "max_tokens": (int,),
    "banned_tokens": (list,),
    "banned_texts": (list,),
    "num_beams": (int,),
    "length_penalty": (int, float),
    "seed": (int,),
    "log_probabilities": (bool,),
    "unidirectional": (bool,),
}
_FREE = ("id", "metadata")  # what may be anything, and comes back as it is


class RequestError(UserError):
    """A line that is no request; the message names the field."""


@dataclasses.dataclass(frozen=True)
class TextRequest:
    """A text with blanks and how to fill them.

    Attributes:
      max_tokens: of each blank; None for as many as there is room for.
      banned_texts: that come in no answer.
      num_beams: above 1 searches for the best answers, with length_penalty, no_repeat_ngram,
        min_tokens and max_tokens, and takes no other setting.
      seed: of sampling; None for one made of the job's and the request's place in it.
      log_probabilities: of the generated tokens, in the answer.
      unidirectional: the text, without masks, is seen from left to right.
    """

    text: str = ""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    min_tokens: int = 0
    max_tokens: int | None = None
    banned_tokens: tuple[int, ...] = ()
    banned_texts: tuple[str, ...] = ()
    num_beams: int = 1
    length_penalty: float = 1.0
    seed: int | None = None
    log_probabilities: bool = False
    unidirectional: bool = False

    def choice(self, encode: Callable[[str], Sequence[int]]) -> Sampling | BeamSearch:
        """How tokens are chosen.

        Args:
          encode: a tokenizer's.

        Raises:
          SamplingError: settings out of range.
          RequestError: beams beside what they do not take.
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
        allowed = {"text", "num_beams", "length_penalty", "no_repeat_ngram", "min_tokens"}
        allowed |= {"max_tokens", "seed", "unidirectional"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in allowed and value != field.default:
                raise RequestError(
                    f"{field.name}={value} beside num_beams={self.num_beams}: a search for the "
                    "best answers takes no such setting"
                )

    def with_fields(self, fields: Mapping[str, Any]) -> "TextRequest":
        """The same with some settings replaced.

        Raises:
          RequestError: an unknown field, or a value of the wrong kind.
        """
        for name, value in fields.items():
            if name not in _KINDS:
                raise RequestError(f"unknown field {name!r}; what is yours goes under 'metadata'")
            is_bool = isinstance(value, bool)
            if not isinstance(value, _KINDS[name]) or is_bool != (bool in _KINDS[name]):
                wanted = " or ".join(kind.__name__ for kind in _KINDS[name])
                raise RequestError(f"{name}={value!r}: {wanted} is due")
        changes: dict[str, Any] = {
            name: _KINDS[name][-1](value) if float in _KINDS[name] else value
            for name, value in fields.items()
        }
        changes = {n: tuple(v) if isinstance(v, list) else v for n, v in changes.items()}
        _check_items(changes)
        return dataclasses.replace(self, **changes)


def _check_items(fields: Mapping[str, Any]) -> None:
    for name, kind in (("banned_tokens", int), ("banned_texts", str)):
        for item in fields.get(name, ()):
            if not isinstance(item, kind) or isinstance(item, bool) or item == "":
                raise RequestError(f"{name} holds {item!r}: {kind.__name__} is due")
    seed = fields.get("seed")
    if seed is not None and not 0 <= seed < 2**32:
        raise RequestError(f"seed={seed}: from 0 to 2**32 - 1")
    if fields.get("max_tokens", 1) < 1:
        raise RequestError(f"max_tokens={fields['max_tokens']}: at least 1")


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
