"""Errors with a cause outside of the program: in the user's input, or in the system."""

import errno
import os
import reprlib
from typing import Any


class UserError(ValueError):
    """Input that cannot be used. The message is one line: what is wrong, where, what to do.

    Attributes:
      status: exit status of a process that ends with this error.
    """

    status = 1


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def shown(value: Any) -> str:
    """Return the repr of a value for a message, shortened."""
    return _SHORT.repr(value)


def shortened(message: str) -> str:
    """Return a message, without its middle if it is longer than a screen."""
    half = _MAX_MESSAGE // 2
    return message if len(message) <= _MAX_MESSAGE else f"{message[:half]} ... {message[-half:]}"


def parser_refusal(error: Exception) -> str:
    """Return why a parser of JSON or YAML refused a text, without advice about Python."""
    if "int_max_str_digits" in str(error):
        return "a number of too many digits"
    return str(error)[:_MAX_REASON]


_NO_ROOM = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))
_REFUSED = (
    *_NO_ROOM,
    *map(
        os.strerror,
        (
            errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EIO,
            errno.ENAMETOOLONG, errno.EMFILE, errno.ENOMEM,
        ),
    ),
)  # fmt: skip
_NO_MEMORY = "RESOURCE_EXHAUSTED"  # XLA's word
_MAX_REASON = 300
_MAX_MESSAGE = 2000


def is_no_room(error: Exception) -> bool:
    """Return True for the error of a full disk, which libraries wrap in their own errors."""
    return any(words in str(error) for words in _NO_ROOM)


def system_refusal(error: Exception, written: str) -> str | None:
    """Return in a line what the operating system refused, or None for any other error.

    Libraries wrap the system's errors in their own; these are recognised by the system's words.

    Args:
      written: the path to name if the error has none, as for a write to an open file.
    """
    if isinstance(error, OSError) and error.strerror is not None:
        paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
        return ": ".join([*(paths or [written]), error.strerror])
    text = str(error)[:_MAX_REASON] or type(error).__name__
    if isinstance(error, OSError) or any(words in str(error) for words in _REFUSED):
        return f"{written}: {text}"
    if isinstance(error, MemoryError) or _NO_MEMORY in str(error):
        return f"out of memory: {text}"
    return None
