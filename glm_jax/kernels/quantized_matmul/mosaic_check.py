"""Whether the kernel for Mosaic's layout is right on this machine's GPU, before it is used.

A process of its own multiplies small weights and compares with products in float32.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.kernels import self_check, target
from glm_jax.kernels.quantized_matmul import mma_blocks, mosaic_layout
from glm_jax.quantization import QuantizedArray, dequantize

ROWS = (1, 16, 33, 130, 3000)  # from each way in which the kernel divides its work
_MAX_INPUTS, _OUTPUTS = 4096, 6144
Product = Callable[[jax.Array, Any], jax.Array]


@dataclasses.dataclass(frozen=True, order=True)
class Kind:
    """What products of a model have in common.

    Attributes:
      bits: of a weight.
      inputs: of the weights that are tried.
      group_size: inputs that share a scale.
      dtype: of activations.
      zeros: whether weights have zero points.
    """

    bits: int
    inputs: int
    group_size: int
    dtype: str
    zeros: bool

    @classmethod
    def of(cls, weight: QuantizedArray) -> "Kind":
        """Return the kind of a weight's products, with fewer inputs where it has very many."""
        group_size = min(weight.group_size, _MAX_INPUTS)
        inputs = min(weight.shape[0], _MAX_INPUTS) // group_size * group_size
        has_zeros = weight.zero_points is not None
        return cls(weight.bits, inputs, group_size, str(weight.scales.dtype), has_zeros)


def is_for(device: Any) -> bool:
    """Whether there is a kernel for a device, here or described."""
    if target.has_wgmma(device):
        return True
    return device.platform == "gpu" and mma_blocks.is_for(float(device.compute_capability))


def why_not(kinds: frozenset[Kind]) -> str | None:
    """Return why the kernel must not be used for products of these kinds, None if it is right."""
    return self_check.why_not(__name__, described(kinds))


def described(kinds: Iterable[Kind]) -> str:
    """Return the argument with which a process of this module checks these kinds."""
    return json.dumps([dataclasses.asdict(kind) for kind in sorted(kinds)])


def first_fault(
    kind: Kind,
    product: Product,
    transposed: Product,
    rows: Sequence[int] = ROWS,
    outputs: int = _OUTPUTS,
) -> str | None:
    """Return what is wrong with products of a kind, None if all equal those of plain floats.

    Args:
      product: of x [rows, K] and a laid-out weight [K, N].
      transposed: of y [rows, N] and the weight.
      rows: numbers of rows to try.
      outputs: of the weight.
    """
    weight = _random_weight(kind, outputs)
    laid_out = jax.jit(mosaic_layout.lay_out)(weight)
    floats = dequantize(weight, "float32")
    tries = [(product, floats, count) for count in rows]
    tries.append((transposed, floats.T, rows[0]))
    for function, matrix, count in tries:
        draw = jax.random.normal(jax.random.key(1), (count, len(matrix))) + 0.5
        x = (0.1 * draw).astype(kind.dtype)
        exact = jnp.matmul(x.astype(jnp.float32), matrix, precision="highest")
        if error := self_check.error_of(jax.jit(function)(x, laid_out), exact, kind.dtype):
            which = "with the transpose, " if function is transposed else ""
            return f"{which}{kind.bits} bits, {count} rows: {error}"
    return None


def _random_weight(kind: Kind, outputs: int) -> QuantizedArray:
    values, scales, points = jax.random.split(jax.random.key(0), 3)
    groups = (kind.inputs // kind.group_size, outputs)
    size = (kind.inputs * kind.bits // 8, outputs)
    zeros = jax.random.randint(points, groups, -3, 4, jnp.int8)
    return QuantizedArray(
        values=jax.random.bits(values, size, jnp.uint8).astype(jnp.int8),
        scales=jax.random.uniform(scales, groups, minval=0.005, maxval=0.015).astype(kind.dtype),
        bits=kind.bits,
        contraction_axis=-2,
        zero_points=zeros if kind.zeros else None,
    )


def main(arguments: Sequence[str]) -> int:
    """Check the kinds of products that the argument describes in JSON, on the first GPU."""
    # Not before it is asked for: the op's module imports most others.
    from glm_jax.kernels.quantized_matmul.api import quantized_matmul, transposed_matmul

    product = functools.partial(quantized_matmul, implementation="mosaic")
    kinds = [Kind(**kind) for kind in json.loads(arguments[0])]
    faults = (first_fault(kind, product, transposed_matmul) for kind in kinds)
    return self_check.report(is_for, "8.0 to 9.0", faults)


if __name__ == "__main__":
    self_check.run(main)
