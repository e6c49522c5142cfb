"""Samples hide what the paper says, and lose nothing."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.config import SpecialTokens
from glm_jax.data import facts
from glm_jax.data.documents import (
    find_files,
    parse_instruction,
    read_documents,
    tokenize,
)
from glm_jax.data.objective import (
    KINDS,
    ObjectiveConfig,
    instruction_sample,
    make_sample,
    span_sample,
    suffix_sample,
)
from glm_jax.data.pipeline import Batches, Mixture
from glm_jax.data.records import DataError, Record, in_memory

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


def test_eod_ends_a_suffix_and_gives_way_in_a_span_sample():
    rng = np.random.default_rng(0)
    text = np.array([11, 12, 13, 14, SPECIAL.eod])
    suffix = suffix_sample(text, SPECIAL, rng, 40)
    assert suffix.targets[-2:].tolist() == [SPECIAL.eod, SPECIAL.eop]
    span = span_sample(text, SPECIAL, ALWAYS_SPANS, rng, 40)
    assert SPECIAL.eod not in span.tokens


def test_of_a_long_text_any_piece_is_taken():
    record = Record(np.arange(10, 510))
    rng = np.random.default_rng(0)
    samples = [make_sample(record, SPECIAL, ObjectiveConfig(), rng, 60) for _ in range(200)]
    assert max(len(sample.tokens) for sample in samples) <= 60
    seen = {token for sample in samples for token in sample.tokens.tolist()}
    assert len(seen & set(range(10, 510))) > 480
    shares = [sample.kinds[0] == KINDS.index("span") for sample in samples]
    assert np.mean(shares) == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize(
    ("prompt", "target", "mask", "context", "first_position", "step"),
    [
        ([11, 12], [21, 22], None, [11, 12, SPECIAL.mask], 2, 0),
        ([11, 12], list(range(21, 31)), None, [11, 12, SPECIAL.gmask], 3, 1),
        ([11, 12], [21], "gmask", [11, 12, SPECIAL.gmask], 3, 1),
        ([11], list(range(21, 31)), "mask", [11, SPECIAL.mask], 1, 0),
        ([SPECIAL.smask, 12], [21, 22], "gmask", [SPECIAL.smask, 12, SPECIAL.eos], 0, 0),
        (
            [11, SPECIAL.mask, 12],
            [21],
            None,
            [11, SPECIAL.mask, 12, SPECIAL.eos],
            1,
            0,
        ),
    ],
)
def test_instructions_are_answered_after_their_mask(
    prompt, target, mask, context, first_position, step
):
    record = Record(np.array(prompt + target), len(prompt), mask)
    sample = instruction_sample(record, SPECIAL, ObjectiveConfig(), 40)
    length = len(context)
    assert sample.tokens.tolist() == [*context, SPECIAL.sop, *target]
    assert sample.targets[length:].tolist() == [*target, SPECIAL.eop]
    np.testing.assert_array_equal(sample.loss_weights, np.arange(len(sample.tokens)) >= length)
    expected = first_position + step * np.arange(len(target) + 1)
    np.testing.assert_array_equal(sample.position_ids[length:], expected)
    assert (sample.kinds == KINDS.index("instruction")).all()


def test_an_instruction_too_long_loses_its_beginning():
    record = Record(np.arange(10, 110), 90)
    sample = instruction_sample(record, SPECIAL, ObjectiveConfig(), 40)
    assert len(sample.tokens) == 40
    assert sample.targets[-11:].tolist() == [*range(100, 110), SPECIAL.eop]
    assert sample.context_length[0] == 29


@given(st.lists(st.integers(0, 2**31 - 1)), st.sampled_from([None, "mask", "gmask"]), st.booleans())
def test_a_record_comes_back_as_it_was(tokens, mask, is_text):
    record = Record(np.array(tokens, np.int32), None if is_text else len(tokens) // 2, mask)
    again = Record.decode(record.encode())
    assert again.tokens.tolist() == tokens
    assert (again.prompt_length, again.mask) == (record.prompt_length, mask)


def _records(count, first=3, length=30):
    rng = np.random.default_rng(first)
    return [
        Record(rng.integers(first, first + 50, rng.integers(1, length)).astype(np.int32))
        for _ in range(count)
    ]


def _mixture(seed=0, streams=4, datasets=None, weights=(1.0,)):
    return Mixture(
        datasets=datasets or [in_memory("text", _records(40))],
        weights=weights,
        special=SPECIAL,
        objective=ObjectiveConfig(),
        sequence_length=64,
        rows=4,
        streams=streams,
        seed=seed,
    )


def _batches(seed=0):
    return Batches(_mixture(seed))


def test_a_mixture_has_the_asked_for_shares_of_tokens():
    datasets = [
        in_memory("en", _records(200, 3, 60)),
        in_memory("zh", _records(300, 100, 12)),
        in_memory("tasks", [Record(np.array([300, 301, 302], np.int32), 2)] * 50),
    ]
    batches = Batches(_mixture(datasets=datasets, weights=(6.0, 3.0, 1.0)))
    counts = np.zeros(3)
    for _ in range(300):
        groups = next(batches)
        real = groups["segment_ids"] > 0
        counts += np.bincount(groups["groups"][real] // len(KINDS), minlength=3)
    # Masks, sop, eop and eos come on top of each sample's tokens.
    assert counts[0] / counts.sum() == pytest.approx(0.55, abs=0.06)
    assert counts[1] / counts.sum() == pytest.approx(0.30, abs=0.06)
    assert 0.05 < counts[2] / counts.sum() < 0.25


@pytest.mark.parametrize("streams", [4, 2])
def test_batches_are_the_same_for_any_number_of_processes(streams):
    alone = Batches(_mixture(streams=streams))
    parts = [Batches(_mixture(streams=streams), [number]) for number in range(streams)]
    for _ in range(4):
        expected = next(alone)
        rows = [next(part) for part in parts]
        for name, array in expected.items():
            np.testing.assert_array_equal(array, np.concatenate([row[name] for row in rows]))
    states = [part.get_state() for part in parts]
    assert {k: v for state in states for k, v in state.items()} == alone.get_state()


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
        (
            "a.jsonl",
            b'{"text": "x"}\n{"txt": 1}\n',
            r"""a\.jsonl:2: not a JSON object with "text\"""",
        ),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1"),
        ("a.jsonl", b'{"text": 5}\n', "is not a string"),
        ("a.txt", b"\xff\n", r"a\.txt:1: not UTF-8 at byte 1"),
        ("a.txt", b"\n", "no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "a \\ud83d"}', r"a\.jsonl:2: \"text\": \\ud83d at"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not JSON: nested"),
        ("a.jsonl", b'{"text": null}', "is not a string"),
    ],
)
def test_bad_text_is_refused(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        tokenize(find_files(str(tmp_path / name)), tokenizer, 32)


def test_control_words_in_documents_and_answers_are_text(tmp_path, tokenizer):
    text = "GLM ends spans by <eop> after <sop>, hides [MASK] [gMASK] [sMASK]<eod></s><ENC><dBLOCK>"
    special = dataclasses.asdict(tokenizer.special_tokens)
    (tmp_path / "a.txt").write_text(text)
    documents = tokenize(find_files(str(tmp_path / "a.txt")), tokenizer, 500)
    [record] = documents.records
    assert tokenizer.decode(record.tokens.tolist()) == text + "<eod>"
    assert set(record.tokens[:-1].tolist()).isdisjoint(special.values())
    pair = parse_instruction(json.dumps({"prompt": text, "target": text}).encode(), tokenizer)
    prompt, target = np.split(pair.tokens, [pair.prompt_length])
    assert tokenizer.decode(target.tolist()) == text
    assert set(target.tolist()).isdisjoint(special.values())
    masks = [special[name] for name in ("mask", "gmask", "smask")]
    assert [t for t in prompt.tolist() if t in special.values()] == masks


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
    relations = {"capital", "continent", "currency", "symbol", "number", "sum"}
    assert {q.relation for q in corpus.questions} == relations
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
