"""Supervision: a process of several reports in one line how it ended, whatever the cause.

When a process dies, the runtime aborts the others from a thread of its own, with a trace and
without an exception that could be caught. So a child does the work, and its parent reports.
"""

import ctypes
import os
import re
import signal
import sys
import warnings

ADVICE = (
    "another process is gone, or stopped first and says why: start all again, any number of "
    "them; they resume from what is saved"
)
# What the runtime prints before it aborts.
_ABORTING = re.compile(
    rb"^(?:E\d{4} \S+ +\d+ coordination_service|F\d{4} |terminate called|Fatal Python error)", re.M
)
_CAUSE = re.compile(rb"absl::Status: ([^\n]*)")
# The processes of which it has heard nothing, a line each; or it does not reach process 0.
_SILENT = re.compile(rb"stopped sending heartbeats\):\n((?:[^\s]*\d\n)+)")
_NO_FIRST = re.compile(
    rb"absl::Status: UNAVAILABLE: Failed to send RPC"
    rb"|absl::Status: DEADLINE_EXCEEDED: [^\n]*\nRPC: \S*/Heartbeat"
)
# What a process says that ended while its runtime was aborting.
_OWN_LINE = re.compile(rb"^error: [^\n]*\n\Z", re.M)
_MAX_TAIL_BYTES = 1 << 16
_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


def go_on_supervised(name: str) -> None:
    """Fork, and return in the child, which this process supervises.

    The parent copies the child's stderr and ends with its exit status. If a signal or the runtime
    ended the child, the status is 1, and a line that begins with "error:" comes last.

    Args:
      name: of the process, for that line.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    with warnings.catch_warnings(action="ignore"):
        # The warning is about threads in a fork; the runtime has none before `processes.join`.
        child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(writer, 2)
        os.close(writer)
        die_with_parent()
        return
    os.close(writer)
    os._exit(_supervise(name, child, reader))


def die_with_parent() -> None:
    """Have the system kill this process when the one that started it ends, where it can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _supervise(name: str, child: int, reader: int) -> int:
    signal.signal(signal.SIGTERM, lambda received, _: os.kill(child, received))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the child too
    passed_on, withheld = _pass_on(reader)
    _, raw = os.waitpid(child, 0)
    status = os.waitstatus_to_exitcode(raw)
    if status in (-signal.SIGTERM, -signal.SIGINT):
        return 128 - status
    if status != -signal.SIGABRT:
        own = _OWN_LINE.search(withheld)
        rest = withheld if own is None else own[0]
        os.write(2, rest)
        passed_on += rest
    last = passed_on.strip().splitlines()[-1:]
    if status and not (last and last[0].startswith(b"error:")):
        # A progress bar may have left a line without an end.
        begin = "" if passed_on.endswith(b"\n") or not passed_on else "\n"
        os.write(2, f"{begin}error: {_reason(name, status, withheld)}\n".encode())
    return 1 if status < 0 else status


def _reason(name: str, status: int, withheld: bytes) -> str:
    how = f"stopped with status {status}"
    if status < 0:
        how = f"was ended by {signal.Signals(-status).name}"
    cause = _cause(withheld)
    return f"{name} {how}{cause and f' ({cause})'}; {ADVICE}"


def _cause(withheld: bytes) -> str:
    """Return why the runtime aborted, as far as it says so."""
    if silent := _SILENT.search(withheld):
        numbers = sorted({int(number) for number in re.findall(rb"(\d+)\n", silent[1])})
        return f"no sign of life from process {', '.join(map(str, numbers))}"
    if _NO_FIRST.search(withheld):
        return "no sign of life from process 0"
    cause = _CAUSE.search(withheld)
    return cause[1].decode(errors="replace")[:160] if cause else ""


def _pass_on(reader: int) -> tuple[bytes, bytes]:
    """Copy a pipe to stderr until it ends.

    Returns:
      The tail of what was copied, and the output of the aborting runtime, which was not copied.
    """
    passed_on, withheld = b"", b""
    while chunk := os.read(reader, 1 << 16):
        if not withheld:
            match = _ABORTING.search(chunk)
            cut = len(chunk) if match is None else match.start()
            os.write(2, chunk[:cut])
            passed_on = (passed_on + chunk[:cut])[-_MAX_TAIL_BYTES:]
            chunk = chunk[cut:]
        withheld = (withheld + chunk)[:_MAX_TAIL_BYTES]
    return passed_on, withheld
