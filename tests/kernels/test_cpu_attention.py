"""The C++ kernel of attention over a cache equals the formula, on every kind of machine."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.kernels.attention import cpu, reference
from glm_jax.kernels.attention.api import attention
from glm_jax.kernels.attention.dropout import WeightDropout
from glm_jax.model.cache import LayerCache, write
from glm_jax.model.visibility import Visibility

pytestmark = pytest.mark.skipif(
    not cpu.is_available(), reason="the CPU kernel is not built: no C++ compiler at installation"
)
WIDTHS = (512, 256, 0)  # bits of vectors; what the machine lacks falls back to the next


def _inputs(batch, queries, heads, keys, head_dim):
    draws = jax.random.split(jax.random.key(0), 3)
    query = 3 * jax.random.normal(draws[0], (batch, queries, heads, head_dim))
    key, value = (jax.random.normal(k, (batch, heads, keys, head_dim)) for k in draws[1:])
    rng = np.random.default_rng(0)
    starts = rng.integers(0, keys // 2, (batch, queries))
    ends = starts + rng.integers(1, keys // 2, (batch, queries))
    return query, key, value, jnp.asarray(np.stack([starts, ends], -1), jnp.int32)


@pytest.mark.parametrize("widest", WIDTHS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 16, 16), (2, 1, 3, 300, 48), (3, 8, 2, 77, 128), (2, 2, 16, 515, 80)]
)
def test_equals_the_formula(shape, widest):
    query, key, value, ranges = _inputs(*shape)
    mask = reference.ranges_to_mask(ranges, key.shape[2])
    expected = reference.masked_attention(query, key, value, mask, "float32")
    got = cpu.attention(query, key, value, ranges, None, None, widest)
    np.testing.assert_allclose(got, expected, atol=3e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("widest", WIDTHS)
def test_reads_a_cache_as_it_is_stored(dtype, widest):
    query, key, value, ranges = _inputs(2, 1, 3, 130, 32)
    zeros = jnp.zeros(key.shape, dtype)
    scales = jnp.zeros(key.shape[:3]) if dtype == "int8" else None
    cache = write(LayerCache(zeros, zeros, scales, scales), key, value, jnp.zeros(2, jnp.int32))
    wide = [cache.keys.astype(jnp.float32), cache.values.astype(jnp.float32)]
    if dtype == "int8":
        wide = [wide[0] * cache.key_scales[..., None], wide[1] * cache.value_scales[..., None]]
    mask = reference.ranges_to_mask(ranges, 130)
    expected = reference.masked_attention(query, *wide, mask, "float32")
    got = cpu.attention(
        query, cache.keys, cache.values, ranges, cache.key_scales, cache.value_scales, widest
    )
    np.testing.assert_allclose(got, expected, atol=3e-6)


def test_only_the_visible_keys_are_read_and_a_row_without_any_is_zero():
    query, key, value, ranges = _inputs(2, 2, 2, 200, 16)
    ranges = ranges.at[0, 1].set(jnp.array([7, 7]))
    seen = jnp.any(reference.ranges_to_mask(ranges, 200), axis=1)[:, None, :, None]
    got = cpu.attention(
        query, *(jnp.where(seen, x, jnp.nan) for x in (key, value)), ranges, None, None
    )
    np.testing.assert_array_equal(got, cpu.attention(query, key, value, ranges, None, None))
    assert (got[0, 1] == 0).all()
    assert (got[0, 0] != 0).all()


def test_extreme_scores_stay_finite_and_not_a_number_stays_so():
    query, key, value, ranges = _inputs(1, 1, 2, 64, 16)
    loud = cpu.attention(1e4 * query, key, value, ranges, None, None)
    mask = reference.ranges_to_mask(ranges, 64)
    expected = reference.masked_attention(1e4 * query, key, value, mask, "float32")
    np.testing.assert_allclose(loud, expected, atol=3e-6)
    spoilt = cpu.attention(query.at[0, 0, 1, 3].set(jnp.nan), key, value, ranges, None, None)
    assert np.isnan(spoilt[0, 0, 1]).all()
    assert np.isfinite(spoilt[0, 0, 0]).all()


def test_decoding_shapes_take_it_and_others_do_not():
    query, key, value, ranges = _inputs(2, 1, 2, 200, 16)
    kernels = lambda *a: set(
        re.findall(r"@(glm_jax_attention\w*)", jax.jit(attention).lower(*a).as_text())
    )
    assert kernels(query, key, value, ranges) == {"glm_jax_attention"}
    two = jnp.concatenate([ranges, ranges], axis=-1)
    assert kernels(query, key, value, two) == {"glm_jax_attention_forward"}
    many = jnp.repeat(query, 9, axis=1), key, value, jnp.repeat(ranges, 9, axis=1)
    assert kernels(*many) == {"glm_jax_attention_forward"}
    narrow = tuple(x.astype(jnp.bfloat16) for x in many[:3])
    assert kernels(*narrow, many[3]) == set()


def _visibilities(length):
    segments = jnp.array([[1] * 40 + [2] * (length - 50) + [0] * 10, [1] * length])
    contexts = jnp.array([[12] * 40 + [7] * (length - 50) + [0] * 10, [60] * length])
    choices = jnp.array([[0] * 30 + [1] * 20 + [2] * (length - 50)] * 2)
    return {
        "prefix": Visibility.prefix(jnp.array([3, 70]), length),
        "packed": Visibility.packed(segments, contexts),
        "choices": Visibility.choices(choices),
        "some see nothing": Visibility(
            Visibility.prefix(jnp.array([3, 70]), length).key_ranges.at[:, 5:9].set(0)
        ),
    }


@pytest.mark.parametrize("kind", list(_visibilities(100)))
@pytest.mark.parametrize(
    ("length", "head_dim", "rate"),
    [(100, 16, 0.0), (200, 80, 0.0), (128, 64, 0.0), (200, 16, 0.3)],
)
def test_blocks_and_their_gradients_equal_the_formula(kind, length, head_dim, rate):
    dropout = WeightDropout(jnp.uint32(2**31 + 5), rate) if rate else None
    ranges = _visibilities(length)[kind].key_ranges
    query, key, value, _ = _inputs(2, length, 3, length, head_dim)
    weights = jax.random.normal(jax.random.key(9), query.shape)
    mask = reference.ranges_to_mask(ranges, length)

    def blocks(widest, *inputs):
        out = cpu.blocks(*inputs, ranges, dropout, widest)
        return jnp.sum(out * weights), out

    def formula(*inputs):
        out = reference.masked_attention(*inputs, mask, "float32", dropout)
        return jnp.sum(out * weights), out

    grad = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))
    (_, expected), expected_gradients = grad(formula)(query, key, value)
    for widest in WIDTHS:
        (_, got), got_gradients = grad(functools.partial(blocks, widest))(query, key, value)
        np.testing.assert_allclose(got, expected, atol=5e-6)
        for a, b in zip(got_gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(a, b, atol=5e-5)
