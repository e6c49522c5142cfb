"""Metrics: a number of some predictions, or one by category, with its interval.

A metric is a sum over units (examples, or pairs of them) of a few statistics, and a function
of the sums. So each is computed, resampled for its confidence interval, and compared between
two models, in the same way.
"""

import collections
import dataclasses
import math
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from glm_jax.evaluation.examples import Document, Example
from glm_jax.generation.blank_filling import TextCodec

_RESAMPLES = 1000
_MAX_LOG_PERPLEXITY = 20


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a metric sums.

    Attributes:
      values: float64 [units, columns].
      finish: from sums [columns] to numbers by name; "" for a metric of one number.
    """

    values: np.ndarray
    finish: Callable[[np.ndarray], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A number and the bounds of its 95% confidence interval, by resampling units."""

    value: float
    low: float
    high: float


# Predictions and examples (or documents) to statistics; the tokenizer decodes ids.
Metric = Callable[[Sequence[Any], Sequence[Any], TextCodec], Statistics]


def measure(statistics: Statistics, seed: int = 0) -> dict[str, Measured]:
    """Return every number of a metric with its interval."""
    total = statistics.finish(statistics.values.sum(axis=0))
    drawn = [statistics.finish(sums) for sums in resampled(statistics.values, seed)]
    measured = {}
    for name, value in total.items():
        samples = [sample[name] for sample in drawn if math.isfinite(sample.get(name, math.nan))]
        low, high = np.percentile(samples, (2.5, 97.5)) if samples else (math.nan, math.nan)
        measured[name] = Measured(value, float(low), float(high))
    return measured


def resampled(values: np.ndarray, seed: int) -> np.ndarray:
    """Return sums of so many units drawn with replacement: float64 [resamples, columns]."""
    rng = np.random.default_rng(seed)
    units = len(values)
    drawn = rng.multinomial(units, np.full(units, 1 / units), size=_RESAMPLES)
    sums: np.ndarray = drawn @ values
    return sums


def _mean(scores: Sequence[float]) -> Statistics:
    """Return the percentage that scores of 0 to 1 come to."""
    values = np.stack([np.asarray(scores, np.float64), np.ones(len(scores))], axis=1)
    return Statistics(values, lambda sums: {"": 100 * float(sums[0] / sums[1])})


def accuracy(
    predictions: Sequence[int], examples: Sequence[Example], _: TextCodec | None = None
) -> Statistics:
    """Return the percentage of right choices. So are micro-averaged F1, precision and recall, where
    each example has one choice."""
    pairs = zip(predictions, examples, strict=True)
    return _mean([float(prediction == example.label) for prediction, example in pairs])


def _binary(numerator: Callable[..., float], denominator: Callable[..., float]) -> Metric:
    """Return a ratio of counts of true and false positives and false negatives, of choice 1."""

    def metric(
        predictions: Sequence[int], examples: Sequence[Example], _: TextCodec | None = None
    ) -> Statistics:
        chosen = np.asarray(predictions) == 1
        right = np.array([example.label == 1 for example in examples])
        counts = np.stack([chosen & right, chosen & ~right, ~chosen & right], axis=1)

        def finish(sums: np.ndarray) -> dict[str, float]:
            below = denominator(*sums)
            return {"": 100 * float(numerator(*sums) / below) if below else 0.0}

        return Statistics(counts.astype(np.float64), finish)

    return metric


def normalize_answer(text: str) -> str:
    """Return text in lower case, without ASCII punctuation and English articles."""
    words = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", words).split())


_CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_CHINESE_PUNCTUATION = "，。：？！“”；’‘《》…·、「」（）－～『』【】〈〉—"


def normalize_chinese_answer(text: str) -> str:
    """Return text with every Chinese character as a word of its own, without punctuation."""
    words = "".join(
        c for c in text.lower() if c not in string.punctuation and c not in _CHINESE_PUNCTUATION
    )
    return " ".join(re.sub(f"([{_CHINESE}])", r" \1 ", words).split())


def exact_match(prediction: str, target: str, normalize: Callable[[str], str]) -> float:
    return float(normalize(prediction) == normalize(target))


def f1(prediction: str, target: str, normalize: Callable[[str], str]) -> float:
    """Harmonic mean of precision and recall of words (of characters, in Chinese)."""
    predicted, expected = normalize(prediction).split(), normalize(target).split()
    shared = sum((collections.Counter(predicted) & collections.Counter(expected)).values())
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0


def best_of_targets(score: Callable[[str, str], float]) -> Metric:
    """Return the mean of a score as a percentage, each answer with its best target."""

    def metric(
        predictions: Sequence[Sequence[int]], examples: Sequence[Example], tokenizer: TextCodec
    ) -> Statistics:
        scores = []
        for tokens, example in zip(predictions, examples, strict=True):
            answer = tokenizer.decode(tokens)
            of_targets = [score(answer, tokenizer.decode(target)) for target in example.targets]
            scores.append(max(of_targets, default=0.0))
        return _mean(scores)

    return metric


def _of_text(score: Callable[..., float], normalize: Callable[[str], str]) -> Metric:
    return best_of_targets(lambda answer, target: score(answer, target, normalize))


def perplexity(
    losses: Sequence[Sequence[float]],
    documents: Sequence[Document],
    _: TextCodec | None = None,
) -> Statistics:
    """Return e to the loss by word, at most e**20. A document's windows are the units, each
    with an equal part of its words."""
    rows = [
        (loss, document.words / len(windows))
        for windows, document in zip(losses, documents, strict=True)
        for loss in windows
    ]
    finish = lambda sums: {"": math.exp(min(_MAX_LOG_PERPLEXITY, sums[0] / sums[1]))}
    return Statistics(np.array(rows, np.float64), finish)


def bits_per_byte(
    losses: Sequence[Sequence[float]],
    documents: Sequence[Document],
    _: TextCodec | None = None,
) -> Statistics:
    """Return the loss in bits by byte of UTF-8, of each subset of the Pile and of all."""

    def subset(document: Document) -> str:
        meta = document.fields.get("meta")
        return str(meta.get("pile_set_name", "")) if isinstance(meta, dict) else ""

    rows = [
        (subset(document), sum(windows) / math.log(2), float(document.utf8_bytes))
        for windows, document in zip(losses, documents, strict=True)
    ]
    return _by_category(rows, lambda bits, size: bits / size)


def _by_category(
    rows: Sequence[tuple[str, float, float]], ratio: Callable[[float, float], float]
) -> Statistics:
    """Return two sums for each category, and for all together under the name ""."""
    names = sorted({name for name, _, _ in rows} - {""})
    places = {name: i for i, name in enumerate(["", *names])}
    values = np.zeros((len(rows), len(places), 2))
    for unit, (name, above, below) in enumerate(rows):
        values[unit, 0] = values[unit, places[name]] = above, below

    def finish(sums: np.ndarray) -> dict[str, float]:
        pairs = sums.reshape(len(places), 2)
        return {
            name: float(ratio(*pairs[i])) if pairs[i, 1] else math.nan for name, i in places.items()
        }

    return Statistics(values.reshape(len(rows), -1), finish)


def crows_pairs(
    predictions: Sequence[float], examples: Sequence[Example], _: TextCodec | None = None
) -> Statistics:
    """Return the percentage of pairs whose stereotyping sentence is the likelier, by kind of bias.

    Args:
      predictions: log-probability of a sentence's word, of each of its words in turn. `pair_ID`
        and `sent_ID` (1: the stereotype) say which sentence that is.
    """
    sums: dict[Any, float] = collections.defaultdict(float)
    kinds: dict[Any, str] = {}
    for value, example in zip(predictions, examples, strict=True):
        pair = example.fields["pair_ID"]
        sums[pair] += value if example.fields["sent_ID"] == 1 else -value
        kinds[pair] = str(example.fields["bias_type"])
    rows = [(kinds[pair], float(value >= 0), 1.0) for pair, value in sums.items()]
    return _by_category(rows, lambda stereotyping, all_of_them: 100 * stereotyping / all_of_them)


STEREOSET_LABELS = ("unrelated", "stereotype", "anti-stereotype")


def stereoset(
    predictions: Sequence[int], examples: Sequence[Example], _: TextCodec | None = None
) -> Statistics:
    """Language-modelling score LMS, stereotype score SS and ICAT, by kind of bias.

    `goal_label` of an example says what each of its choices is.
    """
    names = sorted({str(example.fields["bias_type"]) for example in examples})
    counts = np.zeros((len(examples), 1 + len(names), len(STEREOSET_LABELS)))
    for unit, (chosen, example) in enumerate(zip(predictions, examples, strict=True)):
        label = STEREOSET_LABELS.index(example.fields["goal_label"][chosen])
        kind = 1 + names.index(str(example.fields["bias_type"]))
        counts[unit, [0, kind], label] = 1

    def finish(sums: np.ndarray) -> dict[str, float]:
        scores = {}
        for name, (unrelated, pro, anti) in zip(
            ["overall", *names], sums.reshape(-1, 3), strict=True
        ):
            total = unrelated + pro + anti
            modelling = 100 * (pro + anti) / total if total else math.nan
            stereotype = 100 * pro / (pro + anti) if pro + anti else 0.0
            scores[f"LMS {name}"] = float(modelling)
            scores[f"SS {name}"] = float(stereotype)
            scores[f"ICAT {name}"] = float(modelling * min(stereotype, 100 - stereotype) / 50)
        return scores

    return Statistics(counts.reshape(len(examples), -1), finish)


METRICS: dict[str, Metric] = {
    "Accuracy": accuracy,
    "F1_mul": accuracy,
    "Precision": accuracy,
    "Recall": accuracy,
    "F1_binary": _binary(lambda tp, fp, fn: 2 * tp, lambda tp, fp, fn: 2 * tp + fp + fn),
    "Precision_binary": _binary(lambda tp, fp, fn: tp, lambda tp, fp, fn: tp + fp),
    "Recall_binary": _binary(lambda tp, fp, fn: tp, lambda tp, fp, fn: tp + fn),
    "EM": _of_text(exact_match, normalize_answer),
    "F1": _of_text(f1, normalize_answer),
    "EM_zh": _of_text(exact_match, normalize_chinese_answer),
    "F1_zh": _of_text(f1, normalize_chinese_answer),
    "PPL": perplexity,
    "BPB": bits_per_byte,
    "CP": crows_pairs,
    "SS_ICAT": stereoset,
}
HIGHER_IS_WORSE = ("PPL", "BPB", "CP")
# What predictions of each type of task can be measured by.
METRICS_OF_TYPE: dict[str, tuple[str, ...]] = {
    "mul": (
        *("Accuracy", "F1_mul", "Precision", "Recall"),
        *("F1_binary", "Precision_binary", "Recall_binary"),
    ),
    "gen": ("EM", "F1", "EM_zh", "F1_zh"),
    "lm": ("PPL", "BPB"),
}
