"""lm-evaluation-harness asks our model: `python -m launch.harness --model glm_jax ...`.

A text that follows another is written after [gMASK], the first seen whole. The package
(`pip install lm_eval`) is needed by this module alone.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from glm_jax.decoding.completion import Request
from glm_jax.decoding.engine import Engine, EngineSettings
from glm_jax.decoding.prepare import prepare
from glm_jax.decoding.prompt import Prompt
from glm_jax.decoding.sampling import Sampling
from glm_jax.evaluation.examples import Document
from glm_jax.evaluation.sequences import ScoredSequence, continuation, count_windows, window
from glm_jax.evaluation.task_config import TaskConfig
from glm_jax.evaluation.tasks import Model
from glm_jax.model.checkpoint import restore
from glm_jax.sharding import parse_mesh
from glm_jax.tokenizer import Tokenizer

_SLOTS = 32


@register_model("glm_jax")
class HarnessModel(LM):
    """A model folder behind the harness's interface.

    Args of `--model_args`: checkpoint, and tokenizer, mesh, dtype, quantization, adapter as the
    flags of `launch.evaluate`; batch_tokens (4096) scored at once; max_gen_toks (256) of an answer.
    """

    def __init__(
        self,
        checkpoint: str,
        tokenizer: str | None = None,
        mesh: str | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        adapter: str | None = None,
        batch_tokens: int = 4096,
        max_gen_toks: int = 256,
        **harness: Any,
    ):
        super().__init__()
        unknown = set(harness) - {"batch_size", "max_batch_size", "device"}
        if unknown:
            raise ValueError(f"--model_args: unknown: {', '.join(sorted(unknown))}")
        devices = None if mesh is None else parse_mesh(mesh.replace(";", ","))
        config, params = restore(checkpoint, devices, dtype, quantization, adapter=adapter)
        params = prepare(params)
        codec = Tokenizer(tokenizer or checkpoint)
        self._model = Model(params, config, codec, int(batch_tokens))
        self._max_tokens = int(max_gen_toks)

    @property
    def _length(self) -> int:
        return self._model.config.max_sequence_length

    def _continuation(self, prompt: Sequence[int], text: Sequence[int]) -> ScoredSequence:
        special = self._model.special
        text = text[: self._length - 1]
        room = self._length - 1 - len(text)
        return continuation(
            prompt[len(prompt) - room :] if room < len(prompt) else prompt,
            text,
            special.gmask,
            special.sop,
        )

    def _pair(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """Ids of both, as they are where the second follows the first."""
        kept = context.rstrip()
        text = context[len(kept) :] + text
        encode = self._model.tokenizer.encode
        prompt = encode(kept) if kept else []
        whole = encode(kept + text)
        if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
            return prompt, whole[len(prompt) :]
        return prompt, encode(text)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each second text after the first, and whether greedy gives it."""
        sequences = [self._continuation(*self._pair(*request.args)) for request in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for score in self._model.scorer.score(sequences):
            found[score.number] = float(score.sums[0]), bool(score.are_likeliest.all())
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each text, every token asked for once.

        Windows move on by half the model's positions, so that each token but the first has
        seen at least the other half.
        """
        config = TaskConfig(
            "rolling",
            "lm",
            ".",
            use_task_mask=True,
            max_seq_length=self._length,
            generation_length=self._length // 2,
        )
        encode, special = self._model.tokenizer.encode, self._model.special
        owners, sequences = [], []
        for number, request in enumerate(requests):
            document = Document(tuple(encode(request.args[0])), 1, 1)
            for place in range(count_windows(document, config)):
                owners.append(number)
                sequences.append(window(document, config, special, place))
        totals = [0.0] * len(requests)
        for score in self._model.scorer.score(sequences):
            totals[owners[score.number]] += float(score.sums[0])
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Each answer up to the first of its stop texts."""
        model, special = self._model, self._model.special
        engine = Engine(model.params, model.config, EngineSettings(_SLOTS), special)
        stops: dict[int, tuple[str, ...]] = {}
        for request in requests:
            context, settings = request.args
            most = min(int(settings.get("max_gen_toks", self._max_tokens)), self._length - 4)
            tokens = model.tokenizer.encode(context)[-(self._length - most - 2) :]
            prompt = Prompt((*tokens, special.gmask), None)
            ticket = engine.submit(Request(prompt, _sampling(settings), most))
            stops[ticket] = _texts(settings.get("until"))
        answers: dict[int, list[int]] = {ticket: [] for ticket in stops}
        while not engine.is_idle:
            for token in engine.step():
                answer, own = answers[token.ticket], stops[token.ticket]
                answer.append(token.token)
                text = self._text(answer) if own else ""
                if any(stop in text for stop in own):
                    engine.cancel(token.ticket)
        return [_cut(self._text(answers[ticket]), stops[ticket]) for ticket in sorted(stops)]

    def _text(self, tokens: Iterable[int]) -> str:
        ends = self._model.special.end_tokens
        return self._model.tokenizer.decode([token for token in tokens if token not in ends])


def _texts(until: str | Sequence[str] | None) -> tuple[str, ...]:
    texts = (until,) if isinstance(until, str) else until or ()
    return tuple(filter(None, texts))


def _cut(text: str, stops: Sequence[str]) -> str:
    places = [text.index(stop) for stop in stops if stop in text]
    return text[: min(places, default=len(text))]


def _sampling(settings: dict[str, Any]) -> Sampling:
    temperature = float(settings.get("temperature", 0.0))
    if not settings.get("do_sample", temperature > 0):
        return Sampling()
    return Sampling(
        temperature=temperature or 1.0,
        top_k=int(settings.get("top_k", 0)),
        top_p=float(settings.get("top_p", 0.0)),
    )
