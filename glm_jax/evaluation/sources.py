"""Read public data sets as flat rows for templates, whatever their format."""

import csv
import io
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from glm_jax.errors import UserError, shown
from glm_jax.text_files import TextFileError, check_characters, parse_json, read_json, read_lines
from glm_jax.text_files import read_text as read_whole

Row = dict[str, Any]
# After a table's last line: an open quotation mark makes it, and all rows between, part of a cell.
_END = "\0end of table"
FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")


class SourceError(UserError):
    """A data set that is not in its public format; the message says where."""


def read_file(
    path: Path, form: str, columns: list[str] | None = None, delimiter: str | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield position and content of every record of a file.

    Args:
      form: one of `FORMATS`. A json file that holds a list, or an object, gives its items.
      columns: of a table whose file does not name them.
      delimiter: of a table, where it is not that of its format.

    Raises:
      SourceError: it cannot be read as that.
    """
    try:
        if form == "parquet":
            yield from _parquet(path)
        elif form in ("csv", "tsv"):
            yield from _table(path, columns, delimiter or {"csv": ",", "tsv": "\t"}[form])
        elif form == "jsonl":
            for number, line in enumerate(read_lines(path), 1):
                if line.strip():
                    yield f"{path}:{number}", _json(f"{path}:{number}", line)
        elif form == "json":
            content = read_json(path)
            check_characters(content)
            items = enumerate(content) if isinstance(content, list) else content.items()
            for name, item in items:
                yield f"{path}: {name}", item
        else:
            raise SourceError(f"format {form!r}: one of {', '.join(FORMATS)}")
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}") from error  # pyarrow's has none
    except UserError as error:
        raise SourceError(str(error)) from error
    except (ValueError, csv.Error, AttributeError) as error:
        raise SourceError(f"{path} is no {form}: {error}") from error


def _json(where: str, line: str) -> Any:
    try:
        record = parse_json(line)
        check_characters(record)
    except TextFileError as error:
        raise SourceError(f"{where} is no jsonl: {error}") from error
    return record


def _table(path: Path, columns: list[str] | None, delimiter: str) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(2**31 - 1)
    # Quotation marks in .tsv files are part of their texts.
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    file = io.StringIO(read_whole(path), newline="\n")
    lines = itertools.chain(file, [_END])
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
    names = columns or next(reader, [])
    if len(set(names)) < len(names):
        raise SourceError(f"{path}: two columns have the same name")
    line = reader.line_num
    for cells in reader:
        line, first = reader.line_num, line + 1
        if cells == [_END]:
            return
        if cells and cells[-1].endswith(_END):
            raise SourceError(f"{path}:{first}: a quotation mark that no other closes")
        if cells:
            if len(cells) != len(names):
                raise SourceError(
                    f"{path}:{reader.line_num}: expected {len(names)} columns, found {len(cells)}"
                )
            yield f"{path}:{reader.line_num}", dict(zip(names, cells, strict=True))


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise SourceError(f"{path}: reading parquet takes pip install pyarrow") from error
    rows = parquet.read_table(path).to_pylist()
    for number, row in enumerate(rows):
        yield f"{path}: row {number}", row


def _flat(record: Any) -> Iterator[Row]:
    if not isinstance(record, dict):
        raise SourceError(f"expected an object with fields, got {shown(record)}")
    yield record


def _squad(record: Any) -> Iterator[Row]:
    """CMRC2018 and DRCD: paragraphs with questions and answers."""
    for paragraph in record["paragraphs"]:
        for question in paragraph["qas"]:
            answers = list(dict.fromkeys(answer["text"] for answer in question["answers"]))
            yield {
                "context": paragraph["context"],
                "question": question["question"],
                "answers": answers,
            }


def _c3(record: Any) -> Iterator[Row]:
    """C3: sentences of a passage or dialogue, then questions."""
    sentences, questions, _ = record
    for question in questions:
        yield {
            "passage": "\n".join(sentences),
            "question": question["question"],
            "choices": question["choice"],
            "label": question["choice"].index(question["answer"]),
        }


def _open_book(record: Any) -> Iterator[Row]:
    question = record["question"]
    marks = [choice["label"] for choice in question["choices"]]
    yield {
        "stem": question["stem"],
        "choices": [choice["text"] for choice in question["choices"]],
        "label": marks.index(record["answerKey"]),
    }


_MATH_OPTION = re.compile(r"([a-e]) \) (.*?)(?= ?, [a-e] \) |$)")


def _math_qa(record: Any) -> Iterator[Row]:
    """MathQA: choices are one text, "a ) 38 , b ) 27.675 , .."."""
    options = dict(_MATH_OPTION.findall(record["options"].strip(" '\"[]")))
    yield {
        "problem": record["Problem"],
        "choices": list(options.values()),
        "label": list(options).index(record["correct"]),
    }


def _pubmed(record: Any) -> Iterator[Row]:
    yield {
        "context": "\n".join(record["CONTEXTS"]),
        "question": record["QUESTION"],
        "label": record["final_decision"],
    }


def _winograd(record: Any) -> Iterator[Row]:
    """CLUEWSC: which noun (span1) a pronoun (span2) stands for."""
    target = record["target"]
    yield {
        "text": record["text"],
        "noun": target["span1_text"],
        "pronoun": target["span2_text"],
        "label": str(record["label"]).lower(),
    }


def _keywords(record: Any) -> Iterator[Row]:
    words = record["keyword"]
    joined = "、".join(words) if isinstance(words, list) else words
    yield record | {"keywords": joined}


def _idiom(record: Any) -> Iterator[Row]:
    """ChID: a text without one idiom, and candidates."""
    yield {
        "text": record["content"].replace("#idiom#", "[MASK]", 1),
        "choices": record["candidates"],
        "label": int(record["answer"]),
    }


def _last_word(record: Any) -> Iterator[Row]:
    """LAMBADA: a passage and its last word."""
    passage, _, word = record["text"].rstrip().rpartition(" ")
    yield {"passage": passage, "answers": [word]}


def _stereoset(record: Any) -> Iterator[Row]:
    """StereoSet, within sentences: what is put for BLANK."""
    context = record["context"]
    before, _, after = context.partition("BLANK")
    choices = []
    for sentence in record["sentences"]:
        text = sentence["sentence"]
        end = len(text) - len(after) if text.endswith(after) else len(text.rstrip(" .!?"))
        choices.append(text[len(before) : end].strip())
    yield {
        "text": context.replace("BLANK", "[MASK]", 1),
        "choices": choices,
        "goal_label": [sentence["gold_label"] for sentence in record["sentences"]],
        "bias_type": record["bias_type"],
        "ID": record["id"],
        "label": 0,
    }


def _hate(record: Any) -> Iterator[Row]:
    """ETHOS, binary: the share of annotators who find hate speech."""
    yield {"comment": record["comment"], "label": int(float(record["isHate"]) >= 0.5)}


def _hate_kinds(record: Any) -> Iterator[Row]:
    """ETHOS, by label: against a race, a gender, or neither."""
    kinds = [float(record[name]) >= 0.5 for name in ("race", "gender")]
    label = kinds.index(True) if True in kinds else 2
    yield {"comment": record["comment"], "label": label}


SHAPES: dict[str, Callable[[Any], Iterator[Row]]] = {
    "flat": _flat,
    "squad": _squad,
    "c3": _c3,
    "open_book": _open_book,
    "math_qa": _math_qa,
    "pubmed": _pubmed,
    "winograd": _winograd,
    "keywords": _keywords,
    "idiom": _idiom,
    "last_word": _last_word,
    "stereoset": _stereoset,
    "hate": _hate,
    "hate_kinds": _hate_kinds,
}


def read_rows(
    path: Path,
    form: str,
    shape: str = "flat",
    columns: list[str] | None = None,
    delimiter: str | None = None,
    inside: str | None = None,
) -> Iterator[tuple[str, Row]]:
    """Yield position and fields of every question of a data set.

    Args:
      shape: one of `SHAPES`: how records become rows.
      inside: dotted path, in a json file, of the list of records.

    Raises:
      SourceError: the file is not of that format and shape.
    """
    if shape not in SHAPES:
        raise SourceError(f"rows={shape!r}: one of {', '.join(SHAPES)}")
    whole = read_file(path, form, columns, delimiter)  # reads nothing before it is asked
    records = whole if inside is None else _inside(path, inside)
    for where, record in records:
        try:
            rows = list(SHAPES[shape](record))
        except SourceError as error:
            raise SourceError(f"{where}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            kind = type(error).__name__
            raise SourceError(f"{where}: not of the shape {shape!r}: {kind}: {error}") from error
        for row in rows:
            yield where, row


def _inside(path: Path, dotted: str) -> Iterator[tuple[str, Any]]:
    try:
        content: Any = read_json(path)
        check_characters(content)
        for name in dotted.split("."):
            content = content[name]
    except TextFileError as error:
        raise SourceError(str(error)) from error
    except (KeyError, TypeError) as error:
        raise SourceError(f"{path}: no JSON with {dotted}: {error}") from error
    if not isinstance(content, list):
        raise SourceError(f"{path}: {dotted} is no list")
    for number, record in enumerate(content):
        yield f"{path}: {dotted}[{number}]", record
