"""Numbers made of predictions, against values worked out by hand."""

import math

import numpy as np
import pytest

from glm_jax.evaluation import metrics
from glm_jax.evaluation.examples import Document, Example
from glm_jax.evaluation.metrics import METRICS, measure
from glm_jax.evaluation.results import compare, file_results, paired_p_value, task_results


def _value(statistics, name=""):
    return statistics.finish(statistics.values.sum(axis=0))[name]


def _examples(labels):
    return [Example((), ((1,), (2,)), label) for label in labels]


def test_of_the_positive_choice():
    predictions, examples = [1, 1, 0, 0, 1], _examples([1, 0, 1, 0, 1])
    assert _value(METRICS["Precision_binary"](predictions, examples, None)) == pytest.approx(
        200 / 3
    )
    assert _value(METRICS["Recall_binary"](predictions, examples, None)) == pytest.approx(200 / 3)
    assert _value(METRICS["F1_binary"]([1, 1, 1, 1, 1], examples, None)) == pytest.approx(75)
    assert _value(METRICS["F1_binary"]([0] * 5, _examples([0] * 5), None)) == 0
    for name in ("Accuracy", "F1_mul", "Precision", "Recall"):
        assert _value(METRICS[name](predictions, examples, None)) == 60


def test_chinese_answers():
    normalize = metrics.normalize_chinese_answer
    assert normalize("《北京》,是 China 首都。") == "北 京 是 china 首 都"
    assert metrics.exact_match("北京。", "北京", normalize) == 1
    assert metrics.f1("北京市", "北京", normalize) == pytest.approx(0.8)
    assert metrics.f1("上海", "北京", normalize) == 0


def test_perplexity_and_bits_per_byte():
    documents = [
        Document((1,), 4, 10, {"meta": {"pile_set_name": "a"}}),
        Document((1,), 6, 30, {"meta": {"pile_set_name": "b"}}),
    ]
    losses = [[2.0, 3.0], [5.0]]
    assert _value(metrics.perplexity(losses, documents)) == pytest.approx(math.exp(1))
    assert _value(metrics.perplexity([[1e4], [0.0]], documents)) == pytest.approx(math.exp(20))
    statistics = metrics.bits_per_byte(losses, documents)
    assert _value(statistics, "a") == pytest.approx(5 / math.log(2) / 10)
    assert _value(statistics, "b") == pytest.approx(5 / math.log(2) / 30)
    assert _value(statistics) == pytest.approx(10 / math.log(2) / 40)


def test_crows_pairs_counts_pairs():
    rows = [(0, 1, -1.0, "age"), (0, 2, -2.0, "age"), (1, 1, -3.0, "age"), (1, 2, -1.0, "age")]
    rows += [(1, 2, -1.0, "age"), (2, 1, -1.0, "race"), (2, 2, -1.0, "race")]
    examples = [
        Example((), ((1,),), 0, (), {"pair_ID": p, "sent_ID": s, "bias_type": kind})
        for p, s, _, kind in rows
    ]
    # Pair 1: -3 against -2; pair 2 is even, which counts as stereotyping.
    statistics = metrics.crows_pairs([value for _, _, value, _ in rows], examples)
    assert len(statistics.values) == 3
    assert _value(statistics, "age") == 50
    assert _value(statistics, "race") == 100
    assert _value(statistics) == pytest.approx(200 / 3)


def test_stereoset():
    labels = ["stereotype", "anti-stereotype", "unrelated"]
    examples = [
        Example((), ((1,), (2,), (3,)), 0, (), {"goal_label": labels, "bias_type": kind})
        for kind in ("race", "race", "race", "gender")
    ]
    statistics = metrics.stereoset([0, 0, 1, 2], examples)
    assert _value(statistics, "LMS race") == 100
    assert _value(statistics, "SS race") == pytest.approx(200 / 3)
    assert _value(statistics, "ICAT race") == pytest.approx(100 * (100 / 3) / 50)
    assert _value(statistics, "LMS gender") == 0
    assert _value(statistics, "SS gender") == 0
    assert _value(statistics, "LMS overall") == 75


def test_intervals_cover_the_truth():
    """Of 95% intervals of samples of a coin that falls on one side in 0.7 of throws."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        labels = (rng.random(200) < 0.7).astype(int).tolist()
        [number] = measure(metrics.accuracy([1] * 200, _examples(labels)), trial).values()
        assert number.low < number.value < number.high
        covered += number.low <= 70 <= number.high
    assert covered >= 52  # 57 expected; below 52 by chance once in 300 times


def _results(hits):
    predictions = [int(hit) for hit in hits]
    examples = _examples([1] * len(hits))
    result = file_results({"Accuracy": metrics.accuracy}, predictions, examples, None)
    return {"model": {}, "tasks": {"t": task_results({"g": {"f": result}})}}


def test_comparison_tells_chance_from_difference():
    rng = np.random.default_rng(1)
    base = rng.random(400) < 0.6
    better = base | (rng.random(400) < 0.2)
    [row] = compare(_results(better), _results(base))
    assert row["better"] == "A"
    assert row["p"] < 0.01
    noise = base ^ (rng.random(400) < 0.02)
    [row] = compare(_results(noise), _results(base))
    assert row["better"] == ""
    assert row["p"] > 0.05
    assert paired_p_value([1.0, 0.0], [1.0, 0.0]) == 1
    assert paired_p_value([1.0], [1.0, 0.0]) is None


def test_groups_have_largest_median_and_weighted_mean():
    files = {"a": _file(10, 50.0), "b": _file(30, 70.0), "c": _file(10, 90.0)}
    results = task_results({"g": files})
    expected = {"max": 90.0, "median": 70.0, "average": 70.0}
    assert results["groups"]["g"]["summary"]["Accuracy"] == pytest.approx(expected)
    files["c"] = _file(60, 90.0)
    results = task_results({"g": files, "h": {"d": _file(100, 10.0)}})
    assert results["summary"]["Accuracy"]["average"] == pytest.approx(45.0)
    assert results["examples"] == 200


def _file(examples, value):
    metric = {"Accuracy": {"value": value, "low": None, "high": None}}
    return {"examples": examples, "metrics": metric, "units": {}}
