"""How a run is asked to stop: the signals that let it save first."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from glm_jax.errors import UserError


class InterruptedRunError(UserError):
    """A run that was asked to stop, by SIGTERM or by Ctrl-C, and saved what it had."""

    def __init__(self, message: str, received: signal.Signals):
        super().__init__(message)
        self.status = 128 + received  # as of a process that the signal ends


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], signal.Signals | None]]:
    """Gives a function of the step: the signal that asked to stop after it, SIGTERM or that of
    Ctrl-C, which may have come to any of the processes. Ctrl-C a second time does not wait."""
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
            if not is_alone:  # as SIGTERM, of which jax tells the others
                os.kill(os.getpid(), signal.SIGTERM)

    def stopped_by(step: int) -> signal.Signals | None:
        if is_alone:
            return received[0] if received else None
        # jax has a handler of SIGTERM there, and brings the processes to one step.
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
