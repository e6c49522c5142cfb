"""Grammars of guided answers, by llguidance: from choices, a regular expression or a JSON schema to
the tokens that spell them.

A grammar is of the text that the answer decodes to by itself: sentencepiece writes a space as a
mark in front of a word, and decoding leaves out the one at the very beginning. So `Paris` may be
spelled with the mark or without. Where a blank is filled, the characters before it say which.
"""

import collections
import dataclasses
import functools
import importlib.util
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from glm_jax.engine.guide import Mask
from glm_jax.errors import UserError
from glm_jax.text_files import check_characters
from glm_jax.tokenizer import BLANK_WORDS

_MAX_CHARACTERS = 1 << 16  # of a grammar's source
_MAX_REASON = 200
_MAX_PREPARED = 16
# What reading a grammar may cost, half a second where all of it is used, and one mask, some 4 ms.
# States take 1 to 2 KB each.
_LIMITS: dict[str, Any] = {
    "max_grammar_size": 50_000,
    "max_lexer_states": 20_000,
    "step_lexer_fuel": 100_000,
    "verbose_errors": False,
}
# JSON as json.dumps writes it: with free blanks a weak model writes nothing else.
_JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# The space at the front is the mark's; `GrammarState` takes it back where there is none. Any
# spelling of a text is allowed, not the tokenizer's own alone.
_TOP = '%llguidance {"no_forcing": true}\nstart: " " @answer'
_LONGEST_BLANK_WORD = len("<|blank_80|>")


class GrammarError(UserError):
    """What an answer is to be cannot be understood, or is too complex."""


def is_installed() -> bool:
    """Return whether there is the library that reads grammars."""
    return importlib.util.find_spec("llguidance") is not None


class Vocabulary:
    """A tokenizer's tokens as llguidance takes them.

    Attributes:
      space: id of a token beyond the tokenizer's that is one space.
      is_text, is_spaced: bits of the tokens that are text, and that begin with the mark of a space.
    """

    def __init__(self, tokenizer: Any):
        """Give the library a tokenizer's pieces.

        Raises:
          GrammarError: the library is not installed, or the tokenizer has no pieces.
        """
        if not is_installed():
            raise GrammarError("llguidance is missing: pip install 'glm_jax[guided]'")
        if not hasattr(tokenizer, "pieces"):
            raise GrammarError(f"a {type(tokenizer).__name__} has no pieces: use a Tokenizer")
        import llguidance

        self._tokenizer = tokenizer
        pieces = tokenizer.pieces()
        self.space = max(pieces) + 1
        texts = [b""] * (self.space + 1)
        for token, piece in pieces.items():
            texts[token] = piece.text
        texts[self.space] = b" "
        self._texts = texts
        self.words = -(-len(texts) // 32)
        self.is_text = self._bits(pieces)
        self.is_spaced = self._bits([t for t, piece in pieces.items() if piece.is_spaced])
        self._lone_marks = {t for t, piece in pieces.items() if piece == (b" ", True)}
        mark = next(iter(self._lone_marks), None)
        # By the model's settings, decoding leaves out one space at the beginning, or all.
        self._leaves_out_all = mark is not None and tokenizer.decode([mark, mark]) == ""
        self._closing = [t for t, piece in pieces.items() if b">" in piece.text]
        wrapper = llguidance.TokenizerWrapper(_Wrapped(texts))
        self.tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=len(texts))

    def __reduce__(self) -> tuple[Any, ...]:
        return vocabulary_of, (self._tokenizer,)  # the library's part cannot be pickled

    def _bits(self, tokens: Any) -> Mask:
        flags = np.zeros(self.words * 32, np.uint8)
        flags[list(tokens)] = 1
        return np.packbits(flags, bitorder="little").view(np.uint32)

    def has_mark(self, token: int) -> bool:
        """Whether a token begins with the mark of a space."""
        return bool(self.is_spaced[token >> 5] >> (token & 31) & 1)

    def is_nothing(self, tokens: Sequence[int]) -> bool:
        """Whether these first tokens decode to no text, so that another mark is left out too."""
        return self._leaves_out_all and len(tokens) == 1 and tokens[0] in self._lone_marks

    def blank_words(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens that would complete, behind these, a word that decodes to blanks."""
        tail = b"".join(self._texts[token] for token in tokens[-_LONGEST_BLANK_WORD:])
        _, found, tail = tail.rpartition(b"<")
        if not found:
            return []
        before = b"<" + tail
        is_word = lambda text: BLANK_WORDS.search(text.decode("latin-1")) is not None
        return [token for token in self._closing if is_word(before + self._texts[token])]


class _Wrapped:
    """What llguidance asks a tokenizer."""

    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokens: list[bytes]):
        self.tokens = [*tokens, b""]
        self.eos_token_id = len(tokens)  # which the engine knows nothing of: it has ends of its own

    def __call__(self, text: Any) -> list[int]:
        return []  # for spelling forced texts, which `_TOP` turns off


@functools.lru_cache(maxsize=2)
def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """Return a tokenizer's vocabulary, which takes a second to make for a large one."""
    return Vocabulary(tokenizer)


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What an answer must be; a `Guide` of the engine.

    Each answer has a matcher of its own: copies share the states they have found, and their limit.

    Attributes:
      source: as llguidance takes it.
      is_spaced: whether the answer's first token begins with the mark of a space; None for either.
    """

    vocabulary: Vocabulary
    source: str
    is_spaced: bool | None = None
    _prepared: collections.deque[Any] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_MAX_PREPARED), repr=False, compare=False
    )

    def __reduce__(self) -> tuple[Any, ...]:
        return Grammar, (self.vocabulary, self.source, self.is_spaced)

    def prepare(self, answers: int) -> None:
        """Make what so many answers begin with, which takes up to half a second for a large schema,
        in this thread instead of the engine's."""
        for _ in range(min(answers, _MAX_PREPARED)):
            self._prepared.append(self.new_matcher())

    def matcher(self) -> Any:
        """Return a matcher at the beginning of an answer."""
        try:
            return self._prepared.popleft()
        except IndexError:
            return self.new_matcher()

    def new_matcher(self) -> Any:
        """Return a matcher that is made now; the grammar's error is in it."""
        import llguidance

        limits = llguidance.LLParserLimits(**_LIMITS)
        return llguidance.LLMatcher(
            self.vocabulary.tokenizer, self.source, log_level=0, limits=limits
        )

    def behind(self, is_spaced: bool | None) -> "Grammar":
        """Return the grammar with another `is_spaced`."""
        return dataclasses.replace(self, is_spaced=is_spaced)

    def start(self) -> "GrammarState":
        """Return the state before the first token."""
        return GrammarState(self)


class GrammarState:
    """A grammar behind some tokens; a `GuideState` of the engine.

    Attributes:
      error: why it allows nothing any more.
    """

    def __init__(self, grammar: Grammar):
        self.error: str | None = None
        self._grammar, self._vocabulary = grammar, grammar.vocabulary
        self._matcher = grammar.matcher()
        self._tokens: list[int] = []

    def allow(self, mask: Mask, /) -> bool:
        """Write which tokens may come next, and return whether the answer may end here."""
        allowed, may_end = self._next() if self._tokens else self._first()
        if self._matcher.is_error():  # by all that was found out so far, drafts' masks included
            self._renew(self._tokens)
            allowed, may_end = self._next() if self._tokens else self._first()
        if self._matcher.is_error():
            self.error = f"the grammar is too complex: {_reason(self._matcher.get_error())}"
            allowed, may_end = np.zeros_like(allowed), False
        for token in self._vocabulary.blank_words(self._tokens):
            allowed[token >> 5] &= ~np.uint32(1 << (token & 31))
        mask[:] = 0
        count = min(len(mask), len(allowed))
        mask[:count] = allowed[:count]
        return may_end

    def _next(self) -> tuple[Mask, bool]:
        allowed = self._computed()
        if self._vocabulary.is_nothing(self._tokens):
            allowed &= ~self._vocabulary.is_spaced
        return allowed, self._matcher.is_accepting()

    def _first(self) -> tuple[Mask, bool]:
        """Return what may come first: a text of the grammar behind the mark, or without it."""
        is_spaced = self._vocabulary.is_spaced
        with_mark = self._computed() & is_spaced
        self._matcher.consume_token(self._vocabulary.space)
        without = self._computed() & ~is_spaced
        may_end = self._matcher.is_accepting()
        self._matcher.rollback(1)
        is_wanted = self._grammar.is_spaced
        wanted = with_mark if is_wanted else without
        is_free = is_wanted is None or not wanted.any()
        return (with_mark | without if is_free else wanted), may_end

    def _computed(self) -> Mask:
        mask = np.zeros(-(-(self._vocabulary.tokenizer.vocab_size) // 32), np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return mask[: self._vocabulary.words] & self._vocabulary.is_text

    def accept(self, token: int, /) -> None:
        """Take an allowed token as the answer's next one."""
        self._consume(token)
        self._tokens.append(token)

    def _consume(self, token: int) -> None:
        if not self._tokens and not self._vocabulary.has_mark(token):
            self._matcher.consume_token(self._vocabulary.space)
        self._matcher.consume_token(token)

    def rollback(self, count: int, /) -> None:
        """Take back the latest tokens."""
        remaining = self._tokens[: len(self._tokens) - count]
        is_whole = not remaining and not self._vocabulary.has_mark(self._tokens[0])
        is_back = self._matcher.rollback(count + is_whole)
        self._tokens = remaining
        if not is_back:  # it fails behind a dead end
            self._renew(remaining)

    def _renew(self, tokens: Sequence[int]) -> None:
        """Begin again, and take these tokens."""
        self._matcher, self._tokens, self.error = self._grammar.new_matcher(), [], None
        for token in tokens:
            self.accept(token)


@functools.lru_cache(maxsize=64)
def compile_grammar(tokenizer: Any, name: str, source: str | tuple[str, ...]) -> Grammar:
    """Return the grammar of a setting.

    Args:
      name: guided_choice, guided_regex or guided_json.
      source: the setting's value.

    Raises:
      GrammarError: it cannot be understood, is too complex, or cannot be spelled.
    """
    vocabulary = vocabulary_of(tokenizer)
    texts = [source] if isinstance(source, str) else source
    if sum(map(len, texts)) > _MAX_CHARACTERS:
        raise GrammarError(f"{name}: at most {_MAX_CHARACTERS} characters")
    for text in texts:
        check_characters(text)
    answer = _SOURCES[name](source) | {"name": "answer"}
    grammar = Grammar(vocabulary, json.dumps({"grammars": [{"lark_grammar": _TOP}, answer]}))
    matcher = grammar.new_matcher()
    if matcher.is_error():
        raise GrammarError(f"{name}: {_reason(matcher.get_error())}")
    state, mask = grammar.start(), np.zeros(vocabulary.words, np.uint32)
    if not state.allow(mask) and not mask.any():
        raise GrammarError(
            f"{name}: {state.error or 'no text of this tokenizer is such an answer'}"
        )
    return grammar


def _choice(choices: Sequence[str]) -> dict[str, Any]:
    for choice in choices:
        if BLANK_WORDS.search(choice):
            raise GrammarError(f"guided_choice: {choice!r} cannot be written by this tokenizer")
    texts = " | ".join(map(json.dumps, dict.fromkeys(choices)))
    return {"lark_grammar": f"start: CHOICE\nCHOICE: {texts}"}


def _regex(regex: str) -> dict[str, Any]:
    import llguidance

    answer: dict[str, Any]
    [answer] = json.loads(llguidance.LLMatcher.grammar_from_regex(regex))["grammars"]
    return answer


def _json(schema: str) -> dict[str, Any]:
    return {"json_schema": json.loads(schema) | {"x-guidance": _JSON_FORM}}


_SOURCES: dict[str, Any] = {"guided_choice": _choice, "guided_regex": _regex, "guided_json": _json}


def _reason(message: str) -> str:
    """Return the library's message in a line: without its picture of the grammar made for it."""
    if message.startswith("panic"):  # by a size that the library does not check
        return "too complex"
    lines = message.replace("<non-verbose/>", "").splitlines()
    [line, *_] = [*(line for line in lines if line.startswith("error: ")), *lines]
    return re.sub(r"^error: |^at \d+\(\d+\): ", "", line)[:_MAX_REASON].strip()
