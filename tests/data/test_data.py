"""Samples hide what the paper says, and lose nothing."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.config import SpecialTokens
from glm_jax.data import facts, pipeline
from glm_jax.data.documents import DataError, find_files, read_documents, tokenize
from glm_jax.data.objective import ObjectiveConfig, span_sample, suffix_sample

SPECIAL = SpecialTokens(1000, 1001, 1002, 1003, 1004, 1005, 1006, 1007, 2)
ALWAYS_SPANS = ObjectiveConfig(mask_sequences=1.0)


def _pieces(sample):
    """(tokens, targets, positions) of each generated piece."""
    starts = [*np.flatnonzero(sample.tokens == SPECIAL.sop), len(sample.tokens)]
    for start, stop in itertools.pairwise(starts):
        yield tuple(getattr(sample, f)[start:stop] for f in ("tokens", "targets", "position_ids"))


@given(st.integers(1, 80), st.integers(0, 2**32), st.floats(0.05, 0.6))
@settings(max_examples=300, deadline=None)
def test_spans_put_back_give_the_text(length, seed, share):
    text = np.arange(10, 10 + length)
    config = ObjectiveConfig(masked_tokens=share)
    sample = span_sample(text, SPECIAL, config, np.random.default_rng(seed), 100)
    context_length = int(sample.context_length[0])
    context = sample.tokens[:context_length].tolist()
    assert (context.pop() == SPECIAL.eos) == (sample.tokens[context_length - 1] != SPECIAL.mask)
    if sample.tokens[context_length - 1] == SPECIAL.mask:
        context.append(SPECIAL.mask)
    np.testing.assert_array_equal(sample.position_ids[:context_length], range(context_length))
    filled = {}
    for tokens, targets, positions in _pieces(sample):
        assert set(positions) == {positions[0]}
        assert context[positions[0]] == SPECIAL.mask
        np.testing.assert_array_equal(targets[:-1], tokens[1:])
        assert targets[-1] == SPECIAL.eop
        filled[positions[0]] = tokens[1:].tolist()
    whole = [t for i, token in enumerate(context) for t in filled.get(i, [token])]
    assert whole == text.tolist()
    hidden = sum(map(len, filled.values()))
    assert 1 <= hidden <= max(1, round(share * length))
    np.testing.assert_array_equal(
        sample.loss_weights, np.arange(len(sample.tokens)) >= context_length
    )


@given(st.integers(1, 80), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_suffix_put_back_gives_the_text(length, seed):
    text = np.arange(10, 10 + length)
    sample = suffix_sample(text, SPECIAL, np.random.default_rng(seed), 100)
    context_length = int(sample.context_length[0])
    [(tokens, targets, _)] = _pieces(sample)
    assert sample.tokens[context_length - 1] == SPECIAL.gmask
    assert [*sample.tokens[: context_length - 1], *tokens[1:]] == text.tolist()
    np.testing.assert_array_equal(targets, [*tokens[1:], SPECIAL.eop])
    np.testing.assert_array_equal(sample.position_ids, range(len(sample.tokens)))


@pytest.mark.parametrize("length", [3, 40, 200])
def test_long_texts_are_cut_to_fit(length):
    for seed in range(50):
        rng = np.random.default_rng(seed)
        text = np.arange(10, 10 + length)
        assert len(span_sample(text, SPECIAL, ALWAYS_SPANS, rng, 40).tokens) <= 40
        assert len(suffix_sample(text, SPECIAL, rng, 40).tokens) <= 40


def test_shares_and_lengths_are_the_papers():
    rng = np.random.default_rng(0)
    text = np.arange(10, 410)
    lengths, hidden = [], 0
    for _ in range(300):
        sample = span_sample(text, SPECIAL, ALWAYS_SPANS, rng, 1000)
        spans = [len(tokens) - 1 for tokens, _, _ in _pieces(sample)]
        lengths += spans[:]
        hidden += sum(spans)
    assert hidden / (300 * 400) == pytest.approx(0.15, abs=0.002)
    # Poisson of mean 3 with 0 drawn as 1: 3 + e^-3.
    assert np.mean(lengths) == pytest.approx(3.05, abs=0.15)
    cuts = [
        int(suffix_sample(text, SPECIAL, rng, 1000).loss_weights.sum()) - 1 for _ in range(2000)
    ]
    assert np.mean(cuts) == pytest.approx(200.5, abs=8)
    assert min(cuts) < 10
    assert max(cuts) > 390


def _windows(count=40):
    rng = np.random.default_rng(5)
    return [rng.integers(3, 900, rng.integers(1, 30)).astype(np.int32) for _ in range(count)]


def _batches(seed=0):
    return pipeline.packed_batches(
        _windows(), SPECIAL, ObjectiveConfig(), sequence_length=64, batch_size=4, seed=seed
    )


def test_batches_are_a_function_of_the_seed():
    first, second, third = _batches(), _batches(), _batches(seed=1)
    for _ in range(3):
        a, b, c = next(first), next(second), next(third)
        for name, array in a.items():
            assert array.shape == (4, 64), name
            np.testing.assert_array_equal(array, b[name])
        assert not np.array_equal(a["tokens"], c["tokens"])


def test_a_saved_state_goes_on_to_the_token():
    batches = _batches()
    for _ in range(5):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(5)]
    again = _batches()
    again.set_state(state)
    for batch in expected:
        got = next(again)
        for name, array in batch.items():
            np.testing.assert_array_equal(got[name], array)


def test_packing_keeps_samples_whole():
    batch = next(_batches())
    for row in range(4):
        ids = batch["segment_ids"][row]
        for segment in range(1, ids.max() + 1):
            where = np.flatnonzero(ids == segment)
            assert (np.diff(where) == 1).all()
            context = batch["context_length"][row][where]
            assert (context == context[0]).all()
            assert batch["position_ids"][row][where[0]] == 0
            weights = batch["loss_weights"][row][where]
            np.testing.assert_array_equal(weights, np.arange(len(where)) >= context[0])


def test_documents_of_text_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\r\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "三\\nthree", "id": 1}\n', encoding="utf-8")
    files = find_files(f"{tmp_path}/*.txt,{tmp_path}/b.jsonl")
    assert list(read_documents(files)) == ["one", "two", "三\nthree"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', r"a\.jsonl:2: KeyError"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1"),
        ("a.jsonl", b'{"text": 5}\n', "is not a string"),
        ("a.txt", b"\xff\xfe\n", r"a\.txt:1: UnicodeDecodeError"),
        ("a.txt", b"\n", "no text"),
    ],
)
def test_bad_text_is_refused(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        tokenize(find_files(str(tmp_path / name)), tokenizer, 32)


def test_missing_files_are_refused():
    with pytest.raises(DataError, match="no file matches"):
        find_files("no/such/*.txt")


def test_the_corpus_of_facts(corpus):
    assert len(corpus.sentences) > 3000
    assert len({q.text for q in corpus.questions}) == len(corpus.questions) > 250
    known = set(corpus.sentences)
    for question in corpus.questions:
        assert question.text.count("[MASK]") == 1
        assert question.text.replace("[MASK]", question.answer) not in known
    assert {q.relation for q in corpus.questions} == set(facts.RELATIONS)
    assert facts.build_corpus() == corpus


def test_the_tables_of_facts():
    countries, elements = facts._table("countries.tsv"), facts._table("elements.tsv")
    assert len(countries) >= 100
    assert len(elements) >= 60
    assert [int(e["number"]) for e in elements] == list(range(1, len(elements) + 1))
    for rows, key in ((countries, "country_en"), (countries, "capital_zh"), (elements, "symbol")):
        assert len({row[key] for row in rows}) == len(rows)
    assert all(all(row.values()) for row in (*countries, *elements))


def test_majority_accuracy():
    questions = [facts.Question("", a, "continent", "en") for a in "xxy"]
    questions += [facts.Question("", "z", "continent", "zh")]
    assert facts.majority_accuracy(tuple(questions)) == 3 / 4
