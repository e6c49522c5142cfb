"""Beam search equals the original's, token for token, in every setting that it recorded."""

import json
import re

import jax
import pytest
from conftest import GOLDEN
from stub_tokenizer import WordTokenizer

from glm_jax.decoding.beams import BeamSearch, beam_search, finish
from glm_jax.decoding.blank_filling import PartlyFilled, filling_by_beams
from glm_jax.decoding.prompt import Prompt
from glm_jax.decoding.settings import SamplingError

DECODE = json.loads((GOLDEN / "decode.json").read_text())["cases"]
SLOW = pytest.mark.slow
FILL = [c for c in json.loads((GOLDEN / "fill_blanks.json").read_text()) if c["kind"] == "beam"]


@pytest.mark.gpu
@pytest.mark.parametrize("number", [0, 2, *(pytest.param(i, marks=SLOW) for i in (1, 3, 4, 5))])
def test_every_setting_equals_the_original(golden_float32, number):
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
    programs = {"prefill", "expand", "_follow", "decode_step"}
    assert programs == set(ahead)
    assert not programs & set(of_steps)
