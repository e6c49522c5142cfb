"""A client's request while it is answered, on the event loop."""

import asyncio
from collections.abc import Hashable
from typing import TYPE_CHECKING

from glm_jax.engine.fair_queue import Turn
from glm_jax.engine.request import Token
from glm_jax.errors import UserError
from glm_jax.generation.driver import Answer
from glm_jax.serving.errors import BrokenError, TooSlowError

if TYPE_CHECKING:
    from glm_jax.serving.worker import ServedModel, Worker


class Session:
    """A client's request while it is answered. Used on the event loop's thread only.

    It submits answers under keys of its own, and each arriving item names its key. Answers that
    have not ended when the session is closed are cancelled before the thread's next turn.

    Attributes:
      turn: the client's and its own.
      answer_tokens: that an answer may come to, with its prompt; the mean of its answers.
    """

    def __init__(
        self,
        worker: "Worker",
        model: "ServedModel",
        seconds: float,
        client: Hashable,
        answer_tokens: float,
    ):
        self.model = model
        self.answer_tokens = answer_tokens
        self.turn: Turn = (client, worker.next_number())
        self._worker = worker
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._seconds = seconds
        self._answers: dict[int, Answer] = {}
        self._arrivals: asyncio.Queue[tuple[int, Token | None]] = asyncio.Queue()

    def submit(self, key: int, answer: Answer) -> None:
        """Submit an answer; `next` then gives its tokens, and None when it has ended.

        Args:
          key: number of the answer within this session.
        """
        self._answers[key] = answer
        self._worker.submit(self, key, answer)

    def cancel(self, key: int) -> None:
        """Cancel the answer of a key."""
        if (answer := self._answers.pop(key, None)) is not None:
            self._worker.cancel(answer)

    async def next(self) -> tuple[int, Token | None]:
        """Wait for the next item.

        Returns:
          The answer's key, and a `Token` of the engine, or None if the answer is complete.

        Raises:
          BrokenError: the engine or a search failed.
          TooSlowError: the session's time is over.
          UserError: the answer's own error.
        """
        while True:
            try:
                async with asyncio.timeout_at(self._deadline):
                    key, token = await self._arrivals.get()
            except TimeoutError as error:
                raise TooSlowError(
                    f"no whole answer within {self._seconds:g} seconds: ask for fewer tokens"
                ) from error
            if self._worker.failure is not None:
                raise BrokenError("the engine failed")
            if key not in self._answers:  # cancelled
                continue
            if token is None:
                _check(self._answers[key])
            return key, token

    def arrive(self, key: int, token: Token | None) -> None:
        """Queue an item for `next`."""
        self._arrivals.put_nowait((key, token))

    def close(self) -> None:
        """Cancel answers that have not ended and leave the worker; may be called again."""
        for key in list(self._answers):
            self.cancel(key)
        self._worker.discard(self)


def _check(answer: Answer) -> None:
    if not isinstance(answer.error, UserError | None):
        raise BrokenError(f"an answer failed: {answer.error}") from answer.error
    answer.check()
