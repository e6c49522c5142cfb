"""The harness's requests, its package a stub: what is empty, None or full of control words."""

import importlib
import sys
import types

import numpy as np
import pytest
from stub_tokenizer import WordTokenizer

from glm_jax.config import glm_config
from glm_jax.engine.engine import Engine
from glm_jax.engine.request import Token
from glm_jax.errors import UserError
from glm_jax.evaluation.tasks import Model


@pytest.fixture
def harness(monkeypatch, golden_float32, golden_special):
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lm_eval.api.model"].LM = type("LM", (), {})
    sys.modules["lm_eval.api.registry"].register_model = lambda name: lambda made: made
    monkeypatch.delitem(sys.modules, "glm_jax.evaluation.harness", raising=False)
    module = importlib.import_module("glm_jax.evaluation.harness")
    config, params = golden_float32
    model = module.HarnessModel.__new__(module.HarnessModel)
    model._model = Model(params, config, WordTokenizer(golden_special), 256)
    model._max_tokens, model._is_unidirectional = 4, False
    yield module, model
    sys.modules.pop("glm_jax.evaluation.harness", None)


def _requests(*args):
    return [types.SimpleNamespace(args=each) for each in args]


def test_empty_continuations_and_documents_are_certain(harness):
    _, model = harness
    pairs = [("t17 t18", ""), ("t17", " t20 t21"), ("", ""), ("", "t20")]
    found = model.loglikelihood(_requests(*pairs))
    assert found[0] == found[2] == (0.0, True)
    alone = [model.loglikelihood(_requests(pair))[0] for pair in pairs]
    np.testing.assert_allclose([f for f, _ in found], [f for f, _ in alone], atol=1e-5)
    assert max(found[1][0], found[3][0]) < 0
    rolling = model.loglikelihood_rolling(_requests(("",), ("t17 t18",), ("",)))
    assert rolling[0] == rolling[2] == 0.0 > rolling[1]
    assert model.loglikelihood(_requests(("a", ""))) == [(0.0, True)]


def test_unidirectional_contexts_keep_the_chain_rule(harness):
    _, model = harness
    pairs = [("", "t17 t18 t20 t21"), ("", "t17 t18"), ("t17 t18", " t20 t21")]
    for model._is_unidirectional in (True, False):
        whole, context, text = (x for x, _ in model.loglikelihood(_requests(*pairs)))
        assert (abs(whole - context - text) < 1e-4) is model._is_unidirectional


@pytest.mark.parametrize("is_unidirectional", [False, True])
def test_equal_contexts_are_run_once(harness, is_unidirectional):
    _, model = harness
    model._is_unidirectional = is_unidirectional
    context = " ".join(f"t{17 + i % 9}" for i in range(40))
    pairs = [(context, f" t{20 + i} t21 t2{i % 3}" * (1 + i % 2)) for i in range(9)]
    pairs += [("t17 t18", " t20"), ("", " t21"), (context, ""), (context, " t20" * 40)]
    pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    alone = [model.loglikelihood(_requests(pair))[0] for pair in pairs]
    before = model._model.scorer.padding.filled
    together = model.loglikelihood(_requests(*pairs))
    filled = model._model.scorer.padding.filled - before
    np.testing.assert_allclose([x for x, _ in together], [x for x, _ in alone], atol=1e-4)
    assert [x for _, x in together] == [x for _, x in alone]
    assert filled < 64 * 4  # of 10 x 41 tokens of contexts alone


def test_a_continuation_is_summed_whole_or_refused(harness):
    _, model = harness
    longest = " t20" * 63
    [(whole, _)] = model.loglikelihood(_requests(("t17 t18", longest)))
    [(alone, _)] = model.loglikelihood(_requests(("", longest)))
    np.testing.assert_allclose(whole, alone, atol=1e-5)  # no room for a context
    with pytest.raises(UserError, match="of 64 tokens is past the model's 64 positions"):
        model.loglikelihood(_requests(("t17", longest + " t20")))


def test_an_answer_ends_before_eod_and_settings_may_be_none(harness, monkeypatch, golden_special):
    module, model = harness
    submitted = []

    class Answering(Engine):
        is_idle, waiting, slots = False, 0, 1

        def __init__(self, *_):
            pass

        def submit(self, request, is_urgent, turn):
            submitted.append(request)
            return len(submitted) - 1

        def step(self):
            self.is_idle = True
            for request_id in range(len(submitted)):
                for token in (20, golden_special.eod, 21):
                    yield Token(request_id, token, 0.0, None)
                yield Token(request_id, golden_special.eop, 0.0, "stop")

    monkeypatch.setattr(module, "Engine", Answering)
    none = {"temperature": None, "top_k": None, "max_gen_toks": None, "until": None}
    kinds = [none, {"until": ["\n"], "temperature": 0.0, "do_sample": True}, {"temperature": 0.5}]
    kinds += [{"do_sample": True, "temperature": None}, {"do_sample": False, "temperature": 0.5}]
    assert model.generate_until(_requests(*(("t17", kind) for kind in kinds))) == ["t20"] * 5
    assert [request.sampling.temperature for request in submitted] == [0, 0, 0.5, 1, 0]
    assert [request.max_tokens for request in submitted] == [4] * 5
    with pytest.raises(UserError, match="max_gen_toks=0"):
        model.generate_until(_requests(("t17", {"max_gen_toks": 0})))
    with pytest.raises(UserError, match=r"until=\[3\]: expected texts"):
        model.generate_until(_requests(("t17", {"until": [3]})))
    with pytest.raises(UserError, match="temperature='warm'"):
        model.generate_until(_requests(("t17", {"temperature": "warm"})))
    for top_k in (1e400, 2.5):
        with pytest.raises(UserError, match=f"top_k={top_k}: expected a whole number"):
            model.generate_until(_requests(("t17", {"top_k": top_k, "do_sample": True})))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give checkpoint=DIR"),
        ({"checkpoint": 7}, "checkpoint=7: expected text"),
        ({"checkpoint": "missing", "mesh": 1}, "mesh=1: expected text"),
        (
            {"checkpoint": "missing", "unidirectional": "no"},
            "unidirectional='no': expected True or",
        ),
        ({"checkpoint": "missing", "batch": 1}, "unknown: batch"),
    ],
)
def test_arguments_of_another_kind(arguments, message, harness):
    """The harness makes numbers of what looks like one."""
    with pytest.raises(UserError, match=message):
        harness[0].HarnessModel(**arguments)


def test_control_words_of_the_harness_are_text(harness, tokenizer):
    _, model = harness
    config = glm_config(
        "tiny", vocab_size=tokenizer.vocab_size, special_tokens=tokenizer.special_tokens
    )
    model._model = Model(model._model.params, config, tokenizer, 128)
    special = tokenizer.special_tokens
    for context, text in [("a [MASK] <eop>", " <sop>[gMASK]"), ("", "<eod>")]:
        ids = [token for part in model._pair(context, text) for token in part]
        assert tokenizer.decode(ids) == context + text
        assert not any(token in tokenizer._special_ids for token in ids)
        assert special.mask not in ids
