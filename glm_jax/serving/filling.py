"""Requests to fill the blanks of a text, from left to right."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from glm_jax.engine.beam_search import BeamSearch
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request
from glm_jax.generation.blank_filling import BlankFilling, PartlyFilled, filling_by_beams
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
        self._choice = service.choice(request, request.num_beams, "num_beams")
        self._special = tokenizer.special_tokens
        self._ends = self._special.end_tokens
        self._partly = PartlyFilled.begin(
            tokenizer, request.text, limit, bool(request.unidirectional)
        )
        self._times = AnswerTimes(service.metrics)
        self._completion_tokens = 0
        self._reasons: list[str] = []
        self._pieces: list[dict[str, Any]] = []
        self._text = TextStream(tokenizer.decode)
        self._is_search = isinstance(self._choice, BeamSearch)
        self._prompt_tokens = len(self._partly.tokens)

    def _submit(self) -> None:
        choice = self._choice
        if isinstance(choice, BeamSearch):
            params, config = self.model.params, self.model.config
            max_tokens = self._request.max_tokens
            self.session.search(
                0, filling_by_beams(params, config, self._partly, choice, max_tokens)
            )
            return
        seed = seed_of(self._request.seed)
        template = Request(Prompt((), None), choice, self._request.max_tokens, seed)
        self._filling = BlankFilling(self._partly, template, self._show)
        self._submit_blank(is_urgent=False)

    def _submit_blank(self, is_urgent: bool) -> None:
        # The next blank of a text that has begun goes before requests that wait.
        request = self._filling.next_request()
        if request is not None:
            self.session.submit(len(self._filling.completions), request, is_urgent)

    def _show(self, tokens: Sequence[int], is_blank: bool) -> None:
        """Add tokens of the text whose position is final."""
        text = "".join(map(self._text.add, tokens))
        if text:
            number = len(self._filling.partly.blanks) if is_blank else None
            self._pieces.append({"text": text, "blank": number})

    async def _fill(self) -> AsyncIterator[dict[str, Any]]:
        """Fill all blanks, and yield pieces of the text as they become final."""
        while self._filling.partly.has_blank:
            _, token = await self.session.next()
            self._times.token()
            self._completion_tokens += 1
            self._filling.receive(token)
            for piece in self._take():
                yield piece
            if token.finish_reason is not None:
                self._reasons.append(token.finish_reason)
                self._submit_blank(is_urgent=True)
        self._partly = self._filling.partly
        self._times.end()
        for piece in self._take():
            yield piece
        if rest := self._text.finish():
            yield {"text": rest, "blank": None}

    def _take(self) -> list[dict[str, Any]]:
        pieces, self._pieces = self._pieces, []
        return pieces

    async def _search(self) -> AsyncIterator[dict[str, Any]]:
        _, hypotheses = await self.session.next()
        partly, hypothesis = hypotheses[0]
        self._completion_tokens = sum(len(blank) for blank in partly.blanks)
        has_ended = bool(hypothesis.tokens) and hypothesis.tokens[-1] in self._ends
        self._reasons = ["stop"] * len(partly.blanks)
        if partly.blanks and not has_ended:
            self._reasons[-1] = "length"
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
