"""What is said of a process that its runtime ended, by what the runtime printed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FATAL = (
    "F1127 02:12:50.8 14009 client.h:86] Terminating process because the JAX distributed service "
    "detected fatal errors. absl::Status: "
)
UNHEALTHY = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n"
POLL = "The tasks have crashed.\nRPC: /xla.coordination.CoordinationService/PollForError\n"
NO_LEADER = "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task\n"
LATE = "DEADLINE_EXCEEDED: Exceeded\nRPC: /xla.coordination.CoordinationService/Heartbeat\n"
_CHILD = """
import os, runpy, sys
supervision = runpy.run_path("glm_jax/supervision.py")  # without all that glm_jax imports
supervision["go_on_supervised"]("process 1 of 4")
os.write(2, sys.argv[1].encode())
os.abort() if sys.argv[2] == "abort" else os._exit(1)
"""


def _lines(printed, end):
    command = [sys.executable, "-c", _CHILD, printed, end]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    ("printed", "cause"),
    [
        (f"{FATAL}{UNHEALTHY}2\n{POLL}", "no sign of life from process 2"),
        (f"{FATAL}{UNHEALTHY}/task:3\n/task:2\n{POLL}", "no sign of life from process 2, 3"),
        (f"{FATAL}{NO_LEADER}", "no sign of life from process 0"),
        (f"{FATAL}{LATE}", "no sign of life from process 0"),
        (f"{FATAL}INTERNAL: of another kind\n{POLL}", "INTERNAL: of another kind"),
    ],
)
def test_which_process_the_runtime_misses(printed, cause):
    [line] = _lines(printed, "abort")
    assert line.startswith(f"error: process 1 of 4 was ended by SIGABRT ({cause}); another process")


def test_a_line_of_its_own_comes_alone():
    """Of a process that knows why it ends, while its runtime is about to abort it."""
    assert _lines(f"{FATAL}{NO_LEADER}error: process 0 of 4 is gone\n", "exit") == [
        "error: process 0 of 4 is gone"
    ]
