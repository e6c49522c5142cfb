"""Tokenise files once, into array_record shards that training reads in random order.

The work is divided into shards, each of a part of a file. A shard is written beside its final name
and renamed when it is complete, and its counts are written after it: an interrupted call resumes
with the remaining shards.
"""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from glm_jax.data.documents import parse_instruction, parse_text
from glm_jax.data.documents import text_records as records_of_text
from glm_jax.data.records import DATASET_FILE, DataError, Record, fingerprint
from glm_jax.errors import UserError
from glm_jax.files import refuse_non_empty, replacing, write_text
from glm_jax.progress import progress_bar
from glm_jax.text_files import is_compressed, is_json_lines, raw_lines, read_json
from glm_jax.tokenizer import Tokenizer

BAD_LINES_FILE = "bad_lines.txt"
_PART_BYTES = 64 * 2**20  # of a plain file; a compressed one is read from its beginning
_NUM_SHOWN = 3  # bad lines in an error message


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """Tokenise the lines of `file` that begin in its bytes [start, end) into `shard`.

    Attributes:
      end: None for all lines to the end.
      shard: file name.
    """

    file: Path
    start: int
    end: int | None
    shard: str


@dataclasses.dataclass(frozen=True)
class Settings:
    """How files are tokenised.

    Attributes:
      kind: one of `KINDS_OF_FILES`.
      window: tokens of a record at most.
    """

    tokenizer: Path
    kind: str
    window: int


def plan(files: Sequence[Path], part_bytes: int = _PART_BYTES) -> list[ShardTask]:
    """Divide files into shards; the result depends on the files alone."""
    parts: list[tuple[Path, int, int | None]] = []
    for file in files:
        if is_compressed(file):
            parts.append((file, 0, None))
            continue
        size = file.stat().st_size
        parts += [(file, at, min(at + part_bytes, size)) for at in range(0, size, part_bytes)]
    count = len(parts)
    return [
        ShardTask(*part, f"{i:05d}-of-{count:05d}.array_record") for i, part in enumerate(parts)
    ]


def prepare(
    files: Sequence[Path],
    output: Path,
    tokenizer: Tokenizer,
    *,
    kind: str,
    language: str,
    window: int,
    processes: int,
    max_bad_lines: int,
    part_bytes: int = _PART_BYTES,
) -> dict[str, Any]:
    """Write a dataset folder, or complete one whose preparation was interrupted.

    Args:
      output: the folder.
      kind: "text" or "instructions".
      language: the dataset's name in metrics.
      window: tokens of a record at most.
      processes: number of processes to tokenise with.
      max_bad_lines: lines that cannot be used are left out and listed in `bad_lines.txt`; more
        than this number are an error.
      part_bytes: bytes of a plain file for one shard.

    Returns:
      The content of `dataset.json`.

    Raises:
      DataError: there are too many bad lines, or no text; a file cannot be read; or the folder
        was begun with other files or settings.
      OutputError: the folder has other content, or cannot be written.
    """
    tasks = plan(files, part_bytes)
    settings = Settings(tokenizer.files[0], kind, window)
    about: dict[str, Any] = {
        "kind": kind,
        "language": language,
        "window": window,
        "tokenizer": fingerprint(tokenizer),
        "sources": [[str(file), file.stat().st_size] for file in files],
        "shards": [task.shard for task in tasks],
    }
    _begin(output, about)
    counts = _run(tasks, output, settings, processes)
    bad = list(_bad_lines(tasks, counts))
    lines = [f"{file}:{line}: {reason}" for file, line, reason in bad]
    # A file's name can be any bytes.
    lines = [line.encode("utf-8", "backslashreplace").decode() for line in lines]
    write_text(output / BAD_LINES_FILE, "".join(f"{line}\n" for line in lines))
    if len(bad) > max_bad_lines:
        raise DataError(
            f"{len(bad)} bad lines, more than {max_bad_lines}; all are in "
            f"{output / BAD_LINES_FILE}, the first: {'; '.join(lines[:_NUM_SHOWN])}"
        )
    about |= {name: sum(c[name] for c in counts) for name in ("records", "tokens", "lines")}
    about["bad_lines"] = len(bad)
    if not about["records"]:
        shown = f"; {len(bad)} bad lines, the first: {lines[0]}" if bad else ""
        raise DataError(f"{files[0]}: no text in the training files{shown}")
    write_text(output / DATASET_FILE, json.dumps(about, indent=2) + "\n")
    return about


def _begin(output: Path, about: dict[str, Any]) -> None:
    """Record what is prepared into the folder, or check that an earlier call began the same."""
    plan_file = output / "plan.json"
    if plan_file.is_file():
        begun = _read(plan_file)
        differing = [name for name in about if begun.get(name) != about[name]]
        if differing:
            raise DataError(
                f"{output} was begun with another {differing[0]}: complete it with the same, or "
                "name another folder"
            )
        for partial in output.glob("*.partial"):  # of workers that were killed
            partial.unlink(missing_ok=True)
        return
    refuse_non_empty(output)
    output.mkdir(parents=True, exist_ok=True)
    write_text(plan_file, json.dumps(about, indent=2) + "\n")


def _run(
    tasks: Sequence[ShardTask], output: Path, settings: Settings, processes: int
) -> list[dict[str, Any]]:
    """Write all shards that are not there, and return the counts of each."""
    remaining = [task for task in tasks if not _counts_file(output, task).is_file()]
    work = functools.partial(_tokenize_shard, output=output, settings=settings)
    done = len(tasks) - len(remaining)
    with progress_bar(desc="tokenising", total=len(tasks), initial=done, unit="shard") as bar:
        if processes == 1:
            for task in remaining:
                work(task)
                bar.update()
        elif remaining:
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
                try:
                    # The workers start here, and Ctrl-C is for this process alone.
                    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                    futures = [pool.submit(work, task) for task in remaining]
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                    for future in concurrent.futures.as_completed(futures):
                        future.result()
                        bar.update()
                except BrokenProcessPool as error:
                    raise DataError(
                        "a process was killed, perhaps for lack of memory: use fewer --processes"
                    ) from error
                except BaseException:  # unfinished shards are written again
                    for worker in multiprocessing.active_children():
                        worker.terminate()
                    raise
    return [_read(_counts_file(output, task)) for task in tasks]


def _read(file: Path) -> dict[str, Any]:
    """Read a JSON file that an earlier call wrote."""
    try:
        content = read_json(file)
    except UserError as error:
        raise DataError(f"{error}: remove {file.parent} and prepare it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} is not a JSON object: remove {file.parent} and prepare it again")
    return content


def _tokenize_shard(task: ShardTask, output: Path, settings: Settings) -> None:
    tokenizer = Tokenizer(settings.tokenizer)
    with replacing(output / task.shard) as partial:
        counts = _write_shard(task, partial, tokenizer, settings)
    write_text(_counts_file(output, task), json.dumps(counts))


def _write_shard(
    task: ShardTask, path: Path, tokenizer: Tokenizer, settings: Settings
) -> dict[str, Any]:
    """Write a shard and return its counts."""
    counts: dict[str, Any] = {"records": 0, "tokens": 0, "lines": 0, "bad": []}
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        for line in raw_lines(task.file, task.start, task.end):
            counts["lines"] += 1
            try:
                records = list(_records(line, task, tokenizer, settings))
            except UserError as error:
                counts["bad"].append([counts["lines"], str(error)])
                continue
            for record in records:
                writer.write(record.encode())
                counts["tokens"] += len(record.tokens)
            counts["records"] += len(records)
    finally:
        writer.close()
    return counts


def _records(
    line: bytes, task: ShardTask, tokenizer: Tokenizer, settings: Settings
) -> Iterator[Record]:
    if settings.kind == "instructions":
        record = parse_instruction(line, tokenizer)
        if record is not None:
            yield record
        return
    text = parse_text(line, is_json_lines(task.file))
    if text.strip():
        yield from records_of_text(text, tokenizer, settings.window)


def _bad_lines(
    tasks: Sequence[ShardTask], counts: Sequence[dict[str, Any]]
) -> Iterator[tuple[Path, int, str]]:
    """Yield file, line number in it, and reason; the counts of a shard begin at its own line 1."""
    file, before = None, 0
    for task, count in zip(tasks, counts, strict=True):
        if task.file != file:
            file, before = task.file, 0
        for line, reason in count["bad"]:
            yield task.file, before + line, reason
        before += count["lines"]


def _counts_file(output: Path, task: ShardTask) -> Path:
    return output / f"{task.shard}.json"
