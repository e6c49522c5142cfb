"""Examples of a task: lines of a file as token ids, each checked.

Files are the original's JSON lines: `inputs`, `choices`, `targets` as ids, or the same with
`_pretokenized` as texts, and `label`; a language-modelling file is one text, or, in a file
named .jsonl, a document each line: `text`, or its ids there and it as `text_pretokenized`.

Of words such as [MASK] and <eop> the masks of an input are special tokens; all others are text.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from glm_jax.errors import UserError, shown
from glm_jax.evaluation.task_config import TaskConfig
from glm_jax.generation.blank_filling import TextCodec
from glm_jax.text_files import (
    TextFileError,
    check_characters,
    decode,
    parse_json,
    raw_lines,
    read_text,
)
from glm_jax.tokenizer import MASK_WORDS


class DatasetError(UserError):
    """A data file that cannot be used: FILE:LINE: field: why."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A question.

    Attributes:
      context: token ids, a mask among them or not.
      choices: of which one is right.
      label: which.
      targets: right answers of a generation task.
      fields: the whole line.
    """

    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...] = ()
    label: int = -1
    targets: tuple[tuple[int, ...], ...] = ()
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Document:
    """A text to predict.

    Attributes:
      words: parts between single blanks.
      utf8_bytes: of the text.
      fields: the whole line.
    """

    tokens: tuple[int, ...]
    words: int
    utf8_bytes: int
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Why an example that was read is none for its task; None where it is one.
Complaint = Callable[[Any], str | None]


def read_items(
    path: Path,
    config: TaskConfig,
    tokenizer: TextCodec,
    vocab_size: int,
    complain: Complaint = lambda _: None,
) -> list[Any]:
    """Return all examples of a file, or, of a language-modelling task, its documents.

    Raises:
      DatasetError: the first line that is none, or a file without any.
    """
    items = []
    for item in checked_items(path, config, tokenizer, vocab_size, complain):
        if isinstance(item, DatasetError):
            raise item
        items.append(item)
    return items


def checked_items(
    path: Path,
    config: TaskConfig,
    tokenizer: TextCodec,
    vocab_size: int,
    complain: Complaint = lambda _: None,
) -> Iterator[Example | Document | DatasetError]:
    """Yield what `read_items` gives, and in its place what is wrong with a line that is none."""
    make = _document if config.type == "lm" else _example
    is_text = config.type == "lm" and ".jsonl" not in path.suffixes[-2:]
    count = 0
    for where, line in _text(path) if is_text else _lines(path):
        if isinstance(line, DatasetError):
            count += 1
            yield line
            continue
        item: Example | Document | DatasetError | None
        try:
            item = make(_Fields(line, config.no_tokenized, tokenizer, vocab_size), config)
            complaint = None if item is None else complain(item)
            if complaint is not None:
                raise DatasetError(complaint)
        except DatasetError as error:
            item = DatasetError(f"{where}: {error}")
        if item is not None:
            count += 1
            yield item
    if not count:
        yield DatasetError(f"{path}: holds nothing")


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the position and content of each line, or the error of it."""
    try:
        for number, content in enumerate(raw_lines(path), 1):
            if not content.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield where, _object(content)
            except UserError as error:
                yield where, DatasetError(f"{where}: {error}")
    except TextFileError as error:
        yield str(path), DatasetError(str(error))


def _object(content: bytes) -> dict[str, Any]:
    line = parse_json(decode(content))
    if not isinstance(line, dict):
        raise DatasetError("no JSON object")
    for name, value in line.items():
        try:
            check_characters([name, value])
        except TextFileError as error:
            raise DatasetError(f"{shown(name)}: {error}") from error
    return line


def _example(reader: "_Fields", config: TaskConfig) -> Example:
    line = reader.line
    context = reader.ids("inputs", MASK_WORDS)
    special = reader.tokenizer.special_tokens
    if config.unidirectional and {special.mask, special.smask, special.gmask} & set(context):
        raise DatasetError("inputs: a mask in a context that is seen from left to right")
    choices: tuple[tuple[int, ...], ...] = ()
    targets: tuple[tuple[int, ...], ...] = ()
    label = -1
    if config.type == "mul" or "choices" in line or "choices_pretokenized" in line:
        choices = reader.lists("choices")
        if not choices:
            raise DatasetError("choices: there is none")
        if not all(choices):
            raise DatasetError(f"choices[{choices.index(())}]: empty: it would be the likeliest")
        label = line.get("label")  # type: ignore[assignment]
        if isinstance(label, bool) or not isinstance(label, int):
            raise DatasetError(
                f"label: expected the number of the right choice, got {shown(label)}"
            )
        if not 0 <= label < len(choices):
            raise DatasetError(f"label: {shown(label)}, and there are {len(choices)} choices")
        if sum(map(len, choices)) + 2 >= config.max_seq_length:
            raise DatasetError(
                f"choices: {sum(map(len, choices))} tokens are past max_seq_length="
                f"{config.max_seq_length}"
            )
    if config.type == "gen":
        targets = reader.lists("targets")
        if not targets:
            raise DatasetError("targets: there is none")
    return Example(context, choices, label, targets, line)


@dataclasses.dataclass(frozen=True)
class _Fields:
    """Reads token ids of a line, from its ids or its texts."""

    line: Mapping[str, Any]
    texts_alone: bool
    tokenizer: TextCodec
    vocab_size: int

    def _find(self, name: str) -> tuple[str, Any]:
        text = f"{name}_pretokenized"
        if name in self.line and not (self.texts_alone and text in self.line):
            return name, self.line[name]
        if text in self.line:
            return text, self.line[text]
        raise DatasetError(f"{name}: missing, and so is {text}")

    def ids(self, name: str, control_words: tuple[str, ...] = ()) -> tuple[int, ...]:
        """Of a text or list of ids; for `control_words` see `Tokenizer.encode`."""
        source, value = self._find(name)
        return self._of(source, value, control_words)

    def lists(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Of a list of those."""
        source, value = self._find(name)
        is_ids = isinstance(value, list) and value and not isinstance(value[0], (list, str))
        if name == "targets" and (is_ids or isinstance(value, str)):
            value = [value]  # one answer, not a list of them
        if not isinstance(value, list):
            raise DatasetError(f"{source}: expected a list, got {shown(value)}")
        return tuple(self._of(f"{source}[{i}]", item) for i, item in enumerate(value))

    def _of(self, name: str, value: Any, control_words: tuple[str, ...] = ()) -> tuple[int, ...]:
        if isinstance(value, str):
            return tuple(self.tokenizer.encode(value, control_words))
        if not isinstance(value, list):
            raise DatasetError(f"{name}: {shown(value)} is neither a text nor a list of ids")
        for token in value:
            if isinstance(token, bool) or not isinstance(token, int):
                raise DatasetError(f"{name}: {shown(token)} is no id")
            if not 0 <= token < self.vocab_size:
                raise DatasetError(f"{name}: id {shown(token)} is not in the vocabulary")
        return tuple(value)


def _text(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield a file that is one text, as a line of it."""
    try:
        text = read_text(path)
    except TextFileError as error:
        yield str(path), DatasetError(str(error))
        return
    if text.strip():
        yield str(path), {"text": text}


def _document(reader: "_Fields", _: TaskConfig) -> Document | None:
    """None for a text of no tokens."""
    line = reader.line
    text = line.get("text_pretokenized", line.get("text"))
    if not isinstance(text, str):
        raise DatasetError("text_pretokenized: missing: the text that the ids are of")
    tokens = reader.ids("text")
    words, size = len(text.strip().split(" ")), len(text.encode("utf-8"))
    return Document(tokens, words, size, line) if tokens else None
