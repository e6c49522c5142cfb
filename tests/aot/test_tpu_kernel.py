"""GLM-130B's products compile for TPUs, by the Pallas kernel."""

import jax
import jax.numpy as jnp
import pytest
from aot.compiling import abstract_weight, compile_for

from glm_jax.kernels.quantized_matmul.api import quantized_matmul

PARALLEL = 8
SHAPES = [
    (12288, 36864 // PARALLEL),
    (12288 // PARALLEL, 12288),
    (12288, 65536 // PARALLEL),
    (32768 // PARALLEL, 12288),
]


@pytest.mark.parametrize("tpu", ["tpu_v5e", "tpu_v5p", "tpu_v6e"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 128])
@pytest.mark.parametrize("rows", [1, 128])
def test_the_product_compiles(tpu, shape, bits, group_size, rows):
    weight = abstract_weight(*shape, group_size or shape[0], bits, "bfloat16")
    x = jax.ShapeDtypeStruct((rows, shape[0]), jnp.bfloat16)
    compiled = compile_for(tpu, quantized_matmul, x, weight)
    assert f"quantized_matmul_int{bits}" in compiled.as_text()
    # x in planes and the result, but no weight in another form.
    assert compiled.memory_analysis().temp_size_in_bytes < shape[0] * shape[1] / 4
