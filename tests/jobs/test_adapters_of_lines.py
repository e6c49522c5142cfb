"""Lines that name an adapter get what each gets from a model with that adapter alone."""

import json

import jax
import pytest
from drawn_adapters import drawn, merged
from stub_tokenizer import WordTokenizer

from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.generation.text_request import TextRequest
from glm_jax.jobs.request_files import read_lines
from glm_jax.jobs.request_runner import RequestRunner
from glm_jax.model.adapters import AdapterConfig, attach_several
from glm_jax.model.params import cast_params

ADAPTER = AdapterConfig(rank=4)
LINES = [
    {"text": "t5 [MASK] t9 [MASK]"},
    {"text": "t5 t6 t7", "unidirectional": True},
    {"text": "t5 [MASK] t9", "choices": ["t7 t8", "t30"]},
]


def _records(params, config, tokenizer, path, lines, **options):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = EngineSettings(1, 32, page_size=16, prefill_width=32)
    engine = Engine(params, config, settings, tokenizer.special_tokens)
    runner = RequestRunner(engine, params, config, tokenizer, **options)
    records = runner.answer(read_lines(path, TextRequest(max_tokens=6)))
    return sorted(records, key=lambda record: record["index"])


def test_a_line_names_its_adapter(golden_float32, golden_special, tmp_path):
    config, params = (
        golden_float32[0].replace(num_layers=1),
        cast_params(golden_float32[1], "float32"),
    )
    params = params.replace(layers=jax.tree.map(lambda x: x[:1], params.layers))  # soon compiled
    tokenizer, path = WordTokenizer(golden_special), tmp_path / "in.jsonl"
    pairs = drawn(config, ADAPTER, seed=1)
    several = attach_several(
        params, [(ADAPTER, drawn(config, ADAPTER)), (ADAPTER, pairs)], "float32"
    )
    wrong = [{"text": "t5", "adapter": "third"}, {"text": "t5", "adapter": 1}]
    lines = [*LINES, *(line | {"adapter": "second"} for line in LINES), *wrong]
    names = ("first", "second")
    *got, unknown, no_name = _records(several, config, tokenizer, path, lines, adapters=names)
    models = (params, merged(params, pairs, ADAPTER.scale))
    alone = [x for each in models for x in _records(each, config, tokenizer, path, LINES)]
    for record, expected in zip(got, alone, strict=True):
        assert record["text"] == expected["text"]
        assert record["finish_reason"] == expected["finish_reason"]
        logs = [
            [x["log_probability"] for x in each.get("choices", [])] for each in (record, expected)
        ]
        assert logs[0] == pytest.approx(logs[1], abs=2e-4)
    texts = [record["text"] for record in got]
    assert sum(own != other for own, other in zip(texts[:3], texts[3:], strict=True)) > 0
    assert unknown["error"] == "adapter='third': this job's adapters by name: first, second"
    assert no_name["error"] == "adapter=1: expected str, got int"
