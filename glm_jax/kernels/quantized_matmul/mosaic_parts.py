"""How the parts of a product become the product, for the kernels that share tiles' steps."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from glm_jax.kernels.quantized_matmul.mosaic_blocks import Blocks, Division


def add_parts(
    parts: Float[Array, "parts outputs rows"], blocks: Blocks, division: Division
) -> Float[Array, "outputs rows"]:
    """Adds what programs wrote of each tile, in one order.

    Args:
      parts: a tile has as many as programs worked on it; what lies behind those is not written.
    """
    tiles = (division.output_tiles, 1, division.row_tiles, 1)
    written = jnp.array(division.parts()).reshape(tiles)
    by_tile = (division.output_tiles, blocks.outputs, division.row_tiles, blocks.rows)
    total = parts[0].reshape(by_tile)
    for index in range(1, len(parts)):
        total = total + jnp.where(index < written, parts[index].reshape(by_tile), 0)
    return total.reshape(parts.shape[1:])
