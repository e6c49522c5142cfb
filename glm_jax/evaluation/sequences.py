"""Token sequences of a task's examples and documents, to be scored."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from glm_jax.config import SpecialTokens
from glm_jax.engine.scoring_batch import ScoredSequence
from glm_jax.errors import UserError
from glm_jax.evaluation.examples import Document, Example
from glm_jax.evaluation.task_config import TaskConfig
from glm_jax.generation.scored_texts import choices_sequence, continuation


class SequenceError(UserError):
    """An example that goes against its task's settings."""


def are_single_tokens(examples: Sequence[Example]) -> bool:
    """Return whether every choice is one token: all can then be scored after a single sop."""
    return all(len(choice) == 1 for example in examples for choice in example.choices)


def choice_sequence(
    example: Example, config: TaskConfig, special: SpecialTokens, single_tokens: bool
) -> ScoredSequence:
    """Return a context, and after it every choice, which see it and not each other.

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
    sequence = choices_sequence(
        context,
        first,
        [choices[0][:1]] if single_tokens else choices,
        whole=0 if config.unidirectional else len(context),
        position=len(context) if moves else blank,
        position_step=int(moves),
    )
    if not single_tokens:
        return sequence
    count = len(choices)
    return dataclasses.replace(
        sequence,
        indices=np.full(count, len(context), np.int32),
        targets=np.array([choice[0] for choice in choices], np.int32),
        groups=np.arange(count, dtype=np.int32),
    )


def count_windows(document: Document, config: TaskConfig) -> int:
    """Return how many `window`s a document has."""
    beyond = max(len(document.tokens) - (config.max_seq_length - 1), 0)
    return math.ceil(beyond / config.generation_length) + 1


def window(
    document: Document, config: TaskConfig, special: SpecialTokens, number: int
) -> ScoredSequence:
    """Return a document's `number`th window of max_seq_length, generation_length after that before.

    The first asks for all of its tokens, the others for those that are new; unidirectional
    ones, as the original has them, for all of theirs again.
    """
    start = number * config.generation_length
    tokens = document.tokens[start : start + config.max_seq_length - 1]
    old = config.max_seq_length - 1 - config.generation_length
    split = 0 if number == 0 or config.unidirectional else old
    mask = special.gmask if config.use_task_mask else special.mask
    return continuation(tokens[:split], tokens[split:], special, mask)
