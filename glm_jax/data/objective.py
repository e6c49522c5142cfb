"""GLM's training objective: what is hidden in a text, and in which order it is written.

A sample is a context that all of it sees, then pieces that are generated from left to
right: after sop the hidden tokens, then eop (arXiv:2210.02414, section 2.2).
"""

import dataclasses

import numpy as np

from glm_jax.config import SpecialTokens


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Attributes:
    mask_sequences: share of texts whose spans are hidden behind [MASK]; of the rest a
      suffix is generated after [gMASK].
    span_length: mean of the Poisson distribution of span lengths.
    masked_tokens: share of a [MASK] text's tokens that its spans hide together.
    """

    mask_sequences: float = 0.3
    span_length: float = 3.0
    masked_tokens: float = 0.15


@dataclasses.dataclass(frozen=True)
class Sample:
    """One training text. All arrays [length].

    Attributes:
      tokens: int32, the inputs.
      targets: int32, what to predict at each token.
      loss_weights: float32, 1 where the prediction counts, 0 in the context.
      position_ids: int32.
      context_length: int32, the context's length, the same number at every token.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    position_ids: np.ndarray
    context_length: np.ndarray

    def features(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def make_sample(
    text: np.ndarray,
    special: SpecialTokens,
    config: ObjectiveConfig,
    rng: np.random.Generator,
    max_length: int,
) -> Sample:
    """Hides spans or a suffix of `text`, as chance has it.

    Args:
      text: int32 [length], at least 1 token.
      max_length: the sample is no longer; of a text too long for it the end is left off.
    """
    if rng.random() < config.mask_sequences:
        return span_sample(text, special, config, rng, max_length)
    return suffix_sample(text, special, rng, max_length)


def suffix_sample(
    text: np.ndarray, special: SpecialTokens, rng: np.random.Generator, max_length: int
) -> Sample:
    """Generates a suffix, of any length from 1 to all, after [gMASK]."""
    text = text[: max_length - 2]
    cut = len(text) - int(rng.integers(1, len(text) + 1))
    context = np.append(text[:cut], special.gmask)
    start = len(context)
    positions = np.arange(start, start + len(text) - cut + 1)
    return _assemble(context, [(text[cut:], positions)], special)


def span_sample(
    text: np.ndarray,
    special: SpecialTokens,
    config: ObjectiveConfig,
    rng: np.random.Generator,
    max_length: int,
) -> Sample:
    """Hides spans behind [MASK]s and writes them in shuffled order.

    All tokens of a span are at its mask's position. A context that doesn't end in a mask
    is closed by eos, as prompts are.
    """
    # Each span costs its mask and its sop beside the tokens that move.
    text = text[: max_length - 3]
    most_spans = (max_length - 1 - len(text)) // 2
    spans = _draw_spans(len(text), config, rng, most_spans)
    context: list[int] = []
    pieces = []
    end = 0
    for begin, stop in spans:
        context += text[end:begin].tolist()
        pieces.append((text[begin:stop], np.full(stop - begin + 1, len(context))))
        context.append(special.mask)
        end = stop
    context += text[end:].tolist()
    if context[-1] != special.mask:
        context.append(special.eos)
    order = rng.permutation(len(pieces))
    return _assemble(np.array(context), [pieces[i] for i in order], special)


def _draw_spans(
    length: int, config: ObjectiveConfig, rng: np.random.Generator, most: int
) -> list[tuple[int, int]]:
    """Disjoint spans, a kept token between each two, in order of their beginning."""
    budget = max(1, round(config.masked_tokens * length))
    lengths: list[int] = []
    while budget > 0 and len(lengths) < most:
        size = min(max(1, int(rng.poisson(config.span_length))), budget)
        lengths.append(size)
        budget -= size
    # Of the ways to lay the spans in the text, all equally likely: choose the gaps.
    free = length - sum(lengths) - (len(lengths) - 1)
    while free < 0:
        free += lengths.pop() + 1
    gaps = np.sort(rng.integers(0, free + 1, size=len(lengths)))
    spans, begin = [], 0
    for i, (gap, size) in enumerate(zip(gaps.tolist(), lengths, strict=True)):
        start = begin + gap - (int(gaps[i - 1]) if i else 0)
        spans.append((start, start + size))
        begin = start + size + 1
    return spans


def _assemble(
    context: np.ndarray, pieces: list[tuple[np.ndarray, np.ndarray]], special: SpecialTokens
) -> Sample:
    tokens, positions = [context], [np.arange(len(context))]
    targets, weights = [np.zeros_like(context)], [np.zeros(len(context))]
    for piece, piece_positions in pieces:
        tokens += [np.array([special.sop]), piece]
        targets += [piece, np.array([special.eop])]
        weights.append(np.ones(len(piece) + 1))
        positions.append(piece_positions)
    joined = np.concatenate(tokens).astype(np.int32)
    return Sample(
        tokens=joined,
        targets=np.concatenate(targets).astype(np.int32),
        loss_weights=np.concatenate(weights).astype(np.float32),
        position_ids=np.concatenate(positions).astype(np.int32),
        context_length=np.full(len(joined), len(context), np.int32),
    )
