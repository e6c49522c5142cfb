"""Tokenises files once, into array_record shards that training reads at random.

The work is cut into jobs, each a part of a file and a shard. A shard is written beside its
place and renamed when whole, what was counted in it a moment later, so that work broken off
goes on with the jobs that are left.
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
from tqdm import tqdm

from glm_jax.data.documents import parse_instruction, parse_text
from glm_jax.data.documents import text_records as records_of_text
from glm_jax.data.records import DATASET_FILE, DataError, Record, fingerprint
from glm_jax.errors import UserError
from glm_jax.files import refuse_non_empty, replacing, write_text
from glm_jax.text_files import is_json_lines, is_packed, raw_lines, read_json
from glm_jax.tokenizer import Tokenizer

BAD_LINES_FILE = "bad_lines.txt"
_PART_BYTES = 64 * 2**20  # of a plain file; a packed one cannot be entered in the middle
_SHOWN = 3  # bad lines that an error message repeats


@dataclasses.dataclass(frozen=True)
class Job:
    """Lines of `file` that begin in bytes [start, end), unpacked, to shard `shard`."""

    file: Path
    start: int
    end: int | None
    shard: str


@dataclasses.dataclass(frozen=True)
class Settings:
    """How files are tokenised; `window` is the most tokens of a record."""

    tokenizer: Path
    kind: str
    window: int


def plan(files: Sequence[Path], part_bytes: int = _PART_BYTES) -> list[Job]:
    """The jobs of some files, the same whenever the files are the same."""
    parts: list[tuple[Path, int, int | None]] = []
    for file in files:
        if is_packed(file):
            parts.append((file, 0, None))
            continue
        size = file.stat().st_size
        parts += [(file, at, min(at + part_bytes, size)) for at in range(0, size, part_bytes)]
    count = len(parts)
    return [Job(*part, f"{i:05d}-of-{count:05d}.array_record") for i, part in enumerate(parts)]


def prepare(
    files: Sequence[Path],
    output: Path,
    tokenizer: Tokenizer,
    *,
    kind: str,
    language: str,
    window: int,
    processes: int,
    most_bad_lines: int,
    part_bytes: int = _PART_BYTES,
) -> dict[str, Any]:
    """Writes a dataset folder, going on with one that was broken off.

    Args:
      kind: "text" or "instructions".
      language: the dataset's name in metrics.
      most_bad_lines: lines that cannot be used are counted, left out and listed in
        `bad_lines.txt`; more than so many are an error.

    Returns:
      What `dataset.json` says.

    Raises:
      DataError: too many bad lines, no text at all, unreadable files, or a folder that
        other files or settings were prepared into.
      OutputError: a folder that holds something else, or cannot be written.
    """
    jobs = plan(files, part_bytes)
    settings = Settings(tokenizer.files[0], kind, window)
    about: dict[str, Any] = {
        "kind": kind,
        "language": language,
        "window": window,
        "tokenizer": fingerprint(tokenizer),
        "sources": [[str(file), file.stat().st_size] for file in files],
        "shards": [job.shard for job in jobs],
    }
    _begin(output, about)
    counts = _run(jobs, output, settings, processes)
    bad = list(_bad_lines(jobs, counts))
    lines = [f"{file}:{line}: {reason}" for file, line, reason in bad]
    # A file's name can be any bytes.
    lines = [line.encode("utf-8", "backslashreplace").decode() for line in lines]
    write_text(output / BAD_LINES_FILE, "".join(f"{line}\n" for line in lines))
    if len(bad) > most_bad_lines:
        raise DataError(
            f"{len(bad)} bad lines, more than {most_bad_lines}; all are in "
            f"{output / BAD_LINES_FILE}, the first: {'; '.join(lines[:_SHOWN])}"
        )
    about |= {name: sum(c[name] for c in counts) for name in ("records", "tokens", "lines")}
    about["bad_lines"] = len(bad)
    if not about["records"]:
        shown = f"; {len(bad)} bad lines, the first: {lines[0]}" if bad else ""
        raise DataError(f"{files[0]}: no text in the training files{shown}")
    write_text(output / DATASET_FILE, json.dumps(about, indent=2) + "\n")
    return about


def _begin(output: Path, about: dict[str, Any]) -> None:
    """Notes what is prepared here, or checks that it is the same as what was begun."""
    plan_file = output / "plan.json"
    if plan_file.is_file():
        begun = _read(plan_file)
        differing = [name for name in about if begun.get(name) != about[name]]
        if differing:
            raise DataError(
                f"{output} was begun with another {differing[0]}: finish it as it was begun, or "
                "name another folder"
            )
        for left in output.glob("*.partial"):  # by workers that were killed
            left.unlink(missing_ok=True)
        return
    refuse_non_empty(output)
    output.mkdir(parents=True, exist_ok=True)
    write_text(plan_file, json.dumps(about, indent=2) + "\n")


def _run(
    jobs: Sequence[Job], output: Path, settings: Settings, processes: int
) -> list[dict[str, Any]]:
    """What was counted in each job, doing those that are not done."""
    todo = [job for job in jobs if not _counts_file(output, job).is_file()]
    work = functools.partial(_do, output=output, settings=settings)
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc="tokenising", unit="shard")
    with bar:
        if processes == 1:
            for job in todo:
                work(job)
                bar.update()
        elif todo:
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
                try:
                    # Ctrl-C is for this process, not for the workers, which start here.
                    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                    futures = [pool.submit(work, job) for job in todo]
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                    for done in concurrent.futures.as_completed(futures):
                        done.result()
                        bar.update()
                except BrokenProcessPool as error:
                    raise DataError(
                        "a process was killed: is memory short? go on with fewer --processes"
                    ) from error
                except BaseException:  # what they have begun is begun again
                    for worker in multiprocessing.active_children():
                        worker.terminate()
                    raise
    return [_read(_counts_file(output, job)) for job in jobs]


def _read(file: Path) -> dict[str, Any]:
    """What an earlier call noted in a folder."""
    try:
        content = read_json(file)
    except UserError as error:
        raise DataError(f"{error}: remove {file.parent} and prepare it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: no JSON object: remove {file.parent} and prepare it again")
    return content


def _do(job: Job, output: Path, settings: Settings) -> None:
    tokenizer = Tokenizer(settings.tokenizer)
    with replacing(output / job.shard) as partial:
        counts = _write_shard(job, partial, tokenizer, settings)
    write_text(_counts_file(output, job), json.dumps(counts))


def _write_shard(job: Job, path: Path, tokenizer: Tokenizer, settings: Settings) -> dict[str, Any]:
    """What was counted while writing."""
    counts: dict[str, Any] = {"records": 0, "tokens": 0, "lines": 0, "bad": []}
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        for line in raw_lines(job.file, job.start, job.end):
            counts["lines"] += 1
            try:
                records = list(_records(line, job, tokenizer, settings))
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


def _records(line: bytes, job: Job, tokenizer: Tokenizer, settings: Settings) -> Iterator[Record]:
    if settings.kind == "instructions":
        record = parse_instruction(line, tokenizer)
        if record is not None:
            yield record
        return
    text = parse_text(line, is_json_lines(job.file))
    if text.strip():
        yield from records_of_text(text, tokenizer, settings.window)


def _bad_lines(
    jobs: Sequence[Job], counts: Sequence[dict[str, Any]]
) -> Iterator[tuple[Path, int, str]]:
    """File, number of the line in it, and reason: parts count from their own first line."""
    file, before = None, 0
    for job, count in zip(jobs, counts, strict=True):
        if job.file != file:
            file, before = job.file, 0
        for line, reason in count["bad"]:
            yield job.file, before + line, reason
        before += count["lines"]


def _counts_file(output: Path, job: Job) -> Path:
    return output / f"{job.shard}.json"
