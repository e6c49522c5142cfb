"""Runs given sequences through a model, many in a batch: the base of scoring and embedding."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from glm_jax.config import GLMConfig
from glm_jax.engine.scoring_batch import ScoredSequence, ScoringBatch, make_batches
from glm_jax.engine.stepwise import Steps
from glm_jax.model import glm
from glm_jax.model.params import GLMParams
from glm_jax.model.visibility import Visibility
from glm_jax.sharding import constrain, mesh_of, on_mesh, row_shards

_MIN_WIDTH = 512


@runtime_checkable
class Numbered(Protocol):
    """The result of one sequence; `number` is its index among the given ones."""

    @property
    def number(self) -> int: ...


_Result = TypeVar("_Result", bound=Numbered)


@dataclasses.dataclass
class Padding:
    """How many tokens were run, and how many of them were no padding."""

    run: int = 0
    filled: int = 0

    @property
    def share(self) -> float:
        return 1 - self.filled / self.run if self.run else 0.0


class SequenceBatches(abc.ABC, Generic[_Result]):
    """A program that gives each of many sequences a result.

    Attributes:
      padding: of all that was run.
    """

    max_a_row: int | None = None  # sequences that share a row

    def __init__(self, params: GLMParams, config: GLMConfig, batch_tokens: int):
        """
        Args:
          batch_tokens: that are run at once, of all devices together.
        """
        self._params, self._config, self._batch_tokens = params, config, batch_tokens
        self._mesh, self._static = mesh_of(params), dict[str, Any]()
        self._compiled = set[tuple[tuple[int, ...], ...]]()
        self.padding = Padding()

    @property
    @abc.abstractmethod
    def _program(self) -> Any:
        """The jitted function; it takes parameters, config, `_arrays` and `_static`."""

    @abc.abstractmethod
    def _arrays(self, batch: ScoringBatch) -> tuple[Any, ...]:
        """Return a batch's arrays as the program takes them."""

    @abc.abstractmethod
    def _results(
        self, sequences: Sequence[ScoredSequence], start: int, batch: ScoringBatch, output: Any
    ) -> Iterator[_Result]:
        """Yield the result of each sequence of a batch.

        Args:
          start: added to the numbers of the sequences.
          output: the program's.
        """

    def steps(self, sequences: Sequence[ScoredSequence]) -> Steps[list[_Result]]:
        """Run sequences a batch at a time, and return their results in order.

        Raises:
          ScoringError: a number that is not finite.
        """
        results: list[_Result] = []
        for batch in self._batches(sequences):
            shapes = tuple(x.shape for x in self._arrays(batch))
            if shapes not in self._compiled:
                self._compiled.add(shapes)
                yield functools.partial(self._compile, batch)
            results += self._results(sequences, 0, batch, self._run(batch))
            yield None
        return sorted(results, key=lambda result: result.number)

    def _batches(self, sequences: Sequence[ScoredSequence]) -> Iterator[ScoringBatch]:
        longest = max(map(len, sequences))
        # A row is no longer than what is run at once, but as long as the longest sequence.
        max_width = max(longest, self._batch_tokens)
        width = min(-(-max(longest, _MIN_WIDTH) // 128) * 128, max_width)
        shards = row_shards(self._mesh)
        rows = shards
        while rows * 2 * width <= self._batch_tokens:
            rows *= 2
        return make_batches(sequences, width, rows, shards, self.max_a_row)

    def _run(self, batch: ScoringBatch) -> Any:
        self.padding.run += batch.tokens.size
        self.padding.filled += batch.filled
        return self._call(self._program, batch)

    def _compile(self, batch: ScoringBatch) -> object:
        return self._call(self._program.lower, batch).compile()

    def _call(self, function: Callable[..., Any], batch: ScoringBatch) -> Any:
        with on_mesh(self._mesh):
            return function(self._params, self._config, *self._arrays(batch), **self._static)


def final_hidden(
    params: GLMParams,
    config: GLMConfig,
    tokens: Int[ArrayLike, "rows width"],
    position_ids: Int[ArrayLike, "rows width"],
    key_ranges: Int[ArrayLike, "rows width 4"],
    adapter_ids: Int[ArrayLike, "rows width"] | None,
) -> Float[Array, "rows width embed"]:
    """Hidden states of a batch's rows after the final layer norm; for arguments see `forward`."""
    tokens = constrain(jnp.asarray(tokens), ("batch", "seq"))
    visibility = Visibility(constrain(jnp.asarray(key_ranges), ("batch", "seq", None)))
    hidden, _ = glm.forward_hidden(
        params, config, tokens, position_ids, visibility, adapter_ids=adapter_ids
    )
    return hidden
