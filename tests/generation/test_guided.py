"""Guided answers of an engine: batched and alone, drafted and not, with settings of all kinds."""

import json
import re

import jax
import numpy as np
import pytest
from conftest import GOLDEN  # noqa: F401  # imports of jax come after it

from glm_jax.config import glm_config
from glm_jax.engine import step_functions
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.generation_settings import SamplingError
from glm_jax.engine.guidance import Guidance
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request, Token
from glm_jax.engine.sampling import Sampling
from glm_jax.engine.speculation import Drafter, Speculation
from glm_jax.generation import grammars
from glm_jax.generation.blank_filling import BlankFilling, PartlyFilled
from glm_jax.generation.driver import SingleRequest, drive
from glm_jax.generation.text_request import TextRequest
from glm_jax.jobs.request_files import read_lines
from glm_jax.jobs.request_runner import RequestRunner
from glm_jax.model import params as glm_params

PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "maximum": 150}, "name": {"type": "string"}},
    "required": ["age", "name"],
    "additionalProperties": False,
}


def _guide(tokenizer, **fields):
    return TextRequest().with_fields(fields).guide(tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = glm_config("tiny", vocab_size=2400, max_sequence_length=64)
    config = config.replace(special_tokens=tokenizer.special_tokens)
    return config, glm_params.init(config, jax.random.key(0))


def _engine(model, **more):
    config, params = model
    engine = Engine(params, config, EngineSettings(4, page_size=16, prefill_width=32, **more))
    engine._step_widths = [4]  # one program to compile, as on other devices
    return engine


@pytest.fixture(scope="module")
def engine(model):
    return _engine(model)


def _fillings(tokenizer):
    """Texts with blanks, guided in every way and not, with settings of all kinds."""
    guides = (
        {"guided_choice": ["Paris", "Rome", "东京"]},
        {"guided_json": PERSON},
        {},
        {"guided_regex": "[a-z ]{3,9}(, [a-z]{4}){0,2}"},
        {"guided_choice": ["x", "x y z", "x y z and so on"]},
    )
    samplings = (
        Sampling(temperature=1.0),
        Sampling(),
        Sampling(temperature=1.3, top_k=500, min_tokens=4, repetition_penalty=1.2),
        Sampling(temperature=1.0, top_p=0.9, no_repeat_ngram=9, frequency_penalty=0.5),
    )
    texts = ("The capital is [MASK]. 首都是[MASK]。", "The capital of France is [gMASK]")
    fillings = []
    for number in range(12):
        request = Request(
            PartlyFilled.begin(tokenizer, texts[number % 2], 64).prompt(),
            sampling=samplings[number % 4],
            max_tokens=28,
            seed=number,
            guide=_guide(tokenizer, **guides[number % 5]),
            log_probabilities=number % 3 == 0,
        )
        partly = PartlyFilled.begin(tokenizer, texts[number % 2], 64)
        fillings.append(BlankFilling(partly, request))
    return fillings, guides


def _tokens(fillings):
    return [[(c.tokens, c.finish_reason) for c in filling.completions] for filling in fillings]


@pytest.fixture(scope="module")
def alone(tokenizer, engine):
    fillings, _ = _fillings(tokenizer)
    for filling in fillings:
        list(drive(engine, [filling]))
        filling.check()
    return fillings


def test_a_batch_gives_what_each_gives_alone(tokenizer, engine, alone):
    fillings, guides = _fillings(tokenizer)
    list(drive(engine, fillings))
    assert _tokens(fillings) == _tokens(alone)
    reasons = []
    for number, filling in enumerate(fillings):
        fields = guides[number % 5]
        filled = filling.partly.finished(tokenizer)
        for blank, completion in zip(filled.blanks, filling.completions, strict=True):
            if fields:
                reasons.append(completion.finish_reason)
            if completion.finish_reason == "length":
                continue
            if "guided_choice" in fields:
                assert blank in fields["guided_choice"]
            elif "guided_regex" in fields:
                assert re.fullmatch(fields["guided_regex"], blank)
            elif fields:
                assert json.loads(blank).keys() == {"age", "name"}
        if "guided_choice" in fields and number % 2 == 0:  # with the spaces of the text
            first, second = filled.blanks
            assert filled.text == f"The capital is {first}. 首都是{second}。"
    assert {"stop", "length"} == set(reasons)


def test_drafts_change_nothing(tokenizer, model, alone, monkeypatch):
    """Right ones, wrong ones, ones that the grammar refuses, and ones past the end."""
    answers = [c.tokens for filling in alone for c in filling.completions]
    rng, drafted = np.random.default_rng(0), []

    def propose(drafter, count):
        text = tuple(drafter.text)
        sop = tokenizer.special_tokens.sop
        begun = text[len(text) - text[::-1].index(sop) :]
        possible = {a[len(begun) :] for a in answers if a[: len(begun)] == begun}
        tokens = [*(min(possible) if possible else ()), *rng.integers(300, 2300, 3).tolist()]
        tokens = [t if rng.random() < 0.8 else int(rng.integers(300, 2300)) for t in tokens[:count]]
        drafted.extend(tokens)
        return tokens

    monkeypatch.setattr(Drafter, "propose", propose)
    monkeypatch.setattr(Speculation, "measure", lambda *_: (0.01, 0.0))
    engine = _engine(model, speculate=3, compiles_guided=True)
    engine.warm_up()
    programs = (step_functions.begin_step, step_functions.finish_step, step_functions.step)
    compiled = [program._cache_size() for program in programs]
    fillings, _ = _fillings(tokenizer)
    list(drive(engine, fillings))
    assert [program._cache_size() for program in programs] == compiled
    assert _tokens(fillings) == _tokens(alone)
    assert engine.drafts.checked == len(drafted)
    assert 30 < engine.drafts.accepted < len(drafted) - 30


def _answer(tokenizer, engine, sampling, max_tokens=20, **fields):
    partly = PartlyFilled.begin(tokenizer, "The capital is [MASK]", 64)
    request = Request(partly.prompt(), sampling, max_tokens, guide=_guide(tokenizer, **fields))
    filling = BlankFilling(partly, request)
    list(drive(engine, [filling]))
    filling.check()
    [text], [completion] = filling.partly.finished(tokenizer).blanks, filling.completions
    return text, completion.finish_reason


def test_lines_of_a_job_are_guided(tokenizer, model, engine, tmp_path):
    lines = (
        {"text": "From [MASK] to [MASK].", "guided_choice": ["Paris", "Rome"]},
        {"text": "In JSON:", "guided_json": {"enum": [1, "b", None]}, "temperature": 1.0},
        {"text": "日本的首都是[MASK]。"},
        {"text": "x [MASK]", "guided_regex": "("},
        {"text": "x [MASK]", "guided_regex": "a", "guided_choice": ["b"]},
        {"text": "x [MASK]", "guided_choice": []},
        {"text": "x [MASK]", "guided_choice": ["a"], "num_beams": 2},
    )
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    defaults = TextRequest(guided_regex="东(京|方)")
    runner = RequestRunner(engine, model[1], model[0], tokenizer)
    records = sorted(runner.answer(read_lines(path, defaults)), key=lambda r: r["index"])
    first, second, third, *wrong = records
    assert first["text"] == "From {} to {}.".format(*first["blanks"])
    assert set(first["blanks"]) <= {"Paris", "Rome"}
    assert json.loads(second["blanks"][0]) in (1, "b", None)
    assert third["text"] in ("日本的首都是东京。", "日本的首都是东方。")
    assert [record["finish_reason"] for record in (first, second, third)] == ["stop"] * 3
    assert [record["error"] for record in wrong] == [
        "guided_regex: unclosed group",
        "guided_regex beside guided_choice: give one of the two",
        "guided_choice holds nothing: at least 1, or leave it out",
        "guided_choice=('a',) beside num_beams=2: a search for the best answers takes no such "
        "setting",
    ]


def test_masks_are_made_while_the_device_runs(tokenizer, engine, monkeypatch):
    """Behind the start of a step's layers, before anything waits for them; steps without a guided
    request are one program."""
    order = []

    def noted(name, real):
        return lambda *args: order.append(name) or real(*args)

    for name in ("begin_step", "finish_step", "step"):
        monkeypatch.setattr(step_functions, name, noted(name, getattr(step_functions, name)))
    monkeypatch.setattr(Guidance, "masks", noted("masks", Guidance.masks))
    monkeypatch.setattr(jax, "device_get", noted("wait", jax.device_get))
    _answer(tokenizer, engine, Sampling(), 2, guided_regex="[ab]{9}")
    assert order == ["begin_step", "masks", "finish_step", "wait"] * 2
    order.clear()
    request = Request(Prompt((5, tokenizer.special_tokens.gmask), None), max_tokens=2)
    list(drive(engine, [SingleRequest(request)]))
    assert order == ["step", "wait"] * 2


def test_an_answer_goes_on_where_it_was(tokenizer):
    """In another slot, with tokens that it was given before."""
    guide = _guide(tokenizer, guided_regex="[a-z]{4}|[a-c]+")
    request = Request(Prompt((5,), None), Sampling(min_tokens=3), guide=guide)
    guidance, ends = Guidance(2400), tokenizer.special_tokens.end_tokens
    letters = [min(t for t, p in tokenizer.pieces().items() if p.text == x) for x in (b"a", b"b")]
    guidance.begin(0, request, ends)
    for number in range(5):
        (mask,) = guidance.masks([0, 1], None)[0]
        is_end = [bool(mask[end >> 5] >> (end & 31) & 1) for end in ends]
        assert is_end == [number >= 3] * len(ends)
        guidance.begin(1, request, ends, [letters[i % 2] for i in range(number)])
        np.testing.assert_array_equal(*guidance.masks([0, 1], None))
        assert guidance.take(0, Token(7, letters[number % 2], 0.0, None)).error is None
    guidance.begin(0, Request(Prompt((5,), None)), ends)
    guidance.end(1)
    assert guidance.making([0, 1], None) is None


def test_a_grammars_end_goes_before_the_minimum_length(tokenizer, engine):
    """As long as it allows more, an answer does not end before; no token that is no text comes."""
    sampling = Sampling(min_tokens=12, logit_bias=((tokenizer.special_tokens.eop, 50.0),))
    assert _answer(tokenizer, engine, sampling, guided_choice=["Rome"]) == ("Rome", "stop")
    text, reason = _answer(tokenizer, engine, sampling, guided_regex="[ab]{1,99}")
    assert (len(text) >= 12, reason) == (True, "stop")
    ends = Sampling(logit_bias=((tokenizer.special_tokens.eop, 50.0), (0, 99.0)))
    text, reason = _answer(tokenizer, engine, ends, guided_regex="[ab]{3,99}")
    assert re.fullmatch("[ab]{3,99}", text)
    assert _answer(tokenizer, engine, Sampling(), 3, guided_regex="[ab]{90}")[1] == "length"


def test_bans_that_leave_nothing_and_grammars_too_complex_are_errors(
    tokenizer, engine, monkeypatch
):
    digits = Sampling(
        banned_tokens=tuple(t for t, p in tokenizer.pieces().items() if b"7" in p.text)
    )
    with pytest.raises(SamplingError, match="no token of what the answer must be is left at its"):
        _answer(tokenizer, engine, digits, guided_regex="7")
    monkeypatch.setitem(grammars._LIMITS, "max_lexer_states", 100)
    with pytest.raises(SamplingError, match=r"the grammar is too complex: .*too many states"):
        _answer(tokenizer, engine, Sampling(temperature=1.0), 40, guided_regex=".*a.{200}b.{9}")
