"""The kernel for pages on compute capability 9.0 without a GPU: its arithmetic, and its bits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.formula import assert_close, attended_over_pages

from glm_jax.kernels.dispatch import BackendError
from glm_jax.kernels.paged_attention.api import paged_attention
from glm_jax.kernels.paged_attention.arguments import Arguments
from glm_jax.kernels.target import OLDEST_MOSAIC_JAX
from glm_jax.model.paged_cache import quantize_heads

if jax.__version_info__ < OLDEST_MOSAIC_JAX:
    pytest.skip("Mosaic GPU of this JAX has no such kernels", allow_module_level=True)

from glm_jax.kernels.paged_attention import mosaic_gpu


def _arguments(lengths, cache, dtype="float16", heads=2, pages=4):
    draws = jax.random.split(jax.random.key(0), 3)
    batch, new = np.shape(lengths)
    query = 3 * jax.random.normal(draws[0], (batch, new, heads, 128))
    keys, values = (jax.random.normal(k, (heads, 9, 64, 128)) for k in draws[1:])
    scales = (None, None)
    if cache == "int8":
        keys, values, *scales = quantize_heads(keys, values)
    else:
        keys, values = keys.astype(dtype), values.astype(dtype)
    tables = np.random.default_rng(0).permutation(9)[: batch * pages].reshape(batch, pages)
    operands = query.astype(dtype), keys, values, jnp.asarray(tables, jnp.int32)
    return Arguments(*operands, jnp.asarray(lengths, jnp.int32), *scales)


@pytest.mark.parametrize("cache", ["float", "int8"])
def test_equals_the_formula(cache):
    """Ends within a page, at one and before a part's; several queries, some without keys."""
    arguments = _arguments([[70, 71, 72], [256, 0, 0]], cache)
    got = mosaic_gpu.attention(arguments, interpret=True, parts=2)
    assert_close(got, attended_over_pages(arguments), 2e-3)
    assert (got[1, 1:] == 0).all()
    assert got.dtype == jnp.float16


def _run(ptx, word):
    """Runs instructions on words, uint32; the first two results."""
    registers = {"$2": word}
    read = lambda name: registers[name] if name in registers else np.uint32(int(name, 0))
    halves = lambda name: np.broadcast_to(read(name), word.shape).copy().view(np.float16)
    for line in re.search(r"word; (.*) }", ptx)[1].rstrip(";").split(";"):
        opcode, target, *sources = re.split(r"[ ,]+", line.strip())
        if opcode == "mov.b32":
            registers[target] = read(sources[0])
        elif opcode == "xor.b32":
            registers[target] = read(sources[0]) ^ read(sources[1])
        elif opcode == "prmt.b32":
            octets = np.stack([read(sources[0]), np.full_like(word, read(sources[1]))], -1)
            octets = octets.view(np.uint8)
            chosen = [octets[:, int(sources[2], 0) >> 4 * i & 7] for i in range(4)]
            registers[target] = np.ascontiguousarray(np.stack(chosen, -1)).view(np.uint32)[:, 0]
        else:
            assert opcode == "sub.rn.f16x2"
            registers[target] = (halves(sources[0]) - halves(sources[1])).view(np.uint32)
    return registers["$0"], registers["$1"]


def test_each_byte_becomes_its_float():
    integers = np.stack(
        [np.arange(-128, 128), *np.random.default_rng(0).integers(-128, 128, (3, 256))]
    )
    words = np.ascontiguousarray(integers.T.astype(np.int8)).view(np.uint32)[:, 0]
    pairs = np.stack(_run(mosaic_gpu._BYTES, words), -1).view(np.float16)
    np.testing.assert_array_equal(pairs, integers.T)


def test_no_other_device_takes_it():
    a = _arguments([[70]], "float")
    with pytest.raises(BackendError, match="it runs on cuda"):
        paged_attention(a.query, a.keys, a.values, a.tables, a.lengths, implementation="mosaic")
