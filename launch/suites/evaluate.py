"""Examples of a multiple-choice task a second, beside micro-batches as the original's."""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.config import GLMConfig, SpecialTokens, glm_config
from glm_jax.engine.scoring import Scorer
from glm_jax.engine.scoring_batch import ScoredSequence
from glm_jax.evaluation.examples import Example
from glm_jax.evaluation.sequences import choice_sequence
from glm_jax.evaluation.task_config import TaskConfig
from glm_jax.model import glm
from glm_jax.model import params as glm_params
from glm_jax.model.device_layout import prepare
from glm_jax.model.params import GLMParams
from glm_jax.model.visibility import Visibility
from launch.suites.case import Case

_EXAMPLES = 2000
_MICRO_BATCH = 16  # the original's for most of its multiple-choice tasks is 1 to 32
_WARM = 200  # examples that compile before anything is timed
_MAX_TARGETS = 12
_TILE = 32  # the original pads a batch to a multiple of this


def evaluate_suite() -> Iterator[tuple[str, dict[str, Case]]]:
    """2,000 examples of 32 to 512 tokens, four choices of one to three tokens each.

    `micro-batches` takes 16 examples at a time in the given order, pads to the longest and computes
    logits at every position, as the original does; `at places` only where they are needed.
    `a context a choice` is packed too, but repeats the context for each choice, as clients do that
    send a request per choice.
    """
    shape = {"hidden_size": 128, "inner_hidden_size": 352, "num_layers": 4, "vocab_size": 8192}
    config = glm_config("tiny", max_sequence_length=512, **shape)
    params = prepare(glm_params.init(config, jax.random.key(0)))
    examples = _examples()
    sequences = [_sequence(context, choices) for context, choices in examples]
    apart = [_sequence(context, [one]) for context, choices in examples for one in choices]
    scorer = Scorer(params, config)
    packed = lambda some: sum(1 for _ in scorer.score(some))
    packed(sequences[:_WARM])
    cases = {
        "packed": Case(lambda: packed(sequences), _EXAMPLES, is_long=True, max_rounds=2),
        "a context a choice": Case(lambda: packed(apart), _EXAMPLES, is_long=True, max_rounds=2),
        "micro-batches": _micro_batches(params, config, sequences, everywhere=True),
        "micro-batches at places": _micro_batches(params, config, sequences, everywhere=False),
    }
    yield "an example of a multiple-choice task", cases
    print(f"\npadding of packed rows: {scorer.padding.share:.1%}")


def _examples() -> list[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """Make contexts with their choices."""
    rng = np.random.default_rng(0)
    made = []
    for length in rng.integers(32, 513, _EXAMPLES).tolist():
        choices = [_tokens(rng, int(n)) for n in rng.integers(1, 4, 4)]
        made.append((_tokens(rng, length - 1 - sum(map(len, choices))), choices))
    return made


def _sequence(context: tuple[int, ...], choices: Sequence[tuple[int, ...]]) -> ScoredSequence:
    special = SpecialTokens(8100, 8101, 8102, 8103, 8104, 8105, 8106, 8107, 2)
    task = TaskConfig("made", "mul", ".", max_seq_length=512)
    return choice_sequence(Example(context, tuple(choices), 0), task, special, False)


def _tokens(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    return tuple(rng.integers(3, 8000, count).tolist())


def _micro_batches(
    params: GLMParams, config: GLMConfig, sequences: Sequence[ScoredSequence], everywhere: bool
) -> Case:
    @jax.jit
    def run(
        params: GLMParams,
        tokens: jax.Array,
        positions: jax.Array,
        ranges: jax.Array,
        indices: jax.Array,
        targets: jax.Array,
    ) -> jax.Array:
        hidden, _ = glm.forward_hidden(params, config, tokens, positions, Visibility(ranges))
        if not everywhere:
            hidden = jnp.take_along_axis(hidden, indices[:, :, None], axis=1)
        scores = jax.nn.log_softmax(glm.logits(params, config, hidden))
        if everywhere:
            scores = jnp.take_along_axis(scores, indices[:, :, None], axis=1)
        return jnp.take_along_axis(scores, targets[:, :, None], axis=2)[..., 0]

    batches = [
        _padded(sequences[start : start + _MICRO_BATCH])
        for start in range(0, len(sequences), _MICRO_BATCH)
    ]

    def every(some: Sequence[tuple[np.ndarray, ...]]) -> None:
        for batch in some:
            np.asarray(run(params, *batch))

    every(list({batch[0].shape: batch for batch in batches}.values()))  # compiles
    return Case(lambda: every(batches), _EXAMPLES, is_long=True, max_rounds=2)


def _padded(sequences: Sequence[ScoredSequence]) -> tuple[np.ndarray, ...]:
    width = -(-max(map(len, sequences)) // _TILE) * _TILE
    rows = len(sequences)
    tokens, positions, indices, targets = np.zeros((4, rows, width), np.int32)
    ranges = np.zeros((rows, width, 4), np.int32)
    ranges[:, :, 1] = 1  # the original's padding sees the first token
    for row, sequence in enumerate(sequences):
        length, asked = len(sequence), len(sequence.indices)
        tokens[row, :length] = sequence.tokens
        positions[row, :length] = sequence.position_ids
        ranges[row, :length] = sequence.key_ranges
        indices[row, :asked] = sequence.indices
        targets[row, :asked] = sequence.targets
    return tokens, positions, ranges, indices[:, :_MAX_TARGETS], targets[:, :_MAX_TARGETS]
