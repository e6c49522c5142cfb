"""Beam search: the likeliest answers as wholes, not token after token.

Each beam is a row of a `ForkingDecoder`: the host keeps the best continuations of all beams, and
has the rows go on from those they continue.

As the original's deterministic `BeamSearchStrategy`: scores are sums of log-probabilities;
an answer that has ended is compared with others by its score over ((5 + length) / 6) ** p,
the length that of context, sop, prefix and answer together. A search of one beam is greedy.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Container, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.engine.forking_decoder import ForkingDecoder
from glm_jax.engine.generation_settings import check_settings
from glm_jax.engine.logit_processors import repeated
from glm_jax.engine.prompt import Prompt, Resolved, bucket, check_adapter, resolve
from glm_jax.engine.sampling import check_banned, no_numbers, nothing_allowed
from glm_jax.engine.stepwise import Steps, finish
from glm_jax.model.adapters import adapter_count
from glm_jax.model.device_layout import prepare
from glm_jax.model.params import GLMParams
from glm_jax.sharding import constrain

_BANNED = -65504.0  # the logit of a banned token, by which others' probabilities are the original's


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """Settings of a search.

    Attributes:
      num_beams: answers that are followed at once, and returned.
      length_penalty: the exponent p; above 0 it favours longer answers.
      no_repeat_ngram: no n tokens in a row, the last of them generated, appear twice; 0
        for no such ban.
      min_tokens: that are generated before a token that ends the text may be.
      banned_tokens: that never come.
      banned_prefixes: tokens that no answer begins with.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
    min_tokens: int = 0
    banned_tokens: tuple[int, ...] = ()
    banned_prefixes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        check_settings(self)


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """An answer: generated tokens, the end token included where there was one.

    Attributes:
      score: sum of log-probabilities (nats) over the penalty of its length.
    """

    tokens: tuple[int, ...]
    score: float

    def finish_reason(self, end_tokens: Container[int]) -> str:
        """Return "stop" if one of these tokens ended it, else "length"."""
        return "stop" if self.tokens and self.tokens[-1] in end_tokens else "length"


def beam_search(
    params: GLMParams,
    config: GLMConfig,
    prompt: Sequence[int] | Prompt,
    settings: BeamSearch,
    *,
    max_length: int | None = None,
    end_tokens: Sequence[int] | None = None,
    special_tokens: SpecialTokens | None = None,
) -> list[Hypothesis]:
    """Return the best `num_beams` answers, best first.

    Args:
      prompt, max_length, end_tokens, special_tokens: see `generate.generate`.

    Raises:
      PromptError: special tokens unknown, a prompt that leaves no room, or one for an adapter
        that the model does not have.
      SamplingError: a banned token that is not in the vocabulary, or no token may come.
      LogitsError: the model gives no numbers.
    """
    resolved = resolve([prompt], config, max_length, end_tokens, special_tokens)
    return finish(beam_steps(params, config, settings, resolved))


def beam_steps(
    params: GLMParams, config: GLMConfig, settings: BeamSearch, resolved: Resolved
) -> Steps[list[Hypothesis]]:
    """`beam_search` a token at a time, so that other work can go on between.

    Args:
      resolved: of one prompt, by `prompt.resolve`.

    Raises:
      PromptError, SamplingError, LogitsError: as `beam_search`.
    """
    [prompt], special, limit, ends = resolved
    check_adapter(prompt, adapter_count(params))
    named = (*settings.banned_tokens, *itertools.chain(*settings.banned_prefixes))
    check_banned(named, config.vocab_size)
    decoder = ForkingDecoder(prepare(params), config, prompt, settings.num_beams, limit)
    yield from decoder.prefill(prompt, special.sop)
    search = _Search(prompt.tokens(special.sop), settings, ends, bucket(limit))
    text_ends = list(special.text_ends(ends))
    # Whatever ends, one continuation more than there are beams goes on.
    count = (len(set(ends)) + 1) * settings.num_beams + 1
    while True:
        yield None
        logits = yield from decoder.step(search.latest, search.length - 1)
        banned = search.banned(config.vocab_size, text_ends)
        candidates = (logits, *search.state, banned, settings.no_repeat_ngram, count)
        best = yield from decoder.run(expand, *candidates)
        search.take(*(np.asarray(x) for x in best))
        if search.is_done or search.length >= limit:
            return search.best()
        decoder.follow(search.parents)


class _Search:
    """The beams so far; which candidates they go on with is decided on the host.

    Attributes:
      tokens: int32 [num_beams, width] of prompt and answer, `length` of them.
      scores: float32 [num_beams], sums of log-probabilities; -inf of rows without a beam.
      parents: of each beam there is, the row that it goes on from.
    """

    def __init__(
        self, context: tuple[int, ...], settings: BeamSearch, ends: Sequence[int], width: int
    ):
        self._settings, self._ends = settings, frozenset(ends)
        self.first = self.length = len(context)
        self.tokens = np.zeros((settings.num_beams, width), np.int32)
        self.tokens[:, : self.length] = context
        self.scores = _scores([0.0], settings.num_beams)  # one beam before the first token
        self.parents = np.zeros(1, np.int32)
        self.is_done = False
        self._ended: list[Hypothesis] = []

    @property
    def state(self) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Scores, tokens, and how many of these there are before and in the answer."""
        return self.scores, self.tokens, self.length, self.first

    @property
    def latest(self) -> np.ndarray:
        """int32 [num_beams], the last token of each beam."""
        return self.tokens[:, self.length - 1]

    def _penalised(self, score: float, length: int) -> float:
        return float(score) / ((5 + length) / 6) ** self._settings.length_penalty

    def _add(self, row: np.ndarray, score: float) -> None:
        penalised = self._penalised(score, len(row))
        hypothesis = Hypothesis(tuple(row[self.first :].tolist()), penalised)
        rank = bisect.bisect_left(self._ended, -penalised, key=lambda h: -h.score)
        self._ended.insert(rank, hypothesis)
        del self._ended[self._settings.num_beams :]

    def banned(self, vocab: int, text_ends: Sequence[int]) -> np.ndarray:
        """bool [beams or 1, vocab]: what may not come next, repeated n-grams aside.

        Args:
          text_ends: tokens before which the text of an answer ends.
        """
        settings, count = self._settings, self.length - self.first
        # A search has one shape all the way.
        banned = np.zeros((settings.num_beams if settings.banned_prefixes else 1, vocab), bool)
        banned[:, list(settings.banned_tokens)] = True
        if count < settings.min_tokens:
            banned[:, list(text_ends)] = True
        for prefix in settings.banned_prefixes:
            if len(prefix) == count + 1:
                matches = (self.tokens[:, self.first : self.length] == prefix[:-1]).all(axis=1)
                banned[matches, prefix[-1]] = True
        return banned

    def take(self, scores: np.ndarray, parents: np.ndarray, tokens: np.ndarray) -> None:
        """Goes on with the best candidates that have not ended.

        Args:
          scores, parents, tokens: of candidates, best first; a score of -inf is of none.

        Raises:
          LogitsError: a score that is no number.
          SamplingError: no candidate, and no answer so far.
        """
        if np.isnan(scores).any():
            raise no_numbers(self.length - self.first)
        beams = self._settings.num_beams
        going_on: list[tuple[float, int, int]] = []
        # Greedy has one candidate: an end that is less likely ends nothing.
        candidates = 1 if beams == 1 else len(scores)
        is_allowed = scores[:candidates] > -np.inf
        for score, parent, token in zip(
            *(x[:candidates][is_allowed].tolist() for x in (scores, parents, tokens)), strict=True
        ):
            if token in self._ends:
                row = np.append(self.tokens[parent, : self.length], token)
                self._add(row, score)
            elif len(going_on) < beams:
                going_on.append((score, parent, token))
            else:
                break
        if not going_on:  # all have ended, or may not go on
            self.is_done = True
            if not self._ended:
                raise nothing_allowed(self.length - self.first)
            return
        self.scores = _scores([score for score, _, _ in going_on], beams)
        self.parents = np.array([parent for _, parent, _ in going_on], np.int32)
        count = len(going_on)
        self.tokens[:count] = self.tokens[self.parents]
        self.tokens[:count, self.length] = [token for _, _, token in going_on]
        self.length += 1
        best_remaining = self._penalised(float(self.scores.max()), self.length)
        self.is_done = len(self._ended) == beams and self._ended[-1].score >= best_remaining

    def best(self) -> list[Hypothesis]:
        if not self.is_done:
            for row, score in zip(self.tokens, self.scores[: len(self.parents)], strict=False):
                self._add(row[: self.length], float(score))
        return self._ended


def _scores(scores: Sequence[float], num_beams: int) -> np.ndarray:
    """float32 [num_beams], -inf where there are fewer scores."""
    return np.array([*scores, *[-np.inf] * (num_beams - len(scores))], np.float32)


@functools.partial(jax.jit, static_argnames="count")
def expand(
    logits: Float[ArrayLike, "rows vocab"],
    scores: Float[ArrayLike, " beams"],
    tokens: Int[ArrayLike, "beams length"],
    length: int | Int[Array, ""],
    first: int | Int[Array, ""],
    is_banned: Bool[ArrayLike, "_ vocab"],
    no_repeat_ngram: int | Int[Array, ""],
    count: int,
) -> tuple[Float[Array, " count"], Int[Array, " count"], Int[Array, " count"]]:
    """Return the best `count` continuations of all beams: scores, beams and tokens, best first.

    Args:
      logits: of the beams, then of rows that do not count.
      tokens: of which `length` count, those from `first` on generated.
      is_banned: tokens that may not come now, of each beam or of all.
      no_repeat_ngram: see `BeamSearch`.
    """
    scores = jnp.asarray(scores)
    logits = jnp.asarray(logits)[: len(scores)]
    vocab = logits.shape[1]
    each = functools.partial(jnp.full, len(logits), dtype=jnp.int32)
    banned = jnp.asarray(is_banned) | repeated(
        jnp.asarray(tokens), each(length), each(first), each(no_repeat_ngram), vocab
    )
    total = jax.nn.log_softmax(jnp.where(banned, _BANNED, logits), axis=-1) + scores[:, None]
    total = jnp.where(banned, -jnp.inf, total)
    best, index = jax.lax.top_k(total.reshape(-1), min(count, total.size))
    # Whole on every device, so that every process can read all of it.
    best, index = constrain(best, (None,)), constrain(index, (None,))
    return best, (index // vocab).astype(jnp.int32), (index % vocab).astype(jnp.int32)
