"""Batch jobs: requests of a file through an engine, answers as records."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from glm_jax.config import GLMConfig
from glm_jax.engine.beam_search import BeamSearch, finish
from glm_jax.engine.engine import Engine
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Completion, Request, Token, completion
from glm_jax.errors import UserError
from glm_jax.generation.blank_filling import (
    PartlyFilled,
    TextCodec,
    filling_by_beams,
    next_request,
)
from glm_jax.jobs.request_files import Line
from glm_jax.model.params import GLMParams

_LEAST_ROOM = 64  # tokens of an answer that a text is cut for, where it says nothing

Record = dict[str, Any]


@dataclasses.dataclass
class _Text:
    """A request on its way: its blanks are filled one after another."""

    line: Line
    partly: PartlyFilled
    template: Request
    tokens: list[Token] = dataclasses.field(default_factory=list)
    completions: list[Completion] = dataclasses.field(default_factory=list)


class Job:
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
    ):
        """
        Args:
          params: of the engine, prepared, for beam search.
          seed: of requests that have none; each gets its own.
          truncates: leaves out the first tokens of texts that leave no room for an answer,
            which are errors otherwise.
        """
        self._engine, self._params, self._config = engine, params, config
        self._tokenizer, self._seed, self._truncates = tokenizer, seed, truncates
        self._texts: dict[int, _Text] = {}
        self.generated = 0

    def answer(self, lines: Iterable[Line]) -> Iterator[Record]:
        """Records of all lines, in the order in which they are finished."""
        source = iter(lines)
        is_exhausted = False
        while not (is_exhausted and self._engine.is_idle):
            while not is_exhausted and self._engine.waiting < self._engine.slots:
                line = next(source, None)
                is_exhausted = line is None
                if line is not None:
                    yield from self._take(line)
            for token in self._engine.step():
                yield from self._receive(token)

    def _take(self, line: Line) -> Iterator[Record]:
        """Hands a line to the engine; what needs none is answered at once."""
        try:
            if line.request is None:
                raise UserError(line.error)
            partly = self._begin(line)
            choice = line.request.choice(self._tokenizer.encode)
            if isinstance(choice, BeamSearch):
                yield self._search(line, partly, choice)
                return
            seed = line.request.seed
            template = Request(
                prompt=Prompt((), None),
                sampling=choice,
                max_tokens=line.request.max_tokens,
                seed=_seed_of(self._seed, line.index) if seed is None else seed,
                log_probabilities=line.request.log_probabilities,
            )
            text = _Text(line, partly, template)
            if partly.has_blank:
                self._submit(text, is_urgent=False)
            else:
                yield self._record(text)
        except UserError as error:
            yield _failed(line, error)

    def _begin(self, line: Line) -> PartlyFilled:
        request, limit = line.request, self._engine.max_length
        assert request is not None
        room = min(request.max_tokens or _LEAST_ROOM, limit // 2) if self._truncates else 0
        return PartlyFilled.begin(
            self._tokenizer, request.text, limit, request.unidirectional, room
        )

    def _submit(self, text: _Text, is_urgent: bool) -> None:
        # A text that was begun goes before those that wait.
        ticket = self._engine.submit(next_request(text.partly, text.template), is_urgent)
        self._texts[ticket] = text

    def _receive(self, token: Token) -> Iterator[Record]:
        text = self._texts[token.ticket]
        text.tokens.append(token)
        self.generated += 1
        if token.finish_reason is None:
            return
        del self._texts[token.ticket]
        try:
            finished = completion(text.tokens)
        except UserError as error:
            yield _failed(text.line, error)
            return
        text.completions.append(finished)
        text.tokens.clear()
        text.partly = text.partly.filled(finished.tokens, self._engine.special.end_tokens)
        if text.partly.has_blank:
            self._submit(text, is_urgent=True)
        else:
            yield self._record(text)

    def _record(self, text: _Text) -> Record:
        filled = text.partly.finished(self._tokenizer)
        reasons = [finished.finish_reason for finished in text.completions]
        record = _base(text.line) | {
            "text": filled.text,
            "blanks": list(filled.blanks),
            "finish_reason": "stop" if set(reasons) == {"stop"} else "length",
            "tokens": [list(finished.tokens) for finished in text.completions],
        }
        if text.template.log_probabilities:
            record["log_probabilities"] = [
                [round(value, 6) for value in finished.log_probabilities]
                for finished in text.completions
            ]
        return record

    def _search(self, line: Line, partly: PartlyFilled, settings: BeamSearch) -> Record:
        assert line.request is not None
        most = line.request.max_tokens
        found = finish(filling_by_beams(self._params, self._config, partly, settings, most))
        ends = self._engine.special.end_tokens
        beams = []
        for partly, hypothesis in found:
            filled = partly.finished(self._tokenizer)
            has_ended = bool(hypothesis.tokens) and hypothesis.tokens[-1] in ends
            beams.append(
                {
                    "text": filled.text,
                    "blanks": list(filled.blanks),
                    "finish_reason": "stop" if has_ended else "length",
                    "score": round(hypothesis.score, 6),
                }
            )
        self.generated += sum(len(blank) for blank in found[0][0].blanks)
        best = {name: beams[0][name] for name in ("text", "blanks", "finish_reason")}
        return _base(line) | best | {"beams": beams}


def _base(line: Line) -> Record:
    record = {"index": line.index, "id": line.id}
    return record if line.metadata is None else record | {"metadata": line.metadata}


def _failed(line: Line, error: UserError) -> Record:
    return _base(line) | {"line": line.number, "error": str(error)}


def _seed_of(seed: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])


def share(lines: Iterable[Line], done: np.ndarray, process: int, count: int) -> Iterator[Line]:
    """The lines that a process of `count` has to answer.

    It is every count-th, whatever was done before by how many, so that processes that start
    at different moments agree.
    """
    for line in lines:
        if line.index % count == process and not done[line.index]:
            yield line
