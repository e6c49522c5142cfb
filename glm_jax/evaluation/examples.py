"""What a task asks: lines of a file as token ids, each checked.

Files are the original's JSON lines: `inputs`, `choices`, `targets` as ids, or the same with
`_pretokenized` as texts, and `label`; a language-modelling file is one text, or, in a file
named .jsonl, a document each line: `text`, or its ids there and it as `text_pretokenized`.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glm_jax.decoding.blank_filling import TextCodec
from glm_jax.errors import UserError
from glm_jax.evaluation.task_config import TaskConfig


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
      fields: the whole line; nothing of a file that is one text.
    """

    tokens: tuple[int, ...]
    words: int
    utf8_bytes: int
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_examples(
    path: Path, config: TaskConfig, tokenizer: TextCodec, vocab_size: int
) -> list[Example]:
    """All examples of a file.

    Raises:
      DatasetError: the first line that is none, or a file without any.
    """
    return _all_or_raise(path, _examples(path, config, tokenizer, vocab_size))


def read_documents(
    path: Path, config: TaskConfig, tokenizer: TextCodec, vocab_size: int
) -> list[Document]:
    """All documents of a file.

    Raises:
      DatasetError: the first line that is none, or a file without any.
    """
    return _all_or_raise(path, _documents(path, config, tokenizer, vocab_size))


def problems(
    path: Path, config: TaskConfig, tokenizer: TextCodec, vocab_size: int
) -> Iterator[str]:
    """What is wrong with a file, line by line."""
    read = _documents if config.type == "lm" else _examples
    count = 0
    for item in read(path, config, tokenizer, vocab_size):
        count += 1
        if isinstance(item, DatasetError):
            yield str(item)
    if not count:
        yield f"{path}: holds nothing"


def _all_or_raise(path: Path, items: Iterator[Any]) -> list[Any]:
    kept = []
    for item in items:
        if isinstance(item, DatasetError):
            raise item
        kept.append(item)
    if not kept:
        raise DatasetError(f"{path}: holds nothing")
    return kept


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and content of each line, or why it has none."""
    try:
        with path.open("rb") as file:
            for number, content in enumerate(file, 1):
                if not content.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    line = json.loads(content)
                except (ValueError, RecursionError) as error:
                    yield where, DatasetError(f"{where}: no JSON: {error}")
                    continue
                if isinstance(line, dict):
                    yield where, line
                else:
                    yield where, DatasetError(f"{where}: no JSON object")
    except OSError as error:
        yield str(path), DatasetError(f"{path}: {error.strerror}")


def _examples(
    path: Path, config: TaskConfig, tokenizer: TextCodec, vocab_size: int
) -> Iterator[Example | DatasetError]:
    for where, line in _lines(path):
        if isinstance(line, DatasetError):
            yield line
            continue
        try:
            yield _example(line, config, tokenizer, vocab_size)
        except DatasetError as error:
            yield DatasetError(f"{where}: {error}")


def _example(
    line: dict[str, Any], config: TaskConfig, tokenizer: TextCodec, vocab_size: int
) -> Example:
    reader = _Fields(line, config.no_tokenized, tokenizer, vocab_size)
    context = reader.ids("inputs")
    choices: tuple[tuple[int, ...], ...] = ()
    targets: tuple[tuple[int, ...], ...] = ()
    label = -1
    if config.type == "mul" or "choices" in line or "choices_pretokenized" in line:
        choices = reader.lists("choices")
        if not choices:
            raise DatasetError("choices: there is none")
        label = line.get("label")  # type: ignore[assignment]
        if isinstance(label, bool) or not isinstance(label, int):
            raise DatasetError(f"label: {label!r} where the number of the right choice is due")
        if not 0 <= label < len(choices):
            raise DatasetError(f"label: {label}, and there are {len(choices)} choices")
        if sum(map(len, choices)) + 2 >= config.max_seq_length:
            raise DatasetError(
                f"choices: {sum(map(len, choices))} tokens are past max_seq_length="
                f"{config.max_seq_length}"
            )
    if config.type == "gen":
        targets = reader.lists("targets")
    return Example(context, choices, label, targets, line)


@dataclasses.dataclass(frozen=True)
class _Fields:
    """Reads ids of a line, those given or those of its texts."""

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

    def ids(self, name: str) -> tuple[int, ...]:
        found, value = self._find(name)
        return self._of(found, value)

    def lists(self, name: str) -> tuple[tuple[int, ...], ...]:
        found, value = self._find(name)
        is_one = isinstance(value, str) or (value and not isinstance(value[0], (list, str)))
        if name == "targets" and is_one:
            value = [value]  # one answer, not a list of them
        if not isinstance(value, list):
            raise DatasetError(f"{found}: a list is due")
        return tuple(self._of(f"{found}[{i}]", item) for i, item in enumerate(value))

    def _of(self, name: str, value: Any) -> tuple[int, ...]:
        if isinstance(value, str):
            return tuple(self.tokenizer.encode(value))
        if not isinstance(value, list):
            raise DatasetError(f"{name}: {value!r} is neither a text nor a list of ids")
        for token in value:
            if isinstance(token, bool) or not isinstance(token, int):
                raise DatasetError(f"{name}: {token!r} is no id")
            if not 0 <= token < self.vocab_size:
                raise DatasetError(f"{name}: id {token} is not in the vocabulary")
        return tuple(value)


def _documents(
    path: Path, config: TaskConfig, tokenizer: TextCodec, vocab_size: int
) -> Iterator[Document | DatasetError]:
    if path.suffix != ".jsonl":
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            yield DatasetError(f"{path}: {error}")
            return
        if text.strip():
            yield _document(text, tuple(tokenizer.encode(text)), {})
        return
    for where, line in _lines(path):
        if isinstance(line, DatasetError):
            yield line
            continue
        try:
            text = line.get("text_pretokenized", line.get("text"))
            if not isinstance(text, str):
                raise DatasetError("text_pretokenized: missing: the text that the ids are of")
            reader = _Fields(line, config.no_tokenized, tokenizer, vocab_size)
            tokens = reader.ids("text")
            if tokens:
                yield _document(text, tokens, line)
        except DatasetError as error:
            yield DatasetError(f"{where}: {error}")


def _document(text: str, tokens: tuple[int, ...], line: Mapping[str, Any]) -> Document:
    return Document(tokens, len(text.strip().split(" ")), len(text.encode("utf-8")), line)
