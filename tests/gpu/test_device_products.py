"""Products with quantised weights equal those in float64, on a GPU at the 130B's shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.kernels.quantized_matmul.api import quantized_matmul
from glm_jax.quantization import QuantizedArray, dequantize

pytestmark = pytest.mark.gpu
IS_GPU = jax.default_backend() == "gpu"
INPUTS, OUTPUTS, COMPARED = (12288, 4608, 256) if IS_GPU else (256, 128, 128)
ROWS = (1, 2, 8, 16, 17, 64, 128, 512, 2048) if IS_GPU else (1, 40)
GROUPED = (("bfloat16", 1), ("float16", 130), ("float32", 8)) if IS_GPU else (("bfloat16", 2),)


def _weight(bits, group_size=None):
    groups = 1 if group_size is None else INPUTS // group_size
    draws = jax.random.split(jax.random.key(bits), 3)
    shape = INPUTS * bits // 8, OUTPUTS
    scales = jax.random.uniform(draws[1], (groups, OUTPUTS), minval=0.005, maxval=0.015)
    zero_points = None
    if group_size is not None:
        zero_points = jax.random.randint(draws[2], (groups, OUTPUTS), -3, 4, jnp.int8)
    return QuantizedArray(
        values=jax.random.bits(draws[0], shape, jnp.uint8).astype(jnp.int8),
        scales=scales.astype(jnp.float16),
        bits=bits,
        contraction_axis=-2,
        zero_points=zero_points,
    )


def _assert_right(weight, rows, dtype, tolerance):
    x = (0.1 * jax.random.normal(jax.random.key(rows), (rows, INPUTS))).astype(dtype)
    got = np.asarray(jax.jit(quantized_matmul)(x, weight)[:, :COMPARED], np.float64)
    part = dequantize(jax.tree.map(lambda a: a[:, :COMPARED], weight), jnp.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(part, np.float64)
    assert np.linalg.norm(got - exact) < tolerance * np.linalg.norm(exact)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", ROWS)
def test_whole_rows_in_float16(bits, rows):
    _assert_right(_weight(bits), rows, "float16", 1e-3)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("dtype", "rows"), GROUPED)
def test_groups_with_zero_points(bits, dtype, rows):
    tolerance = {"bfloat16": 8e-3, "float16": 1e-3, "float32": 1e-4}[dtype]
    _assert_right(_weight(bits, 128), rows, dtype, tolerance)
