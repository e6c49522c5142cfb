"""Output that is whole or not there, after a loss of power too.

Everything is written beside its place, synced to the disk and renamed (`put_in_place`).
"""

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm_jax import processes
from glm_jax.errors import UserError

# Errors of writing alone: the files that are read at the same time do not raise them.
_OF_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class OutputError(UserError):
    """An output that cannot be written; what was there before is as it was."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write a file to: it becomes `path`, whole, at the end.

    Raises:
      OutputError: the file cannot be written; what was at `path` stays.
    """
    # No two writers share a name, on whatever hosts they run.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            put_in_place(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8, whole; see `replacing`.

    Raises:
      OutputError: the file cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def refuse_non_empty(path: Path) -> None:
    """Raises OutputError where writing to `path` would mix with what is there."""
    with _explained(path):
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise OutputError(f"output {path} is not empty: remove it or name another folder")


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a folder to write, beside `path`; it becomes `path`, whole, at the end, and is
    removed at an error. Joined processes all enter, and the first makes and renames it.

    Raises:
      OutputError: there is something at `path` already, or it cannot be written.
    """
    target = Path(path).absolute()
    refuse_non_empty(target)
    partial = target.with_name(f"{target.name}.partial")
    with _explained(target):
        if processes.is_first():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        processes.wait(f"a place for {target.name}")
        try:
            yield partial
            if processes.is_first():
                put_in_place(partial, target)
        except BaseException:
            if processes.is_first():
                shutil.rmtree(partial, ignore_errors=True)
            raise
        processes.wait(f"{target.name} is whole")


def put_in_place(partial: Path, target: Path) -> None:
    """Renames a file or folder that is whole to `target`, where there is nothing yet, a file
    or an empty folder. What it holds is on the disk before the name is, and the name when this
    returns."""
    sync(partial)
    partial.rename(target)
    _sync_one(target.parent)


def sync(path: Path) -> None:
    """Returns when a file, or a folder with all that is in it, is on the disk."""
    for parent, _, names in os.walk(path):
        for name in names:
            _sync_one(Path(parent, name))
        _sync_one(Path(parent))
    if not path.is_dir():
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that syncs no folders
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path, error: type[UserError], if_missing: str) -> Any:
    """The content of a JSON file.

    Raises:
      error: the file is missing, which `if_missing` says, or cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as missing:
        raise error(if_missing) from missing
    except OSError as unreadable:
        raise error(f"{path}: {unreadable.strerror}") from unreadable
    except (ValueError, RecursionError) as wrong:
        raise error(f"{path} is not JSON: {str(wrong)[:200]}") from wrong


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns the system's errors about an output into one line."""
    try:
        yield
    except OSError as error:
        above = {str(folder) for folder in (path, *path.parents)}
        is_of_path = str(error.filename) in above or str(error.filename).startswith(f"{path}.")
        if error.errno not in _OF_OUTPUT and not is_of_path:
            raise
        file = next((folder for folder in path.parents if folder.is_file()), None)
        why = error.strerror if file is None else f"{file} is a file"
        raise OutputError(f"output {path} cannot be written: {why}") from error
