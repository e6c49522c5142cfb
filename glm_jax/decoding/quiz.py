"""Asks a model questions with one blank each, in batches, and counts exact answers."""

import dataclasses
import time
from collections.abc import Sequence

from glm_jax.config import GLMConfig
from glm_jax.data.facts import Question
from glm_jax.decoding.blank_filling import encode_prompt
from glm_jax.decoding.generate import generate, prepare
from glm_jax.model.params import GLMParams
from glm_jax.tokenizer import Tokenizer

_BATCH = 64
_ANSWER_ROOM = 24


@dataclasses.dataclass(frozen=True)
class Score:
    """Attributes:
    results: each question, the answer that was given, and whether it was right.
    tokens_per_second: generated tokens by the time of the batches after the first, which
      compiles; nan where there was only one.
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
    params = prepare(params)
    special = tokenizer.special_tokens
    prompts = [encode_prompt(tokenizer, question.text) for question in questions]
    # One shape for all batches: the longest prompt decides, the last batch is filled up.
    max_length = max(map(len, prompts)) + _ANSWER_ROOM
    results: list[tuple[Question, str, bool]] = []
    generated, seconds = 0, 0.0
    for first in range(0, len(prompts), _BATCH):
        batch = prompts[first : first + _BATCH]
        padding = [prompts[0]] * (_BATCH - len(batch))
        began = time.perf_counter()
        outputs = generate(params, config, batch + padding, max_length=max_length)[: len(batch)]
        if first:
            generated += sum(map(len, outputs))
            seconds += time.perf_counter() - began
        for question, tokens in zip(questions[first : first + _BATCH], outputs, strict=True):
            kept = [token for token in tokens if token not in special.end_tokens]
            answer = tokenizer.decode(kept).strip()
            results.append((question, answer, answer == question.answer))
    speed = generated / seconds if seconds else float("nan")
    return Score(tuple(results), speed)
