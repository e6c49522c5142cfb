"""Documents and instructions, read from text files that may be compressed."""

import glob
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from glm_jax.data.records import DataError, Dataset, Record, in_memory
from glm_jax.errors import UserError
from glm_jax.progress import progress_bar
from glm_jax.text_files import check_characters, decode, is_json_lines, parse_json, raw_lines
from glm_jax.tokenizer import MASK_WORDS, Tokenizer

KINDS_OF_FILES = ("text", "instructions")
T = TypeVar("T")
_MASKS = {"[MASK]": "mask", "[gMASK]": "gmask"}


def find_files(patterns: str) -> list[Path]:
    """Return the files of a comma-separated list of paths and glob patterns, sorted by pattern.

    Raises:
      DataError: a pattern matches no file.
    """
    files: list[Path] = []
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))
        if not matches:
            raise DataError(f"no file matches {pattern!r}")
        files += map(Path, matches)
    if not files:
        raise DataError("no training files were named")
    return files


def parse_text(line: bytes, is_json: bool) -> str:
    """Return the document of a line: its "text" if lines are JSON, else the line itself.

    Raises:
      UserError: the line is not UTF-8, or not a JSON object with a string "text".
    """
    text = decode(line)
    return _text_of(parse_json(text), "text") if is_json and text.strip() else text


def parse_instruction(line: bytes, tokenizer: Tokenizer) -> Record | None:
    """Parse a JSON line with "prompt", "target" and, optionally, "mask": "[MASK]" or "[gMASK]".

    In the prompt the words of `MASK_WORDS` are special tokens. All other words, such as <eop>, are
    text.

    Returns:
      The record, or None for an empty line.

    Raises:
      UserError: a field is missing or wrong; names it.
    """
    text = decode(line)
    if not text.strip():
        return None
    fields = parse_json(text)
    prompt = tokenizer.encode(_text_of(fields, "prompt"), MASK_WORDS)
    target = tokenizer.encode(_text_of(fields, "target"), ())
    if not target:
        raise DataError('"target" is empty')
    mask = fields.get("mask")
    if mask is not None and (not isinstance(mask, str) or mask not in _MASKS):
        raise DataError(f'"mask": expected {" or ".join(_MASKS)}')
    tokens = np.array([*prompt, *target], np.int32)
    return Record(tokens, len(prompt), None if mask is None else _MASKS[mask])


def _text_of(fields: Any, name: str) -> str:
    if not isinstance(fields, dict) or name not in fields:
        raise DataError(f'not a JSON object with "{name}"')
    if not isinstance(fields[name], str):
        raise DataError(f'"{name}" is not a string')
    try:
        check_characters(fields[name])
    except UserError as error:
        raise DataError(f'"{name}": {error}') from error
    return str(fields[name])


def _parsed(files: list[Path], parse: Callable[[bytes, Path], T]) -> Iterator[T]:
    """Yield each line of some files, parsed, in order.

    Raises:
      DataError: `parse` raised a UserError; names the file and the line.
      TextFileError: a file cannot be read.
    """
    for file in files:
        for number, line in enumerate(raw_lines(file), 1):
            try:
                parsed = parse(line, file)
            except UserError as error:
                raise DataError(f"{file}:{number}: {error}") from error
            yield parsed


def read_documents(files: list[Path]) -> Iterator[str]:
    """Yield documents in order: the "text" of each line of .jsonl files, each line of others.

    Raises:
      DataError: a line is not UTF-8, or not a JSON object with a "text".
      TextFileError: a file cannot be read.
    """
    for text in _parsed(files, lambda line, file: parse_text(line, is_json_lines(file))):
        if text.strip():
            yield text


def text_records(text: str, tokenizer: Tokenizer, window: int) -> Iterator[Record]:
    """Yield a document, with eod at its end, in pieces of at most `window` tokens."""
    ids = np.array([*tokenizer.encode(text, ()), tokenizer.special_tokens.eod], np.int32)
    for start in range(0, len(ids), window):
        yield Record(ids[start : start + window])


def tokenize(files: list[Path], tokenizer: Tokenizer, window: int) -> Dataset:
    """Tokenise all documents of some files in memory, for small amounts of text.

    Args:
      window: tokens of a record at most.

    Raises:
      DataError: the files have bad lines, or no text.
    """
    records: list[Record] = []
    for text in progress_bar(read_documents(files), desc="tokenising", unit="doc"):
        records += text_records(text, tokenizer, window)
    if not records:
        raise DataError(f"{files[0]}: no text in the training files")
    return in_memory("text", records)


def tokenize_instructions(files: list[Path], tokenizer: Tokenizer) -> Dataset:
    """Tokenise all instructions of some files of JSON lines in memory; see `parse_instruction`.

    Raises:
      DataError: the files have bad lines, or no instructions.
    """
    parsed = _parsed(files, lambda line, _: parse_instruction(line, tokenizer))
    records = [record for record in parsed if record is not None]
    if not records:
        raise DataError(f"{files[0]}: no instructions in the files")
    return in_memory("pairs", records)
