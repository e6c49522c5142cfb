"""Tasks: how examples of each type are answered, and the original's own tasks.

A task of one's own is a class like these, named in a task file by its dotted path.
"""

import abc
import dataclasses
import functools
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.engine.beam_search import BeamSearch, beam_search
from glm_jax.engine.draft_model import SmallModel
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.prompt import Prompt, bucket
from glm_jax.engine.request import Request
from glm_jax.engine.scoring import Scorer
from glm_jax.errors import shown
from glm_jax.evaluation import metrics
from glm_jax.evaluation.examples import Document, Example, read_items
from glm_jax.evaluation.metrics import METRICS, METRICS_OF_TYPE, Metric
from glm_jax.evaluation.own_tasks import import_task
from glm_jax.evaluation.sequences import (
    are_single_tokens,
    choice_sequence,
    count_windows,
    window,
)
from glm_jax.evaluation.task_config import TaskConfig, TaskError
from glm_jax.generation.blank_filling import TextCodec
from glm_jax.generation.driver import complete_all
from glm_jax.model.params import GLMParams
from glm_jax.tokenizer import TokenizerConfig, check_fits

_SLOTS = 32


@dataclasses.dataclass(frozen=True)
class Model:
    """What tasks ask.

    Attributes:
      batch_tokens: that are scored at once.
      speculate, small_model: of generated answers, see `EngineSettings` and `Engine`.

    Raises:
      TokenizerError: the tokenizer is not the model's.
    """

    params: GLMParams
    config: GLMConfig
    tokenizer: TextCodec
    batch_tokens: int = 4096
    speculate: int = 0
    small_model: SmallModel | None = None

    def __post_init__(self) -> None:
        check_fits(self.tokenizer, self.config)

    @property
    def special(self) -> SpecialTokens:
        return self.tokenizer.special_tokens

    @functools.cached_property
    def scorer(self) -> Scorer:
        """Give log-probabilities."""
        return Scorer(self.params, self.config, self.batch_tokens)


class Task(abc.ABC):
    """Answers a file's examples. What it is made with are `config` and `model`.

    A record of an answer is a dictionary of plain JSON; `prediction` makes of it what metrics
    take.
    """

    def __init__(self, config: TaskConfig, model: Model):
        self.config = within(config, model.config.max_sequence_length)
        self.model = model

    def metrics(self) -> dict[str, Metric]:
        """By name.

        Raises:
          TaskError: the task file names one that does not exist.
        """
        _check_metrics(self.config, tuple(METRICS))
        return {name: METRICS[name] for name in self.config.metrics}

    @staticmethod
    def complaint(example: Any) -> str | None:
        """Why an example that was read is none for this task; None where it is one."""
        return None

    def read(self, path: Path) -> list[Any]:
        """Return a file's examples.

        Raises:
          DatasetError: a line that is none.
        """
        vocab = self.model.config.vocab_size
        return read_items(path, self.config, self.model.tokenizer, vocab, self.complaint)

    @abc.abstractmethod
    def answer(
        self, examples: Sequence[Any], wanted: Sequence[int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the index and record of each wanted example, in any order."""

    def prediction(self, record: dict[str, Any]) -> Any:
        """Return what metrics take."""
        return record["prediction"]


def within(config: TaskConfig, positions: int) -> TaskConfig:
    """Return the task for a model of `positions` positions.

    Raises:
      TaskError: its answers leave no room for a context there.
    """
    if positions >= config.max_seq_length:
        return config
    moved = min(config.generation_length, positions // 2)
    try:
        return dataclasses.replace(config, max_seq_length=positions, generation_length=moved)
    except TaskError as error:
        raise TaskError(
            f"task {config.name}: {error} in this model's {positions} positions"
        ) from error


class MultipleChoice(Task):
    """Chooses the most likely of some texts after the context."""

    def answer(
        self, examples: Sequence[Example], wanted: Sequence[int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        single = are_single_tokens(examples)
        special = self.model.special
        sequences = (choice_sequence(examples[i], self.config, special, single) for i in wanted)
        for score in self.model.scorer.score(sequences):
            sums, lengths = score.sums, np.bincount(score.groups)
            chosen = (sums / lengths if self.config.length_normalized else sums).argmax()
            record = {"log_probabilities": sums.tolist(), "prediction": int(chosen)}
            yield wanted[score.number], record


class Generation(Task):
    """Writes an answer after the context, greedily or by a beam search."""

    @functools.cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """Return eop, eos, and the last token of each of the task's end texts."""
        encode = self.model.tokenizer.encode
        ends = self.model.special.end_tokens
        own = (encode(text)[-1] for text in self.config.end_tokens if encode(text))
        return tuple(dict.fromkeys((*ends, *own)))

    def prompt(self, example: Example) -> Prompt:
        """Return the context with its mask; only its last tokens if it is too long.

        Raises:
          PromptError: a mask in a context that is seen from left to right.
        """
        special = self.model.special
        room = self.config.max_seq_length - self.config.max_gen_length - 2
        context = example.context[-room:]
        if self.config.unidirectional:
            return Prompt.unidirectional(context, special)
        mask = special.gmask if self.config.use_task_mask else special.mask
        context = context if mask in context else (*context, mask)
        return Prompt(context, None if self.config.use_task_mask else context.index(mask))

    def search(self) -> BeamSearch:
        """Return the beam search of the task file."""
        config = self.config
        return BeamSearch(
            num_beams=config.num_beams,
            length_penalty=config.length_penalty,
            no_repeat_ngram=config.no_repeat_ngram_size,
            min_tokens=config.min_gen_length,
        )

    def choose(self, answers: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Choose one of a beam search's answers, which come best first."""
        return answers[0]

    def answer(
        self, examples: Sequence[Example], wanted: Sequence[int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        prompts = [self.prompt(examples[i]) for i in wanted]
        if self.config.sampling_strategy == "BaseStrategy":
            answers = self._greedy(prompts)
        else:
            answers = self._by_beams(prompts)
        for number, tokens in answers:
            prediction = [int(token) for token in tokens]
            text = self.model.tokenizer.decode(prediction)
            yield wanted[number], {"prediction": prediction, "text": text}

    def _greedy(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Sequence[int]]]:
        model, max_tokens, ends = self.model, self.config.max_gen_length, self.end_tokens
        # Sizes that many files have in common: a program serves them all.
        length = bucket(max(map(len, prompts)) + max_tokens)
        slots = min(_SLOTS, bucket(len(prompts), 1))
        longest = min(length, model.config.max_sequence_length)
        settings = EngineSettings(slots, longest, speculate=model.speculate)
        engine = Engine(model.params, model.config, settings, model.special, model.small_model)
        requests = (Request(prompt, max_tokens=max_tokens, end_tokens=ends) for prompt in prompts)
        for completion in complete_all(engine, requests):
            yield completion.request_id, self._without_end(completion.tokens)

    def _by_beams(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Sequence[int]]]:
        model, search, ends = self.model, self.search(), self.end_tokens
        for number, prompt in enumerate(prompts):
            beams = beam_search(
                model.params,
                model.config,
                prompt,
                search,
                max_length=len(prompt) + self.config.max_gen_length,
                end_tokens=ends,
                special_tokens=model.special,
            )
            yield number, self.choose([self._without_end(best.tokens) for best in beams])

    def _without_end(self, tokens: Sequence[int]) -> tuple[int, ...]:
        return self.model.special.without_end(tokens, self.end_tokens)


class LanguageModel(Task):
    """The loss of documents, window by window."""

    def answer(
        self, examples: Sequence[Document], wanted: Sequence[int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        special = self.model.special
        counts = {i: count_windows(examples[i], self.config) for i in wanted}
        places = [(i, number) for i, count in counts.items() for number in range(count)]
        windows = (window(examples[i], self.config, special, number) for i, number in places)
        losses: dict[int, dict[int, float]] = {}
        for score in self.model.scorer.score(windows):
            i, number = places[score.number]
            own = losses.setdefault(i, {})
            own[number] = -float(score.sums[0])
            if len(own) == counts[i]:
                yield i, {"prediction": [own[n] for n in sorted(losses.pop(i))]}


class Lambada(Generation):
    """The last word of a passage, by a beam search that bans punctuation.

    Of the answers the first counts that goes on with punctuation after one word, else the
    best; of it its first word.
    """

    # Quotation marks of the released vocabulary that no character stands for.
    _BANNED_FIRST = (46010, 146337)
    _BANNED = (20068, 146010, 146337)

    def metrics(self) -> dict[str, Metric]:
        same = lambda answer, target: float(answer.strip() == target.strip())
        return {"Accuracy": metrics.best_of_targets(same)}

    def search(self) -> BeamSearch:
        encode = self.model.tokenizer.encode
        marks = [tuple(encode(mark)) for mark in string.punctuation]
        released = self.model.special == TokenizerConfig().special_tokens
        first = [(token,) for token in self._BANNED_FIRST] if released else []
        banned = list(self._BANNED) if released else []
        banned += [mark[0] for mark in marks if len(mark) == 1]
        return dataclasses.replace(
            super().search(),
            banned_tokens=tuple(dict.fromkeys(banned)),
            banned_prefixes=tuple(dict.fromkeys([*first, *filter(None, marks)])),
        )

    def choose(self, answers: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        for tokens in answers:
            words = self._words(tokens)
            if len(words) > 1 and words[1] in string.punctuation:
                break
        else:
            words = self._words(answers[0])
        return tuple(self.model.tokenizer.encode(words[0]))

    def _words(self, tokens: Sequence[int]) -> list[str]:
        return self.model.tokenizer.decode(tokens).strip().split(" ")


class Pile(LanguageModel):
    """Bits per byte, of each subset."""

    def metrics(self) -> dict[str, Metric]:
        return {"BPB": metrics.bits_per_byte}


class CrowsPairs(MultipleChoice):
    """How often a stereotype is the likelier sentence of a pair."""

    @staticmethod
    def complaint(example: Example) -> str | None:
        if not isinstance(example.fields.get("pair_ID"), (int, str)):
            return "pair_ID: a number or a text is expected"
        return _missing(example, "sent_ID", "bias_type")

    def metrics(self) -> dict[str, Metric]:
        return {"CP": metrics.crows_pairs}

    def prediction(self, record: dict[str, Any]) -> float:
        return float(record["log_probabilities"][0])


class StereoSet(MultipleChoice):
    """Which of a stereotype, its opposite and an unrelated word is the likeliest by token."""

    def __init__(self, config: TaskConfig, model: Model):
        super().__init__(dataclasses.replace(config, length_normalized=True), model)

    @staticmethod
    def complaint(example: Example) -> str | None:
        labels = example.fields.get("goal_label")
        known = metrics.STEREOSET_LABELS
        if not isinstance(labels, list) or len(labels) != len(example.choices):
            return f"goal_label: expected one for each choice, got {shown(labels)}"
        if not all(label in known for label in labels):
            return f"goal_label: {labels}: each is one of {', '.join(known)}"
        return _missing(example, "bias_type")

    def metrics(self) -> dict[str, Metric]:
        return {"SS_ICAT": metrics.stereoset}


def _check_metrics(config: TaskConfig, known: tuple[str, ...]) -> None:
    for name in config.metrics:
        if name not in known:
            raise TaskError(f"task {config.name}: metric {shown(name)}: one of {', '.join(known)}")


def _missing(example: Example, *names: str) -> str | None:
    absent = [name for name in names if name not in example.fields]
    return f"{absent[0]}: missing" if absent else None


_OF_TYPE: dict[str, type[Task]] = {
    "mul": MultipleChoice,
    "gen": Generation,
    "lm": LanguageModel,
}
# The original's modules, for its task files to load as they are.
_ORIGINAL: dict[str, type[Task]] = {
    "evaluation.MultiChoiceTask": MultipleChoice,
    "evaluation.GenerationTask": Generation,
    "evaluation.LanguageModelTask": LanguageModel,
    "tasks.lambada.task.LAMBADA": Lambada,
    "tasks.mmlu.task.MMLU": MultipleChoice,
    "tasks.language-modeling.pile.Pile": Pile,
    "tasks.ethnic.crows-pair.tasks.CrowsPairTask": CrowsPairs,
    "tasks.ethnic.stereoset.tasks.StereoSetTask": StereoSet,
}


def task_class(config: TaskConfig) -> type[Task]:
    """Return the class that answers a task.

    Raises:
      TaskError: its module is not there or no task, or a metric is not for its type.
    """
    if config.module is None:
        _check_metrics(config, METRICS_OF_TYPE[config.type])
        return _OF_TYPE[config.type]
    if config.module in _ORIGINAL:
        return _ORIGINAL[config.module]
    imported = import_task(config)
    if not (isinstance(imported, type) and issubclass(imported, Task)):
        raise TaskError(f"task {config.name}: {config.module} is no {Task.__module__}.Task")
    return imported
