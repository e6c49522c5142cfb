"""Language-modelling data sets in their public formats as the files that tasks read."""

from collections.abc import Iterator
from pathlib import Path

from glm_jax.errors import UserError, shown
from glm_jax.evaluation.sources import SourceError, read_file
from glm_jax.files import replacing
from glm_jax.text_files import check_characters, parse_json, read_lines, read_text

# Where each is written, under the folder of all data.
TEXTS = {
    "wikitext_2": "wikitext-2/wiki.test.tokens",
    "wikitext_103": "wikitext-103/wiki.test.tokens",
    "ptb": "ptb/ptb.test.txt",
    "pile": "pile/test.jsonl",
}


def prepare_text(name: str, source: Path, output: Path) -> dict[Path, int]:
    """Write one of `TEXTS`: a text, its lines as parquet with a column `text`, or the Pile's
    JSON lines, either also packed.

    Returns:
      The file written and its lines.

    Raises:
      SourceError: the file is not there or not of its format.
    """
    path = output / TEXTS[name]
    count = 0
    with replacing(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        for part in _parts(source, path.suffix == ".jsonl"):
            file.write(part)
            count += part.count("\n") + (not part.endswith("\n"))
        if not count:
            raise SourceError(f"{source}: no text in it")
    return {path: count}


def _parts(source: Path, are_documents: bool) -> Iterator[str]:
    """Yield what is written, piece by piece."""
    if source.suffix == ".parquet":
        for where, row in read_file(source, "parquet"):
            if not isinstance(row.get("text"), str):
                raise SourceError(f"{where}: text={shown(row.get('text'))} is no text")
            yield row["text"]
    elif are_documents:
        for number, line in enumerate(read_lines(source), 1):
            if line.strip():
                _check_document(f"{source}:{number}", line)
                yield line + "\n"
    elif text := read_text(source):
        yield text


def _check_document(where: str, line: str) -> None:
    try:
        document = parse_json(line)
        check_characters(document)
        if not isinstance(document["text"], str):
            raise SourceError("'text' is no text")
        if not isinstance(document["meta"]["pile_set_name"], str):
            raise SourceError("'pile_set_name' is no text")
    except (UserError, KeyError, TypeError) as error:
        raise SourceError(f"{where}: no document of the Pile: {error}") from error
