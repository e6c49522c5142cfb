"""A client asks for an adapter by the name of a model."""

import httpx2
import pytest
from served import NAME, error_of, post, running, tiny_served

from glm_jax.engine.engine import EngineSettings
from glm_jax.model.adapters import AdapterConfig

NAMES = ("law", "poems")
ASKED = {"prompt": "The capital of", "temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def served(tokenizer):
    adapters = (AdapterConfig(rank=2), AdapterConfig(rank=3, targets=("dense",)))
    model = tiny_served(tokenizer, EngineSettings(2, 32, prefill_width=32), adapters)
    with running(lambda: model, adapters=NAMES) as served:
        yield served


def _asked(served, name, path="/v1/completions", **more):
    response = post(served, path, json={"model": name} | (more or ASKED))
    assert response.status_code == 200, response.text
    assert response.json()["model"] == name
    return response.json()


@pytest.fixture
def seen(served, monkeypatch):
    """The adapters of all that the engine and the scorer are given."""
    model = served.service.worker.model
    ids = []
    submit, steps = model.engine.submit, model.scorer.steps
    monkeypatch.setattr(
        model.engine, "submit", lambda x, *more: ids.append(x.prompt.adapter) or submit(x, *more)
    )
    monkeypatch.setattr(
        model.scorer, "steps", lambda xs: ids.extend(x.adapter for x in xs) or steps(xs)
    )
    return ids


def test_each_is_a_model(served):
    models = httpx2.get(served.url + "/v1/models").json()["data"]
    assert [each["id"] for each in models] == [NAME, *NAMES]
    assert [each["parent"] for each in models] == [None, NAME, NAME]
    one = httpx2.get(served.url + "/v1/models/law").json()
    assert one == models[1]
    error = error_of(post(served, json=ASKED | {"model": "lawyers"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "ask for 'tiny' or 'law' or 'poems'" in error["message"]


def test_it_answers_all_that_its_name_is_asked_for(served, seen):
    texts = {name: _asked(served, name)["choices"][0]["text"] for name in (NAME, *NAMES)}
    assert len(set(texts.values())) > 1
    assert seen == [0, 1, 2]
    seen.clear()
    echo = ASKED | {"echo": True, "logprobs": 1}
    scores = [_asked(served, name, **echo)["choices"][0]["logprobs"] for name in (NAME, "law")]
    assert scores[0]["token_logprobs"][0] != scores[1]["token_logprobs"][0]
    _asked(served, "law", prompt=[[5, 6], [7]], max_tokens=1)
    _asked(served, "poems", "/v1/fill", text="The [MASK] of [MASK].", max_tokens=2)
    choices = {"context": "The [MASK].", "choices": ["capital", "end"]}
    logs = [_asked(served, name, "/v1/score", **choices)["choices"] for name in (NAME, "poems")]
    assert logs[0][0]["logprob"] != logs[1][0]["logprob"]
    assert seen == [0, 0, 1, 1, 1, 1, 2, 2, 0, 2]


def test_its_embeddings_are_its_own(served):
    answers = [_asked(served, x, "/v1/embeddings", input="The capital") for x in (NAME, *NAMES)]
    assert len({tuple(answer["data"][0]["embedding"]) for answer in answers}) == 3


def test_a_search_is_its_own(served):
    search = {"num_beams": 2, "max_tokens": 4, "prompt": "The capital of"}
    texts = [_asked(served, name, **search)["choices"][0]["text"] for name in (NAME, *NAMES)]
    assert len(set(texts)) > 1
