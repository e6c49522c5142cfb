"""lm-evaluation-harness asks our model: `python -m launch.harness --model glm_jax ...`.

A text that follows another is written after [gMASK], the first seen whole; all that follow the same
one, such as the choices of a question, share a pass over it. Words such as [MASK]
and <eop> in the harness's texts are text. The package
(`pip install lm_eval`) is needed by this module alone.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from glm_jax.checkpoints.model_folder import restore
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request, Token
from glm_jax.engine.sampling import Sampling
from glm_jax.engine.scoring_batch import ScoredSequence
from glm_jax.errors import UserError, shown
from glm_jax.evaluation.examples import Document
from glm_jax.evaluation.sequences import count_windows, window
from glm_jax.evaluation.task_config import TaskConfig
from glm_jax.evaluation.tasks import Model
from glm_jax.generation.driver import SingleRequest, drive
from glm_jax.generation.scored_texts import continuations
from glm_jax.model.device_layout import prepare
from glm_jax.sharding import parse_mesh
from glm_jax.tokenizer import Tokenizer

_SLOTS = 32


@register_model("glm_jax")
class HarnessModel(LM):
    """A model folder behind the harness's interface.

    Args of `--model_args`: checkpoint, and tokenizer, mesh, dtype, quantization, adapter as the
    flags of `launch.evaluate`; batch_tokens (4096) scored at once; max_gen_toks (256) of an answer;
    unidirectional (False): each token of a context sees only those before it.
    """

    def __init__(
        self,
        checkpoint: Any = None,
        tokenizer: Any = None,
        mesh: Any = None,
        dtype: Any = None,
        quantization: Any = None,
        adapter: Any = None,
        batch_tokens: int = 4096,
        max_gen_toks: int = 256,
        unidirectional: Any = False,
        **harness: Any,
    ):
        super().__init__()
        unknown = set(harness) - {"batch_size", "max_batch_size", "device"}
        if unknown:
            raise UserError(f"--model_args: unknown: {', '.join(sorted(unknown))}")
        texts = {
            "checkpoint": checkpoint,
            "tokenizer": tokenizer,
            "mesh": mesh,
            "dtype": dtype,
            "quantization": quantization,
            "adapter": adapter,
        }
        for name, value in texts.items():
            if not isinstance(value, str | None):  # the harness makes numbers of what looks so
                raise UserError(f"--model_args: {name}={shown(value)}: expected text")
        if checkpoint is None:
            raise UserError("--model_args: give checkpoint=DIR, a model folder")
        if not isinstance(unidirectional, bool):
            raise UserError(
                f"--model_args: unidirectional={shown(unidirectional)}: expected True or False"
            )
        devices = None if mesh is None else parse_mesh(mesh.replace(";", ","))
        config, params = restore(checkpoint, devices, dtype, quantization, adapter=adapter)
        params = prepare(params)
        codec = Tokenizer(tokenizer or checkpoint)
        self._model = Model(params, config, codec, _whole("batch_tokens", batch_tokens, 1))
        self._max_tokens = _whole("max_gen_toks", max_gen_toks, 1)
        self._is_unidirectional = unidirectional

    @property
    def _length(self) -> int:
        return self._model.config.max_sequence_length

    def _seen(self, prompt: Sequence[int], text: Sequence[int]) -> tuple[int, ...]:
        """Return what of a prompt there is room for, its end, before a text."""
        room = self._length - 1 - len(text)
        if room < 0:  # some of its log-probabilities would be missing from the sum
            raise UserError(
                f"a continuation of {len(text)} tokens is past the model's {self._length} positions"
            )
        return tuple(prompt[max(0, len(prompt) - room) :])

    def _pair(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of both, where `text` follows `context`."""
        if not text:
            return [], []
        stripped = context.rstrip()
        text = context[len(stripped) :] + text
        prompt = self._encode(stripped) if stripped else []
        whole = self._encode(stripped + text)
        if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
            return prompt, whole[len(prompt) :]
        return prompt, self._encode(text)

    def _encode(self, text: str) -> list[int]:
        return self._model.tokenizer.encode(text, ())

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return the log-probability of each second text after the first, and if it is greedy's.

        An empty second text is certain: (0.0, True).

        Raises:
          UserError: a second text is longer than the model's positions.
        """
        pairs = [self._pair(*request.args) for request in requests]
        same: dict[tuple[int, ...], list[int]] = {}  # the requests of each context
        for number, (prompt, text) in enumerate(pairs):
            if text:
                same.setdefault(self._seen(prompt, text), []).append(number)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        sequences, places = list[ScoredSequence](), list[list[int]]()
        for seen, numbers in same.items():
            texts = [pairs[number][1] for number in numbers]
            some = continuations(
                seen,
                texts,
                self._model.special,
                self._length,
                is_unidirectional=self._is_unidirectional,
            )
            rest = iter(numbers)
            places += [list(itertools.islice(rest, int(one.groups[-1]) + 1)) for one in some]
            sequences += some
        for score in self._model.scorer.score(sequences):
            hits = np.bincount(score.groups, ~score.are_argmax)
            for number, sum_, misses in zip(places[score.number], score.sums, hits, strict=True):
                results[number] = float(sum_), not misses
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log-probability of each text, every token scored once; 0.0 for an empty one.

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
        owners, sequences, special = [], [], self._model.special
        for number, request in enumerate(requests):
            document = Document(tuple(self._encode(request.args[0])), 1, 1)
            for index in range(count_windows(document, config) if document.tokens else 0):
                owners.append(number)
                sequences.append(window(document, config, special, index))
        totals = [0.0] * len(requests)
        for score in self._model.scorer.score(sequences):
            totals[owners[score.number]] += float(score.sums[0])
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return each answer up to the first of its stop texts."""
        model, special = self._model, self._model.special
        engine = Engine(model.params, model.config, EngineSettings(_SLOTS), special)
        answers = []
        for request in requests:
            context, options = request.args
            settings = {name: value for name, value in options.items() if value is not None}
            max_tokens = _whole("max_gen_toks", settings.get("max_gen_toks", self._max_tokens), 1)
            max_tokens = min(max_tokens, self._length - 4)
            tokens = self._encode(context)[-(self._length - max_tokens - 2) :]
            prompt = Prompt((*tokens, special.gmask), None)
            stops = _texts(settings.get("until"))
            request = Request(prompt, _sampling(settings), max_tokens)
            answers.append(_UntilStop(request, stops, self._text))
        for answer in drive(engine, answers):
            answer.check()
        return [_cut(answer.text, answer.stops) for answer in answers]

    def _text(self, tokens: Sequence[int]) -> str:
        return self._model.tokenizer.decode(self._model.special.without_end(tokens))


class _UntilStop(SingleRequest):
    """An answer that ends at the first of its stop texts."""

    def __init__(
        self, request: Request, stops: tuple[str, ...], decode: Callable[[Sequence[int]], str]
    ):
        super().__init__(request)
        self.stops, self._decode = stops, decode

    @property
    def text(self) -> str:
        return self._decode([token.token for token in self.tokens])

    def receive(self, token: Token) -> bool:
        super().receive(token)
        return bool(self.stops) and any(stop in self.text for stop in self.stops)


def _texts(until: Any) -> tuple[str, ...]:
    texts = (until,) if isinstance(until, str) else until or ()
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"until={until!r}: expected texts")
    return tuple(filter(None, texts))


def _cut(text: str, stops: Sequence[str]) -> str:
    ends = [text.index(stop) for stop in stops if stop in text]
    return text[: min(ends, default=len(text))]


def _sampling(settings: dict[str, Any]) -> Sampling:
    """Return greedy sampling unless `do_sample` or a temperature above 0 asks for another."""
    samples = settings.get("do_sample", True)
    temperature = settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0)
    return Sampling(
        temperature=_number("temperature", temperature) if samples else 0.0,
        top_k=_whole("top_k", settings.get("top_k", 0), 0),
        top_p=_number("top_p", settings.get("top_p", 0.0)),
    )


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}={value!r}: expected a number") from error


def _whole(name: str, value: Any, minimum: int) -> int:
    number = _number(name, value)
    if not (number >= minimum and number.is_integer()):
        raise UserError(f"{name}={value}: expected a whole number, at least {minimum}")
    return int(number)
