"""GLM-130B's products compile for NVIDIA GPUs, to matrix instructions and without spills."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from aot import compiling
from aot.compiling import abstract_weight, assembly, compile_for

from glm_jax.config import glm_config
from glm_jax.kernels.quantized_matmul import reference
from glm_jax.kernels.quantized_matmul.api import quantized_matmul
from glm_jax.kernels.quantized_matmul.triton_blocks import Problem

GPUS = {"a100_80gb": 8.0, "rtx_3090": 8.6, "h100": 9.0}
CONFIG = glm_config("130b")
HIDDEN, INNER = CONFIG.hidden_size, CONFIG.inner_hidden_size
SHAPES = [
    shape
    for parallel in (1, 4, 8)
    for shape in (
        (HIDDEN, 3 * HIDDEN // parallel),
        (HIDDEN // parallel, HIDDEN),
        (HIDDEN, 2 * INNER // parallel),
        (INNER // parallel, HIDDEN),
    )
]
# One row and 16 share blocks, and what is between 32 and 512 differs little.
PROBLEMS = [
    Problem(rows, *shape, bits, group or shape[0])
    for shape, bits, group, rows in itertools.product(SHAPES, (8, 4), (None, 128), (1, 32, 128))
]


def _name(problem):
    return "-".join(map(str, vars(problem).values()))


def _operands(problem, dtype):
    return (
        jax.ShapeDtypeStruct((problem.rows, problem.inputs), dtype),
        abstract_weight(problem.inputs, problem.outputs, problem.group_size, problem.bits, dtype),
        jax.ShapeDtypeStruct((problem.outputs,), dtype),
    )


# Blocks follow from shapes; a second GPU with less shared memory tries the largest.
CASES = [("rtx_3090", p) for p in PROBLEMS if p.inputs * p.outputs >= HIDDEN * 2 * INNER]
CASES += [(gpu, problem) for gpu in ("a100_80gb", "h100") for problem in PROBLEMS]


def _marked(gpu, problem):
    """Of weights as they are stored, which GPUs from 8.0 to 9.0 multiply only where others cannot
    be laid out; whole linears stand for their parts in each run."""
    is_first = (problem.inputs, problem.outputs) in SHAPES[:4] and problem.group_size == 128
    marks = () if is_first and problem.rows != 32 else pytest.mark.slow
    return pytest.param(gpu, problem, id=f"{gpu}-{_name(problem)}", marks=marks)


@pytest.mark.parametrize(("gpu", "problem"), [_marked(*case) for case in CASES])
def test_the_product_compiles(gpu, problem):
    dtype = "bfloat16" if gpu == "h100" else "float16"
    compile_for(gpu, quantized_matmul, *_operands(problem, dtype))
    made = assembly(f"quantized_matmul_int{problem.bits}", GPUS[gpu])
    assert made.matrix_instructions > 0
    assert made.asynchronous_copies > 0
    assert made.spilled_bytes == 0


def test_a_gpu_that_only_its_hardware_file_names_gets_the_kernel(monkeypatch):
    described = compiling.hardware("rtx_3090")
    described.device_kind, described.compute_capability = "NVIDIA Next", 8.9
    monkeypatch.setattr(compiling, "hardware", lambda name: described)
    problem = PROBLEMS[0]
    compile_for("next", quantized_matmul, *_operands(problem, "float16"))
    assert assembly(f"quantized_matmul_int{problem.bits}", 8.9).matrix_instructions > 0


@pytest.mark.parametrize("gpu", ["rtx_2080_ti", "v100"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [12288, 128])
def test_before_triton_no_dequantised_matrix_is_held(gpu, bits, group_size):
    """From compute capability 7.0 to 7.5 the product goes tile by tile."""
    inputs, outputs = 12288, 36864
    x = jax.ShapeDtypeStruct((1, inputs), jnp.float16)
    weight = abstract_weight(inputs, outputs, group_size, bits)
    whole = 2 * inputs * outputs
    tiled = compile_for(gpu, quantized_matmul, x, weight).memory_analysis()
    assert tiled.temp_size_in_bytes < whole / 8
    dequantised = compile_for(gpu, reference.matmul, x, weight).memory_analysis()
    assert dequantised.temp_size_in_bytes >= whole


@pytest.mark.parametrize("gpu", ["rtx_2080_ti", "a100_40gb"])
def test_the_gradient_holds_no_dequantised_matrix(gpu):
    inputs, outputs = 12288, 36864
    x = jax.ShapeDtypeStruct((512, inputs), jnp.float16)
    weight = abstract_weight(inputs, outputs, 128, 4)

    def gradient(x, weight):
        return jax.grad(lambda x: jnp.sum(quantized_matmul(x, weight) ** 2))(x)

    memory = compile_for(gpu, gradient, x, weight).memory_analysis()
    products = 4 * 512 * outputs
    assert memory.temp_size_in_bytes < 4 * products + 2 * inputs * outputs / 8
