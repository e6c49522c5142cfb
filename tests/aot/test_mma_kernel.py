"""The kernel for compute capability 8.0 to 8.9, compiled for an A100: its loop, and its results.

PTX is assembled for later GPUs too. A CPU runs it thread by thread (`ptx.py`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot import ptx
from aot.assembled import assemble, count, ptx_of

from glm_jax.kernels.quantized_matmul import mma_gpu
from glm_jax.kernels.quantized_matmul.api import quantized_matmul
from glm_jax.kernels.quantized_matmul.arguments import Problem
from glm_jax.kernels.quantized_matmul.mma_blocks import candidates, choose
from glm_jax.kernels.quantized_matmul.mosaic_blocks import Blocks, divide
from glm_jax.kernels.quantized_matmul.mosaic_layout import LANES, TILE, MosaicArray, lay_out
from glm_jax.quantization import QuantizedArray, dequantize

A100, RTX_3090 = (8.0, 108), (8.6, 82)  # compute capability, multiprocessors
ARCHITECTURES = ("sm_80", "sm_86", "sm_89")
# The 130B's linears: inputs, outputs, and which of them tensor parallelism divides.
LINEARS = [(12288, 36864, 1), (12288, 12288, 0), (12288, 65536, 1), (32768, 12288, 0)]
DIVIDED = [
    (inputs // parts, outputs) if axis == 0 else (inputs, outputs // parts)
    for inputs, outputs, axis in LINEARS
    for parts in (1, 4, 8)
]
# Instructions a weight that a loop may have at one row, in groups of 128.
MOST = {(4, "float16"): 1.3, (4, "bfloat16"): 1.5, (8, "float16"): 1.5, (8, "bfloat16"): 2.7}
ROWS = (1, 16, 32, 64, 128)


@pytest.fixture
def compiled(capfd, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    return functools.partial(ptx_of, capfd, "a100_80gb")


def _abstract(rows, inputs, outputs, bits, dtype, group_size=128, zeros=False):
    groups = jax.ShapeDtypeStruct((inputs // group_size, outputs), dtype)
    values = jax.ShapeDtypeStruct((outputs // TILE, inputs // TILE, bits, LANES), jnp.int32)
    weight = MosaicArray(
        values=values, scales=groups, bits=bits, zero_points=groups if zeros else None
    )
    return jax.ShapeDtypeStruct((rows, inputs), dtype), weight


def _check(text, folder, blocks, architectures=ARCHITECTURES):
    """Instructions a weight, the most of any architecture; None where nothing disassembles."""
    most = 0.0
    for architecture in architectures:
        assembled = assemble(text, folder, architecture)
        assert assembled.spilled_bytes == 0
        loop = assembled.main_loop("HMMA")
        if loop is None:
            assert "mma.sync" in text
            assert text.count("cp.async.cg") >= 3  # weights, activations, scales
            return None
        assert count(loop, "LDGSTS") >= 3
        assert count(loop, "LDSM") > 0
        # An instruction takes eight weights of a thread, and eight rows.
        most = max(most, len(loop) / (8 * count(loop, "HMMA") / (blocks.rows // 8)))
    print(f"{most:.3f} instructions a weight")
    return most


@pytest.mark.parametrize(("inputs", "outputs"), DIVIDED)
def test_one_row_of_every_linear(compiled, tmp_path, inputs, outputs):
    text = compiled(quantized_matmul, *_abstract(1, inputs, outputs, 4, "float16"))
    blocks = choose(Problem(1, inputs, outputs, 4, 128), *A100)
    assert (_check(text, tmp_path, blocks, ("sm_80",)) or 0) <= MOST[4, "float16"]


@pytest.mark.parametrize(("bits", "dtype"), MOST)
@pytest.mark.parametrize("rows", ROWS)
def test_rows(compiled, tmp_path, bits, dtype, rows):
    text = compiled(quantized_matmul, *_abstract(rows, 12288, 36864, bits, dtype))
    most = _check(text, tmp_path, choose(Problem(rows, 12288, 36864, bits, 128), *A100))
    if rows == 1 and most is not None:
        assert most <= MOST[bits, dtype]


@pytest.mark.slow
@pytest.mark.parametrize(("inputs", "outputs"), DIVIDED)
@pytest.mark.parametrize(("bits", "dtype"), MOST)
@pytest.mark.parametrize("rows", [1, 16, 32, 128])
def test_all_of_every_linear(compiled, tmp_path, inputs, outputs, bits, dtype, rows):
    for device in (A100, RTX_3090):
        blocks = choose(Problem(rows, inputs, outputs, bits, 128), *device)
        matmul = functools.partial(mma_gpu.matmul, blocks=blocks)
        text = compiled(matmul, *_abstract(rows, inputs, outputs, bits, dtype))
        most = _check(text, tmp_path, blocks, ("sm_80" if device == A100 else "sm_86",))
        if rows == 1 and most is not None:
            assert most <= MOST[bits, dtype]


@pytest.mark.parametrize("group_size", [12288, 64, 32])
def test_groups_and_zero_points(compiled, tmp_path, group_size):
    arguments = _abstract(16, 12288, 12288, 4, "bfloat16", group_size, zeros=True)
    text = compiled(quantized_matmul, *arguments)
    blocks = choose(Problem(16, 12288, 12288, 4, group_size, True), *A100)
    _check(text, tmp_path, blocks, ("sm_80",))


@pytest.mark.slow
def test_no_candidate_spills(compiled, tmp_path):
    for rows, bits in ((1, 4), (32, 8), (64, 4), (512, 8)):
        for blocks in candidates(Problem(rows, 1536, 12288, bits, 128, True), *A100):
            matmul = functools.partial(mma_gpu.matmul, blocks=blocks)
            arguments = _abstract(rows, 1536, 12288, bits, "bfloat16", zeros=True)
            _check(compiled(matmul, *arguments), tmp_path, blocks, ("sm_80",))


def test_multiprocessors_are_busy():
    for (inputs, outputs), device in ((s, d) for s in DIVIDED for d in (A100, RTX_3090)):
        problem = Problem(1, inputs, outputs, 4, 128)
        blocks = choose(problem, *device)
        division = divide(problem, blocks)
        assert division.total >= 0.85 * division.share * blocks.programs


CASES = {
    # rows, inputs, outputs, groups, bits, zero points, dtype, blocks
    "parts": (1, 384, 128, 3, 4, False, "float16", {"tiles": 2, "inputs": 128}),
    "halves": (5, 512, 64, 2, 8, True, "float16", {"inputs": 256}),
    "rows": (33, 192, 128, 6, 8, False, "bfloat16", {"tiles": 2, "inputs": 64, "stages": 4}),
    "long group": (20, 256, 192, 1, 4, True, "bfloat16", {"inputs": 64, "programs": 2}),
    "four": (8, 256, 512, 1, 4, True, "bfloat16", {"tiles": 4, "inputs": 128, "programs": 7}),
    "many": (70, 256, 128, 2, 4, True, "float16", {"tiles": 2, "inputs": 64}),
    "many bytes": (70, 128, 64, 4, 8, True, "bfloat16", {"rows": 64, "inputs": 64}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_compiled_multiplies_as_float64_does(compiled, monkeypatch, case):
    rows, inputs, outputs, groups, bits, zeros, dtype, sizes = CASES[case]
    rng = np.random.default_rng(rows)
    points = rng.integers(-8, 8, (groups, outputs)).astype(np.int8)
    weight = QuantizedArray(
        values=rng.integers(-128, 128, (inputs * bits // 8, outputs)).astype(np.int8),
        scales=jnp.asarray(rng.uniform(0.005, 0.015, (groups, outputs)), dtype),
        bits=bits,
        contraction_axis=-2,
        zero_points=points if zeros else None,
    )
    x = jnp.asarray(rng.normal(size=(rows, inputs)) + 0.5, dtype)
    is_many = rows > 64
    of_tile = 128 if is_many else 8 if rows <= 8 else -(-rows // 16) * 16
    fixed = {"rows": of_tile, "tiles": 1, "consumers": 1, "stages": 3, "programs": 3}
    blocks = Blocks(**{**fixed, **sizes}, scale_first=is_many)
    arguments = x, lay_out(weight)
    matmul = functools.partial(mma_gpu.matmul, blocks=blocks)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    text = compiled(matmul, *abstract)
    exact = np.asarray(x, np.float64) @ np.asarray(dequantize(weight, jnp.float32), np.float64)
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3}[dtype] if is_many else 2e-6
    for is_late in (True, False):
        monkeypatch.setattr(mma_gpu.plgpu, "kernel", _run_on_cpu(text, is_late))
        product = matmul(*arguments)
        np.testing.assert_allclose(product, exact, atol=tolerance * np.abs(exact).max())


def _run_on_cpu(text, is_late):
    """Takes the place of `plgpu.kernel`."""

    def kernel(_, *, out_type, grid, **__):
        def call(*operands):
            unwritten = np.full(out_type.shape, np.nan, out_type.dtype)
            made = ptx.run(text, [np.asarray(o) for o in operands], unwritten, *grid, is_late)
            return jnp.asarray(made)

        return call

    return kernel
