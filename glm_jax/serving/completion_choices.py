"""Choices of a completion: from tokens as they arrive to JSON."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from glm_jax.engine.request import Token
from glm_jax.engine.scoring import Score
from glm_jax.generation.blank_filling import PartlyFilled
from glm_jax.generation.text_stream import Stops, TextStream
from glm_jax.serving.metrics import AnswerTimes
from glm_jax.serving.schemas import CompletionRequest

# Text, log-probability and top tokens of a token.
_Named = tuple[str, float | None, dict[str, float] | None]


@dataclasses.dataclass(frozen=True)
class BlankPrompt:
    """A prompt with its one blank, and the text on both sides of it.

    Attributes:
      before: text before the blank, without the space that the answer begins with.
      after: text behind the blank.
      text: the prompt without its mask.
    """

    partly: PartlyFilled
    before: str
    after: str
    text: str

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens before the blank."""
        return self.partly.tokens[: self.partly.position]

    @property
    def can_be_scored(self) -> bool:
        """Whether its blank is the [gMASK] at its end, so that its tokens are all of the text."""
        partly = self.partly
        is_at_end = partly.tokens[-1] == partly.special.gmask == partly.mask
        return is_at_end and bool(self.tokens)


class Choice:
    """One choice of an answer while its tokens arrive."""

    def __init__(
        self,
        index: int,
        prompt: BlankPrompt,
        request: CompletionRequest,
        decode: Callable[[Iterable[int]], str],
        times: AnswerTimes,
        min_tokens: int = 0,
        is_guided: bool = False,
    ):
        self.index, self.prompt = index, prompt
        self.tokens = 0
        self._special, self._has_ended = prompt.partly.special, False
        self._request, self._times, self._min_tokens = request, times, min_tokens
        self._stops = Stops([request.stop] if isinstance(request.stop, str) else request.stop or [])
        self._named_prompt: list[_Named] = []
        self._has_scores = False
        # Tokens that no piece has named yet, each with the text that it adds and the names of its
        # top tokens.
        self._unnamed: list[tuple[Token, str, list[str]]] = []
        self._start = 0  # of the answer's own text
        self._length = 0  # of the text of all tokens that pieces have named
        self._given = 0  # of the answer's own text in pieces
        self._log_probability = 0.0
        # A space between the prompt and a guided answer is no part of the answer.
        behind = () if is_guided and not request.echo else prompt.tokens
        self._decode, self._stream = decode, TextStream(decode, behind)

    def opening(self) -> dict[str, Any] | None:
        """Return the prompt as a piece if the request has `echo`."""
        if not self._request.echo:
            return None
        opening = self.piece(self.prompt.before, None)
        self._start = self._length = len(self.prompt.before)
        return opening

    @property
    def mean_log_probability(self) -> float:
        """Of the tokens so far, in nats; 0 where their log-probabilities were not asked for."""
        return self._log_probability / max(1, self.tokens)

    def add_prompt(self, score: Score | None) -> None:
        """Name the prompt's tokens in the next piece.

        Args:
          score: of these tokens; without it they have no log-probabilities.
        """
        self._has_scores = score is not None
        stream = TextStream(self._decode)
        for number, token_id in enumerate(self.prompt.tokens):
            if score is None:
                self._named_prompt.append((stream.add(token_id), None, None))
                continue
            best = score.top_tokens[number], score.top_log_probabilities[number]
            top = tuple(zip(*(x.tolist() for x in best), strict=True))
            token = Token(0, token_id, float(score.log_probabilities[number]), None, top)
            names = self._names(token, stream)
            raw = stream.add(token_id)
            self._named_prompt.append((raw, token.log_probability, self._top(token, raw, names)))

    def receive(self, token: Token) -> dict[str, Any] | None:
        """Return the piece that a token adds, or None if it adds no text yet."""
        self._times.token()
        self.tokens += 1
        self._log_probability += token.log_probability
        self._has_ended |= not self._special.without_end([token.token])
        names = self._names(token, self._stream)  # before the stream goes on
        raw = "" if self._has_ended else self._stream.add(token.token)
        reason = token.finish_reason
        if reason is not None:
            raw += self._stream.finish()
        # What min_tokens asks for is not cut.
        is_required = self.tokens <= self._min_tokens
        text = raw if is_required else self._stops.add(raw)
        # Clients that score prompts count on an entry for each generated token.
        if self._request.logprobs is not None and (not self._has_ended or self._has_scores):
            self._unnamed.append((token, raw, names))
        if self._stops.has_stopped:
            reason = "stop"
        elif reason is not None:
            text += self._stops.finish()
        self._given += len(text)
        named = self._take_named(is_last=reason is not None)
        if reason is not None:
            self._times.end()
            text += self.prompt.after if self._request.echo else ""
        return self.piece(text, reason, named) if text or reason or named else None

    def _take_named(self, is_last: bool) -> list[_Named]:
        """Take the tokens whose text the pieces have; of the last one as much as a stop text left.

        Tokens that add no text of their own go with the next one that does.
        """
        named: list[_Named] = []
        start, count = self._length - self._start, 0
        for number, (token, text, names) in enumerate(self._unnamed, 1):
            is_cut = self._stops.has_stopped and start >= self._given
            if is_cut or not (is_last or start + len(text) <= self._given):
                break
            left = text[: self._given - start]
            named.append((left, token.log_probability, self._top(token, left, names)))
            start += len(text)
            count = number if text or is_last else count
        del self._unnamed[:count]
        return named[:count]

    def _names(self, token: Token, stream: TextStream) -> list[str]:
        """Return the text that each top token would add here, or its id where that is not a whole
        character."""
        ids = [token_id for token_id, _ in token.top_logprobs[: self._request.logprobs or 0]]
        texts = [stream.peek(token_id) for token_id in ids]
        return [
            text if text and "\ufffd" not in text else _id_name(token_id)
            for text, token_id in zip(texts, ids, strict=True)
        ]

    def _top(self, token: Token, chosen: str, names: Sequence[str]) -> dict[str, float] | None:
        """Return the log-probabilities of the top tokens by name.

        As in OpenAI's interface the chosen token is always among them: last, where it is none of
        the top tokens.
        """
        if not self._request.logprobs:
            return None
        top: dict[str, float] = {}
        for (token_id, value), text in zip(token.top_logprobs, names, strict=False):
            is_chosen = token_id == token.token
            name = chosen if is_chosen else text
            if not is_chosen and (name == chosen or name in top):
                name = _id_name(token_id)
            top[name] = round(value, 6)
        return top | {chosen: round(token.log_probability, 6)}

    def piece(
        self, text: str, reason: str | None, named: Sequence[_Named] | None = None
    ) -> dict[str, Any]:
        """Return a part of the choice as JSON.

        Args:
          named: tokens that it names; those of the prompt where it is None.
        """
        probabilities = None
        if self._request.logprobs is not None:
            probabilities = self._probabilities(self._named_prompt if named is None else named)
        return {
            "text": text,
            "index": self.index,
            "logprobs": probabilities,
            "finish_reason": reason,
        }

    def _probabilities(self, named: Sequence[_Named]) -> dict[str, Any]:
        offsets = []
        for text, _, _ in named:
            offsets.append(self._length)
            self._length += len(text)
        return {
            "tokens": [text for text, _, _ in named],
            "token_logprobs": [None if x is None else round(x, 6) for _, x, _ in named],
            "top_logprobs": [top for _, _, top in named] if self._request.logprobs else None,
            "text_offset": offsets,
        }


def _id_name(token: int) -> str:
    return f"token_id:{token}"
