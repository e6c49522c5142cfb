"""The kernel for TPUs (Pallas, Mosaic).

The grid walks over blocks of inputs innermost and sums in VMEM, while the pipeline brings
the next block of packed weights from HBM.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from glm_jax.kernels.dispatch import unmet
from glm_jax.kernels.quantized_matmul.arguments import Arguments, add_bias
from glm_jax.quantization import QuantizedArray
from glm_jax.quantization.packing import interleaved_planes, split_bytes

_LANES = 128
_ROWS, _OUTPUTS, _INPUTS = 128, 512, 1024  # the largest block; about 4 MB of VMEM


@dataclasses.dataclass(frozen=True)
class PallasTPU:
    """A weight that blocks of lanes divide, groups and packed pairs included.

    Attributes:
      interpret: runs the kernel's program step by step on any device, for tests.
    """

    interpret: bool = False
    name: str = "pallas"
    platform: str = "tpu"

    def supports(self, arguments: Arguments) -> str | None:
        return unmet(arguments.has_stored_integers) or unmet(
            (arguments.weight.shape[1] % _LANES == 0, f"outputs in multiples of {_LANES}"),
            (_input_block(arguments.weight) is not None, "inputs that blocks of lanes divide"),
        )

    def __call__(self, arguments: Arguments) -> Array:
        product = matmul(arguments.x, arguments.weight, self.interpret)
        return add_bias(product, arguments.bias)


def matmul(
    x: Float[Array, "rows inputs"], weight: QuantizedArray, interpret: bool = False
) -> Float[Array, "rows outputs"]:
    """x [rows, K] times weight [K, N]: bfloat16 on the matrix units, others as float32.

    Args:
      interpret: runs the kernel's program step by step on any device, for tests.

    Returns:
      float32 [rows, N].
    """
    if x.dtype != jnp.bfloat16:
        x = x.astype(jnp.float32)  # the matrix units have no float16
    rows, inputs = x.shape
    outputs = weight.shape[1]
    per_byte = 8 // weight.bits
    row_block = min(_ROWS, -(-rows // 16) * 16)
    output_block = math.gcd(outputs, _OUTPUTS)
    input_block = _input_block(weight)
    assert input_block is not None
    planes = jnp.pad(interleaved_planes(x, per_byte), ((0, 0), (0, -rows % row_block), (0, 0)))
    block_groups = max(1, input_block // weight.group_size)
    blocks_per_group = max(1, weight.group_size // input_block)
    of_groups = lambda a: a.reshape(-1, block_groups, outputs)
    group_spec = pl.BlockSpec(
        (1, block_groups, output_block), lambda m, n, k: (k // blocks_per_group, 0, n)
    )
    scales = of_groups(weight.scales.astype(jnp.float32))
    operands, specs = (
        [planes, weight.values, scales],
        [
            pl.BlockSpec((per_byte, row_block, input_block // per_byte), lambda m, n, k: (0, m, k)),
            pl.BlockSpec((input_block // per_byte, output_block), lambda m, n, k: (k, n)),
            group_spec,
        ],
    )
    if weight.zero_points is not None:
        operands.append(of_groups(weight.zero_points.astype(jnp.float32)))
        specs.append(group_spec)
    product: Array = pl.pallas_call(
        functools.partial(_kernel, bits=weight.bits),
        out_shape=jax.ShapeDtypeStruct((planes.shape[1], outputs), jnp.float32),
        grid=(planes.shape[1] // row_block, outputs // output_block, inputs // input_block),
        in_specs=specs,
        out_specs=pl.BlockSpec((row_block, output_block), lambda m, n, k: (m, n)),
        scratch_shapes=[pltpu.VMEM((row_block, output_block), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name=f"quantized_matmul_int{weight.bits}",
    )(*operands)
    return product[:rows]


def _input_block(weight: QuantizedArray) -> int | None:
    """Return the inputs of a block: whole lanes of x after packing, whole groups or part of one."""
    inputs = weight.shape[0]
    smallest = _LANES * 8 // weight.bits
    for block in (_INPUTS, _INPUTS // 2, _INPUTS // 4, _INPUTS // 8):
        whole = block % weight.group_size == 0 or weight.group_size % block == 0
        if block >= smallest and inputs % block == 0 and whole:
            return block
    return inputs if inputs <= _INPUTS else None  # a block may be the whole of an axis


def _kernel(x_ref: Any, values_ref: Any, scales_ref: Any, *rest: Any, bits: int) -> None:
    *extra, out_ref, total_ref = rest

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        total_ref[...] = jnp.zeros_like(total_ref)

    dtype = x_ref.dtype
    # Float32 takes several passes of the matrix units; one would round it to bfloat16.
    precision = None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    wide = values_ref[...].astype(jnp.int32)
    planes = (wide,) if bits == 8 else split_bytes(wide)
    groups = scales_ref.shape[1]
    size = wide.shape[0] // groups
    for group in range(groups):
        inputs = slice(group * size, (group + 1) * size)
        product = jnp.zeros(total_ref.shape, jnp.float32)
        for i, plane in enumerate(planes):
            weight = plane[inputs].astype(jnp.float32)
            if extra:
                weight = weight - extra[0][0, group, :][None]
            product += jax.lax.dot_general(
                x_ref[i, :, inputs],
                weight.astype(dtype),
                (((1,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
        total_ref[...] += product * scales_ref[0, group, :][None]

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        out_ref[...] = total_ref[...]
