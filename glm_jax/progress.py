"""Progress on stderr: a bar in a terminal; elsewhere, in a file or a log, lines now and then."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30.0
_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def progress_bar(
    of: Iterable[Any] | None = None, *, desc: str, total: int | None = None, **more: Any
) -> "tqdm[Any]":
    """Return a tqdm, which draws a bar where stderr is a terminal; elsewhere it writes a line at
    the beginning, at most every half minute, and at the end.

    Args:
      of: what is iterated over, if anything is.
      total: how long that is, where it does not say.
      more: as of tqdm, such as `unit`, `initial` and `disable`.
    """
    if sys.stderr.isatty():
        return tqdm(of, desc=desc, total=total, file=sys.stderr, **more)
    lines: Any = _Lines(sys.stderr)
    has_total = total is not None or hasattr(of, "__len__")
    return tqdm(
        of,
        desc=desc,
        total=total,
        file=lines,
        mininterval=_SECONDS_BETWEEN_LINES,
        miniters=1,
        bar_format=_LINE if has_total else None,
        **more,
    )


class _Lines:
    """A text file for tqdm: what it would draw over a line becomes a line of its own."""

    def __init__(self, file: Any):
        self._file, self._last = file, ""

    def write(self, text: str) -> None:
        for part in text.replace("\r", "\n").splitlines():
            line = part.rstrip()
            if line not in ("", self._last):
                self._file.write(f"{line}\n")
                self._last = line

    def flush(self) -> None:
        self._file.flush()
