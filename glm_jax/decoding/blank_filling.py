"""Fills the blanks of a text from left to right, each seeing those before it filled."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.decoding.beams import BeamSearch, beam_search
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


@dataclasses.dataclass(frozen=True)
class _Partly:
    """A text some of whose blanks are filled: tokens, of which `done` are in pieces."""

    tokens: tuple[int, ...]
    pieces: tuple[tuple[tuple[int, ...], bool], ...] = ()
    blanks: tuple[tuple[int, ...], ...] = ()
    done: int = 0

    def filled(self, position: int, blank: tuple[int, ...]) -> "_Partly":
        """With the mask at a position replaced."""
        return _Partly(
            tokens=(*self.tokens[:position], *blank, *self.tokens[position + 1 :]),
            pieces=(*self.pieces, (self.tokens[self.done : position], False), (blank, True)),
            blanks=(*self.blanks, blank),
            done=position + len(blank),
        )


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
    params = prepare(params)

    def complete(prompt: Prompt, number: int, common: dict[str, Any]) -> list[list[int]]:
        return generate(
            params,
            config,
            [prompt],
            sampling=sampling,
            seed=seed + number,
            on_tokens=on_tokens,
            **common,
        )

    return _fill(config, tokenizer, text, max_length, end_tokens, complete)[0]


def fill_blanks_by_beams(
    params: GLMParams,
    config: GLMConfig,
    tokenizer: TextCodec,
    text: str,
    settings: BeamSearch,
    *,
    max_length: int | None = None,
    end_tokens: Sequence[int] | None = None,
) -> list[FilledText]:
    """`fill_blanks` by beam search. Each blank takes its best answer but the last, which has
    as many as there are beams: one text each, best first.

    Raises:
      PromptError: the text is longer than max_length leaves room for.
    """
    params = prepare(params)

    def complete(prompt: Prompt, _: int, common: dict[str, Any]) -> list[list[int]]:
        found = beam_search(params, config, prompt, settings, **common)
        return [list(hypothesis.tokens) for hypothesis in found]

    return _fill(config, tokenizer, text, max_length, end_tokens, complete)


def _fill(
    config: GLMConfig,
    tokenizer: TextCodec,
    text: str,
    max_length: int | None,
    end_tokens: Sequence[int] | None,
    complete: Callable[[Prompt, int, dict[str, Any]], list[list[int]]],
) -> list[FilledText]:
    """The text with all blanks filled, once for each answer to the last of them.

    Args:
      complete: answers to a prompt, best first, given how many blanks came before and the
        arguments that all ways to complete have in common.
    """
    special = tokenizer.special_tokens
    limit = max_length or config.max_sequence_length
    ends = special.end_tokens if end_tokens is None else tuple(end_tokens)
    common = {"max_length": limit, "end_tokens": ends, "special_tokens": special}
    tokens = encode_prompt(tokenizer, text)
    if len(tokens) + 2 > limit:
        raise PromptError(f"the text has {len(tokens)} tokens: no room for an answer in {limit}")
    mask = next(m for m in (special.mask, special.smask, special.gmask) if m in tokens)
    found = [_Partly(tuple(tokens))]
    # A model may write masks of its own; those are filled too, but not without end.
    while mask in found[0].tokens and len(found[0].blanks) < limit:
        best = found[0]
        position = best.tokens.index(mask)
        prompt = Prompt(best.tokens, None if mask == special.gmask else position)
        answers: list[list[int]] = [[]]
        if len(best.tokens) + 2 <= limit:
            answers = complete(prompt, len(best.blanks), common)
        found = [best.filled(position, _without_end(a, ends, special.eod)) for a in answers]
    return [_finished(tokenizer, partly) for partly in found]


def _without_end(answer: list[int], ends: Sequence[int], eod: int) -> tuple[int, ...]:
    kept = answer[:-1] if answer and answer[-1] in ends else answer
    # The document ended there, says the model.
    return tuple(kept[:-1] if kept and kept[-1] == eod else kept)


def _finished(tokenizer: TextCodec, partly: _Partly) -> FilledText:
    tokens = list(partly.tokens)
    if tokens and tokens[-1] == tokenizer.special_tokens.eos:
        tokens.pop()
    pieces = [(list(run), is_blank) for run, is_blank in partly.pieces]
    pieces.append((tokens[partly.done :], False))
    return FilledText(
        text=tokenizer.decode(tokens),
        blanks=tuple(tokenizer.decode(blank) for blank in partly.blanks),
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
