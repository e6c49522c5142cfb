"""Evaluates tasks; examples that an earlier run answered are not asked again.

OUTPUT/records/TASK/GROUP/FILE/   records of one data file, as `jobs.record_store` keeps them
OUTPUT/results.json               once all records are there
"""

import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax import processes
from glm_jax.config import GLMConfig
from glm_jax.evaluation.examples import DatasetError, checked_items
from glm_jax.evaluation.results import file_results, task_results
from glm_jax.evaluation.task_config import TaskConfig, TaskError
from glm_jax.evaluation.tasks import Model, Task, task_class, within
from glm_jax.generation.blank_filling import TextCodec
from glm_jax.jobs import record_store
from glm_jax.jobs.batch_job import Share
from glm_jax.jobs.record_store import AnswerWriter
from glm_jax.progress import progress_bar

RECORDS_FOLDER = "records"
# Fields that do not change what is answered.
_FREE = ("metrics", "micro_batch_size", "save_prediction", "file_pattern")


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A data file of a task's group, and the folder of its records."""

    group: str
    name: str
    path: Path
    records: Path


def data_files(config: TaskConfig, data: Path, output: Path) -> list[DataFile]:
    """Return all data files of a task.

    Raises:
      TaskError: it has none.
    """
    files = []
    for group, paths in config.files(data).items():
        for path in paths:
            name = path.relative_to(data / config.path).as_posix()
            flat = name.replace("/", "__")
            folder = output / RECORDS_FOLDER / config.name.replace("/", "_") / group / flat
            files.append(DataFile(group, name, path, folder))
    return files


def with_data(configs: Sequence[TaskConfig], data: Path, skips_others: bool) -> list[TaskConfig]:
    """Return the tasks that have data files.

    Args:
      skips_others: tasks without data are left out, and named on stderr.

    Raises:
      TaskError: names all tasks without data, where they are not left out, or are all.
    """
    missing = {}
    for config in configs:
        try:
            config.files(data)
        except TaskError as error:
            missing[config.name] = str(error)
    present = [config for config in configs if config.name not in missing]
    if not missing:
        return present
    names = f"{len(missing)} of {len(configs)} tasks have no data in {data}: {', '.join(missing)}"
    if present and skips_others:
        print(f"{names}; they are left out", file=sys.stderr)
        return present
    first = next(iter(missing.values()))
    if len(configs) == 1:
        raise TaskError(first)
    advice = "" if skips_others else "; --skip_missing evaluates the others"
    raise TaskError(f"{names} ({first}){advice}: launch.prepare_task writes a task's data")


def check(configs: Sequence[TaskConfig], data: Path, model: GLMConfig, tokenizer: TextCodec) -> int:
    """Print everything that is wrong with the data of tasks, and return how much that is.

    Raises:
      TaskError: a task has no data, or no class.
    """
    count = 0
    for config in configs:
        complaint = task_class(config).complaint
        config = within(config, model.max_sequence_length)
        for path in itertools.chain(*config.files(data).values()):
            items = checked_items(path, config, tokenizer, model.vocab_size, complaint)
            wrong = [item for item in items if isinstance(item, DatasetError)]
            for problem in wrong:
                print(problem)
            count += len(wrong)
    return count


def evaluate(
    configs: Sequence[TaskConfig],
    data: Path,
    output: Path,
    model: Model,
    share: Share,
    identity: dict[str, Any],
) -> dict[str, Any] | None:
    """Answer this process's share of the examples that have no record yet.

    Args:
      share: of several processes; each answers every n-th example.
      identity: what of the model decides its answers; another's records are refused.

    Returns:
      Results, once every example has its record, else None: other processes are at work.

    Raises:
      TaskError, DatasetError: of a task's file or data.
      JobError: records of something else are in the folder.
    """
    names = [config.name for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise TaskError(f"two tasks have the name {name!r}")
    tasks = [task_class(config)(config, model) for config in configs]
    files = {task: data_files(task.config, data, output) for task in tasks}
    for task in tasks:
        task.metrics()  # before anything is run
        for group in task.config.groups_without_files(data):
            print(f"task {task.config.name}: group {group} has no file", file=sys.stderr)
    results_of: dict[DataFile, dict[str, Any] | None] = {}
    for task, of_task in files.items():
        for file in of_task:
            examples = task.read(file.path)
            _answer_file(task, file, examples, share, identity)
            results_of[file] = _file_results(task, file, examples)
    results = {}
    for task, of_task in files.items():
        groups: dict[str, dict[str, Any]] = {}
        for file in of_task:
            # Another process may have ended with it since.
            result = results_of[file] or _file_results(task, file, task.read(file.path))
            if result is None:
                return None
            groups.setdefault(file.group, {})[file.name] = result
        results[task.config.name] = task_results(groups)
    return {"model": identity, "tasks": results}


def _answer_file(
    task: Task, file: DataFile, examples: list[Any], share: Share, identity: dict[str, Any]
) -> None:
    record_store.claim(file.records, _description(task, file, len(examples)) | identity)
    done = record_store.answered(file.records, len(examples))
    processes.wait("records that are there are known")
    own = np.arange(share.process, len(examples), share.count)
    wanted = own[~done[own]].tolist()
    bar = progress_bar(
        desc=f"{task.config.name} {file.name}",
        total=len(own),
        initial=len(own) - len(wanted),
        unit="example",
        disable=not share.writes,
    )
    writer = AnswerWriter(file.records, share.process) if share.writes else None
    with bar:
        for index, record in task.answer(examples, wanted) if wanted else ():
            if writer is not None:
                writer.write({"index": index} | record)
            bar.update()
    if writer is not None:
        writer.close()
    processes.wait("the file is answered")


def _description(task: Task, file: DataFile, examples: int) -> dict[str, Any]:
    config = {k: v for k, v in dataclasses.asdict(task.config).items() if k not in _FREE}
    described = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
    try:
        digest = hashlib.sha256(file.path.read_bytes()).hexdigest()
    except OSError as error:
        raise DatasetError(f"{file.path}: {error.strerror}") from error
    return {"task": described, "data_sha256": digest, "examples": examples}


def _file_results(task: Task, file: DataFile, examples: list[Any]) -> dict[str, Any] | None:
    """Return a file's results, None while records are missing."""
    records = record_store.read_records(file.records)
    if len(records) < len(examples):
        return None
    predictions = [task.prediction(records[i]) for i in range(len(examples))]
    return file_results(task.metrics(), predictions, examples, task.model.tokenizer)
