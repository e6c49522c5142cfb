"""Warpgroups of a block that give registers to each other: one that asks for more than there are
hangs, which neither the compilers nor the interpreter notice."""

import jax
import jax.numpy as jnp
import pytest

from glm_jax.kernels.attention.arguments import Arguments
from glm_jax.kernels.attention.mosaic import Mosaic
from glm_jax.kernels.quantized_matmul.mosaic_blocks import Problem, candidates
from glm_jax.kernels.quantized_matmul.mosaic_layout import LANES, TILE, MosaicArray

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="older JAX has no such kernels"
)
_OF_A_MULTIPROCESSOR = 65536


def _requests(function, *arguments):
    """How many registers the kernels' threads ask for: (number, action) in order."""

    def inside(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name.startswith("set_max_registers"):
                yield equation.params["n"], equation.params["action"]
            for value in equation.params.values():
                for part in value if isinstance(value, tuple | list) else (value,):
                    sub = getattr(part, "jaxpr", part)
                    if hasattr(sub, "eqns"):
                        yield from inside(sub)

    return list(inside(jax.make_jaxpr(function)(*arguments).jaxpr))


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
    weight = MosaicArray(
        values=jax.ShapeDtypeStruct((outputs // TILE, inputs // TILE, 4, LANES), jnp.int32),
        scales=jax.ShapeDtypeStruct((inputs // 128, outputs), jnp.float16),
        bits=4,
    )
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


def test_the_kernels_of_attention():
    query = jax.ShapeDtypeStruct((1, 256, 1, 128), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((1, 1, 256, 128), jnp.bfloat16)
    ranges = jax.ShapeDtypeStruct((1, 256, 2), jnp.int32)

    def run(query, key, value, ranges, cotangent):
        attend = lambda *inputs: Mosaic()(Arguments(*inputs, ranges))
        return jax.vjp(attend, query, key, value)[1](cotangent)

    requests = _requests(run, query, keys, keys, ranges, query)
    assert len(requests) == 6  # of three kernels
    for start in range(0, 6, 2):
        _assert_enough(requests[start : start + 2], 3)
