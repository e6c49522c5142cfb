"""Token sequences of which some tokens' log-probabilities are asked for.

As the original's `evaluation/dataset.py` builds them, without its padding and without masks
of seq x seq: who sees whom is two ranges of keys a row, as in `model.visibility`.
"""

import math
from collections.abc import Sequence

import numpy as np

from glm_jax.config import SpecialTokens
from glm_jax.engine.scoring_batch import ScoredSequence
from glm_jax.errors import UserError
from glm_jax.evaluation.examples import Document, Example
from glm_jax.evaluation.task_config import TaskConfig


class SequenceError(UserError):
    """An example that goes against its task's settings."""


def are_single_tokens(examples: Sequence[Example]) -> bool:
    """Whether every choice of a file is one token: all are then read after a single sop."""
    return all(len(choice) == 1 for example in examples for choice in example.choices)


def choice_sequence(
    example: Example, config: TaskConfig, special: SpecialTokens, single_tokens: bool
) -> ScoredSequence:
    """A context, and after it every choice, which see it and not each other.

    A choice's tokens are all at the mask's position, or, with [gMASK] or multi-task encoding,
    behind the context at positions of their own.

    Raises:
      SequenceError: a mask in a context that is seen from left to right.
    """
    mask = special.gmask if config.use_task_mask else special.mask
    choices = [choice or (special.eop,) for choice in example.choices]
    asked = 1 if single_tokens else sum(map(len, choices))
    room = config.max_seq_length - asked - 2
    context = list(example.context[-room:])
    has_mask = mask in context
    first = special.sop
    if config.unidirectional:
        if {special.mask, special.smask, special.gmask} & set(context):
            raise SequenceError("a mask in a context that is seen from left to right")
        # The last token of the text begins each choice, for it predicts its first.
        context = [mask, special.sop, *context]
        first = context.pop()
    elif not has_mask:
        context.append(mask)
    blank = context.index(mask)
    moves = config.use_task_mask or (config.use_multitask_encoding and not has_mask)
    pieces = [choices[0][:1]] if single_tokens else choices
    inputs = [(first, *piece[:-1]) for piece in pieces]
    steps = [np.arange(len(piece)) for piece in pieces]
    positions = [len(context) + step if moves else np.full(len(step), blank) for step in steps]
    starts = len(context) + np.cumsum([0, *map(len, pieces[:-1])])
    if single_tokens:
        places = np.full(len(choices), len(context))
        targets = np.array([choice[0] for choice in choices])
        groups = np.arange(len(choices))
    else:
        places = np.concatenate([start + step for start, step in zip(starts, steps, strict=True)])
        targets = np.concatenate(choices)
        groups = np.repeat(np.arange(len(choices)), [len(choice) for choice in choices])
    return ScoredSequence(
        tokens=np.concatenate([context, *inputs]).astype(np.int32),
        position_ids=np.concatenate([np.arange(len(context)), *positions]).astype(np.int32),
        key_ranges=_key_ranges(len(context), [len(p) for p in pieces], config.unidirectional),
        indices=places.astype(np.int32),
        targets=targets.astype(np.int32),
        groups=groups.astype(np.int32),
    )


def _key_ranges(context: int, pieces: Sequence[int], is_causal: bool) -> np.ndarray:
    """int32 [length, 4]: the context, then the row's own piece up to itself."""
    length = context + sum(pieces)
    index = np.arange(length)
    ranges = np.zeros((length, 4), np.int32)
    ranges[:, 1] = np.minimum(index + 1, context) if is_causal else context
    starts = context + np.cumsum([0, *pieces[:-1]])
    ranges[context:, 2] = np.repeat(starts, pieces)
    ranges[context:, 3] = index[context:] + 1
    return ranges


def continuation(prompt: Sequence[int], text: Sequence[int], mask: int, sop: int) -> ScoredSequence:
    """A prompt seen whole, and a text after it of which every token is asked for."""
    tokens = [*prompt, mask, sop, *text[:-1]]
    context = len(prompt) + 1
    asked = np.arange(context, len(tokens))
    return ScoredSequence(
        tokens=np.array(tokens, np.int32),
        position_ids=np.arange(len(tokens), dtype=np.int32),
        key_ranges=_key_ranges(context, [len(tokens) - context], False),
        indices=asked.astype(np.int32),
        targets=np.array(text, np.int32),
        groups=np.zeros(len(asked), np.int32),
    )


def count_windows(document: Document, config: TaskConfig) -> int:
    """How many `window`s a document has."""
    beyond = max(len(document.tokens) - (config.max_seq_length - 1), 0)
    return math.ceil(beyond / config.generation_length) + 1


def window(
    document: Document, config: TaskConfig, special: SpecialTokens, number: int
) -> ScoredSequence:
    """A document's `number`th window of max_seq_length, generation_length after that before.

    The first asks for all of its tokens, the others for those that are new; unidirectional
    ones, as the original has them, for all of theirs again.
    """
    start = number * config.generation_length
    tokens = document.tokens[start : start + config.max_seq_length - 1]
    old = config.max_seq_length - 1 - config.generation_length
    split = 0 if number == 0 or config.unidirectional else old
    mask = special.gmask if config.use_task_mask else special.mask
    return continuation(tokens[:split], tokens[split:], mask, special.sop)
