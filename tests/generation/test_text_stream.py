"""Text that is given out bit by bit joins to the whole."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.engine.prompt import PromptError
from glm_jax.generation.blank_filling import PartlyFilled
from glm_jax.generation.text_stream import Stops, TextStream


@pytest.mark.parametrize("seed", range(20))
def test_parts_join_to_what_all_tokens_decode_to(tokenizer, seed):
    """Random tokens: bytes of characters that never end, blanks and line breaks among them."""
    rng = np.random.default_rng(seed)
    before = rng.integers(0, tokenizer.vocab_size, rng.integers(0, 20)).tolist()
    answer = rng.integers(0, tokenizer.vocab_size, 60).tolist()
    # Tokens without text, bytes and words with a blank before them, after each other.
    few = [0, 1, 2, 3, 200, 201, *tokenizer.encode("The capital of France is\n Paris")]
    answer += rng.choice(few, 60).tolist()
    stream = TextStream(tokenizer.decode, before)
    parts = [stream.add(token) for token in answer] + [stream.finish()]
    whole = tokenizer.decode([*before, *answer])
    assert tokenizer.decode(before) + "".join(parts) == whole


def test_a_character_comes_when_it_is_whole(tokenizer):
    answer = tokenizer.encode("日本𓀀𓀀 ok")  # not in the corpus: bytes
    stream = TextStream(tokenizer.decode)
    parts = [stream.add(token) for token in answer]
    assert "".join(parts) == "日本𓀀𓀀 ok"
    assert "𓀀" in parts
    assert not any("\ufffd" in part for part in parts)
    assert parts.count("") >= 6  # the first three bytes of each


def test_a_word_keeps_its_blank(tokenizer):
    before, answer = (
        tokenizer.encode("The capital of"),
        tokenizer.encode("The capital of France is"),
    )
    assert answer[: len(before)] == before
    stream = TextStream(tokenizer.decode, before)
    assert stream.add(answer[len(before)]) == " France"
    assert tokenizer.decode(answer[len(before) :][:1]) == "France"


@settings(deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_stops_cut_wherever_the_parts_end(text, stops, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    cutter = Stops(stops)
    given_out = ""
    for first, end in itertools.pairwise(edges):
        given_out += cutter.add(text[first:end])
        if cutter.has_stopped:
            break
    given_out += cutter.finish()
    # The first stop that is complete ends the answer, as token by token.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert cutter.has_stopped == bool(ends)
    if not ends:
        assert given_out == text
    else:
        assert text.startswith(given_out)
        assert not any(stop in given_out for stop in stops)


def test_a_text_far_too_long_is_refused_before_it_is_tokenised(tokenizer, monkeypatch):
    def encode(*_, **__):
        raise AssertionError("tokenised")

    monkeypatch.setattr(tokenizer, "encode", encode)
    refused = r"the text has 2561 characters: no room .* in 10 tokens"
    with pytest.raises(PromptError, match=refused):
        PartlyFilled.begin(tokenizer, "x" * 2561, 10)
