"""Decoding by the engine, beside a limit, static batches and other programs."""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glm_jax.config import GLMConfig, SpecialTokens, glm_config
from glm_jax.engine import step_functions
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request
from glm_jax.engine.sampling import Sampling
from glm_jax.generation.driver import complete_all
from glm_jax.model import params as glm_params
from glm_jax.model.device_layout import prepare
from glm_jax.model.params import GLMParams
from glm_jax.quantization import Scheme
from launch.suites import llama, overload, torch_glm
from launch.suites.case import Case, find_torch
from launch.suites.products import decode_rows, stream_case, with_integer_activations

PROMPT, ANSWER = 128, 128
BATCH = 16
_LENGTH = 1024  # positions: the longest prompt and answer of the mixed load
# The mixed load runs on this fraction of the model: all of it would take an hour on two cores.
_MIXED_PART = 8
_DRAFTS = 3
SPECIAL = 9  # tokens of its model; those after them are text


def decode_suite() -> Iterator[tuple[str, dict[str, Case]]]:
    """Yield the 1B model in INT4, including the embedding: prompts and answers of 128 tokens.

    `stream` reads the bytes of all weights once, which bounds a step of one row. In cases named
    `a8` activations are rounded to 8 bits; in others they are floats.
    """
    config = glm_config("1b", max_sequence_length=_LENGTH)
    int4 = make_int4(config)
    a8 = with_integer_activations(int4)
    yield "one prompt: a token after the first", _one_prompt(config, int4, a8)
    yield "one prompt: a token of prompt and answer together", _whole(config, a8)
    int8_cache = config.replace(cache_dtype="int8")
    cases = {
        f"{name}, batch {batch}": _answers_case(changed, a8, batch)
        for name, changed in (("a8", config), ("a8, int8 cache", int8_cache))
        for batch in (1, BATCH)
    }
    yield "continuous batching: a token after the first", cases
    yield "speculative decoding: a token after the first", _speculation(config, a8)
    for batch in (1, BATCH):
        yield f"overhead: a step of batch {batch}", _overhead(config, a8, batch)
    del int4, a8
    part = part_of_model()
    title = f"200 prompts of 16 to 512 tokens, answers of 4 to 200, 1/{_MIXED_PART} of the model"
    yield title, _mixed(part, with_integer_activations(make_int4(part)))
    steps: dict[str, int] = {}
    yield overload.TITLE, overload.overload_cases(steps)
    print("steps: " + ", ".join(f"{name} {count}" for name, count in steps.items()))


def part_of_model() -> GLMConfig:
    """Return the 1B model with an eighth of its layers and vocabulary, and its own widths."""
    config = glm_config("1b", max_sequence_length=_LENGTH)
    return config.replace(
        num_layers=config.num_layers // _MIXED_PART,
        vocab_size=config.vocab_size // _MIXED_PART,
        special_tokens=SpecialTokens(*range(SPECIAL)),
    )


def make_int4(config: GLMConfig) -> GLMParams:
    """Random weights in INT4, including the embedding."""
    params = glm_params.init(config, jax.random.key(0))
    quantized = glm_params.quantize_params(params, Scheme(4, search=False))
    del params  # 4.5 GB
    return prepare(quantized, embedding_bits=4)


def random_prompt(config: GLMConfig, length: int, seed: int = 0) -> Prompt:
    """Return a random context to continue after [gMASK]."""
    special = config.special_tokens
    assert special is not None
    tokens = np.random.default_rng(seed).integers(SPECIAL, config.vocab_size, length - 1)
    return Prompt((*tokens.tolist(), special.gmask), None)


def _answers_case(
    config: GLMConfig,
    params: GLMParams,
    batch: int,
    whole: bool = False,
    sampling: Sampling | None = None,
    speculate: int = 0,
) -> Case:
    """Time per token of `batch` answers that run together.

    Args:
      whole: see `_case`.
      speculate: the most drafts of a step.
    """
    settings = EngineSettings(batch, PROMPT + 1 + ANSWER, speculate=speculate)
    engine = Engine(params, config, settings)
    engine.warm_up()

    def prefill() -> None:
        for seed in range(batch):
            prompt = random_prompt(config, PROMPT, seed)
            choice = sampling or Sampling()
            engine.submit(Request(prompt, choice, ANSWER, seed, end_tokens=()))
        engine.step()

    def answer() -> None:
        while not engine.is_idle:
            engine.step()

    return _case(prefill, answer, whole, batch)


def _case(
    prefill: Callable[[], None], answer: Callable[[], None], whole: bool, batch: int = 1
) -> Case:
    """Time per token of answers of `ANSWER` tokens, the first of which the prefill gives.

    Args:
      whole: counts the prefill too; else it is done before the clock starts.
    """
    if not whole:
        return Case(answer, batch * (ANSWER - 1), prefill, is_long=True)

    def both() -> None:
        prefill()
        answer()

    return Case(both, batch * ANSWER, is_long=True)


def _speculation(config: GLMConfig, params: GLMParams) -> dict[str, Case]:
    """Three answers, with and without drafts: one that repeats itself, as greedy decoding with
    random weights does; one of random tokens; and one of six tokens in random order, for which
    n-gram lookup always finds drafts, most of them wrong."""
    banned = tuple(t for t in range(config.vocab_size) if not SPECIAL <= t < SPECIAL + 6)
    texts = {
        "repeats itself": Sampling(),
        "random": Sampling(temperature=5.0),
        "six words": Sampling(temperature=100.0, banned_tokens=banned),
    }
    return {
        f"{name}, {drafts} drafts": _answers_case(
            config, params, 1, sampling=sampling, speculate=drafts
        )
        for name, sampling in texts.items()
        for drafts in (0, _DRAFTS)
    }


def _one_prompt(config: GLMConfig, int4: GLMParams, a8: GLMParams) -> dict[str, Case]:
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(int4))
    cases = {
        "int4": _answers_case(config, int4, 1),
        "int4 a8": _answers_case(config, a8, 1),
    }
    cases |= stream_case("stream", size, 1)
    return cases | _torch_case(config, whole=False) | _llama_case(config, whole=False)


def _whole(config: GLMConfig, a8: GLMParams) -> dict[str, Case]:
    cases = {"int4 a8": _answers_case(config, a8, 1, whole=True)}
    return cases | _torch_case(config, whole=True) | _llama_case(config, whole=True)


def _torch_case(config: GLMConfig, whole: bool) -> dict[str, Case]:
    torch = find_torch()
    if torch is None:
        return {}
    peer = torch_glm.build(config).eval()
    tokens = torch.tensor([random_prompt(config, PROMPT).context])
    state: dict[str, Any] = {}

    def prefill() -> None:
        with torch.inference_mode():
            state["cache"] = peer.make_cache(1, PROMPT + ANSWER)
            logits = peer(tokens, torch.arange(PROMPT)[None], cache=state["cache"])
            state["token"] = logits[:, -1].argmax(-1, keepdim=True)

    def answer() -> None:
        with torch.inference_mode():
            for position in range(PROMPT, PROMPT + ANSWER - 1):
                at = torch.tensor([[position]])
                logits = peer(state["token"], at, cache=state["cache"], start=position)
                state["token"] = logits[:, -1].argmax(-1, keepdim=True)

    return {"torch float32": _case(prefill, answer, whole)}


@functools.cache
def _llama(config: GLMConfig) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return llama.load(config, Path(folder), os.cpu_count() or 1)


def _llama_case(config: GLMConfig, whole: bool) -> dict[str, Case]:
    peer = _llama(config)
    if peer is None:
        return {}
    tokens = list(random_prompt(config, PROMPT).context)

    def argmax() -> int:
        logits = np.ctypeslib.as_array(peer._ctx.get_logits(), (config.vocab_size,))
        return int(logits.argmax())

    def prefill() -> None:
        peer.reset()
        peer.eval(tokens)

    def answer() -> None:
        for _ in range(ANSWER - 1):
            peer.eval([argmax()])

    return {"llama.cpp Q4_0": _case(prefill, answer, whole)}


def _overhead(config: GLMConfig, params: GLMParams, batch: int) -> dict[str, Case]:
    """Return a step of the engine, and the decode program of that step alone, without sampling."""
    rows, *cached = decode_rows(config, params, batch, PROMPT, PROMPT + 1 + ANSWER)

    def finish() -> None:
        cache, pages_a_layer = cached
        for number in range(ANSWER - 1):
            moved = dataclasses.replace(rows, index=rows.index + number)
            logits, cache = step_functions.decode(params, config, moved, cache, pages_a_layer)
            jax.block_until_ready(logits)
        cached[0] = cache

    bare = Case(finish, ANSWER - 1, is_long=True)
    engine = _answers_case(config, params, batch)
    return {"bare": bare, "engine": Case(engine.run, ANSWER - 1, engine.prepare, is_long=True)}


def _mixed(config: GLMConfig, params: GLMParams) -> dict[str, Case]:
    """Yield requests of mixed lengths, answered in the order in which they arrive.

    `continuous, same memory` has twice the static batch's slots and a cache of the same size.
    """
    rng = np.random.default_rng(0)
    lengths = rng.integers(16, 512, 200).tolist()
    answers = rng.integers(4, 201, 200).tolist()
    requests = [
        Request(random_prompt(config, length, seed), max_tokens=answer, end_tokens=())
        for seed, (length, answer) in enumerate(zip(lengths, answers, strict=True))
    ]
    longest = 512 + 1 + 200
    memory = BATCH * longest
    count = sum(answers)

    def engine(slots: int) -> Engine:
        settings = EngineSettings(slots, longest, cache_tokens=memory)
        made = Engine(params, config, settings)
        made.warm_up()
        return made

    def continuous(slots: int) -> Callable[[], object]:
        made = engine(slots)
        return lambda: sum(1 for _ in complete_all(made, requests))

    static = functools.partial(_static_batches, engine(BATCH), requests)
    return {
        "static": Case(static, count, is_long=True, max_rounds=1),
        "continuous": Case(continuous(BATCH), count, is_long=True, max_rounds=1),
        "continuous, same memory": Case(continuous(2 * BATCH), count, is_long=True, max_rounds=1),
    }


def _static_batches(engine: Engine, requests: list[Request]) -> None:
    """Answer in static batches: one ends with its longest answer, then the next one starts."""
    for first in range(0, len(requests), BATCH):
        some = requests[first : first + BATCH]
        longest = max(request.max_tokens or 0 for request in some)
        padded = [dataclasses.replace(request, max_tokens=longest) for request in some]
        for _ in complete_all(engine, padded):
            pass
