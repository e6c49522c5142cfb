"""Runs the requests of a file by an engine: lines in, records of answers out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from glm_jax.config import GLMConfig
from glm_jax.engine.beam_search import BeamSearch, Hypothesis
from glm_jax.engine.engine import Engine
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request, Token
from glm_jax.engine.scoring import Scorer
from glm_jax.engine.stepwise import Steps
from glm_jax.errors import UserError, shown
from glm_jax.generation.beam_filling import filling_by_beams
from glm_jax.generation.blank_filling import BlankFilling, PartlyFilled, TextCodec
from glm_jax.generation.driver import Answer, Search, drive
from glm_jax.generation.scored_texts import ScoredChoice, likeliest, score_choices
from glm_jax.generation.shared_scoring import Scoring, SharedScorer
from glm_jax.generation.text_request import RequestError
from glm_jax.jobs.request_files import Line
from glm_jax.model.params import GLMParams

_MIN_ROOM = 64  # tokens of an answer for which a text is truncated, if it has no max_tokens
_SCORED_TOKENS = 4096  # of lines with choices that are scored together

Record = dict[str, Any]


class _LineAnswer(Answer):
    """The answer to a line: what fills its blanks, once its turn has come.

    Attributes:
      record: makes the record of a complete answer; set with the first work.
    """

    record: Callable[[], Record]

    def __init__(self, runner: "RequestRunner", line: Line):
        self._runner, self.line = runner, line
        self._filling: Answer | None = None

    def next_work(self) -> Request | Steps[None] | None:
        if self._filling is None:
            self._filling, self.record = self._runner.begin(self.line)
            self.priority = self._filling.priority
        return self._filling.next_work()

    def receive(self, token: Token) -> bool:
        assert self._filling is not None
        return self._filling.receive(token)


class RequestRunner:
    """Answers the lines of a file.

    Attributes:
      generated: tokens so far.
    """

    def __init__(
        self,
        engine: Engine,
        params: GLMParams,
        config: GLMConfig,
        tokenizer: TextCodec,
        *,
        seed: int = 0,
        truncates: bool = False,
        adapters: Sequence[str] = (),
    ):
        """
        Args:
          params: of the engine, prepared, for beam search.
          seed: of requests that have none; each gets its own.
          truncates: leave out the first tokens of texts that leave no room for an answer, which
            are errors otherwise.
          adapters: names of the model's, in the order in which they were given to `restore`.
        """
        self._engine, self._params, self._config = engine, params, config
        self._tokenizer, self._seed, self._truncates = tokenizer, seed, truncates
        self._adapters = {name: number for number, name in enumerate(adapters, 1)}
        self._scorer = SharedScorer(Scorer(params, config), _SCORED_TOKENS)
        self.generated = 0

    def answer(self, lines: Iterable[Line]) -> Iterator[Record]:
        """Yield the records of all lines, in the order in which they end."""
        answers = (_LineAnswer(self, line) for line in lines)
        for answer in drive(self._engine, answers, self._count):
            yield _failed(answer.line, answer.error) if answer.error else answer.record()

    def _count(self, tokens: list[Token]) -> None:
        self.generated += len(tokens)

    def begin(self, line: Line) -> tuple[Answer, Callable[[], Record]]:
        """Return what fills a line's blanks, and what makes the record of it when it is complete.

        Raises:
          UserError: the line is not a request, or one that cannot be answered.
        """
        request = line.request
        if request is None:
            raise UserError(line.error)
        limit, max_tokens = self._engine.max_length, request.max_tokens
        room = min(max_tokens or _MIN_ROOM, limit // 2) if self._truncates else 0
        partly = PartlyFilled.begin(
            self._tokenizer,
            request.text,
            limit,
            request.unidirectional,
            room,
            self._adapter(request.adapter),
        )
        if request.choices:
            text, choices = request.text, request.choices
            steps = score_choices(self._scorer, self._tokenizer, text, partly, choices)
            scoring = Scoring(steps, request.priority)
            return scoring, lambda: self._choice_record(line, partly, scoring.result)
        choice = request.choice(self._tokenizer.encode)
        if isinstance(choice, BeamSearch):
            search = Search(
                filling_by_beams(self._params, self._config, partly, choice, max_tokens),
                request.priority,
            )
            return search, lambda: self._beam_record(line, search.result)
        template = Request(
            prompt=Prompt((), None),
            sampling=choice,
            max_tokens=max_tokens,
            seed=_seed_of(self._seed, line.index) if request.seed is None else request.seed,
            log_probabilities=request.log_probabilities,
            priority=request.priority,
            guide=request.guide(self._tokenizer),
        )
        filling = BlankFilling(partly, template)
        return filling, lambda: self._record(line, filling)

    def _adapter(self, name: str) -> int:
        if name and name not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise RequestError(f"adapter={shown(name)}: this job's adapters by name: {known}")
        return self._adapters.get(name, 0)

    def _record(self, line: Line, filling: BlankFilling) -> Record:
        filled, completions = filling.partly.finished(self._tokenizer), filling.completions
        reasons = {completion.finish_reason for completion in completions}
        record = _base(line) | {
            "text": filled.text,
            "blanks": list(filled.blanks),
            "finish_reason": "stop" if reasons == {"stop"} else "length",
            "tokens": [list(completion.tokens) for completion in completions],
        }
        if line.request is not None and line.request.log_probabilities:
            record["log_probabilities"] = [
                [round(value, 6) for value in completion.log_probabilities]
                for completion in completions
            ]
        return record

    def _choice_record(
        self, line: Line, partly: PartlyFilled, scored: Sequence[ScoredChoice]
    ) -> Record:
        best = likeliest(scored)
        filled = partly.filled(scored[best].tokens, ()).finished(self._tokenizer)
        return _base(line) | {
            "text": filled.text,
            "blanks": list(filled.blanks),
            "finish_reason": "stop",
            "choice": best,
            "choices": [
                {"text": choice.text, "log_probability": round(choice.log_probability, 6)}
                for choice in scored
            ],
        }

    def _beam_record(
        self, line: Line, results: Sequence[tuple[PartlyFilled, Hypothesis]]
    ) -> Record:
        ends = self._engine.special.end_tokens
        beams = []
        for partly, hypothesis in results:
            filled = partly.finished(self._tokenizer)
            beams.append(
                {
                    "text": filled.text,
                    "blanks": list(filled.blanks),
                    "finish_reason": hypothesis.finish_reason(ends),
                    "score": round(hypothesis.score, 6),
                }
            )
        self.generated += sum(len(blank) for blank in results[0][0].blanks)
        best = {name: beams[0][name] for name in ("text", "blanks", "finish_reason")}
        return _base(line) | best | {"beams": beams}


def _base(line: Line) -> Record:
    record = {"index": line.index, "id": line.id}
    return record if line.metadata is None else record | {"metadata": line.metadata}


def _failed(line: Line, error: Exception) -> Record:
    return _base(line) | {"line": line.number, "error": str(error)}


def _seed_of(seed: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])


def share(lines: Iterable[Line], done: np.ndarray, process: int, count: int) -> Iterator[Line]:
    """Yield the lines that a process of `count` has to answer: every count-th that is not done.

    That does not depend on which are done, so that processes that start at different times agree.
    """
    for line in lines:
        if line.index % count == process and not done[line.index]:
            yield line
