"""Quantised weights: the original's integers, and what dequantising loses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_golden

from glm_jax.kernels.quantized_matmul.api import quantized_matmul
from glm_jax.model import params as glm_params
from glm_jax.quantization import (
    QuantizationError,
    dequantize,
    pack_int4,
    quantize,
    unpack_int4,
)


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_and_scales_equal_the_originals(bits):
    _, params = load_golden("tp1", "float16")
    _, expected = load_golden(f"int{bits}_tp1", "float16")
    got = glm_params.quantize_params(params, bits)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("axis", [0, 1, -2])
def test_packing_round_trip(axis):
    values = np.random.default_rng(0).integers(-8, 8, (4, 6, 10)).astype(np.int8)
    packed = pack_int4(jnp.asarray(values), axis)
    assert packed.size == values.size // 2
    np.testing.assert_array_equal(unpack_int4(packed, axis), values)


def test_packing_puts_the_even_index_high():
    packed = pack_int4(jnp.array([1, -2], jnp.int8), 0)
    assert int(packed[0]) & 0xFF == 0x1E


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("groups", [1, 4])
def test_error_is_at_most_half_a_step(bits, groups):
    weight = jax.random.normal(jax.random.key(0), (16, 3, 5))
    array = quantize(weight, bits, -3, groups)
    assert array.shape == weight.shape
    assert array.groups == groups
    error = np.abs(dequantize(array, jnp.float32) - weight).reshape(groups, -1, 3, 5)
    assert (error <= 0.501 * np.asarray(array.scales)[:, None]).all()


def test_rows_of_zeros_stay_zero():
    array = quantize(jnp.zeros((4, 2)), 4, -2)
    np.testing.assert_array_equal(dequantize(array, jnp.float32), np.zeros((4, 2)))


@pytest.mark.parametrize("bits", [8, 4])
def test_product_equals_that_with_the_dequantised_weight(bits):
    x = jax.random.normal(jax.random.key(1), (2, 3, 16))
    weight = quantize(jax.random.normal(jax.random.key(0), (16, 2, 4)), bits, -3, 2)
    expected = np.einsum("bsk,kcn->bscn", x, dequantize(weight, jnp.float32))
    np.testing.assert_allclose(quantized_matmul(x, weight), expected, atol=1e-5)
    gradient = jax.grad(lambda x: quantized_matmul(x, weight).sum())(x)
    expected = np.broadcast_to(dequantize(weight, jnp.float32).sum((1, 2)), x.shape)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "axis", "groups", "message"),
    [
        (3, -2, 1, "8 or 4 bits"),
        (8, 0, 1, "must be negative"),
        (8, -2, 5, "do not divide into 5 groups"),
        (4, -2, 4, "pairs"),
    ],
)
def test_impossible_quantisation_is_refused(bits, axis, groups, message):
    with pytest.raises(QuantizationError, match=message):
        quantize(jnp.ones((12, 4)) if groups != 4 else jnp.ones((4, 4)), bits, axis, groups)
