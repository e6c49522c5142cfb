"""Documents of text files, and their tokens."""

import glob
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from glm_jax.errors import UserError
from glm_jax.tokenizer import Tokenizer


class DataError(UserError):
    """Training text that cannot be used; the message says which file and line."""


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


def read_documents(files: list[Path]) -> Iterator[str]:
    """Documents in order: of .jsonl files each line's "text", of others each line.

    Raises:
      DataError: a line that is not UTF-8, or no JSON object with a "text".
    """
    for file in files:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    text = line.decode("utf-8").rstrip("\r\n")
                    if file.suffix == ".jsonl" and text.strip():
                        text = json.loads(text)["text"]
                except (UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{file}:{number}: {error!r}") from error
                if not isinstance(text, str):
                    raise DataError(f'{file}:{number}: "text" is not a string')
                if text.strip():
                    yield text


def tokenize(files: list[Path], tokenizer: Tokenizer, window: int) -> list[np.ndarray]:
    """Token arrays of all documents, cut into windows of at most `window` tokens.

    Raises:
      DataError: unreadable files, or no text in them.
    """
    windows = []
    for text in tqdm(read_documents(files), desc="tokenising", unit="doc"):
        ids = np.array(tokenizer.encode(text), np.int32)
        windows += [ids[i : i + window] for i in range(0, len(ids), window)]
    if not windows:
        raise DataError(f"{files[0]}: no text in the training files")
    return windows
