"""The kernel for compute capability 9.0, compiled for an H100: what its inner loop came to."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from aot.assembled import Assembled, assemble, count, ptx_of
from aot.compiling import compile_for
from aot.written import written

from glm_jax.kernels.quantized_matmul.api import quantized_matmul
from glm_jax.kernels.quantized_matmul.arguments import Arguments, Problem
from glm_jax.kernels.quantized_matmul.mosaic import MosaicTiles, MosaicTilesTransposed
from glm_jax.kernels.quantized_matmul.mosaic_blocks import choose, divide
from glm_jax.kernels.quantized_matmul.mosaic_layout import LANES, TILE, MosaicArray
from glm_jax.planning.training_programs import memory

# The 130B's linears: inputs, outputs, and which of them tensor parallelism divides.
LINEARS = [(12288, 36864, 1), (12288, 12288, 0), (12288, 65536, 1), (32768, 12288, 0)]
DIVIDED = [
    (inputs // parts, outputs) if axis == 0 else (inputs, outputs // parts)
    for inputs, outputs, axis in LINEARS
    for parts in (1, 4, 8)
]
# Instructions a weight that a loop may have, few rows and groups of 128.
MOST = {(4, "float16"): 1.3, (4, "bfloat16"): 1.5, (8, "float16"): 1.6, (8, "bfloat16"): 2.35}
_made: dict[tuple, "Made"] = {}  # a process compiles a kernel once


@dataclasses.dataclass(frozen=True)
class Made:
    """What a kernel came to."""

    ptx: str
    assembled: Assembled

    @property
    def instructions(self) -> float | None:
        """A weight, in the smallest loop that multiplies; None where nothing disassembles."""
        loop = self.assembled.main_loop("HGMMA")
        # A matrix instruction takes 8 weights a thread.
        return None if loop is None else len(loop) / (8 * count(loop, "HGMMA"))


@pytest.fixture
def make(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")

    def made(*arguments, **options) -> Made:
        key = (*arguments, *options.items())
        if key not in _made:
            _made[key] = compiled(*arguments, **options)
        return _made[key]

    def compiled(rows, inputs, outputs, bits, dtype, group_size=128, zeros=False) -> Made:
        weight = _weight(inputs, outputs, bits, dtype, group_size, zeros)
        x = jax.ShapeDtypeStruct((rows, inputs), dtype)
        ptx = ptx_of(capfd, "h100", quantized_matmul, x, weight)
        return Made(ptx, assemble(ptx, tmp_path))

    return made


def _weight(inputs, outputs, bits, dtype, group_size=128, zeros=False) -> MosaicArray:
    """One that does not exist."""
    groups = jax.ShapeDtypeStruct((inputs // group_size, outputs), dtype)
    values = (outputs // TILE, inputs // TILE, bits, LANES)
    return MosaicArray(
        values=jax.ShapeDtypeStruct(values, jnp.int32),
        scales=groups,
        bits=bits,
        zero_points=groups if zeros else None,
    )


def _check(made: Made) -> None:
    assert "wgmma.mma_async" in made.ptx
    assert made.ptx.count("cp.async.bulk.tensor") >= 3  # weights, activations, scales
    assert made.assembled.spilled_bytes == 0
    assert not made.assembled.is_serialized


@pytest.mark.parametrize(("inputs", "outputs"), DIVIDED)
def test_one_row_of_every_linear(make, inputs, outputs):
    made = make(1, inputs, outputs, 4, "float16")
    _check(made)
    if made.instructions is not None:
        # Parts of a linear may take shorter steps.
        print(f"{made.instructions:.3f} instructions a weight")
        assert made.instructions <= 1.5


@pytest.mark.parametrize(("bits", "dtype"), MOST)
@pytest.mark.parametrize("rows", [1, 16])
def test_few_rows_take_few_instructions_a_weight(make, bits, dtype, rows):
    made = make(rows, 12288, 36864, bits, dtype)
    _check(made)
    if made.instructions is None:
        pytest.skip("instructions are counted by nvdisasm (pip install nvidia-cuda-nvdisasm)")
    print(f"{made.instructions:.3f} instructions a weight")
    assert made.instructions <= MOST[bits, dtype] + (0.2 if rows == 16 else 0)


@pytest.mark.parametrize("rows", [32, 64, 128, 2048])
@pytest.mark.parametrize(("bits", "zeros"), [(4, False), (8, True)])
def test_more_rows(make, bits, zeros, rows):
    _check(make(rows, 12288, 12288, bits, "float16", zeros=zeros))


@pytest.mark.parametrize("group_size", [12288, 64, 32])
@pytest.mark.parametrize("zeros", [False, True])
def test_groups_and_zero_points(make, group_size, zeros):
    _check(make(1, 12288, 12288, 4, "bfloat16", group_size, zeros))


@pytest.mark.parametrize(
    ("rows", "outputs", "group_size"), [(1, 9216, 12288), (32, 12288, 32), (64, 12288, 32)]
)
def test_many_products_at_once(make, rows, outputs, group_size):
    """What the most registers are needed for: long groups, and many groups of several rows."""
    _check(make(rows, 12288, outputs, 4, "float16", group_size))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_converted_tiles_are_all_that_is_written_in_floats(is_transposed):
    """2048 rows of the 130B's largest output projection: no buffer beside results of over 16 MiB,
    and products by matrix instructions or the library."""
    rows, inputs, outputs = 2048, 12288, 36864
    weight = _weight(inputs, outputs, 4, "float16")
    x = jax.ShapeDtypeStruct((rows, outputs if is_transposed else inputs), "float16")
    backend = MosaicTilesTransposed() if is_transposed else MosaicTiles()
    compiled = compile_for("h100", lambda x, w: backend(Arguments(x, w)), x, weight)
    result = (rows, inputs if is_transposed else outputs)
    others = [w for w in written(compiled.as_text(), 1 << 20) if w.shape != result]
    assert others
    assert max(w.bytes for w in others) <= 16 << 20, others
    assert memory(compiled).temporaries <= 64 << 20


def test_the_130b_keeps_all_multiprocessors_reading():
    for inputs, outputs in DIVIDED:
        problem = Problem(1, inputs, outputs, 4, 128)
        blocks = choose(problem, 132)
        division = divide(problem, blocks)
        assert division.total >= 0.9 * division.share * 132
