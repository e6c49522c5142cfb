"""Drafts by a smaller model that has the same tokens.

It follows the engine's slots. Each has pages here for the longest request, so that none ever waits
for memory. What a slot's text gained since the last drafts is run before the next ones; drafts that
were accepted have been run already.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from glm_jax.config import GLMConfig
from glm_jax.engine import step_functions
from glm_jax.engine.page_pool import PAGE_SIZE, PageAllocation, page_count, table_size
from glm_jax.engine.prefill_batch import (
    make_prefill_batch,
    prefill_length,
    prefill_width,
    prefill_widths,
)
from glm_jax.engine.prompt import Prompt, PromptError
from glm_jax.engine.step_functions import Rows
from glm_jax.model.device_layout import prepare
from glm_jax.model.layer_stacks import as_layers
from glm_jax.model.paged_cache import PagedKVCache
from glm_jax.model.params import GLMParams
from glm_jax.sharding import constrain, mesh_of, on_mesh, row_shards

_NEW = 2  # tokens that a slot gains where all its drafts were accepted
_CATCH_UP = 16  # tokens of a slot that are run at once where it gained more


@dataclasses.dataclass(frozen=True)
class SmallModel:
    """A model that writes drafts for another one.

    Attributes:
      params: on the mesh of the other one's.
    """

    params: GLMParams
    config: GLMConfig

    def check(self, config: GLMConfig, max_length: int) -> None:
        """
        Args:
          config: of the other model.
          max_length: tokens of a request.

        Raises:
          PromptError: it has other tokens, or too few positions.
        """
        own = self.config
        if own.vocab_size != config.vocab_size:
            raise PromptError(
                f"the draft model has {own.vocab_size} tokens, the model {config.vocab_size}: "
                "it needs the same tokenizer"
            )
        if own.max_sequence_length < max_length:
            raise PromptError(
                f"the draft model has {own.max_sequence_length} positions, a request up to "
                f"{max_length}"
            )


@dataclasses.dataclass
class _Text:
    """A slot's request.

    Attributes:
      position_id: of the prompt's last token.
      cached: tokens of the text that are in the cache; 0 before the prompt is.
      drafts: that were run behind these.
    """

    prompt: Prompt
    position_id: int
    cached: int = 0
    drafts: tuple[int, ...] = ()

    def skip_accepted(self, text: Sequence[int]) -> None:
        """Count drafts that became text as cached."""
        new = zip(self.drafts, text[self.cached : -1], strict=False)
        self.cached += sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], new))
        self.drafts = ()

    def position_ids(self, count: int) -> np.ndarray:
        """Of so many tokens behind those that are cached."""
        distance = self.cached + np.arange(count) - (len(self.prompt) - 1)
        return self.position_id + self.prompt.position_step * distance


class DraftModel:
    """A small model with a cache for the slots of an engine."""

    def __init__(self, model: SmallModel, sop: int, slots: int, max_length: int, count: int):
        """
        Args:
          slots: of the engine.
          max_length: tokens of a request at most, drafts included.
          count: drafts of a request at most.
        """
        self._params, self._config = prepare(model.params), model.config
        self._sop, self._slots, self._count = sop, slots, count
        self._mesh = mesh_of(model.params)
        self._shards, self._max_length = row_shards(self._mesh), max_length
        own, of_shard = page_count(max_length), slots // self._shards
        pages = 1 + own * of_shard
        is_apart = as_layers(self._params.layers).is_apart
        self._pages_a_layer = 0 if is_apart else pages
        self._tables = np.zeros((slots, table_size(max_length)), np.int32)
        first = 1 + np.arange(slots) % of_shard * own
        self._tables[:, :own] = first[:, None] + np.arange(own)
        with on_mesh(self._mesh):
            self._cache = step_functions.make_cache(self._params, self._config, pages, PAGE_SIZE)
        self._texts: dict[int, _Text] = {}

    def begin(self, slot: int, prompt: Prompt) -> None:
        """Take the request of a slot. Its prompt is run when drafts are first asked for."""
        self._texts[slot] = _Text(prompt, int(prompt.position_ids()[-1]))

    def propose(
        self, numbers: Sequence[int], texts: Mapping[int, Sequence[int]], counts: Mapping[int, int]
    ) -> Int[np.ndarray, "rows drafts"]:
        """Return the likeliest tokens to come, one after another; -1 after a slot's last.

        Args:
          numbers: of slots, a row each; under a mesh all of them.
          texts: prompt and answer so far, of the slots that get drafts.
          counts: how many each of these gets, at least one.
        """
        with on_mesh(self._mesh):
            self._prefill([slot for slot in texts if not self._texts[slot].cached])
            for slot, text in texts.items():
                self._texts[slot].skip_accepted(text)
            while any(len(text) - self._texts[slot].cached > _NEW for slot, text in texts.items()):
                self._catch_up(numbers, texts)
            proposed = np.array(self._draft(numbers, texts, counts))
        for row, slot in zip(proposed, numbers, strict=True):
            if slot in texts:  # the last draft is not run
                self._texts[slot].drafts = tuple(row[: counts[slot] - 1].tolist())
        return proposed

    def run_idle(self, rows: int) -> None:
        """Run the program of so many rows to its end; it changes no slot's text."""
        with on_mesh(self._mesh):
            jax.block_until_ready(self._draft(range(rows), {}, {}))

    def warm_up(self, widths: Iterable[int]) -> None:
        """Compiles all programs.

        Args:
          widths: rows that `propose` is called with.
        """
        with on_mesh(self._mesh):
            for width in prefill_widths(self._max_length):
                self._run_prefill([], width)
            for rows in widths:
                self._catch_up(range(rows), {})
                self._draft(range(rows), {}, {})

    def _prefill(self, slots: Iterable[int]) -> None:
        waiting = list(slots)
        while waiting:
            used, some = [0] * self._shards, list[int]()
            for slot in waiting:
                shard = slot * self._shards // self._slots
                count = prefill_length(self._texts[slot].prompt)
                if used[shard] and used[shard] + count > self._max_length:
                    break
                used[shard] += count
                some.append(slot)
            self._run_prefill(some, prefill_width(max(used)))
            waiting = waiting[len(some) :]
            for slot in some:
                self._texts[slot].cached = prefill_length(self._texts[slot].prompt)

    def _run_prefill(self, slots: Sequence[int], width: int) -> None:
        allocated = [
            PageAllocation(slot * self._shards // self._slots, tuple(self._tables[slot].tolist()))
            for slot in slots
        ]
        prompts = [self._texts[slot].prompt for slot in slots]
        batch = make_prefill_batch(
            list(zip(prompts, allocated, strict=True)),
            self._shards,
            width,
            PAGE_SIZE,
            self._pages_a_layer,
            self._sop,
        )
        x = step_functions.embed(self._params, self._config, batch)
        end = self._config.num_layers
        _, self._cache = step_functions.prefill(
            self._params, self._config, x, batch, self._cache, 0, end
        )

    def _catch_up(self, numbers: Sequence[int], texts: Mapping[int, Sequence[int]]) -> None:
        """Run tokens of texts, all but the last of each."""
        before = {slot: text[:-1] for slot, text in texts.items()}
        rows = self._rows(numbers, before, _CATCH_UP)
        _, self._cache = step_functions.decode(
            self._params, self._config, rows, self._cache, self._pages_a_layer
        )

    def _draft(
        self,
        numbers: Sequence[int],
        texts: Mapping[int, Sequence[int]],
        counts: Mapping[int, int],
    ) -> Array:
        steps = [self._texts[n].prompt.position_step if n in texts else 0 for n in numbers]
        drafts, self._cache = _draft(
            self._params,
            self._config,
            self._rows(numbers, texts, _NEW),
            np.array([counts.get(number, 0) for number in numbers], np.int32),
            np.array(steps, np.int32),
            self._cache,
            self._count,
            self._pages_a_layer,
        )
        return drafts

    def _rows(self, numbers: Sequence[int], texts: Mapping[int, Sequence[int]], width: int) -> Rows:
        """Return the next tokens of texts that are not in the cache, at most `width` of each; from
        here on they are."""
        shape = (len(numbers), width)
        rows = Rows(
            is_active=np.zeros(shape, bool),
            tokens=np.zeros(shape, np.int32),
            position_ids=np.zeros(shape, np.int32),
            index=np.zeros(len(numbers), np.int32),
            table=self._tables[list(numbers)],
        )
        for row, slot in enumerate(numbers):
            if slot not in texts:
                continue
            own = self._texts[slot]
            new = texts[slot][own.cached : own.cached + width]
            rows.is_active[row, : len(new)] = True
            rows.tokens[row, : len(new)] = new
            rows.position_ids[row, : len(new)] = own.position_ids(len(new))
            rows.index[row] = own.cached
            own.cached += len(new)
        return rows


@functools.partial(
    step_functions.jit_step,
    static_argnames=("config", "count", "pages_a_layer"),
    donate_argnames="cache",
)
def _draft(
    params: GLMParams,
    config: GLMConfig,
    rows: Rows,
    counts: Int[Any, " rows"],
    position_steps: Int[Any, " rows"],
    cache: PagedKVCache,
    count: int,
    pages_a_layer: int,
) -> tuple[Int[Array, "rows drafts"], PagedKVCache]:
    """Return the likeliest tokens behind each row's, and pages with all of these but the last.

    Args:
      counts: how many each row gets, 0 where it has no tokens.
      position_steps: how far apart their positions are.
      count: of drafts in a row of the result, -1 after the last.
    """
    run = functools.partial(
        step_functions.forward_rows, params, config, pages_a_layer=pages_a_layer
    )
    of_row = jnp.sum(rows.is_active, axis=1)
    last = jnp.maximum(of_row - 1, 0)[:, None]
    logits, cache = run(rows=rows, cache=cache)
    likeliest = lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32)
    first = jnp.take_along_axis(likeliest(logits), last, axis=1)[:, 0]
    position_ids = jnp.take_along_axis(jnp.asarray(rows.position_ids), last, axis=1)[:, 0]

    def draft(carry: Any, number: Array) -> Any:
        token, cache = carry
        new = dataclasses.replace(
            rows,
            is_active=(number < counts)[:, None],
            tokens=token[:, None],
            position_ids=(position_ids + number * position_steps)[:, None],
            index=rows.index + of_row + number - 1,
        )
        logits, cache = run(rows=new, cache=cache)
        following = likeliest(logits[:, 0])
        return (following, cache), following

    numbers = jnp.arange(1, count, dtype=jnp.int32)
    (_, cache), others = jax.lax.scan(draft, (first, cache), numbers)
    drafts = jnp.concatenate([first[:, None], others.T], axis=1)
    is_asked = jnp.arange(count) < jnp.asarray(counts)[:, None]
    # Whole on every device, so that every process can read it.
    return constrain(jnp.where(is_asked, drafts, -1), (None, None)), cache
