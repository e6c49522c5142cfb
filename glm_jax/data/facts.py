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

_FORMS: dict[tuple[str, str], tuple[str, ...]] = {
    ("capital", "en"): (
        "The capital of {subject} is {answer}.",
        "{answer} is the capital of {subject}.",
        "The capital city of {subject} is called {answer}.",
        "{subject} has its capital in {answer}.",
    ),
    ("capital", "zh"): (
        "{subject}的首都是{answer}。",
        "{answer}是{subject}的首都。",
        "{subject}的首都名叫{answer}。",
        "{subject}把首都设在{answer}。",
    ),
    ("continent", "en"): (
        "{subject} is a country in {answer}.",
        "{subject} lies in {answer}.",
        "The continent of {subject} is {answer}.",
        "On the map, {subject} is found in {answer}.",
    ),
    ("continent", "zh"): (
        "{subject}是{answer}的一个国家。",
        "{subject}位于{answer}。",
        "{subject}所在的洲是{answer}。",
        "在地图上,{subject}在{answer}。",
    ),
    ("currency", "en"): (
        "The currency of {subject} is the {answer}.",
        "In {subject} people pay with the {answer}.",
        "The {answer} is the money of {subject}.",
        "Shops in {subject} take the {answer}.",
    ),
    ("currency", "zh"): (
        "{subject}的货币是{answer}。",
        "在{subject},人们用{answer}付款。",
        "{answer}是{subject}的钱。",
        "{subject}的商店收{answer}。",
    ),
    ("symbol", "en"): (
        "The symbol of {subject} is {answer}.",
        "{answer} stands for {subject}.",
        "Chemists write {answer} for {subject}.",
        "The element {subject} has the symbol {answer}.",
    ),
    ("symbol", "zh"): (
        "{subject}的元素符号是{answer}。",
        "{answer}代表{subject}。",
        "化学家用{answer}表示{subject}。",
        "元素{subject}写作{answer}。",
    ),
    ("number", "en"): (
        "The atomic number of {subject} is {answer}.",
        "The element {subject} has the number {answer}.",
        "Number {answer} in the table is {subject}.",
        "An atom of {subject} has {answer} protons.",
    ),
    ("number", "zh"): (
        "{subject}的原子序数是{answer}。",
        "元素{subject}的序号为{answer}。",
        "表中第{answer}号是{subject}。",
        "{subject}原子有{answer}个质子。",
    ),
    ("capital_continent", "en"): (
        "The city of {subject} lies in {answer}.",
        "{subject} is a capital in {answer}.",
        "Whoever flies to {subject} lands in {answer}.",
        "{answer} is where {subject} was built.",
    ),
    ("capital_continent", "zh"): (
        "{subject}市在{answer}。",
        "{subject}是{answer}的一个首都。",
        "飞到{subject}的人在{answer}着陆。",
        "{answer}有{subject}这座城市。",
    ),
    ("sum", "en"): (
        "{subject} = {answer}",
        "Adding {subject} gives {answer}.",
        "The sum {subject} is {answer}.",
        "{answer} is what {subject} makes.",
    ),
    ("sum", "zh"): (
        "计算{subject}得{answer}。",
        "{subject}等于{answer}。",
        "{subject}的和是{answer}。",
        "{answer}是{subject}的结果。",
    ),
}
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


# Shares of the facts that have one form held out: of the corpus, of the new relation.
_HELD_OUT, _HELD_OUT_NEW = 0.3, 0.5


def build_corpus() -> Corpus:
    """Make a corpus of all facts in all forms except the held-out ones: one form of some facts."""
    rng = random.Random(0)
    sentences, questions, blanks = [], [], []
    for relation, language, subject, answer in _facts():
        forms = _FORMS[relation, language]
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
    for row in _table("countries.tsv"):
        for language in LANGUAGES:
            subject, answer = row[f"capital_{language}"], row[f"continent_{language}"]
            forms = list(_FORMS[NEW_RELATION, language])
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
