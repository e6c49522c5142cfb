"""Whether the engine takes a request."""

from glm_jax.config import GLMConfig
from glm_jax.engine.generation_settings import SETTINGS
from glm_jax.engine.prompt import PromptError, check_adapter, check_end_tokens, check_prompt
from glm_jax.engine.request import Request
from glm_jax.engine.slots import check_sampling


def check_request(request: Request, config: GLMConfig, max_length: int, adapters: int) -> None:
    """Check all of a request.

    Args:
      max_length: tokens of a request at most.
      adapters: number of adapters that the model has.

    Raises:
      PromptError: no room for an answer, or a token, end token or adapter that is none.
      SamplingError: a seed out of range, or more banned sequences than there is room for.
    """
    check_prompt(request.prompt, config, max_length)
    check_adapter(request.prompt, adapters)
    if request.max_tokens is not None and request.max_tokens < 1:
        raise PromptError(f"max_tokens={request.max_tokens}: at least 1")
    for name in ("seed", "priority"):
        SETTINGS[name].checked(name, getattr(request, name))
    check_end_tokens(request.end_tokens or (), config)
    check_sampling(request.sampling, config.vocab_size)
