"""Requests to fill the blanks of a text, from left to right."""

import collections
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from glm_jax.engine.beam_search import BeamSearch
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request
from glm_jax.generation.beam_filling import filling_by_beams
from glm_jax.generation.blank_filling import (
    BlankFilling,
    PartlyFilled,
    next_request,
)
from glm_jax.generation.driver import Search
from glm_jax.generation.text_stream import TextStream
from glm_jax.serving.metrics import AnswerTimes
from glm_jax.serving.run import Run
from glm_jax.serving.schemas import FillRequest
from glm_jax.serving.service import Service, seed_of


class FillRun(Run):
    """A fill request while it is answered."""

    def __init__(self, service: Service, request: FillRequest):
        """Check and tokenise a request.

        Raises:
          HTTPException, UserError: it cannot be answered.
        """
        super().__init__(service, "fill", request.model)
        self._request = request
        tokenizer, limit = self.model.tokenizer, self.model.engine.max_length
        self._choice = service.choice(request, request.num_beams)
        self._special = tokenizer.special_tokens
        self._partly = PartlyFilled.begin(
            tokenizer, request.text, limit, bool(request.unidirectional), adapter=self.adapter
        )
        self._guide = service.guide(request, self._partly.tokens.count(self._partly.mask))
        self._times = AnswerTimes(service.metrics)
        self._completion_tokens = 0
        self._reasons: list[str] = []
        # Tokens whose position in the text is final, and the number of their blank; the engine's
        # thread adds them.
        self._final: collections.deque[tuple[Sequence[int], int | None]] = collections.deque()
        self._text = TextStream(tokenizer.decode)
        self._is_search = isinstance(self._choice, BeamSearch)
        self._prompt_tokens = len(self._partly.tokens)
        self._queued_tokens = self._possible_tokens([self._prompt_tokens], request.max_tokens)

    def _submit(self) -> None:
        choice, partly, model = self._choice, self._partly, self.model
        max_tokens, priority = self._request.max_tokens, self._request.priority or 0
        if isinstance(choice, BeamSearch):
            steps = filling_by_beams(model.params, model.config, partly, choice, max_tokens)
            self._searching = Search(steps, priority)
            self.session.submit(0, self._searching)
            return
        template = Request(
            prompt=Prompt((), None),
            sampling=choice,
            max_tokens=max_tokens,
            seed=seed_of(self._request.seed),
            guide=self._guide,
            priority=priority,
        )
        if partly.has_blank:
            model.engine.check(next_request(partly, template))
        self._filling = BlankFilling(partly, template, self._show)
        self.session.submit(0, self._filling)

    def _show(self, tokens: Sequence[int], is_blank: bool) -> None:
        """Add final tokens; called in the engine's thread."""
        self._final.append((tokens, len(self._filling.partly.blanks) if is_blank else None))

    async def _fill(self) -> AsyncIterator[dict[str, Any]]:
        """Fill all blanks, and yield pieces of the text as they become final."""
        while (token := (await self.session.next())[1]) is not None:
            self._times.token()
            self._completion_tokens += 1
            if token.finish_reason is not None:
                self._reasons.append(token.finish_reason)
            for piece in self._pieces():
                yield piece
        self._times.end()
        for piece in self._pieces():
            yield piece
        self._partly = self._filling.partly
        if rest := self._text.finish():
            yield {"text": rest, "blank": None}

    def _pieces(self) -> Iterator[dict[str, Any]]:
        """Take the final tokens that are not taken yet, as text."""
        while self._final:
            tokens, number = self._final.popleft()
            if text := "".join(map(self._text.add, tokens)):
                yield {"text": text, "blank": number}

    async def _search(self) -> AsyncIterator[dict[str, Any]]:
        await self.session.next()
        partly, hypothesis = self._searching.result[0]
        self._completion_tokens = sum(len(blank) for blank in partly.blanks)
        last = hypothesis.finish_reason(self._special.end_tokens)
        self._reasons = [*["stop"] * (len(partly.blanks) - 1), last][: len(partly.blanks)]
        self._partly = partly
        for piece in self._finished()["pieces"]:
            yield piece

    def _finished(self) -> dict[str, Any]:
        filled = self._partly.finished(self.model.tokenizer)
        numbers = iter(range(len(filled.blanks)))
        pieces = [
            {"text": text, "blank": next(numbers) if is_blank else None}
            for text, is_blank in filled.pieces
        ]
        reasons = [*self._reasons, *["length"] * (len(filled.blanks) - len(self._reasons))]
        return self.head() | {
            "text": filled.text,
            "blanks": [
                {"text": text, "finish_reason": reason}
                for text, reason in zip(filled.blanks, reasons, strict=True)
            ],
            "pieces": [piece for piece in pieces if piece["text"] or piece["blank"] is not None],
            "usage": self.usage(self._completion_tokens),
        }

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of a stream: pieces, then the whole answer."""
        async for piece in self._search() if self._is_search else self._fill():
            yield {"object": "fill.piece", **piece}
        yield self._finished()

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer."""
        last: dict[str, Any] = {}
        async for chunk in self.chunks():
            last = chunk
        return last
