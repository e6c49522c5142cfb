"""The life of a process that serves a model with others and is not process 0, which clients ask."""

import contextlib
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from glm_jax.errors import UserError
from glm_jax.serving import events
from glm_jax.serving.links import (
    CAUSE_SECONDS,
    AskedToEnd,
    End,
    Failed,
    Leader,
    LostProcessError,
    Ready,
    described,
)
from glm_jax.serving.replay import CommandedDriver, Orders, Runnable, load_ready

_Ended = Exception | End


class Follower:
    """Runs the model as process 0 does, in a thread, as another listens to process 0."""

    def __init__(self, load: Callable[[], Runnable], leader: Leader):
        """
        Args:
          load: loads the model; called in a thread.
        """
        self._load, self._leader = load, leader
        self._orders: queue.SimpleQueue[Orders | None] = queue.SimpleQueue()
        # Signals that came, and at last how it ended.
        self._news: queue.SimpleQueue[signal.Signals | _Ended] = queue.SimpleQueue()
        self._engine = threading.Thread(target=self._replay, name="engine", daemon=True)
        self._listener = threading.Thread(target=self._listen, name="leader", daemon=True)

    def run(self) -> None:
        """Follow process 0 until it ends; called in the main thread.

        SIGTERM and SIGINT have process 0 drain; then all processes end, this one with status 0.

        Raises:
          LostProcessError: another process is gone or has failed.
          KeyboardInterrupt: SIGINT came, and all has ended in order.
          Exception: the error by which loading, or the engine, failed.
        """
        is_interrupted = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda received, _: self._news.put(signal.Signals(received)))
        self._engine.start()
        self._listener.start()
        while isinstance(news := self._news.get(), signal.Signals):
            is_interrupted |= news == signal.SIGINT
            self._leader.send(AskedToEnd())
        if isinstance(news, Exception):
            self._fail(news)
        if news.failure is not None:
            raise LostProcessError(news.failure)
        events.log.info("ended")
        if is_interrupted:
            raise KeyboardInterrupt
        # A usual exit would wait for process 0, and abort if the thread is compiling.
        sys.stdout.flush()
        os._exit(0)

    def _fail(self, error: Exception) -> NoReturn:
        """Raise the error by which this process must end, which may be another's."""
        if not isinstance(error, UserError):
            with contextlib.suppress(queue.Empty):
                later = self._news.get(timeout=2 * CAUSE_SECONDS)
                if isinstance(later, End) and later.failure is not None:
                    raise LostProcessError(later.failure) from error
                if isinstance(later, LostProcessError):
                    raise later from error
        if not isinstance(error, LostProcessError):
            self._leader.send(Failed(described(error)))
        raise error

    # The methods below run in threads of their own.

    def _listen(self) -> None:
        try:
            while isinstance(message := self._leader.receive(), Orders):
                self._orders.put(message)
            if not message.at_once:
                self._orders.put(None)
                self._engine.join()
            self._news.put(message)
        except Exception as error:
            self._news.put(error)

    def _replay(self) -> None:
        try:
            model = load_ready(self._load)
            driver = CommandedDriver(model.engine, is_alone=False)
            self._leader.send(Ready())
            while (orders := self._orders.get()) is not None:
                driver.repeat(orders, model)
        except Exception as error:
            self._news.put(error)
