"""The folder of a batch job: answers in parts, none of them lost or duplicated.

Every process appends whole lines to parts of its own, and a process that starts again begins
a new part; what a killed one left half-written has no line break and does not count. `job.json`
says what the answers are to.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from glm_jax import files
from glm_jax.errors import UserError
from glm_jax.text_files import raw_lines

MERGED_FILE = "answers.jsonl"
_JOB_FILE = "job.json"
_PART = "part_{process:05d}_{number:05d}.jsonl"
_RECORDS_A_PART = 10_000
_MAX_REQUESTS = 1 << 32
_JOB_CHECKSUM = "crc32"
# The last field of a line of a part: of the line as it would be without it.
_CHECKSUM = re.compile(rb', "crc32": "([0-9a-f]{8})"\}\n$')
# JSON allows them inside a text; some readers of lines break there.
_LINE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


class JobError(UserError):
    """A folder or input with which the job cannot go on."""


def describe_input(path: Path) -> dict[str, Any]:
    """Return what identifies an input file, and its number of requests.

    Raises:
      JobError: it holds no prompt.
      TextFileError: it cannot be read.
    """
    requests = sum(bool(line.strip()) for line in raw_lines(path))
    if not requests:
        raise JobError(f"--input={path} holds no prompt")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "requests": requests}


def claim(folder: Path, job: dict[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
    """Write a job's description into a folder, or check that it is there.

    Args:
      defaults: of fields that a description may lack, as one that was written before there were
        these fields.

    Raises:
      JobError: it holds another job's answers, or something else.
    """
    file = folder / _JOB_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if any(folder.glob("*.jsonl")):
                raise JobError(f"{folder} holds files that no job wrote: name another --output")
            content = job | {_JOB_CHECKSUM: _job_checksum(job)}
            files.write_text(file, json.dumps(content, indent=2) + "\n")
        existing = dict(defaults or {}) | read_job(folder)
    except OSError as error:
        raise JobError(f"--output={folder}: {error.strerror}") from error
    for name in sorted(set(existing) | set(job)):
        if existing.get(name) != job.get(name):
            raise JobError(
                f"{folder} holds answers of another job: {name} was {existing.get(name)!r} and is "
                f"{job.get(name)!r}; give what it was, or name another --output"
            )


def read_job(folder: Path) -> dict[str, Any]:
    """Return the description that `claim` wrote.

    Raises:
      JobError: the folder is no job's, or its file is damaged.
    """
    file = folder / _JOB_FILE
    job = files.read_json(file, JobError, f"{folder} is no job's output: {_JOB_FILE} is missing")
    if not isinstance(job, dict) or job.pop(_JOB_CHECKSUM, None) != _job_checksum(job):
        raise JobError(f"{file} is not what was written: name another --output")
    return job


def _job_checksum(job: dict[str, Any]) -> int:
    fields = {name: value for name, value in job.items() if name != _JOB_CHECKSUM}
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def requests_of(folder: Path) -> int:
    """Return a job's number of requests.

    Raises:
      JobError: see `read_job`.
    """
    try:
        requests = read_job(folder)["input"]["requests"]
    except (KeyError, TypeError) as error:
        raise JobError(f"{folder / _JOB_FILE} does not say how many requests there are") from error
    if not isinstance(requests, int) or not 0 < requests < _MAX_REQUESTS:
        raise JobError(f"{folder / _JOB_FILE}: {requests!r} requests")
    return requests


def _whole_lines(folder: Path, requests: int | None) -> Iterator[tuple[Path, int, bytes, int]]:
    """Yield file, byte offset, content without checksum, and request index of every whole line.

    A damaged one counts as not there, which a line on stderr says.

    Args:
      requests: of the job; None if not known.
    """
    for part in sorted(folder.glob("part_*.jsonl")):
        with part.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                index, content = _checked(line, requests)
                if index is not None:
                    yield part, offset, content, index
                elif line.endswith(b"\n") and b"\0" not in line:  # as losing power leaves them
                    message = "this answer is not what was written, and does not count"
                    print(f"{part}:{number}: {message}", file=sys.stderr)
                offset += len(line)


def _checked(line: bytes, requests: int | None) -> tuple[int | None, bytes]:
    """Return the request index of a line, None if it is not whole, and its content."""
    match = _CHECKSUM.search(line)
    if match is None:
        return None, line
    content = line[: match.start()] + b"}\n"
    if zlib.crc32(content) != int(match[1], 16):
        return None, content
    try:
        index = json.loads(content)["index"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, content
    is_index = isinstance(index, int) and not isinstance(index, bool) and index >= 0
    is_ours = is_index and (requests is None or index < requests)
    return index if is_ours else None, content


def answered(folder: Path, requests: int) -> np.ndarray:
    """Return bool [requests], true for those that have an answer."""
    done = np.zeros(requests, bool)
    for _, _, _, index in _whole_lines(folder, requests):
        done[index] = True
    return done


def read_records(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the first record of each index that has one."""
    records: dict[int, dict[str, Any]] = {}
    for _, _, line, index in _whole_lines(folder, None):
        if index not in records:
            records[index] = json.loads(line)
    return records


class AnswerWriter:
    """Appends records to the parts of one process.

    Raises:
      JobError: a part cannot be written; what was written before is whole.
    """

    def __init__(self, folder: Path, process: int):
        self._folder, self._process = folder, process
        self._file: BinaryIO | None = None
        self._records = 0
        numbers = (
            path.stem.rsplit("_", 1)[1] for path in folder.glob(f"part_{process:05d}_*.jsonl")
        )
        self._number = 1 + max((int(n) for n in numbers if n.isdecimal()), default=-1)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line; it is handed to the operating system before this returns."""
        try:
            text = json.dumps(record, ensure_ascii=False, allow_nan=False).translate(_LINE_BREAKS)
        except ValueError as error:  # JSON has no NaN: the model's numbers are none
            raise JobError(f"the answer {record.get('index')} is no JSON: {error}") from error
        content = text.encode("utf-8", "backslashreplace")
        checksum = zlib.crc32(content + b"\n")
        line = content[:-1] + f', "crc32": "{checksum:08x}"}}\n'.encode()
        try:
            if self._file is None:
                name = _PART.format(process=self._process, number=self._number)
                self._file = (self._folder / name).open("xb", buffering=0)
            if self._file.write(line) != len(line):
                raise JobError(f"{self._file.name}: written in part: is the disk full?")
        except OSError as error:
            raise JobError(f"{self._folder}: {error.strerror}: free some space, go on") from error
        self._records += 1
        if self._records % _RECORDS_A_PART == 0:
            self.close()
            self._number += 1

    def close(self) -> None:
        if self._file is not None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise JobError(f"{self._file.name}: {error.strerror}") from error
            finally:
                self._file.close()
                self._file = None


def merge(folder: Path) -> Path:
    """Write all answers to one file, in the order of the input.

    Raises:
      JobError: answers are missing.
    """
    requests = requests_of(folder)
    numbers: dict[Path, int] = {}
    where = np.full((requests, 2), -1, np.int64)  # file and byte offset of each
    for part, offset, _, index in _whole_lines(folder, requests):
        if where[index, 0] < 0:
            where[index] = numbers.setdefault(part, len(numbers)), offset
    missing = int((where[:, 0] < 0).sum())
    if missing:
        first = int(np.argmax(where[:, 0] < 0))
        raise JobError(
            f"{folder}: {missing} of {requests} answers are missing, the first of them to "
            f"request {first}: run the job to its end before --merge"
        )
    target = folder / MERGED_FILE
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(part.open("rb")) for part in numbers]
        output = stack.enter_context(files.replacing(target)).open("wb")
        with output:
            for number, offset in where.tolist():
                opened[number].seek(offset)
                output.write(_checked(opened[number].readline(), requests)[1])
    return target
