"""The official client gets what the engine gives."""

import json

import numpy as np
import openai
import pytest
from served import NAME, post, wait_idle

from glm_jax.engine.beam_search import BeamSearch
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.request import Request
from glm_jax.engine.sampling import Sampling
from glm_jax.engine.stepwise import finish
from glm_jax.generation.beam_filling import filling_by_beams
from glm_jax.generation.blank_filling import (
    PartlyFilled,
)
from glm_jax.generation.driver import complete_all

pytest_plugins = ["serving_fixtures"]

PROMPT = "The capital of France is"
OURS = ("min_tokens", "top_k", "unidirectional", "num_beams")
SAMPLED = dict(temperature=1.0, top_k=50)


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def complete(client):
    def complete(**fields):
        ours = {k: fields.pop(k) for k in OURS if k in fields}
        return client.completions.create(model=NAME, extra_body=ours, **fields)

    return complete


def _expected(model, text, sampling, max_tokens, seed=0, **more):
    """The engine's own tokens, and the text that they add behind the prompt."""
    partly = PartlyFilled.begin(model.tokenizer, text, model.engine.max_length, **more)
    engine = Engine(model.params, model.config, EngineSettings(slots=1))
    request = Request(partly.prompt(), sampling, max_tokens, seed, log_probabilities=True)
    [answer] = complete_all(engine, [request])
    before = partly.tokens[: partly.position]
    kept = [t for t in answer.tokens if t not in model.tokenizer.special_tokens.end_tokens]
    decode = model.tokenizer.decode
    return answer, decode([*before, *kept])[len(decode(before)) :]


def test_models(client):
    [model] = client.models.list()
    assert model.id == NAME == client.models.retrieve(NAME).id
    with pytest.raises(openai.NotFoundError, match="the model 'gpt' is not here"):
        client.models.retrieve("gpt")


@pytest.mark.parametrize("seed", [3, 4])
def test_a_completion_is_the_engines(model, complete, seed):
    sampling = Sampling(temperature=1.0, top_k=50)
    answer, text = _expected(model, PROMPT, sampling, 12, seed)
    got = complete(prompt=PROMPT, max_tokens=12, seed=seed, logprobs=0, **SAMPLED)
    [choice] = got.choices
    assert choice.text == text
    assert choice.finish_reason == answer.finish_reason
    told = choice.logprobs
    assert told.token_logprobs == pytest.approx(answer.log_probabilities[: len(told.tokens)], 1e-3)
    assert "".join(told.tokens) == text
    assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(len(told.tokens))]
    assert got.usage.completion_tokens == len(answer.tokens)
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


def test_a_stream_joins_to_the_whole(complete):
    asked = dict(
        prompt=[PROMPT, "日本的[MASK]是"], n=2, max_tokens=9, seed=1, logprobs=2, **SAMPLED
    )
    whole = complete(**asked)
    texts, reasons, told = [""] * 4, [None] * 4, [[] for _ in range(4)]
    options = {"include_usage": True}
    for chunk in complete(**asked, stream=True, stream_options=options):
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
            told[choice.index] += choice.logprobs.tokens
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0] != texts[1]  # of seeds 1 and 2
    assert texts[2] != texts[3]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert told == [choice.logprobs.tokens for choice in whole.choices]
    assert chunk.usage == whole.usage


def test_alternatives_are_the_likeliest(complete):
    [choice] = complete(prompt=PROMPT, max_tokens=4, temperature=0, logprobs=3).choices
    for chosen, best in zip(
        choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        values = list(best.values())
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert chosen == values[0]  # greedy


def test_a_chosen_token_is_among_its_alternatives_by_its_name(complete):
    """Drawn from all of the vocabulary, so that few are of the likeliest, and after a blank."""
    [choice] = complete(
        prompt="The capital of France is [MASK].", max_tokens=24, temperature=2, seed=3, logprobs=2
    ).choices
    told = choice.logprobs
    counts = set()
    for name, value, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert top[name] == value
        counts.add(len(top))
        assert list(top.values()) == sorted(top.values(), reverse=True)
    assert 3 in counts <= {2, 3}
    assert any(name.startswith(" ") for name in told.tokens)
    assert "".join(told.tokens) == choice.text


def test_a_stop_ends_an_answer(complete, served):
    [whole] = complete(prompt=PROMPT, max_tokens=20, seed=5, **SAMPLED).choices
    stop = whole.text[len(whole.text) // 2 :][:3]
    [cut] = complete(prompt=PROMPT, max_tokens=20, seed=5, stop=[stop, "never"], **SAMPLED).choices
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    wait_idle(served)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_end_where_a_stop_cuts_the_text(complete, stream):
    """Also in the middle of a token, of which both have what is left."""
    asked = dict(prompt=[PROMPT, "日本的[MASK]是"], max_tokens=20, seed=5, logprobs=2, **SAMPLED)
    for whole in complete(**asked).choices:
        for at in (0, 1, len(whole.text) // 2, len(whole.text) // 2 + 1, len(whole.text) - 3):
            stop = whole.text[at : at + 3]
            cut = {"text": "", "tokens": [], "top": [], "values": [], "offsets": []}
            more = dict(stop=[stop, "never"], stream=stream)
            answered = complete(**asked | {"prompt": asked["prompt"][whole.index]}, **more)
            for part in answered if stream else [answered]:
                [choice] = part.choices
                cut["text"] += choice.text
                cut["tokens"] += choice.logprobs.tokens
                cut["top"] += choice.logprobs.top_logprobs
                cut["values"] += choice.logprobs.token_logprobs
                cut["offsets"] += choice.logprobs.text_offset
                assert cut["text"].startswith("".join(cut["tokens"]))
            assert cut["text"] == whole.text[: whole.text.index(stop)]
            assert "".join(cut["tokens"]) == cut["text"]
            count = len(cut["tokens"])
            assert cut["tokens"][:-1] == whole.logprobs.tokens[: max(0, count - 1)]
            assert cut["values"] == pytest.approx(whole.logprobs.token_logprobs[:count], 1e-5)
            assert cut["offsets"] == whole.logprobs.text_offset[:count]
            for name, value, top in zip(cut["tokens"], cut["values"], cut["top"], strict=True):
                assert top[name] == value


def test_no_stop_cuts_what_min_tokens_asks_for(complete):
    asked = dict(prompt=PROMPT, max_tokens=20, seed=5, logprobs=0, **SAMPLED)
    [whole] = complete(**asked).choices
    names = whole.logprobs.tokens
    [cut] = complete(**asked, stop=whole.text[:1], min_tokens=6).choices
    required = "".join(names[:6])
    later = whole.text.find(whole.text[0], len(required))
    assert cut.text == (whole.text if later < 0 else whole.text[:later])
    assert "".join(cut.logprobs.tokens) == cut.text


def test_an_echo_names_no_token_of_what_a_stop_cuts(complete):
    asked = dict(prompt=PROMPT, max_tokens=12, seed=5, logprobs=1, echo=True, **SAMPLED)
    [whole] = complete(**asked).choices
    stop = whole.text[-3:]
    [cut] = complete(**asked, stop=stop).choices
    assert cut.text == whole.text[: whole.text.index(stop, len(PROMPT))]
    assert "".join(cut.logprobs.tokens) == cut.text
    count = len(cut.logprobs.tokens)
    assert cut.logprobs.text_offset == whole.logprobs.text_offset[:count]


def test_echo_repeats_the_prompt(complete):
    asked = dict(max_tokens=6, seed=2, **SAMPLED)
    for prompt in ("France [MASK] here.", "France", "[gMASK]"):
        before, _, after = prompt.partition("[MASK]")
        # The space between two words is the answer's, and there once.
        before = before.replace("[gMASK]", "").removesuffix(" ")
        [plain] = complete(prompt=prompt, **asked).choices
        [echoed] = complete(prompt=prompt, echo=True, **asked).choices
        assert echoed.text == before + plain.text + after
        stream = complete(prompt=prompt, echo=True, stream=True, **asked)
        assert "".join(chunk.choices[0].text for chunk in stream) == echoed.text
    [nothing] = complete(prompt="a [MASK] b", echo=True, max_tokens=0).choices
    assert (nothing.text, nothing.finish_reason) == ("a  b", "length")


def test_tokens_are_a_prompt(complete, model):
    text = "The capital of [MASK] is Paris."
    tokens = PartlyFilled.begin(model.tokenizer, text, 64).tokens
    asked = dict(max_tokens=6, seed=2, **SAMPLED)
    [by_text, by_tokens] = [complete(prompt=prompt, **asked) for prompt in (text, list(tokens))]
    assert by_text.choices[0].text == by_tokens.choices[0].text
    both = complete(prompt=[list(tokens), model.tokenizer.encode("France")], **asked)
    assert both.choices[0].text == by_text.choices[0].text
    assert len(both.choices) == 2


def test_a_suffix_stands_behind_the_blank(complete):
    asked = dict(max_tokens=6, seed=2, **SAMPLED)
    assert (
        complete(prompt="The capital of", suffix=" is Paris.", **asked).choices[0].text
        == complete(prompt="The capital of[MASK] is Paris.", **asked).choices[0].text
    )


def test_unidirectional_prompts(complete, model):
    sampling = Sampling(temperature=1.0, top_k=50)
    _, text = _expected(model, PROMPT, sampling, 6, 2, is_unidirectional=True)
    asked = dict(prompt=PROMPT, max_tokens=6, seed=2, **SAMPLED)
    assert complete(unidirectional=True, **asked).choices[0].text == text


@pytest.mark.parametrize("more", [{}, {"stop": " "}, {"logprobs": 1, "echo": True}])
def test_best_of_gives_the_likeliest_per_token(complete, more):
    prompts = [PROMPT, "日本的[MASK]是"]
    asked = dict(prompt=prompts, max_tokens=6, seed=1, **SAMPLED)
    ranked = complete(**asked, best_of=3, n=2, **more)
    each = complete(**asked, n=3, **more)
    measured = complete(**asked, n=3, **more | {"logprobs": 1, "echo": False, "stop": None})
    # Without a stop text, all tokens have log-probabilities but an end token.
    means = [np.mean(choice.logprobs.token_logprobs) for choice in measured.choices]
    assert [choice.index for choice in ranked.choices] == [0, 1, 2, 3]
    assert ranked.usage.completion_tokens == each.usage.completion_tokens  # of all three
    if "stop" not in more:
        order = [sorted(range(i, i + 3), key=lambda j: -means[j])[:2] for i in (0, 3)]
        best = [each.choices[j] for j in (*order[0], *order[1])]
        assert [choice.text for choice in ranked.choices] == [choice.text for choice in best]
        names = [[c.logprobs and c.logprobs.tokens for c in x] for x in (ranked.choices, best)]
        assert names[0] == names[1]
    same = complete(**asked, best_of=2, n=2, **more)
    assert [c.text for c in same.choices] == [
        c.text for c in complete(**asked, n=2, **more).choices
    ]


def test_num_beams_searches_by_beams(complete, model, served):
    partly = PartlyFilled.begin(model.tokenizer, PROMPT, model.engine.max_length)
    found = finish(filling_by_beams(model.params, model.config, partly, BeamSearch(3), 6))
    before = model.tokenizer.decode(model.tokenizer.encode(PROMPT))
    expected = [f.finished(model.tokenizer).text.removeprefix(before) for f, _ in found[:2]]
    for asked in ({"num_beams": 3}, {"best_of": 3}, {"best_of": 3, "temperature": 0}):
        got = complete(prompt=PROMPT, n=2, max_tokens=6, **asked)
        assert [choice.text for choice in got.choices] == expected
    wait_idle(served)


CITIES = ("Paris", "Rome", "北京")
AGE = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99, "minimum": 0}}}
AGE |= {"required": ["age"], "additionalProperties": False}


@pytest.mark.parametrize("prompt", [PROMPT, "日本的首都是[MASK]。", "In [MASK], we", [300, 301]])
def test_guided_answers_are_what_is_asked_for(client, prompt):
    guided = {"guided_choice": CITIES, "min_tokens": 2}
    got = client.completions.create(model=NAME, prompt=prompt, n=3, seed=1, extra_body=guided)
    texts = [choice.text for choice in got.choices]
    assert set(texts) <= set(CITIES)
    assert {choice.finish_reason for choice in got.choices} == {"stop"}
    asked = dict(model=NAME, prompt=prompt, seed=1, extra_body=guided, stream=True)
    parts = [part.choices[0] for part in client.completions.create(**asked)]
    assert "".join(part.text for part in parts) == texts[0]
    if isinstance(prompt, str) and "[MASK]" in prompt:  # the whole text has its space
        echoed = client.completions.create(**asked | {"echo": True, "stream": False})
        assert echoed.choices[0].text == prompt.replace("[MASK]", texts[0])


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": AGE},
        {"guided_json": json.dumps(AGE)},
        {"guided_regex": '\\{"age": [0-9]{1,2}\\}', "repetition_penalty": 1.3},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": AGE}}},
        {"response_format": {"type": "json_object"}, "logit_bias": {"5": 3}, "stop": ["}"]},
    ],
)
def test_guided_json(client, fields):
    asked = dict(model=NAME, prompt=PROMPT, max_tokens=60, seed=5, logprobs=1)
    [choice] = client.completions.create(**asked, extra_body=fields).choices
    assert "".join(choice.logprobs.tokens).startswith(choice.text)
    if "stop" in fields:
        assert choice.text.startswith("{")
        return
    assert choice.finish_reason == "stop"
    assert 0 <= json.loads(choice.text)["age"] <= 99
    short = client.completions.create(**asked | {"max_tokens": 2}, extra_body=fields).choices[0]
    assert (short.finish_reason, choice.text.startswith(short.text)) == ("length", True)


def test_guided_blanks_of_a_text(served):
    asked = {
        "text": "From [MASK] to [MASK]，去[MASK]。",
        "guided_choice": CITIES,
        "temperature": 1.0,
    }
    filled = post(served, "/v1/fill", json=asked | {"seed": 3}).json()
    blanks = [blank["text"] for blank in filled["blanks"]]
    assert set(blanks) <= set(CITIES)
    assert filled["text"] == "From {} to {}，去{}。".format(*blanks)
    free = {"text": "We [MASK]", "response_format": {"type": "text"}, "max_tokens": 2}
    assert post(served, "/v1/fill", json=free).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"n": 2, "best_of": 1}, "best_of", "best_of=1 is less than n=2"),
        ({"n": 1, "best_of": 2, "stream": True}, "stream", "the best 1 are known at the end"),
        ({"extra_body": {"num_beams": 9}}, "num_beams", "at most 4"),
        ({"best_of": 9}, "best_of", "at most 4"),
        ({"extra_body": {"num_beams": 2}, "n": 3}, "n", "n=3 is more than num_beams=2"),
        (
            {"extra_body": {"num_beams": 2}, "temperature": 0.5},
            "temperature",
            "a search takes no such setting",
        ),
        ({"extra_body": {"num_beams": 2}, "stop": "x"}, "stop", "leave out one"),
        ({"extra_body": {"num_beams": 2}, "best_of": 3}, "best_of", "leave out one"),
        ({"prompt": "[MASK] and [MASK]"}, "prompt", "2 blanks: /v1/fill"),
        ({"prompt": "word " * 500}, None, "no room for an answer in 128"),
        ({"prompt": [4000000]}, None, "token 4000000 is not in the vocabulary"),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": 5}, "prompt", "valid string; or: Input should be a valid array"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "less than or equal to 100"),
        ({"logit_bias": {"five": 1}}, None, "logit_bias={'five': 1.0}: expected token ids"),
        ({"logit_bias": {"4096": 1}}, None, "token 4096 is not in the vocabulary"),
        (
            {"extra_body": {"num_beams": 2}, "frequency_penalty": 1},
            None,
            "frequency_penalty=1.0 beside num_beams=2",
        ),
        (
            {"extra_body": {"num_beams": 2, "guided_regex": "a"}},
            None,
            "guided_regex='a' beside num_",
        ),
        ({"extra_body": {"guided_regex": "a)"}}, None, "guided_regex: unopened group"),
        ({"extra_body": {"guided_json": [1]}}, "guided_json", "should be an object; or"),
        ({"extra_body": {"guided_json": {"type": "x"}}}, None, "guided_json: Invalid type: x"),
        ({"extra_body": {"guided_choice": []}}, "guided_choice", "at least 1 item"),
        ({"extra_body": {"guided_choice": [""]}}, "guided_choice", "at least 1 character"),
        ({"extra_body": {"response_format": {"type": "xml"}}}, "response_format", "'text', 'json"),
        (
            {"extra_body": {"response_format": {"type": "json_schema"}}},
            "response_format",
            "needs it",
        ),
        ({"extra_body": {"unheard_of": 1}}, "unheard_of", "Extra inputs are not permitted"),
        ({"extra_body": {"temperature": "hot"}}, "temperature", "valid number"),
        ({"extra_body": {"unidirectional": True}, "prompt": "a [MASK]"}, None, "unidirectional"),
    ],
)
def test_what_cannot_be_answered(client, fields, param, message):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": NAME, "prompt": PROMPT, "max_tokens": 2} | fields)
    assert message in caught.value.message
    assert "\n" not in caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"
    assert caught.value.param == param
