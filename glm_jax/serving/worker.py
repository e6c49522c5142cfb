"""A thread that drives the engine, and the event loop's sessions with it.

The event loop hands answers to the thread, which queues them before its next turn, and gets the
news of each turn in one call. Until an answer has ended, or is cancelled, it is the thread's.
Where other processes run the model too, the thread has them do what it does.
"""

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import queue
import threading
from collections.abc import Callable, Hashable

from glm_jax.config import GLMConfig
from glm_jax.engine.embedding import Embedder, Embedding
from glm_jax.engine.engine import Engine
from glm_jax.engine.scoring import Score, Scorer
from glm_jax.engine.slots import MAX_TOP_LOGPROBS
from glm_jax.generation.blank_filling import TextCodec
from glm_jax.generation.driver import Answer
from glm_jax.generation.shared_scoring import SharedScorer
from glm_jax.model.params import GLMParams
from glm_jax.serving.errors import (
    BusyError,
    TooLargeError,
    UnavailableError,
)
from glm_jax.serving.links import Followers
from glm_jax.serving.metrics import Metrics
from glm_jax.serving.replay import (
    Begin,
    Cancel,
    Command,
    CommandedDriver,
    News,
    Orders,
    encode,
    load_ready,
)
from glm_jax.serving.session import Session

SCORED_TOKENS = 512  # of a batch, unless one text is longer


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model that is served: an engine, and its parameters for searches and scores beside it."""

    engine: Engine
    params: GLMParams
    config: GLMConfig
    tokenizer: TextCodec

    @functools.cached_property
    def scorer(self) -> SharedScorer[Score]:
        """Scores given texts, as many tokens between two steps of the engine as a batch has."""
        scorer = Scorer(self.params, self.config, SCORED_TOKENS, MAX_TOP_LOGPROBS)
        return SharedScorer(scorer, SCORED_TOKENS)

    @functools.cached_property
    def embedder(self) -> SharedScorer[Embedding]:
        """Embeds texts in the same way."""
        embedder = Embedder(self.params, self.config, SCORED_TOKENS)
        return SharedScorer(embedder, SCORED_TOKENS)


class Worker:
    """Drives an engine in a thread.

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
        max_waiting_tokens: int | None = None,
        followers: Followers | None = None,
    ):
        """
        Args:
          load: loads the model; called in the thread.
          max_waiting: answers that may wait for a slot.
          on_failure: called on the event loop when the thread has failed.
          max_waiting_tokens: that answers without a first token may come to, with their prompts;
            None for any number.
          followers: processes that run the model together with this one.
        """
        self.model: ServedModel | None = None
        self.failure: Exception | None = None
        self.is_draining = False
        self._load, self._max_waiting, self._metrics = load, max_waiting, metrics
        self._on_failure, self._followers = on_failure, followers
        self._max_waiting_tokens = max_waiting_tokens
        # Commands, and what followers get of each.
        self._inbox: queue.SimpleQueue[tuple[Command, bytes] | None] = queue.SimpleQueue()
        self._sessions: set[Session] = set()
        self._numbers = itertools.count()
        # With the session's key, and the number that commands name.
        self._unfinished: dict[Answer, tuple[Session, int, int]] = {}
        self._waiting: dict[Answer, float] = {}  # tokens of those without a first token
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread, which loads the model; called on the event loop of the sessions."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self, is_waiting: bool = True) -> None:
        """End the thread after its current turn, and wait for it unless it is still loading."""
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
        return len(self._unfinished)

    @property
    def waiting_tokens(self) -> int:
        """Tokens that answers without a first token may come to, with their prompts."""
        return round(sum(self._waiting.values()))

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

    def open(
        self, answers: int, seconds: float, client: Hashable = None, tokens: int = 0
    ) -> Session:
        """Open a session, which the caller closes.

        Args:
          answers: maximum number of answers that it asks for at once.
          tokens: that all of them may come to, with their prompts.
          seconds: time until they must be complete.
          client: identifies the client; clients take turns, and so do the sessions of each.

        Raises:
          BusyError: the queue is full.
          TooLargeError: the queue never has room for so many tokens.
          UnavailableError: see `ready_model`.
        """
        model = self.ready_model()
        # A client that fills the queue must not shut the others out.
        is_new = all(session.turn[0] != client for session, *_ in self._unfinished.values())
        room = self.max_answers + (model.engine.slots if is_new else 0)
        if self.running + answers > room:
            raise BusyError(
                f"{self._max_waiting} answers wait already, which is all there is room for: "
                "ask again later"
            )
        if self.running + answers > model.engine.slots:  # some have to wait
            self._check_tokens(answers, tokens, model.engine, is_new)
        session = Session(self, model, seconds, client, tokens / answers)
        self._sessions.add(session)
        return session

    def _check_tokens(self, answers: int, tokens: int, engine: Engine, is_new: bool) -> None:
        """Raise an error if answers of so many tokens may not wait."""
        limit = self._max_waiting_tokens
        if limit is None:
            return
        if answers > engine.slots and tokens > limit:
            raise TooLargeError(
                f"{answers} answers of up to {tokens} tokens, with their prompts: at most {limit} "
                "wait in this server: ask for fewer"
            )
        room = limit + (engine.max_length if is_new else 0)
        if self.waiting_tokens + tokens > room:
            raise BusyError(
                f"{self.waiting_tokens} tokens wait already, and there is room for {limit}: "
                "ask again later"
            )

    def next_number(self) -> int:
        """Return a number that no other answer and no other session has."""
        return next(self._numbers)

    def discard(self, session: Session) -> None:
        """Remove a closed session."""
        self._sessions.discard(session)

    def submit(self, session: Session, key: int, answer: Answer) -> None:
        """Have the thread begin an answer before its next turn."""
        number = self.next_number()
        self._command(Begin(number, answer, session.turn))
        self._unfinished[answer] = session, key, number
        self._waiting[answer] = session.answer_tokens

    def cancel(self, answer: Answer) -> None:
        """Have the thread end an answer before its next turn, if it is unfinished."""
        self._waiting.pop(answer, None)
        if (unfinished := self._unfinished.pop(answer, None)) is not None:
            self._command(Cancel(unfinished[2]))

    def _command(self, command: Command) -> None:
        """Have the thread, and followers, carry out a command before the next turn."""
        encoded = b"" if self._followers is None else encode(command, self.model)
        self._inbox.put((command, encoded))

    def fail(self, error: Exception) -> None:
        """End by an error, unless there is one already: whoever waits for an answer gets it."""
        if self.failure is None:
            self.failure = error
            self._break()

    def _deliver(self, news: News) -> None:
        for answer, token in news:
            if answer not in self._unfinished:  # cancelled
                continue
            session, key, _ = self._unfinished[answer]
            self._waiting.pop(answer, None)
            if token is None:
                del self._unfinished[answer]
            session.arrive(key, token)

    def _break(self) -> None:
        for session in self._sessions:
            session.arrive(-1, None)
        self._on_failure()

    # The methods below run in the thread.

    def _run(self) -> None:
        try:
            is_alone = self._followers is None
            wait = (lambda: None) if self._followers is None else self._followers.wait_ready
            self.model = model = load_ready(self._load, wait)
            driver = CommandedDriver(model.engine, is_alone, self._command)
            while self._take_commands(driver):
                news = driver.turn()
                self._publish(news)
                self._metrics.count_tokens(sum(token is not None for _, token in news))
        except Exception as error:
            cause = error if self._followers is None else self._followers.cause(error)
            self._call(functools.partial(self.fail, cause))

    def _take_commands(self, driver: CommandedDriver) -> bool:
        """Run the queued commands, and wait for one while idle; False when the thread is to end."""
        assert self.model is not None
        encoded: list[bytes] = []
        while True:
            self._metrics.observe_load(self.model.engine, driver.driver.searches)
            is_idle = driver.driver.is_idle
            if is_idle:
                self._order(driver, encoded)
            try:
                taken = self._inbox.get(block=is_idle)
            except queue.Empty:
                self._order(driver, encoded, takes_turn=True)
                return True
            if taken is None:
                return False
            encoded.append(taken[1])
            self._publish(driver.do(taken[0]))

    def _order(
        self, driver: CommandedDriver, encoded: list[bytes], takes_turn: bool = False
    ) -> None:
        """Have followers do what this thread did, and is about to do."""
        if self._followers is not None and (encoded or takes_turn):
            self._followers.send(Orders(tuple(encoded), takes_turn, driver.checksum))
        encoded.clear()

    def _publish(self, news: News) -> None:
        if news:
            self._call(functools.partial(self._deliver, news))

    def _call(self, function: Callable[[], None]) -> None:
        """Have the event loop call a function."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(function)
