"""Spaces before blanks: whether they are in the tokens before a blank, or left to its answer."""

from collections.abc import Sequence
from typing import Any

from glm_jax.config import SpecialTokens
from glm_jax.tokenizer import MASK_WORDS

_BEFORE = 8  # tokens that are decoded to see whether they end in a space


def mask_word(special: SpecialTokens, mask: int) -> str:
    """Return the word that a mask's id stands for in a text."""
    return dict(zip((special.mask, special.gmask, special.smask), MASK_WORDS, strict=True))[mask]


def are_spaced(
    tokenizer: Any, text: str, tokens: Sequence[int], mask: int
) -> tuple[bool | None, ...]:
    """Return for each blank of a text whether a space before it is missing in the tokens before it,
    so that the answer is to begin with it; None where that is left to the model.

    Args:
      tokens: of the whole text.
    """
    special = tokenizer.special_tokens
    word = mask_word(special, mask)
    positions = [position for position, token in enumerate(tokens) if token == mask]
    parts = text.split(word)
    befores = parts[:-1] or parts  # a text without the word has its mask at the end
    spaced: list[bool | None] = []
    for before, position in zip(befores, positions, strict=False):
        has_space = before[-1:].isspace()
        if not before or (mask == special.gmask and not has_space):
            spaced.append(None)  # a text that is written on may go on with another word
            continue
        tokenized = tokenizer.decode(tokens[max(0, position - _BEFORE) : position])
        spaced.append(has_space and not tokenized[-1:].isspace())
    return tuple(spaced)
