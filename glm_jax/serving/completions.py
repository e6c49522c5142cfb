"""OpenAI's completion requests: from checked JSON to the choices of an answer."""

import dataclasses
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from glm_jax.engine.beam_search import BeamSearch
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request, Token
from glm_jax.generation.blank_filling import PartlyFilled, filling_by_beams, next_request
from glm_jax.generation.driver import Search, SingleRequest
from glm_jax.generation.text_stream import Stops, TextStream
from glm_jax.serving.errors import refused
from glm_jax.serving.metrics import AnswerTimes
from glm_jax.serving.run import Run
from glm_jax.serving.schemas import CompletionRequest
from glm_jax.serving.service import Service, seed_of
from glm_jax.serving.worker import ServedModel

_BLANK = "[MASK]"  # between a prompt and its suffix


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """A prompt with its one blank, and the text on both sides of it.

    Attributes:
      before: text before the blank, without the space that the answer begins with.
      after: text behind the blank.
      text: the prompt without its mask.
    """

    partly: PartlyFilled
    before: str
    after: str
    text: str


class _Choice:
    """One choice of an answer while its tokens arrive."""

    def __init__(
        self,
        index: int,
        prompt: _Prompt,
        request: CompletionRequest,
        decode: Callable[[Iterable[int]], str],
        times: AnswerTimes,
    ):
        self.index, self.prompt = index, prompt
        self.tokens = 0
        self._special, self._has_ended = prompt.partly.special, False
        self._request, self._times = request, times
        self._stops = Stops([request.stop] if isinstance(request.stop, str) else request.stop or [])
        self._unsent: list[tuple[str, float, dict[str, float] | None]] = []
        self._length = len(prompt.before) if request.echo else 0
        before = prompt.partly.tokens[: prompt.partly.position]
        self._stream = TextStream(decode, before)

    def opening(self) -> dict[str, Any] | None:
        """Return the prompt as a piece if the request has `echo`."""
        if not self._request.echo:
            return None
        return self.piece(self.prompt.before, None)

    def receive(self, token: Token) -> dict[str, Any] | None:
        """Return the piece that a token adds, or None if it adds no text yet."""
        self._times.token()
        self.tokens += 1
        self._has_ended |= not self._special.without_end([token.token])
        names = self._names(token)  # before the stream goes on
        raw = "" if self._has_ended else self._stream.add(token.token)
        reason = token.finish_reason
        if reason is not None:
            raw += self._stream.finish()
        text = self._stops.add(raw)
        if self._request.logprobs is not None and not self._has_ended:
            self._unsent.append((raw, token.log_probability, self._top(token, raw, names)))
        if self._stops.has_stopped:
            reason = "stop"
        elif reason is not None:
            text += self._stops.finish()
        if reason is not None:
            self._times.end()
            text += self.prompt.after if self._request.echo else ""
        return self.piece(text, reason) if text or reason or self._unsent else None

    def _names(self, token: Token) -> list[str]:
        """Return the text that each top token would add here, or its id where that is not a whole
        character."""
        ids = [token_id for token_id, _ in token.top_logprobs[: self._request.logprobs or 0]]
        texts = [self._stream.peek(token_id) for token_id in ids]
        return [
            text if text and "\ufffd" not in text else _id_name(token_id)
            for text, token_id in zip(texts, ids, strict=True)
        ]

    def _top(self, token: Token, chosen: str, names: Sequence[str]) -> dict[str, float] | None:
        """Return the log-probabilities of the top tokens by name.

        As in OpenAI's interface the chosen token is always among them: last, where it is none of
        the top tokens.
        """
        if not self._request.logprobs:
            return None
        top: dict[str, float] = {}
        for (token_id, value), text in zip(token.top_logprobs, names, strict=False):
            is_chosen = token_id == token.token
            name = chosen if is_chosen else text
            if not is_chosen and (name == chosen or name in top):
                name = _id_name(token_id)
            top[name] = round(value, 6)
        return top | {chosen: round(token.log_probability, 6)}

    def piece(self, text: str, reason: str | None) -> dict[str, Any]:
        """Return a part of the choice as JSON."""
        probabilities = None
        if self._request.logprobs is not None:
            probabilities = self._probabilities()
        return {
            "text": text,
            "index": self.index,
            "logprobs": probabilities,
            "finish_reason": reason,
        }

    def _probabilities(self) -> dict[str, Any]:
        offsets = []
        for text, _, _ in self._unsent:
            offsets.append(self._length)
            self._length += len(text)
        unsent, self._unsent = self._unsent, []
        return {
            "tokens": [text for text, _, _ in unsent],
            "token_logprobs": [round(value, 6) for _, value, _ in unsent],
            "top_logprobs": [top for _, _, top in unsent] if self._request.logprobs else None,
            "text_offset": offsets,
        }


class CompletionRun(Run):
    """A completion request while it is answered."""

    def __init__(self, service: Service, request: CompletionRequest):
        """Check and tokenise a request.

        Raises:
          HTTPException, UserError: it cannot be answered.
        """
        super().__init__(service, "text_completion", request.model)
        self._request, self._count = request, request.n or 1
        self._choice = service.choice(request, request.best_of, "best_of")
        self._is_search = isinstance(self._choice, BeamSearch)
        self._check_beams()
        prompts = _prompts(request)
        self._answers = len(prompts) * (1 if self._is_search else self._count)
        limit = service.worker.max_answers
        if self._answers > limit:
            raise refused(400, f"{self._answers} answers: at most {limit} in one request", "n")
        # Each prompt is joined with a copy of the suffix.
        size = len(prompts) * len(request.suffix or "")
        if size > service.limits.body_bytes:
            raise refused(400, f"suffix: {size} characters for {len(prompts)} prompts", "suffix")
        self._prompts = [self._begin_prompt(x) for x in prompts]
        decode, times = self.model.tokenizer.decode, lambda: AnswerTimes(service.metrics)
        self._choices = [
            _Choice(i * self._count + j, prompt, request, decode, times())
            for i, prompt in enumerate(self._prompts)
            for j in range(self._count)
        ]
        self._prompt_tokens = sum(len(prompt.partly.tokens) for prompt in self._prompts)

    def _check_beams(self) -> None:
        request = self._request
        best_of = request.best_of or self._count
        if best_of < self._count:
            raise refused(400, f"best_of={best_of} is less than n={self._count}", "best_of")
        if not self._is_search:
            return
        for name in ("stream", "logprobs", "stop"):
            if getattr(request, name) not in (None, False):
                raise refused(400, f"{name} beside best_of={best_of}: leave out one", name)

    def _begin_prompt(self, prompt: str | Sequence[int]) -> _Prompt:
        model = self.model
        limit, special = model.engine.max_length, model.tokenizer.special_tokens
        is_unidirectional = bool(self._request.unidirectional)
        if isinstance(prompt, str):
            partly = PartlyFilled.begin(model.tokenizer, prompt, limit, is_unidirectional)
        else:
            masks = {special.mask, special.smask, special.gmask}
            needs_blank = not (masks & set(prompt) or is_unidirectional)
            tokens = [*prompt, special.gmask] if needs_blank else prompt
            partly = PartlyFilled.from_tokens(tokens, special, limit, is_unidirectional)
        blanks = partly.tokens.count(partly.mask)
        if blanks > 1:
            raise refused(400, f"{blanks} blanks: /v1/fill takes more than one", "prompt")
        return _Prompt(partly, *_sides(model, partly, prompt))

    def _submit(self) -> None:
        request, model, choice = self._request, self.model, self._choice
        max_tokens = request.max_tokens
        if max_tokens == 0:
            return
        if isinstance(choice, BeamSearch):
            self._searches = [
                Search(filling_by_beams(model.params, model.config, x.partly, choice, max_tokens))
                for x in self._prompts
            ]
            for number, search in enumerate(self._searches):
                self.session.submit(number, search)
            return
        for answer in self._choices:
            number = answer.index % self._count
            template = Request(
                prompt=Prompt((), None),
                sampling=choice,
                max_tokens=max_tokens,
                seed=seed_of(request.seed, number),
                log_probabilities=request.logprobs is not None,
                top_logprobs=bool(request.logprobs),
            )
            asked = next_request(answer.prompt.partly, template)
            model.engine.check(asked)
            self.session.submit(answer.index, SingleRequest(asked))

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        """Yield parts of choices as they arrive."""
        if self._request.max_tokens == 0:
            for choice in self._choices:
                opening = choice.opening()
                yield choice.piece(choice.prompt.text if opening else "", "length")
            return
        if self._is_search:
            async for piece in self._searched():
                yield piece
            return
        for choice in self._choices:
            if (opening := choice.opening()) is not None:
                yield opening
        running = len(self._choices)
        while running:
            index, token = await self.session.next()
            assert token is not None  # a token with a finish_reason comes before the end
            received = self._choices[index].receive(token)
            if received is None:
                continue
            if received["finish_reason"] is not None:
                running -= 1
                self.session.cancel(index)  # the engine does not know of stop texts
            yield received

    async def _searched(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the choices of beam searches."""
        for _ in self._prompts:
            number, _ = await self.session.next()
            first = number * self._count
            for choice, (partly, hypothesis) in zip(
                self._choices[first : first + self._count],
                self._searches[number].result,
                strict=False,
            ):
                choice.tokens = len(hypothesis.tokens)
                has_ended = hypothesis.tokens[-1:] and hypothesis.tokens[-1] in (
                    partly.special.end_tokens
                )
                runs = partly.finished(self.model.tokenizer).pieces
                text = "".join(run for run, is_blank in runs if is_blank)
                if self._request.echo:
                    text = choice.prompt.before + text + choice.prompt.after
                yield choice.piece(text, "stop" if has_ended else "length")

    @property
    def _generated(self) -> int:
        return sum(choice.tokens for choice in self._choices)

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of a stream."""
        options = self._request.stream_options
        with_usage = options is not None and options.include_usage
        async for piece in self.pieces():
            chunk = self.head() | {"choices": [piece]}
            yield chunk | {"usage": None} if with_usage else chunk
        if with_usage:
            yield self.head() | {"choices": [], "usage": self.usage(self._generated)}

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer."""
        choices_by_index: dict[int, dict[str, Any]] = {}
        async for piece in self.pieces():
            whole = choices_by_index.setdefault(piece["index"], piece)
            if whole is piece:
                continue
            whole["text"] += piece["text"]
            whole["finish_reason"] = piece["finish_reason"]
            for name, values in (piece["logprobs"] or {}).items():
                if values is not None:
                    whole["logprobs"][name] += values
        choices = [choices_by_index[index] for index in sorted(choices_by_index)]
        return self.head() | {"choices": choices, "usage": self.usage(self._generated)}


def _id_name(token: int) -> str:
    return f"token_id:{token}"


def _prompts(request: CompletionRequest) -> list[str | Sequence[int]]:
    """Return the prompts of a request as a list."""
    prompt: Any = request.prompt
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if request.suffix is None:
        return prompts
    if any(not isinstance(text, str) or "MASK]" in text for text in prompts):
        raise refused(400, "suffix: its prompts are texts without blanks", "suffix")
    return [f"{text}{_BLANK}{request.suffix}" for text in prompts]


def _sides(
    model: ServedModel, partly: PartlyFilled, prompt: str | Sequence[int]
) -> tuple[str, str, str]:
    """Return the text before and behind a blank, and both joined; unchanged where the prompt is
    text, decoded where it is tokens."""
    decode = model.tokenizer.decode
    if isinstance(prompt, str):
        before, _, after = prompt.partition(decode([partly.mask]))
        whole = before + after
        if before.endswith(" ") and not decode(partly.tokens[: partly.position]).endswith(" "):
            before = before[:-1]  # the tokenizer left it to the answer
        return before, after, whole
    behind = partly.tokens[partly.position + 1 :]
    if behind and behind[-1] == partly.special.eos:
        behind = behind[:-1]
    sides = decode(partly.tokens[: partly.position]), decode(behind)
    return *sides, "".join(sides)
