"""Programs of several products, which the benchmarks time, compiled for an H100: XLA computes each
product alone, as a model's are."""

import re

import jax
import jax.numpy as jnp
import pytest
from aot.compiling import compile_for
from aot.written import written

from glm_jax.kernels.quantized_matmul.api import quantized_matmul, transposed_matmul
from glm_jax.kernels.quantized_matmul.mosaic_layout import LANES, TILE, MosaicArray
from launch.suites.tuned_products import all_of

INPUTS, OUTPUTS = 1536, 1024  # so small that XLA would join them
_array = jax.ShapeDtypeStruct


def _compiled(product, rows, columns, weight, activations=3):
    x = _array((rows, columns), "float16")
    return compile_for("h100", all_of(product), [x] * activations, [weight] * 3).as_text()


def _products(text):
    """By the library or by a kernel of XLA's."""
    return len(re.findall(r" dot\(|__cublas\$gemm|__cublas\$lt\$matmul\"", text))


@pytest.fixture(scope="module")
def weight():
    values = _array((OUTPUTS // TILE, INPUTS // TILE, 4, LANES), "int32")
    return MosaicArray(values=values, scales=_array((1, OUTPUTS), "float16"), bits=4)


def test_products_in_floats_are_not_joined():
    """Neither those of an activation nor those of a weight."""
    weight = _array((INPUTS, OUTPUTS), "float16")
    assert _products(_compiled(jnp.matmul, 8, INPUTS, weight)) == 9


def test_sums_of_activations_are_of_each_product(weight):
    text = _compiled(quantized_matmul, 8, INPUTS, weight)
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 9
    sums = [each for each in written(text, 4) if each.shape == (8, INPUTS // TILE)]
    assert len(sums) == 9


def test_products_with_converted_tiles_are_not_joined(weight):
    text = _compiled(transposed_matmul, 2048, OUTPUTS, weight, activations=1)
    assert _products(text) == 3
