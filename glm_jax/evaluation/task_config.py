"""Task files: YAML with the fields of the original's `evaluation/configs.py`."""

import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from glm_jax.engine.generation_settings import SETTINGS, SamplingError
from glm_jax.errors import UserError, shown
from glm_jax.evaluation.yaml_files import read_yaml

TYPES = ("mul", "gen", "lm", "other")  # multiple choice, generation, language modelling
STRATEGIES = ("BaseStrategy", "BeamSearchStrategy")
_METRICS: dict[str, tuple[str, ...]] = {
    "mul": ("Accuracy",),
    "gen": ("EM", "F1"),
    "lm": ("PPL",),
    "other": (),
}
_GENERATION = (
    "sampling_strategy",
    "num_beams",
    "length_penalty",
    "no_repeat_ngram_size",
    "min_gen_length",
    "max_gen_length",
    "end_tokens",
)
# Fields that are settings of generation under other names, whose ranges are theirs.
_SETTINGS = {
    "num_beams": "num_beams",
    "length_penalty": "length_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram",
    "min_gen_length": "min_tokens",
    "max_gen_length": "max_tokens",
}
# What a field is for, where it is not for all types.
_OF_TYPE = dict.fromkeys(_GENERATION, ("gen", "other")) | {
    "generation_length": ("lm", "other"),
    "length_normalized": ("mul", "other"),
    "use_multitask_encoding": ("mul", "other"),
}


class TaskError(UserError):
    """A task file that cannot be used; the message says which field and why."""


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """A task. Hyphens and underscores in its file's field names are the same.

    Attributes:
      type: one of `TYPES`.
      path: of the data, in the folder of all data.
      module: dotted path of a `tasks.Task`, instead of that of the type.
      metrics: names in `metrics.METRICS`; those of the type by default.
      use_task_mask: [gMASK] instead of [MASK].
      use_multitask_encoding: tokens of a choice have positions of their own.
      unidirectional: the context is seen from left to right; takes use_task_mask.
      max_seq_length: in tokens; a longer context loses its first ones.
      file_pattern: names of groups, and which files are in each.
      micro_batch_size: the original's; here batches are filled with tokens instead.
      save_prediction: the original's; here predictions are always saved.
      no_tokenized: texts count, ids beside them do not.
      length_normalized: a choice's log-probability is divided by its number of tokens.
      sampling_strategy: greedy ("BaseStrategy") or a beam search, which takes num_beams,
        length_penalty, no_repeat_ngram_size and min_gen_length.
      max_gen_length: tokens of an answer.
      end_tokens: texts whose last token ends an answer, beside eop and eos.
      generation_length: tokens by which a window moves on.
    """

    name: str
    type: str
    path: str
    module: str | None = None
    metrics: tuple[str, ...] = ()
    use_task_mask: bool = False
    use_multitask_encoding: bool = False
    unidirectional: bool = False
    max_seq_length: int = 2048
    file_pattern: tuple[tuple[str, str], ...] = (("all", "**/*.json*"),)
    micro_batch_size: int = 1
    save_prediction: bool = False
    no_tokenized: bool = False
    length_normalized: bool = False
    sampling_strategy: str = "BaseStrategy"
    num_beams: int = 4
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 3
    min_gen_length: int = 0
    max_gen_length: int = 128
    end_tokens: tuple[str, ...] = ()
    generation_length: int = 256

    def __post_init__(self) -> None:
        if not self.metrics:
            object.__setattr__(self, "metrics", _METRICS[self.type])
        if self.unidirectional and not self.use_task_mask:
            raise TaskError("unidirectional: [MASK] is seen from both sides; set use_task_mask")
        if self.use_multitask_encoding and self.use_task_mask:
            raise TaskError("use_multitask_encoding is for [MASK]; leave out use_task_mask")
        for name in ("max_seq_length", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise TaskError(f"{name}={shown(getattr(self, name))}: at least 1")
        for name, setting in _SETTINGS.items():
            try:
                SETTINGS[setting].checked(name, getattr(self, name))
            except SamplingError as error:
                raise TaskError(str(error)) from error
        self._check_names()
        if not 0 < self.generation_length < self.max_seq_length and self.type == "lm":
            raise TaskError(f"generation_length={self.generation_length}: below max_seq_length")
        if self.max_gen_length + 3 > self.max_seq_length and self.type == "gen":
            raise TaskError(f"max_gen_length={self.max_gen_length} leaves no room for a context")

    def _check_names(self) -> None:
        """Check that names can be those of folders, and are no paths out of theirs."""
        for name in (self.name.replace("/", "_"), *(group for group, _ in self.file_pattern)):
            if not is_plain_name(name):
                raise TaskError(f"{shown(name)}: no name for a task or group of files")
        for _, pattern in self.file_pattern:
            parts = PurePosixPath(pattern).parts
            if not parts or parts[0] == "/" or ".." in parts or "\0" in pattern:
                raise TaskError(f"file_pattern={shown(pattern)}: a pattern below path")

    def to_yaml(self) -> str:
        """Return the content of a task file, from which `load_task` builds this."""
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                fields[field.name] = list(value) if isinstance(value, tuple) else value
        if "file_pattern" in fields:
            fields["file_pattern"] = dict(self.file_pattern)
        return yaml.safe_dump(fields, allow_unicode=True, sort_keys=False)

    def files(self, data: Path) -> dict[str, list[Path]]:
        """Return the data files, in order, of each group that has any.

        Raises:
          TaskError: no group has, or a folder cannot be read.
        """
        folder = data / self.path
        try:
            for _ in os.walk(folder, onerror=_raise):  # glob skips folders that it cannot read
                pass
            groups = {name: sorted(folder.glob(pattern)) for name, pattern in self.file_pattern}
        except OSError as error:
            where = error.filename or folder
            raise TaskError(f"task {self.name}: {where}: {error.strerror}") from error
        except ValueError as error:
            raise TaskError(f"task {self.name}: files of {folder}: {error}") from error
        if not any(groups.values()):
            patterns = ", ".join(str(folder / pattern) for _, pattern in self.file_pattern)
            raise TaskError(f"task {self.name}: no file is {patterns}")
        return {name: files for name, files in groups.items() if files}

    def groups_without_files(self, data: Path) -> list[str]:
        """Return the names of groups without any file."""
        groups = self.files(data)
        return [name for name, _ in self.file_pattern if name not in groups]


def _raise(error: OSError) -> None:
    raise error


def load_task(path: Path) -> TaskConfig:
    """Read a task file.

    Raises:
      TaskError: no file, no YAML, or a field that is unknown, missing, of the wrong kind or
        not for the task's type.
    """
    content = read_yaml(path, TaskError)
    try:
        return _parse(content)
    except TaskError as error:
        raise TaskError(f"{path}: {error}") from error


def is_plain_name(name: str) -> bool:
    """Return whether a name of a folder or file is a name alone, not a path."""
    return name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def _parse(content: dict[str, Any]) -> TaskConfig:
    known = {field.name: field for field in dataclasses.fields(TaskConfig)}
    fields: dict[str, Any] = {}
    for spelled, value in content.items():
        name = spelled.replace("-", "_")
        if name not in known:
            raise TaskError(f"unknown field {shown(spelled)}; known are {', '.join(sorted(known))}")
        if name in fields:
            raise TaskError(f"{spelled} is given twice")
        fields[name] = value
    for name in ("name", "type", "path"):
        if name not in fields:
            raise TaskError(f"the field {name!r} is missing")
    if fields["type"] not in TYPES:
        raise TaskError(f"type={shown(fields['type'])}: one of {', '.join(TYPES)}")
    for name in fields:
        if fields["type"] not in _OF_TYPE.get(name, TYPES):
            raise TaskError(f"{name} is not for tasks of type {fields['type']!r}")
    values = {name: _value(name, known[name].type, value) for name, value in fields.items()}
    if values.get("sampling_strategy", STRATEGIES[0]) not in STRATEGIES:
        raise TaskError(
            f"sampling_strategy={shown(values['sampling_strategy'])}: {' or '.join(STRATEGIES)}"
        )
    if values["type"] == "other" and not values.get("module"):
        raise TaskError("a task of type 'other' takes a module, the dotted path of its class")
    return TaskConfig(**values)


def _value(name: str, kind: Any, value: Any) -> Any:
    """Convert a value to its field's type."""
    if name == "file_pattern":
        groups = {"all": value} if isinstance(value, str) else value
        if not isinstance(groups, dict) or not groups:
            raise TaskError(f"file_pattern={shown(value)}: a pattern, or one for each group")
        if not all(isinstance(pattern, str) for pattern in groups.values()):
            raise TaskError(f"file_pattern={shown(value)}: a group's pattern is a text")
        return tuple((str(group), pattern) for group, pattern in groups.items())
    if kind == tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise TaskError(f"{name}: expected a list of texts, got {shown(value)}")
        return tuple(value)
    if name == "module" and value is None:
        return None
    wanted: type = {bool: bool, int: int, float: float}.get(kind, str)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**53 else math.inf
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise TaskError(f"{name}: expected {wanted.__name__}, got {shown(value)}")
    return value


def find_tasks(paths: Iterable[Path]) -> list[Path]:
    """Return task files, and those in folders, in order.

    Raises:
      TaskError: a path is neither, or a folder has none.
    """
    files: list[Path] = []
    for path in paths:
        inside = sorted(path.rglob("*.yaml")) if path.is_dir() else [path]
        if not inside or not all(file.is_file() for file in inside):
            raise TaskError(f"{path} is no task file, and no folder that holds any")
        files += inside
    return files
