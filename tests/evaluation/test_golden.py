"""Batches, log-probabilities, predictions, losses and metrics equal the original's."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import GOLDEN
from stub_tokenizer import WordTokenizer

from glm_jax.evaluation import metrics
from glm_jax.evaluation.examples import read_items
from glm_jax.evaluation.metrics import measure
from glm_jax.evaluation.sequences import (
    are_single_tokens,
    choice_sequence,
    count_windows,
    window,
)
from glm_jax.evaluation.task_config import TaskConfig
from glm_jax.evaluation.tasks import Model, task_class

FOLDER = GOLDEN / "evaluation"
RESULTS = json.loads((FOLDER / "results.json").read_text())
CHOICES = ("single", "multi", "blank", "single_task_mask", "multi_task_mask")
VOCABULARY = 512


def _config(kind, **fields):
    return TaskConfig("golden", kind, ".", max_seq_length=64, **fields)


def _choice_task(case):
    file = FOLDER / f"{case.removesuffix('_task_mask')}.jsonl"
    return file, _config("mul", metrics=("Accuracy",), **RESULTS[case]["config"])


def _sees(key_ranges):
    """bool [length, length] of a sequence's key ranges."""
    key = np.arange(len(key_ranges))
    first, end, own, own_end = (key_ranges[:, i, None] for i in range(4))
    return ((key >= first) & (key < end)) | ((key >= own) & (key < own_end))


@pytest.fixture
def model(golden_float32, golden_special):
    config, params = golden_float32
    return Model(params, config, WordTokenizer(golden_special))


@pytest.mark.parametrize("case", CHOICES)
def test_sequences_of_choices(case, golden_special):
    file, config = _choice_task(case)
    examples = read_items(file, config, WordTokenizer(golden_special), VOCABULARY)
    single = are_single_tokens(examples)
    assert single == RESULTS[case]["is_single_token"]
    with np.load(FOLDER / f"{case}_batch.npz") as batch:
        for i, example in enumerate(examples):
            sequence = choice_sequence(example, config, golden_special, single)
            length = len(sequence)
            np.testing.assert_array_equal(sequence.tokens, batch["tokens"][i, :length])
            np.testing.assert_array_equal(sequence.position_ids, batch["position_ids"][i, :length])
            visible = ~batch["masked"][i, :length, :length]
            np.testing.assert_array_equal(_sees(sequence.key_ranges), visible)
            assert not batch["tokens"][i, length:].any()
            ids = RESULTS[case]["choice_target_ids"][i]
            places = [ids[0]] * len(example.choices) if single else np.concatenate(ids)
            np.testing.assert_array_equal(sequence.indices, places)


@pytest.mark.parametrize("case", CHOICES)
def test_choices(case, model):
    file, config = _choice_task(case)
    task = task_class(config)(config, model)
    examples = task.read(file)
    records = dict(task.answer(examples, range(len(examples))))
    expected = RESULTS[case]
    for i, values in enumerate(expected["log_probs"]):
        np.testing.assert_allclose(records[i]["log_probabilities"], values, atol=1e-4)
    predictions = [task.prediction(records[i]) for i in range(len(examples))]
    assert predictions == expected["prediction"]
    statistics = task.metrics()["Accuracy"](predictions, examples, model.tokenizer)
    assert measure(statistics)[""].value == pytest.approx(expected["accuracy"])


@pytest.mark.parametrize("case", [c for c in RESULTS if c.startswith("gen")])
def test_generation(case, model):
    is_unidirectional = "unidirectional_True" in case
    config = _config(
        "gen",
        metrics=("EM", "F1"),
        unidirectional=is_unidirectional,
        use_task_mask="task_mask_True" in case,
        max_gen_length=12,
    )
    task = task_class(config)(config, model)
    examples = task.read(FOLDER / "gen.jsonl")
    expected = RESULTS[case]
    for example, sample in zip(examples, expected["samples"], strict=True):
        prompt = task.prompt(example)
        length = sample["context_length"]
        special = model.special
        assert prompt.tokens(special.sop) == tuple(sample["tokens"][:length])
        assert prompt.position_ids().tolist() == sample["position_ids"][:length]
    records = dict(task.answer(examples, range(len(examples))))
    answers = [records[i]["prediction"] for i in range(len(examples))]
    ends = set(expected["end_tokens"])
    assert answers == expected["outputs"]
    assert not ends & set(np.concatenate(answers).tolist())
    for name in ("EM", "F1"):
        statistics = task.metrics()[name](answers, examples, model.tokenizer)
        assert measure(statistics)[""].value == pytest.approx(expected[name])


@pytest.mark.parametrize("case", [c for c in RESULTS if c.startswith("lm")])
def test_language_modelling(case, model, golden_special):
    config = _config(
        "lm",
        metrics=("PPL",),
        unidirectional="unidirectional_True" in case,
        use_task_mask="task_mask_True" in case,
        generation_length=16,
    )
    tokenizer = WordTokenizer(golden_special)
    [document] = read_items(FOLDER / "lm.txt", config, tokenizer, VOCABULARY)
    expected = RESULTS[case]
    assert count_windows(document, config) == expected["windows"]
    for number, item in enumerate(expected["first_items"]):
        sequence = window(document, config, golden_special, number)
        assert sequence.tokens.tolist() == item["tokens"]
        assert sequence.position_ids.tolist() == item["position_ids"]
        np.testing.assert_array_equal(
            _sees(sequence.key_ranges), ~np.array(item["attention_mask"], bool)
        )
        assert sequence.indices.tolist() == np.flatnonzero(item["loss_masks"]).tolist()
        assert sequence.targets.tolist() == np.array(item["targets"])[sequence.indices].tolist()
    task = task_class(config)(config, model)
    [(_, record)] = task.answer([document], [0])
    np.testing.assert_allclose(record["prediction"], expected["loss"], atol=1e-3)
    statistics = metrics.perplexity([record["prediction"]], [document])
    assert measure(statistics)[""].value == pytest.approx(expected["PPL"], rel=1e-4)


def test_normalisation_exact_match_and_f1():
    cases = json.loads((GOLDEN / "metrics.json").read_text(encoding="utf-8"))
    for case in cases:
        prediction, target = case["prediction"], case["target"]
        normalize = metrics.normalize_answer
        assert normalize(prediction) == case["normalized"]
        assert metrics.exact_match(prediction, target, normalize) == case["exact_match"]
        assert metrics.f1(prediction, target, normalize) == pytest.approx(case["f1"])


def test_length_normalisation_divides_by_tokens(model):
    file, config = _choice_task("multi")
    changed = dataclasses.replace(config, length_normalized=True)
    task = task_class(changed)(changed, model)
    examples = task.read(file)
    records = dict(task.answer(examples, range(len(examples))))
    for i, example in enumerate(examples):
        by_token = np.array(RESULTS["multi"]["log_probs"][i]) / [len(c) for c in example.choices]
        assert records[i]["prediction"] == by_token.argmax()
