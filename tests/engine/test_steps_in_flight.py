"""A step that is started before the last one is read, as on GPUs and TPUs, changes no answer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.engine import step_functions
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request
from glm_jax.engine.sampling import Sampling
from glm_jax.generation.driver import SingleRequest, complete_all, drive

SMALL = EngineSettings(slots=3, cache_tokens=150, page_size=16, prefill_width=48)
PROMPT = Prompt((5, 6, 240), 2)


@pytest.fixture
def runs_ahead(monkeypatch):
    monkeypatch.setattr("glm_jax.engine.engine.max_in_flight", lambda platform: 2)


@pytest.fixture
def started(monkeypatch):
    """For each step, how many were under way when it was started."""
    counts, start = [], Engine._start_step

    def counted(engine):
        counts.append(len(engine._in_flight))
        start(engine)

    monkeypatch.setattr(Engine, "_start_step", counted)
    return counts


def _requests():
    """Greedy and sampled, of all lengths; some end by a token."""
    rng = np.random.default_rng(0)
    kinds = Sampling(), Sampling(temperature=1.2, top_p=0.8), Sampling(repetition_penalty=1.5)
    for number in range(9):
        context = (*rng.integers(3, 200, rng.integers(1, 16)).tolist(), 240, 11)
        yield Request(
            Prompt(context, len(context) - 2 if number % 3 else None),
            sampling=kinds[number % 3],
            max_tokens=(1, 40, 39, 7, 41)[number % 5],
            seed=number,
            end_tokens=tuple(range(15 * (number % 3))),
            log_probabilities=number % 2 == 0,
        )


def _answers(engine, requests):
    answers = complete_all(engine, requests)
    return sorted(answers, key=lambda answer: answer.request_id)


def _engine(model, settings):
    config, params = model
    return Engine(params, config, settings)


def _free_pages(engine):
    return engine._scheduler.pool.free_pages(0)


@pytest.fixture(scope="module")
def plain(tiny_model):
    return _answers(_engine(tiny_model, SMALL), [*_requests()])


def test_answers_are_the_same(tiny_model, plain, runs_ahead, started):
    """Though ends are found, slots taken again and requests preempted a step late."""
    assert {answer.finish_reason for answer in plain} == {"stop", "length"}
    engine = _engine(tiny_model, dataclasses.replace(SMALL, cache_tokens=64, prefill_budget=20))
    free = _free_pages(engine)
    for answer, expected in zip(_answers(engine, [*_requests()]), plain, strict=True):
        assert answer.tokens == expected.tokens
        assert answer.finish_reason == expected.finish_reason
        scores = answer.log_probabilities, expected.log_probabilities
        np.testing.assert_allclose(*scores, atol=1e-4)
    assert _free_pages(engine) == free
    assert engine.step() == []
    assert engine.scheduling.preemptions > 0
    assert set(started) == {0, 1}
    assert started.count(1) > len(started) / 2


def test_no_step_is_started_where_no_request_can_have_its_token(tiny_model, runs_ahead, started):
    requests = [Request(PROMPT, max_tokens=count, end_tokens=()) for count in (2, 5)]
    _answers(_engine(tiny_model, SMALL), requests)
    assert started == [0, 1, 1, 1, 1]


class _UpTo(SingleRequest):
    """Needs no more after some tokens, as an answer with a stop text."""

    def receive(self, token):
        super().receive(token)
        return len(self.tokens) == 3


def test_an_answer_that_needs_no_more_gets_no_more(tiny_model, plain, runs_ahead):
    requests = [request for request in _requests() if request.max_tokens > 3]
    answers = [_UpTo(request) for request in requests]
    engine = _engine(tiny_model, SMALL)
    assert len([*drive(engine, answers)]) == len(requests)
    whole = [answer for answer, r in zip(plain, _requests(), strict=True) if r.max_tokens > 3]
    for answer, expected in zip(answers, whole, strict=True):
        assert [token.token for token in answer.tokens] == [*expected.tokens[:3]]


def test_what_a_cancelled_request_writes_under_way_reaches_no_other(
    tiny_model, monkeypatch, runs_ahead
):
    """Its pages are not free before the step that writes to them was looked at."""
    config, params = tiny_model
    request = Request(PROMPT, max_tokens=8, end_tokens=())
    [expected] = _answers(Engine(params, config, SMALL), [request])
    real, poisoned = step_functions.run_step, []

    def run_step(*arguments):
        emitted, slots, cache = real(*arguments)
        if poisoned:
            page = poisoned.pop()
            cache = jax.tree.map(lambda x: x.at[:, page].set(jnp.nan), cache)
            emitted = dataclasses.replace(emitted, failures=emitted.failures.at[0].set(1))
        return emitted, slots, cache

    monkeypatch.setattr(step_functions, "run_step", run_step)
    engine = Engine(params, config, dataclasses.replace(SMALL, slots=1))
    free = _free_pages(engine)
    cancelled = engine.submit(dataclasses.replace(request, max_tokens=20))
    engine.step()
    poisoned.append(engine._scheduler.running[0].allocation.pages[0])
    engine.step()
    engine.cancel(cancelled)
    assert _free_pages(engine) < free
    [answer] = _answers(engine, [request])
    assert answer.tokens == expected.tokens
    assert _free_pages(engine) == free
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(engine._cache))
