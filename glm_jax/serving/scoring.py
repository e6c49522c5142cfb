"""Requests to score choices for the blank of a text."""

from typing import Any

from glm_jax.generation.blank_filling import PartlyFilled
from glm_jax.generation.scored_texts import likeliest, score_choices
from glm_jax.generation.shared_scoring import Scoring
from glm_jax.serving.run import Run
from glm_jax.serving.schemas import ScoreRequest
from glm_jax.serving.service import Service


class ScoreRun(Run):
    """A score request while it is answered."""

    def __init__(self, service: Service, request: ScoreRequest):
        """Check and tokenise a request.

        Raises:
          HTTPException, UserError: it cannot be answered.
        """
        super().__init__(service, "score", request.model)
        model, text = self.model, request.context
        limit, is_unidirectional = model.engine.max_length, bool(request.unidirectional)
        partly = PartlyFilled.begin(
            model.tokenizer, text, limit, is_unidirectional, adapter=self.adapter
        )
        steps = score_choices(model.scorer, model.tokenizer, text, partly, request.choices)
        self._scoring = Scoring(steps, request.priority or 0)
        self._prompt_tokens = self._queued_tokens = len(partly.tokens)

    def _submit(self) -> None:
        self.session.submit(0, self._scoring)

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer."""
        await self.session.next()
        scored = self._scoring.result
        choices = [
            {
                "index": index,
                "text": choice.text,
                "logprob": round(choice.log_probability, 6),
                "token_logprobs": [round(value, 6) for value in choice.log_probabilities],
                "is_greedy": choice.is_greedy,
            }
            for index, choice in enumerate(scored)
        ]
        best = likeliest(scored)
        return self.head() | {"choices": choices, "best": best, "usage": self.usage(0)}
