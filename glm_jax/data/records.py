"""Tokenised documents and instructions, in memory and on disk.

A prepared folder has array_record shards and `dataset.json`, which is written last: without it
the folder is not complete and cannot be used.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from glm_jax.errors import UserError
from glm_jax.text_files import read_json
from glm_jax.tokenizer import Tokenizer

DATASET_FILE = "dataset.json"
_MASKS = (None, "mask", "gmask")
_TEXT = -1


class DataError(UserError):
    """Training data that cannot be used; the message names file and line."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A piece of text, or an instruction.

    Attributes:
      tokens: int32 [length]; for an instruction the prompt, then the target.
      prompt_length: tokens of an instruction's prompt, None for a text.
      mask: "mask" or "gmask", the token after which the target is generated; None to choose it
        by the target's length.
    """

    tokens: np.ndarray
    prompt_length: int | None = None
    mask: str | None = None

    def encode(self) -> bytes:
        """Return the bytes that a shard stores."""
        prompt = _TEXT if self.prompt_length is None else self.prompt_length
        header = np.array([prompt, _MASKS.index(self.mask)], np.int32)
        return header.tobytes() + self.tokens.astype(np.int32).tobytes()

    @classmethod
    def decode(cls, content: bytes) -> "Record":
        """Invert `encode`."""
        prompt, mask, *_ = numbers = np.frombuffer(content, np.int32)
        return cls(numbers[2:], None if prompt == _TEXT else int(prompt), _MASKS[int(mask)])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One source of a mixture.

    Attributes:
      name: in metrics, such as a language.
      records: a sequence of `Record`s, encoded or not.
      tokens: number of all records together.
    """

    name: str
    records: Any
    tokens: int

    def __post_init__(self) -> None:
        if not len(self.records):
            raise DataError(f"the dataset {self.name!r} has no records")


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return a hash of the tokenizer's files: equal for tokenizers that give the same ids."""
    digest = hashlib.sha256()
    for file in tokenizer.files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def in_memory(name: str, records: Sequence[Record]) -> Dataset:
    """Return a dataset of records in memory."""
    return Dataset(name, records, sum(len(record.tokens) for record in records))


def open_dataset(folder: Path, tokenizer: Tokenizer) -> Dataset:
    """Open a folder that `tokenize_files.prepare` wrote; records are read from disk on demand.

    Raises:
      DataError: the dataset is not complete, a shard is missing, or it was tokenised by
        another tokenizer.
    """
    if not (folder / DATASET_FILE).exists():
        raise DataError(
            f"{folder} is not a complete dataset ({DATASET_FILE} is missing): run prepare_data "
            "on it, again if it was interrupted"
        )
    try:
        about = read_json(folder / DATASET_FILE)
        shards, name, tokens = list(map(str, about["shards"])), about["language"], about["tokens"]
        made_by, records = about["tokenizer"], about["records"]
    except (UserError, KeyError, TypeError) as error:
        raise DataError(f"{folder / DATASET_FILE}: {error!r}; prepare the data again") from error
    if made_by != fingerprint(tokenizer):
        raise DataError(f"{folder} was tokenised by another tokenizer: prepare it with this one")
    files = [folder / shard for shard in shards]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(f"{folder}: the shard {missing[0]} is missing; prepare the data again")
    source = grain.sources.ArrayRecordDataSource([str(file) for file in files])
    if len(source) != records:
        raise DataError(
            f"{folder} has {len(source)} records, {DATASET_FILE} says {records}: "
            "prepare the data again"
        )
    return Dataset(name, source, tokens)
