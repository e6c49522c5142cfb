"""Beam search: the likeliest answers as wholes, not token after token.

As the original's deterministic `BeamSearchStrategy`: scores are sums of log-probabilities;
an answer that has ended is compared with others by its score over ((5 + length) / 6) ** p,
the length that of context, sop, prefix and answer together. A search of one beam is greedy.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from glm_jax.config import GLMConfig, SpecialTokens
from glm_jax.engine.batch_steps import (
    DecodeState,
    decode_step,
    pad_prompts,
    prefill,
    prefill_prompts,
)
from glm_jax.engine.generation_settings import check_settings
from glm_jax.engine.logit_processors import repeated
from glm_jax.engine.prompt import Prompt, Resolved, bucket, resolve
from glm_jax.engine.sampling import check_banned, no_numbers, nothing_allowed
from glm_jax.model.cache import init_cache
from glm_jax.model.device_layout import prepare
from glm_jax.model.params import GLMParams
from glm_jax.sharding import mesh_of, on_mesh

_Result = TypeVar("_Result")
_BANNED = -65504.0  # the logit of a banned token, by which others' probabilities are the original's


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """Settings of a search.

    Attributes:
      num_beams: answers that are followed at once, and returned.
      length_penalty: the exponent p; above 0 it favours longer answers.
      no_repeat_ngram: no n tokens in a row, the last of them generated, appear twice; 0
        for no such ban.
      min_tokens: that are generated before an end token may be.
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
    """The best `num_beams` answers, best first.

    Args:
      prompt, max_length, end_tokens, special_tokens: see `generate.generate`.

    Raises:
      PromptError: special tokens unknown, or a prompt that leaves no room.
      SamplingError: a banned token that is not in the vocabulary, or no token may come.
      LogitsError: the model gives no numbers.
    """
    resolved = resolve([prompt], config, max_length, end_tokens, special_tokens)
    return finish(beam_steps(params, config, settings, resolved))


# What is done a step at a time. Between steps comes None, or what compiles the next one's program:
# called, from any thread, before going on, or else left to that step.
Steps = Generator[Callable[[], object] | None, None, _Result]


def finish(steps: Steps[_Result]) -> _Result:
    """What something that is done a step at a time comes to."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _Result = end.value
            return result


def beam_steps(
    params: GLMParams, config: GLMConfig, settings: BeamSearch, resolved: Resolved
) -> Steps[list[Hypothesis]]:
    """`beam_search` a token at a time, so that other work can go on between.

    Args:
      resolved: of one prompt, by `prompt.resolve`.

    Raises:
      SamplingError, LogitsError: as `beam_search`.
    """
    [row], special, limit, ends = resolved
    named = (*settings.banned_tokens, *itertools.chain(*settings.banned_prefixes))
    check_banned(named, config.vocab_size)
    mesh = mesh_of(params)
    params = prepare(params)
    ahead = functools.partial(_compiling, mesh)
    with on_mesh(mesh):
        cache = init_cache(config, 1, bucket(limit), isinstance(params.layers, tuple), mesh)
    yield ahead(prefill, params, config, *pad_prompts(config, [row], special.sop), cache)
    with on_mesh(mesh):
        logits, state = prefill_prompts(params, config, [row], special.sop, cache)
    search = _Search(row.tokens(special.sop), settings, ends, bucket(limit))
    # Whatever ends, one continuation more than there are beams goes on.
    count = (len(set(ends)) + 1) * settings.num_beams + 1
    for number in itertools.count():
        yield None
        has_new_shapes = number < 2  # one beam, then all
        banned = search.banned(config.vocab_size)
        candidates = (logits, *search.state, banned, settings.no_repeat_ngram, count)
        if has_new_shapes:
            yield ahead(expand, *candidates)
        with on_mesh(mesh):
            search.take(*(np.asarray(x) for x in expand(*candidates)))
        if search.is_done or search.length >= limit:
            break
        followed = (state, search.parents, search.tokens[:, search.length - 1])
        if has_new_shapes:
            yield ahead(_follow, *followed)
        with on_mesh(mesh):
            state = _follow(*followed)
        if number == 0:
            yield ahead(decode_step, params, config, state)
        with on_mesh(mesh):
            logits, state = decode_step(params, config, state)
    return search.best()


def _compiling(mesh: Mesh | None, program: Any, *arguments: Any) -> Callable[[], object]:
    """What compiles a program for arguments, which it neither runs on nor donates."""

    def compile_program() -> object:
        with on_mesh(mesh):
            return program.lower(*arguments).compile()

    return compile_program


class _Search:
    """Where a search stands; what is kept of its candidates is decided on the host."""

    def __init__(
        self, context: tuple[int, ...], settings: BeamSearch, ends: Sequence[int], width: int
    ):
        self._settings, self._ends = settings, frozenset(ends)
        self.first = self.length = len(context)
        # One beam before the first token; `take` makes them as many as are wanted.
        self.tokens = np.zeros((1, width), np.int32)
        self.tokens[:, : self.length] = context
        self.scores = np.zeros(1, np.float32)
        self.parents = np.zeros(1, np.int32)
        self.is_done = False
        self._ended: list[Hypothesis] = []

    @property
    def state(self) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Scores, tokens, and how many of these there are before and in the answer."""
        return self.scores, self.tokens, self.length, self.first

    def _penalised(self, score: float, length: int) -> float:
        return float(score) / ((5 + length) / 6) ** self._settings.length_penalty

    def _add(self, row: np.ndarray, score: float) -> None:
        penalised = self._penalised(score, len(row))
        found = Hypothesis(tuple(row[self.first :].tolist()), penalised)
        place = bisect.bisect_left(self._ended, -penalised, key=lambda h: -h.score)
        self._ended.insert(place, found)
        del self._ended[self._settings.num_beams :]

    def banned(self, vocab: int) -> np.ndarray:
        """bool [beams or 1, vocab]: what may not come next, repeated n-grams aside."""
        settings, count = self._settings, self.length - self.first
        banned = np.zeros((1, vocab), bool)
        banned[0, list(settings.banned_tokens)] = True
        if count < settings.min_tokens:
            banned[0, list(self._ends)] = True
        begun = [prefix for prefix in settings.banned_prefixes if len(prefix) == count + 1]
        if begun:
            banned = np.repeat(banned, len(self.tokens), axis=0)
        for prefix in begun:
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
        kept: list[tuple[float, int, int]] = []
        # Greedy has one candidate: an end that is less likely ends nothing.
        candidates = 1 if beams == 1 else len(scores)
        is_allowed = scores[:candidates] > -np.inf
        for score, parent, token in zip(
            *(x[:candidates][is_allowed] for x in (scores, parents, tokens)), strict=True
        ):
            if int(token) in self._ends:
                row = np.append(self.tokens[parent, : self.length], token)
                self._add(row, float(score))
            elif len(kept) < beams:
                kept.append((score, parent, token))
            else:
                break
        if not kept:  # all have ended, or may not go on
            self.is_done = True
            if not self._ended:
                raise nothing_allowed(self.length - self.first)
            return
        self.scores = np.array([score for score, _, _ in kept], np.float32)
        self.parents = np.array([parent for _, parent, _ in kept], np.int32)
        self.tokens = self.tokens[self.parents]
        self.tokens[:, self.length] = [token for _, _, token in kept]
        self.length += 1
        best_left = self._penalised(float(self.scores.max()), self.length)
        self.is_done = len(self._ended) == beams and self._ended[-1].score >= best_left

    def best(self) -> list[Hypothesis]:
        if not self.is_done:
            for row, score in zip(self.tokens, self.scores.tolist(), strict=True):
                self._add(row[: self.length], score)
        return self._ended


@functools.partial(jax.jit, static_argnames="count")
def expand(
    logits: Float[ArrayLike, "beams vocab"],
    scores: Float[ArrayLike, " beams"],
    tokens: Int[ArrayLike, "beams length"],
    length: int | Int[Array, ""],
    first: int | Int[Array, ""],
    is_banned: Bool[ArrayLike, "_ vocab"],
    no_repeat_ngram: int | Int[Array, ""],
    count: int,
) -> tuple[Float[Array, " some"], Int[Array, " some"], Int[Array, " some"]]:
    """The best `count` continuations of all beams: scores, beams and tokens, best first.

    Args:
      tokens: of which `length` count, those from `first` on generated.
      is_banned: tokens that may not come now, of each beam or of all.
      no_repeat_ngram: see `BeamSearch`.
    """
    logits, scores = jnp.asarray(logits), jnp.asarray(scores)
    vocab = logits.shape[1]
    each = functools.partial(jnp.full, len(logits), dtype=jnp.int32)
    banned = jnp.asarray(is_banned) | repeated(
        jnp.asarray(tokens), each(length), each(first), each(no_repeat_ngram), vocab
    )
    total = jax.nn.log_softmax(jnp.where(banned, _BANNED, logits), axis=-1) + scores[:, None]
    total = jnp.where(banned, -jnp.inf, total)
    best, places = jax.lax.top_k(total.reshape(-1), min(count, total.size))
    return best, (places // vocab).astype(jnp.int32), (places % vocab).astype(jnp.int32)


@jax.jit
def _follow(
    state: DecodeState, parents: Int[ArrayLike, " beams"], tokens: Int[ArrayLike, " beams"]
) -> DecodeState:
    """The state of the beams that `parents` names, to run their next tokens."""
    parents = jnp.asarray(parents)
    axis = 0 if isinstance(state.cache, tuple) else 1
    cache = jax.tree.map(lambda x: jnp.take(x, parents, axis=axis), state.cache)
    return DecodeState(
        cache=cache,
        tokens=jnp.asarray(tokens),
        position_ids=(state.position_ids + state.position_steps)[parents],
        position_steps=state.position_steps[parents],
        index=state.index[parents] + 1,
    )
