"""Token sequences to score: the log-probabilities of texts that follow another text.

As the original's `evaluation/dataset.py` builds them, without its padding and without masks
of seq x seq: who sees whom is two ranges of keys a row, see `model.visibility`.
"""

from collections.abc import Sequence

import numpy as np

from glm_jax.config import SpecialTokens
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.scoring_batch import ScoredSequence


def choices_sequence(
    shared: Sequence[int],
    first: int,
    choices: Sequence[Sequence[int]],
    *,
    whole: int,
    position: int,
    position_step: int,
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
    )


def continuation(
    prompt: Sequence[int],
    text: Sequence[int],
    special: SpecialTokens,
    mask: int | None = None,
    is_unidirectional: bool = False,
) -> ScoredSequence:
    """Return a prompt, and a text after it of which every token is scored.

    Args:
      mask: between the two; [gMASK] by default.
      is_unidirectional: each token of the prompt, which then follows the mask, sees only those
        before it; else it sees the whole prompt.
    """
    before = [*prompt, special.gmask if mask is None else mask, special.sop]
    whole = len(prompt) + 1
    if is_unidirectional:
        before, whole = [*before[-2:], *prompt], 1
    *shared, first = before
    return choices_sequence(
        shared, first, [text], whole=whole, position=len(shared), position_step=1
    )


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
    sequences, group = [], list[Sequence[int]]()
    position = int(prompt.position_ids()[-1])
    for number, choice in enumerate(choices, 1):
        group.append(choice)
        following = len(choices[number]) if number < len(choices) else limit
        if len(shared) + sum(map(len, group)) + following > limit:
            sequences.append(
                choices_sequence(
                    shared,
                    first,
                    group,
                    whole=len(prompt.context),
                    position=position,
                    position_step=prompt.position_step,
                )
            )
            group = []
    return sequences
