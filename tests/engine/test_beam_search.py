"""Beam search equals the original's, token for token, in every setting that it recorded."""

import dataclasses
import json
import re

import jax
import pytest
from conftest import GOLDEN
from stub_tokenizer import WordTokenizer

from glm_jax.config import SpecialTokens
from glm_jax.engine import forking_decoder
from glm_jax.engine.beam_search import BeamSearch, beam_search
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.generation_settings import SamplingError
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request
from glm_jax.engine.sampling import Sampling
from glm_jax.engine.stepwise import finish
from glm_jax.generation.beam_filling import filling_by_beams
from glm_jax.generation.blank_filling import (
    PartlyFilled,
)
from glm_jax.generation.driver import complete_all
from glm_jax.model import params as glm_params
from glm_jax.sharding import make_mesh

DECODE = json.loads((GOLDEN / "decode.json").read_text())["cases"]
SLOW = pytest.mark.slow
FILL = [c for c in json.loads((GOLDEN / "fill_blanks.json").read_text()) if c["kind"] == "beam"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("number", "page_size"),
    [(0, 64), (2, 4), *(pytest.param(i, 8, marks=SLOW) for i in (1, 3, 4, 5))],
)
def test_every_setting_equals_the_original(golden_float32, number, page_size, monkeypatch):
    """Also where beams share many pages."""
    monkeypatch.setattr(forking_decoder, "PAGE_SIZE", page_size)
    config, params = golden_float32
    case = DECODE[number]
    prompt = case["prompt"]
    position = None if prompt["gmask"] else prompt["mask_position"]
    assert len(case["beams"]) == 16
    for recorded in case["beams"]:
        settings = BeamSearch(
            recorded["num_beams"],
            recorded["length_penalty"],
            recorded["no_repeat_ngram_size"],
            recorded["min_gen_length"],
        )
        found = beam_search(
            params,
            config,
            Prompt(tuple(prompt["context"]), position),
            settings,
            max_length=prompt["max_length"],
            end_tokens=prompt["end_tokens"],
        )
        got = [[*prompt["context"], 504, *h.tokens] for h in found]
        expected = [[t for t in row if t >= 0] for row in recorded["output"]]
        assert got == expected, settings
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


@pytest.mark.gpu
@pytest.mark.parametrize("case", FILL, ids=[c["text"] for c in FILL])
def test_filling_equals_the_original(golden_float32, golden_special, case):
    config, params = golden_float32
    tokenizer = WordTokenizer(golden_special)
    partly = PartlyFilled.begin(tokenizer, case["text"], case["out_seq_length"])
    settings = BeamSearch(3, 1.0, no_repeat_ngram=3)
    steps = filling_by_beams(params, config, partly, settings, end_tokens=case["end_tokens"])
    found = finish(steps)
    found = [each.finished(tokenizer) for each, _ in found]
    assert [filled.text for filled in found] == case["answers"]
    assert [filled.blanks[-1] for filled in found] == [blanks[-1] for blanks in case["blanks"]]
    assert list(found[0].blanks) == case["blanks"][0]
    for filled in found:
        assert "".join(text for text, _ in filled.pieces) == filled.text


def test_one_beam_without_ends_is_greedy(golden_float32):
    config, params = golden_float32
    prompt = DECODE[3]["prompt"]
    [found] = beam_search(
        params,
        config,
        Prompt(tuple(prompt["context"]), prompt["mask_position"]),
        BeamSearch(1),
        max_length=prompt["max_length"],
        end_tokens=[],
    )
    assert [*prompt["context"], 504, *found.tokens] == DECODE[3]["greedy"]


# Prompt, max_tokens, end tokens, settings that a search and an engine both take.
_SPECIAL = SpecialTokens(500, 501, 502, 503, 504, 505, 506, 507, 2)
_CASES = {
    "blank": (Prompt((5, 9, 500, 33, 2), 2), 12, None, {}),
    "gmask": (Prompt((5, 9, 33, 501), None), 12, None, {}),
    "unidirectional": (Prompt.unidirectional(range(5, 35), _SPECIAL), 5, None, {}),
    "unidirectional, n-grams": (
        Prompt.unidirectional(range(5, 15), _SPECIAL),
        14,
        (),
        {"no_repeat_ngram": 1},
    ),
    "unidirectional to the last position": (
        Prompt.unidirectional(range(5, 60), _SPECIAL),
        None,
        (),
        {},
    ),
    "min_tokens": (Prompt((5, 9, 500, 33, 2), 2), 12, (504,), {"min_tokens": 4}),
    "n-grams": (Prompt((5, 9, 33, 501), None), 20, (), {"no_repeat_ngram": 2}),
    "bans": (Prompt((5, 9, 33, 501), None), 12, (), {"banned_tokens": tuple(range(200, 400))}),
    "an end at once": (Prompt((5, 9, 500, 33, 2), 2), 12, (504,), {}),
    "to the last position": (Prompt((*range(5, 60), 501), None), None, (), {}),
}


def test_no_beam_ends_its_text_before_min_tokens(golden_float32, greedy):
    """eod ends a text too, though a search goes on after it."""
    config, params = golden_float32
    prompt, count, ends, _ = _CASES["blank"]
    special = dataclasses.replace(_SPECIAL, eod=greedy["blank"][0])
    limits = dict(max_length=len(prompt) + count, end_tokens=ends, special_tokens=special)
    for min_tokens, shortest in ((0, 0), (4, 4)):
        search = BeamSearch(1, min_tokens=min_tokens)
        [found] = beam_search(params, config, prompt, search, **limits)
        length = len(special.without_end(found.tokens, ends))
        assert length == 0 if shortest == 0 else length >= shortest


def _placed(config, params, shape):
    if shape is None:
        return params
    mesh = make_mesh(shape)
    return jax.device_put(
        params, jax.tree.map(lambda a: a.sharding, glm_params.abstract(config, mesh))
    )


@pytest.fixture(scope="module")
def greedy(golden_float32):
    """Each case's answer by the engine."""
    config, params = golden_float32
    engine = Engine(params, config, EngineSettings(4))
    requests = [
        Request(prompt, Sampling(**settings), most, end_tokens=ends)
        for prompt, most, ends, settings in _CASES.values()
    ]
    answers = sorted(complete_all(engine, requests), key=lambda answer: answer.request_id)
    return dict(zip(_CASES, [answer.tokens for answer in answers], strict=True))


@pytest.mark.parametrize("mesh", [None, (1, 1, 1), (2, 2, 2)], ids=str)
def test_one_beam_is_greedy(golden_float32, greedy, mesh):
    """Prompts of all kinds, whatever is banned and wherever they end."""
    config, params = golden_float32
    params = _placed(config, params, mesh)
    names = _CASES if mesh is None else ("blank", "unidirectional to the last position")
    for name in names:
        prompt, most, ends, settings = _CASES[name]
        limit = config.max_sequence_length if most is None else len(prompt) + most
        [found] = beam_search(
            params,
            config,
            prompt,
            BeamSearch(1, **settings),
            max_length=limit,
            end_tokens=ends,
        )
        assert found.tokens == greedy[name], name
        assert len(found.tokens) <= limit - len(prompt)
    assert len(greedy["unidirectional"]) <= 5
    assert len(greedy["unidirectional to the last position"]) == 64 - 57
    assert len(greedy["min_tokens"]) > 4
    assert greedy["an end at once"] == (504,)


def test_a_search_is_the_same_on_every_mesh(golden_float32):
    """No mesh, one of one device, and one of several: answers and scores."""
    config, params = golden_float32
    prompt, *_ = _CASES["unidirectional"]
    find = lambda shape: beam_search(
        _placed(config, params, shape), config, prompt, BeamSearch(3, 0.7), max_length=40
    )
    alone = find(None)
    # Of context, sop and prefix 32 tokens are there: 8 more, at the length that these are of.
    assert {len(each.tokens) for each in alone} == {8}
    for shape in ((1, 1, 1), (2, 2, 2)):
        found = find(shape)
        assert [each.tokens for each in found] == [each.tokens for each in alone]
        for got, expected in zip(found, alone, strict=True):
            assert got.score == pytest.approx(expected.score, abs=1e-4)


def test_a_score_is_over_the_length_of_all_tokens(golden_float32):
    """The prefix counts, as context and sop do."""
    config, params = golden_float32
    prompt = Prompt.unidirectional(range(5, 25), _SPECIAL)
    find = lambda power: beam_search(
        params, config, prompt, BeamSearch(1, power), max_length=len(prompt) + 3, end_tokens=()
    )[0]
    bare, penalised = find(0.0), find(1.0)
    assert penalised.tokens == bare.tokens
    assert penalised.score == pytest.approx(bare.score / ((5 + 22 + 3) / 6), rel=1e-5)


def test_settings_that_cannot_be_are_refused():
    for wrong in ({"num_beams": 0}, {"no_repeat_ngram": -1}, {"min_tokens": -2}):
        with pytest.raises(SamplingError, match=re.escape(next(iter(wrong)))):
            BeamSearch(**wrong)


def test_programs_can_be_compiled_before_the_steps_that_need_them(
    golden_float32, golden_special, caplog
):
    """By anyone, so that a server's other requests do not wait for it."""
    config, params = golden_float32
    tokenizer = WordTokenizer(golden_special)
    partly = PartlyFilled.begin(tokenizer, FILL[0]["text"], FILL[0]["out_seq_length"])
    settings = BeamSearch(2)
    jax.clear_caches()
    of_steps, ahead = [], []
    compiled = lambda: [
        found.group(1)
        for record in caplog.records
        if (found := re.match(r"Finished XLA compilation of jit\((\w+)\)", record.getMessage()))
    ]
    with jax.log_compiles(True):
        steps = filling_by_beams(params, config, partly, settings, 4)
        for compile_next in steps:
            of_steps += compiled()
            caplog.clear()
            if compile_next is not None:
                compile_next()
                ahead += compiled()
                caplog.clear()
    programs = {"embed", "prefill_layers", "decode", "expand", "copy_pages"}
    assert programs == set(ahead)
    assert not programs & set(of_steps)
