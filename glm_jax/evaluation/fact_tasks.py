"""The demonstration's facts as tasks: a blank to fill, choices for it, texts to predict."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm_jax.data.facts import LANGUAGES, Corpus, Question
from glm_jax.evaluation.dataset_conversion import write_lines
from glm_jax.evaluation.task_config import TaskConfig
from glm_jax.files import write_text
from glm_jax.generation.blank_filling import TextCodec, encode_prompt

_CHOICES = 4
_ANSWER_TOKENS = 12


def write_fact_tasks(corpus: Corpus, tokenizer: TextCodec, folder: Path) -> list[TaskConfig]:
    """Write the held-out questions under a folder of data, with a task file for each task.

    Contexts are ids, closed by eos as the model's training closes them.

    Returns:
      "choose" (one of four answers of the same relation), "fill" (exact match) and "predict"
      (bits per byte of the questions' sentences), each with a group for each language.
    """
    rng = random.Random(0)
    for language in LANGUAGES:
        questions = [q for q in corpus.questions if q.language == language]
        fill = [_question(q, tokenizer) | {"targets_pretokenized": [q.answer]} for q in questions]
        choose = list(_choices(questions, tokenizer, rng))
        predict = [{"text": q.text.replace("[MASK]", q.answer)} for q in questions]
        for name, lines in (("fill", fill), ("choose", choose), ("predict", predict)):
            write_lines(folder / name / f"{language}.jsonl", lines)
    groups = tuple((language, f"{language}.jsonl") for language in LANGUAGES)
    tasks = [
        TaskConfig("choose", "mul", "choose", metrics=("Accuracy",), file_pattern=groups),
        TaskConfig(
            "fill",
            "gen",
            "fill",
            metrics=("EM",),
            file_pattern=groups,
            max_gen_length=_ANSWER_TOKENS,
        ),
        TaskConfig(
            "predict", "lm", "predict", metrics=("BPB",), file_pattern=groups, use_task_mask=True
        ),
    ]
    for task in tasks:
        write_text(folder / f"{task.name}.yaml", task.to_yaml())
    return tasks


def _question(question: Question, tokenizer: TextCodec) -> dict[str, Any]:
    return {"inputs": encode_prompt(tokenizer, question.text)}


def _choices(
    questions: list[Question], tokenizer: TextCodec, rng: random.Random
) -> Iterator[dict[str, Any]]:
    answers: dict[str, list[str]] = {}
    for question in questions:
        known = answers.setdefault(question.relation, [])
        if question.answer not in known:
            known.append(question.answer)
    for question in questions:
        others = [a for a in answers[question.relation] if a != question.answer]
        if len(others) < _CHOICES - 1:
            continue
        choices = [question.answer, *rng.sample(others, _CHOICES - 1)]
        rng.shuffle(choices)
        label = choices.index(question.answer)
        yield _question(question, tokenizer) | {"choices_pretokenized": choices, "label": label}
