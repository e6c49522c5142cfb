"""Requests that come and go in one batch get what each would get alone."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN

from glm_jax.engine import step_functions
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.generation_settings import SamplingError
from glm_jax.engine.prefill_batch import prefill_width, prefill_widths
from glm_jax.engine.prompt import Prompt, PromptError
from glm_jax.engine.request import Request
from glm_jax.engine.sampling import Sampling
from glm_jax.engine.scheduler import Scheduler
from glm_jax.engine.slots import admit, release, set_table
from glm_jax.generation.driver import complete_all
from glm_jax.model import glm
from glm_jax.model import params as glm_params
from glm_jax.model.visibility import Visibility
from glm_jax.sharding import make_mesh

DECODE = json.loads((GOLDEN / "decode.json").read_text())["cases"]
SMALL = EngineSettings(slots=3, cache_tokens=150, page_size=16, prefill_width=48)


def _requests(count=14):
    """Of every length and kind, some that end by chance."""
    rng = np.random.default_rng(0)
    kinds = itertools.cycle(
        [
            Sampling(),
            Sampling(temperature=0.9, top_k=40),
            Sampling(repetition_penalty=1.5, no_repeat_ngram=2),
            Sampling(temperature=1.2, top_p=0.8, min_tokens=3, banned_tokens=(7, 9)),
        ]
    )
    requests = []
    for number in range(count):
        context = (*rng.integers(3, 200, rng.integers(1, 40)).tolist(), 240, 11)
        position = len(context) - 2 if number % 3 else None
        requests.append(
            Request(
                Prompt(context, position),
                sampling=next(kinds),
                max_tokens=int(rng.integers(1, 20)),
                seed=number,
                end_tokens=tuple(range(12 * number)),
                log_probabilities=number % 2 == 0,
            )
        )
    return requests


def _answers(engine, requests):
    return sorted(complete_all(engine, requests), key=lambda answer: answer.request_id)


@pytest.fixture(scope="module")
def alone(tiny_model):
    """Each request's answer by an engine that has nothing else."""
    config, params = tiny_model
    engine = Engine(params, config, dataclasses.replace(SMALL, slots=1))
    return [next(complete_all(engine, [request])) for request in _requests()]


def _free_pages(engine):
    return engine._scheduler.pool.free_pages(0)


def _assert_same(answers, expected):
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert [answer.finish_reason for answer in answers] == [a.finish_reason for a in expected]
    for got, wanted in zip(answers, expected, strict=True):
        np.testing.assert_allclose(got.log_probabilities, wanted.log_probabilities, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [None, 20])
def test_a_request_gets_the_same_whatever_shares_its_batch(tiny_model, alone, budget):
    config, params = tiny_model
    engine = Engine(params, config, dataclasses.replace(SMALL, prefill_budget=budget))
    _assert_same(_answers(engine, _requests()), alone)
    reasons = {answer.finish_reason for answer in alone}
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize(
    "mesh",
    [
        (1, 1, 1),
        (2, 2, 2),
        pytest.param((4, 1, 2), marks=pytest.mark.slow),
        pytest.param((1, 1, 8), marks=pytest.mark.slow),
    ],
)
def test_a_mesh_gives_the_same(tiny_model, alone, mesh):
    config, params = tiny_model
    mesh = make_mesh(mesh)
    shardings = jax.tree.map(lambda a: a.sharding, glm_params.abstract(config, mesh))
    # Two slots for each group of devices.
    settings = dataclasses.replace(SMALL, slots=8)
    engine = Engine(jax.device_put(params, shardings), config, settings)
    _assert_same(_answers(engine, _requests()), alone)
    _assert_same(_answers(engine, _requests()[2:3] * 9), alone[2:3] * 9)
    assert engine.scheduling.shared_prompts >= 4


def test_layers_in_a_loop_give_the_same(tiny_model, alone, monkeypatch):
    """As on GPUs and TPUs: layers stacked, pages of all of them in one array."""
    config, params = tiny_model
    monkeypatch.setattr("glm_jax.engine.engine.prepare", lambda params: params)
    for budget in (None, 20):
        engine = Engine(params, config, dataclasses.replace(SMALL, prefill_budget=budget))
        _assert_same(_answers(engine, _requests()), alone)
    _assert_same(_answers(engine, _requests()[2:3] * 9), alone[2:3] * 9)
    assert engine.scheduling.shared_prompts >= 4


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("int8", 0.05)])
def test_a_cache_in_less_precision_changes_scores_a_little(tiny_model, dtype, tolerance):
    config, params = tiny_model
    requests = [
        Request(Prompt((5, 6, 7, 240), 3), max_tokens=1, end_tokens=(), log_probabilities=True)
    ]
    scores = [
        next(complete_all(Engine(params, config.replace(cache_dtype=kind), SMALL), requests))
        for kind in (None, dtype)
    ]
    difference = abs(scores[0].log_probabilities[0] - scores[1].log_probabilities[0])
    assert 0 < difference < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("is_placed", [False, True])
def test_nothing_is_compiled_after_warm_up(tiny_model, is_placed):
    """Nor where parameters were put on their device, as `restore` does."""
    config, params = tiny_model
    if is_placed:
        params = jax.device_put(params, jax.devices()[0])
    engine = Engine(params, config, dataclasses.replace(SMALL, prefill_budget=30))
    jitted = (
        step_functions.embed,
        step_functions.prefill_layers,
        step_functions.step,
        step_functions.copy_pages,
        admit,
        release,
        set_table,
    )
    engine.warm_up()
    before = [program._cache_size() for program in jitted]
    compiled = []
    with jax.log_compiles(False):
        jax.monitoring.register_event_duration_secs_listener(
            lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
        )
        answers = _answers(engine, _requests(20) + _requests(1) * 3)
        engine.cancel(engine.submit(_requests()[0]))
    assert len(answers) == 23
    assert engine.scheduling.shared_prompts > 0
    assert [program._cache_size() for program in jitted] == before
    assert compiled == []


def test_a_slot_is_taken_again_while_others_go_on(tiny_model):
    config, params = tiny_model
    engine = Engine(params, config, dataclasses.replace(SMALL, slots=2))
    prompt = Prompt((5, 6, 240), 2)
    long = engine.submit(Request(prompt, max_tokens=12, end_tokens=()))
    short = [engine.submit(Request(prompt, max_tokens=2, end_tokens=())) for _ in range(4)]
    steps = []
    while not engine.is_idle:
        steps.append([token.request_id for token in engine.step()])
    # 12 tokens of one beside 8 of four: no step more than the long one takes.
    assert len(steps) == 12
    assert all(long in request_ids for request_ids in steps)
    assert [request_ids[1] for request_ids in steps[:8]] == [t for t in short for _ in range(2)]


@pytest.mark.parametrize("budget", [None, 20])
def test_requests_that_are_preempted_go_on_to_the_token(tiny_model, alone, monkeypatch, budget):
    """Every second step one is, whether there are pages or not."""
    config, params = tiny_model
    engine = Engine(params, config, dataclasses.replace(SMALL, prefill_budget=budget))
    real, calls = Scheduler.grow, itertools.count()

    def grow(scheduler):
        preempted, grown = real(scheduler)
        if next(calls) % 2 and len(scheduler.running) > 1:
            preempted.append(scheduler._preempt_last(0))
        return preempted, {slot: grown[slot] for slot in grown if slot in scheduler.running}

    monkeypatch.setattr(Scheduler, "grow", grow)
    _assert_same(_answers(engine, _requests()), alone)
    assert engine.scheduling.preemptions > 10
    assert _free_pages(engine) == 10


def test_equal_prompts_are_prefilled_once(tiny_model, alone, monkeypatch):
    """Also where one of them is given up while they are prefilled."""
    config, params = tiny_model
    engine = Engine(params, config, dataclasses.replace(SMALL, prefill_budget=1))
    prefilled = []
    real = step_functions.embed
    monkeypatch.setattr(
        step_functions, "embed", lambda *args: prefilled.append(args[2]) or real(*args)
    )
    number = max(range(14), key=lambda i: len(alone[i].tokens))
    request = _requests()[number]
    answers = _answers(engine, [request] * 3)
    _assert_same(answers, [alone[number]] * 3)
    assert engine.scheduling.shared_prompts == 2
    [batch] = prefilled
    assert int(np.count_nonzero(batch.paging.pages)) == len(request.prompt) - 1

    running = engine.submit(Request(Prompt((5, 6, 240), 2), max_tokens=30, end_tokens=()))
    engine.step()
    first, *others = [engine.submit(request) for _ in range(3)]
    tokens = engine.step()
    assert engine.running == 3
    engine.cancel(first)
    tokens += [token for _ in range(60) for token in engine.step()]
    assert engine.is_idle
    assert _free_pages(engine) == 10
    assert first not in {token.request_id for token in tokens}
    for request_id in others:
        got = [token.token for token in tokens if token.request_id == request_id]
        assert got == list(alone[number].tokens)
    assert running in {token.request_id for token in tokens}


@pytest.mark.parametrize("when", ["waiting", "prefilling", "running"])
def test_a_cancelled_request_leaves_at_once_and_touches_no_other(tiny_model, alone, when):
    config, params = tiny_model
    budget = 1 if when == "prefilling" else None
    settings = dataclasses.replace(SMALL, slots=2, prefill_budget=budget)
    engine = Engine(params, config, settings)
    free = _free_pages(engine)
    kept = engine.submit(_requests()[0])
    engine.step()
    cancelled = engine.submit(dataclasses.replace(_requests()[1], max_tokens=None, end_tokens=()))
    if when != "waiting":
        engine.step()
    running = {"waiting": 1, "prefilling": 2, "running": 2}[when]
    assert engine.running == running
    engine.cancel(cancelled)
    given = [token for token in iter(lambda: engine.step() or None, None) for token in token]
    while not engine.is_idle:
        given += engine.step()
    assert cancelled not in {token.request_id for token in given}
    assert engine.is_idle
    assert _free_pages(engine) == free
    got = [token.token for token in given if token.request_id == kept]
    assert got == list(alone[0].tokens[-len(got) :])


def test_log_probabilities_are_the_models(golden_float32):
    """Of the oracle's greedy answers, beside the forward pass of the whole sequence."""
    config, params = golden_float32
    case = DECODE[0]
    prompt = Prompt(tuple(case["prompt"]["context"]), None)
    assert case["prompt"]["gmask"]
    sampling = Sampling(temperature=0.7, top_k=5, repetition_penalty=1.3)
    request = Request(prompt, sampling, 8, end_tokens=(), log_probabilities=True)
    [answer] = complete_all(Engine(params, config), [request])
    tokens = [*prompt.tokens(config.special_tokens.sop), *answer.tokens]
    count, context = len(tokens), len(prompt.context)
    mask = Visibility.prefix(jnp.array([context]), count)
    logits = glm.forward(params, config, jnp.array([tokens]), jnp.arange(count)[None], mask)[0]
    expected = jax.nn.log_softmax(logits)[np.arange(context, count - 1), tokens[context + 1 :]]
    np.testing.assert_allclose(answer.log_probabilities, expected, atol=1e-4)

    engine = Engine(params, config)
    engine.submit(dataclasses.replace(request, top_logprobs=True))
    places = []
    while not engine.is_idle:
        places += [token.top_logprobs for token in engine.step()]
    likeliest, tokens = jax.lax.top_k(jax.nn.log_softmax(logits)[context : count - 1], 5)
    assert [[token for token, _ in place] for place in places] == tokens.tolist()
    told = [[value for _, value in place] for place in places]
    np.testing.assert_allclose(told, likeliest, atol=1e-4)


def test_unidirectional_texts_are_seen_from_left_to_right(golden_float32, golden_special):
    """Greedy by the forward pass under a causal mask, [gMASK] and sop before the text."""
    config, params = golden_float32
    text = [12, 13, 14, 15, 16, 17]
    tokens = [golden_special.gmask, golden_special.sop, *text]
    for _ in range(6):
        mask = Visibility.prefix(jnp.array([1]), len(tokens))
        logits = glm.forward(
            params, config, jnp.array([tokens]), jnp.arange(len(tokens))[None], mask
        )
        tokens.append(int(jnp.argmax(logits[0, -1])))
    prompt = Prompt.unidirectional(text, golden_special)
    [answer] = complete_all(Engine(params, config), [Request(prompt, max_tokens=6, end_tokens=())])
    assert list(answer.tokens) == tokens[8:]
    whole = Prompt.from_tokens(text, golden_special)
    [other] = complete_all(Engine(params, config), [Request(whole, max_tokens=6, end_tokens=())])
    assert other.tokens != answer.tokens
    with pytest.raises(PromptError, match="a blank in a unidirectional text"):
        Prompt.unidirectional([1, golden_special.mask], golden_special)


def test_urgent_requests_go_first(tiny_model):
    config, params = tiny_model
    engine = Engine(params, config, dataclasses.replace(SMALL, slots=1))
    request = Request(Prompt((5, 240), 1), max_tokens=1, end_tokens=())
    request_ids = [engine.submit(request), engine.submit(request, is_urgent=True)]
    assert [engine.step()[0].request_id for _ in request_ids] == request_ids[::-1]


def test_widths_of_packs():
    assert prefill_widths(200) == [*range(32, 209, 16)]
    assert prefill_widths(600)[-6:] == [416, 448, 480, 512, 576, 640]
    assert [prefill_width(n) for n in (0, 32, 33, 97, 129)] == [32, 32, 48, 112, 144]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt": Prompt((5,) * 62 + (240,), 62)}, PromptError, "63 tokens.*past 64"),
        ({"prompt": Prompt((5, 256), 1)}, PromptError, "token 256 is not in the vocabulary"),
        ({"max_tokens": 0}, PromptError, "max_tokens=0: at least 1"),
        ({"seed": -1}, SamplingError, "seed=-1"),
        ({"sampling": Sampling(banned_tokens=(256,))}, SamplingError, "banned token 256"),
        ({"sampling": Sampling(banned_sequences=((1,) * 9,))}, SamplingError, "at most 8 tokens"),
        ({"sampling": Sampling(banned_sequences=((1,),) * 33)}, SamplingError, "at most 32"),
    ],
)
def test_impossible_requests_are_refused(tiny_model, change, error, message):
    config, params = tiny_model
    engine = Engine(params, config, SMALL)
    request = Request(Prompt((5, 240), 1))
    with pytest.raises(error, match=message):
        engine.submit(dataclasses.replace(request, **change))
    assert engine.is_idle


def test_impossible_engines_are_refused(tiny_model):
    config, params = tiny_model
    with pytest.raises(PromptError, match="max_length=65 is past the model's 64"):
        Engine(params, config, EngineSettings(max_length=65))
    with pytest.raises(PromptError, match="slots=0"):
        EngineSettings(slots=0)
    with pytest.raises(PromptError, match="special tokens are not known"):
        Engine(params, config.replace(special_tokens=None))
