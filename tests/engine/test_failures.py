"""What ends a request ends it alone, with a line that says why, and not in strange text."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN  # noqa: F401  # imports of jax come after it
from stub_tokenizer import WordTokenizer

from glm_jax.config import SpecialTokens, glm_config
from glm_jax.engine import step_functions
from glm_jax.engine.beam_search import BeamSearch, beam_search
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.generation_settings import SamplingError
from glm_jax.engine.prompt import Prompt, PromptError
from glm_jax.engine.request import Request
from glm_jax.engine.sampling import LogitsError, Sampling
from glm_jax.engine.scoring import Scorer
from glm_jax.errors import UserError
from glm_jax.generation.blank_filling import fill_blanks
from glm_jax.generation.driver import complete_all
from glm_jax.generation.generate import generate
from glm_jax.generation.scored_texts import continuation
from glm_jax.generation.text_request import TextRequest
from glm_jax.jobs.request_files import read_lines
from glm_jax.jobs.request_runner import RequestRunner
from glm_jax.model import params as glm_params
from glm_jax.sharding import make_mesh
from glm_jax.tokenizer import Tokenizer, TokenizerError, check_fits

PROMPT = Prompt((5, 6, 7, 8, 240), 4)
EVERY = tuple(range(256))


def _engine(tiny_model, mesh=None):
    config, params = tiny_model
    if mesh is not None:
        places = jax.tree.map(lambda a: a.sharding, glm_params.abstract(config, make_mesh(mesh)))
        params = jax.device_put(params, places)
    return Engine(params, config, EngineSettings(2, page_size=16))


def _broken(params):
    """Weights by which all logits are NaN."""
    return params.replace(
        final_layernorm=jax.tree.map(lambda x: x * np.nan, params.final_layernorm)
    )


@pytest.mark.parametrize("mesh", [None, (1, 1, 2)])
def test_what_earlier_requests_left_in_pages_is_not_read(tiny_model, mesh):
    """Also where it is NaN, which times the weight 0 is NaN."""
    engine = _engine(tiny_model, mesh)
    [sound] = complete_all(engine, [Request(PROMPT, max_tokens=6)])
    poison = lambda x: jnp.full_like(x, jnp.nan)
    engine._cache = jax.tree.map(poison, engine._cache)
    [again] = complete_all(engine, [Request(PROMPT, max_tokens=6)])
    assert again.tokens == sound.tokens


@pytest.mark.parametrize("mesh", [None, (1, 1, 2)])
def test_a_prompt_beyond_its_dtype_fails_alone_among_those_it_is_prefilled_with(
    tiny_model, mesh, monkeypatch
):
    """Also where it was given up before it had a token, and the next has its pages."""
    engine = _engine(tiny_model, mesh)
    [sound] = complete_all(engine, [Request(PROMPT, max_tokens=6)])
    real = step_functions.embed

    def embed(params, config, pack):
        return jnp.where(pack.tokens[..., None] == 99, jnp.inf, real(params, config, pack))

    monkeypatch.setattr(step_functions, "embed", embed)
    loud = Request(Prompt((5, 99, 7, 240), 3), max_tokens=6)
    for requests in ([loud, Request(PROMPT, max_tokens=6)], [Request(PROMPT, max_tokens=6), loud]):
        request_ids = [engine.submit(request) for request in requests]
        tokens = [token for _ in range(8) for token in engine.step()]
        of_each = {t: [token for token in tokens if token.request_id == t] for t in request_ids}
        failed, answered = (of_each[t] for t in request_ids[:: 1 if requests[0] is loud else -1])
        assert [token.finish_reason for token in failed] == ["error"]
        assert tuple(token.token for token in answered) == sound.tokens
    loud_id, other = engine.submit(loud), engine.submit(Request(PROMPT, max_tokens=6))
    engine._begin_prefill()
    engine.cancel(loud_id)
    engine.cancel(other)
    while not engine.is_idle:
        engine.step()
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(engine._cache))


def test_broken_weights_are_said_everywhere(tiny_model):
    config, params = tiny_model
    broken = _broken(params)
    with pytest.raises(LogitsError, match="logits at token 1 of the answer are NaN or infinite"):
        generate(broken, config, [PROMPT])
    for sampling in (Sampling(temperature=1.0), Sampling(min_tokens=2)):
        with pytest.raises(LogitsError):
            generate(broken, config, [PROMPT], sampling=sampling)
    with pytest.raises(LogitsError, match="token 1 of the answer"):
        beam_search(broken, config, PROMPT, BeamSearch(2))
    sequence = continuation([5, 6], [7, 8], config.special_tokens)
    with pytest.raises(UserError, match="not finite"):
        list(Scorer(broken, config).score([sequence]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bans_that_leave_nothing_are_said(tiny_model, temperature):
    engine = _engine(tiny_model)
    sampling = Sampling(temperature, banned_tokens=EVERY)
    with pytest.raises(SamplingError, match="every token is banned at token 1 of the answer"):
        list(complete_all(engine, [Request(PROMPT, sampling)]))
    last = dataclasses.replace(sampling, banned_tokens=EVERY[:-1], no_repeat_ngram=1)
    with pytest.raises(SamplingError, match="every token is banned at token 2 of the answer"):
        list(complete_all(engine, [Request(PROMPT, last)]))


def test_searches_give_no_banned_token(tiny_model):
    config, params = tiny_model
    with pytest.raises(SamplingError, match="every token is banned at token 1"):
        beam_search(params, config, PROMPT, BeamSearch(2, banned_tokens=EVERY))
    found = beam_search(
        params, config, PROMPT, BeamSearch(3, banned_tokens=EVERY[:-1]), max_length=10
    )
    assert [each.tokens for each in found] == [(255,) * 4]
    for wrong in ({"banned_tokens": (256,)}, {"banned_prefixes": ((3, 999),)}):
        with pytest.raises(SamplingError, match="not in the vocabulary"):
            beam_search(params, config, PROMPT, BeamSearch(2, **wrong))


def test_settings_that_float32_cannot_hold_are_what_they_come_to(tiny_model):
    """A temperature, or a top_p, of as good as 0 takes the most likely token."""
    engine = _engine(tiny_model)
    tiny = (5e-324, 1e-40, 1e-38, 1e-30, 1e-7)
    samplings = [Sampling(), Sampling(1.0), *(Sampling(value) for value in tiny)]
    samplings += [Sampling(1.0, top_p=value) for value in tiny]
    samplings += [Sampling(value, top_k=7, top_p=0.5) for value in tiny]
    requests = [Request(PROMPT, sampling, max_tokens=8, seed=3) for sampling in samplings]
    answers = sorted(complete_all(engine, requests), key=lambda answer: answer.request_id)
    greedy, drawn, *same = [answer.tokens for answer in answers]
    assert drawn != greedy
    assert same == [greedy] * len(same)


def test_a_jobs_line_that_fails_is_a_record_and_the_others_are_answered(
    golden_float32, golden_special, tmp_path
):
    config, params = golden_float32
    engine = Engine(params, config, EngineSettings(3, 40, page_size=16), golden_special)
    path = tmp_path / "in.jsonl"
    every = list(range(config.vocab_size))
    wrong = [
        json.dumps({"text": "t5", "banned_tokens": every}),
        '{"text": "t5", "num_beams": 100000}',
        '{"text": "t5", "top_k": 2147483648}',
        '{"text": "t5", "temperature": 1' + "0" * 400 + "}",
        '{"text": "t5", "temperature": 1' + "0" * 5000 + "}",
        '{"text": "t5", "temperature": 1e400}',
        '{"text": "t5", "length_penalty": 1e308, "num_beams": 2}',
        '{"text": "t5", "length_penalty": NaN, "num_beams": 2}',
        '{"text": "t5", "choices": {"a": 1}}',
        '{"text": {"a": 1}}',
        "[" * 100_000,
        '{"text": ' + "[" * 100_000,
        '"text"',
        "3",
        "null",
    ]
    path.write_text("\n".join([*wrong, '{"text": "t5 t6"}']) + "\n")
    job = RequestRunner(engine, params, config, WordTokenizer(golden_special))
    records = sorted(job.answer(read_lines(path, TextRequest(max_tokens=3))), key=_index)
    *failed, answered = records
    assert len(failed) == len(wrong)
    assert all(0 < len(record["error"]) < 200 for record in failed)
    assert failed[0]["error"].startswith("every token is banned")
    assert len(answered["tokens"][0]) == 3


def _index(record):
    return record["index"]


@pytest.mark.parametrize("token", [-1, 1.5, "7", None, True, [3]])
def test_tokens_that_are_none_are_refused(tiny_model, tokenizer, token):
    config, _ = tiny_model
    for make in (Prompt.from_tokens, Prompt.unidirectional):
        with pytest.raises(PromptError, match="is no token"):
            make(iter([5, token]), config.special_tokens)
        assert 5 in make(iter(np.array([5, 6])), config.special_tokens).tokens(0)
    with pytest.raises(TokenizerError, match="is no token"):
        tokenizer.decode(iter([5, token]))
    assert tokenizer.decode(iter(np.array([5, 6]))) == tokenizer.decode([5, 6])


def test_ends_and_blanks_that_cannot_be_are_refused(tiny_model):
    config, params = tiny_model
    engine = _engine(tiny_model)
    for end in (256, 10**9):
        with pytest.raises(PromptError, match="end token"):
            engine.submit(Request(PROMPT, end_tokens=(end,)))
        with pytest.raises(PromptError, match="end token"):
            generate(params, config, [[5]], end_tokens=[end])
    for position in (-1, 5, 10**9):
        with pytest.raises(PromptError, match="mask_position"):
            engine.submit(Request(Prompt((5, 6, 7, 8, 240), position)))


@pytest.mark.parametrize("name", ["eop", "sop", "mask", "eos", "eod"])
def test_a_tokenizer_of_another_model_is_refused(tiny_model, name):
    config, params = tiny_model
    beyond = dataclasses.replace(config.special_tokens, **{name: 150_005})
    with pytest.raises(TokenizerError, match=f"does not fit the model: its {name} is 150005"):
        fill_blanks(params, config, WordTokenizer(beyond), "t5")
    with pytest.raises(PromptError, match="150005 is not in the vocabulary"):
        Engine(params, config, special_tokens=beyond)
    other = dataclasses.replace(config.special_tokens, **{name: 77})
    with pytest.raises(TokenizerError, match=f"its {name} is 77, and the model's is"):
        check_fits(WordTokenizer(other), config)
    check_fits(WordTokenizer(other), config.replace(special_tokens=None))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tokenizer, tiny_model):
    config = tiny_model[0].replace(special_tokens=None, vocab_size=tokenizer.vocab_size)
    check_fits(tokenizer, config)
    with pytest.raises(TokenizerError, match="does not fit the model"):
        check_fits(tokenizer, config.replace(vocab_size=tokenizer.vocab_size - 1))
    with pytest.raises(TokenizerError, match="does not fit the model"):
        check_fits(tokenizer, config.replace(special_tokens=SpecialTokens()))


def test_a_tokenizer_without_its_config_is_told_so(tokenizer, tmp_path):
    special = tokenizer.special_tokens
    config = glm_config("tiny", vocab_size=4096, special_tokens=special)
    shutil.copy(tokenizer.files[0], tmp_path)
    with pytest.raises(TokenizerError, match=r"mask is 150000.*has no tokenizer_config\.json"):
        check_fits(Tokenizer(tmp_path), config)
