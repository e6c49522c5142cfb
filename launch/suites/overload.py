"""More requests than the cache holds: pages allocated as answers grow, or reserved at first."""

import collections
import functools
from collections.abc import Sequence

import jax
import numpy as np

from glm_jax.config import GLMConfig, SpecialTokens, glm_config
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.page_pool import PAGE_SIZE, page_count
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request
from glm_jax.engine.sampling import Sampling
from glm_jax.model import params as glm_params
from glm_jax.model.device_layout import prepare
from launch.suites.case import Case

TITLE = "80 answers, most of which end long before their max_tokens of 512: a token"
_REQUESTS, _MAX_TOKENS, _SPECIAL = 80, 512, 9
_LENGTH = 640  # of the longest request
_LONGEST = 4  # requests of that length that the cache has room for
_MEAN_LENGTHS = (20, 20, 20, 150)  # of answers, in turn
# Nearly uniform sampling: the number of end tokens sets the mean length of an answer.
_RANDOM = Sampling(temperature=100.0)


def overload_cases(steps: dict[str, int]) -> dict[str, Case]:
    """`reserved` starts a request only when pages for the longest answers of all running ones fit.

    The model is small, in float32: a step takes about as long for two rows as for one, as that of a
    large model on a GPU does.

    Args:
      steps: filled with the number of engine steps of each case.
    """
    config = glm_config(
        "tiny",
        num_layers=2,
        hidden_size=1024,
        inner_hidden_size=2736,
        num_heads=16,
        vocab_size=4096,
        max_sequence_length=_LENGTH,
        special_tokens=SpecialTokens(*range(_SPECIAL)),
    )
    params = prepare(glm_params.init(config, jax.random.key(0)))
    pages = _LONGEST * page_count(_LENGTH)
    engine = Engine(params, config, EngineSettings(32, _LENGTH, cache_tokens=pages * PAGE_SIZE))
    requests = _requests(config)
    tokens, _ = _complete(engine, requests)  # compiles

    def run(name: str, reserved: int | None) -> None:
        again, steps[name] = _complete(engine, requests, reserved)
        assert again == tokens

    cases = {"reserved": pages, "as answers grow": None}
    return {
        name: Case(functools.partial(run, name, reserved), tokens, is_long=True, max_rounds=5)
        for name, reserved in cases.items()
    }


def _requests(config: GLMConfig) -> list[Request]:
    special = config.special_tokens
    assert special is not None
    rng, words = np.random.default_rng(0), config.vocab_size - _SPECIAL
    requests = []
    for seed in range(_REQUESTS):
        context = rng.integers(_SPECIAL, config.vocab_size, rng.integers(16, 65)).tolist()
        prompt = Prompt((*context, special.gmask), None)
        ends = tuple(range(_SPECIAL + words // _MEAN_LENGTHS[seed % len(_MEAN_LENGTHS)]))
        requests.append(Request(prompt, _RANDOM, _MAX_TOKENS, seed, end_tokens=ends))
    return requests


def _complete(
    engine: Engine, requests: Sequence[Request], reserved: int | None = None
) -> tuple[int, int]:
    """Complete requests, and return the numbers of tokens and of steps.

    Args:
      reserved: the most pages that the longest answers of running requests may need; None for no
        limit.
    """
    waiting, longest = collections.deque(requests), dict[int, int]()
    tokens = steps = 0
    while waiting or longest:
        while waiting:
            own = page_count(len(waiting[0].prompt) + _MAX_TOKENS)
            if reserved is not None and sum(longest.values()) + own > reserved:
                break
            longest[engine.submit(waiting.popleft())] = own
        for token in engine.step():
            tokens += 1
            if token.finish_reason is not None:
                del longest[token.request_id]
        steps += 1
    return tokens, steps
