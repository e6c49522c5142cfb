"""OpenAI's embedding requests: texts in, the means of their final hidden states out."""

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.responses import Response

from glm_jax.engine.embedding import Embedding, embedded_sequence
from glm_jax.generation.scored_texts import grouped
from glm_jax.generation.shared_scoring import Scoring
from glm_jax.serving.errors import refused
from glm_jax.serving.run import Run
from glm_jax.serving.schemas import EmbeddingRequest
from glm_jax.serving.service import Service
from glm_jax.serving.worker import SCORED_TOKENS

_MAX_NUMBERS = 1 << 22  # in one answer; each takes some 20 bytes of JSON
_MAX_CHARACTERS = 256  # mean, of a token: far more than any vocabulary has


class EmbeddingRun(Run):
    """An embedding request while it is answered."""

    def __init__(self, service: Service, request: EmbeddingRequest):
        """Check and tokenise a request.

        Raises:
          HTTPException, UserError: it cannot be answered.
        """
        super().__init__(service, "list", request.model)
        self._priority = request.priority or 0
        self._is_base64 = request.encoding_format == "base64"
        size = self.model.config.hidden_size
        if request.dimensions not in (None, size):
            message = f"dimensions={request.dimensions}: this model's embeddings have {size}"
            raise refused(400, f"{message}, and are not made to be cut", "dimensions")
        given: Any = request.input
        texts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        if len(texts) * size > _MAX_NUMBERS:
            message = f"{len(texts)} texts: at most {_MAX_NUMBERS // size} in one request"
            raise refused(400, message, "input")
        tokens = [self._tokens(number, text) for number, text in enumerate(texts)]
        self._groups = list(grouped(tokens, SCORED_TOKENS, each=1))  # [gMASK] of each
        self._prompt_tokens = self._queued_tokens = sum(map(len, tokens))

    def _tokens(self, number: int, text: str | Sequence[int]) -> Sequence[int]:
        """Return the tokens of a text. Words such as [MASK] in it are text as any other."""
        model = self.model
        limit = model.engine.max_length - 1  # of [gMASK] behind it
        if isinstance(text, str) and len(text) > limit * _MAX_CHARACTERS:
            message = f"input[{number}]: {len(text)} characters: at most {limit} tokens"
            raise refused(400, message, "input")
        tokens = model.tokenizer.encode(text, ()) if isinstance(text, str) else text
        if not tokens:
            raise refused(400, f"input[{number}]: no tokens: leave it out", "input")
        if len(tokens) > limit:
            message = f"input[{number}]: {len(tokens)} tokens: at most {limit}"
            raise refused(400, message, "input")
        if (largest := max(tokens)) >= model.config.vocab_size:
            message = f"input[{number}]: token {largest} is not in the vocabulary"
            raise refused(400, message, "input")
        return tokens

    def _submit(self) -> None:
        self._submit_group(0)

    def _submit_group(self, number: int) -> None:
        special = self.model.tokenizer.special_tokens
        sequences = [
            embedded_sequence(tokens, special, self.adapter) for tokens in self._groups[number]
        ]
        self._embedding = Scoring(self.model.embedder.steps(sequences), self._priority)
        self.session.submit(number, self._embedding)

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer, with arrays for embeddings."""
        embeddings: list[Embedding] = []
        for number in range(len(self._groups)):
            if number:  # one after another, so that others have their turns
                self._submit_group(number)
            await self.session.next()
            embeddings += self._embedding.result
        data = [
            {"object": "embedding", "index": index, "embedding": each.values}
            for index, each in enumerate(embeddings)
        ]
        usage = {"prompt_tokens": self._prompt_tokens, "total_tokens": self._prompt_tokens}
        name = self.service.names[self.adapter]
        return {"object": "list", "data": data, "model": name, "usage": usage}

    async def response(self) -> Response:
        return await self.service.compute(_rendered, await self.whole(), self._is_base64)


def _rendered(whole: dict[str, Any], is_base64: bool) -> Response:
    # One at a time: no other thread runs while json writes a list.
    data = [
        json.dumps(each | {"embedding": _encoded(each["embedding"], is_base64)})
        for each in whole["data"]
    ]
    start, end = json.dumps(whole | {"data": []}).split("[]", 1)
    return Response(f"{start}[{','.join(data)}]{end}", media_type="application/json")


def _encoded(values: np.ndarray, is_base64: bool) -> str | list[float]:
    if is_base64:
        return base64.b64encode(values.astype("<f4").tobytes()).decode()
    numbers: list[float] = values.tolist()
    return numbers
