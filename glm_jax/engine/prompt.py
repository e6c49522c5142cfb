"""What is to be completed: a context with a blank, and how much room an answer has."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.errors import UserError
from glm_jax.tokenizer import TokenizerError, checked_id

_MIN_BUCKET = 32


class PromptError(UserError):
    """A prompt that the model cannot take; the message says why."""


def _checked(tokens: Iterable[Any]) -> tuple[int, ...]:
    try:
        return tuple(map(checked_id, tokens))
    except TokenizerError as error:
        raise PromptError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A context to complete.

    Attributes:
      context: token ids, a mask token among them, without sop.
      mask_position: every generated token is at this position, that of the [MASK] or
        [sMASK] to fill; None continues the positions, as for [gMASK].
      prefix: tokens after sop that the answer is to begin with. Each sees the
        context and those before it.
      adapter: that reads the context and answers, of a model that has several: from 1 on in the
        order in which they were given; 0 for none. Keys and values of another's are no use to it.
    """

    context: tuple[int, ...]
    mask_position: int | None
    prefix: tuple[int, ...] = ()
    adapter: int = 0

    def __len__(self) -> int:
        """Tokens before the first generated one, sop included."""
        return len(self.context) + 1 + len(self.prefix)

    @property
    def position_step(self) -> int:
        """How far apart the positions of generated tokens are."""
        return int(self.mask_position is None)

    def tokens(self, sop: int) -> tuple[int, ...]:
        """Context, sop and prefix."""
        return (*self.context, sop, *self.prefix)

    def position_ids(self) -> np.ndarray:
        """int32 of each of these tokens."""
        positions = np.arange(len(self), dtype=np.int32)
        if self.mask_position is not None:
            positions[len(self.context) :] = self.mask_position
        return positions

    @classmethod
    def from_tokens(cls, tokens: Iterable[int], special: SpecialTokens) -> "Prompt":
        """Fill the first [MASK], else the first [sMASK], else [gMASK], which is appended
        where there is no mask at all.

        Raises:
          PromptError: a token that is negative, or no integer.
        """
        context = _checked(tokens)
        for mask in (special.mask, special.smask):
            if mask in context:
                return cls(context, context.index(mask))
        if special.gmask not in context:
            context += (special.gmask,)
        return cls(context, None)

    @classmethod
    def unidirectional(cls, tokens: Iterable[int], special: SpecialTokens) -> "Prompt":
        """Continues a text each of whose tokens sees only those before it: they follow a
        [gMASK] that is all of the context.

        Raises:
          PromptError: the text has a mask, which only a context that is seen whole can have; or
            a token that is negative, or no integer.
        """
        text = _checked(tokens)
        if {special.mask, special.smask, special.gmask} & set(text):
            raise PromptError("a blank in a unidirectional text: leave out the mask, or fill it")
        return cls((special.gmask,), None, text)


# Prompts, special tokens, maximum length of prompt and answer, end tokens.
Resolved = tuple[list[Prompt], SpecialTokens, int, tuple[int, ...]]


def resolve(
    prompts: Sequence[Sequence[int] | Prompt],
    config: GLMConfig,
    max_length: int | None,
    end_tokens: Sequence[int] | None,
    special_tokens: SpecialTokens | None,
) -> Resolved:
    """Return `generate`'s arguments with defaults put in.

    Raises:
      PromptError: as `generate`.
    """
    special = special_tokens or config.special_tokens
    if special is None:
        raise PromptError("this model's special tokens are not known: pass special_tokens")
    limit = config.max_sequence_length if max_length is None else max_length
    rows = [p if isinstance(p, Prompt) else Prompt.from_tokens(p, special) for p in prompts]
    _check_prompts(rows, config, limit)
    ends = special.end_tokens if end_tokens is None else tuple(end_tokens)
    check_end_tokens((special.sop, *ends), config)
    return rows, special, limit, ends


def bucket(length: int, minimum: int = _MIN_BUCKET) -> int:
    """Return the static length that serves `length`: the next power of two, at least `minimum`."""
    return max(minimum, 1 << (length - 1).bit_length())


def check_prompt(prompt: Prompt, config: GLMConfig, limit: int) -> None:
    """Raise PromptError for one that leaves no room in `limit` tokens, or is no tokens."""
    if len(prompt) >= limit:
        raise PromptError(
            f"{len(prompt.context) + len(prompt.prefix)} tokens: with sop and one answer token "
            f"it is past {limit}; shorten it"
        )
    for token in _checked((*prompt.context, *prompt.prefix)):
        if token >= config.vocab_size:
            raise PromptError(f"token {token} is not in the vocabulary")
    position = prompt.mask_position
    if position is not None and not 0 <= position < len(prompt.context):
        raise PromptError(f"mask_position={position}: not within the context")


def check_adapter(prompt: Prompt, count: int) -> None:
    """Raise PromptError for an adapter that a model with so many does not have."""
    if not 0 <= prompt.adapter <= count:
        raise PromptError(f"adapter={prompt.adapter}: the model has {count}")


def check_end_tokens(tokens: Iterable[int], config: GLMConfig) -> None:
    """Raise PromptError for an end token that no answer can have."""
    for token in _checked(tokens):
        if token >= config.vocab_size:
            raise PromptError(f"end token {token} is not in the vocabulary")


def _check_prompts(rows: Sequence[Prompt], config: GLMConfig, limit: int) -> None:
    if not rows:
        raise PromptError("no prompts")
    if limit > config.max_sequence_length:
        raise PromptError(
            f"max_length={limit} is past the model's {config.max_sequence_length} positions"
        )
    for i, row in enumerate(rows):
        try:
            check_prompt(row, config, limit)
        except PromptError as error:
            raise PromptError(f"prompt {i}: {error}") from error
