"""What requests of either kind have in common while they are answered."""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import Any

from glm_jax.serving.service import Service, new_id


class Run(ABC):
    """A request on its way; to be closed.

    Attributes:
      service: that answers.
      exchange: its place with the engine, once it is `open`.
    """

    def __init__(self, service: Service, kind: str, model: str | None):
        """
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

    def open(self, answers: int, prompt_tokens: int, submit: Callable[[], None]) -> None:
        """Takes a place for so many answers and hands the request to the engine.

        Raises:
          UserError: there is no room, or the engine does not take it.
        """
        self._prompt_tokens = prompt_tokens
        self.exchange = self.service.worker.open(answers, self.service.limits.seconds)
        try:
            submit()
        except BaseException:
            self.close()
            raise
        self.service.metrics.prompt_tokens.inc(prompt_tokens)

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
