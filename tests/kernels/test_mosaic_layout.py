"""The kernel for compute capability 9.0 without a GPU: its layout, its bits, its arithmetic."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.kernels.dispatch import BackendError
from glm_jax.kernels.quantized_matmul import mosaic_blocks, mosaic_converted, mosaic_layout
from glm_jax.kernels.quantized_matmul.api import prepare, quantized_matmul
from glm_jax.kernels.quantized_matmul.arguments import Problem
from glm_jax.kernels.quantized_matmul.mosaic_blocks import Blocks, ConvertedTiles
from glm_jax.kernels.quantized_matmul.mosaic_layout import TILE
from glm_jax.quantization import QuantizedArray, dequantize
from glm_jax.quantization.packing import pack_int4, unpack_int4


def _weight(inputs, outputs, groups, bits, zeros=False, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    top = 2 ** (bits - 1)
    values = jnp.asarray(rng.integers(-top, top, (inputs, outputs)).astype(np.int8))
    points = rng.integers(-top, top, (groups, outputs)).astype(np.int8)
    return QuantizedArray(
        values=values if bits == 8 else pack_int4(values, 0),
        scales=jnp.asarray(rng.uniform(0.005, 0.015, (groups, outputs)), dtype),
        bits=bits,
        contraction_axis=-2,
        zero_points=jnp.asarray(points) if zeros else None,
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_laid_out_comes_back(bits):
    weight = _weight(192, 128, 3, bits, zeros=True)
    laid_out = mosaic_layout.lay_out(weight)
    assert laid_out.values.shape == (2, 3, bits, 128)
    assert (laid_out.shape, laid_out.group_size) == ((192, 128), 64)
    restored = mosaic_layout.restore(laid_out)
    for before, after in zip(jax.tree.leaves(weight), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("bits", [8, 4])
def test_slices_of_whole_tiles_are_laid_out_alike(bits):
    """So that devices can divide a laid-out weight by either axis."""
    weight = _weight(192, 128, 3, bits)
    laid_out = mosaic_layout.lay_out(weight)
    part = mosaic_layout.MosaicArray(
        values=laid_out.values[1:, 1:], scales=laid_out.scales[1:, 64:], bits=bits
    )
    whole = mosaic_layout.integers(laid_out)
    np.testing.assert_array_equal(mosaic_layout.integers(part), whole[64:, 64:])


def _run_ptx(text, word, dtype):
    """Runs a conversion's PTX on words, uint32; results in order."""
    kind = jnp.dtype(dtype)
    registers = {}

    def value(name):
        if name[0] != "$" and not name[0].isdigit():
            return registers[name]
        return registers[name] if name in registers else np.full_like(word, int(name, 0))

    def halves(function, *operands):
        pairs = [value(o).view(kind).astype(np.float64) for o in operands]
        return function(*pairs).astype(kind).view(np.uint32)

    def permute(a, b, selector):
        octets = np.stack([value(a), value(b)], -1).view(np.uint8)
        chosen = [octets[:, (int(selector, 0) >> 4 * i) & 7] for i in range(4)]
        return np.ascontiguousarray(np.stack(chosen, -1)).view(np.uint32)[:, 0]

    def rotate(a, right):
        return (a >> np.uint32(right)) | (a << np.uint32(32 - right))

    def logic(a, b, c, table):
        a, b, c = value(a), value(b), value(c)
        return {"0xc0": a & b, "0xea": (a & b) | c, "0xae": (~a & b) | c}[table]

    count = max(int(n) for n in re.findall(r"\$(\d)", text))
    registers[f"${count}"] = word
    operations = {
        "mov": lambda a: value(a),
        "shr": lambda a, n: value(a) >> np.uint32(int(n)),
        "shf": lambda a, _, n: (
            (value(a) >> np.uint32(int(n))) | (value(a) << np.uint32(32 - int(n)))
        ),
        "lop3": logic,
        "prmt": permute,
        "sub": lambda a, b: halves(np.subtract, a, b),
    }
    body = text[text.index(";") + 1 : text.rindex("}")]
    for line in filter(None, map(str.strip, body.split(";"))):
        operation, rest = line.split(" ", 1)
        target, *operands = [part.strip() for part in rest.split(",")]
        registers[target] = operations[operation.split(".")[0]](*operands)
    results = [registers[f"${i}"].view(kind) for i in range(count)]
    return np.stack([r.reshape(-1, 2).astype(np.float64) for r in results], 1)


@pytest.mark.parametrize(
    ("bits", "dtype", "raw"),
    [
        (4, "float16", False),
        (4, "float16", True),
        (4, "bfloat16", False),
        (4, "bfloat16", True),
        (8, "float16", False),
        (8, "bfloat16", False),
    ],
)
def test_registers_hold_what_the_matrix_instruction_takes(bits, dtype, raw):
    """The PTX itself, run on a tile's words, thread by thread."""
    registers = pytest.importorskip("glm_jax.kernels.quantized_matmul.mosaic_registers")
    weight = _weight(TILE, TILE, 1, bits, seed=bits)
    words = np.asarray(mosaic_layout.lay_out(weight).values).astype(np.uint32).reshape(-1, 128, 4)
    made = _run_ptx(registers.conversion(bits, dtype, raw), words.reshape(-1), dtype)
    # [vectors of 16 bytes, threads, words, registers of a word, halves]
    made = made.reshape(*words.shape, -1, 2).transpose(1, 0, 2, 3, 4).reshape(128, 8, 2, 2)
    expected = unpack_int4(weight.values, 0) if bits == 4 else weight.values
    expected = np.asarray(expected).astype(np.float64)
    # As wgmma's operand in registers is defined: thread 32 w + 4 g + c holds rows
    # 16 w + g (+ 8), inputs 2 c and 2 c + 1 (+ 8) of each 16.
    thread = np.arange(128)[:, None, None, None]
    column, half, one = np.arange(8)[:, None, None], np.arange(2)[:, None], np.arange(2)
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * half
    inputs = 8 * column + 2 * (thread % 4) + one
    wanted = expected[inputs, row]
    if raw:
        offset, factors = registers.raw_form(jnp.dtype(dtype))
        wanted = (wanted + offset) * np.asarray(factors)[half]
    np.testing.assert_array_equal(made, wanted)


CASES = {
    # rows, inputs, outputs, groups, bits, zero points, dtype, blocks
    "parts": (1, 384, 128, 3, 4, True, "float16", {"consumers": 2, "inputs": 128, "raw": True}),
    "rows": (33, 192, 128, 6, 8, True, "bfloat16", {"tiles": 2, "inputs": 64}),
    "whole": (9, 192, 128, 1, 4, False, "bfloat16", {"inputs": 64, "raw": True, "whole": True}),
    "many": (70, 256, 128, 2, 4, True, "float16", {"tiles": 2, "inputs": 128, "scale_first": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_product_is_that_of_float64(case):
    """All of the kernel but the conversion of bits, in the interpreter."""
    kernel = pytest.importorskip("glm_jax.kernels.quantized_matmul.mosaic_gpu")
    if jax.__version_info__ < (0, 11):
        pytest.skip("JAX before 0.11 has no interpreter of the kernel")
    rows, inputs, outputs, groups, bits, zeros, dtype, sizes = CASES[case]
    weight = _weight(inputs, outputs, groups, bits, zeros, dtype)
    of_tile = min(64, -(-rows // 8) * 8)
    blocks = {"rows": of_tile, "tiles": 1, "consumers": 1, "stages": 2, "programs": 3, **sizes}
    x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, inputs)), dtype)
    laid_out = mosaic_layout.lay_out(weight)
    product = kernel.matmul(x, laid_out, Blocks(**blocks), interpret=True)
    wanted = np.asarray(x, np.float64) @ np.asarray(dequantize(weight, jnp.float32), np.float64)
    scaled = 1e-3 if sizes.get("scale_first") else 2e-6  # weights are rounded to float16
    np.testing.assert_allclose(product, wanted, atol=scaled * np.abs(wanted).max())


DRAWS = np.random.default_rng(25)
ROWS_DRAWN = [int(n) for n in (*DRAWS.integers(1, 34, 3), *DRAWS.integers(48, 2050, 2))]


@pytest.mark.parametrize("number", range(len(ROWS_DRAWN)))
def test_rows_drawn_at_random_as_they_are_divided(number):
    """Each draw has other bits, types, zero points and an odd number of groups."""
    kernel = pytest.importorskip("glm_jax.kernels.quantized_matmul.mosaic_gpu")
    if jax.__version_info__ < (0, 11):
        pytest.skip("JAX before 0.11 has no interpreter of the kernel")
    rows, bits = ROWS_DRAWN[number], (4, 8)[number % 2]
    dtype = ("bfloat16", "float16")[number // 2 % 2]
    weight = _weight(192, 64, (3, 1)[number % 2], bits, number % 3 == 0, dtype)
    blocks = mosaic_blocks.choose(Problem(rows, 192, 64, bits, weight.group_size), 3)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, 192)), dtype)
    product = kernel.matmul(x, mosaic_layout.lay_out(weight), blocks, interpret=True)
    wanted = np.asarray(x, np.float64) @ np.asarray(dequantize(weight, jnp.float32), np.float64)
    rounded = 2e-3 if dtype == "float16" else 1.6e-2  # weights, from 65 rows on
    tolerance = rounded if blocks.scale_first else 2e-6
    np.testing.assert_allclose(product, wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("tiles", [None, ConvertedTiles(64, 128)])
def test_converted_tiles_give_both_products(bits, groups, tiles):
    weight = _weight(384, 256, groups, bits, True, "float16")
    laid_out = mosaic_layout.lay_out(weight)
    exact = np.asarray(dequantize(weight, jnp.float32), np.float64)
    rng = np.random.default_rng(1)
    for product, matrix in (
        (mosaic_converted.matmul, exact),
        (mosaic_converted.transposed_matmul, exact.T),
    ):
        x = jnp.asarray(rng.normal(size=(5, len(matrix))), jnp.float16)
        wanted = np.asarray(x, np.float64) @ matrix
        ours = product(x, laid_out, tiles).astype(jnp.float32)
        np.testing.assert_allclose(ours, wanted, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize(("bits", "groups"), [(4, 3), (8, 12)])
def test_the_kernel_converts_a_tile(bits, groups):
    """All of it but the conversion of bits, in the interpreter."""
    kernel = pytest.importorskip("glm_jax.kernels.quantized_matmul.mosaic_tiles")
    if jax.__version_info__ < (0, 11):
        pytest.skip("JAX before 0.11 has no interpreter of the kernel")
    weight = _weight(384, 128, groups, bits, True, "float16")
    tiles, first = ConvertedTiles(128, 64), (jnp.int32(256), jnp.int32(64))
    laid_out = mosaic_layout.lay_out(weight)
    tile = kernel.convert(laid_out, *first, tiles, "float16", interpret=True)
    expected = mosaic_converted.convert_by_xla(laid_out, *first, tiles, "float16")
    np.testing.assert_array_equal(tile, expected)
    exact = dequantize(weight, jnp.float32)[256:, 64:].T
    np.testing.assert_allclose(tile.astype(jnp.float32), exact, rtol=2e-3)


def test_a_converted_tile_stays_in_the_cache():
    """Of every product of the 130B, whole and divided by 8, in float16."""
    for inputs, outputs in ((12288, 36864), (12288, 65536), (32768, 12288), (12288, 4608)):
        for transposed in (False, True):
            problem = Problem(2048, inputs, outputs, 4, 128, transposed=transposed)
            tiles = mosaic_blocks.converted_tiles(problem)
            assert 4 << 20 <= 2 * tiles.inputs * tiles.outputs <= 16 << 20
            choices = list(mosaic_blocks.converted_candidates(problem))
            assert tiles in choices
            for other in choices:
                assert (inputs % other.inputs, outputs % other.outputs) == (0, 0)


@pytest.mark.parametrize("rows", [1, 7, 16, 33, 64, 65, 2049])
@pytest.mark.parametrize("shape", [(12288, 4608), (1536, 12288), (192, 64), (960, 18816)])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_step_belongs_to_one_program(rows, shape, bits):
    inputs, outputs = shape
    problem = Problem(rows, inputs, outputs, bits, 32)
    for blocks in mosaic_blocks.candidates(problem, 132):
        division = mosaic_blocks.divide(problem, blocks)
        assert division.output_tiles * blocks.outputs == outputs
        assert division.steps * blocks.inputs == inputs
        assert division.programs <= blocks.programs
        assert (division.programs - 1) * division.share < division.total
        # What programs write of tiles, counted one by one.
        pairs = {(s // division.share, s // division.steps) for s in range(division.total)}
        counts = np.bincount([tile for _, tile in pairs])
        np.testing.assert_array_equal(counts, division.parts())
    assert mosaic_blocks.choose(problem, 132).stages >= 3


def test_it_says_what_it_does_not_take():
    taken = _weight(96 * 2, 64, 6, 4)
    assert mosaic_blocks.supports(taken, jnp.float16) is None
    assert "float32" in mosaic_blocks.supports(taken, jnp.float32)
    assert "groups of 96" in mosaic_blocks.supports(_weight(192, 64, 2, 4), jnp.float16)
    assert "multiples" in mosaic_blocks.supports(_weight(96, 64, 1, 4), jnp.float16)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_op_multiplies_what_is_laid_out(bits):
    """On a device that is not for the kernel; and the gradient, of which nothing is laid out."""
    weight = _weight(192, 128, 3, bits, zeros=True)
    laid_out = prepare(weight, layout="mosaic")
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 192)), jnp.float32)
    bias = jnp.arange(128.0)
    ours, gradient = jax.vjp(lambda x: quantized_matmul(x, laid_out, bias), x)
    wanted, expected = jax.vjp(lambda x: quantized_matmul(x, weight, bias), x)
    np.testing.assert_allclose(ours, wanted, atol=1e-4)
    np.testing.assert_allclose(gradient(wanted)[0], expected(wanted)[0], atol=1e-2)
    with pytest.raises(BackendError, match="groups of 96"):
        prepare(_weight(192, 64, 2, bits), layout="mosaic")
