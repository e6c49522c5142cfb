"""GLM-130B's products compile for NVIDIA GPUs, to matrix instructions and without spills."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from aot.compiling import assembly, compile_for, hardware

from glm_jax.kernels.quantized_matmul import tuning, xla
from glm_jax.kernels.quantized_matmul.api import quantized_matmul
from glm_jax.quantization import QuantizedArray
from launch.tune import problems

GPUS = {"a100_80gb": "8.0", "rtx_3090": "8.6", "h100": "9.0"}


def abstract_weight(inputs, outputs, group_size, bits, dtype="float16"):
    return QuantizedArray(
        values=jax.ShapeDtypeStruct((inputs * bits // 8, outputs), jnp.int8),
        scales=jax.ShapeDtypeStruct((inputs // group_size, outputs), dtype),
        bits=bits,
        contraction_axis=-2,
    )


def _operands(problem, dtype):
    return (
        jax.ShapeDtypeStruct((problem.rows, problem.inputs), dtype),
        abstract_weight(
            problem.inputs, problem.outputs, problem.group_size, problem.bits, dtype
        ),
        jax.ShapeDtypeStruct((problem.outputs,), dtype),
    )


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("problem", problems(), ids=lambda p: "-".join(map(str, vars(p).values())))
def test_the_product_compiles(gpu, problem):
    dtype = "bfloat16" if gpu == "h100" else "float16"
    compile_for(gpu, quantized_matmul, *_operands(problem, dtype))
    made = assembly(f"quantized_matmul_int{problem.bits}", float(GPUS[gpu]))
    assert made.matrix_instructions > 0
    assert made.asynchronous_copies > 0
    assert made.spilled_bytes == 0
