"""Output that is complete or absent, even after a power failure, with one writer at a time.

A file or folder is written beside its final path, synced to the disk and renamed (`put_in_place`).
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from glm_jax import processes
from glm_jax.errors import UserError, is_no_room, parser_refusal

# Errors that only writing raises, not the files that are read at the same time.
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_LOCK = re.compile(r"\..*\.lock")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # the file system has no locks


class OutputError(UserError):
    """An output that cannot be written; an earlier one is unchanged."""


class LockedError(OutputError):
    """An output that another process is writing."""


@contextlib.contextmanager
def locked(path: Path, number: int = 0, count: int = 1) -> Iterator[None]:
    """Hold a lock that keeps other processes from writing to `path`, which need not exist.

    The system releases the lock when this process ends, for whatever reason: only the lock file,
    `.NAME.lock` beside `path`, may remain. Of joined processes the first has the lock. On a file
    system without locks there is none, and a line on stderr says so.

    Args:
      number, count: index and number of processes that share the output without being joined;
        each index can be used once. A process with count 1 does not share.

    Raises:
      LockedError: another process has the lock; the message names it.
      OutputError: `path` cannot be written, or is a link to nothing.
    """
    if processes.are_joined() and not processes.is_first():
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_lock(path, "", count > 1))
        if count > 1:
            stack.enter_context(_lock(path, f".{number}", False))
        yield


@contextlib.contextmanager
def _lock(path: Path, suffix: str, is_shared: bool) -> Iterator[None]:
    if os.path.islink(path) and not os.path.exists(path):  # False for names that are too long
        raise OutputError(
            f"output {path} is a link to {path.readlink()}, which is not there: make that folder, "
            "or name another"
        )
    path = path.resolve()  # the same lock whatever links lead to the path
    with explained(path):
        is_inside = path.is_dir() and not os.access(path.parent, os.W_OK)
        file = (path if is_inside else path.parent) / f".{path.name}{suffix}.lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open_lock(path, file, is_shared)
    if descriptor is None:
        yield
        return
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = f"process {os.getpid()} on {socket.gethostname()} since {since}"
        os.pwrite(descriptor, holder.ljust(200).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            # The last holder removes the file, while no other can take the lock.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()
        os.close(descriptor)


def _open_lock(path: Path, file: Path, is_shared: bool) -> int | None:
    """Return a locked file descriptor, or None if the file system has no locks."""
    kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                    return descriptor
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
            os.close(descriptor)
            raise LockedError(
                f"{path} is being written by {holder or 'another process'}: wait until it has "
                "ended, or name another folder"
            ) from error
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"{path}: no locks on this file system ({error.strerror}): make sure that no "
                "other process writes there",
                file=sys.stderr,
            )
            return None
        os.close(descriptor)  # its last holder has just removed the file


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file to, which is renamed to `path` at the end.

    Raises:
      OutputError: the file cannot be written, or is a device; an earlier file at `path` stays.
    """
    path = path.resolve()  # keeps a symbolic link
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OutputError(f"output {path} is not a regular file")
    # Unique for each writer on all hosts.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            put_in_place(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file as a whole; see `replacing`.

    Raises:
      OutputError: the file cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def refuse_non_empty(path: Path) -> None:
    """Raise OutputError if `path` is a file or a folder with content."""
    with explained(path):
        if path.is_dir():
            has_content = any(not _LOCK.fullmatch(file.name) for file in path.iterdir())
        else:
            has_content = path.exists()
        if has_content:
            raise OutputError(f"output {path} is not empty: remove it or name another folder")


def missing_room(folder: Path, needed: int) -> str | None:
    """Return a message if a folder's disk has less free bytes than `needed`, else None."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return f"{free / 2**20:.1f} MiB are free of {needed / 2**20:.1f} MiB needed"


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a folder beside `path` to write to, which is renamed to `path` at the end.

    An error removes it. All joined processes enter; the first makes and renames the folder.

    Raises:
      OutputError: `path` has content already, or cannot be written.
    """
    target = Path(path).resolve()  # keeps a symbolic link to an empty folder
    partial = target.with_name(f"{target.name}.partial")
    with locked(target), explained(target):
        refuse_non_empty(target)
        if processes.is_first():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        processes.wait(f"room for {target.name}")
        try:
            yield partial
            if processes.is_first():
                put_in_place(partial, target)
        except BaseException:
            if processes.is_first():
                shutil.rmtree(partial, ignore_errors=True)
            raise
        processes.wait(f"{target.name} is complete")


def put_in_place(partial: Path, target: Path) -> None:
    """Rename a complete file or folder to `target`, which may be absent, a file or an empty folder.

    The content is on the disk before the rename, and the rename before this returns.
    """
    sync(partial)
    partial.rename(target)
    _sync_one(target.parent)


def sync(path: Path) -> None:
    """Return when a file, or a folder with all its content, is on the disk."""
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
        if error.errno != errno.EINVAL:  # the file system cannot sync folders
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path, error: type[UserError], if_missing: str | Callable[[], str]) -> Any:
    """Read a JSON file.

    Args:
      error: class of errors to raise.
      if_missing: message if the file does not exist, or a function that makes it then.

    Raises:
      error: the file does not exist, cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as missing:
        raise error(if_missing if isinstance(if_missing, str) else if_missing()) from missing
    except OSError as unreadable:
        raise error(f"{path}: {unreadable.strerror}") from unreadable
    except (ValueError, RecursionError) as wrong:
        raise error(f"{path} is not JSON: {parser_refusal(wrong)}") from wrong


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors of the system about an output, or of libraries about a full disk, into one line.

    Raises:
      OutputError: the output cannot be written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError):
            if is_no_room(error):
                raise OutputError(f"output {path} cannot be written: its disk is full") from error
            raise
        above = {str(folder) for folder in (path, *path.parents)}
        is_of_path = str(error.filename) in above or str(error.filename).startswith(f"{path}.")
        if error.errno not in _WRITE_ERRORS and not is_of_path:
            raise
        file = next((folder for folder in path.parents if folder.is_file()), None)
        why = error.strerror if file is None else f"{file} is a file"
        raise OutputError(f"output {path} cannot be written: {why}") from error
