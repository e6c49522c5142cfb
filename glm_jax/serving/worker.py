"""The engine in a thread of its own, and an event loop that asks it for answers."""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import gc
import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

from glm_jax.config import GLMConfig
from glm_jax.decoding.blank_filling import TextCodec
from glm_jax.decoding.completion import Request, Token
from glm_jax.decoding.engine import Engine
from glm_jax.errors import UserError
from glm_jax.model.params import GLMParams
from glm_jax.serving.errors import BrokenError, BusyError, TooSlowError, UnavailableError
from glm_jax.serving.metrics import Metrics

Search = Generator[None, None, Any]


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """What answers: an engine, and its parameters for searches beside it."""

    engine: Engine
    params: GLMParams
    config: GLMConfig
    tokenizer: TextCodec


@dataclasses.dataclass
class _Ask:
    """One answer that is awaited: where it goes, and by which number."""

    exchange: "Exchange"
    key: int
    ticket: int | None = None
    is_done: bool = False


class Exchange:
    """What one client asked for. Of the event loop's thread.

    Answers come by the numbers under which they were asked for. Whatever is not finished when
    the exchange ends leaves the engine before its next step.
    """

    def __init__(self, worker: "Worker", model: ServedModel, seconds: float):
        self.model = model
        self._worker = worker
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._seconds = seconds
        self._asks: dict[int, _Ask] = {}
        self._arrivals: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    def submit(self, key: int, request: Request, is_urgent: bool = False) -> None:
        """Has the engine complete a prompt, which gives a `Token` at a time.

        Raises:
          UserError: as of `Engine.check`.
        """
        self.model.engine.check(request)
        self._ask(key, lambda ask: self._worker.begin(ask, request, is_urgent))

    def search(self, key: int, steps: Search) -> None:
        """Has something done a step at a time, which gives what it returns."""
        self._ask(key, lambda ask: self._worker.begin_search(ask, steps))

    def _ask(self, key: int, begin: Callable[[_Ask], None]) -> None:
        ask = self._asks[key] = _Ask(self, key)
        self._worker.tell(lambda: begin(ask))

    def cancel(self, key: int) -> None:
        """Ends what is asked for under a number."""
        ask = self._asks.pop(key, None)
        if ask is not None and not ask.is_done:
            ask.is_done = True
            self._worker.tell(lambda: self._worker.end(ask))

    async def next(self) -> tuple[int, Any]:
        """A number, and a token or a result for it.

        Raises:
          BrokenError: the engine failed.
          TooSlowError: the client's time is over.
          UserError: a search says no.
        """
        while True:
            try:
                async with asyncio.timeout_at(self._deadline):
                    key, item = await self._arrivals.get()
            except TimeoutError as error:
                raise TooSlowError(
                    f"no whole answer within {self._seconds:g} seconds: ask for fewer tokens"
                ) from error
            if isinstance(item, Exception):
                raise item
            if key in self._asks:  # else it was cancelled
                return key, item

    def arrive(self, ask: _Ask, item: Any) -> None:
        """Takes what the engine gave."""
        if ask.is_done:
            return
        if not isinstance(item, Token) or item.finish_reason is not None:
            ask.is_done = True
        self._arrivals.put_nowait((ask.key, item))

    def fail(self, error: Exception) -> None:
        self._arrivals.put_nowait((-1, error))

    def close(self) -> None:
        """Gives the place back; may be called again."""
        for key in list(self._asks):
            self.cancel(key)
        self._worker.forget(self)


class Worker:
    """Runs an engine in a thread.

    Attributes:
      model: None before it is there.
      failure: what ended the thread.
    """

    def __init__(
        self,
        load: Callable[[], ServedModel],
        max_waiting: int,
        metrics: Metrics,
        on_failure: Callable[[], None],
    ):
        """
        Args:
          load: makes the model; in the thread.
          max_waiting: answers that may wait for a slot.
          on_failure: called on the event loop when the thread has failed.
        """
        self.model: ServedModel | None = None
        self.failure: Exception | None = None
        self.is_draining = False
        self._load, self._max_waiting, self._metrics = load, max_waiting, metrics
        self._on_failure = on_failure
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._exchanges: dict[Exchange, int] = {}  # how many answers each may have
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Of the thread:
        self._asks: dict[int, _Ask] = {}
        self._searches: collections.deque[tuple[_Ask, Search]] = collections.deque()

    def start(self) -> None:
        """Begins to load the model; on the event loop that will ask."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after its present step; one that still loads is not waited for."""
        self._inbox.put(None)
        if self.model is not None:
            await asyncio.to_thread(self._thread.join)

    @property
    def is_alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        with contextlib.suppress(UnavailableError):
            return bool(self.ready_model())
        return False

    @property
    def most_answers(self) -> int:
        """That may be there at once, in slots and waiting."""
        return self.ready_model().engine.slots + self._max_waiting

    @property
    def open_exchanges(self) -> int:
        """Clients that are there."""
        return len(self._exchanges)

    def ready_model(self) -> ServedModel:
        """
        Raises:
          UnavailableError: there is none yet or no more, or the server goes down.
        """
        if self.failure is not None:
            raise UnavailableError("the engine failed: the server's log says how")
        if self.is_draining:
            raise UnavailableError("the server is going down: ask another one")
        if self.model is None:
            raise UnavailableError("the model is being loaded: ask again later")
        return self.model

    def open(self, answers: int, seconds: float) -> Exchange:
        """A client's place, to be closed.

        Args:
          answers: that it asks for at once, at most.
          seconds: until they must be there.

        Raises:
          BusyError: too many wait already.
          UnavailableError: there is no model yet, or the server goes down.
        """
        model = self.ready_model()
        if sum(self._exchanges.values()) + answers > self.most_answers:
            raise BusyError(
                f"{self._max_waiting} answers wait already, which is all there is room for: "
                "ask again later"
            )
        exchange = Exchange(self, model, seconds)
        self._exchanges[exchange] = answers
        return exchange

    def forget(self, exchange: Exchange) -> None:
        """Frees the place of an exchange that is closed."""
        self._exchanges.pop(exchange, None)

    def tell(self, command: Callable[[], None]) -> None:
        """Has the thread do something before its next step."""
        self._inbox.put(command)

    # What follows runs in the thread.

    def begin(self, ask: _Ask, request: Request, is_urgent: bool) -> None:
        assert self.model is not None
        ask.ticket = self.model.engine.submit(request, is_urgent)
        self._asks[ask.ticket] = ask

    def begin_search(self, ask: _Ask, steps: Search) -> None:
        self._searches.append((ask, steps))

    def end(self, ask: _Ask) -> None:
        if ask.ticket in self._asks and ask.ticket is not None:
            assert self.model is not None
            self.model.engine.cancel(ask.ticket)
            del self._asks[ask.ticket]
        self._searches = collections.deque(x for x in self._searches if x[0] is not ask)

    def _run(self) -> None:
        try:
            model = self._load()
            model.engine.warm_up()
            gc.collect()
            gc.freeze()  # or what stays for ever is looked through again and again
            self.model = model
            while self._take_commands(model.engine):
                arrived = self._step(model.engine)
                if arrived:
                    self._call(functools.partial(self._deliver, arrived))
        except Exception as error:
            self.failure = error
            self._call(self._break)

    def _call(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: no one listens
            self._loop.call_soon_threadsafe(function)

    def _take_commands(self, engine: Engine) -> bool:
        """Does what was told; waits where there is nothing else to do. False at the end."""
        while True:
            is_idle = engine.is_idle and not self._searches
            self._metrics.observe_load(engine, len(self._searches))
            try:
                command = self._inbox.get(block=is_idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _step(self, engine: Engine) -> list[tuple[_Ask, Any]]:
        arrived: list[tuple[_Ask, Any]] = []
        tokens = engine.step()
        self._metrics.count_tokens(len(tokens))
        for token in tokens:
            arrived.append((self._asks[token.ticket], token))
            if token.finish_reason is not None:
                del self._asks[token.ticket]
        if self._searches:  # one at a time, for its memory
            ask, steps = self._searches[0]
            try:
                next(steps)
                return arrived
            except StopIteration as end:
                arrived.append((ask, end.value))
            except UserError as error:
                arrived.append((ask, error))
            except Exception as error:  # no memory, say: the engine has its own
                broken = BrokenError(f"a search failed: {error}")
                broken.__cause__ = error
                arrived.append((ask, broken))
            self._searches.popleft()
        return arrived

    # And this on the event loop again.

    def _deliver(self, arrived: list[tuple[_Ask, Any]]) -> None:
        for ask, item in arrived:
            ask.exchange.arrive(ask, item)

    def _break(self) -> None:
        for exchange in self._exchanges:
            exchange.fail(BrokenError("the engine failed"))
        self._on_failure()
