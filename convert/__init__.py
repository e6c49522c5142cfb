"""Command-line tools that convert released checkpoints to model folders, and back."""

import os
import signal
import sys


def _end_at_once(*_: object) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(130)


if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # The imports take seconds, in which Ctrl-C would be a traceback; `cli.run` takes over then.
    signal.signal(signal.SIGINT, _end_at_once)
