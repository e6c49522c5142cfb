"""What the suites of `launch.benchmark` are made of."""

import contextlib
import dataclasses
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
      run: does the work `count` times.
      count: its time is divided by this.
      prepare: is done before each run, and not timed.
      is_long: takes so long that it needs no run before that does not count.
      max_rounds: number of rounds that run it.
    """

    run: Callable[[], object]
    count: float = 1
    prepare: Callable[[], object] = lambda: None
    is_long: bool = False
    max_rounds: int = 10**6


def find_torch() -> Any:
    """Import PyTorch, the peer; None, and a printed line, where it is not installed."""
    # Some virtual machines announce AMX and then refuse its instructions.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    try:
        import torch
    except ImportError:
        print("torch is not installed: its cases are left out")
        return None
    return torch


@contextlib.contextmanager
def process_group(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process of a group of its own, all of which is killed if it still runs at the end.

    Args:
      options: of `subprocess.Popen`.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
