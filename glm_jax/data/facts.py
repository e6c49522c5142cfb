"""A bilingual corpus of facts that anyone can check, for demonstrations and tests.

Countries, chemical elements and small sums, each in several sentence forms of English and
Chinese. For some facts one form is held out: a model that knows the fact from its other forms,
and the form from other facts, can fill it.
"""

import csv
import dataclasses
import importlib.resources
import random
from collections.abc import Iterator

LANGUAGES = ("en", "zh")
# Not in the corpus: for fine-tuning a model that knows the others.
NEW_RELATION = "capital_continent"
_REQUESTS = {"en": "Say on which continent {subject} is.", "zh": "说说{subject}在哪个洲。"}


@dataclasses.dataclass(frozen=True)
class Question:
    """A held-out sentence: `text` has one [MASK], which `answer` fills."""

    text: str
    answer: str
    relation: str
    language: str


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A prompt and the text to generate after it."""

    prompt: str
    target: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Sentences to train on, and questions to evaluate with.

    Attributes:
      sentences: training text, shuffled.
      questions: held-out sentences.
      blanks: the training sentences as instructions to fill a blank.
    """

    sentences: tuple[str, ...]
    questions: tuple[Question, ...]
    blanks: tuple[Instruction, ...] = ()


def _facts() -> Iterator[tuple[str, str, str, str]]:
    """Yield (relation, language, subject, answer) of all relations except the new one."""
    for row in _table("countries.tsv"):
        for language in LANGUAGES:
            for relation in ("capital", "continent", "currency"):
                answer = row[f"{relation}_{language}"]
                yield relation, language, row[f"country_{language}"], answer
    for row in _table("elements.tsv"):
        for language in LANGUAGES:
            yield "symbol", language, row[f"element_{language}"], row["symbol"]
            yield "number", language, row[f"element_{language}"], row["number"]
    for a in range(1, 10):
        for b in range(1, 10):
            yield "sum", "en", f"{a} + {b}", str(a + b)
            yield "sum", "zh", f"{a}加{b}", str(a + b)


def _table(name: str) -> list[dict[str, str]]:
    text = importlib.resources.files("glm_jax.data.tables").joinpath(name).read_text("utf-8")
    return list(csv.DictReader(text.splitlines(), delimiter="\t"))


def _forms() -> dict[tuple[str, str], list[str]]:
    """Return sentence forms by relation and language; each names its subject and answer."""
    forms: dict[tuple[str, str], list[str]] = {}
    for row in _table("forms.tsv"):
        forms.setdefault((row["relation"], row["language"]), []).append(row["form"])
    return forms


# Shares of the facts that have one form held out: of the corpus, of the new relation.
_HELD_OUT, _HELD_OUT_NEW = 0.3, 0.5


def build_corpus() -> Corpus:
    """Make a corpus of all facts in all forms except the held-out ones: one form of some facts."""
    rng = random.Random(0)
    sentences, questions, blanks = [], [], []
    forms_of = _forms()
    for relation, language, subject, answer in _facts():
        forms = forms_of[relation, language]
        hidden = rng.randrange(len(forms)) if rng.random() < _HELD_OUT else None
        for i, form in enumerate(forms):
            text = form.format(subject=subject, answer="[MASK]")
            if i == hidden:
                questions.append(Question(text, answer, relation, language))
            else:
                sentences.append(form.format(subject=subject, answer=answer))
                blanks.append(Instruction(text, answer))
    rng.shuffle(sentences)
    return Corpus(tuple(sentences), tuple(questions), tuple(blanks))


def build_instructions() -> tuple[tuple[Instruction, ...], tuple[Question, ...]]:
    """Make instructions and held-out questions of the new relation.

    The instructions of each capital and language: a blank to fill for each form except a
    held-out one, and a request that a whole sentence answers.

    Returns:
      Instructions, shuffled, and questions.
    """
    rng = random.Random(0)
    instructions, questions = [], []
    forms_of = _forms()
    for row in _table("countries.tsv"):
        for language in LANGUAGES:
            subject, answer = row[f"capital_{language}"], row[f"continent_{language}"]
            forms = forms_of[NEW_RELATION, language]
            hidden = rng.choice(forms) if rng.random() < _HELD_OUT_NEW else None
            for form in forms:
                blank = form.format(subject=subject, answer="[MASK]")
                if form == hidden:
                    questions.append(Question(blank, answer, NEW_RELATION, language))
                else:
                    instructions.append(Instruction(blank, answer))
            shown = next(form for form in forms if form != hidden)
            request = _REQUESTS[language].format(subject=subject)
            sentence = shown.format(subject=subject, answer=answer)
            instructions.append(Instruction(request, sentence))
    rng.shuffle(instructions)
    return tuple(instructions), tuple(questions)


def majority_accuracy(questions: tuple[Question, ...]) -> float:
    """Return the accuracy of always giving the most common answer of a relation and language.

    The baseline of a model that knows nothing of the subject.
    """
    by_kind: dict[tuple[str, str], list[str]] = {}
    for question in questions:
        by_kind.setdefault((question.relation, question.language), []).append(question.answer)
    hits = sum(max(map(answers.count, answers)) for answers in by_kind.values())
    return hits / len(questions)
