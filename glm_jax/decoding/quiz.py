"""Asks a model questions with one blank each, and counts exact answers."""

import dataclasses
import time
from collections.abc import Sequence

from glm_jax.config import GLMConfig
from glm_jax.data.facts import Question
from glm_jax.decoding.blank_filling import encode_prompt
from glm_jax.decoding.completion import Request
from glm_jax.decoding.engine import Engine, EngineSettings
from glm_jax.decoding.prompt import Prompt
from glm_jax.model.params import GLMParams
from glm_jax.tokenizer import Tokenizer

_SLOTS = 64
_ANSWER_ROOM = 24


@dataclasses.dataclass(frozen=True)
class Score:
    """Attributes:
    results: each question, the answer that was given, and whether it was right.
    tokens_per_second: generated tokens by the time it took, without compiling.
    """

    results: tuple[tuple[Question, str, bool], ...]
    tokens_per_second: float

    def accuracy(self, relation: str | None = None, language: str | None = None) -> float:
        """Share of right answers among the questions of a relation or language, or all."""
        kept = [
            is_right
            for question, _, is_right in self.results
            if relation in (None, question.relation) and language in (None, question.language)
        ]
        return sum(kept) / len(kept) if kept else float("nan")


def ask(
    params: GLMParams, config: GLMConfig, tokenizer: Tokenizer, questions: Sequence[Question]
) -> Score:
    """Greedy answers to all questions; blanks around an answer don't count."""
    special = tokenizer.special_tokens
    prompts = [encode_prompt(tokenizer, question.text) for question in questions]
    settings = EngineSettings(_SLOTS, max(map(len, prompts)) + _ANSWER_ROOM)
    engine = Engine(params, config, settings, special)
    engine.warm_up()
    began = time.perf_counter()
    requests = [Request(Prompt.from_tokens(prompt, special)) for prompt in prompts]
    completions = sorted(engine.run(requests), key=lambda completion: completion.ticket)
    seconds = time.perf_counter() - began
    results = []
    for question, completion in zip(questions, completions, strict=True):
        kept = [token for token in completion.tokens if token not in special.end_tokens]
        answer = tokenizer.decode(kept).strip()
        results.append((question, answer, answer == question.answer))
    generated = sum(len(completion.tokens) for completion in completions)
    return Score(tuple(results), generated / seconds)
