"""The engine in a thread of its own, and the event loop's sessions with it."""

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
    """A model that is served: an engine, and its parameters for beam searches beside it."""

    engine: Engine
    params: GLMParams
    config: GLMConfig
    tokenizer: TextCodec


@dataclasses.dataclass
class _Ask:
    """An answer that a session waits for.

    Attributes:
      key: the session's number for it.
      request_id: the engine's, where the engine makes the answer.
      search: the search's number, where a beam search makes it.
    """

    session: "Session"
    key: int
    request_id: int | None = None
    search: int | None = None
    is_done: bool = False


@dataclasses.dataclass
class _Search:
    """A beam search, whose steps run one at a time in the engine's thread.

    Attributes:
      compiling: its next program, compiled in another thread, so that other requests go on. If
        compiling fails, the step that needs the program raises the error.
    """

    ask: _Ask
    steps: Steps[Any]
    compiling: Future[object] | None = None


class Session:
    """A client's request while it is answered. Used on the event loop's thread only.

    It asks for answers under keys of its own, and each arriving item names its key. Answers that
    are not finished when the session is closed leave the engine before its next step.
    """

    def __init__(self, worker: "Worker", model: ServedModel, seconds: float, client: Hashable):
        self.model = model
        self.turn: Turn = (client, self)
        self.running = 0  # unfinished answers
        self._worker = worker
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._seconds = seconds
        self._asks: dict[int, _Ask] = {}
        self._arrivals: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    def submit(self, key: int, request: Request, is_urgent: bool = False) -> None:
        """Submit a request to the engine; `next` then gives its answer, one `Token` at a time.

        Args:
          key: number of the answer within this session.
          is_urgent: goes before requests that wait.

        Raises:
          UserError: see `Engine.check`.
        """
        self.model.engine.check(request)
        self._ask(key, lambda ask: self._worker.begin(ask, request, is_urgent))

    def search(self, key: int, steps: Steps[Any]) -> None:
        """Run a beam search step by step; `next` then gives its result."""
        self._ask(key, lambda ask: self._worker.begin_search(ask, steps))

    def _ask(self, key: int, begin: Callable[[_Ask], None]) -> None:
        ask = self._asks[key] = _Ask(self, key)
        self.running += 1
        self._worker.run_in_thread(lambda: begin(ask))

    def cancel(self, key: int) -> None:
        """Cancel the answer of a key."""
        ask = self._asks.pop(key, None)
        if ask is not None and not ask.is_done:
            self._finish(ask)
            self._worker.run_in_thread(lambda: self._worker.end(ask))

    async def next(self) -> tuple[int, Any]:
        """Wait for the next item.

        Returns:
          The answer's key, and a `Token` of the engine or the result of a search.

        Raises:
          BrokenError: the engine failed.
          TooSlowError: the session's time is over.
          UserError: a search refused its settings.
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
        """Queue an item that the engine's thread made."""
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
        """Cancel unfinished answers and leave the worker; may be called again."""
        for key in list(self._asks):
            self.cancel(key)
        self._worker.discard(self)


class Worker:
    """Runs an engine in a thread.

    Attributes:
      model: None until it is loaded.
      failure: the error that ended the thread.
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
          load: loads the model; called in the thread.
          max_waiting: answers that may wait for a slot.
          on_failure: called on the event loop when the thread has failed.
        """
        self.model: ServedModel | None = None
        self.failure: Exception | None = None
        self.is_draining = False
        self._load, self._max_waiting, self._metrics = load, max_waiting, metrics
        self._on_failure = on_failure
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._sessions: set[Session] = set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Of the thread:
        self._asks: dict[int, _Ask] = {}
        self._searches: Turns[_Search] = Turns()
        self._search_count = 0
        self._search: _Search | None = None  # the running one; two would need twice its memory
        self._compiler = ThreadPoolExecutor(1, "compiler")

    def start(self) -> None:
        """Start the thread, which loads the model; called on the event loop of the sessions."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self, is_waiting: bool = True) -> None:
        """End the thread after its current step, and wait for it unless it is still loading."""
        self._inbox.put(None)
        if is_waiting and self.model is not None:
            await asyncio.to_thread(self._thread.join)

    @property
    def is_alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        with contextlib.suppress(UnavailableError):
            return bool(self.ready_model())
        return False

    @property
    def max_answers(self) -> int:
        """Answers that may exist at once, in slots and waiting."""
        return self.ready_model().engine.slots + self._max_waiting

    @property
    def running(self) -> int:
        """Unfinished answers, in slots and waiting."""
        return sum(session.running for session in self._sessions)

    @property
    def open_sessions(self) -> int:
        """Number of open sessions."""
        return len(self._sessions)

    def ready_model(self) -> ServedModel:
        """Return the model if it can answer.

        Raises:
          UnavailableError: it is not loaded yet, it failed, or the server is draining.
        """
        if self.failure is not None:
            raise UnavailableError("the engine failed: the server's log says how")
        if self.is_draining:
            raise UnavailableError("the server is going down: ask another one")
        if self.model is None:
            raise UnavailableError("the model is being loaded: ask again later")
        return self.model

    def open(self, answers: int, seconds: float, client: Hashable = None) -> Session:
        """Open a session, which the caller closes.

        Args:
          answers: maximum number of answers that it asks for at once.
          seconds: time until they must be complete.
          client: identifies the client; clients take turns, and so do the sessions of each.

        Raises:
          BusyError: the queue is full.
          UnavailableError: see `ready_model`.
        """
        model = self.ready_model()
        # A client that fills the queue must not shut the others out.
        is_new = all(e.turn[0] != client for e in self._sessions if e.running)
        room = self.max_answers + (model.engine.slots if is_new else 0)
        if self.running + answers > room:
            raise BusyError(
                f"{self._max_waiting} answers wait already, which is all there is room for: "
                "ask again later"
            )
        session = Session(self, model, seconds, client)
        self._sessions.add(session)
        return session

    def discard(self, session: Session) -> None:
        """Remove a closed session."""
        self._sessions.discard(session)

    def run_in_thread(self, command: Callable[[], None]) -> None:
        """Have the thread call `command` before its next step."""
        self._inbox.put(command)

    # The methods below run in the thread.

    def begin(self, ask: _Ask, request: Request, is_urgent: bool) -> None:
        assert self.model is not None
        ask.request_id = self.model.engine.submit(request, is_urgent, ask.session.turn)
        self._asks[ask.request_id] = ask

    def begin_search(self, ask: _Ask, steps: Steps[Any]) -> None:
        ask.search = self._search_count
        self._search_count += 1
        self._searches.add(ask.search, _Search(ask, steps), ask.session.turn)

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
            gc.freeze()  # objects that live forever need no further collection passes
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
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(function)

    def _take_commands(self, engine: Engine) -> bool:
        """Run the queued commands, and wait for one while idle; False when the thread is to end."""
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
        """Whether the running search waits for its next program."""
        compiling = None if self._search is None else self._search.compiling
        return compiling is not None and not compiling.done()

    def _step_search(self) -> list[tuple[_Ask, Any]]:
        """Run a step of the running search, or of the next one in turn."""
        if self._search is None and self._searches:
            number, _ = self._searches.peek()
            self._search = self._searches.take(number)
        if self._search is None or self._is_compiling:
            return []
        ask, steps = self._search.ask, self._search.steps
        result: Any
        try:
            compile_next = next(steps)
            if compile_next is not None:
                self._search.compiling = self._compiler.submit(compile_next)
                # Wakes the thread where it waits for a command.
                self._search.compiling.add_done_callback(lambda _: self.run_in_thread(lambda: None))
            return []
        except StopIteration as end:
            result = end.value
        except UserError as error:
            result = error
        except Exception as error:  # out of memory, for example, which the engine is not
            result = BrokenError(f"a search failed: {error}")
            result.__cause__ = error
        self._end_search(ask)
        return [(ask, result)]

    # The methods below run on the event loop.

    def _deliver(self, arrived: list[tuple[_Ask, Any]]) -> None:
        for ask, item in arrived:
            ask.session.arrive(ask, item)

    def _break(self) -> None:
        for session in self._sessions:
            session.fail(BrokenError("the engine failed"))
        self._on_failure()
