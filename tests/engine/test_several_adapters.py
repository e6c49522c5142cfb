"""Requests of one batch with different adapters get what each gets from a model with its alone."""

import dataclasses

import jax
import numpy as np
import pytest
from drawn_adapters import drawn, merged

from glm_jax.engine import step_functions
from glm_jax.engine.beam_search import BeamSearch, beam_search
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.prompt import Prompt, PromptError
from glm_jax.engine.request import Request
from glm_jax.engine.sampling import Sampling
from glm_jax.engine.scoring import Scorer
from glm_jax.engine.speculation import Speculation
from glm_jax.generation.driver import complete_all
from glm_jax.generation.scored_texts import continuation, prompt_choices
from glm_jax.model import params as glm_params
from glm_jax.model.adapters import AdapterConfig, attach_several
from glm_jax.sharding import make_mesh

CONFIGS = (
    AdapterConfig(rank=4, alpha=6.0),
    AdapterConfig(rank=3, targets=("dense", "dense_h_to_4h")),
)
SETTINGS = EngineSettings(slots=4, page_size=16, prefill_width=32)


@pytest.fixture(scope="module")
def pairs(tiny_model):
    return [drawn(tiny_model[0], each, seed=seed) for seed, each in enumerate(CONFIGS)]


@pytest.fixture(scope="module")
def several(tiny_model, pairs):
    return attach_several(tiny_model[1], list(zip(CONFIGS, pairs, strict=True)), "float32")


@pytest.fixture(scope="module")
def models(tiny_model, pairs):
    """The model without an adapter, and with each alone, in its kernels: the programs of all are
    the same."""
    params = tiny_model[1]
    ones = [merged(params, x, each.scale) for x, each in zip(pairs, CONFIGS, strict=True)]
    return [params, *ones]


def _requests(adapter=None):
    """Of each adapter in turn, or the same ones of another model, whose only adapter is none."""
    rng = np.random.default_rng(3)
    requests = []
    for number in range(12):
        context = (*np.tile(rng.integers(3, 200, 3), 2).tolist(), 240, 11)
        prompt = Prompt(context, 6 if number % 2 else None, adapter=number % 3)
        sampling = Sampling(temperature=0.9, top_k=40) if number % 2 else Sampling()
        # All end together, so that few widths of steps are compiled.
        requests.append(Request(prompt, sampling, 10, number, (), log_probabilities=True))
    if adapter is None:
        return requests
    own = [each for each in requests if each.prompt.adapter == adapter]
    return [dataclasses.replace(x, prompt=dataclasses.replace(x.prompt, adapter=0)) for x in own]


def _answers(engine, requests):
    return sorted(complete_all(engine, requests), key=lambda answer: answer.request_id)


@pytest.fixture(scope="module")
def alone(tiny_model, models):
    config = tiny_model[0]
    answers = [_answers(Engine(x, config, SETTINGS), _requests(i)) for i, x in enumerate(models)]
    return [answers[number % 3][number // 3] for number in range(12)]


def _assert_same(answers, expected):
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    for got, wanted in zip(answers, expected, strict=True):
        np.testing.assert_allclose(got.log_probabilities, wanted.log_probabilities, atol=1e-4)


@pytest.mark.gpu
def test_requests_of_one_batch(tiny_model, several, alone, monkeypatch):
    """With drafts and without; which adapters are in use compiles nothing."""
    assert len({answer.tokens for answer in alone}) > 4
    monkeypatch.setattr(Speculation, "measure", lambda *_: (0.01, 0.0))
    engine = Engine(several, tiny_model[0], dataclasses.replace(SETTINGS, speculate=2))
    engine._step_widths = engine._step_widths[-1:]
    programs = step_functions.step, step_functions.prefill_layers
    plain = [each for adapter in range(3) for each in _requests(adapter)]
    _answers(engine, plain)
    before = [program._cache_size() for program in programs]
    _assert_same(_answers(engine, _requests()), alone)
    assert [program._cache_size() for program in programs] == before
    assert engine.drafts.accepted > 0


def test_a_model_without_adapters_runs_the_same_program(tiny_model):
    config, params = tiny_model
    cache = step_functions.make_cache(params, config, 4, 16)
    one = np.ones((2, 1), np.int32)
    rows = step_functions.Rows(one > 0, one, one, one[:, 0], np.ones((2, 2), np.int32))
    texts = {
        step_functions.decode.lower(params, config, each, cache, 4).as_text()
        for each in (rows, rows.replace(adapter_id=one[:, 0]))
    }
    assert len(texts) == 1


@pytest.mark.slow
def test_on_a_mesh_in_a_loop(tiny_model, alone, monkeypatch):
    config, params = tiny_model
    mesh = make_mesh((2, 2, 2))
    shardings = jax.tree.map(lambda a: a.sharding, glm_params.abstract(config, mesh))
    pairs = [drawn(config, each, mesh, seed) for seed, each in enumerate(CONFIGS)]
    sharded = attach_several(
        jax.device_put(params, shardings), list(zip(CONFIGS, pairs, strict=True)), "float32"
    )
    monkeypatch.setattr("glm_jax.engine.engine.prepare", lambda params: params)
    _assert_same(_answers(Engine(sharded, config, SETTINGS), _requests()), alone)


@pytest.mark.parametrize("adapter", [1, 2])
def test_beam_searches(tiny_model, several, models, adapter):
    config, _ = tiny_model
    prompt = Prompt((5, 6, 240, 7), 2, adapter=adapter)
    search = BeamSearch(num_beams=2, min_tokens=3)
    got = beam_search(several, config, prompt, search, max_length=12)
    alone = dataclasses.replace(prompt, adapter=0)
    expected = beam_search(models[adapter], config, alone, search, max_length=12)
    assert [each.tokens for each in got] == [each.tokens for each in expected]
    np.testing.assert_allclose([x.score for x in got], [x.score for x in expected], atol=1e-4)


def test_scores(tiny_model, several, models):
    config, _ = tiny_model
    special = config.special_tokens

    def sequences(adapter):
        prompt = Prompt((5, 6, special.mask, 7), 2, adapter=adapter)
        return [
            *prompt_choices(prompt, [(9, 8), (30,)], special, 64),
            continuation((), (4, 5, 6), special, adapter=adapter),
        ]

    together = [each for adapter in range(3) for each in sequences(adapter)]
    scores = {x.number: x for x in Scorer(several, config, 128).score(together)}
    for adapter, params in enumerate(models):
        for x in Scorer(params, config, 128).score(sequences(0)):
            got = scores[2 * adapter + x.number].log_probabilities
            np.testing.assert_allclose(got, x.log_probabilities, atol=1e-4)
    assert abs(scores[0].sums - scores[2].sums).max() > 1e-2


def test_adapters_that_are_not_there_are_refused(tiny_model, several, models):
    config, _ = tiny_model
    for params, adapter, count in ((several, 3, 2), (several, -1, 2), (models[1], 1, 0)):
        prompt = Prompt((5, 240), 1, adapter=adapter)
        with pytest.raises(PromptError, match=f"adapter={adapter}: the model has {count}"):
            Engine(params, config, SETTINGS).submit(Request(prompt))
        with pytest.raises(PromptError, match=f"adapter={adapter}: the model has {count}"):
            beam_search(params, config, prompt, BeamSearch())
