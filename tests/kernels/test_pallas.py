"""The GPU and TPU kernels, run step by step on CPU, equal the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.kernels.quantized_matmul import pallas_gpu, pallas_tpu, reference, xla
from glm_jax.kernels.quantized_matmul.pallas_gpu import Blocks
from glm_jax.quantization import Scheme, quantize


def _case(rows, bits, group_size, zero_point, dtype, inputs=192, outputs=128):
    weight = jax.random.normal(jax.random.key(0), (inputs, outputs))
    weight = quantize(weight, Scheme(bits, group_size, zero_point), -2)
    x = jax.random.normal(jax.random.key(rows), (rows, inputs)).astype(dtype)
    exact = reference.matmul(x.astype(jnp.float32), weight)
    return x, weight, np.asarray(exact)


ROWS = pytest.mark.parametrize("rows", [1, 2, 5, 16, 33, 128])
BITS = pytest.mark.parametrize("bits", [8, 4])
# One group, three, and three with zero points.
GROUPS = pytest.mark.parametrize(
    ("group_size", "zero_point"), [(None, False), (64, False), (64, True)]
)


@ROWS
@BITS
@GROUPS
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gpu_kernel_equals_the_reference(rows, bits, group_size, zero_point, dtype):
    x, weight, exact = _case(rows, bits, group_size, zero_point, dtype)
    bias = jnp.arange(128.0)
    blocks = Blocks(16, 64, 32, 3, 4, 3) if rows <= 32 else Blocks(64, 64, 64, 1, 4, 3)
    got = pallas_gpu.matmul(x, weight, bias, blocks, interpret=True)
    np.testing.assert_allclose(got, exact + bias, atol=2e-3)


@ROWS
@BITS
@GROUPS
def test_tpu_kernel_equals_the_reference(rows, bits, group_size, zero_point):
    x, weight, exact = _case(rows, bits, group_size, zero_point, "bfloat16")
    assert pallas_tpu.takes(weight)
    np.testing.assert_allclose(pallas_tpu.matmul(x, weight, interpret=True), exact, atol=2e-3)


@BITS
@GROUPS
def test_tiles_of_xla_equal_the_reference(bits, group_size, zero_point):
    x, weight, exact = _case(5, bits, group_size, zero_point, "float32", inputs=1536)
    np.testing.assert_allclose(xla.matmul(x, weight), exact, atol=1e-3)
