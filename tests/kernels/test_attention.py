"""Every backend of attention equals the formula in float64, in values and in gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.backends import NO_CPU_KERNEL, pairs, why_not_here
from kernels.formula import assert_close, attended, gradients, normal

from glm_jax.kernels.attention import cpu
from glm_jax.kernels.attention.api import attention, isolated_attention
from glm_jax.kernels.attention.arguments import Arguments
from glm_jax.kernels.attention.blockwise import Blockwise
from glm_jax.kernels.attention.cpu import CPUBlocks
from glm_jax.kernels.attention.dropout import WeightDropout, factors
from glm_jax.kernels.attention.library import Library
from glm_jax.kernels.attention.library_tpu import LibraryTPU
from glm_jax.kernels.attention.mosaic import Mosaic
from glm_jax.kernels.attention.reference import Reference
from glm_jax.kernels.dispatch import BackendError
from glm_jax.model.visibility import Visibility

BATCH, HEADS = 2, 3
WIDTHS = (512, 256, 0)  # bits of vectors; what the machine lacks falls back to the next
BACKENDS = {
    "reference": Reference(),
    "blockwise": Blockwise(),
    "blockwise 16x48": Blockwise(16, 48),
    "library": Library(),
    **{f"cpu {bits}": CPUBlocks(bits) for bits in WIDTHS},
}


def _ranges(kind, length):
    if kind == "packed":
        segments = jnp.array([[1] * 40 + [2] * (length - 50) + [0] * 10, [1] * length])
        contexts = jnp.array([[12] * 40 + [7] * (length - 50) + [0] * 10, [60] * length])
        return Visibility.packed(segments, contexts).key_ranges
    if kind == "choices":
        chosen = jnp.array([[0] * 30 + [1] * 20 + [2] * (length - 50)] * BATCH)
        return Visibility.choices(chosen).key_ranges
    ranges = Visibility.prefix(jnp.array([3, 70]), length).key_ranges
    return ranges.at[:, 5:9].set(0) if kind == "some see nothing" else ranges


@functools.cache
def _training(kind, length, head_dim, rate, dtype="float32"):
    of_query, of_keys = (BATCH, length, HEADS, head_dim), (BATCH, HEADS, length, head_dim)
    dropout = WeightDropout(jnp.uint32(2**31 + 5), rate) if rate else None
    query, key, value = normal(0, of_query, of_keys, of_keys, dtype=dtype)
    return Arguments(2 * query, key, value, _ranges(kind, length), dropout=dropout)


TRAINING = {
    f"{kind} {length} {head_dim} {rate}": functools.partial(_training, kind, length, head_dim, rate)
    for kind in ("prefix", "packed", "choices", "some see nothing")
    for length, head_dim, rate in [(100, 16, 0.0), (200, 80, 0.3)]
}


_run = jax.jit(lambda backend, arguments: backend(arguments), static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradients(backend, arguments, cotangent):
    def run(*inputs):
        return backend(arguments.replace(query=inputs[0], key=inputs[1], value=inputs[2]))

    got, pullback = jax.vjp(run, arguments.query, arguments.key, arguments.value)
    return got, pullback(cotangent)


@pairs(BACKENDS, TRAINING)
def test_values_and_gradients(backend, case):
    arguments = case()
    [cotangent] = normal(1, arguments.query.shape)
    got, got_gradients = _value_and_gradients(backend, arguments, cotangent)
    assert_close(got, attended(arguments), 2e-6)
    for a, b in zip(got_gradients, gradients(arguments, cotangent), strict=True):
        assert_close(a, b, 5e-6)


BFLOAT16 = {"bfloat16": functools.partial(_training, "packed", 200, 16, 0.3, "bfloat16")}


@pairs(BACKENDS, BFLOAT16)
def test_several_rows_in_bfloat16(backend, case):
    """XLA on CPU has no bfloat16 product for some orders of axes, of more than one row."""
    arguments = case()
    assert_close(_run(backend, arguments), attended(arguments), 1e-2)


MOSAIC = {"mosaic": Mosaic(interpret=True), "mosaic 64": Mosaic(key_block=64, interpret=True)}


@pytest.mark.parametrize("name", MOSAIC)
def test_the_gpu_kernel_for_training(name):
    """Simulated: packed documents whose queries in part see nothing, with dropout; 64 numbers a
    head are all that it takes below 128."""
    backend = MOSAIC[name]
    if reason := why_not_here(backend):
        pytest.skip(reason)
    kind, length, rate = (
        ("packed", 200, 0.3) if name == "mosaic" else ("some see nothing", 100, 0.0)
    )
    a = _training(kind, length, 64, rate, "float16")
    arguments = a.replace(  # of one row and head: simulating takes seconds
        query=a.query[:1, :, :1], key=a.key[:1, :1], value=a.value[:1, :1], visible=a.visible[:1]
    )
    assert backend.supports(arguments) is None
    [cotangent] = normal(1, arguments.query.shape, dtype="float16")
    got, got_gradients = _value_and_gradients(backend, arguments, cotangent)
    assert_close(got, attended(arguments), 1e-3)
    for a, b in zip(got_gradients, gradients(arguments, cotangent), strict=True):
        assert_close(a, b, 2e-3)


def test_the_librarys_kernel_for_tpus():
    """Simulated: packed documents whose queries in part see nothing; and three blocks, of which
    some are skipped."""
    backend = LibraryTPU(interpret=True)
    a = _training("packed", 300, 64, 0.0)
    arguments = a.replace(query=a.query[:1, :, :1], key=a.key[:1, :1], value=a.value[:1, :1])
    arguments = arguments.replace(visible=a.visible[:1].at[:, 5:9].set(0))
    assert backend.supports(arguments) is None
    [cotangent] = normal(1, arguments.query.shape)
    got, got_gradients = _value_and_gradients(backend, arguments, cotangent)
    assert_close(got, attended(arguments), 1e-5)
    assert (got[:, 5:9] == 0).all()
    for a, b in zip(got_gradients, gradients(arguments, cotangent), strict=True):
        assert_close(a, b, 1e-5)
    reason = backend.supports(arguments.replace(dropout=WeightDropout(jnp.uint32(0), 0.1)))
    assert reason == "it takes no dropout"


@pytest.mark.parametrize("axis", [0, 1])
def test_keys_that_share_a_hash_lie_in_one_thread(axis):
    """What no simulation has: the registers that the kernel puts in the place of others."""
    tiles = pytest.importorskip("glm_jax.kernels.attention.mosaic_tiles")
    layout = tiles.plgpu.Layout.WGMMA.to_mgpu()
    keys = np.indices((64, 128))[1 - axis]
    for level in layout.tiling.tiles:  # each is of the last axes of what the one before gave
        outer, last = keys.shape[: keys.ndim - len(level)], keys.shape[keys.ndim - len(level) :]
        split = [n for size, tile in zip(last, level, strict=True) for n in (size // tile, tile)]
        count = len(outer)
        order = [count + 2 * i + j for j in (0, 1) for i in range(len(level))]
        keys = keys.reshape(*outer, *split).transpose(*range(count), *order)
    of_threads = [keys.ndim + dim for dim in (*layout.warp_dims, *layout.lane_dims)]
    assert [keys.shape[dim] for dim in of_threads] == [4, 8, 4]
    by_thread = np.moveaxis(keys, of_threads, [0, 1, 2]).reshape(128, -1, 2)
    for registers in by_thread[..., 0]:  # of two neighbouring columns each
        got = tiles.first_registers(registers, axis)
        np.testing.assert_array_equal(got, registers & ~8)


@functools.cache
def _few_queries():
    batch, queries, heads, keys, head_dim = 2, 2, 2, 300, 16
    of_keys = (batch, heads, keys, head_dim)
    query, key, value = normal(0, (batch, queries, heads, head_dim), of_keys, of_keys)
    rng = np.random.default_rng(0)
    starts = rng.integers(0, keys // 2, (batch, queries))
    ranges = np.stack([starts, starts + rng.integers(1, keys // 2, (batch, queries))], -1)
    return Arguments(3 * query, key, value, jnp.asarray(ranges, jnp.int32))


FEW = {"few": _few_queries}


@pairs(BACKENDS, FEW)
def test_rows_that_see_nothing_are_zero(backend, case):
    arguments = case()
    ranges = arguments.visible.at[0, 1].set(jnp.array([7, 7]))
    got = _run(backend, arguments.replace(visible=ranges))
    assert (got[0, 1] == 0).all()
    assert (got[0, 0] != 0).all()


@pairs(BACKENDS, FEW)
def test_extreme_scores_stay_finite_and_nan_stays_in_its_head(backend, case):
    arguments = case()
    loud = arguments.replace(query=1e4 * arguments.query)
    assert_close(_run(backend, loud), attended(loud), 3e-6)
    spoilt = arguments.replace(query=arguments.query.at[0, 0, 1, 3].set(jnp.nan))
    got = _run(backend, spoilt)
    assert np.isnan(got[0, 0, 1]).all()
    assert np.isfinite(got[0, 0, 0]).all()


@pairs(BACKENDS, FEW)
def test_what_no_row_sees_is_not_read(backend, case):
    """NaN in the blocks without any key that a query sees."""
    arguments = case()
    if backend == Reference():  # reads everything, as the formula stands
        return
    arguments = arguments.replace(visible=jnp.full_like(arguments.visible, 7).at[..., 1].set(40))
    seen = jnp.arange(300)[None] < 256  # of the largest block
    hide = lambda x: jnp.where(seen[:, None, :, None], x, jnp.nan)
    hidden = arguments.replace(key=hide(arguments.key), value=hide(arguments.value))
    np.testing.assert_array_equal(_run(backend, hidden), _run(backend, arguments))


@pytest.mark.skipif(not cpu.is_available(), reason=NO_CPU_KERNEL)
def test_which_kernel_is_chosen():
    a = _few_queries()

    def kernels(ranges, dtype="float32", **more):
        operands = [x.astype(dtype) for x in (a.query, a.key, a.value)]
        run = functools.partial(attention, **more)
        text = jax.jit(run).lower(*operands, ranges).as_text()
        return set(re.findall(r"@(glm_jax_attention\w*)", text))

    assert kernels(a.visible) == {"glm_jax_attention_forward"}
    two = jnp.concatenate([a.visible, a.visible], axis=-1)
    assert kernels(two) == {"glm_jax_attention_forward"}
    assert kernels(a.visible, dtype="bfloat16") == set()
    assert kernels(a.visible, implementation="blockwise") == set()
    with pytest.raises(BackendError, match="'cpu' cannot be used here: it takes float32"):
        kernels(a.visible, dtype="bfloat16", implementation="cpu")
    with pytest.raises(BackendError, match=r"'library' .* it runs on cuda, and this is cpu"):
        kernels(a.visible, implementation="library")


@pytest.mark.parametrize("length", [64, 300])  # the formula, and blocks
def test_nan_and_infinity_reach_only_the_queries_that_see_them(length):
    query, key, value = (
        x.astype("float32")
        for x in normal(0, (BATCH, length, HEADS, 16), *[(BATCH, HEADS, length, 16)] * 2)
    )
    end = length // 3
    of_rows = jnp.arange(length)[:, None] < end
    ranges = jnp.where(of_rows, jnp.array([0, end]), jnp.array([end, length]))
    ranges = jnp.tile(ranges.astype(jnp.int32), (BATCH, 1, 1))
    sound = attention(query, key, value, ranges)
    np.testing.assert_array_equal(isolated_attention(query, key, value, ranges), sound)
    bad = [x.at[0, 1, 5].set(number) for x, number in ((key, jnp.nan), (value, jnp.inf))]
    got = isolated_attention(query, *bad, ranges)
    is_same = np.asarray(got == sound).all(axis=-1)
    is_nan = np.isnan(np.asarray(got, np.float32)).all(axis=-1)
    assert is_nan[0, :end, 1].all()
    np.testing.assert_array_equal(is_same, ~is_nan)
    assert is_nan.sum() == end


def test_no_array_is_larger_than_a_block():
    length = 4096
    shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    keys = jax.ShapeDtypeStruct((1, 2, length, 16), jnp.float32)
    ranges = jax.ShapeDtypeStruct((1, length, 2), jnp.int32)

    def loss(query, key, value, ranges):
        return jnp.sum(Blockwise()(Arguments(query, key, value, ranges)))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, keys, keys, ranges).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * length * length / 2


def test_dropped_weights_are_as_many_as_asked_and_independent():
    size = 256
    numbers = jnp.arange(size)

    def is_kept(seed, first=0):
        dropout = WeightDropout(jnp.uint32(seed), 0.25)
        return np.asarray(factors(dropout, 2, 4, numbers + first, numbers) > 0, float)

    kept = is_kept(1)
    deviation = (0.25 * 0.75 / kept.size) ** 0.5
    assert abs(kept.mean() - 0.75) < 4 * deviation
    for axis in range(4):  # of a head, row or column, none is dropped more than chance has it
        others = tuple(a for a in range(4) if a != axis)
        means = kept.mean(others)
        assert np.abs(means - 0.75).max() < 5 * deviation * len(means) ** 0.5
    centred = kept - 0.75
    others = [np.roll(centred, 1, axis) for axis in range(4)]
    others += [is_kept(2) - 0.75, is_kept(1, first=1) - 0.75]
    for other in others:
        correlation = (centred * other).mean() / (0.25 * 0.75)
        assert abs(correlation) < 5 / kept.size**0.5
    np.testing.assert_array_equal(is_kept(1, first=9)[:, :, :-9], kept[:, :, 9:])
