"""Token lists in, token lists out."""

from collections.abc import Callable, Sequence

import numpy as np

from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.prompt import Prompt, bucket, resolve
from glm_jax.engine.request import Request, Token
from glm_jax.engine.sampling import Sampling
from glm_jax.generation.driver import SingleRequest, drive
from glm_jax.model.params import GLMParams

_MAX_SLOTS = 64


def generate(
    params: GLMParams,
    config: GLMConfig,
    prompts: Sequence[Sequence[int] | Prompt],
    *,
    max_length: int | None = None,
    sampling: Sampling | None = None,
    end_tokens: Sequence[int] | None = None,
    special_tokens: SpecialTokens | None = None,
    seed: int = 0,
    on_tokens: Callable[[np.ndarray], None] | None = None,
) -> list[list[int]]:
    """Complete each prompt.

    Args:
      prompts: token ids of a context with a mask token in it ([gMASK] is added if there is none),
        or a `Prompt`.
      max_length: maximum of context, sop and generated tokens together; the model's positions by
        default.
      sampling: greedy by default.
      end_tokens: generating one ends the answer; eop and eos by default.
      special_tokens: the config's by default.
      seed: of sampling; prompt i uses seed + i.
      on_tokens: called after each step with int32 [len(prompts)], -1 for rows without a token.

    Returns:
      The generated tokens of each prompt, including the end token if there was one.

    Raises:
      PromptError: no prompts, special tokens unknown, or a prompt that leaves no room.
      SamplingError: bans leave no token.
      LogitsError: the model's logits are NaN or infinite.
    """
    rows, special, limit, ends = resolve(prompts, config, max_length, end_tokens, special_tokens)
    # Rounded, so that many calls share one program.
    longest = min(bucket(limit), config.max_sequence_length)
    slots = min(bucket(len(rows), 1), _MAX_SLOTS)
    engine = Engine(params, config, EngineSettings(slots, longest), special)
    choice = sampling or Sampling()
    answers = [
        SingleRequest(Request(row, choice, limit - len(row), (seed + i) % 2**32, ends))
        for i, row in enumerate(rows)
    ]

    def show(tokens: Sequence[Token]) -> None:
        column = np.full(len(rows), -1, np.int32)
        for token in tokens:
            column[token.request_id] = token.token
        if on_tokens is not None:
            on_tokens(column)

    for answer in drive(engine, answers, show):
        answer.check()
    return [[token.token for token in answer.tokens] for answer in answers]
