"""Attention over pages by our own kernel, on the device, against the formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.formula import assert_close, attended_over_pages

from glm_jax.kernels import target
from glm_jax.kernels.paged_attention.arguments import Arguments
from glm_jax.kernels.paged_attention.mosaic import MosaicGPU
from glm_jax.model.paged_cache import quantize_heads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not target.requires_wgmma()[0], reason=f"{target.requires_wgmma()[1]} alone"
    ),
]
TOLERANCES = {"float16": 2e-3, "bfloat16": 1.6e-2}


@functools.cache
def _pages(cache, dtype, heads, count):
    draws = jax.random.split(jax.random.key(0), 2)
    keys, values = (jax.random.normal(draw, (heads, count, 64, 128)) for draw in draws)
    if cache == "int8":
        return quantize_heads(keys, values)
    return keys.astype(dtype), values.astype(dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("cache", ["float", "int8"])
@pytest.mark.parametrize(("rows", "new", "heads"), [(1, 1, 12), (5, 4, 12), (32, 1, 96), (3, 9, 8)])
def test_equals_the_formula(dtype, cache, rows, new, heads):
    rng = np.random.default_rng(rows + new)
    table = 16
    keys, values, *scales = _pages(cache, dtype, heads, 1 + rows * table)
    tables = 1 + rng.permutation(rows * table).reshape(rows, table)
    lengths = rng.integers(1, table * 64 - new, (rows, 1)) + np.arange(new)
    lengths[-1, new // 2 + 1 :] = 0
    query = 3 * jax.random.normal(jax.random.key(1), (rows, new, heads, 128))
    operands = query.astype(dtype), keys, values, jnp.asarray(tables, jnp.int32)
    arguments = Arguments(*operands, jnp.asarray(lengths, jnp.int32), *scales)
    got = jax.jit(MosaicGPU())(arguments)
    assert_close(got, attended_over_pages(arguments), TOLERANCES[dtype])
    np.testing.assert_array_equal(got, jax.jit(MosaicGPU())(arguments))
