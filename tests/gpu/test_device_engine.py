"""The engine with INT4 weights under mixed load: what a request gets alone, and no compiling."""

import jax
import numpy as np
import pytest

from glm_jax.checkpoints.random_weights import random_params
from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request
from glm_jax.engine.sampling import Sampling
from glm_jax.generation.driver import complete_all

pytestmark = pytest.mark.gpu
IS_GPU = jax.default_backend() == "gpu"
SPECIAL = SpecialTokens(*range(9))
WIDTH = 256 if IS_GPU else 16


def _config():
    sizes = (2, 512, 1408, 4, 1024, 512) if IS_GPU else (1, 32, 64, 2, 64, 48)
    dtype = "float16" if IS_GPU else "float32"
    return GLMConfig(*sizes, param_dtype=dtype, compute_dtype=dtype, special_tokens=SPECIAL)


def _requests(config, count):
    """Of every kind. No two prompts fit into one prefill, so that each is computed as alone."""
    rng = np.random.default_rng(0)
    kinds = (Sampling(), Sampling(temperature=1.0, top_k=20), Sampling(repetition_penalty=1.3))
    for number in range(count):
        length = int(rng.integers(WIDTH // 2 + 1, WIDTH - 1))
        tokens = rng.integers(9, config.vocab_size, length).tolist()
        prompt = Prompt((*tokens, SPECIAL.gmask), None)
        answer = int(rng.integers(1, WIDTH // 4))
        yield Request(
            prompt, sampling=kinds[number % 3], max_tokens=answer, seed=number, end_tokens=()
        )


@pytest.mark.parametrize("cache_dtype", [None, "int8"] if IS_GPU else ["int8"])
def test_the_same_tokens_alone_and_in_company_and_nothing_is_compiled(cache_dtype):
    config = _config().replace(cache_dtype=cache_dtype)
    params = random_params(config, quantization="int4")
    slots, page_size = (8, 64) if IS_GPU else (2, 8)
    settings = EngineSettings(slots, page_size=page_size, prefill_width=WIDTH)
    engine = Engine(params, config, settings)
    engine.warm_up()
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    requests = list(_requests(config, 10 if IS_GPU else 5))
    alone = [next(complete_all(engine, [request])).tokens for request in requests]
    together = sorted(complete_all(engine, requests), key=lambda answer: answer.request_id)
    assert [answer.tokens for answer in together] == alone
    assert compiled == []


@pytest.mark.skipif(not IS_GPU, reason="steps run ahead on devices that have cores of their own")
def test_the_host_starts_steps_without_waiting_for_the_device():
    """As it would if a conditional's branch, or a loop's end, had to be read in between."""
    config = _config().replace(num_layers=24)
    params = random_params(config, quantization="int4")
    engine = Engine(params, config, EngineSettings(8, page_size=64, prefill_width=WIDTH))
    prompt = Prompt((*range(9, 40), SPECIAL.gmask), None)
    for seed in range(8):
        sampling = Sampling(temperature=1.0, top_k=20, top_p=0.9)
        engine.submit(Request(prompt, sampling, max_tokens=400, seed=seed, end_tokens=()))
    for _ in range(5):  # graphs are made in the first
        engine.step()
    results = [engine._run_step(range(8)) for _ in range(30)]
    assert not results[-1].tokens.is_ready()
    jax.block_until_ready(results)
