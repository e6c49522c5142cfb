"""Errors whose cause lies outside of the program: the user's to mend, or the system's."""

import errno
import os
import reprlib
from typing import Any


class UserError(ValueError):
    """Input that cannot be used. The message is one line: what is wrong, where, what to do.

    Attributes:
      status: of the process that ends by it.
    """

    status = 1


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def shown(value: Any) -> str:
    """A value as a message shows it: its repr, cut short however much it holds."""
    return _SHORT.repr(value)


def shortened(message: str) -> str:
    """A message without its middle, where what it quotes would fill the screen."""
    half = _LONGEST_LINE // 2
    return message if len(message) <= _LONGEST_LINE else f"{message[:half]} ... {message[-half:]}"


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
_NO_MEMORY = "RESOURCE_EXHAUSTED"  # what XLA calls it
_LONGEST = 300
_LONGEST_LINE = 2000


def is_no_room(error: Exception) -> bool:
    """Whether a disk was full. Libraries wrap the system's error in their own."""
    return any(words in str(error) for words in _NO_ROOM)


def system_refusal(error: Exception, written: str) -> str | None:
    """What the operating system refused, in a line that names the path; None for any other error.

    Libraries wrap the system's error in their own, which is known by the system's words.

    Args:
      written: what is named where the error names no path, as a write to an open file does.
    """
    if isinstance(error, OSError) and error.strerror is not None:
        paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
        return ": ".join([*(paths or [written]), error.strerror])
    text = str(error)[:_LONGEST] or type(error).__name__
    if isinstance(error, OSError) or any(words in str(error) for words in _REFUSED):
        return f"{written}: {text}"
    if isinstance(error, MemoryError) or _NO_MEMORY in str(error):
        return f"out of memory: {text}"
    return None
