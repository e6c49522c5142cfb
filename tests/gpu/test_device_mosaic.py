"""The Mosaic kernel equals float64, on a GPU of compute capability 9.0 at the 130B's shapes.

Elsewhere a laid-out weight is restored and multiplied by XLA; sizes are small there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.kernels.quantized_matmul.api import prepare, quantized_matmul
from glm_jax.quantization import QuantizedArray, dequantize

pytestmark = pytest.mark.gpu
IS_GPU = jax.default_backend() == "gpu"
DRAWN = np.random.default_rng(0).integers(48, 2050, 12).tolist()
ROWS = (*range(1, 34), *DRAWN, 64, 65, 128, 129, 2049) if IS_GPU else (1, 33)
# Inputs, outputs, groups: a whole linear's, parts of others, an odd number of groups.
SHAPES = (
    ((12288, 4608, 1), (1536, 12288, 12), (4992, 1536, 39), (960, 256, 15), (96 * 64, 192, 192))
    if IS_GPU
    else ((192, 64, 3),)
)
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("zeros", [False, True])
def test_products_of_all_rows(shape, bits, dtype, zeros):
    inputs, outputs, groups = shape
    draws = jax.random.split(jax.random.key(bits), 4)
    scales = jax.random.uniform(draws[1], (groups, outputs), minval=0.005, maxval=0.015)
    points = jax.random.randint(draws[2], (groups, outputs), -3, 4, jnp.int8)
    size = inputs * bits // 8, outputs
    weight = QuantizedArray(
        values=jax.random.bits(draws[0], size, jnp.uint8).astype(jnp.int8),
        scales=scales.astype(dtype),
        bits=bits,
        contraction_axis=-2,
        zero_points=points if zeros else None,
    )
    exact_weight = np.asarray(dequantize(weight, jnp.float32), np.float64)
    laid_out = prepare(weight, layout="mosaic")
    # Activations whose mean is not 0 are the hard case for what is taken off by their sums.
    x = jax.random.normal(draws[3], (max(ROWS), inputs)) + 0.5
    product = jax.jit(quantized_matmul)
    for rows in ROWS:
        some = (0.1 * x[:rows]).astype(dtype)
        exact = np.asarray(some, np.float64) @ exact_weight
        error = np.linalg.norm(np.asarray(product(some, laid_out), np.float64) - exact)
        assert error < TOLERANCE[dtype] * np.linalg.norm(exact), rows
