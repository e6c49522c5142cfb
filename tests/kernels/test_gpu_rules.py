"""Rules of the hardware that neither the compilers nor the interpreter notice.

Warpgroups of a block give registers to each other: one that asks for more than there are waits for
ever. Copies by TMA end in shared memory at multiples of 128 bytes: others are errors.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import pytest

from glm_jax.kernels.attention.arguments import Arguments
from glm_jax.kernels.attention.mosaic import Mosaic
from glm_jax.kernels.paged_attention.arguments import Arguments as PagedArguments
from glm_jax.kernels.quantized_matmul.mosaic_blocks import Problem, candidates, choose
from glm_jax.kernels.quantized_matmul.mosaic_layout import LANES, TILE, MosaicArray

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="older JAX has no such kernels"
)
_OF_A_MULTIPROCESSOR = 65536
_SHARED_MEMORY = 228 * 1024  # of a multiprocessor; each program takes some more
_RESERVED = 1024 + 256  # with barriers


def _equations(name, function, *arguments):
    """Equations of a primitive, in kernels too, in order."""

    def inside(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name.startswith(name):
                yield equation
            for value in equation.params.values():
                for part in value if isinstance(value, tuple | list) else (value,):
                    sub = getattr(part, "jaxpr", part)
                    if hasattr(sub, "eqns"):
                        yield from inside(sub)

    return list(inside(jax.make_jaxpr(function)(*arguments).jaxpr))


def _requests(function, *arguments):
    """How many registers the kernels' threads ask for: (number, action) in order."""
    found = _equations("set_max_registers", function, *arguments)
    return [(equation.params["n"], equation.params["action"]) for equation in found]


def _stages(function, *arguments):
    """Bytes of a stage of each array in shared memory that TMA writes."""
    copies = _equations("copy_gmem_to_smem", function, *arguments)
    written = [equation.invars[1].aval for equation in copies]
    return [math.prod(ref.shape[1:]) * ref.dtype.itemsize for ref in written]


def _shared_bytes(function, *arguments):
    """What a program has in shared memory, each array from a multiple of 1024 bytes on."""
    scopes = _equations("run_scoped", function, *arguments)
    refs = [variable.aval for scope in scopes for variable in scope.params["jaxpr"].invars]
    arrays = [ref for ref in refs if "smem" in str(ref) and "barrier" not in str(ref)]
    [call] = _equations("mpmd_map", function, *arguments)
    sizes = [math.prod(ref.shape) * ref.dtype.itemsize for ref in arrays]
    scratch = call.params["compiler_params"].reduction_scratch_bytes
    return scratch + sum(-(-size // 1024) * 1024 for size in sizes)


def _weight(inputs, outputs, bits, group_size, zeros=False):
    scales = jax.ShapeDtypeStruct((inputs // group_size, outputs), jnp.float16)
    return MosaicArray(
        values=jax.ShapeDtypeStruct((outputs // TILE, inputs // TILE, bits, LANES), jnp.int32),
        scales=scales,
        bits=bits,
        zero_points=scales if zeros else None,
    )


def _assert_enough(requests, warpgroups):
    """All threads start with as many, in eights; one warpgroup gives, the others take."""
    numbers = {action: number for number, action in requests}
    at_start = _OF_A_MULTIPROCESSOR // (128 * warpgroups) // 8 * 8
    needed = numbers["decrease"] + (warpgroups - 1) * numbers["increase"]
    assert needed <= warpgroups * at_start


@pytest.mark.parametrize("consumers", [1, 2, 3, 4])
def test_the_kernel_of_products(consumers):
    from glm_jax.kernels.quantized_matmul import mosaic_gpu

    rows, inputs, outputs = 1, 12288, 36864
    found = candidates(Problem(rows, inputs, outputs, 4, 128), 132)
    blocks = next(each for each in found if each.consumers == consumers)
    weight = _weight(inputs, outputs, 4, 128)
    x = jax.ShapeDtypeStruct((rows, inputs), jnp.float16)
    requests = _requests(lambda x, weight: mosaic_gpu.matmul(x, weight, blocks), x, weight)
    assert len(requests) == 2
    _assert_enough(requests, consumers + 1)


@pytest.mark.parametrize(
    ("rows", "group_size", "tiles", "consumers"),
    [(8, 12288, 2, 3), (32, 32, 2, 2), (32, 32, 1, 3), (64, 32, 1, 2), (64, 32, 1, 1)],
)
def test_no_blocks_are_tried_that_have_too_few_registers(rows, group_size, tiles, consumers):
    """The compiler spilled them, or had products wait for each other."""
    found = list(candidates(Problem(rows, 12288, 36864, 4, group_size), 132))
    assert (tiles, consumers, 256) not in [(b.tiles, b.consumers, b.inputs) for b in found]
    assert any(b.inputs >= 128 for b in found)


@pytest.mark.parametrize("group_size", [12288, 128, 64, 32])
@pytest.mark.parametrize(("bits", "zeros"), [(4, False), (4, True), (8, True)])
def test_copies_of_products(bits, zeros, group_size):
    """Of the blocks that are chosen and of some others that are tried."""
    from glm_jax.kernels.quantized_matmul import mosaic_gpu

    inputs, outputs = 12288, 4608
    weight = _weight(inputs, outputs, bits, group_size, zeros)
    for rows in (1, 17, 33, 56):
        x = jax.ShapeDtypeStruct((rows, inputs), jnp.float16)
        problem = Problem(rows, inputs, outputs, bits, group_size, zeros)
        tried = itertools.islice(candidates(problem, 132), 0, None, 80)
        for blocks in (choose(problem, 132), *tried):
            stages = _stages(functools.partial(mosaic_gpu.matmul, blocks=blocks), x, weight)
            assert len(stages) >= 3
            assert all(size % 128 == 0 for size in stages), (blocks, stages)


@pytest.mark.parametrize("cache", ["float16", "int8"])
def test_pages(cache):
    """Two programs have room in a multiprocessor's shared memory, as their number is chosen for."""
    from glm_jax.kernels.paged_attention import mosaic_gpu

    array = jax.ShapeDtypeStruct
    pages = array((12, 300, 64, 128), cache)
    scales = array((12, 300, 64), "float32") if cache == "int8" else None
    query, tables, lengths = array((2, 1, 12, 128), "float16"), (2, 32), (2, 1)
    arguments = query, pages, pages, array(tables, "int32"), array(lengths, "int32"), scales, scales
    run = lambda *arguments: mosaic_gpu.attention(PagedArguments(*arguments), parts=2)
    stages = _stages(run, *arguments)
    assert len(stages) >= 5  # before the loop and in it, and the query
    assert all(size % 128 == 0 for size in stages)
    assert 2 * (_shared_bytes(run, *arguments) + _RESERVED) <= _SHARED_MEMORY


def test_the_kernels_of_attention():
    query = jax.ShapeDtypeStruct((1, 256, 1, 128), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((1, 1, 256, 128), jnp.bfloat16)
    ranges = jax.ShapeDtypeStruct((1, 256, 2), jnp.int32)

    def run(query, key, value, ranges, cotangent):
        attend = lambda *inputs: Mosaic()(Arguments(*inputs, ranges))
        return jax.vjp(attend, query, key, value)[1](cotangent)

    arguments = query, keys, keys, ranges, query
    stages = _stages(run, *arguments)
    assert len(stages) >= 9
    assert all(size % 128 == 0 for size in stages)
    requests = _requests(run, *arguments)
    assert len(requests) == 6  # of three kernels
    for start in range(0, 6, 2):
        _assert_enough(requests[start : start + 2], 3)
