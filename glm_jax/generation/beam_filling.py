"""Fills the blanks of a text by beam search."""

from collections.abc import Sequence

from glm_jax.config import GLMConfig
from glm_jax.engine.beam_search import BeamSearch, Hypothesis, beam_steps
from glm_jax.engine.prompt import resolve
from glm_jax.engine.stepwise import Steps, replayable
from glm_jax.generation.blank_filling import PartlyFilled
from glm_jax.model.device_layout import prepare
from glm_jax.model.params import GLMParams


@replayable
def filling_by_beams(
    params: GLMParams,
    config: GLMConfig,
    partly: PartlyFilled,
    settings: BeamSearch,
    max_tokens: int | None = None,
    end_tokens: Sequence[int] | None = None,
) -> Steps[list[tuple[PartlyFilled, Hypothesis]]]:
    """Fill all blanks by beam search, a token at a time; `stepwise.finish` does it at once. Every
    blank takes its best answer, except the last, of which all beams are returned.

    Args:
      max_tokens: maximum tokens of each blank; None for as many as there is room for.

    Returns:
      The text and the last blank's answer for each beam, best first.
    """
    params = prepare(params)
    ends = partly.special.end_tokens if end_tokens is None else tuple(end_tokens)
    filled = [(partly, Hypothesis((), 0.0))]
    while filled[0][0].has_blank:
        best, _ = filled[0]
        prompt = best.prompt()
        limit = min(best.limit, len(prompt) + (max_tokens or best.limit))
        resolved = resolve([prompt], config, limit, ends, best.special)
        hypotheses = yield from beam_steps(params, config, settings, resolved)
        filled = [(best.filled(each.tokens, ends), each) for each in hypotheses]
    return filled
