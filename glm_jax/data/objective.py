"""GLM's training objective: which tokens of a text are masked, and in which order they follow.

A sample is a context with bidirectional attention, then spans that are generated from left to
right: sop, the masked tokens, eop (arXiv:2210.02414, section 2.2).
"""

import dataclasses

import numpy as np

from glm_jax.config import Range, SpecialTokens, check_ranges
from glm_jax.data.records import Record

KINDS = ("span", "suffix", "instruction")  # of samples
# Of `ObjectiveConfig`.
RANGES = {
    "mask_sequences": Range(float, 0, 1),
    "span_length": Range(float, 0, 1e6, without_low=True),
    "masked_tokens": Range(float, 0, 1, without_low=True),
    "short_target": Range(int, 0, 1 << 24),
}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """How samples are made of texts and instructions.

    Attributes:
      mask_sequences: share of texts with spans masked by [MASK]; of all other texts a suffix is
        generated after [gMASK].
      span_length: mean of the Poisson distribution of span lengths, in tokens.
      masked_tokens: share of a text's tokens that its spans mask together.
      short_target: an instruction without a "mask" has [MASK] for a target of up to this many
        tokens, else [gMASK].
    """

    mask_sequences: float = 0.3
    span_length: float = 3.0
    masked_tokens: float = 0.15
    short_target: int = 8

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One training sample. All arrays are [length].

    Attributes:
      tokens: int32, the inputs.
      targets: int32, the token to predict at each input.
      loss_weights: float32, 1 in the spans, 0 in the context.
      position_ids: int32.
      context_length: int32, the context's length, repeated for every token.
      kinds: int32, the sample's index in `KINDS`, repeated for every token.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    position_ids: np.ndarray
    context_length: np.ndarray
    kinds: np.ndarray

    def features(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def make_sample(
    record: Record,
    special: SpecialTokens,
    config: ObjectiveConfig,
    rng: np.random.Generator,
    max_length: int,
) -> Sample:
    """Mask spans or a suffix of a text, drawn at random, or an instruction's target.

    Args:
      max_length: tokens of the sample at most; a longer text is cropped at random.
    """
    if record.prompt_length is not None:
        return instruction_sample(record, special, config, max_length)
    text = _crop(record.tokens, rng, max_length - 3)
    if rng.random() < config.mask_sequences:
        return span_sample(text, special, config, rng, max_length)
    return suffix_sample(text, special, rng, max_length)


def _crop(text: np.ndarray, rng: np.random.Generator, length: int) -> np.ndarray:
    if len(text) <= length:
        return text
    start = int(rng.integers(0, len(text) - length + 1))
    return text[start : start + length]


def instruction_sample(
    record: Record, special: SpecialTokens, config: ObjectiveConfig, max_length: int
) -> Sample:
    """Make a sample of a prompt, whose target is generated after [MASK] or [gMASK].

    A prompt without a mask gets one at its end. If both are too long, the target is cut at its
    end to fit, then the prompt at its beginning.
    """
    prompt, target = record.tokens[: record.prompt_length], record.tokens[record.prompt_length :]
    target = target[: max_length - 4]
    masks = np.flatnonzero(np.isin(prompt, (special.mask, special.smask, special.gmask)))
    if masks.size:
        mask = int(prompt[masks[0]])
    elif record.mask is not None:
        mask = getattr(special, record.mask)
    else:
        mask = special.mask if len(target) <= config.short_target else special.gmask
    if not masks.size:
        prompt = np.append(prompt, mask)
    if prompt[-1] != mask:
        prompt = np.append(prompt, special.eos)
    prompt = prompt[max(0, len(prompt) + len(target) + 1 - max_length) :]
    at = np.flatnonzero(prompt == mask)
    if mask != special.gmask and at.size:
        positions = np.full(len(target) + 1, at[0])
    else:
        positions = np.arange(len(prompt), len(prompt) + len(target) + 1)
    return _assemble(prompt, [(target, positions)], special, "instruction")


def suffix_sample(
    text: np.ndarray, special: SpecialTokens, rng: np.random.Generator, max_length: int
) -> Sample:
    """Mask a suffix, of a length drawn uniformly from 1 to all, by [gMASK]."""
    text = text[: max_length - 2]
    cut = len(text) - int(rng.integers(1, len(text) + 1))
    context = np.append(text[:cut], special.gmask)
    start = len(context)
    positions = np.arange(start, start + len(text) - cut + 1)
    return _assemble(context, [(text[cut:], positions)], special, "suffix")


def span_sample(
    text: np.ndarray,
    special: SpecialTokens,
    config: ObjectiveConfig,
    rng: np.random.Generator,
    max_length: int,
) -> Sample:
    """Mask spans by [MASK] and append them in shuffled order.

    All tokens of a span have the position id of its mask. A context that does not end in a mask
    ends in eos, as prompts do, which replaces the eod of a document.
    """
    if len(text) > 1 and text[-1] == special.eod:
        text = text[:-1]
    # Each span adds its mask and its sop to the tokens of the text.
    text = text[: max_length - 3]
    max_spans = (max_length - 1 - len(text)) // 2
    spans = _draw_spans(len(text), config, rng, max_spans)
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
    return _assemble(np.array(context), [pieces[i] for i in order], special, "span")


def _draw_spans(
    length: int, config: ObjectiveConfig, rng: np.random.Generator, max_spans: int
) -> list[tuple[int, int]]:
    """Draw disjoint spans, in order, with a token of context between neighbours."""
    budget = max(1, round(config.masked_tokens * length))
    lengths: list[int] = []
    while budget > 0 and len(lengths) < max_spans:
        size = min(max(1, int(rng.poisson(config.span_length))), budget)
        lengths.append(size)
        budget -= size
    # Drawing the gaps makes all positions of the spans equally likely.
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
    context: np.ndarray,
    pieces: list[tuple[np.ndarray, np.ndarray]],
    special: SpecialTokens,
    kind: str,
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
        kinds=np.full(len(joined), KINDS.index(kind), np.int32),
    )
