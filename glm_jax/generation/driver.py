"""One driver turns requests into answers: for a terminal, a job, an evaluation, a server.

An `Answer` names its next work, which is a request of the engine or the steps of a search. It
receives the tokens of its request one by one, and may then name more work, such as the request of
a text's next blank, which goes before all that wait. Each `Driver.turn` is one step of the engine
and one of a search. `drive` takes turns until all answers are complete; a server's thread takes
them while clients come and go.
"""

import abc
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

from glm_jax.engine.engine import Engine
from glm_jax.engine.fair_queue import ALONE, Turn, Turns
from glm_jax.engine.request import Completion, Request, Token, completion
from glm_jax.engine.stepwise import Steps
from glm_jax.errors import UserError

_Result = TypeVar("_Result")


class Answer(abc.ABC):
    """An answer that takes one piece of work, or several one after another.

    Attributes:
      error: why it ended before it was complete.
      priority: of its searches; lower numbers go first. A request has its own.
    """

    error: Exception | None = None
    priority: int = 0

    @abc.abstractmethod
    def next_work(self) -> Request | Steps[None] | None:
        """Return what is to run next, or None if the answer is complete.

        Raises:
          UserError: it cannot be answered.
        """

    def receive(self, token: Token) -> bool:
        """Receive the next token of its request, which is not one of an error.

        Returns:
          Whether the answer needs no more of them, though the engine would go on.
        """
        return False

    def check(self) -> None:
        """Raise `error`, if there is one."""
        if self.error is not None:
            raise self.error


_Answer = TypeVar("_Answer", bound=Answer)


class SingleRequest(Answer):
    """The answer to one request.

    Attributes:
      tokens: so far.
    """

    def __init__(self, request: Request):
        self._request = request
        self.tokens: list[Token] = []

    def next_work(self) -> Request | None:
        return None if self.tokens else self._request

    def receive(self, token: Token) -> bool:
        self.tokens.append(token)
        return False


class Search(Answer, Generic[_Result]):
    """The answer that a search gives.

    Attributes:
      result: of its steps; set when it is complete.
    """

    result: _Result

    def __init__(self, steps: Steps[_Result], priority: int = 0):
        self._steps: Steps[_Result] | None = steps
        self.priority = priority

    def next_work(self) -> Steps[None] | None:
        steps, self._steps = self._steps, None
        return None if steps is None else self._run(steps)

    def _run(self, steps: Steps[_Result]) -> Steps[None]:
        self.result = yield from steps


@dataclasses.dataclass
class _Work(Generic[_Answer]):
    """The current work of an answer.

    Attributes:
      number: the engine's id of the request, or that of the search.
      steps: of a search; None for a request.
      compiling: the search's next program, while another thread compiles it. If that fails, the
        step that needs the program raises the error.
    """

    answer: _Answer
    turn: Turn
    number: int
    steps: Steps[None] | None = None
    compiling: Future[object] | None = None


class Driver(Generic[_Answer]):
    """Answers that an engine, and beam searches beside it, are working on. For one thread.

    Searches run one at a time, each with a cache of its own: two would need twice its memory.
    """

    def __init__(
        self,
        engine: Engine,
        compile_ahead: Callable[[Callable[[], object]], Future[object]] | None = None,
    ):
        """
        Args:
          engine: used by nothing else meanwhile.
          compile_ahead: compiles a search's next program in another thread, while requests go on.
            Without it the step that needs a program compiles it, so that turns are the same in
            all processes that run one model together.
        """
        self._engine, self._compile_ahead = engine, compile_ahead
        self._work: dict[_Answer, _Work[_Answer]] = {}
        self._requests: dict[int, _Work[_Answer]] = {}  # by the engine's id
        self._searches: Turns[_Work[_Answer]] = Turns()
        self._search: _Work[_Answer] | None = None  # the running one
        self._search_numbers = itertools.count()

    @property
    def is_idle(self) -> bool:
        """Whether a turn would do nothing: there is no answer, or only compiling to wait for."""
        return self._engine.is_idle and (not self.searches or self._is_compiling)

    @property
    def searches(self) -> int:
        """Number of searches, waiting and running."""
        return len(self._searches) + (self._search is not None)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a slot, or of searches that wait, if there are more."""
        return max(self._engine.waiting, len(self._searches))

    def submit(self, answer: _Answer, turn: Turn = ALONE, is_urgent: bool = False) -> bool:
        """Queue the next work of an answer.

        Args:
          turn: see `Engine.submit`; searches take turns among themselves.
          is_urgent: whether it goes before all work of its priority that waits.

        Returns:
          False if the answer has ended: it is complete, or has an `error`.
        """
        try:
            work = answer.next_work()
            if isinstance(work, Request):
                request_id = self._engine.submit(work, is_urgent, turn)
                self._requests[request_id] = queued = _Work(answer, turn, request_id)
            elif work is not None:
                queued = _Work(answer, turn, next(self._search_numbers), work)
                self._searches.add(queued.number, queued, turn, is_urgent, answer.priority)
            else:
                return False
        except Exception as error:  # of this answer alone
            answer.error = error
            return False
        self._work[answer] = queued
        return True

    def cancel(self, answer: _Answer) -> None:
        """End an answer, if it is here; later turns return nothing of it."""
        work = self._work.get(answer)
        if work is not None:
            if work.steps is None:
                self._engine.cancel(work.number)
            self._remove(work)

    def turn(self) -> list[tuple[_Answer, Token | None]]:
        """Run one step of the engine and one of a search.

        Returns:
          Each new token with its answer, and None with each answer that has ended, complete or
          with an `error`.
        """
        news: list[tuple[_Answer, Token | None]] = []
        for token in self._engine.step():
            work = self._requests.get(token.request_id)
            if work is None:  # its answer needed no more
                continue
            answer, is_last = work.answer, token.finish_reason is not None
            try:
                is_last |= answer.receive(token.checked())
                news.append((answer, token))
            except Exception as error:  # of this answer alone
                answer.error, is_last = error, True
            if is_last and token.finish_reason is None:
                self._engine.cancel(token.request_id)
            if is_last and not self._go_on(work):
                news.append((answer, None))
        search = self._search_to_step()
        if search is not None and self._step(search) and not self._go_on(search):
            news.append((search.answer, None))
        return news

    def _go_on(self, work: _Work[_Answer]) -> bool:
        """Queue the answer's next work; False if the answer has ended."""
        self._remove(work)
        answer = work.answer
        return answer.error is None and self.submit(answer, work.turn, is_urgent=True)

    def _remove(self, work: _Work[_Answer]) -> None:
        del self._work[work.answer]
        if work.steps is None:
            del self._requests[work.number]
        else:
            self._searches.drop(work.number)
            self._search = None if self._search is work else self._search

    @property
    def _is_compiling(self) -> bool:
        """Whether the running search waits for its next program."""
        compiling = None if self._search is None else self._search.compiling
        return compiling is not None and not compiling.done()

    def _search_to_step(self) -> _Work[_Answer] | None:
        """Return the running search, or the next one in turn; None if there is nothing to do."""
        if self._search is None and self._searches:
            number, _ = self._searches.peek()
            self._search = self._searches.take(number)
        return None if self._is_compiling else self._search

    def _step(self, search: _Work[_Answer]) -> bool:
        """Run a step of a search; whether it was the last."""
        assert search.steps is not None
        try:
            program = next(search.steps)
        except StopIteration:
            return True
        except Exception as error:  # such as out of memory, which the engine is not
            search.answer.error = error
            return True
        if program is not None and self._compile_ahead is not None:
            search.compiling = self._compile_ahead(program)
        return False


def drive(
    engine: Engine,
    answers: Iterable[_Answer],
    on_step: Callable[[list[Token]], object] | None = None,
) -> Iterator[_Answer]:
    """Yield answers in the order in which they end, complete or with an `error`.

    Args:
      engine: used by nothing else meanwhile.
      answers: taken as slots become free.
      on_step: called after each step with all its tokens.

    Raises:
      Exception: one by which an answer ended that is not a UserError.
    """
    driver: Driver[_Answer] = Driver(engine)
    source, is_exhausted = iter(answers), False
    while not (is_exhausted and driver.is_idle):
        while not is_exhausted and driver.waiting < engine.slots:
            new = next(source, None)
            is_exhausted = new is None
            if new is not None and not driver.submit(new):
                yield _expected(new)
        news = driver.turn()
        if on_step is not None:
            on_step([token for _, token in news if token is not None])
        yield from (_expected(answer) for answer, token in news if token is None)


def _expected(answer: _Answer) -> _Answer:
    if not isinstance(answer.error, UserError | None):
        raise answer.error
    return answer


def complete_all(engine: Engine, requests: Iterable[Request]) -> Iterator[Completion]:
    """Yield completions in the order in which they finish; ids count up in that of `requests`.

    Raises:
      UserError: one that cannot be completed.
    """
    for answer in drive(engine, map(SingleRequest, requests)):
        answer.check()
        yield completion(answer.tokens)
