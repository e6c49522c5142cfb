"""The kernel for compute capability 8.0 to 8.9 without a GPU: its arithmetic and its divisions.

What it was compiled to, bits and all, is run in tests/aot/test_mma_kernel.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.kernels.quantized_matmul import mma_blocks
from glm_jax.kernels.quantized_matmul.arguments import Arguments, Problem
from glm_jax.kernels.quantized_matmul.mosaic import Mma
from glm_jax.kernels.quantized_matmul.mosaic_blocks import divide
from glm_jax.kernels.quantized_matmul.mosaic_layout import lay_out
from glm_jax.quantization import QuantizedArray, dequantize

DEVICES = [(8.0, 108), (8.6, 82), (8.9, 128)]  # compute capability, multiprocessors
DRAWN = np.random.default_rng(3).integers((2, 17, 65), (16, 64, 150)).tolist()
# Rows, inputs, outputs, groups, bits, zero points, dtype: odd numbers of groups, and one.
CASES = [
    (1, 384, 64, 3, 4, True, "float16"),
    (DRAWN[0], 320, 64, 5, 8, False, "float16"),
    (DRAWN[1], 128, 128, 1, 4, False, "bfloat16"),
    (DRAWN[2], 192, 64, 6, 8, True, "bfloat16"),
]


def _weight(inputs, outputs, groups, bits, zeros, dtype):
    rng = np.random.default_rng(bits)
    points = rng.integers(-8, 8, (groups, outputs)).astype(np.int8)
    values = rng.integers(-128, 128, (inputs * bits // 8, outputs)).astype(np.int8)
    return QuantizedArray(
        values=jnp.asarray(values),
        scales=jnp.asarray(rng.uniform(0.005, 0.015, (groups, outputs)), dtype),
        bits=bits,
        contraction_axis=-2,
        zero_points=jnp.asarray(points) if zeros else None,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_product_is_that_of_float64(case):
    """All of the kernel but what happens in registers, in the interpreter."""
    if jax.__version_info__ < (0, 12):
        pytest.skip("Mosaic GPU is simulated from JAX 0.12 on")
    from glm_jax.kernels.quantized_matmul import mma_gpu

    rows, inputs, outputs, groups, bits, zeros, dtype = case
    weight = _weight(*case[1:])
    x = jnp.asarray(np.random.default_rng(rows).normal(size=(rows, inputs)) + 0.5, dtype)
    problem = Problem(rows, inputs, outputs, bits, inputs // groups, zeros)
    blocks = mma_blocks.choose(problem, 8.0, 1)  # so that programs have parts of tiles
    product = mma_gpu.matmul(x, lay_out(weight), blocks, interpret=True)
    exact = np.asarray(x, np.float64) @ np.asarray(dequantize(weight, jnp.float32), np.float64)
    # Of many rows weights are rounded to the activations' type.
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3}[dtype] if blocks.scale_first else 2e-6
    np.testing.assert_allclose(product, exact, atol=tolerance * np.abs(exact).max())


@pytest.mark.parametrize("rows", [1, 9, 33, 64, 65, 2049])
@pytest.mark.parametrize("shape", [(12288, 4608), (1536, 12288), (192, 64), (960, 18816)])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_step_belongs_to_one_program(rows, shape, bits):
    inputs, outputs = shape
    problem = Problem(rows, inputs, outputs, bits, 32)
    for device in DEVICES:
        tried = list(mma_blocks.candidates(problem, *device))
        for blocks in tried:
            division = divide(problem, blocks)
            assert division.output_tiles * blocks.outputs == outputs
            assert division.steps * blocks.inputs == inputs
            assert division.row_tiles * blocks.rows >= rows
            assert (division.programs - 1) * division.share < division.total
        assert mma_blocks.choose(problem, *device) in tried


def test_later_kernels_and_other_weights_are_left_to_others(monkeypatch):
    weight = _weight(*CASES[0][1:])
    x = jnp.ones((1, 384), "float16")
    taken = Arguments(x, lay_out(weight))
    for capability, is_taken in ((7.5, False), (8.0, True), (8.9, True), (9.0, False)):
        monkeypatch.setattr("glm_jax.kernels.target.compute_capability", lambda c=capability: c)
        reason = Mma().supports(taken)
        is_old = jax.__version_info__ < (0, 11)
        assert (reason is None) == (is_taken and not is_old)
    monkeypatch.setattr("glm_jax.kernels.target.compute_capability", lambda: 8.0)
    assert Mma().supports(Arguments(x, weight)) == "it takes a weight in its own layout"
