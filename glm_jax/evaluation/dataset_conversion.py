"""Convert a data set in its public format to a task's files, by a prompt file.

A prompt file (`configs/prompts/*.yaml`) says where the fields are and which texts are made of
them. Texts are Python format strings over a row's fields.
"""

import dataclasses
import difflib
import json
import math
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from glm_jax.errors import UserError, shown
from glm_jax.evaluation.sources import FORMATS, SHAPES, Row, SourceError, read_file, read_rows
from glm_jax.evaluation.task_config import is_plain_name
from glm_jax.evaluation.yaml_files import read_yaml
from glm_jax.files import replacing
from glm_jax.generation.blank_filling import TextCodec

_LETTERS = "ABCD"
_UNLABELLED = ("-", "-1", "")  # what public data sets put where annotators do not agree


class PromptFileError(UserError):
    """A prompt file that cannot be used; the message names the field."""


@dataclasses.dataclass(frozen=True)
class PromptFile:
    """How a data set becomes a task's files.

    Attributes:
      path: the task file's, under which files are written.
      format, rows, columns, delimiter, inside: of the data set, see `sources.read_rows`.
      prompts: by name: `input`, and `choices` (texts, or a field that holds a list) or
        `targets` (a field that holds a list).
      label: the field of the right choice.
      labels: its values, in the order of the choices; where there are none it is a number.
        Rows without a label (empty, null, "-" or -1) are left out; another is an error.
      keep: fields that are written beside.
      shots: answered examples before each question.
      separator: between them.
    """

    path: str
    format: str
    rows: str = "flat"
    columns: list[str] | None = None
    delimiter: str | None = None
    inside: str | None = None
    prompts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    label: str = "label"
    labels: list[str] | None = None
    keep: tuple[str, ...] = ()
    shots: int = 0
    separator: str = "\n\n"


def load_prompt_file(path: Path) -> PromptFile:
    """Read a prompt file.

    Raises:
      PromptFileError: it is not there, or a field is unknown, missing or wrong.
    """
    content = read_yaml(path, PromptFileError)
    unknown = set(content) - {field.name for field in dataclasses.fields(PromptFile)}
    if unknown:
        raise PromptFileError(f"{path}: unknown field {shown(sorted(unknown)[0])}")
    missing = {"path", "format"} - set(content)
    if missing:
        raise PromptFileError(f"{path}: the field {min(missing)!r} is missing")
    _check_fields(path, content)
    read = PromptFile(**content | {"keep": tuple(content.get("keep", ()))})
    for name, prompt in read.prompts.items():
        if not isinstance(prompt, dict) or not isinstance(prompt.get("input"), str):
            raise PromptFileError(f"{path}: prompts: {name}: the field 'input' is missing")
        if ("choices" in prompt) == ("targets" in prompt):
            raise PromptFileError(f"{path}: prompts: {name}: either choices or targets")
        if read.shots and "targets" in prompt:
            raise PromptFileError(f"{path}: prompts: {name}: shots are for choices")
        if not isinstance(prompt.get("choices", []), (str, list)):
            raise PromptFileError(f"{path}: prompts: {name}: choices: texts, or a field's name")
        if not isinstance(prompt.get("targets", ""), str):
            raise PromptFileError(f"{path}: prompts: {name}: targets: a field's name")
    return read


def _check_fields(path: Path, content: dict[str, Any]) -> None:
    is_text = lambda value: isinstance(value, str)
    is_texts = lambda value: isinstance(value, list) and all(map(is_text, value))
    is_plain = lambda value: is_text(value) and is_plain_name(value)
    rules: dict[str, Callable[[Any], bool]] = {
        "path": lambda value: is_text(value) and all(map(is_plain_name, value.split("/"))),
        "format": lambda value: value in FORMATS,
        "rows": lambda value: is_text(value) and value in SHAPES,
        "columns": is_texts,
        "delimiter": lambda value: is_text(value) and len(value) == 1,
        "inside": is_text,
        "prompts": lambda value: isinstance(value, dict) and all(map(is_plain, value)),
        "label": is_text,
        "labels": is_texts,
        "keep": is_texts,
        "shots": lambda value: type(value) is int and value >= 0,
        "separator": is_text,
    }
    for name, value in content.items():
        if not rules[name](value):
            said = f"{path}: {name}={shown(value)}"
            raise PromptFileError(f"{said} is not what a prompt file has there")


def prepare_task(
    prompts: PromptFile, source: Path, output: Path, split: str, examples: Path | None = None
) -> dict[Path, int]:
    """Write OUTPUT/PATH/PROMPT/SPLIT.jsonl for every prompt, and return how many lines each.

    Args:
      examples: a file of the same format for `shots`; else the first rows of each label.

    Raises:
      SourceError, PromptFileError: the data set is not what the prompt file says, or nothing of
        it would be written.
    """
    if not is_plain_name(split):
        raise PromptFileError(f"split={split!r}: the name of a file is expected")
    rows = list(_rows(prompts, source))
    if not rows:
        raise SourceError(f"{source}: no row with a label in it")
    shots, rows = _shots(prompts, rows, examples)
    written = {}
    for name, prompt in prompts.prompts.items():
        lines = [_line(prompts, prompt, where, row, shots) for where, row in rows]
        path = output / prompts.path / name / f"{split}.jsonl"
        write_lines(path, lines)
        written[path] = len(lines)
    return written


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines, all of them or none."""
    with replacing(path) as beside, beside.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def _rows(prompts: PromptFile, source: Path) -> Iterator[tuple[str, Row]]:
    """Yield rows with the index of the right choice as "label"."""
    for where, row in read_rows(
        source, prompts.format, prompts.rows, prompts.columns, prompts.delimiter, prompts.inside
    ):
        if all("targets" in prompt for prompt in prompts.prompts.values()):
            yield where, row
            continue
        if prompts.label not in row:
            raise SourceError(f"{where}: the field {prompts.label!r} is missing")
        label = row[prompts.label]
        if label is None or str(label) in _UNLABELLED:
            continue
        yield where, row | {"label": _label_number(prompts, where, label)}


def _label_number(prompts: PromptFile, where: str, label: Any) -> int:
    said = f"{where}: {prompts.label}={shown(label)}"
    if prompts.labels is not None:
        if str(label) not in prompts.labels:
            raise SourceError(f"{said}: one of {', '.join(prompts.labels)} is expected")
        return prompts.labels.index(str(label))
    try:
        number = float(label) if isinstance(label, (int, float, str)) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if isinstance(label, bool) or not number.is_integer():
        raise SourceError(f"{said} is no number of a choice")
    return int(number)


def _shots(
    prompts: PromptFile, rows: list[tuple[str, Row]], examples: Path | None
) -> tuple[list[tuple[str, Row]], list[tuple[str, Row]]]:
    """Return answered examples, labels in turn, and the other rows."""
    if not prompts.shots:
        return [], rows
    pool = rows if examples is None else list(_rows(prompts, examples))
    by_label: dict[int, list[tuple[str, Row]]] = {}
    for item in pool:
        by_label.setdefault(item[1].get("label", 0), []).append(item)
    chosen: list[tuple[str, Row]] = []
    for turn in range(prompts.shots):
        for label in sorted(by_label):
            if turn < len(by_label[label]) and len(chosen) < prompts.shots:
                chosen.append(by_label[label][turn])
    taken = {id(row) for _, row in chosen}
    return chosen, [item for item in rows if id(item[1]) not in taken]


class _Template(string.Formatter):
    """Python's format strings over fields that are texts or numbers."""

    def format_field(self, value: Any, format_spec: str) -> str:
        return str(super().format_field(_plain(value), format_spec))


def _plain(value: Any) -> str | int | float:
    """Convert a value for a text.

    Raises:
      SourceError: it is null, a list, an object, or no finite number.
    """
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    if not (isinstance(value, str) or is_number):
        raise SourceError(f"{shown(value)} where a text or a number is expected")
    return value


def _format(where: str, template: str, row: Row) -> str:
    try:
        return _Template().vformat(template, (), row)
    except SourceError as error:
        raise SourceError(f"{where}: {shown(template)}: {error}") from error
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"{where}: {shown(template)}: no field {error}") from error


def _texts(where: str, name: str, value: Any) -> list[str]:
    """Return a field's texts, none of them empty.

    Raises:
      SourceError: it is no list, or not of texts and numbers.
    """
    if not isinstance(value, list):
        raise SourceError(f"{where}: the field {name!r} is no list")
    try:
        texts = [str(_plain(item)) for item in value]
    except SourceError as error:
        raise SourceError(f"{where}: the field {name!r}: {error}") from error
    if not texts or not all(texts):
        raise SourceError(f"{where}: the field {name!r} is empty, or a text in it is")
    return texts


def _choices(where: str, prompt: dict[str, Any], row: Row) -> list[str]:
    choices = prompt["choices"]
    if isinstance(choices, str):
        return _texts(where, choices, row.get(choices))
    return [_format(where, str(choice), row) for choice in choices]


def _line(
    prompts: PromptFile,
    prompt: dict[str, Any],
    where: str,
    row: Row,
    shots: Sequence[tuple[str, Row]],
) -> dict[str, Any]:
    text = _format(where, prompt["input"], row)
    line: dict[str, Any] = {}
    if shots:
        text = prompts.separator.join([*(_answered(prompt, *shot) for shot in shots), text])
    line["inputs_pretokenized"] = text
    if "targets" in prompt:
        name, value = prompt["targets"], row.get(prompt["targets"])
        answers = [value] if isinstance(value, str) else value
        line["targets_pretokenized"] = _texts(where, name, answers)
    else:
        line["choices_pretokenized"] = _choices(where, prompt, row)
        line["label"] = row["label"]
        if not 0 <= row["label"] < len(line["choices_pretokenized"]):
            raise SourceError(f"{where}: label {row['label']} is no choice")
    missing = [name for name in prompts.keep if name not in row]
    if missing:
        raise SourceError(f"{where}: the field {missing[0]!r} is missing")
    for name in prompts.keep:
        try:
            json.dumps(row[name], allow_nan=False)
        except (TypeError, ValueError) as error:  # of parquet: dates, bytes, NaN
            raise SourceError(f"{where}: the field {name!r}: {error}") from error
    return line | {name: row[name] for name in prompts.keep}


def _answered(prompt: dict[str, Any], where: str, row: Row) -> str:
    text = _format(where, prompt["input"], row)
    answer = _choices(where, prompt, row)[row["label"]]
    return text.replace("[MASK]", answer) if "[MASK]" in text else f"{text} {answer}"


def prepare_mmlu(file: Path, source: Path, output: Path) -> dict[Path, int]:
    """MMLU's folder (`dev/`, `test/` with SUBJECT_dev.csv and SUBJECT_test.csv) as one file a
    subject, OUTPUT/mmlu/GROUP/SUBJECT.jsonl, each question after answered ones of dev.

    Args:
      file: names the subjects of each group, and how many answered questions (`shots`).

    Raises:
      PromptFileError: it is not there or not of that form.
      SourceError: a subject's file is missing or not of the public format.
    """
    content = read_yaml(file, PromptFileError)
    if set(content) != {"groups", "shots"}:
        raise PromptFileError(f"{file}: expected the fields 'groups' and 'shots'")
    shots, groups = content["shots"], content["groups"]
    if type(shots) is not int or shots < 0 or not isinstance(groups, dict):
        raise PromptFileError(f"{file}: shots is a number, groups are lists of subjects by name")
    for group, subjects in groups.items():
        names = [group, *(subjects if isinstance(subjects, list) else [None])]
        if not all(isinstance(name, str) and is_plain_name(name) for name in names):
            raise PromptFileError(f"{file}: groups: {shown(group)}: a list of subjects is expected")
    written = {}
    for group, subjects in content["groups"].items():
        for subject in subjects:
            questions = _mmlu_questions(source / "test" / f"{subject}_test.csv")
            solved = _mmlu_questions(source / "dev" / f"{subject}_dev.csv")[:shots]
            title = subject.replace("_", " ")
            head = f"The following are multiple choice questions (with answers) about {title}.\n\n"
            head += "".join(f"{text} {_LETTERS[label]}\n\n" for text, label in solved)
            lines = [
                {
                    "inputs_pretokenized": head + text,
                    "choices_pretokenized": list(_LETTERS),
                    "label": label,
                }
                for text, label in questions
            ]
            path = output / "mmlu" / group / f"{subject}.jsonl"
            write_lines(path, lines)
            written[path] = len(lines)
    return written


def _mmlu_questions(path: Path) -> list[tuple[str, int]]:
    columns = ["question", *_LETTERS, "answer"]
    questions = []
    for where, row in read_file(path, "csv", columns):
        if row["answer"] not in tuple(_LETTERS):
            raise SourceError(f"{where}: answer {row['answer']!r}: one of {', '.join(_LETTERS)}")
        options = "\n".join(f"{letter}. {row[letter]}" for letter in _LETTERS)
        questions.append((f"{row['question']}\n{options}\nAnswer:", _LETTERS.index(row["answer"])))
    if not questions:
        raise SourceError(f"{path}: no question in it")
    return questions


def prepare_crows_pairs(source: Path, output: Path, tokenizer: TextCodec) -> dict[Path, int]:
    """CrowS-Pairs' table as OUTPUT/crows_pairs/test.jsonl: a line for every token that a pair's
    sentences share, with [MASK] for it; sent_ID 1 is the stereotype.

    Raises:
      SourceError: the file is not the public table.
    """
    mask = tokenizer.special_tokens.mask
    lines = []
    for pair, (where, row) in enumerate(read_file(source, "csv")):
        try:
            sentences = [row["sent_more"], row["sent_less"]]
            if row["stereo_antistereo"] != "stereo":
                sentences.reverse()
            kind = row["bias_type"]
        except KeyError as error:
            raise SourceError(f"{where}: the column {error} is missing") from error
        ids = [tokenizer.encode(sentence, ()) for sentence in sentences]
        matcher = difflib.SequenceMatcher(None, ids[0], ids[1], autojunk=False)
        for number, own in enumerate(ids):
            for block in matcher.get_matching_blocks():
                start = block.b if number else block.a
                for place in range(start, start + block.size):
                    line = {"inputs": [*own[:place], mask, *own[place + 1 :]], "label": 0}
                    line |= {"choices": [[own[place]]], "pair_ID": pair}
                    lines.append(line | {"sent_ID": number + 1, "bias_type": kind})
    if not lines:
        raise SourceError(f"{source}: no pair of sentences in it")
    path = output / "crows_pairs" / "test.jsonl"
    write_lines(path, lines)
    return {path: len(lines)}
