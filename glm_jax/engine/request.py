"""What is asked of the engine, and what it gives."""

import dataclasses
from collections.abc import Hashable, Sequence

from glm_jax.engine.guide import Guide
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.sampling import Sampling
from glm_jax.errors import UserError

_GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to complete.

    Attributes:
      max_tokens: of the answer; None for as many as max_length leaves room for.
      seed: of sampling, from 0 to 2**32 - 1; the same gives the same tokens.
      end_tokens: that end the answer; None for eop and eos.
      log_probabilities: of the answer's tokens are asked for.
      top_logprobs: beside them, those of the most likely tokens at each position.
      priority: lower numbers go first.
      guide: what the answer must be; None for anything.
    """

    prompt: Prompt
    sampling: Sampling = _GREEDY
    max_tokens: int | None = None
    seed: int = 0
    end_tokens: tuple[int, ...] | None = None
    log_probabilities: bool = False
    top_logprobs: bool = False
    priority: int = 0
    guide: Guide | None = None

    @property
    def sharing_key(self) -> Hashable:
        """Equal for requests whose prompts have the same keys and values."""
        return self.prompt


@dataclasses.dataclass(frozen=True)
class Token:
    """A token that a step gave to a request.

    Attributes:
      request_id: the request's.
      log_probability: in nats; 0 where not asked for.
      finish_reason: "stop" after an end token, "length" where there is no more room, "error"
        where there was no token to choose, which ends the request too; None while it goes on.
      top_logprobs: the most likely tokens at this position with theirs, best first;
        none where not asked for.
      error: to be raised for the request, where `finish_reason` is "error".
    """

    request_id: int
    token: int
    log_probability: float
    finish_reason: str | None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    error: UserError | None = None

    def checked(self) -> "Token":
        """Return the token itself.

        Raises:
          UserError: `error`.
        """
        if self.error is not None:
            raise self.error
        return self


@dataclasses.dataclass(frozen=True)
class Completion:
    """All tokens of an answer, the end token included where there was one."""

    request_id: int
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    finish_reason: str


def completion(tokens: Sequence[Token]) -> Completion:
    """All of a request's tokens as one answer.

    Raises:
      UserError: the request's own, by which it ended.
    """
    reason = tokens[-1].checked().finish_reason
    assert reason is not None
    return Completion(
        request_id=tokens[0].request_id,
        tokens=tuple(token.token for token in tokens),
        log_probabilities=tuple(token.log_probability for token in tokens),
        finish_reason=reason,
    )
