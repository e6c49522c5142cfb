"""Attention over pages by the library's kernel and by ours, as a share of the memory's rate."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.kernels.paged_attention.api import paged_attention
from glm_jax.model.paged_cache import quantize_heads
from launch.suites.gpu_parts import (
    PAGE,
    REPEATS,
    Result,
    Shapes,
    copies_of,
    error_of,
    interleaved,
    often,
    read_rate,
    turns_of,
    words_of,
)
from launch.suites.tuned_products import all_of

_HEAD_DIM = 128
_CACHES = {"float16": 2, "int8": 1}  # bytes of a number
# Ours last: if it never ends, or leaves a device that nothing runs on, all others are there.
_IMPLEMENTATIONS = ("library", "xla", "mosaic")


def pages(shapes: Shapes) -> Iterator[Result]:
    """Yield of each implementation the microseconds of one layer's attention of a new token of
    each sequence, the share that this is of the rate at which memory is read, and how far its
    result is from plain XLA's, or why there is none."""
    rate = read_rate(shapes)
    cases = [PagesCase(shapes, heads, cache) for heads in shapes.heads for cache in _CACHES]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        for name in _IMPLEMENTATIONS:
            programs = [pool.submit(case.program, name) for case in cases]
            concurrent.futures.wait(programs)  # compilers and operands take the device, too
            for case, program in zip(cases, programs, strict=True):
                yield case.about() | _measured(case, name, program.result, rate)


def _measured(case: "PagesCase", name: str, compiled: Callable[[], Any], rate: float) -> Result:
    try:
        run = functools.partial(compiled(), *case.operands)
        error = error_of(run()[0], case.expected)
        seconds = interleaved({name: often(run)})[name] / (REPEATS * case.copies * case.turns)
    except Exception as reason:  # whatever a compiler or a device raises
        return {"us": {}, "share": {}, "error": {name: words_of(reason)}}
    share = case.read_bytes / seconds / rate
    return {"us": {name: 1e6 * seconds}, "share": {name: share}, "error": {name: error}}


@dataclasses.dataclass(frozen=True)
class PagesCase:
    """Attention over several caches, by several queries each, in one program.

    A program of one would take less time than its start, and find its cache in the GPU's own.
    """

    shapes: Shapes
    heads: int
    cache: str

    def about(self) -> Result:
        """Return what tells its results from others'."""
        sizes = {"sequences": self.shapes.sequences, "tokens": self.shapes.tokens}
        return {"cache": self.cache, "heads": self.heads} | sizes

    @property
    def read_bytes(self) -> int:
        """Of keys, values and their scales, that one attention must read."""
        of_token = _HEAD_DIM * _CACHES[self.cache] + (4 if self.cache == "int8" else 0)
        return 2 * self.heads * self.shapes.sequences * self.shapes.tokens * of_token

    @property
    def copies(self) -> int:
        return copies_of(self.shapes, self.read_bytes)

    @property
    def turns(self) -> int:
        return turns_of(self.shapes.sequences, self.copies * self.read_bytes)

    @functools.cached_property
    def operands(self) -> tuple[list[jax.Array], list[Any]]:
        """Queries, and the other arguments of `paged_attention` by cache."""
        count, table = self.shapes.sequences, -(-self.shapes.tokens // PAGE)
        tables = np.zeros((count, 1 << (table - 1).bit_length()), np.int32)
        order = np.random.default_rng(0).permutation(count * table)
        tables[:, :table] = 1 + order.reshape(count, table)
        lengths = jnp.full((count, 1), self.shapes.tokens, jnp.int32)
        of_query, *seeds = jax.random.split(jax.random.key(0), 1 + self.copies)
        shape = self.turns, count, 1, self.heads, _HEAD_DIM
        queries = jax.random.normal(of_query, shape, jnp.float16)
        caches = []
        for seed in seeds:
            keys, values, *scales = self._filled(seed, 1 + count * table)
            caches.append((keys, values, jnp.asarray(tables), lengths, *scales))
        return list(queries), caches

    def _filled(self, seed: jax.Array, size: int) -> tuple[jax.Array, ...]:
        shape = self.heads, size, PAGE, _HEAD_DIM
        draws = jax.random.split(seed)
        keys, values = (jax.random.normal(draw, shape, jnp.float16) for draw in draws)
        if self.cache == "int8":
            quantized: tuple[jax.Array, ...] = jax.jit(quantize_heads)(keys, values)
            return quantized
        return keys, values

    @functools.cached_property
    def expected(self) -> jax.Array:
        """float32, plain XLA's first result."""
        queries, caches = self.operands
        attend = jax.jit(functools.partial(paged_attention, implementation="xla"))
        return attend(queries[0], *caches[0]).astype(jnp.float32)

    def program(self, name: str) -> Any:
        """Return an implementation's program, compiled."""
        attend = functools.partial(paged_attention, implementation=name)
        run = all_of(lambda query, cache: attend(query, *cache))
        return run.lower(*self.operands).compile()
