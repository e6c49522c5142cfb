"""What requests of either kind have in common while they are answered."""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Hashable
from typing import Any

from glm_jax.serving.service import Service, new_id


class Run(ABC):
    """A request on its way; to be started, and to be closed.

    Attributes:
      service: that answers.
      exchange: its place with the engine, once it is started.
    """

    _answers = 1  # that it asks for at once, at most
    _prompt_tokens = 0

    def __init__(self, service: Service, kind: str, model: str | None):
        """Checks a request; from any thread.

        Args:
          kind: what an answer's JSON calls itself.
          model: that is asked for.

        Raises:
          HTTPException, UnavailableError: it is not here, or not yet.
        """
        service.check_model(model)
        self.service, self.model = service, service.worker.ready_model()
        self._kind, self._created = kind, int(time.time())
        self._id = new_id(kind)

    def start(self, client: Hashable) -> None:
        """Hands the request to the engine; on the event loop.

        Args:
          client: who asks; clients take turns.

        Raises:
          UserError: there is no room, or the engine does not take it.
        """
        limits = self.service.limits
        self.exchange = self.service.worker.open(self._answers, limits.seconds, client)
        try:
            self._submit()
        except BaseException:
            self.close()
            raise
        self.service.metrics.prompt_tokens.inc(self._prompt_tokens)

    @abstractmethod
    def _submit(self) -> None:
        """Asks for the answers, or for the first of them."""

    def close(self) -> None:
        """Gives up what is not answered yet."""
        self.exchange.close()

    def head(self) -> dict[str, Any]:
        """What every part of the answer begins with."""
        return {
            "id": self._id,
            "object": self._kind,
            "created": self._created,
            "model": self.service.name,
        }

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """How many tokens the request took."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
        }

    @abstractmethod
    def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """What a stream gives."""

    @abstractmethod
    async def whole(self) -> dict[str, Any]:
        """All of the answer."""
