"""Speculative decoding gives what steps of one token give, whatever its drafts are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN  # noqa: F401  # imports of jax come after it

from glm_jax.engine import step_functions
from glm_jax.engine.draft_model import SmallModel, _draft
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.prompt import Prompt, PromptError
from glm_jax.engine.request import Request
from glm_jax.engine.sampling import LogitsError, Sampling
from glm_jax.engine.slots import admit, release
from glm_jax.engine.speculation import DraftCounts, Drafter, Speculation
from glm_jax.generation.driver import SingleRequest, complete_all, drive
from glm_jax.model import params as glm_params
from glm_jax.sharding import make_mesh

# With pages for one of the longest alone, so that requests are preempted for want of them.
SMALL = EngineSettings(slots=4, cache_tokens=64, page_size=4, prefill_width=32)
DRAFTS = 3
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0.9, top_k=40, frequency_penalty=0.7, logit_bias=((13, 2.0),)),
    Sampling(repetition_penalty=1.5, no_repeat_ngram=2, min_tokens=6),
    Sampling(temperature=1.1, top_p=0.8, banned_tokens=(7, 9), banned_sequences=((12,), (4, 5))),
    Sampling(presence_penalty=0.9, no_repeat_ngram=3, min_tokens=9),
)


def _requests():
    """Blanks of every kind and length, some that end by chance, some at the maximum length."""
    rng = np.random.default_rng(1)
    requests = []
    for number in range(15):
        context = (*rng.integers(3, 200, rng.integers(1, 28)).tolist(), 240, 11)
        position = len(context) - 2 if number % 3 else None
        requests.append(
            Request(
                Prompt(context, position, (13, 14)[: number % 3]),
                sampling=SAMPLINGS[number % len(SAMPLINGS)],
                max_tokens=None if number % 5 == 4 else int(rng.integers(1, 24)),
                seed=number,
                end_tokens=tuple(range(8 * (number % 4))),
                log_probabilities=number % 2 == 0,
                top_logprobs=number % 4 == 0,
            )
        )
    return requests


def _answers(engine):
    return sorted(
        drive(engine, map(SingleRequest, _requests())), key=lambda a: a.tokens[0].request_id
    )


def _assert_same(answers, expected):
    for got, wanted in zip(answers, expected, strict=True):
        described = [
            [(token.token, token.finish_reason) for token in answer.tokens]
            for answer in (got, wanted)
        ]
        assert described[0] == described[1]
        for token, other in zip(got.tokens, wanted.tokens, strict=True):
            assert token.log_probability == pytest.approx(other.log_probability, abs=1e-4)
            assert [t for t, _ in token.top_logprobs] == [t for t, _ in other.top_logprobs]


@pytest.fixture(scope="module")
def model(tiny_model):
    """A model whose likeliest token is not the one before it."""
    config, params = tiny_model
    norm = params.final_layernorm
    scale = jax.random.normal(jax.random.key(5), norm.scale.shape)
    return config, params.replace(final_layernorm=norm.replace(scale=scale))


@pytest.fixture(scope="module")
def plain(model):
    """Each request's answer by steps of one token, alone."""
    config, params = model
    return _answers(Engine(params, config, dataclasses.replace(SMALL, slots=1)))


@pytest.fixture
def guesses(plain, monkeypatch):
    """Drafts are what comes next, but for about every fourth, and may go on past the end; the list
    has them all."""
    coming = {
        request.prompt.tokens(244): [token.token for token in answer.tokens]
        for request, answer in zip(_requests(), plain, strict=True)
    }
    rng, given = np.random.default_rng(0), []

    def propose(drafter, count):
        text = tuple(drafter.text)
        [prompt] = [prompt for prompt in coming if text[: len(prompt)] == prompt]
        tokens = [
            *coming[prompt][len(text) - len(prompt) :],
            *rng.integers(0, 200, DRAFTS).tolist(),
        ]
        tokens = tokens[: rng.integers(0, count + 1)]
        is_wrong = rng.random(len(tokens)) < 0.25
        given.append([(t + w) % 200 for t, w in zip(tokens, is_wrong, strict=True)])
        return given[-1]

    monkeypatch.setattr(Drafter, "propose", propose)
    monkeypatch.setattr(Speculation, "measure", lambda *_: (0.01, 0.0))
    return given


def _speculating(model):
    config, params = model
    return Engine(params, config, dataclasses.replace(SMALL, speculate=DRAFTS))


@pytest.mark.parametrize("kind", ["layers apart", "mesh"])
def test_equals_steps_of_one_token(model, plain, guesses, kind):
    config, params = model
    if kind == "mesh":  # layers in a loop, too
        abstract = glm_params.abstract(config, make_mesh((2, 2, 2)))
        params = jax.device_put(params, jax.tree.map(lambda a: a.sharding, abstract))
    engine = _speculating((config, params))
    _assert_same(_answers(engine), plain)
    assert engine.drafts.checked == sum(map(len, guesses))
    assert 40 < engine.drafts.accepted < engine.drafts.checked - 20
    assert kind == "mesh" or engine.scheduling.preemptions > 0
    assert {answer.tokens[-1].finish_reason for answer in plain} == {"stop", "length"}


def test_a_request_gets_several_tokens_of_a_step_where_its_text_repeats(tiny_model, monkeypatch):
    """The model says its last token again, for as long as there is room. Nothing is compiled after
    `warm_up`, which measures what drafts cost."""
    request = Request(Prompt((5, 240), None), max_tokens=50, end_tokens=())
    engine = _speculating(tiny_model)
    engine.warm_up()
    assert engine._speculation._costs.keys() == {1, 2, 4}
    programs = (step_functions.step, admit, release)
    before = [program._cache_size() for program in programs]
    monkeypatch.setattr(Speculation, "measure", lambda *_: (1.2, 0.0))
    engine.submit(request)
    steps = [engine.step() for _ in range(15)]
    assert [token.token for tokens in steps for token in tokens] == [244] * 50
    # The text is 5, 240, 244 at first: nothing came twice.
    assert [len(tokens) for tokens in steps] == [1, 1, *[4] * 12, 0]
    assert engine.drafts == DraftCounts(36, 36)
    assert [program._cache_size() for program in programs] == before


def test_a_request_whose_drafts_are_refused_gets_few():
    """Where a step with drafts takes twice the time, they cost one token in forty at most, though
    of five words every two came before."""
    spec, run = Speculation(DRAFTS, None), lambda drafts: None
    spec._costs[1] = (2.0, 0.0)
    spec.begin(0, Prompt((1,), None), 2)
    rng, with_drafts, count = np.random.default_rng(0), 0, 800
    for _ in range(count):
        token = int(rng.integers(5))
        drafts = spec.propose([0], lambda: {0: 9}, run)
        if drafts is not None:
            with_drafts, token = with_drafts + 1, (drafts[0, 0] + 1) % 5
        spec.take([0], drafts, np.array([[token]]))
    assert 3 <= with_drafts <= count // 40
    assert spec.counts == DraftCounts(DRAFTS * with_drafts, 0)


def test_what_followed_the_latest_tokens_the_last_time():
    drafter = Drafter([1, 2, 3, 4, 9, 2, 3, 5, 8, 2, 3])
    assert drafter.propose(4) == [5, 8, 2, 3]
    assert drafter.propose(9) == [5, 8, 2, 3, 5, 8, 2, 3, 5]
    drafter.add(4)  # three that came are better than the latest two
    assert drafter.propose(2) == [9, 2]
    drafter.add(7)
    assert drafter.propose(2) == []


POISON = 7


def test_a_draft_that_gives_no_numbers_fails_no_request(model, monkeypatch):
    """Nor stays in pages: the step is run again without, and what was written is cleared."""
    real_decode = step_functions.forward_rows

    def poisoned(params, config, rows, cache, pages_a_layer):
        logits, cache = real_decode(params, config, rows, cache, pages_a_layer)
        is_there = jnp.any((rows.tokens == POISON) & rows.is_active, axis=1)
        return jnp.where(is_there[:, None, None], jnp.nan, logits), cache

    config, params = model
    config = config.replace(layernorm_epsilon=2e-5)  # programs of its own
    request = Request(Prompt((5, 240), 1), max_tokens=9, end_tokens=())
    [expected] = complete_all(Engine(params, config, SMALL), [request])
    monkeypatch.setattr(step_functions, "forward_rows", poisoned)
    monkeypatch.setattr(Speculation, "measure", lambda *_: (0.01, 0.0))
    engine, cleared = _speculating((config, params)), []
    clear = step_functions.clear_failed
    monkeypatch.setattr(step_functions, "clear_failed", lambda c: cleared.append(1) or clear(c))
    monkeypatch.setattr(Drafter, "propose", lambda drafter, count: [POISON][:count])
    [answer] = complete_all(engine, [request])
    assert answer.tokens == expected.tokens
    assert engine.drafts.checked == len(cleared) > 2


def test_a_failure_without_drafts_ends_the_request(model, monkeypatch):
    config, params = model
    broken = params.replace(
        final_layernorm=jax.tree.map(lambda x: x * np.nan, params.final_layernorm)
    )
    monkeypatch.setattr(Speculation, "measure", lambda *_: (0.01, 0.0))
    requests = [Request(Prompt((5, 6, 5, 6, 5, 6, 240), 1), max_tokens=9)]
    with pytest.raises(LogitsError, match="at token 1 of the answer"):
        list(complete_all(_speculating((config, broken)), requests))


@pytest.fixture(scope="module")
def small_model(tiny_model):
    """Of one layer fewer, with as many words."""
    config, params = tiny_model
    one = config.replace(num_layers=config.num_layers - 1)
    return SmallModel(params.replace(layers=jax.tree.map(lambda x: x[:-1], params.layers)), one)


@pytest.mark.parametrize(
    ("kind", "is_right"),
    [
        ("layers apart", False),
        ("layers apart", True),
        pytest.param("mesh", True, marks=pytest.mark.slow),
    ],
)
def test_drafts_of_a_small_model(model, small_model, plain, monkeypatch, kind, is_right):
    """The same answers; of the model itself nearly all drafts of greedy ones are accepted."""
    monkeypatch.setattr(Speculation, "measure", lambda *_: (0.01, 0.0))
    monkeypatch.setattr(Drafter, "propose", lambda *_: [])
    config, params = model
    small = SmallModel(params, config) if is_right else small_model
    if kind == "mesh":
        mesh = make_mesh((2, 2, 2))
        place = lambda config, params: jax.device_put(
            params, jax.tree.map(lambda a: a.sharding, glm_params.abstract(config, mesh))
        )
        params = place(config, params)
        small = SmallModel(place(small.config, small.params), small.config)
    settings = dataclasses.replace(SMALL, speculate=DRAFTS)
    engine = Engine(params, config, settings, small_model=small)
    _assert_same(_answers(engine), plain)
    assert engine.drafts.checked > 200
    if is_right:
        assert engine.drafts.accepted > engine.drafts.checked / 4  # a third of requests are greedy
        before = engine.drafts
        greedy = [dataclasses.replace(r, sampling=Sampling()) for r in _requests()[:4]]
        list(complete_all(engine, greedy))
        checked = engine.drafts.checked - before.checked
        # An answer's end refuses those behind it.
        assert engine.drafts.accepted - before.accepted > checked - DRAFTS * len(greedy)


def test_a_small_model_catches_up(model, monkeypatch):
    """Drafts are the small model's likeliest tokens behind any text, after steps without drafts."""
    config, params = model
    monkeypatch.setattr(Drafter, "propose", lambda *_: [])
    costs = iter([(0.01, 0.0)] + [(9.0, 0.0)] * 30 + [(0.01, 0.0)] * 40)
    monkeypatch.setattr(Speculation, "measure", lambda *_: next(costs))
    settings = dataclasses.replace(SMALL, speculate=DRAFTS)
    engine = Engine(params, config, settings, small_model=SmallModel(params, config))
    request = Request(Prompt((5, 9, 240), None), max_tokens=44, end_tokens=())
    [answer] = complete_all(engine, [request])
    [expected] = complete_all(Engine(params, config, SMALL), [request])
    assert answer.tokens == expected.tokens
    assert engine.drafts.checked == engine.drafts.accepted >= 9


def test_nothing_is_compiled_for_a_small_model_after_warm_up(model, small_model, monkeypatch):
    config, params = model
    settings = dataclasses.replace(SMALL, speculate=2)
    engine = Engine(params, config, settings, small_model=small_model)
    engine.warm_up()
    assert all(drafting > 0 for _, drafting in engine._speculation._costs.values())
    programs = (step_functions.step, step_functions.decode, step_functions.prefill_layers, _draft)
    before = [program._cache_size() for program in programs]
    monkeypatch.setattr(Speculation, "measure", lambda *_: (0.01, 0.0))
    list(complete_all(engine, _requests()[:5]))
    assert engine.drafts.checked
    assert [program._cache_size() for program in programs] == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"vocab_size": 640}, "640 tokens, the model"), ({"max_sequence_length": 32}, "32 positions")],
)
def test_a_small_model_that_does_not_match(model, small_model, changed, message):
    config, params = model
    other = SmallModel(small_model.params, small_model.config.replace(**changed))
    with pytest.raises(PromptError, match=message):
        Engine(params, config, dataclasses.replace(SMALL, speculate=1), small_model=other)


def test_settings_are_checked():
    with pytest.raises(PromptError, match="speculate=-1: at least 0"):
        EngineSettings(speculate=-1)
