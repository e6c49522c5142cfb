"""The base class of requests while they are answered."""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Hashable, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

from glm_jax.serving.service import Service, new_id


class Run(ABC):
    """A request while it is answered: checked, started, read, closed.

    Attributes:
      service: the parts of the server.
      adapter: that answers; see `Prompt.adapter`.
      session: with the engine, from `start` on.
    """

    _answers = 1  # maximum number that it asks for at once
    _prompt_tokens = 0
    _queued_tokens = 0  # that its answers may come to, with their prompts

    def __init__(self, service: Service, kind: str, model: str | None):
        """Check a request; may run in any thread.

        Args:
          kind: the answer's `object`, and the prefix of its id.
          model: the name that the client asks for.

        Raises:
          HTTPException: the server has another model.
          UnavailableError: the model is not ready.
        """
        self.adapter = service.adapter_of(model)
        self.service, self.model = service, service.worker.ready_model()
        self._kind, self._created = kind, int(time.time())
        self._id = new_id(kind)

    def start(self, client: Hashable) -> None:
        """Open a session and submit the request; called on the event loop.

        Args:
          client: identifies the client; clients take turns.

        Raises:
          UserError: the queue is full, or the engine refuses the request.
        """
        limits = self.service.settings.limits
        self.session = self.service.worker.open(
            self._answers, limits.seconds, client, self._queued_tokens
        )
        try:
            self._submit()
        except BaseException:
            self.close()
            raise
        self.service.metrics.prompt_tokens.inc(self._prompt_tokens)

    def _possible_tokens(self, prompts: Sequence[int], max_tokens: int | None) -> int:
        """Return how many tokens prompts and their answers may come to.

        Args:
          prompts: the tokens of each prompt.
          max_tokens: of an answer; None for as many as there is room for.
        """
        longest = self.model.engine.max_length
        room = longest if max_tokens is None else max_tokens
        return sum(min(longest, prompt + 1 + room) for prompt in prompts)

    @abstractmethod
    def _submit(self) -> None:
        """Ask the session for all answers, or for the first."""

    def close(self) -> None:
        """Cancel what is not answered yet."""
        self.session.close()

    def head(self) -> dict[str, Any]:
        """Return the fields that every event and every whole answer begins with."""
        return {
            "id": self._id,
            "object": self._kind,
            "created": self._created,
            "model": self.service.names[self.adapter],
        }

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """Return the token counts of the request."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
        }

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of a stream; by default the whole answer."""
        yield await self.whole()

    @abstractmethod
    async def whole(self) -> dict[str, Any]:
        """Return the whole answer."""

    async def response(self) -> Response:
        """Return the whole answer as an HTTP response."""
        return JSONResponse(await self.whole())
