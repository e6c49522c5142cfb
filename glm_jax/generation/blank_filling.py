"""Fills the blanks of a text from left to right, each seeing those before it filled."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.guide import Guide
from glm_jax.engine.prompt import Prompt, PromptError, bucket
from glm_jax.engine.request import Completion, Request, Token, completion
from glm_jax.engine.sampling import Sampling
from glm_jax.generation.blank_spaces import are_spaced
from glm_jax.generation.driver import Answer, drive
from glm_jax.generation.grammars import Grammar
from glm_jax.model.params import GLMParams
from glm_jax.tokenizer import check_fits

# Takes tokens in the order of the text, and whether they fill a blank, as soon as they are final.
OnTokens = Callable[[Sequence[int], bool], None]

# Mean characters of a token: far more than any vocabulary has. A longer text is refused before it
# is tokenised, which takes some twenty times its memory.
_MAX_CHARACTERS = 256


@runtime_checkable
class TextCodec(Protocol):
    """The interface of a tokenizer that blank filling uses."""

    @property
    def special_tokens(self) -> SpecialTokens: ...

    def encode(self, text: str, control_words: tuple[str, ...] = ...) -> list[int]: ...

    def decode(self, ids: Iterable[int], /) -> str: ...


@dataclasses.dataclass(frozen=True)
class FilledText:
    """A text with its blanks filled.

    Attributes:
      text: the whole text.
      blanks: the answer in each blank, in order.
      pieces: the text in pieces, each with whether it fills a blank.
    """

    text: str
    blanks: tuple[str, ...]
    pieces: tuple[tuple[str, bool], ...]


@dataclasses.dataclass(frozen=True)
class PartlyFilled:
    """A text some of whose blanks are filled.

    Attributes:
      tokens: of the whole text, with `mask` at each blank to fill.
      limit: maximum tokens of text, sop and answer.
      is_unidirectional: whether each token of the text sees only those before it; its one blank is
        then at the end.
      pieces: the first `done` tokens in pieces, each with whether it fills a blank.
      blanks: the answer in each blank so far.
      adapter: see `Prompt.adapter`.
      are_spaced: whether the answer in each blank of the text is to begin with a space that the
        tokens before it do not have; None for either. Empty where the text is not known.
    """

    tokens: tuple[int, ...]
    special: SpecialTokens
    mask: int
    limit: int
    is_unidirectional: bool = False
    pieces: tuple[tuple[tuple[int, ...], bool], ...] = ()
    blanks: tuple[tuple[int, ...], ...] = ()
    done: int = 0
    adapter: int = 0
    are_spaced: tuple[bool | None, ...] = ()

    @classmethod
    def begin(
        cls,
        tokenizer: TextCodec,
        text: str,
        limit: int,
        is_unidirectional: bool = False,
        left_truncate: int = 0,
        adapter: int = 0,
    ) -> "PartlyFilled":
        """Tokenise a text. Its blanks are every [MASK]; if there is none, every [sMASK]; otherwise
        one [gMASK], which is added at the end of a text without a mask.

        Args:
          is_unidirectional: the text has no mask; the answer continues it, and each of its tokens
            sees only those before it.
          left_truncate: tokens of an answer for which the first tokens of a text that is too long
            are left out; 0 leaves out none.
          adapter: see `Prompt.adapter`.

        Raises:
          PromptError: the text is longer than `limit` leaves room for, or has a mask where it
            must not.
        """
        special = tokenizer.special_tokens
        if not left_truncate and len(text) > limit * _MAX_CHARACTERS:
            raise PromptError(
                f"the text has {len(text)} characters: no room for an answer in {limit} tokens"
            )
        tokens = tokenizer.encode(text) if is_unidirectional else encode_prompt(tokenizer, text)
        partly = cls.from_tokens(tokens, special, limit, is_unidirectional, left_truncate, adapter)
        return dataclasses.replace(
            partly, are_spaced=are_spaced(tokenizer, text, tokens, partly.mask)
        )

    @classmethod
    def from_tokens(
        cls,
        tokens: Sequence[int],
        special: SpecialTokens,
        limit: int,
        is_unidirectional: bool = False,
        left_truncate: int = 0,
        adapter: int = 0,
    ) -> "PartlyFilled":
        """Do what `begin` does with a text's tokens, which have a blank unless unidirectional.

        Raises:
          PromptError: see `begin`.
        """
        if is_unidirectional:
            Prompt.unidirectional(tokens, special)
            tokens = [*tokens, special.gmask]
        if left_truncate:
            tokens = tokens[max(0, len(tokens) + 1 + left_truncate - limit) :]
        masks = [m for m in (special.mask, special.smask, special.gmask) if m in tokens]
        if len(tokens) + 2 > limit:
            raise PromptError(
                f"the text has {len(tokens)} tokens: no room for an answer in {limit}"
            )
        if not masks:
            raise PromptError("its blank is in what was cut off: shorten the text behind it")
        begun = cls(tuple(tokens), special, masks[0], limit, is_unidirectional, adapter=adapter)
        return begun._with_room()

    @property
    def position(self) -> int:
        """Index of the next blank, or of the end of the text."""
        return self.tokens.index(self.mask) if self.has_blank else len(self.tokens)

    @property
    def has_blank(self) -> bool:
        # A model may write masks of its own; those are filled too, but not without end.
        return self.mask in self.tokens and len(self.blanks) < self.limit

    def prompt(self) -> Prompt:
        """Return the prompt of the next blank."""
        if self.is_unidirectional:
            prompt = Prompt.unidirectional(self.tokens[: self.position], self.special)
        else:
            prompt = Prompt(self.tokens, None if self.mask == self.special.gmask else self.position)
        return dataclasses.replace(prompt, adapter=self.adapter)

    @property
    def is_spaced(self) -> bool | None:
        """The next blank's of `are_spaced`."""
        number = self.tokens.count(self.mask)  # from the end: the first may have been cut off
        return self.are_spaced[-number] if 0 < number <= len(self.are_spaced) else None

    def filled(self, answer: Sequence[int], end_tokens: Sequence[int]) -> "PartlyFilled":
        """Return the text with the next blank filled, without the token that ended the answer."""
        return self._filled(self.special.without_end(answer, end_tokens))._with_room()

    def _filled(self, blank: tuple[int, ...]) -> "PartlyFilled":
        position = self.position
        return dataclasses.replace(
            self,
            tokens=(*self.tokens[:position], *blank, *self.tokens[position + 1 :]),
            pieces=(*self.pieces, (self.tokens[self.done : position], False), (blank, True)),
            blanks=(*self.blanks, blank),
            done=position + len(blank),
        )

    def _with_room(self) -> "PartlyFilled":
        """Return the text with blanks left empty that have no room for a token."""
        partly = self
        while partly.has_blank and len(partly.tokens) + 2 > partly.limit:
            partly = partly._filled(())
        return partly

    def finished(self, tokenizer: TextCodec) -> FilledText:
        """Return the text as it is now, decoded."""
        tokens = list(self.tokens)
        if tokens and tokens[-1] == self.special.eos:
            tokens.pop()
        pieces = [(list(run), is_blank) for run, is_blank in self.pieces]
        pieces.append((tokens[self.done :], False))
        return FilledText(
            text=tokenizer.decode(tokens),
            blanks=tuple(tokenizer.decode(blank) for blank in self.blanks),
            pieces=_decode_pieces(tokenizer, pieces),
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
    on_tokens: OnTokens | None = None,
    guide: Guide | None = None,
) -> FilledText:
    """Fill the blanks of a text; `PartlyFilled.begin` says which they are.

    Args:
      max_length: maximum tokens of text, sop and answer; the model's positions by default.
      sampling: greedy by default.
      end_tokens: eop and eos by default.
      seed: of sampling; blank i uses seed + i.
      on_tokens: called with tokens of the text and of its blanks as they become final.
      guide: what each answer must be, such as `grammars.compile_grammar` returns.

    Raises:
      PromptError: the text is longer than max_length leaves room for.
      TokenizerError: the tokenizer is not the model's.
      SamplingError: bans leave no token.
      LogitsError: the model's logits are NaN or infinite.
    """
    check_fits(tokenizer, config)
    limit = max_length or config.max_sequence_length
    partly = PartlyFilled.begin(tokenizer, text, limit)
    longest = min(bucket(limit), config.max_sequence_length)
    engine = Engine(params, config, EngineSettings(1, longest), tokenizer.special_tokens)
    ends = None if end_tokens is None else tuple(end_tokens)
    request = Request(Prompt((), None), sampling or Sampling(), None, seed, ends, guide=guide)
    return fill(engine, partly, request, on_tokens).finished(tokenizer)


def fill(
    engine: Engine, partly: PartlyFilled, template: Request, on_tokens: OnTokens | None = None
) -> PartlyFilled:
    """Fill all blanks of a text by an engine that does nothing else meanwhile.

    Args:
      template: a request whose prompt and seed are replaced; each blank's seed is one more.
    """
    [filling] = drive(engine, [BlankFilling(partly, template, on_tokens)])
    filling.check()
    return filling.partly


class BlankFilling(Answer):
    """A text whose blanks are filled one after another.

    Attributes:
      partly: the text as it is now.
      completions: the answer of each blank so far.
    """

    def __init__(self, partly: PartlyFilled, template: Request, on_tokens: OnTokens | None = None):
        """
        Args:
          template, on_tokens: see `fill`.
        """
        self.partly, self._template = partly, template
        self.completions: list[Completion] = []
        self._tokens: list[Token] = []
        self._text: list[int] = []  # those of the present blank that are text
        self._stream = TokenStream(on_tokens)
        own = template.end_tokens
        self._ends = partly.special.end_tokens if own is None else own

    def next_work(self) -> Request | None:
        if self.partly.has_blank:
            return next_request(self.partly, self._template)
        self._stream.finish(self.partly)
        return None

    def receive(self, token: Token) -> bool:
        if len(self._text) == len(self._tokens):  # no token has ended it
            self._text += self.partly.special.without_end([token.token], self._ends)
            self._stream.show(self.partly, self._text)
        self._tokens.append(token)
        if token.finish_reason is not None:
            self.completions.append(completion(self._tokens))
            self._tokens, self._text = [], []
            self.partly = self.partly.filled(self.completions[-1].tokens, self._ends)
        return False


def next_request(partly: PartlyFilled, template: Request) -> Request:
    """Return the request that fills the next blank of a text."""
    prompt = partly.prompt()
    room = partly.limit - len(prompt)
    guide = template.guide
    if isinstance(guide, Grammar):
        guide = guide.behind(partly.is_spaced)
    return dataclasses.replace(
        template,
        prompt=prompt,
        guide=guide,
        seed=(template.seed + len(partly.blanks)) % 2**32,
        max_tokens=min(room, template.max_tokens or room),
    )


class TokenStream:
    """Calls `on_tokens` with each token once, in order."""

    def __init__(self, on_tokens: OnTokens | None):
        self._on_tokens, self._count = on_tokens, 0

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStream, (None,)  # who listens is in this process alone

    def show(self, partly: PartlyFilled, answer: Sequence[int]) -> None:
        if self._on_tokens is None:
            return
        # Tokens before a mask that is still to be filled are final.
        fixed = answer[: answer.index(partly.mask)] if partly.mask in answer else answer
        position = partly.position
        self._pass_on(partly, (*partly.tokens[:position], *fixed), position)

    def finish(self, partly: PartlyFilled) -> None:
        is_closed = partly.tokens and partly.tokens[-1] == partly.special.eos
        tokens = partly.tokens[:-1] if is_closed else partly.tokens
        self._pass_on(partly, tokens, len(tokens))

    def _pass_on(self, partly: PartlyFilled, tokens: Sequence[int], blank_from: int) -> None:
        if self._on_tokens is None:
            return
        start, self._count = self._count, max(self._count, len(tokens))
        if start >= blank_from:  # of the present blank, as nearly always
            if tokens[start:]:
                self._on_tokens(tokens[start:], True)
            return
        of_blank = [is_blank for run, is_blank in partly.pieces for _ in run]
        of_blank += [False] * (blank_from - len(of_blank))
        of_blank += [True] * (len(tokens) - len(of_blank))
        for is_blank, run in itertools.groupby(
            range(start, len(tokens)), key=lambda i: of_blank[i]
        ):
            self._on_tokens([tokens[i] for i in run], is_blank)


def encode_prompt(tokenizer: TextCodec, text: str) -> list[int]:
    """Return the ids of a text with blanks; [gMASK] is added at the end of one without.

    A text that has a mask, but not at its end, is closed by eos, as in the original.
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
    """Decode each piece after those before it, so that the pieces join to the whole text."""
    decoded, before, tokens = [], "", list[int]()
    for run, is_blank in pieces:
        tokens += run
        whole = tokenizer.decode(tokens)
        decoded.append((whole[len(before) :], is_blank))
        before = whole
    return tuple(decoded)
