"""Attention over one and two ranges of keys, its gradient, and attention over pages, equal the
formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.formula import assert_close, attended, attended_over_pages, gradients, normal

from glm_jax.config import glm_config
from glm_jax.kernels import self_check, target
from glm_jax.kernels.attention.api import attention
from glm_jax.kernels.attention.arguments import Arguments
from glm_jax.kernels.attention.dropout import WeightDropout
from glm_jax.kernels.attention.library import Library
from glm_jax.kernels.attention.mosaic import Mosaic
from glm_jax.kernels.paged_attention.api import paged_attention
from glm_jax.kernels.paged_attention.arguments import Arguments as PagedArguments
from glm_jax.model.paged_cache import quantize_heads
from glm_jax.model.visibility import Visibility
from glm_jax.sharding import make_mesh
from glm_jax.training.recipe import Recipe
from glm_jax.training.step import with_attention_for

pytestmark = pytest.mark.gpu
IS_GPU = jax.default_backend() == "gpu"
LENGTH, HEAD_DIM = (1024, 128) if IS_GPU else (144, 16)
BATCH, HEADS = 2, 3
DTYPES = ("float32", "float16", "bfloat16") if IS_GPU else ("float32",)
# Of the largest number in the expected array.
TOLERANCES = {"float32": 3e-5, "float16": 5e-3, "bfloat16": 3e-2}


def _ranges(count):
    if count == 1:
        return Visibility.prefix(jnp.array([3, LENGTH // 2]), LENGTH).key_ranges
    chosen = jnp.arange(LENGTH) * 3 // LENGTH  # a context, and two choices after it
    return Visibility.choices(jnp.broadcast_to(chosen, (BATCH, LENGTH))).key_ranges


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2])
def test_values_and_gradients(dtype, count):
    draws = jax.random.split(jax.random.key(0), 4)
    rows, keys = (BATCH, LENGTH, HEADS, HEAD_DIM), (BATCH, HEADS, LENGTH, HEAD_DIM)
    query, key, value, cotangent = (
        jax.random.normal(draw, shape).astype(dtype)
        for draw, shape in zip(draws, (rows, keys, keys, rows), strict=True)
    )
    ranges = _ranges(count)

    @jax.jit
    def run(query, key, value):
        got, pullback = jax.vjp(lambda *inputs: attention(*inputs, ranges), query, key, value)
        return got, pullback(cotangent)

    arguments = Arguments(query, key, value, ranges)
    got, of_inputs = run(query, key, value)
    assert_close(got, attended(arguments), TOLERANCES[dtype])
    for of_input, expected in zip(of_inputs, gradients(arguments, cotangent), strict=True):
        assert_close(of_input, expected, TOLERANCES[dtype])


def test_the_librarys_kernel_is_the_one_that_runs():
    """Of the values above, those in few bits over one range."""
    query = jnp.zeros((1, 256, 2, 128), jnp.bfloat16)
    keys = jnp.swapaxes(query, 1, 2)
    reason = Library().supports(Arguments(query, keys, keys, jnp.zeros((1, 256, 2), jnp.int32)))
    if not IS_GPU:
        assert reason == "it takes compute capability 8.0 and later"
        return
    import tokamax  # noqa: F401  (left out, with the reason, where it is not installed)

    assert reason is None


@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_our_kernel_for_training(rate, dtype, head_dim):
    of_keys = (BATCH, HEADS, LENGTH, head_dim)
    query, key, value, cotangent = normal(
        0, (BATCH, LENGTH, HEADS, head_dim), of_keys, of_keys, (BATCH, LENGTH, HEADS, head_dim),
        dtype=dtype,
    )  # fmt: skip
    dropout = WeightDropout(jnp.uint32(7), rate) if rate else None
    arguments = Arguments(query, key, value, _ranges(1), dropout=dropout)
    if reason := Mosaic().supports(arguments):
        pytest.skip(reason)
    run = functools.partial(attention, dropout=dropout, implementation="mosaic")

    @jax.jit
    def both(*inputs):
        got, pullback = jax.vjp(lambda *inputs: run(*inputs, arguments.visible), *inputs)
        return got, pullback(cotangent)

    got, of_inputs = both(query, key, value)
    assert_close(got, attended(arguments), TOLERANCES[dtype])
    for of_input, expected in zip(of_inputs, gradients(arguments, cotangent), strict=True):
        assert_close(of_input, expected, TOLERANCES[dtype])


def test_our_kernel_passes_its_check_and_a_run_has_it(recwarn, monkeypatch):
    """As at the start of a run: by a process of its own, which compiles and compares."""
    in_time = functools.partial(self_check.check_apart, seconds=100)  # before the test is ended
    monkeypatch.setattr(self_check, "check_apart", in_time)
    monkeypatch.setattr(self_check, "_note_of_pass", lambda *_: None)  # though it passed before
    device = jax.devices()[0]
    if not target.has_wgmma(device):
        pytest.skip(f"for compute capability {target.WGMMA_CAPABILITY}")
    config = glm_config("tiny", hidden_size=256, num_heads=2, compute_dtype="bfloat16")
    mesh = make_mesh((1, 1, 1), [device])
    recipe = with_attention_for(config, Recipe(total_samples=8), mesh, 2, 256)
    assert not [str(warning.message) for warning in recwarn]
    assert recipe.attention == "mosaic"


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("dtype", [*(DTYPES[1:] or DTYPES), "int8"])
def test_pages(dtype, new):
    batch, pages, page_size, table_size = (4, 40, 64, 8) if IS_GPU else (2, 6, 16, 2)
    computed = "float32" if dtype == "float32" else "float16" if dtype == "int8" else dtype
    draws = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(draws[0], (batch, new, HEADS, HEAD_DIM)).astype(computed)
    shape = (HEADS, pages, page_size, HEAD_DIM)
    keys, values = (jax.random.normal(draw, shape) for draw in draws[1:])
    scales = ()
    if dtype == "int8":
        keys, values, *scales = quantize_heads(keys, values)
    else:
        keys, values = keys.astype(dtype), values.astype(dtype)
    rng = np.random.default_rng(0)
    tables = rng.integers(0, pages, (batch, table_size)).astype(np.int32)
    last = np.linspace(new, table_size * page_size, batch).astype(np.int32)[:, None]
    lengths = last - new + 1 + np.arange(new, dtype=np.int32)
    lengths[0, 1:] = 0  # a row with one query where others have more
    arguments = PagedArguments(query, keys, values, tables, lengths, *scales)
    got = jax.jit(paged_attention)(query, keys, values, tables, lengths, *scales)
    assert_close(got, attended_over_pages(arguments), TOLERANCES[computed])
