"""Language-modelling data sets in their public formats as the files that tasks read."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from glm_jax.evaluation.sources import SourceError, read_file
from glm_jax.files import replacing

# Where each is written, under the folder of all data.
TEXTS = {
    "wikitext_2": "wikitext-2/wiki.test.tokens",
    "wikitext_103": "wikitext-103/wiki.test.tokens",
    "ptb": "ptb/ptb.test.txt",
    "pile": "pile/test.jsonl",
}


def prepare_text(name: str, source: Path, output: Path) -> dict[Path, int]:
    """Writes one of `TEXTS`: a text, its lines as parquet with a column `text`, or the Pile's
    JSON lines, either also as .zst.

    Returns:
      The file written and its lines.

    Raises:
      SourceError: the file is not there or not of its format.
    """
    path = output / TEXTS[name]
    count = 0
    try:
        with replacing(path) as beside, beside.open("wb") as file:
            for number, line in enumerate(_lines(source), 1):
                if path.suffix == ".jsonl":
                    _check_document(f"{source}:{number}", line)
                file.write(line)
                count += 1
    except (OSError, zstandard.ZstdError) as error:
        raise SourceError(f"{source}: {error}") from error
    return {path: count}


def _lines(source: Path) -> Iterator[bytes]:
    if source.suffix == ".parquet":
        for _, row in read_file(source, "parquet"):
            yield str(row["text"]).encode("utf-8")
        return
    with source.open("rb") as raw:
        file: BinaryIO = raw
        if source.suffix == ".zst":
            file = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw))
        yield from file


def _check_document(where: str, line: bytes) -> None:
    try:
        document = json.loads(line)
        if not isinstance(document["text"], str):
            raise ValueError("'text' is no text")
        document["meta"]["pile_set_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{where}: no document of the Pile: {error}") from error
