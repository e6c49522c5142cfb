"""One loop over an engine turns requests into answers: for a terminal, a job, an evaluation.

An `Answer` names its next request, takes the tokens of it one by one, and may then name another,
such as that of a text's next blank, which goes before all that wait. A server's clients come and
go: there the event loop asks for the requests and passes on the tokens of the same answers.
"""

import abc
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from glm_jax.engine.engine import Engine
from glm_jax.engine.request import Completion, Request, Token, completion
from glm_jax.errors import UserError


class Answer(abc.ABC):
    """What one request of an engine gives, or several one after another.

    Attributes:
      error: what ended it before it was whole.
    """

    error: UserError | None = None

    @abc.abstractmethod
    def next_request(self) -> Request | None:
        """What the engine is to complete next; None where the answer is whole.

        Raises:
          UserError: it cannot be answered.
        """

    @abc.abstractmethod
    def receive(self, token: Token) -> bool:
        """Takes the next token of its request, which is none of an error.

        Returns:
          Whether that was enough, where the engine would go on.
        """

    def check(self) -> None:
        """
        Raises:
          UserError: `error`.
        """
        if self.error is not None:
            raise self.error


_Answer = TypeVar("_Answer", bound=Answer)


class SingleRequest(Answer):
    """What one request gives.

    Attributes:
      tokens: so far.
    """

    def __init__(self, request: Request):
        self._request = request
        self.tokens: list[Token] = []

    def next_request(self) -> Request | None:
        return None if self.tokens else self._request

    def receive(self, token: Token) -> bool:
        self.tokens.append(token)
        return False


def drive(
    engine: Engine,
    answers: Iterable[_Answer],
    on_step: Callable[[list[Token]], object] | None = None,
) -> Iterator[_Answer]:
    """Answers in the order in which they end, whole or with an `error`.

    Args:
      engine: that does nothing else meanwhile.
      answers: taken as slots become free.
      on_step: called after each step with all its tokens.
    """
    source, is_exhausted = iter(answers), False
    running: dict[int, _Answer] = {}

    def submit(answer: _Answer, is_urgent: bool) -> bool:
        """Whether there was a request."""
        try:
            request = answer.next_request()
            if request is not None:
                running[engine.submit(request, is_urgent)] = answer
        except UserError as error:
            answer.error = error
            return False
        return request is not None

    while not (is_exhausted and engine.is_idle):
        while not is_exhausted and engine.waiting < engine.slots:
            new = next(source, None)
            is_exhausted = new is None
            if new is not None and not submit(new, is_urgent=False):
                yield new
        tokens = engine.step()
        for token in tokens:
            answer = running[token.request_id]
            answer.error = token.error
            is_enough = token.error is None and answer.receive(token)
            if token.finish_reason is None and not is_enough:
                continue
            if token.finish_reason is None:
                engine.cancel(token.request_id)
            del running[token.request_id]
            if answer.error is not None or not submit(answer, is_urgent=True):
                yield answer
        if on_step is not None:
            on_step(tokens)


def complete_all(engine: Engine, requests: Iterable[Request]) -> Iterator[Completion]:
    """Completes requests in the order in which they finish; ids count up in that of `requests`.

    Raises:
      UserError: one that cannot be completed.
    """
    for answer in drive(engine, map(SingleRequest, requests)):
        answer.check()
        yield completion(answer.tokens)
