"""The kernel for compute capability 8.0 to 8.9 equals float64, at the 130B's shapes.

It runs on later GPUs too, though there the op has others. Without a GPU its interpreter runs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.kernels import target
from glm_jax.kernels.quantized_matmul.arguments import Problem
from glm_jax.kernels.quantized_matmul.mma_blocks import choose
from glm_jax.kernels.quantized_matmul.mosaic_layout import lay_out
from glm_jax.quantization import QuantizedArray, dequantize

pytestmark = pytest.mark.gpu
IS_GPU = jax.default_backend() == "gpu"
DRAWN = np.random.default_rng(1).integers(48, 2050, 2).tolist()
ROWS = (*range(1, 34), *DRAWN, 64, 65, 2049) if IS_GPU else (3,)
# Inputs, outputs, groups: a whole linear's, parts of others, an odd number of groups.
SHAPES = ((12288, 4608, 1), (1536, 12288, 12), (4992, 1536, 39)) if IS_GPU else ((192, 64, 3),)
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3}
CASES = [(bits, dtype) for bits in (4, 8) for dtype in TOLERANCE][: 4 if IS_GPU else 1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "dtype"), CASES)
def test_products_of_all_rows(shape, bits, dtype):
    least = (0, 11) if IS_GPU else (0, 12)
    if jax.__version_info__ < least or (IS_GPU and target.compute_capability() < 8.0):
        pytest.skip("the kernel takes compute capability 8.0 and JAX 0.11, its interpreter 0.12")
    from glm_jax.kernels.quantized_matmul import mma_gpu

    inputs, outputs, groups = shape
    draws = jax.random.split(jax.random.key(bits), 4)
    size, has_zeros = (inputs * bits // 8, outputs), groups > 1
    points = jax.random.randint(draws[2], (groups, outputs), -3, 4, jnp.int8)
    weight = QuantizedArray(
        values=jax.random.bits(draws[0], size, jnp.uint8).astype(jnp.int8),
        scales=jax.random.uniform(draws[1], (groups, outputs), dtype, 0.005, 0.015),
        bits=bits,
        contraction_axis=-2,
        zero_points=points if has_zeros else None,
    )
    exact_weight = np.asarray(dequantize(weight, jnp.float32), np.float64)
    laid_out = lay_out(weight)
    # Activations whose mean is not 0 are the hard case for what is taken off by their sums.
    x = jax.random.normal(draws[3], (max(ROWS), inputs)) + 0.5
    device = (target.compute_capability(), jax.devices()[0].core_count) if IS_GPU else (8.0, 1)
    x = (0.1 * x).astype(dtype)
    exact = np.asarray(x, np.float64) @ exact_weight

    def multiply(x, weight):
        for rows in ROWS:
            problem = Problem(rows, inputs, outputs, bits, inputs // groups, has_zeros)
            yield mma_gpu.matmul(x[:rows], weight, choose(problem, *device), interpret=not IS_GPU)

    for product in jax.jit(lambda *operands: list(multiply(*operands)))(x, laid_out):
        error = np.linalg.norm(np.asarray(product, np.float64) - exact[: len(product)])
        assert error < TOLERANCE[dtype] * np.linalg.norm(exact[: len(product)]), len(product)
