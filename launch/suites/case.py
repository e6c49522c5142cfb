"""What the suites of `launch.benchmark` are made of."""

import dataclasses
import os
from collections.abc import Callable
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
