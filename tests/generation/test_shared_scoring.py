"""Answers that are scored together get their own scores, whoever else waits, fails or is gone."""

import numpy as np
import pytest

from glm_jax.engine.engine import Engine
from glm_jax.engine.scoring import Score, Scorer, ScoringError
from glm_jax.engine.scoring_batch import ScoredSequence
from glm_jax.engine.stepwise import finish
from glm_jax.generation.driver import Driver
from glm_jax.generation.scored_texts import continuation
from glm_jax.generation.shared_scoring import Scoring, SharedScorer


class CountingScorer(Scorer):
    """A scorer without a model: the score of a sequence is its first target, a batch a step."""

    def __init__(self):
        self.batches = []

    def steps(self, sequences):
        self.batches.append([int(s.targets[0]) for s in sequences])
        yield None
        if 13 in self.batches[-1]:
            raise ScoringError("not finite")
        of = lambda s: np.array([s.targets[0]], np.float32)
        empty = np.zeros((1, 0))
        return [Score(i, of(s), of(s) > 0, s.groups, empty, empty) for i, s in enumerate(sequences)]


@pytest.fixture
def answer(golden_special):
    def make(shared, *targets):
        texts = [continuation((5, 6), (target,), golden_special) for target in targets]
        assert all(isinstance(text, ScoredSequence) and len(text) == 4 for text in texts)
        return Scoring(shared.steps(texts))

    return make


def _run(driver):
    ended = []
    while not driver.is_idle:
        ended += [answer for answer, _ in driver.turn()]
    return ended


class Idle(Engine):
    """An engine without requests."""

    is_idle, waiting = True, 0

    def __init__(self):
        pass

    def step(self):
        return []


@pytest.fixture
def driver():
    return Driver(Idle())


def test_who_waits_is_scored_with_the_one_that_runs(answer, driver):
    scorer = CountingScorer()
    shared = SharedScorer(scorer, 16)
    answers = [answer(shared, *targets) for targets in ((1, 2), (3,), (4, 5), (6,))]
    for each in answers:
        assert driver.submit(each)
    assert _run(driver) == answers
    found = [[float(s.log_probabilities[0]) for s in each.result] for each in answers]
    assert found == [[1, 2], [3], [4, 5], [6]]
    assert scorer.batches == [[1, 2, 3, 4], [5, 6]]
    assert not shared._waiting


def test_a_failed_or_cancelled_answer_is_nobody_elses(answer, driver):
    scorer = CountingScorer()
    shared = SharedScorer(scorer, 64)
    sound, broken, cancelled, last = (answer(shared, number) for number in (1, 13, 3, 4))
    for each in (sound, broken, cancelled, last):
        assert driver.submit(each)
    driver.cancel(cancelled)
    del cancelled
    assert _run(driver) == [sound, broken, last]
    assert isinstance(broken.error, ScoringError)
    assert [float(each.result[0].log_probabilities[0]) for each in (sound, last)] == [1, 4]
    assert all(3 not in batch for batch in scorer.batches)
    assert not shared._waiting


def test_scores_are_those_alone(golden_float32, golden_special):
    config, params = golden_float32
    scorer = Scorer(params, config, 256)
    texts = [continuation((5, n), (n, 9, 30 + n), golden_special) for n in range(20, 24)]
    shared = SharedScorer(scorer, 256)
    runs = [shared.steps([text]) for text in texts]
    for run in runs:
        next(run)
    for text, run in zip(texts, runs, strict=True):
        [together], [alone] = finish(run), finish(scorer.steps([text]))
        np.testing.assert_allclose(together.log_probabilities, alone.log_probabilities, atol=1e-5)
