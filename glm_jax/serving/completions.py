"""OpenAI's completion requests: from checked JSON to the choices of an answer."""

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from glm_jax.engine.beam_search import BeamSearch
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request
from glm_jax.engine.sampling import Sampling
from glm_jax.engine.scoring import Score
from glm_jax.generation.beam_filling import filling_by_beams
from glm_jax.generation.blank_filling import (
    PartlyFilled,
    next_request,
)
from glm_jax.generation.driver import Search, SingleRequest
from glm_jax.generation.scored_texts import continuation
from glm_jax.generation.shared_scoring import Scoring
from glm_jax.serving.completion_choices import BlankPrompt, Choice
from glm_jax.serving.errors import refused
from glm_jax.serving.metrics import AnswerTimes
from glm_jax.serving.run import Run
from glm_jax.serving.schemas import CompletionRequest
from glm_jax.serving.service import Service, seed_of
from glm_jax.serving.worker import ServedModel

_BLANK = "[MASK]"  # between a prompt and its suffix
_SCORES = -1  # the session's key of what scores the prompts; answers have those from 0 on
_MAX_NAMED = 1 << 17  # tokens of prompts in one answer; each takes some 100 bytes of JSON


class CompletionRun(Run):
    """A completion request while it is answered."""

    chunk_kind = "text_completion"  # the `object` of a stream's events
    prompt_field = "prompt"  # of the request

    def __init__(self, service: Service, request: CompletionRequest, kind: str = "text_completion"):
        """Check and tokenise a request.

        Args:
          kind: the answer's `object`.

        Raises:
          HTTPException, UserError: it cannot be answered.
        """
        super().__init__(service, kind, request.model)
        self._request, self._priority = request, request.priority or 0
        self._choice = service.choice(
            request, request.beams, "best_of" if request.num_beams is None else "num_beams"
        )
        self._is_search = isinstance(self._choice, BeamSearch)
        self._check_counts()
        # Answers to each prompt that are generated, of which the best `n` are given.
        self._count = request.n or 1 if self._is_search else request.best_of or request.n or 1
        self._is_ranked = self._count > (request.n or 1)
        prompts = _prompts(request)
        self._answers = len(prompts) * (1 if self._is_search else self._count)
        limit = service.worker.max_answers
        if self._answers > limit:
            raise refused(400, f"{self._answers} answers: at most {limit} in one request", "n")
        self._guide = service.guide(request, self._answers)
        # Each prompt is joined with a copy of the suffix.
        size = len(prompts) * len(request.suffix or "")
        if size > service.settings.limits.body_bytes:
            raise refused(400, f"suffix: {size} characters for {len(prompts)} prompts", "suffix")
        self._prompts = [self._begin_prompt(x) for x in prompts]
        decode, times = self.model.tokenizer.decode, lambda: AnswerTimes(service.metrics)
        self._choices = [
            Choice(
                i * self._count + j,
                prompt,
                request,
                decode,
                times(),
                self._choice.min_tokens,
                self._guide is not None,
            )
            for i, prompt in enumerate(self._prompts)
            for j in range(self._count)
        ]
        self._prompt_tokens = sum(len(prompt.partly.tokens) for prompt in self._prompts)
        lengths = [len(prompt.partly.tokens) for prompt in self._prompts]
        self._queued_tokens = self._possible_tokens(lengths, request.max_tokens) * (
            1 if self._is_search else self._count
        )
        self._names_prompts = bool(request.echo) and request.logprobs is not None
        self._scored = [x for x in self._prompts if self._names_prompts and x.can_be_scored]
        named = self._count * self._prompt_tokens
        if self._names_prompts and named > _MAX_NAMED:
            message = f"{named} tokens of prompts with logprobs: at most {_MAX_NAMED}"
            raise refused(400, message, "prompt")

    def _check_counts(self) -> None:
        """Refuse counts of answers that do not fit each other, and what cannot go with them."""
        request, count = self._request, self._request.n or 1
        best_of, beams = request.best_of or count, request.beams
        if best_of < count:
            raise refused(400, f"best_of={best_of} is less than n={count}", "best_of")
        if best_of > count and request.stream:
            message = f"stream beside best_of={best_of}: the best {count} are known at the end"
            raise refused(400, message, "stream")
        if not self._is_search:
            return
        if count > (beams or 1):
            raise refused(400, f"n={count} is more than num_beams={beams}", "n")
        excluded = {name: getattr(request, name) for name in ("stream", "logprobs", "stop")}
        excluded["best_of"] = request.num_beams and request.best_of
        for name, value in excluded.items():
            if value not in (None, False):
                raise refused(400, f"{name} beside num_beams={beams}: leave out one", name)

    def _begin_prompt(self, prompt: str | Sequence[int]) -> BlankPrompt:
        model = self.model
        limit, special = model.engine.max_length, model.tokenizer.special_tokens
        is_unidirectional = bool(self._request.unidirectional)
        if isinstance(prompt, str):
            partly = PartlyFilled.begin(
                model.tokenizer, prompt, limit, is_unidirectional, adapter=self.adapter
            )
        else:
            masks = {special.mask, special.smask, special.gmask}
            needs_blank = not (masks & set(prompt) or is_unidirectional)
            tokens = [*prompt, special.gmask] if needs_blank else prompt
            partly = PartlyFilled.from_tokens(
                tokens, special, limit, is_unidirectional, adapter=self.adapter
            )
        blanks = partly.tokens.count(partly.mask)
        if blanks > 1:
            raise refused(400, f"{blanks} blanks: /v1/fill takes more than one", self.prompt_field)
        return BlankPrompt(partly, *_sides(model, partly, prompt))

    def _submit(self) -> None:
        model, choice, max_tokens = self.model, self._choice, self._request.max_tokens
        if isinstance(choice, BeamSearch):
            self._searches = [
                Search(
                    filling_by_beams(model.params, model.config, x.partly, choice, max_tokens),
                    self._priority,
                )
                for x in self._prompts
            ]
            for number, search in enumerate(self._searches if max_tokens != 0 else ()):
                self.session.submit(number, search)
            return
        requests = [self._choice_request(each, choice) for each in self._choices]
        for request in requests:
            model.engine.check(request)
        self._waiting = requests if max_tokens != 0 else []
        if self._scored:
            texts = [
                continuation((), prompt.tokens, prompt.partly.special, adapter=self.adapter)
                for prompt in self._scored
            ]
            self._scoring = Scoring(model.scorer.steps(texts), self._priority)
            self.session.submit(_SCORES, self._scoring)
        else:
            self._submit_waiting()

    def _choice_request(self, choice: Choice, sampling: Sampling) -> Request:
        request = self._request
        template = Request(
            prompt=Prompt((), None),
            sampling=sampling,
            max_tokens=request.max_tokens or None,
            seed=seed_of(request.seed, choice.index % self._count),
            log_probabilities=request.logprobs is not None or self._is_ranked,
            top_logprobs=bool(request.logprobs),
            priority=self._priority,
            guide=self._guide,
        )
        return next_request(choice.prompt.partly, template)

    def _submit_waiting(self) -> None:
        for index, request in enumerate(self._waiting):
            self.session.submit(index, SingleRequest(request))

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        """Yield parts of choices as they arrive."""
        if self._names_prompts:
            await self._add_prompts()
        if self._request.max_tokens == 0:
            for choice in self._choices:
                yield choice.piece(choice.prompt.text if self._request.echo else "", "length")
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

    async def _add_prompts(self) -> None:
        """Have choices name the tokens of their prompts, and submit those that had to wait."""
        scores: dict[int, Score] = {}
        if self._scored:
            await self.session.next()
            scores = dict(zip(map(id, self._scored), self._scoring.result, strict=True))
            self._submit_waiting()

        def add() -> None:
            for choice in self._choices:
                choice.add_prompt(scores.get(id(choice.prompt)))

        await self.service.compute(add)

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
                runs = partly.finished(self.model.tokenizer).pieces
                text = "".join(run for run, is_blank in runs if is_blank)
                if self._request.echo:
                    text = choice.prompt.before + text + choice.prompt.after
                yield choice.piece(text, hypothesis.finish_reason(partly.special.end_tokens))

    @property
    def _generated(self) -> int:
        return sum(choice.tokens for choice in self._choices)

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of a stream."""
        options = self._request.stream_options
        with_usage = options is not None and options.include_usage
        head = self.head() | {"object": self.chunk_kind}
        async for piece in self.pieces():
            for part in self._parts(piece):
                chunk = head | {"choices": [part]}
                yield chunk | {"usage": None} if with_usage else chunk
        if with_usage:
            yield head | {"choices": [], "usage": self.usage(self._generated)}

    def _parts(self, piece: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield a piece as the parts of a choice that a stream's events have."""
        yield piece

    def _whole_choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        """Return a choice, joined of its pieces, as the whole answer has it."""
        return choice

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
        given = [index for index in self._given() if index in choices_by_index]
        choices = [choices_by_index[index] for index in given]
        for index, choice in enumerate(choices if self._is_ranked else ()):
            choice["index"] = index
        choices = [self._whole_choice(choice) for choice in choices]
        return self.head() | {"choices": choices, "usage": self.usage(self._generated)}

    def _given(self) -> list[int]:
        """Return the indices of the answers that are given: of each prompt `best_of` the `n` of
        the highest mean log-probability, best first."""
        means = [choice.mean_log_probability for choice in self._choices]
        first = range(0, len(means), self._count)
        answers = [list(range(i, i + self._count)) for i in first]
        if self._is_ranked:
            answers = [sorted(group, key=lambda i: -means[i]) for group in answers]
        return [index for group in answers for index in group[: self._request.n or 1]]


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
