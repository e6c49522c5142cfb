"""Command lines: flags in, one library call out."""

import os
import signal
import sys


def _end_at_once(*_: object) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(130)


def end_by_interrupt() -> None:
    """Make Ctrl-C end the process with one line, not a traceback, during seconds of imports.

    Afterwards `cli.run` handles it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)


if sys.argv[0] == "-m":
    end_by_interrupt()
