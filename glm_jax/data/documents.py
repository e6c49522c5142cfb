"""Documents and instructions of text files, plain or compressed."""

import glob
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zstandard
from tqdm import tqdm

from glm_jax.data.records import DataError, Dataset, Record, in_memory
from glm_jax.tokenizer import Tokenizer

KINDS_OF_FILES = ("text", "instructions")
T = TypeVar("T")
_MASKS = {"[MASK]": "mask", "[gMASK]": "gmask"}


def find_files(patterns: str) -> list[Path]:
    """Files of a comma-separated list of paths and glob patterns, each pattern sorted.

    Raises:
      DataError: a pattern matches no file.
    """
    files: list[Path] = []
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        matches = sorted(glob.glob(pattern))
        if not matches:
            raise DataError(f"no file matches {pattern!r}")
        files += map(Path, matches)
    if not files:
        raise DataError("no training files were named")
    return files


def open_text(file: Path) -> io.BufferedIOBase:
    """A file's bytes, unpacked where its name ends in .gz or .zst."""
    if file.suffix == ".gz":
        return gzip.GzipFile(file)
    if file.suffix == ".zst":
        raw = zstandard.ZstdDecompressor().stream_reader(file.open("rb"), closefd=True)
        return io.BufferedReader(raw)
    return file.open("rb")


def is_json_lines(file: Path) -> bool:
    name = file.with_suffix("") if file.suffix in (".gz", ".zst") else file
    return name.suffix in (".jsonl", ".json")


def parse_text(line: bytes, is_json: bool) -> str:
    """The document of a line: its "text" where lines are JSON, else the line itself.

    Raises:
      ValueError: not UTF-8, or no JSON object with a "text" that is a string.
    """
    text: Any = line.decode("utf-8").rstrip("\r\n")
    if is_json and text.strip():
        text = _field(text, "text")
    return str(text)


def parse_instruction(line: bytes, tokenizer: Tokenizer) -> Record | None:
    """A JSON line with "prompt", "target" and, if it likes, "mask": "[MASK]" or "[gMASK]".

    Returns:
      None for an empty line.

    Raises:
      ValueError: says what is missing or wrong.
    """
    text = line.decode("utf-8").strip()
    if not text:
        return None
    prompt, target = (tokenizer.encode(_field(text, name)) for name in ("prompt", "target"))
    if not target:
        raise ValueError('"target" is empty')
    mask = json.loads(text).get("mask")
    if mask is not None and mask not in _MASKS:
        raise ValueError(f'"mask" is {mask!r}: [MASK] or [gMASK]')
    tokens = np.array([*prompt, *target], np.int32)
    return Record(tokens, len(prompt), None if mask is None else _MASKS[mask])


def _field(text: str, name: str) -> str:
    fields = json.loads(text)
    if not isinstance(fields, dict) or name not in fields:
        raise ValueError(f'no JSON object with "{name}"')
    if not isinstance(fields[name], str):
        raise ValueError(f'"{name}" is not a string')
    return str(fields[name])


def _parsed(files: list[Path], parse: Callable[[bytes, Path], T]) -> Iterator[T]:
    """What each line of some files says, in order.

    Raises:
      DataError: `parse` raised a ValueError; names the file and the line.
    """
    for file in files:
        with open_text(file) as stream:
            for number, line in enumerate(stream, 1):
                try:
                    said = parse(line, file)
                except ValueError as error:
                    raise DataError(f"{file}:{number}: {error}") from error
                yield said


def read_documents(files: list[Path]) -> Iterator[str]:
    """Documents in order: of .jsonl files each line's "text", of others each line.

    Raises:
      DataError: a line that is not UTF-8, or no JSON object with a "text".
    """
    for text in _parsed(files, lambda line, file: parse_text(line, is_json_lines(file))):
        if text.strip():
            yield text


def text_records(text: str, tokenizer: Tokenizer, window: int) -> Iterator[Record]:
    """A document, closed by eod, in pieces of at most `window` tokens."""
    ids = np.array([*tokenizer.encode(text), tokenizer.special_tokens.eod], np.int32)
    for start in range(0, len(ids), window):
        yield Record(ids[start : start + window])


def tokenize(files: list[Path], tokenizer: Tokenizer, window: int) -> Dataset:
    """All documents of some files, tokenised in memory: for text that is small.

    Raises:
      DataError: unreadable files, or no text in them.
    """
    records: list[Record] = []
    for text in tqdm(read_documents(files), desc="tokenising", unit="doc"):
        records += text_records(text, tokenizer, window)
    if not records:
        raise DataError(f"{files[0]}: no text in the training files")
    return in_memory("text", records)


def tokenize_instructions(files: list[Path], tokenizer: Tokenizer) -> Dataset:
    """All instructions of some files of JSON lines, in memory; see `parse_instruction`.

    Raises:
      DataError: unreadable files, a line that is no instruction, or none at all.
    """
    parsed = _parsed(files, lambda line, _: parse_instruction(line, tokenizer))
    records = [record for record in parsed if record is not None]
    if not records:
        raise DataError(f"{files[0]}: no instructions in the files")
    return in_memory("pairs", records)
