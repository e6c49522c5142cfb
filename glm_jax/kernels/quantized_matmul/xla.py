"""Tile by tile in plain XLA, for GPUs and shapes that no kernel takes.

A scan dequantises one tile of inputs after another, so that the float matrix never exists
as a whole.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from glm_jax.kernels.quantized_matmul import reference
from glm_jax.quantization import QuantizedArray

_TILE = 512


def matmul(x: Float[Array, "rows inputs"], weight: QuantizedArray) -> Float[Array, "rows outputs"]:
    """x [rows, K] times weight [K, N], accumulated in float32 over tiles of K.

    Returns:
      float32 [rows, N].
    """
    inputs = weight.shape[0]
    tiles = _count(inputs, weight)
    split = lambda a: a.reshape(tiles, a.shape[0] // tiles, *a.shape[1:])
    copies = math.lcm(weight.groups, tiles) // weight.groups
    spread = lambda a: split(jnp.repeat(a, copies, axis=0))
    pieces = QuantizedArray(
        values=split(weight.values),
        scales=spread(weight.scales),
        bits=weight.bits,
        contraction_axis=-2,
        zero_points=None if weight.zero_points is None else spread(weight.zero_points),
    )
    columns = x.reshape(len(x), tiles, inputs // tiles).swapaxes(0, 1)

    def step(total: Array, piece: tuple[Array, QuantizedArray]) -> tuple[Array, None]:
        return total + reference.matmul(*piece), None

    start = jnp.zeros((len(x), weight.shape[1]), jnp.float32)
    return jax.lax.scan(step, start, (columns, pieces))[0]


def _count(inputs: int, weight: QuantizedArray) -> int:
    """The most tiles of at least `_TILE` inputs in which groups stay whole or split evenly."""
    pair = 2 if weight.bits == 4 else 1
    for tiles in range(max(1, inputs // _TILE), 1, -1):
        if inputs % (math.lcm(weight.groups, tiles) * pair) == 0:
            return tiles
    return 1
