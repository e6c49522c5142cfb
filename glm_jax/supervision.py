"""A process of several that says in a line how it ended, whatever ended it.

When a process is gone, the runtime aborts the others from a thread of its own, with a trace
and no exception that could be caught. So the work is done by a child, and its parent has the
last word.
"""

import ctypes
import os
import re
import signal
import sys
import warnings

ADVICE = (
    "another process is gone, or stopped first and says why: start all again, any number of "
    "them; they go on from what is saved"
)
# What the runtime prints before it aborts.
_ABORTING = re.compile(
    rb"^(?:E\d{4} \S+ +\d+ coordination_service|F\d{4} |terminate called|Fatal Python error)", re.M
)
_CAUSE = re.compile(rb"absl::Status: ([^\n]*)")
_MOST_HELD = 1 << 16
_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


def go_on_supervised(name: str) -> None:
    """Returns in a child of this process. This process stays to pass on what the child says
    on stderr, and to end as it ends: with status 1 and a line that begins with "error:" where
    that is not by itself.

    Args:
      name: of the process, for the line.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    with warnings.catch_warnings(action="ignore"):
        # Of threads that a fork leaves behind: the runtime has none before it is joined.
        child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(writer, 2)
        os.close(writer)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        return
    os.close(writer)
    os._exit(_supervise(name, child, reader))


def _supervise(name: str, child: int, reader: int) -> int:
    signal.signal(signal.SIGTERM, lambda received, _: os.kill(child, received))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the child too
    passed_on, held = _pass_on(reader)
    _, raw = os.waitpid(child, 0)
    status = os.waitstatus_to_exitcode(raw)
    if status in (-signal.SIGTERM, -signal.SIGINT):
        return 128 - status
    if status != -signal.SIGABRT:
        os.write(2, held)
        passed_on += held
    last = passed_on.strip().splitlines()[-1:]
    if status and not (last and last[0].startswith(b"error:")):
        # A progress bar may stand there, with no end to its line.
        begin = "" if passed_on.endswith(b"\n") or not passed_on else "\n"
        os.write(2, f"{begin}error: {_reason(name, status, held)}\n".encode())
    return 1 if status < 0 else status


def _reason(name: str, status: int, held: bytes) -> str:
    how = f"stopped with status {status}"
    if status < 0:
        how = f"was ended by {signal.Signals(-status).name}"
    cause = _CAUSE.search(held)
    said = f" ({cause[1].decode(errors='replace')[:160]})" if cause else ""
    return f"{name} {how}{said}; {ADVICE}"


def _pass_on(reader: int) -> tuple[bytes, bytes]:
    """Copies a pipe to stderr until it ends.

    Returns:
      The end of what was copied, and what the runtime said while it aborted, which was not.
    """
    passed_on, held = b"", b""
    while chunk := os.read(reader, 1 << 16):
        if not held:
            match = _ABORTING.search(chunk)
            cut = len(chunk) if match is None else match.start()
            os.write(2, chunk[:cut])
            passed_on = (passed_on + chunk[:cut])[-_MOST_HELD:]
            chunk = chunk[cut:]
        held = (held + chunk)[:_MOST_HELD]
    return passed_on, held
