"""Scored texts: the log-probabilities of texts that follow another text, or fill its blank.

Token sequences are as the original's `evaluation/dataset.py` builds them, without its padding and
without masks of seq x seq: who sees whom is two ranges of keys a row, see `model.visibility`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from glm_jax.config import SpecialTokens
from glm_jax.engine.prompt import Prompt, PromptError
from glm_jax.engine.scoring import Score
from glm_jax.engine.scoring_batch import ScoredSequence
from glm_jax.engine.stepwise import Steps, replayable
from glm_jax.generation.blank_filling import PartlyFilled, TextCodec
from glm_jax.generation.blank_spaces import mask_word
from glm_jax.generation.shared_scoring import SharedScorer


def choices_sequence(
    shared: Sequence[int],
    first: int,
    choices: Sequence[Sequence[int]],
    *,
    whole: int,
    position: int,
    position_step: int,
    adapter: int = 0,
) -> ScoredSequence:
    """Return shared tokens, and after them every choice, which sees them and no other choice.

    Each choice is a group of the score.

    Args:
      shared: token ids, at positions 0, 1, 2, ..
      first: the token that begins each choice, for it predicts the choice's first; sop, or the
        last token of a text that goes on.
      choices: token ids of each, at least one.
      whole: the first tokens of `shared`, which all others see; each of the rest sees only those
        before it.
      position: of `first`.
      position_step: between the positions of a choice's tokens; 0 in a blank, 1 after [gMASK].
      adapter: see `Prompt.adapter`.
    """
    inputs = [(first, *choice[:-1]) for choice in choices]
    lengths = [len(choice) for choice in choices]
    starts = len(shared) + np.cumsum([0, *lengths])
    index = np.arange(starts[-1])
    key_ranges = np.zeros((len(index), 4), np.int32)
    key_ranges[:, 1] = np.clip(index + 1, whole, len(shared))
    key_ranges[len(shared) :, 2] = np.repeat(starts[:-1], lengths)
    key_ranges[len(shared) :, 3] = index[len(shared) :] + 1
    steps = index[len(shared) :] - np.repeat(starts[:-1], lengths)
    positions = [np.arange(len(shared)), position + position_step * steps]
    return ScoredSequence(
        tokens=np.concatenate([np.array(shared), *inputs]).astype(np.int32),
        position_ids=np.concatenate(positions).astype(np.int32),
        key_ranges=key_ranges,
        indices=index[len(shared) :].astype(np.int32),
        targets=np.concatenate(choices).astype(np.int32),
        groups=np.repeat(np.arange(len(choices)), lengths).astype(np.int32),
        adapter=adapter,
    )


def continuation(
    prompt: Sequence[int],
    text: Sequence[int],
    special: SpecialTokens,
    mask: int | None = None,
    is_unidirectional: bool = False,
    adapter: int = 0,
) -> ScoredSequence:
    """Return a prompt, and a text after it of which every token is scored.

    Args:
      mask: between the two; [gMASK] by default.
      is_unidirectional: each token of the prompt, which then follows the mask, sees only those
        before it; else it sees the whole prompt.
      adapter: see `Prompt.adapter`.
    """
    [sequence] = continuations(prompt, [text], special, 0, mask, is_unidirectional)
    return dataclasses.replace(sequence, adapter=adapter)


def continuations(
    prompt: Sequence[int],
    texts: Sequence[Sequence[int]],
    special: SpecialTokens,
    limit: int,
    mask: int | None = None,
    is_unidirectional: bool = False,
) -> list[ScoredSequence]:
    """Return a prompt with several texts after it, each scored as by `continuation`.

    Args:
      texts: token ids of each, at least one.
      limit: as in `prompt_choices`.
      mask, is_unidirectional: as in `continuation`.
    """
    before = [*prompt, special.gmask if mask is None else mask, special.sop]
    whole = len(prompt) + 1
    if is_unidirectional:
        before, whole = [*before[-2:], *prompt], 1
    place = functools.partial(
        choices_sequence, before[:-1], before[-1], whole=whole, position=len(before) - 1
    )
    groups = grouped(texts, limit, len(before) - 1)
    return [place(choices=group, position_step=1) for group in groups]


def prompt_choices(
    prompt: Prompt, choices: Sequence[Sequence[int]], special: SpecialTokens, limit: int
) -> list[ScoredSequence]:
    """Return choices for the blank of a prompt, scored as if each had been generated there.

    Args:
      choices: token ids of each, at least one.
      limit: maximum length of a sequence, unless a single choice with the prompt is longer. The
        groups of all sequences together are the choices in order.
    """
    *shared, first = prompt.tokens(special.sop)
    place = functools.partial(
        choices_sequence,
        shared,
        first,
        whole=len(prompt.context),
        position=int(prompt.position_ids()[-1]),
        position_step=prompt.position_step,
        adapter=prompt.adapter,
    )
    return [place(choices=group) for group in grouped(choices, limit, len(shared))]


def grouped(
    texts: Sequence[Sequence[int]], limit: int, shared: int = 0, each: int = 0
) -> Iterator[list[Sequence[int]]]:
    """Yield texts in order, as many together as there is room for, and at least one.

    Args:
      limit: maximum tokens of a group.
      shared: tokens that a group has beside its texts.
      each: tokens that each text has beside its own.
    """
    group, length = list[Sequence[int]](), shared
    for text in texts:
        if group and length + len(text) + each > limit:
            yield group
            group, length = [], shared
        group.append(text)
        length += len(text) + each
    yield group


@dataclasses.dataclass(frozen=True)
class ScoredChoice:
    """A choice for a blank.

    Attributes:
      tokens: its token ids.
      log_probabilities: of its tokens, in nats.
      is_greedy: whether each of its tokens is the most likely one.
    """

    text: str
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    is_greedy: bool

    @property
    def log_probability(self) -> float:
        """Of the whole choice: the sum over its tokens."""
        return sum(self.log_probabilities)


def likeliest(choices: Sequence[ScoredChoice]) -> int:
    """Return the number of the likeliest choice, the first of several."""
    return max(range(len(choices)), key=lambda number: choices[number].log_probability)


def score_choices(
    scorer: SharedScorer[Score],
    tokenizer: TextCodec,
    text: str,
    partly: PartlyFilled,
    choices: Sequence[str],
) -> Steps[list[ScoredChoice]]:
    """Check choices for the one blank of a text, and return the steps that score them, in order.

    A choice is read as what stands in the place of the blank.

    Args:
      partly: the text as `PartlyFilled.begin` made it.

    Raises:
      PromptError: several blanks, or a choice that is empty or too long.
    """
    blanks = partly.tokens.count(partly.mask)
    if blanks != 1:
        raise PromptError(f"{blanks} blanks: choices are for the one blank of a text")
    prompt = partly.prompt()
    before = text.partition(mask_word(partly.special, partly.mask))[0]
    tokens = [_choice_tokens(tokenizer, before, partly, choice) for choice in choices]
    for number, choice in enumerate(tokens):
        if not choice:
            raise PromptError(f"choices[{number}]: empty: it would be the likeliest")
        if len(prompt) + len(choice) > partly.limit:
            raise PromptError(
                f"choices[{number}]: {len(choice)} tokens behind {len(prompt)} of the text: "
                f"at most {partly.limit} together"
            )
    sequences = prompt_choices(prompt, tokens, partly.special, partly.limit)
    return _scoring(scorer, sequences, choices, tokens)


def _choice_tokens(
    tokenizer: TextCodec, before: str, partly: PartlyFilled, choice: str
) -> list[int]:
    """Return the tokens of a choice behind the text before its blank, or alone if the two together
    are other tokens. Control words in a choice are text."""
    special = set(dataclasses.astuple(partly.special))
    start = partly.tokens[: partly.position]
    both = tokenizer.encode(before + choice)
    rest = both[len(start) :]
    is_behind = tuple(both[: len(start)]) == start and rest and not special & set(rest)
    return rest if is_behind else tokenizer.encode(choice, ())


@replayable
def _scoring(
    scorer: SharedScorer[Score],
    sequences: Sequence[ScoredSequence],
    choices: Sequence[str],
    tokens: Sequence[Sequence[int]],
) -> Steps[list[ScoredChoice]]:
    scores = yield from scorer.steps(sequences)
    values = [
        (score.log_probabilities[score.groups == group], score.are_argmax[score.groups == group])
        for score in scores
        for group in range(score.groups[-1] + 1)
    ]
    return [
        ScoredChoice(text, tuple(ids), tuple(map(float, logs)), bool(are_argmax.all()))
        for text, ids, (logs, are_argmax) in zip(choices, tokens, values, strict=True)
    ]
