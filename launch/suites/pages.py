"""Attention over pages by the library's kernel and by ours, as a share of the memory's rate."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.kernels.dispatch import BackendError
from glm_jax.kernels.paged_attention.api import paged_attention
from glm_jax.model.paged_cache import quantize_heads
from launch.suites.gpu_parts import PAGE, REPEATS, Result, Shapes, interleaved, often, read_rate

_HEAD_DIM = 128
_IMPLEMENTATIONS = ("library", "mosaic", "xla")


def pages(shapes: Shapes) -> Iterator[Result]:
    """Microseconds of one layer's attention of a new token of each sequence, the share that this
    is of the rate at which memory is read, and how far each result is from plain XLA's."""
    rate = read_rate(shapes)
    for heads in shapes.heads:
        for cache in ("float16", "int8"):
            run_by, size = _runs(shapes, heads, cache)
            expected = run_by("xla")().astype(jnp.float32)
            runs: dict[str, Callable[[], object]] = {}
            errors: dict[str, Any] = {}
            for name in _IMPLEMENTATIONS:
                try:
                    run = run_by(name)
                    errors[name] = float(jnp.max(jnp.abs(run().astype(jnp.float32) - expected)))
                    runs[name] = often(run)
                except BackendError as error:
                    errors[name] = str(error)
                except jax.errors.JaxRuntimeError as error:  # a kernel that does not run here
                    errors[name] = str(error).splitlines()[0]
            taken = {name: time / REPEATS for name, time in interleaved(runs).items()}
            yield {
                "cache": cache,
                "heads": heads,
                "sequences": shapes.sequences,
                "tokens": shapes.tokens,
                "us": {name: 1e6 * time for name, time in taken.items()},
                "share": {name: size / time / rate for name, time in taken.items()},
                "error": errors,
            }


def _runs(shapes: Shapes, heads: int, cache: str) -> tuple[Callable[[str], Any], int]:
    """Return a function from an implementation to a run by it; and bytes that a run must read."""
    count, table = shapes.sequences, -(-shapes.tokens // PAGE)
    size = 1 << (table - 1).bit_length()
    draws = jax.random.split(jax.random.key(0), 3)
    shape = (heads, 1 + count * table, PAGE, _HEAD_DIM)
    keys, values = (jax.random.normal(draw, shape, jnp.float16) for draw in draws[:2])
    scales: Any = (None, None)
    if cache == "int8":
        keys, values, *scales = jax.jit(quantize_heads)(keys, values)
    tables = np.zeros((count, size), np.int32)
    order = np.random.default_rng(0).permutation(count * table)
    tables[:, :table] = 1 + order.reshape(count, table)
    operands = (
        jax.random.normal(draws[2], (count, 1, heads, _HEAD_DIM), jnp.float16),
        keys,
        values,
        jnp.asarray(tables),
        jnp.full((count, 1), shapes.tokens, jnp.int32),
        *scales,
    )
    read = sum(x.nbytes for x in (keys, values, *scales) if x is not None)

    def run_by(name: str) -> Callable[[], Any]:
        run = jax.jit(functools.partial(paged_attention, implementation=name))
        return functools.partial(run, *operands)

    return run_by, read * count * shapes.tokens // (shape[1] * PAGE)
