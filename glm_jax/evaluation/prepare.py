"""From a data set in its public format to a task's files, by a prompt file.

A prompt file (`configs/prompts/*.yaml`) says where the fields are and which texts are made of
them. Texts are Python format strings over a row's fields.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from glm_jax.decoding.blank_filling import TextCodec
from glm_jax.errors import UserError
from glm_jax.evaluation.sources import Row, SourceError, read_file, read_rows
from glm_jax.files import replacing

_LETTERS = "ABCD"


class PromptFileError(UserError):
    """A prompt file that cannot be used; the message names the field."""


@dataclasses.dataclass(frozen=True)
class PromptFile:
    """How a data set becomes a task's files.

    Attributes:
      path: the task file's, under which files are written.
      format, rows, columns, delimiter, inside: of the data set, as of `sources.read_rows`.
      prompts: by name: `input`, and `choices` (texts, or a field that holds a list) or
        `targets` (a field that holds a list).
      label: the field of the right choice.
      labels: its values, in the order of the choices; where there are none it is a number.
        Rows with another value are left out.
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
    """Reads a prompt file.

    Raises:
      PromptFileError: it is not there, or a field is unknown, missing or wrong.
    """
    content = _read_yaml(path)
    unknown = set(content) - {field.name for field in dataclasses.fields(PromptFile)}
    if unknown:
        raise PromptFileError(f"{path}: unknown field {sorted(unknown)[0]!r}")
    try:
        read = PromptFile(**content | {"keep": tuple(content.get("keep", ()))})
    except TypeError as error:
        raise PromptFileError(f"{path}: {error}") from error
    for name, prompt in read.prompts.items():
        if not isinstance(prompt, dict) or "input" not in prompt:
            raise PromptFileError(f"{path}: prompts: {name}: the field 'input' is missing")
        if ("choices" in prompt) == ("targets" in prompt):
            raise PromptFileError(f"{path}: prompts: {name}: either choices or targets")
        if read.shots and "targets" in prompt:
            raise PromptFileError(f"{path}: prompts: {name}: shots are for choices")
    return read


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PromptFileError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PromptFileError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise PromptFileError(f"{path}: fields such as path and format are due")
    return content


def prepare_task(
    prompts: PromptFile, source: Path, output: Path, split: str, examples: Path | None = None
) -> dict[Path, int]:
    """Writes OUTPUT/PATH/PROMPT/SPLIT.jsonl for every prompt, and returns how many lines each.

    Args:
      examples: a file of the same format for `shots`; else the first rows of each label.

    Raises:
      SourceError, PromptFileError: the data set is not what the prompt file says.
    """
    rows = list(_rows(prompts, source))
    shots, rows = _shots(prompts, rows, examples)
    written = {}
    for name, prompt in prompts.prompts.items():
        lines = [_line(prompts, prompt, where, row, shots) for where, row in rows]
        path = output / prompts.path / name / f"{split}.jsonl"
        write_lines(path, lines)
        written[path] = len(lines)
    return written


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """JSON lines, all of them or none."""
    with replacing(path) as beside, beside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _rows(prompts: PromptFile, source: Path) -> Iterator[tuple[str, Row]]:
    """Rows with their right choice's number under "label"."""
    for where, row in read_rows(
        source, prompts.format, prompts.rows, prompts.columns, prompts.delimiter, prompts.inside
    ):
        if all("targets" in prompt for prompt in prompts.prompts.values()):
            yield where, row
            continue
        if prompts.label not in row:
            raise SourceError(f"{where}: the field {prompts.label!r} is missing")
        label = row[prompts.label]
        if prompts.labels is not None:
            if str(label) not in prompts.labels:
                continue
            label = prompts.labels.index(str(label))
        try:
            yield where, row | {"label": int(label)}
        except ValueError as error:
            raise SourceError(f"{where}: {prompts.label}={label!r} is no number") from error


def _shots(
    prompts: PromptFile, rows: list[tuple[str, Row]], examples: Path | None
) -> tuple[list[tuple[str, Row]], list[tuple[str, Row]]]:
    """Answered examples, labels in turn, and the rows that are left."""
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


def _format(where: str, template: str, row: Row) -> str:
    try:
        return template.format_map(row)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise SourceError(f"{where}: {template!r}: no field {error}") from error


def _choices(where: str, prompt: dict[str, Any], row: Row) -> list[str]:
    choices = prompt["choices"]
    if isinstance(choices, str):
        if not isinstance(row.get(choices), list):
            raise SourceError(f"{where}: the field {choices!r} is no list")
        return [str(choice) for choice in row[choices]]
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
        line["targets_pretokenized"] = list(row[prompt["targets"]])
    else:
        line["choices_pretokenized"] = _choices(where, prompt, row)
        line["label"] = row["label"]
        if not 0 <= row["label"] < len(line["choices_pretokenized"]):
            raise SourceError(f"{where}: label {row['label']} is no choice")
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
    content = _read_yaml(file)
    if set(content) != {"groups", "shots"}:
        raise PromptFileError(f"{file}: the fields 'groups' and 'shots' are due")
    shots, written = content["shots"], {}
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
    found = []
    for where, row in read_file(path, "csv", columns):
        if row["answer"] not in tuple(_LETTERS):
            raise SourceError(f"{where}: answer {row['answer']!r}: one of {', '.join(_LETTERS)}")
        options = "\n".join(f"{letter}. {row[letter]}" for letter in _LETTERS)
        found.append((f"{row['question']}\n{options}\nAnswer:", _LETTERS.index(row["answer"])))
    return found


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
        ids = [tokenizer.encode(sentence) for sentence in sentences]
        matcher = difflib.SequenceMatcher(None, ids[0], ids[1], autojunk=False)
        for number, own in enumerate(ids):
            for block in matcher.get_matching_blocks():
                start = block.b if number else block.a
                for place in range(start, start + block.size):
                    line = {"inputs": [*own[:place], mask, *own[place + 1 :]], "label": 0}
                    line |= {"choices": [[own[place]]], "pair_ID": pair}
                    lines.append(line | {"sent_ID": number + 1, "bias_type": kind})
    path = output / "crows_pairs" / "test.jsonl"
    write_lines(path, lines)
    return {path: len(lines)}
