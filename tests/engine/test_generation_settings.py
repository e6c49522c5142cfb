"""One table of settings: what it refuses is refused everywhere, with a line that says why."""

import json
import math
from pathlib import Path

import pytest
from conftest import GOLDEN  # noqa: F401  # imports of jax come after it

from glm_jax.engine.beam_search import BeamSearch
from glm_jax.engine.generation_settings import SETTINGS, SamplingError
from glm_jax.engine.sampling import Sampling
from glm_jax.generation.text_request import RequestError, TextRequest
from glm_jax.serving.schemas import OUR_SETTINGS, CompletionRequest, FillRequest

NUMBERS = [name for name, setting in SETTINGS.items() if setting.range and not setting.max_items]
ODD = [math.nan, math.inf, -math.inf, 10**400, -(10**400), 10**5000, 2**31, -1e-300, 1e308]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_bounds(name):
    setting, request = SETTINGS[name], TextRequest()
    for value in (setting.lowest, setting.highest):
        assert getattr(request.with_fields({name: value}), name) == value
    beyond = [setting.lowest - 0.5, setting.highest * (1 + 1e-9) + 0.5, *ODD]
    outside = [x for x in beyond if not setting.lowest <= x <= setting.highest]
    for value in [*outside, True, False, "1", None, [1], {}, 1j]:
        with pytest.raises(SamplingError, match=rf"^{name}=.*(from|expected)") as caught:
            request.with_fields({name: value})
        assert len(str(caught.value)) < 160
    if setting.kind is int:
        assert getattr(request.with_fields({name: 1.0}), name) == 1
        with pytest.raises(SamplingError, match="expected int, got float"):
            request.with_fields({name: 1.5})


@pytest.mark.parametrize(
    "fields",
    [
        {"banned_tokens": [-1]},
        {"banned_tokens": [1.5]},
        {"banned_tokens": [True]},
        {"banned_tokens": [2**31]},
        {"banned_tokens": {"1": 2}},
        {"logit_bias": {"1": 101}},
        {"logit_bias": {"1": "2"}},
        {"logit_bias": {"1": True}},
        {"logit_bias": {"1.0": 2}},
        {"logit_bias": {"-1": 2}},
        {"logit_bias": {"one": 2}},
        {"logit_bias": {"1": math.nan}},
        {"logit_bias": [1, 2]},
        {"logit_bias": "12"},
        {"logit_bias": 1},
        {"logit_bias": {str(token): 1 for token in range(301)}},
        {"banned_texts": "a"},
        {"banned_texts": [""]},
        {"banned_texts": [1]},
        {"banned_texts": ["a"] * 33},
        {"log_probabilities": 1},
        {"unidirectional": "yes"},
        {"text": ["a"]},
    ],
)
def test_other_kinds_are_refused_too(fields):
    with pytest.raises(SamplingError, match=next(iter(fields))):
        TextRequest().with_fields(fields)


def test_the_engines_door_has_the_same_bounds():
    """Whoever builds its settings from Python gets what a line of a job gets."""
    for wrong in ({"top_k": 2**31}, {"temperature": math.nan}, {"repetition_penalty": 1e-40}):
        with pytest.raises(SamplingError, match=next(iter(wrong))):
            Sampling(**wrong)
    for wrong in ({"num_beams": 100_000}, {"length_penalty": math.nan}, {"length_penalty": 1e308}):
        with pytest.raises(SamplingError, match=next(iter(wrong))):
            BeamSearch(**wrong)


def test_every_setting_of_the_table_reaches_the_engine():
    """By the name that it has in the table, but for those that a text's tokens are made from."""
    changed = {}
    for name, setting in SETTINGS.items():
        if setting.kind in (int, float) and name not in ("seed", "max_tokens", "priority"):
            lower = setting.lowest + (setting.highest - setting.lowest) // 2
            changed[name] = (7,) if setting.max_items else setting.kind(lower or 1)
            if setting.is_by_token:
                changed[name] = ((7, 1.5), (8, -2.0))
    searched = {name for name in changed if SETTINGS[name].is_for_search}
    sampled = TextRequest(**{k: v for k, v in changed.items() if k != "num_beams"}).choice(list)
    found = TextRequest(**{name: changed[name] for name in searched}).choice(list)
    assert isinstance(sampled, Sampling)
    assert isinstance(found, BeamSearch)
    for name, value in changed.items():
        if name not in ("num_beams", "length_penalty"):
            assert getattr(sampled, name) == value
    for name in searched:
        assert getattr(found, name) == changed[name]


def test_unknown_fields_are_refused():
    with pytest.raises(RequestError, match="unknown field 'options'"):
        TextRequest().with_fields({"options": {"a": 1}})


@pytest.mark.parametrize("model", [CompletionRequest, FillRequest])
def test_the_servers_schema_has_the_tables_bounds(model):
    properties = model.model_json_schema()["properties"]
    # OpenAI's interface has another range of these, or means another thing.
    narrower = {"temperature": {"maximum": 2}, "seed": {"minimum": 1 - 2**53, "maximum": 2**53 - 1}}
    if model is CompletionRequest:
        narrower["max_tokens"] = {"minimum": 0}
    assert set(OUR_SETTINGS) <= set(properties)
    compared = 0
    for name in NUMBERS:
        for kind in properties.get(name, {}).get("anyOf", ())[:1]:
            table = {"minimum": SETTINGS[name].lowest, "maximum": SETTINGS[name].highest}
            expected = table | narrower.get(name, {})
            assert {k: kind[k] for k in expected} == expected, name
            compared += 1
    assert compared >= 8
    assert json.dumps(properties["banned_texts"]).count('"maxItems": 32') == 1
    assert json.dumps(properties["logit_bias"]).count('"maxProperties": 300') == 1


def _markdown_table():
    """The table as docs/decoding.md has it."""
    lines = ["| setting | type | range | default | what it does |", "|" + " --- |" * 5]
    for name, setting in SETTINGS.items():
        of_items = " by token" if setting.is_by_token else " list"
        kind = setting.kind.__name__ + ("" if setting.max_items is None else of_items)
        default = "" if setting.default in (None, ()) else f"{setting.default}".lower()
        of_range = setting.range.removeprefix("from ")
        lines.append(f"| `{name}` | {kind} | {of_range} | {default} | {setting.help} |")
    return "\n".join(lines) + "\n"


def test_the_docs_have_the_table():
    docs = Path(__file__).parents[2] / "docs" / "decoding.md"
    assert _markdown_table() in docs.read_text(encoding="utf-8")
