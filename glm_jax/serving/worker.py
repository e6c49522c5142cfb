"""The engine in a thread of its own, and an event loop that asks it for answers."""

import asyncio
import contextlib
import dataclasses
import functools
import gc
import queue
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from glm_jax.config import GLMConfig
from glm_jax.engine.engine import Engine
from glm_jax.engine.fair_queue import Turn, Turns
from glm_jax.engine.request import Request, Token
from glm_jax.engine.stepwise import Steps
from glm_jax.errors import UserError
from glm_jax.generation.blank_filling import TextCodec
from glm_jax.model.params import GLMParams
from glm_jax.serving import events
from glm_jax.serving.errors import BrokenError, BusyError, TooSlowError, UnavailableError
from glm_jax.serving.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """What answers: an engine, and its parameters for searches beside it."""

    engine: Engine
    params: GLMParams
    config: GLMConfig
    tokenizer: TextCodec


@dataclasses.dataclass
class _Ask:
    """One answer that is awaited: where it goes, and by which number.

    Attributes:
      request_id: the engine's, of one that it makes.
      search: the number of the search that it is.
    """

    exchange: "Exchange"
    key: int
    request_id: int | None = None
    search: int | None = None
    is_done: bool = False


@dataclasses.dataclass
class _Search:
    """A search: a step of it at a time runs in the engine's thread.

    Attributes:
      compiling: its next program, elsewhere, so that others do not wait for that. Where it cannot
        be compiled, the step that needs it will say so.
    """

    ask: _Ask
    steps: Steps[Any]
    compiling: Future[object] | None = None


class Exchange:
    """What one client asked for. Of the event loop's thread.

    Answers come by the numbers under which they were asked for. Whatever is not finished when
    the exchange ends leaves the engine before its next step.
    """

    def __init__(self, worker: "Worker", model: ServedModel, seconds: float, client: Hashable):
        self.model = model
        self.turn: Turn = (client, self)
        self.running = 0  # answers that are not whole yet
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

    def search(self, key: int, steps: Steps[Any]) -> None:
        """Has something done a step at a time, which gives what it returns."""
        self._ask(key, lambda ask: self._worker.begin_search(ask, steps))

    def _ask(self, key: int, begin: Callable[[_Ask], None]) -> None:
        ask = self._asks[key] = _Ask(self, key)
        self.running += 1
        self._worker.tell(lambda: begin(ask))

    def cancel(self, key: int) -> None:
        """Ends what is asked for under a number."""
        ask = self._asks.pop(key, None)
        if ask is not None and not ask.is_done:
            self._finish(ask)
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
            self._finish(ask)
        self._arrivals.put_nowait((ask.key, item))

    def _finish(self, ask: _Ask) -> None:
        ask.is_done = True
        self.running -= 1

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
        self._exchanges: set[Exchange] = set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Of the thread:
        self._asks: dict[int, _Ask] = {}
        self._searches: Turns[_Search] = Turns()
        self._search_count = 0
        self._search: _Search | None = None  # that goes on, one for its memory
        self._compiler = ThreadPoolExecutor(1, "compiler")

    def start(self) -> None:
        """Begins to load the model; on the event loop that will ask."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self, is_waiting: bool = True) -> None:
        """Ends the thread after its present step, and waits for that; one that still loads is
        not waited for."""
        self._inbox.put(None)
        if is_waiting and self.model is not None:
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
    def running(self) -> int:
        """Answers in slots and waiting: what is whole but not yet read is none of them."""
        return sum(exchange.running for exchange in self._exchanges)

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

    def open(self, answers: int, seconds: float, client: Hashable = None) -> Exchange:
        """A client's place, to be closed.

        Args:
          answers: that it asks for at once, at most.
          seconds: until they must be there.
          client: who asks; clients take turns, and so do the exchanges of each.

        Raises:
          BusyError: too many wait already.
          UnavailableError: there is no model yet, or the server goes down.
        """
        model = self.ready_model()
        # Whoever fills the queue is not to shut the others out.
        is_new = all(e.turn[0] != client for e in self._exchanges if e.running)
        room = self.most_answers + (model.engine.slots if is_new else 0)
        if self.running + answers > room:
            raise BusyError(
                f"{self._max_waiting} answers wait already, which is all there is room for: "
                "ask again later"
            )
        exchange = Exchange(self, model, seconds, client)
        self._exchanges.add(exchange)
        return exchange

    def forget(self, exchange: Exchange) -> None:
        """Frees the place of an exchange that is closed."""
        self._exchanges.discard(exchange)

    def tell(self, command: Callable[[], None]) -> None:
        """Has the thread do something before its next step."""
        self._inbox.put(command)

    # What follows runs in the thread.

    def begin(self, ask: _Ask, request: Request, is_urgent: bool) -> None:
        assert self.model is not None
        ask.request_id = self.model.engine.submit(request, is_urgent, ask.exchange.turn)
        self._asks[ask.request_id] = ask

    def begin_search(self, ask: _Ask, steps: Steps[Any]) -> None:
        ask.search = self._search_count
        self._search_count += 1
        self._searches.add(ask.search, _Search(ask, steps), ask.exchange.turn)

    def end(self, ask: _Ask) -> None:
        if ask.request_id in self._asks and ask.request_id is not None:
            assert self.model is not None
            self.model.engine.cancel(ask.request_id)
            del self._asks[ask.request_id]
        if ask.search is not None:
            self._end_search(ask)

    def _end_search(self, ask: _Ask) -> None:
        assert ask.search is not None
        self._searches.drop(ask.search)
        if self._search is not None and self._search.ask is ask:
            self._search = None

    def _run(self) -> None:
        try:
            events.log.info("loading the model")
            began = time.perf_counter()
            model = self._load()
            loaded = time.perf_counter()
            events.log.info("loaded in %.0f s; compiling", loaded - began)
            model.engine.warm_up()
            gc.collect()
            gc.freeze()  # or what stays for ever is looked through again and again
            self.model = model
            events.log.info("ready: compiled in %.0f s", time.perf_counter() - loaded)
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
            searches = len(self._searches) + (self._search is not None)
            is_idle = engine.is_idle and (not searches or self._is_compiling)
            self._metrics.observe_load(engine, searches)
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
            arrived.append((self._asks[token.request_id], token.error or token))
            if token.finish_reason is not None:
                del self._asks[token.request_id]
        arrived += self._step_search()
        return arrived

    @property
    def _is_compiling(self) -> bool:
        """Whether the search that goes on waits for its next program."""
        compiling = None if self._search is None else self._search.compiling
        return compiling is not None and not compiling.done()

    def _step_search(self) -> list[tuple[_Ask, Any]]:
        """A step of the search that goes on, or of the next one."""
        if self._search is None and self._searches:
            number, _ = self._searches.peek()
            self._search = self._searches.take(number)
        if self._search is None or self._is_compiling:
            return []
        ask, steps = self._search.ask, self._search.steps
        found: Any
        try:
            compile_next = next(steps)
            if compile_next is not None:
                self._search.compiling = self._compiler.submit(compile_next)
                # Even where the thread waits for something to do.
                self._search.compiling.add_done_callback(lambda _: self.tell(lambda: None))
            return []
        except StopIteration as end:
            found = end.value
        except UserError as error:
            found = error
        except Exception as error:  # no memory, say: the engine has its own
            found = BrokenError(f"a search failed: {error}")
            found.__cause__ = error
        self._end_search(ask)
        return [(ask, found)]

    # And this on the event loop again.

    def _deliver(self, arrived: list[tuple[_Ask, Any]]) -> None:
        for ask, item in arrived:
            ask.exchange.arrive(ask, item)

    def _break(self) -> None:
        for exchange in self._exchanges:
            exchange.fail(BrokenError("the engine failed"))
        self._on_failure()
