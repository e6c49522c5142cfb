"""Texts in, filled texts out: line by line from a person, or from a file."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from glm_jax.config import GLMConfig
from glm_jax.decoding.beams import BeamSearch
from glm_jax.decoding.blank_filling import (
    FilledText,
    TextCodec,
    fill_blanks,
    fill_blanks_by_beams,
)
from glm_jax.decoding.generate import PromptError, prepare
from glm_jax.decoding.sampling import Sampling
from glm_jax.model.params import GLMParams

_GREEN_UNDERLINED, _PLAIN = "\x1b[32;4m", "\x1b[0m"


def render(filled: FilledText, in_colour: bool) -> str:
    """The whole text, what was filled in green and underlined where colours show."""
    if not in_colour:
        return filled.text
    return "".join(
        f"{_GREEN_UNDERLINED}{piece}{_PLAIN}" if is_blank and piece else piece
        for piece, is_blank in filled.pieces
    )


def prompts(file: str | None) -> Iterable[str]:
    """Lines of a file, or what a person types until an empty line or the end of input.

    Raises:
      PromptError: the file cannot be read.
    """
    if file is None:
        return iter(_ask, "")
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{file}: {error}") from error


def _ask() -> str:
    try:
        return input("text with [MASK], [sMASK] or [gMASK] (empty ends): ")
    except EOFError:
        return ""


def fill_all(
    params: GLMParams,
    config: GLMConfig,
    tokenizer: TextCodec,
    texts: Iterable[str],
    strategy: Sampling | BeamSearch,
    max_length: int | None,
    seed: int,
    output: TextIO | None = None,
) -> int:
    """Fills each text and prints it; one that cannot be filled gives a line on stderr.

    Returns:
      How many could not be filled.
    """
    output = output or sys.stdout
    failures = 0
    params = prepare(params)

    def fill(text: str) -> FilledText:
        if isinstance(strategy, BeamSearch):
            found = fill_blanks_by_beams(
                params, config, tokenizer, text, strategy, max_length=max_length
            )
            return found[0]
        return fill_blanks(
            params, config, tokenizer, text, max_length=max_length, sampling=strategy, seed=seed
        )

    for number, text in enumerate(texts, 1):
        try:
            filled = fill(text)
        except PromptError as error:
            print(f"error: line {number}: {error}", file=sys.stderr)
            failures += 1
            continue
        print(render(filled, output.isatty()), file=output, flush=True)
    return failures
