"""Fills the blanks of a text from left to right, each seeing those before it filled."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.decoding.generate import Prompt, PromptError, generate, prepare
from glm_jax.decoding.sampling import Sampling
from glm_jax.model.params import GLMParams


@runtime_checkable
class TextCodec(Protocol):
    """What blank filling asks of a tokenizer."""

    @property
    def special_tokens(self) -> SpecialTokens: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int], /) -> str: ...


@dataclasses.dataclass(frozen=True)
class FilledText:
    """A text with its blanks filled.

    Attributes:
      text: the whole of it.
      blanks: what was put into each blank, in order.
      pieces: the text in runs, each with whether it fills a blank.
    """

    text: str
    blanks: tuple[str, ...]
    pieces: tuple[tuple[str, bool], ...]


def fill_blanks(
    params: GLMParams,
    config: GLMConfig,
    tokenizer: TextCodec,
    text: str,
    *,
    max_length: int | None = None,
    sampling: Sampling | None = None,
    end_tokens: Sequence[int] | None = None,
    seed: int = 0,
    on_tokens: Callable[[np.ndarray], None] | None = None,
) -> FilledText:
    """Fills every [MASK] of a text; one with none of them has its [sMASK]s filled; else a
    [gMASK], put at the end where there is no mask, is written on from.

    Args:
      max_length: tokens of text, sop and answer, the model's positions by default.
      sampling: greedy by default.
      end_tokens: eop and eos by default.
      seed: of the sampled strategies; blank i uses seed + i.
      on_tokens: called with int32 [1] after each generated token.

    Raises:
      PromptError: the text is longer than max_length leaves room for.
    """
    special = tokenizer.special_tokens
    params = prepare(params)
    limit = max_length or config.max_sequence_length
    ends = special.end_tokens if end_tokens is None else tuple(end_tokens)
    tokens = encode_prompt(tokenizer, text)
    if len(tokens) + 2 > limit:
        raise PromptError(f"the text has {len(tokens)} tokens: no room for an answer in {limit}")
    mask = next(m for m in (special.mask, special.smask, special.gmask) if m in tokens)
    blanks: list[list[int]] = []
    pieces: list[tuple[list[int], bool]] = []
    done = 0
    # A model may write masks of its own; those are filled too, but not without end.
    while mask in tokens and len(blanks) < limit:
        position = tokens.index(mask)
        prompt = Prompt(tuple(tokens), None if mask == special.gmask else position)
        blank: list[int] = []
        if len(tokens) + 2 <= limit:
            [blank] = generate(
                params,
                config,
                [prompt],
                max_length=limit,
                sampling=sampling,
                end_tokens=ends,
                special_tokens=special,
                seed=seed + len(blanks),
                on_tokens=on_tokens,
            )
        if blank and blank[-1] in ends:
            blank.pop()
        if blank and blank[-1] == special.eod:  # the document ended there, says the model
            blank.pop()
        pieces += [(tokens[done:position], False), (blank, True)]
        blanks.append(blank)
        tokens[position : position + 1] = blank
        done = position + len(blank)
    if tokens and tokens[-1] == special.eos:
        tokens.pop()
    pieces.append((tokens[done:], False))
    return FilledText(
        text=tokenizer.decode(tokens),
        blanks=tuple(tokenizer.decode(blank) for blank in blanks),
        pieces=_decode_pieces(tokenizer, pieces),
    )


def encode_prompt(tokenizer: TextCodec, text: str) -> list[int]:
    """Ids of a text with blanks; [gMASK] is put at the end of one that has none.

    A text that doesn't end in a mask is closed by eos, as the original does.
    """
    special = tokenizer.special_tokens
    tokens = tokenizer.encode(text)
    if not {special.mask, special.smask, special.gmask} & set(tokens):
        tokens.append(special.gmask)
    elif not text.endswith("MASK]"):
        tokens.append(special.eos)
    return tokens


def _decode_pieces(
    tokenizer: TextCodec, pieces: list[tuple[list[int], bool]]
) -> tuple[tuple[str, bool], ...]:
    """Text of each run in its place, so that the runs join to the whole."""
    decoded, before, tokens = [], "", list[int]()
    for run, is_blank in pieces:
        tokens += run
        whole = tokenizer.decode(tokens)
        decoded.append((whole[len(before) :], is_blank))
        before = whole
    return tuple(decoded)
