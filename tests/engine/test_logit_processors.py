"""What is forbidden or disfavoured, beside plain loops over tokens."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN  # noqa: F401  # imports of jax come after it

from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.generation_settings import SamplingError
from glm_jax.engine.logit_processors import process_logits, repeated
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request
from glm_jax.engine.sampling import Sampling
from glm_jax.engine.slots import sampling_row
from glm_jax.generation.driver import complete_all

VOCAB = 12


def _restricted(logits, rows, firsts, samplings, ends=()):
    """By the device, all requests at once."""
    lengths = np.array([len(row) for row in rows])
    tokens = np.zeros((len(rows), 40), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        tokens[i, len(row) :] = 3  # what an earlier request left there
    is_end = np.zeros((len(rows), VOCAB), bool)
    is_end[:, list(ends)] = True
    each = [sampling_row(sampling, 0, VOCAB)["logit_processors"] for sampling in samplings]
    stack = lambda name: jnp.stack([getattr(row, name) for row in each])
    stacked = type(each[0])(**{f.name: stack(f.name) for f in dataclasses.fields(each[0])})
    arrays = (jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(firsts), jnp.asarray(is_end))
    return np.asarray(process_logits(jnp.asarray(logits), *arrays, stacked))


def _expected(logits, row, first, sampling, ends=()):
    """The same for one request, in words."""
    scores, answer = logits.astype(np.float64).copy(), row[first:]
    for token in set(row):
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in set(answer):
        scores[token] -= sampling.presence_penalty + sampling.frequency_penalty * answer.count(
            token
        )
    for token, bias in dict(sampling.logit_bias).items():
        scores[token] += bias
    banned = set(sampling.banned_tokens)
    if len(answer) < sampling.min_tokens:
        banned |= set(ends)
    for sequence in sampling.banned_sequences:
        *before, last = sequence
        if not before or answer[-len(before) :] == before:
            banned.add(last)
    size = sampling.no_repeat_ngram
    seen = {tuple(row[i - size + 1 : i + 1]) for i in range(first, len(row)) if i >= size - 1 > -1}
    latest = row[len(row) - size + 1 :] if size > 1 else []
    banned |= {token for token in range(VOCAB) if size and (*latest, token) in seen}
    scores[list(banned)] = -np.inf
    return scores


def test_a_mixture_equals_each_alone_and_the_words():
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, VOCAB, n).tolist() for n in rng.integers(4, 30, 24)]
    firsts = [int(rng.integers(1, len(row) + 1)) for row in rows]
    samplings = [
        Sampling(
            repetition_penalty=float(rng.choice([1.0, 0.7, 1.8])),
            presence_penalty=float(rng.choice([0, 0, 0.7, -1.2])),
            frequency_penalty=float(rng.choice([0, 0, 1.1, -0.3])),
            logit_bias=tuple((int(t), float(rng.normal())) for t in rng.integers(0, VOCAB, 2)),
            no_repeat_ngram=int(rng.integers(0, 4)),
            min_tokens=int(rng.integers(0, 9)),
            banned_tokens=tuple(rng.integers(0, VOCAB, rng.integers(0, 3)).tolist()),
            banned_sequences=tuple(
                tuple(rng.integers(0, VOCAB, n).tolist()) for n in rng.integers(1, 4, 6)
            ),
        )
        for _ in rows
    ]
    logits = rng.normal(0, 2, (len(rows), VOCAB)).astype(np.float32)
    got = _restricted(logits, rows, firsts, samplings, ends=(4, 5))
    for i, (row, first, sampling) in enumerate(zip(rows, firsts, samplings, strict=True)):
        expected = _expected(logits[i], row, first, sampling, ends=(4, 5))
        np.testing.assert_allclose(got[i], expected, rtol=1e-5, atol=1e-6)
        assert np.isinf(got[i]).any() or not np.isinf(expected).any()
    assert np.isinf(got).any(axis=1).mean() > 0.5


def test_a_banned_sequence_is_of_the_answer_alone():
    sampling = Sampling(banned_sequences=((1, 2, 3),))
    logits = np.zeros((3, VOCAB), np.float32)
    # In the answer, half in the context, and not at the end.
    got = _restricted(logits, [[9, 1, 2], [9, 1, 2], [9, 1, 2, 4]], [1, 2, 1], [sampling] * 3)
    assert [np.flatnonzero(np.isinf(row)).tolist() for row in got] == [[3], [], []]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 11, 19, 20, 21, 10**6])
def test_what_would_repeat_is_banned(size):
    rng = np.random.default_rng(0)
    first, length, vocab = 4, 20, 5
    tokens = rng.integers(0, vocab, (3, 32)).astype(np.int32)
    # What repeats for long, and all the same.
    tokens = np.concatenate([tokens, np.tile([3, 1], (1, 16)), np.full((1, 32), 4)]).astype(
        np.int32
    )
    each = lambda value: jnp.full(len(tokens), value)
    got = repeated(jnp.asarray(tokens), each(length), each(first), each(size), vocab)
    for row, is_banned in zip(tokens[:, :length].tolist(), got, strict=True):
        seen = {tuple(row[i - size + 1 : i + 1]) for i in range(first, length) if i >= size - 1}
        latest = tuple(row[max(0, length - size + 1) :])
        expected = [size > 0 and (*latest, token) in seen for token in range(vocab)]
        assert expected == is_banned.tolist()


def test_answers_obey(tiny_model):
    """Through the engine: what a free answer has is banned, and does not come."""
    config, params = tiny_model
    engine = Engine(params, config, EngineSettings(2))
    prompt = Prompt((5, 6, 7, 240), 3)

    def answer(**settings):
        request = Request(prompt, Sampling(**settings), max_tokens=12, end_tokens=(222,))
        return list(next(complete_all(engine, [request])).tokens)

    free = answer()
    assert free[0] not in answer(banned_tokens=(free[0],))
    assert answer(logit_bias=((77, 100.0),)) == [77] * 12
    assert len(set(answer(logit_bias=((77, 15.0), (78, 14.0)), frequency_penalty=1.0))) == 2
    pair = tuple(free[:2])
    without = answer(banned_sequences=(pair,))
    assert without[0] == free[0]
    assert pair not in itertools.pairwise(without)
    twice = answer(no_repeat_ngram=1)
    assert len(set(twice)) == len(twice) == 12
    strict = answer(repetition_penalty=1e6)
    assert len(set(strict)) == 12
    ended = Request(prompt, max_tokens=12, end_tokens=(free[0],))
    [completion] = complete_all(engine, [ended])
    assert (completion.tokens, completion.finish_reason) == ((free[0],), "stop")
    [later] = complete_all(engine, [dataclasses.replace(ended, sampling=Sampling(min_tokens=5))])
    assert len(later.tokens) >= 5
    assert free[0] not in later.tokens[:5]


def test_no_token_ends_a_text_before_min_tokens(tiny_model):
    """Neither an end token nor eod, at which generation goes on, but the text does not."""
    config, params = tiny_model
    special = config.special_tokens
    prompt = Prompt((5, 6, 7, 240), 3)
    biases = ((special.eod, 100.0), (special.eop, 90.0), (special.eos, 90.0))
    engine = Engine(params, config, EngineSettings(2))
    samplings = [Sampling(logit_bias=biases, min_tokens=count) for count in (0, 4)]
    for ends, texts in ((None, [0, 4]), ((), [0, 4]), ((special.eod,), [0, 4])):
        requests = [Request(prompt, sampling, 6, end_tokens=ends) for sampling in samplings]
        answers = sorted(complete_all(engine, requests), key=lambda answer: answer.request_id)
        assert [len(special.without_end(answer.tokens, ends)) for answer in answers] == texts


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"no_repeat_ngram": -1},
        {"min_tokens": -1},
        {"banned_sequences": ((),)},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(SamplingError, match=next(iter(wrong))):
        Sampling(**wrong)
