"""Stop requests: SIGTERM and Ctrl-C let a run save a checkpoint before it ends."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from glm_jax.errors import UserError


class InterruptedRunError(UserError):
    """A run that stopped after SIGTERM or Ctrl-C, with a checkpoint.

    Attributes:
      status: exit status of the process, as if the signal had ended it.
    """

    def __init__(self, message: str, received: signal.Signals):
        super().__init__(message)
        self.status = 128 + received


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], signal.Signals | None]]:
    """Yield a function that returns the signal that asked to stop after a step, or None.

    Any of the processes may have received it. A second Ctrl-C ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: None
        return
    received: list[signal.Signals] = []
    is_alone = jax.process_count() == 1

    def ask(number: int, _: object) -> None:
        received.append(signal.Signals(number))
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, b"\nsaving after this step; Ctrl-C again ends at once\n")
            if not is_alone:  # jax passes SIGTERM on to the other processes
                os.kill(os.getpid(), signal.SIGTERM)

    def stopped_by(step: int) -> signal.Signals | None:
        if is_alone:
            return received[0] if received else None
        # jax handles SIGTERM with several processes, and stops them all after the same step.
        is_asked = multihost_utils.reached_preemption_sync_point(step)
        return (received or [signal.SIGTERM])[0] if is_asked else None

    handled = [signal.SIGINT, signal.SIGTERM] if is_alone else [signal.SIGINT]
    before = {number: signal.getsignal(number) for number in handled}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, ask)
    try:
        yield stopped_by
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
