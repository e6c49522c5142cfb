"""Attention block by block equals the formula, in values and in gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.kernels.attention import blockwise, reference
from glm_jax.kernels.attention.api import attention, isolated_attention
from glm_jax.kernels.attention.dropout import WeightDropout, factors
from glm_jax.model.visibility import Visibility

BATCH, HEADS, HEAD_DIM = 2, 3, 16


def _inputs(queries, keys, dtype="float32"):
    keys_of = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys_of[0], (BATCH, queries, HEADS, HEAD_DIM)).astype(dtype)
    key, value = (
        jax.random.normal(k, (BATCH, HEADS, keys, HEAD_DIM)).astype(dtype) for k in keys_of[1:]
    )
    return query, key, value


def _visibilities(length):
    segments = jnp.array([[1] * 40 + [2] * (length - 50) + [0] * 10, [1] * length])
    contexts = jnp.array([[12] * 40 + [7] * (length - 50) + [0] * 10, [60] * length])
    choices = jnp.array([[0] * 30 + [1] * 20 + [2] * (length - 50)] * BATCH)
    return {
        "prefix": Visibility.prefix(jnp.array([3, 70]), length),
        "packed": Visibility.packed(segments, contexts),
        "choices": Visibility.choices(choices),
    }


@pytest.mark.parametrize("kind", ["prefix", "packed", "choices"])
@pytest.mark.parametrize(
    ("query_block", "key_block", "rate"),
    [(32, 32, 0.0), (16, 48, 0.0), (128, 128, 0.0), (16, 48, 0.2)],
)
def test_values_and_gradients_equal_the_formula(kind, query_block, key_block, rate):
    length = 100
    dropout = WeightDropout(jnp.uint32(7), rate) if rate else None
    ranges = _visibilities(length)[kind].key_ranges
    inputs = _inputs(length, length)
    weights = jax.random.normal(jax.random.key(9), inputs[0].shape)
    mask = reference.ranges_to_mask(ranges, length)

    def blocks(*inputs):
        out = blockwise.attention(*inputs, ranges, None, None, dropout, query_block, key_block)
        return jnp.sum(out * weights), out

    def formula(*inputs):
        out = reference.masked_attention(*inputs, mask, "float32", dropout)
        return jnp.sum(out * weights), out

    grad = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))
    (_, got), got_gradients = grad(blocks)(*inputs)
    (_, expected), expected_gradients = grad(formula)(*inputs)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    for a, b in zip(got_gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("length", [64, 300])  # the formula, and blocks
def test_numbers_that_are_none_reach_those_alone_that_see_them(length):
    query, key, value = _inputs(length, length)
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


def test_rows_that_see_nothing_are_zero():
    query, key, value = _inputs(4, 64)
    ranges = jnp.zeros((BATCH, 4, 2), jnp.int32).at[:, 1:, 1].set(5)
    out = blockwise.attention(query, key, value, ranges, None, None, None, 4, 32)
    assert (out[:, 0] == 0).all()
    assert (out[:, 1:] != 0).all()


def test_what_no_row_sees_is_not_read():
    """Not a number in all that lies beyond the filled blocks leaves the answer as it is."""
    query, key, value = _inputs(1, 256)
    ranges = jnp.broadcast_to(jnp.array([0, 50], jnp.int32), (BATCH, 1, 2))
    expected = blockwise.attention(query, key, value, ranges, None, None, None, 1, 64)
    poisoned = blockwise.attention(
        query, key.at[:, :, 64:].set(jnp.nan), value.at[:, :, 64:].set(jnp.nan),
        ranges, None, None, None, 1, 64,
    )  # fmt: skip
    np.testing.assert_array_equal(poisoned, expected)


def test_no_array_is_larger_than_a_block():
    length = 4096
    shape = jax.ShapeDtypeStruct((1, length, 2, HEAD_DIM), jnp.float32)
    keys = jax.ShapeDtypeStruct((1, 2, length, HEAD_DIM), jnp.float32)
    ranges = jax.ShapeDtypeStruct((1, length, 2), jnp.int32)

    def loss(query, key, value, ranges):
        return jnp.sum(blockwise.attention(query, key, value, ranges, None, None, None, 256, 256))

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
