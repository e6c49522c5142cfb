"""Text goes to ids in icetk's layout and comes back as it was."""

import dataclasses
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.config import SpecialTokens
from glm_jax.errors import UserError
from glm_jax.tokenizer import (
    CONFIG_FILE,
    MODEL_FILE,
    Tokenizer,
    TokenizerConfig,
    TokenizerError,
    save_tokenizer,
    train_tokenizer,
)

TEXTS = [
    "",
    "The capital of France is Paris.",
    "日本的首都是东京。",
    "Beijing 北京 is 中国的首都, isn't it?",
    "first line\nsecond line\n\n  indented\tby a tab",
    "smile \U0001f600 and flag \U0001f1eb\U0001f1f7 é ß Ω",
    " blank at both ends ",
    "   ",
    "\n",
    "many          blanks",
]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from("\n\t ")))
@settings(max_examples=300, deadline=None)
def test_round_trip_of_any_text(tokenizer, text):
    # U+2581 is how sentencepiece writes a blank; it alone cannot come back as itself.
    if "\u2581" not in text and "<" not in text and "[" not in text:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_icetk_layout_is_the_default(tokenizer, tmp_path):
    """A bare sentencepiece model: text from 20000, special tokens at 150000."""
    model = tmp_path / "ice_text.model"
    model.write_bytes(tokenizer.files[0].read_bytes())
    icetk = Tokenizer(model)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = processor.EncodeAsIds("The capital of France")
    assert icetk.encode("The capital of France") == [20000 + piece for piece in pieces]
    assert icetk.encode("[MASK][gMASK][sMASK]") == [150000, 150001, 150002]
    assert icetk.encode("<eod><sop><eop><ENC><dBLOCK>") == [*range(150003, 150008)]
    assert icetk.special_tokens.eos == 20002 == 20000 + processor.eos_id()
    assert icetk.vocab_size == 150008
    # Each part of the text is encoded by itself, as the original does.
    expected = [20000 + p for p in processor.EncodeAsIds("Paris is in ")]
    assert icetk.encode("Paris is in [MASK]") == [*expected, 150000]


def test_small_layout(tokenizer):
    special = tokenizer.special_tokens
    assert special.mask == special.gmask - 1 == special.smask - 2
    assert special.eos == 2
    assert tokenizer.vocab_size == special.dblock + 1
    assert min(tokenizer.encode("Paris")) > 2


def test_a_blank_looks_in_a_prompt_as_in_running_text(tokenizer):
    for whole, prompt, answer in (
        ("The capital of France is Paris.", "The capital of France is [MASK].", "Paris"),
        ("日本的首都是东京。", "日本的首都是[MASK]。", "东京"),
    ):
        ids = tokenizer.encode(prompt)
        position = ids.index(tokenizer.special_tokens.mask)
        before, after = ids[:position], ids[position + 1 :]
        running = tokenizer.encode(whole)
        assert running[: len(before)] == before
        assert running[len(running) - len(after) :] == after
        blank = running[len(before) : len(running) - len(after)]
        assert tokenizer.decode(blank).strip() == answer


def test_the_blank_before_a_mask_belongs_to_its_answer_wherever_the_mask_is(tokenizer):
    mask = tokenizer.special_tokens.mask
    once = tokenizer.encode("x [MASK]")
    assert once == [*tokenizer.encode("x"), mask]
    # The same words again behind the mask, the last blank of the text included.
    twice = tokenizer.encode("x [MASK] x ")
    assert twice[: len(once)] == once
    assert tokenizer.decode(twice) == "x[MASK] x "


def test_decode_names_or_skips_special_tokens(tokenizer):
    special = tokenizer.special_tokens
    ids = [*tokenizer.encode("Paris"), special.eop, special.mask]
    assert tokenizer.decode(ids) == "Paris<eop>[MASK]"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Paris"
    assert tokenizer.decode([10**6]) == "<|1000000|>"


def test_a_saved_tokenizer_is_the_same(tokenizer):
    again = Tokenizer(tokenizer.files[0].parent)
    assert again.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])
    assert again.special_tokens == tokenizer.special_tokens


def test_missing_or_broken_files_are_refused(tokenizer, tmp_path):
    with pytest.raises(TokenizerError, match="is missing"):
        Tokenizer(tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match="not a sentencepiece model"):
        Tokenizer(tmp_path)
    model = tokenizer.files[0].read_bytes()
    save_tokenizer(tmp_path, model, TokenizerConfig(0, SpecialTokens(mask=5)))
    with pytest.raises(TokenizerError, match=r"overlap \(\[MASK\]\)"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"special_tokens": {}, "offset": 3}')
    with pytest.raises(TokenizerError, match="offset"):
        Tokenizer(tmp_path)
    for wrong in ("[]", "null", '{"special_tokens": null}', '{"special_tokens": [1]}', "["):
        (tmp_path / "tokenizer_config.json").write_text(wrong)
        with pytest.raises(TokenizerError, match=r"json(: expected an object| is not JSON)"):
            Tokenizer(tmp_path)


def test_no_line_is_left_out_of_training(tmp_path):
    # Two letters in lines that sentencepiece passes over: too long, a reserved character, NUL.
    texts = ["some words", "é" * 40_000, "zq \u2585 zq", "zx\0zx", "<eop>[MASK]</s>"]
    tokenizer = train_tokenizer(texts * 3, tmp_path, 300)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.files[0]))
    assert not any(piece.startswith("<0x") for piece in processor.EncodeAsPieces("éqx<M"))
    special = set(dataclasses.asdict(tokenizer.special_tokens).values())
    assert special.isdisjoint(tokenizer.encode("<eop>[MASK]</s>", ()))


@pytest.mark.parametrize("text", ["a \ud83d b", "[MASK] \udc80", "\ud83d"])
def test_half_a_character_is_an_error_of_its_text(tokenizer, tmp_path, text):
    with pytest.raises(UserError, match="half of a character"):
        tokenizer.encode(text)
    with pytest.raises(UserError, match="half of a character"):
        train_tokenizer(["fine", text], tmp_path, 500)
    assert tokenizer.encode("fine")


@pytest.mark.parametrize(
    ("name", "value"),
    [("eop", -1), ("sop", 1.5), ("mask", "150000"), ("eos", None), ("eod", True), ("enc", 2**31)],
)
def test_ids_that_are_none_are_refused(tokenizer, tmp_path, name, value):
    model = tokenizer.files[0].read_bytes()
    special = dataclasses.asdict(tokenizer.special_tokens) | {name: value}
    for config in ({"special_tokens": special}, {"special_tokens": {}, "text_offset": value}):
        save_tokenizer(tmp_path, model, TokenizerConfig())
        text = json.dumps({"text_offset": 0} | config)
        (tmp_path / CONFIG_FILE).write_text(text, encoding="utf-8")
        with pytest.raises(TokenizerError, match=f"{CONFIG_FILE}: .*: expected an int"):
            Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[" * 100_000, b"{}", b"[]", b"3", b'{"special_tokens": 3}', None]
)
def test_a_config_that_is_none_is_refused(tokenizer, tmp_path, content):
    (tmp_path / MODEL_FILE).write_bytes(tokenizer.files[0].read_bytes())
    if content is None:
        (tmp_path / CONFIG_FILE).mkdir()
    else:
        (tmp_path / CONFIG_FILE).write_bytes(content)
    with pytest.raises(TokenizerError, match=CONFIG_FILE):
        Tokenizer(tmp_path)


def test_no_text_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="no text"):
        train_tokenizer([""], tmp_path, 500)
