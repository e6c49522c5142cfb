"""Texts in, filled texts out: line by line from a person, or from a file."""

import contextlib
import dataclasses
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from glm_jax.config import GLMConfig
from glm_jax.engine.beam_search import BeamSearch
from glm_jax.engine.draft_model import SmallModel
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.guide import Guide
from glm_jax.engine.prompt import Prompt, PromptError
from glm_jax.engine.request import Request
from glm_jax.engine.sampling import Sampling
from glm_jax.engine.stepwise import finish
from glm_jax.errors import UserError
from glm_jax.generation.beam_filling import filling_by_beams
from glm_jax.generation.blank_filling import (
    FilledText,
    OnTokens,
    PartlyFilled,
    TextCodec,
    fill,
)
from glm_jax.generation.text_stream import TextStream
from glm_jax.model.device_layout import prepare
from glm_jax.model.params import GLMParams
from glm_jax.text_files import check_characters, read_lines

_GREEN_UNDERLINED, _PLAIN = "\x1b[32;4m", "\x1b[0m"
_ASK = "text with [MASK], [sMASK] or [gMASK] (empty ends): "


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How texts are filled.

    Attributes:
      choice: how tokens are chosen: sampling or beam search.
      max_length: maximum tokens of text, sop and answer; the model's positions by default.
      max_tokens: maximum tokens of each blank; as many as there is room for by default.
      is_unidirectional: texts have no masks; answers continue them, and each token of a text sees
        only those before it.
      speculate, small_model: see `EngineSettings` and `Engine`.
      guide: what the answer in each blank must be; None for anything.
    """

    choice: Sampling | BeamSearch
    max_length: int | None = None
    max_tokens: int | None = None
    seed: int = 0
    is_unidirectional: bool = False
    speculate: int = 0
    small_model: SmallModel | None = None
    guide: Guide | None = None


def render(filled: FilledText, in_colour: bool) -> str:
    """Return the whole text, with its blanks green and underlined if in colour."""
    if not in_colour:
        return filled.text
    return "".join(_coloured(piece, is_blank) for piece, is_blank in filled.pieces)


def _coloured(piece: str, is_blank: bool) -> str:
    return f"{_GREEN_UNDERLINED}{piece}{_PLAIN}" if is_blank and piece else piece


def read_texts(file: str) -> list[str]:
    """Return the lines of a file.

    Raises:
      TextFileError: the file cannot be read.
    """
    return list(read_lines(Path(file)))


def ask_texts(history: Path | None) -> Iterator[str]:
    """Yield the lines that a person types, until an empty line or the end of input.

    Args:
      history: a file that keeps them for the arrow keys, also of later runs; None for none.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A line that is not UTF-8 is then an error of that line, which the tokenizer reports.
        sys.stdin.reconfigure(errors="surrogateescape")
    with _history(history):
        while True:
            try:
                text = input(_ASK)
            except EOFError:
                return
            if not text:
                return
            yield text


@contextlib.contextmanager
def _history(file: Path | None) -> Iterator[None]:
    if file is None or not sys.stdin.isatty():
        yield
        return
    import readline  # takes over the terminal, so only for a person

    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)


def fill_all(
    params: GLMParams,
    config: GLMConfig,
    tokenizer: TextCodec,
    texts: Iterable[str],
    strategy: Strategy,
    with_id: bool = False,
    output: Any = None,
) -> int:
    """Fill and print each text; one that cannot be filled gives an error line on stderr.

    On a terminal tokens are printed as they arrive, those of blanks in colour.

    Args:
      with_id: lines are "ID<tab>TEXT", and are printed with their ids.
      output: a text file; standard output by default.

    Returns:
      The number of texts that could not be filled.

    Raises:
      PromptError: a max_length past the model's positions.
    """
    output = output or sys.stdout
    filler = _filler(prepare(params), config, tokenizer, strategy)
    failures = 0
    for number, line in enumerate(texts, 1):
        try:
            check_characters(line)
            label, text = _split_id(line) if with_id else ("", line)
            typing = _Typing(tokenizer, output, label) if output.isatty() else None
            filled = filler(text, None if typing is None else typing.show).finished(tokenizer)
        except UserError as error:
            print(f"error: line {number}: {error}", file=sys.stderr)
            failures += 1
            continue
        if typing is not None:
            typing.finish(filled)
        else:
            print(label + render(filled, in_colour=False), file=output, flush=True)
    return failures


def _split_id(line: str) -> tuple[str, str]:
    label, tab, text = line.partition("\t")
    if not tab:
        raise PromptError("no tab between an id and a text (--with_id)")
    return label + tab, text


def _filler(
    params: GLMParams, config: GLMConfig, tokenizer: TextCodec, strategy: Strategy
) -> Callable[[str, OnTokens | None], PartlyFilled]:
    limit = strategy.max_length or config.max_sequence_length
    special, choice = tokenizer.special_tokens, strategy.choice

    def begin(text: str) -> PartlyFilled:
        return PartlyFilled.begin(tokenizer, text, limit, strategy.is_unidirectional)

    if isinstance(choice, BeamSearch):
        max_tokens = strategy.max_tokens
        steps = lambda text: filling_by_beams(params, config, begin(text), choice, max_tokens)
        return lambda text, _: finish(steps(text))[0][0]
    settings = EngineSettings(1, limit, speculate=strategy.speculate)
    engine = Engine(params, config, settings, special, strategy.small_model)
    request = Request(
        prompt=Prompt((), None),
        sampling=choice,
        max_tokens=strategy.max_tokens,
        seed=strategy.seed,
        guide=strategy.guide,
    )
    return lambda text, on_tokens: fill(engine, begin(text), request, on_tokens)


class _Typing:
    """Prints a text while its tokens arrive."""

    def __init__(self, tokenizer: TextCodec, output: Any, label: str):
        self._stream, self._output = TextStream(tokenizer.decode), output
        self._shown = ""
        self._print(label)

    def show(self, tokens: Sequence[int], is_blank: bool) -> None:
        text = "".join(map(self._stream.add, tokens))
        self._print(_coloured(text, is_blank))
        self._shown += text

    def finish(self, filled: FilledText) -> None:
        """End the line; if the final text differs from what was printed, print it again."""
        if filled.text.startswith(self._shown):
            self._print(filled.text[len(self._shown) :] + "\n")
        else:
            self._print("\n" + render(filled, in_colour=True) + "\n")

    def _print(self, text: str) -> None:
        print(text, end="", file=self._output, flush=True)
