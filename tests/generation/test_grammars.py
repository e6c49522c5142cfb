"""Grammars: every text that is asked for, spelled by any tokens, and no other."""

import functools
import io
import json
import re

import numpy as np
import pytest
import sentencepiece
from conftest import GOLDEN  # noqa: F401  # imports of jax come after it
from stub_tokenizer import WordTokenizer

from glm_jax.errors import UserError
from glm_jax.generation import grammars
from glm_jax.generation.blank_filling import PartlyFilled
from glm_jax.generation.grammars import GrammarError, compile_grammar
from glm_jax.generation.text_request import TextRequest
from glm_jax.tokenizer import Tokenizer, TokenizerConfig, save_tokenizer

CHOICES = (
    "Paris",
    "Rome",
    "Paris région",
    "东京",
    "東京都",
    'a"b\\c\n/d',
    " x",
    "  y",
    "e|(",
    "😀é",
    "▁",
)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["ja", "nein", None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


# Small as it is written, large as a grammar.
_OPTIONAL = [
    [{"type": "object", "properties": {f"p{i}_{j}": {"type": "string"}}} for j in range(4)]
    for i in range(6)
]
LARGE = {"allOf": [{"anyOf": options} for options in _OPTIONAL]}
NESTED = functools.reduce(lambda inner, _: {"type": "array", "items": inner}, range(300), {})


def _guide(tokenizer, **fields):
    return TextRequest().with_fields(fields).guide(tokenizer)


def _allowed(tokenizer, state):
    mask = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
    may_end = state.allow(mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")), may_end


def _walk(tokenizer, guide, seed, most=60):
    """The text of an answer of random tokens, some taken back and given again; None past `most`."""
    state, rng, tokens = guide.start(), np.random.default_rng(seed), []
    for _ in range(most):
        allowed, may_end = _allowed(tokenizer, state)
        assert may_end or len(allowed)
        if may_end and (not len(allowed) or rng.random() < 0.5):
            return tokenizer.decode(tokens)
        tokens.append(int(rng.choice(allowed)))
        state.accept(tokens[-1])
        if rng.random() < 0.3:
            count = int(rng.integers(1, len(tokens) + 1))
            state.rollback(count)
            for token in tokens[-count:]:
                state.accept(token)
    return None


@pytest.fixture(scope="session")
def icetk(tmp_path_factory):
    """A tokenizer whose model takes all spaces from the beginning of a text, as icetk's does."""
    model, folder = io.BytesIO(), tmp_path_factory.mktemp("icetk")
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["The Paris of the east is in France and Rome", "我是东京"] * 40),
        model_writer=model,
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        remove_extra_whitespaces=True,
        minloglevel=2,
    )
    save_tokenizer(folder, model.getvalue(), TokenizerConfig(segments="separate"))
    return Tokenizer(folder)


@pytest.fixture(params=["own", "icetk"])
def any_tokenizer(request, tokenizer, icetk):
    return {"own": tokenizer, "icetk": icetk}[request.param]


@pytest.mark.parametrize("is_spaced", [None, True, False])
def test_every_choice_comes_and_nothing_else(any_tokenizer, is_spaced):
    choices = CHOICES
    if any_tokenizer.decode(any_tokenizer.encode(" x")) == "x":  # it has no space there
        choices = tuple(choice for choice in choices if not choice.startswith(" "))
    for seed, choice in enumerate(choices):
        guide = _guide(any_tokenizer, guided_choice=[choice]).behind(is_spaced)
        assert _walk(any_tokenizer, guide, seed) == choice
    guide = _guide(any_tokenizer, guided_choice=choices).behind(is_spaced)
    texts = {_walk(any_tokenizer, guide, seed) for seed in range(20)}
    assert texts <= set(choices)
    assert len(texts) > 1


def test_a_choice_that_begins_another_may_go_on(tokenizer):
    guide = _guide(tokenizer, guided_choice=["Paris", "Paris région", "Paris"])
    assert {_walk(tokenizer, guide, seed) for seed in range(12)} == {"Paris", "Paris région"}


@pytest.mark.parametrize(
    "regex",
    [
        "[0-9]{4}-[0-9]{2}",
        "(yes|no), [一-龥]{1,4}",
        "^a b  c$",
        ".{3,8}",
        "a*",
        "[^a/]{1,5}/",
        "(?i)paris|x y",
        "(?s)[<n>]{1,12}",
    ],
)
def test_answers_match_a_regular_expression(any_tokenizer, regex):
    guide = _guide(any_tokenizer, guided_regex=regex)
    for seed in range(6):
        assert re.fullmatch(regex, _walk(any_tokenizer, guide, seed))


@pytest.mark.parametrize("seed", range(6))
def test_answers_fit_a_json_schema(tokenizer, seed):
    value = json.loads(_walk(tokenizer, _guide(tokenizer, guided_json=PERSON), seed))
    assert value.keys() == {"name", "age", "tags"}
    assert len(value["name"]) <= 9
    assert 0 <= value["age"] <= 150
    assert set(value["tags"]) <= {"ja", "nein", None}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The capital of France is [MASK].", (True,)),
        ("日本的首都是[MASK]。", (False,)),
        ("[MASK] is ([sMASK]) of [MASK]", (None, True)),
        ("x\n[sMASK] [sMASK]", (False, True)),
        ("The capital of France is", (None,)),
        ("The capital of France is ", (False,)),
        ("The capital of France is [gMASK]", (True,)),
    ],
)
def test_a_blank_begins_with_the_space_that_is_left_to_it(tokenizer, text, expected):
    partly = PartlyFilled.begin(tokenizer, text, 60)
    assert partly.are_spaced == expected
    assert partly.is_spaced == expected[0]
    filled = partly.filled([5], ())
    assert filled.is_spaced == (expected[1] if len(expected) > 1 else None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guided_regex": "(a"}, "guided_regex: unclosed group"),
        ({"guided_regex": "a(?=b)"}, "guided_regex: look-around"),
        ({"guided_regex": "x" * 70_000}, "guided_regex: at most 65536 characters"),
        ({"guided_regex": "\ud800"}, "half of a character"),
        ({"guided_json": {"type": "strin"}}, "guided_json: Invalid type: strin"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json: .*uniqueItems"),
        ({"guided_json": {"$ref": "https://a/b"}}, "guided_json: .*https://a/b"),
        ({"guided_json": LARGE}, "guided_json: .*(too big|too large|too complex)"),
        ({"guided_json": {"type": "array", "items": NESTED}}, "guided_json: "),
        ({"guided_json": "[1]"}, "guided_json='\\[1\\]': expected a JSON object, got list"),
        ({"guided_json": "{"}, "guided_json='{': expected a JSON object: it is no JSON"),
        ({"guided_json": 1}, "guided_json=1: expected a JSON object, got int"),
        ({"guided_choice": ["a", ""]}, "guided_choice holds '': expected a text that is not empty"),
        ({"guided_choice": []}, "guided_choice holds nothing: at least 1, or leave it out"),
        ({"guided_choice": "a"}, "guided_choice='a': expected a list, got str"),
        ({"guided_choice": ["a"] * 1025}, "guided_choice holds 1025 items: at most 1024"),
        ({"guided_choice": ["<n>"]}, "guided_choice: '<n>' cannot be written"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_regex beside guided_choice"),
        ({"guided_choice": ["a"], "num_beams": 2}, "guided_choice=.* beside num_beams=2"),
    ],
)
def test_what_cannot_be_followed_is_one_line(tokenizer, fields, message):
    def ask():
        request = TextRequest().with_fields(fields)
        request.choice(tokenizer.encode)
        request.guide(tokenizer)

    with pytest.raises(UserError, match=message) as caught:
        ask()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_library_or_a_tokenizer_that_is_missing_is_named(tokenizer, monkeypatch, golden_special):
    with pytest.raises(GrammarError, match="a WordTokenizer has no pieces"):
        _guide(WordTokenizer(golden_special), guided_choice=["t5"])
    monkeypatch.setattr(grammars, "is_installed", lambda: False)
    compile_grammar.cache_clear()
    grammars.vocabulary_of.cache_clear()
    with pytest.raises(GrammarError, match=r"pip install 'glm_jax\[guided\]'"):
        _guide(tokenizer, guided_choice=["a"])


def test_a_setting_of_a_line_takes_the_place_of_the_jobs(tokenizer):
    job = TextRequest(guided_choice=("a", "b"))
    assert job.with_fields({"guided_regex": "c"}).guided_choice == ()
    assert job.with_fields({"top_k": 3}).guided_choice == ("a", "b")


def test_what_an_answer_costs_is_no_others(tokenizer, monkeypatch):
    """Each has the limit to itself, however many there were, and begins anew when it is reached."""
    monkeypatch.setitem(grammars._LIMITS, "max_lexer_states", 80)
    guide, rng = _guide(tokenizer, guided_regex="[ab]*a[ab]{20}"), np.random.default_rng(0)
    a, b = (min(t for t, p in tokenizer.pieces().items() if p.text == x) for x in (b"a", b"b"))
    guide.prepare(3)
    for _ in range(9):
        state = guide.start()
        for _ in range(45):
            assert {a, b} <= set(_allowed(tokenizer, state)[0].tolist())
            state.accept(a if rng.random() < 0.5 else b)
        assert state.error is None
