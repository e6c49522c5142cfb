"""Blanks of a text, and scores, over HTTP are those of the library."""

import json

import httpx2
import numpy as np
import pytest
from served import ASKED, NAME, error_of, post, wait_idle

from glm_jax.engine.beam_search import BeamSearch
from glm_jax.engine.sampling import Sampling
from glm_jax.engine.scoring import Scorer
from glm_jax.engine.stepwise import finish
from glm_jax.generation.beam_filling import filling_by_beams
from glm_jax.generation.blank_filling import (
    PartlyFilled,
    fill_blanks,
)
from glm_jax.generation.scored_texts import continuation, score_choices
from glm_jax.generation.shared_scoring import SharedScorer

pytest_plugins = ["serving_fixtures"]

TEXTS = (
    "The capital of [MASK] is [MASK].",
    "日本的首都是[MASK]。",
    "The currency of Poland is",
    "One [sMASK] two [gMASK]",
    "[MASK][MASK]",
)

PROMPTS = ("The capital of France is Paris.", "日本的首都是东京。")
ECHOED = ASKED | {"echo": True, "temperature": 0, "logprobs": 2}


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


@pytest.fixture(scope="module")
def scorer(model):
    return Scorer(model.params, model.config, 256, 2)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


def test_echoed_prompts_are_scored_as_text_behind_gmask(model, served, scorer, tokens):
    texts = [continuation((), ids, model.tokenizer.special_tokens) for ids in tokens]
    expected = finish(scorer.steps(texts))
    by_text = post(served, json=ECHOED | {"prompt": list(PROMPTS), "max_tokens": 0}).json()
    by_tokens = post(served, json=ECHOED | {"prompt": tokens, "max_tokens": 0}).json()
    assert by_text["choices"] == by_tokens["choices"]
    for prompt, choice, score in zip(PROMPTS, by_text["choices"], expected, strict=True):
        told = choice["logprobs"]
        assert (choice["text"], choice["finish_reason"]) == (prompt, "length")
        assert "".join(told["tokens"]) == prompt
        assert told["text_offset"] == [
            len("".join(told["tokens"][:i])) for i in range(len(told["tokens"]))
        ]
        np.testing.assert_allclose(told["token_logprobs"], score.log_probabilities, atol=1e-4)
        for value, top, is_argmax in zip(
            told["token_logprobs"], told["top_logprobs"], score.are_argmax, strict=True
        ):
            assert value in top.values()
            assert len(top) in (2, 3)
            assert (value == max(top.values())) == is_argmax


def test_an_answer_follows_the_scores_of_its_prompt(served, tokens):
    asked = {"prompt": list(PROMPTS), "max_tokens": 3, "seed": 3, "n": 2, "temperature": 1}
    plain = post(served, json=ECHOED | asked | {"echo": False}).json()
    scored = post(served, json=ECHOED | asked).json()
    alone = post(served, json=ECHOED | asked | {"max_tokens": 0}).json()
    assert scored["usage"] == plain["usage"]
    for number, (choice, answer, prompt) in enumerate(
        zip(scored["choices"], plain["choices"], alone["choices"], strict=True)
    ):
        assert choice["text"] == PROMPTS[number // 2] + answer["text"]
        assert choice["finish_reason"] == answer["finish_reason"]
        count = len(tokens[number // 2])
        for name, values in choice["logprobs"].items():
            assert values[:count] == prompt["logprobs"][name]
        # Rounding depends on which rows a step has, and that on when requests arrive.
        values = pytest.approx(answer["logprobs"]["token_logprobs"], abs=1e-5)
        assert choice["logprobs"]["token_logprobs"][count:] == values
        assert choice["logprobs"]["text_offset"][count] == len(PROMPTS[number // 2])


def test_clients_of_the_harness_get_its_numbers(model, served, scorer, tokens):
    """The body and the arithmetic of lm-evaluation-harness 0.4's local-completions."""
    special = model.tokenizer.special_tokens
    body = {"model": NAME, "prompt": tokens, "temperature": 0, "max_tokens": 1, "logprobs": 1}
    choices = post(served, json=body | {"seed": 1234, "echo": True}).json()["choices"]
    for ids, choice in zip(tokens, choices, strict=True):
        for context in (1, len(ids) // 2, len(ids) - 1):
            told = choice["logprobs"]
            values = told["token_logprobs"][context:-1]
            tops = told["top_logprobs"][context:-1]
            is_greedy = all(x == max(top.values()) for x, top in zip(values, tops, strict=True))
            text = continuation(ids[:context], ids[context:], special, is_unidirectional=True)
            [score] = scorer.score([text])
            np.testing.assert_allclose(sum(values), score.sums[0], atol=1e-3)
            assert is_greedy == score.are_argmax.all()


def test_a_prompt_with_a_blank_of_its_own_is_named_and_not_scored(served):
    asked = {"prompt": "The capital of [MASK] is Paris.", "max_tokens": 2}
    [choice] = post(served, json=ECHOED | asked).json()["choices"]
    told = choice["logprobs"]
    assert "".join(told["tokens"][:-2]) == "The capital of"
    assert set(told["token_logprobs"][:-2]) == set(told["top_logprobs"][:-2]) == {None}
    assert max(told["token_logprobs"][-2:]) < 0


@pytest.mark.parametrize("context", ["The capital of [MASK].", "The capital of", "a [sMASK]"])
def test_choices_are_scored_in_their_blank(model, served, scorer, context):
    choices = [" France", " the Kingdom of Denmark", " [MASK] <eop>", " 日本"]
    answered = post(served, "/v1/score", json={"context": context, "choices": choices}).json()
    partly = PartlyFilled.begin(model.tokenizer, context, model.engine.max_length)
    scored = finish(
        score_choices(SharedScorer(scorer, 256), model.tokenizer, context, partly, choices)
    )
    assert (answered["object"], answered["model"]) == ("score", NAME)
    assert [choice["text"] for choice in answered["choices"]] == choices
    for expected, choice in zip(scored, answered["choices"], strict=True):
        np.testing.assert_allclose(choice["token_logprobs"], expected.log_probabilities, atol=1e-4)
        np.testing.assert_allclose(choice["logprob"], sum(choice["token_logprobs"]), atol=1e-4)
        assert choice["is_greedy"] == expected.is_greedy
        assert model.tokenizer.special_tokens.mask not in expected.tokens
    values = [choice["logprob"] for choice in answered["choices"]]
    assert answered["best"] == values.index(max(values))
    assert answered["usage"]["prompt_tokens"] == len(partly.tokens)


def test_what_cannot_be_scored(served):
    for fields, message in (
        ({"context": "[MASK] [MASK]"}, "2 blanks: choices are for the one blank"),
        ({"choices": []}, "choices: List should have at least 1 item"),
        ({"choices": ["a", ""]}, "choices: String should have at least 1 character"),
        ({"choices": ["a", "word " * 200]}, "choices[1]: "),
        ({"context": "word " * 500}, "no room for an answer in 128"),
        ({"unidirectional": True, "context": "[MASK]"}, "unidirectional"),
        ({"temperature": 1}, "temperature: Extra inputs"),
    ):
        refused = post(served, "/v1/score", json={"context": "a", "choices": ["b"]} | fields)
        assert message in error_of(refused, 400)["message"]
    asked = ECHOED | {"prompt": [4000000], "max_tokens": 0}
    assert "not in the vocabulary" in error_of(post(served, json=asked), 400)["message"]


def test_tokens_as_clients_of_vllm_ask_for_them(client, tokenizer):
    asked = {"prompt": PROMPTS[0], "add_special_tokens": False}
    tokens = client.post("/tokenize", json=asked).json()["tokens"]
    assert tokens == tokenizer.encode(PROMPTS[0])
    back = client.post("/detokenize", json={"tokens": tokens}).json()
    assert back == {"prompt": PROMPTS[0]}
    end = client.get("/tokenizer_info").json()["eos_token"]
    assert client.post("/tokenize", json={"prompt": end}).json()["tokens"] == [
        tokenizer.special_tokens.eop
    ]
    for both in ({}, {"text": "a", "prompt": "a"}):
        assert "one text" in error_of(client.post("/tokenize", json=both), 400)["message"]
