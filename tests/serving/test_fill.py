"""Blanks of a text over HTTP are those of the library."""

import json

import httpx2
import pytest
from served import NAME, wait_idle

from glm_jax.engine.beam_search import BeamSearch
from glm_jax.engine.sampling import Sampling
from glm_jax.engine.stepwise import finish
from glm_jax.generation.blank_filling import PartlyFilled, fill_blanks, filling_by_beams

pytest_plugins = ["serving_fixtures"]

TEXTS = (
    "The capital of [MASK] is [MASK].",
    "日本的首都是[MASK]。",
    "The currency of Poland is",
    "One [sMASK] two [gMASK]",
    "[MASK][MASK]",
)


@pytest.fixture(scope="module")
def client(served):
    with httpx2.Client(base_url=served.url, timeout=60) as client:
        yield client


def _events(client, fields):
    with client.stream("POST", "/v1/fill", json=fields | {"stream": True}) as response:
        assert response.status_code == 200
        data = [line[6:] for line in response.iter_lines() if line]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


@pytest.mark.parametrize("text", TEXTS)
def test_blanks_are_the_librarys(client, model, text):
    sampling = Sampling(temperature=0.9, top_k=40, min_tokens=2)
    expected = fill_blanks(
        model.params, model.config, model.tokenizer, text, sampling=sampling, seed=7
    )
    asked = {"text": text, "temperature": 0.9, "top_k": 40, "min_tokens": 2, "seed": 7}
    got = client.post("/v1/fill", json=asked).json()
    assert got["text"] == expected.text
    assert [blank["text"] for blank in got["blanks"]] == list(expected.blanks)
    assert "".join(piece["text"] for piece in got["pieces"]) == got["text"]
    assert got["model"] == NAME
    *pieces, whole = _events(client, asked)
    assert {k: v for k, v in whole.items() if k != "id"} == {
        k: v for k, v in got.items() if k != "id"
    } | {"created": whole["created"]}
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    told = {piece["blank"] for piece in pieces} - {None}
    assert told <= set(range(len(got["blanks"])))
    assert len(pieces) > len(got["pieces"])


def test_beams(client, model, served):
    text = TEXTS[0]
    partly = PartlyFilled.begin(model.tokenizer, text, model.engine.max_length)
    steps = filling_by_beams(model.params, model.config, partly, BeamSearch(2), 4)
    [(best, _), *_] = finish(steps)
    asked = {"text": text, "num_beams": 2, "max_tokens": 4}
    assert client.post("/v1/fill", json=asked).json()["text"] == (
        best.finished(model.tokenizer).text
    )
    assert _events(client, asked)[-1]["text"] == best.finished(model.tokenizer).text
    wait_idle(served)


def test_tokens_of_a_text(client, tokenizer):
    got = client.post("/tokenize", json={"text": TEXTS[0]}).json()
    assert got["tokens"] == tokenizer.encode(TEXTS[0])
    assert got["count"] == len(got["tokens"])


def test_what_cannot_be_filled(client):
    for fields, message in (
        ({}, "text: Field required"),
        ({"text": "word " * 500}, "no room for an answer"),
        ({"text": "a", "num_beams": 9}, "num_beams=9: this server takes at most 4"),
        ({"text": "a", "model": "other"}, "the model 'other' is not here"),
        ({"text": "a", "num_beams": 2, "top_k": 3}, "top_k=3 beside num_beams=2"),
    ):
        response = client.post("/v1/fill", json=fields)
        assert response.status_code in (400, 404)
        assert message in response.json()["error"]["message"]
