"""Log-probabilities of tokens, many sequences at a time."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from glm_jax.config import GLMConfig
from glm_jax.evaluation.packing import pack
from glm_jax.evaluation.sequences import ScoredSequence
from glm_jax.model import glm
from glm_jax.model.paged_cache import row_shards
from glm_jax.model.params import GLMParams
from glm_jax.model.visibility import Visibility
from glm_jax.sharding import constrain, mesh_of

_CHUNK = 256  # places whose scores of the whole vocabulary are there at once
_LEAST_WIDTH = 512
_ROUND = 4096  # sequences that are packed together: what is done is given out after each


@dataclasses.dataclass
class Padding:
    """How many tokens were run, and how many of them were no padding."""

    run: int = 0
    filled: int = 0

    @property
    def share(self) -> float:
        return 1 - self.filled / self.run if self.run else 0.0


class Scorer:
    """Scores sequences by a model.

    Attributes:
      padding: of all that was scored.
    """

    def __init__(self, params: GLMParams, config: GLMConfig, batch_tokens: int = 4096):
        """
        Args:
          batch_tokens: that are run at once, of all devices together.
        """
        self._params, self._config, self._batch_tokens = params, config, batch_tokens
        self._mesh = mesh_of(params)
        self.padding = Padding()

    def score(
        self, sequences: Sequence[ScoredSequence]
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Each sequence's number, in no order, the log-probabilities of its targets (float32
        [asked], nats), and whether each is the likeliest token."""
        for start in range(0, len(sequences), _ROUND):
            for number, values, hits in self._round(sequences[start : start + _ROUND]):
                yield start + number, values, hits

    def _round(
        self, sequences: Sequence[ScoredSequence]
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        longest = max(map(len, sequences))
        # A row is no longer than what is run at once, but as long as the longest sequence.
        most = max(longest, self._batch_tokens)
        width = min(-(-max(longest, _LEAST_WIDTH) // 128) * 128, most)
        shards = row_shards(self._mesh) if self._mesh is not None else 1
        rows = shards
        while rows * 2 * width <= self._batch_tokens:
            rows *= 2
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            for batch in pack(sequences, width, rows, shards):
                found = self._program(
                    self._params,
                    tokens=batch.tokens,
                    position_ids=batch.position_ids,
                    key_ranges=batch.key_ranges,
                    places=batch.places,
                    targets=batch.targets,
                )
                self.padding.run += batch.tokens.size
                self.padding.filled += batch.filled
                values, hits = map(np.asarray, found)
                for number, row, first, end in batch.slices:
                    yield number, values[row, first:end], hits[row, first:end]

    @functools.cached_property
    def _program(self) -> Callable[..., tuple[Array, Array]]:
        out = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())
        run = functools.partial(log_probabilities, config=self._config)
        return jax.jit(run, out_shardings=out)


def log_probabilities(
    params: GLMParams,
    config: GLMConfig,
    tokens: Int[Array, "rows width"],
    position_ids: Int[Array, "rows width"],
    key_ranges: Int[Array, "rows width 4"],
    places: Int[Array, "rows asked"],
    targets: Int[Array, "rows asked"],
) -> tuple[Float[Array, "rows asked"], Array]:
    """log softmax of the scores at `places`, of `targets`, and whether they are the largest.

    Scores are computed at places alone, and of so many at a time that they stay small.
    """
    visibility = Visibility(constrain(key_ranges, ("batch", "seq", None)))
    tokens = constrain(tokens, ("batch", "seq"))
    hidden, _ = glm.forward_hidden(params, config, tokens, position_ids, visibility)
    chosen = jnp.take_along_axis(hidden, places[:, :, None], axis=1)
    rows, asked = places.shape
    # The largest power of two that divides what is asked for, and is no more than fits.
    chunk = math.gcd(asked, 1 << (max(1, _CHUNK // rows).bit_length() - 1))

    def look_up(part: tuple[Array, Array]) -> tuple[Array, Array]:
        some, wanted = part
        scores = glm.logits(params, config, some)
        # A comparison, not a gather: each device holds a part of the vocabulary.
        is_target = jnp.arange(scores.shape[-1], dtype=jnp.int32) == wanted[..., None]
        of_target = jnp.max(jnp.where(is_target, scores, -jnp.inf), axis=-1)
        largest = jnp.max(scores, axis=-1)
        return of_target - jax.nn.logsumexp(scores, axis=-1), of_target == largest

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(rows, asked // chunk, chunk, *x.shape[2:]), 1, 0)

    values, hits = jax.lax.map(look_up, (split(chosen), split(targets)))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, asked)
    return join(values), join(hits)
