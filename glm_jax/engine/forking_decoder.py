"""Decode steps of rows that go on from one another, as the beams of a search do.

Rows share the pages of what they have in common, the prompt above all; the page that a row writes
to is copied first where others have it too. The cache is the decoder's own.
"""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from glm_jax.config import GLMConfig
from glm_jax.engine import step_functions
from glm_jax.engine.page_pool import (
    PAGE_SIZE,
    PageAllocation,
    PagePool,
    page_count,
    page_table,
    table_size,
)
from glm_jax.engine.prefill_batch import make_prefill_batch, prefill_length
from glm_jax.engine.prompt import Prompt, bucket
from glm_jax.engine.step_functions import Rows
from glm_jax.engine.stepwise import Steps
from glm_jax.model.layer_stacks import as_layers
from glm_jax.model.params import GLMParams
from glm_jax.sharding import mesh_of, on_mesh, row_shards


class ForkingDecoder:
    """Rows that begin with one prompt, each with its own continuation.

    Under a mesh that divides rows each group of devices runs all of them: they are few, would
    seldom divide, and go on from any other's pages.
    """

    def __init__(
        self, params: GLMParams, config: GLMConfig, prompt: Prompt, num_rows: int, limit: int
    ):
        """
        Args:
          params: prepared.
          limit: tokens of prompt and answer.
        """
        self._params, self._config = params, config
        self._num_rows, self._mesh = num_rows, mesh_of(params)
        self._shards, self._compiled = row_shards(self._mesh), set[Any]()
        shared = prefill_length(prompt) // PAGE_SIZE  # pages that all rows share to the end
        pages = _rounded(1 + shared + num_rows * (page_count(limit, PAGE_SIZE) - shared))
        self._pages_a_layer = 0 if as_layers(params.layers).is_apart else pages
        self._table_size, self._pool = table_size(limit, PAGE_SIZE), PagePool(1, pages, PAGE_SIZE)
        self._rows = [self._pool.allocate(0, limit)]
        self._adapter = prompt.adapter
        self._position, self._position_step = int(prompt.position_ids()[-1]), prompt.position_step
        with on_mesh(self._mesh):
            self._cache = step_functions.make_cache(params, config, pages, PAGE_SIZE)

    def run(self, program: Any, *arguments: Any) -> Steps[Any]:
        """Yield what a program gives, which can be compiled before its first run."""
        if program not in self._compiled:
            self._compiled.add(program)
            yield functools.partial(self._compile, program, *arguments)
        with on_mesh(self._mesh):
            return program(*arguments)

    def _compile(self, program: Any, *arguments: Any) -> object:
        """Compiles a program for arguments, which it neither runs on nor donates."""
        with on_mesh(self._mesh):
            return program.lower(*arguments).compile()

    def prefill(self, prompt: Prompt, sop: int) -> Steps[None]:
        """Put a prompt's keys and values into the pages of the one row there is."""
        config = self._config
        of_shards = [
            (prompt, PageAllocation(shard, self._rows[0].pages)) for shard in range(self._shards)
        ]
        width = bucket(prefill_length(prompt))
        batch = make_prefill_batch(
            of_shards, self._shards, width, PAGE_SIZE, self._pages_a_layer, sop
        )
        x = yield from self.run(step_functions.embed, self._params, config, batch)
        x = step_functions.beside(self._params, x)
        arguments = (self._params, config, x, batch, self._cache, 0, config.num_layers)
        yield functools.partial(
            self._compile,
            step_functions.prefill_layers,
            *step_functions.prefill_arguments(*arguments),
        )
        with on_mesh(self._mesh):
            _, self._cache = step_functions.prefill(*arguments)

    def follow(self, parents: np.ndarray) -> None:
        """Has rows go on from those that `parents` names, as many as it has."""
        before = self._rows
        self._rows = [self._pool.fork(before[parent]) for parent in parents]
        for allocation in before:
            self._pool.free(allocation)
        self._position += self._position_step

    def step(self, tokens: np.ndarray, index: int) -> Steps[Float[Array, "rows vocab"]]:
        """Logits after each row's latest token; those of rows that do not count come last.

        Args:
          tokens: int32 [num_rows].
          index: of these tokens in their sequences.
        """
        copies = []
        for row, allocation in enumerate(self._rows):
            self._rows[row], copy = self._pool.make_writable(allocation, index)
            copies += [] if copy is None else [copy]
        if copies:
            copies += [(0, 0)] * (self._num_rows - len(copies))  # one shape for any number
            sources, targets = np.array(copies * self._shards, np.int32).T
            copied = self.run(
                step_functions.copy_pages, self._cache, sources, targets, self._pages_a_layer
            )
            self._cache = yield from copied
        logits, self._cache = yield from self.run(
            step_functions.decode,
            self._params,
            self._config,
            self._described(tokens, index),
            self._cache,
            self._pages_a_layer,
        )
        return logits[:, 0]

    def _described(self, tokens: np.ndarray, index: int) -> Rows:
        count = self._num_rows
        tables = [page_table(allocation.pages, self._table_size) for allocation in self._rows]
        tables += [page_table((), self._table_size)] * (count - len(tables))
        rows = Rows(
            is_active=(np.arange(count) < len(self._rows))[:, None],
            tokens=tokens[:, None],
            position_ids=np.full((count, 1), self._position, np.int32),
            index=np.full(count, index, np.int32),
            table=np.stack(tables),
            adapter_id=np.full(count, self._adapter, np.int32),
        )
        tiled: Rows = jax.tree.map(lambda x: np.concatenate([x] * self._shards), rows)
        return tiled


def _rounded(pages: int) -> int:
    """Pages of a cache, rounded up such that searches have few sizes, and programs, between them
    and an eighth is unused at most."""
    step = max(1, 1 << (pages.bit_length() - 1) >> 3)
    return -(-pages // step) * step
