"""Tile by tile in plain XLA, for GPUs and shapes that no kernel takes.

A scan dequantises one tile of inputs after another, so that the float matrix never exists
as a whole.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from glm_jax.kernels.dispatch import unmet
from glm_jax.kernels.quantized_matmul import reference
from glm_jax.kernels.quantized_matmul.arguments import Arguments, add_bias
from glm_jax.numerics import dot_general
from glm_jax.quantization import QuantizedArray, dequantize

_TILE = 512


@dataclasses.dataclass(frozen=True)
class XLA:
    """Any quantised weight, on any platform."""

    name: str = "xla"
    platform: str | None = None

    def supports(self, arguments: Arguments) -> str | None:
        return unmet(arguments.is_as_stored)

    def __call__(self, arguments: Arguments) -> Array:
        return add_bias(matmul(arguments.x, arguments.weight), arguments.bias)


class XLATransposed(XLA):
    """The product with the transpose."""

    def __call__(self, arguments: Arguments) -> Array:
        return transposed_matmul(arguments.x, arguments.weight)


def matmul(x: Float[Array, "rows inputs"], weight: QuantizedArray) -> Float[Array, "rows outputs"]:
    """x [rows, K] times weight [K, N], accumulated in float32 over tiles of K.

    Returns:
      float32 [rows, N].
    """
    tiles = _tiles(weight)
    columns = x.reshape(len(x), len(tiles.values), -1).swapaxes(0, 1)

    def step(total: Array, tile: tuple[Array, QuantizedArray]) -> tuple[Array, None]:
        return total + reference.matmul(*tile), None

    start = jnp.zeros((len(x), weight.shape[1]), jnp.float32)
    return jax.lax.scan(step, start, (columns, tiles))[0]


def transposed_matmul(
    gradient: Float[Array, "rows outputs"], weight: QuantizedArray
) -> Float[Array, "rows inputs"]:
    """gradient [rows, N] times the transpose of weight [K, N], tile by tile of K.

    Returns:
      [rows, K] in the gradient's dtype, to which weights are rounded too; sums are float32.
    """

    def step(carry: None, tile: QuantizedArray) -> tuple[None, Array]:
        kernel = dequantize(tile, gradient.dtype)
        part = dot_general(gradient, kernel, (((1,), (1,)), ((), ())))
        return carry, part.astype(gradient.dtype)

    parts = jax.lax.scan(step, None, _tiles(weight))[1]
    return parts.swapaxes(0, 1).reshape(len(gradient), -1)


def _tiles(weight: QuantizedArray) -> QuantizedArray:
    """Return the weight [K, N] as [tiles, K / tiles, N], groups split where a tile ends in one."""
    tiles = _count(weight)
    split = lambda a: a.reshape(tiles, a.shape[0] // tiles, *a.shape[1:])
    copies = math.lcm(weight.groups, tiles) // weight.groups
    spread = lambda a: split(jnp.repeat(a, copies, axis=0))
    return QuantizedArray(
        values=split(weight.values),
        scales=spread(weight.scales),
        bits=weight.bits,
        contraction_axis=-2,
        zero_points=None if weight.zero_points is None else spread(weight.zero_points),
    )


def _count(weight: QuantizedArray) -> int:
    """Return the most tiles, of `_TILE` inputs or more, that keep groups whole or split evenly."""
    inputs = weight.shape[0]
    pair = 2 if weight.bits == 4 else 1
    for tiles in range(max(1, inputs // _TILE), 1, -1):
        if inputs % (math.lcm(weight.groups, tiles) * pair) == 0:
            return tiles
    return 1
