"""What the kernels for a `MosaicArray` share: what they know when they are traced, the arrays that
they read, and how what their programs wrote becomes the product."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from glm_jax.kernels.quantized_matmul import mosaic_registers
from glm_jax.kernels.quantized_matmul.arguments import Problem
from glm_jax.kernels.quantized_matmul.mosaic_blocks import Blocks, Division, divide
from glm_jax.kernels.quantized_matmul.mosaic_layout import TILE, MosaicArray


@dataclasses.dataclass(frozen=True)
class Plan:
    """A product's sizes and how it is divided.

    Attributes:
      bits: of a weight.
      group_size: inputs that share a scale.
      dtype: of activations.
      zeros: whether the weight has zero points.
      interpret: whether the kernel runs in the interpreter.
    """

    blocks: Blocks
    division: Division
    bits: int
    group_size: int
    dtype: Any
    zeros: bool
    interpret: bool

    @classmethod
    def of(cls, x: Array, weight: MosaicArray, blocks: Blocks, interpret: bool) -> "Plan":
        """Return the plan of x [rows, K] times weight [K, N]."""
        division, has_zeros = divide(Problem.of(x, weight), blocks), weight.zero_points is not None
        return cls(blocks, division, weight.bits, weight.group_size, x.dtype, has_zeros, interpret)

    @property
    def group(self) -> int:
        """Inputs of a step that share a scale."""
        return min(self.group_size, self.blocks.inputs)

    @property
    def groups(self) -> int:
        """Groups of a step."""
        return self.blocks.inputs // self.group

    def position(self, tile: Array) -> tuple[Array, Array]:
        """First tile of 64 outputs, and tile of rows, of a tile of the product."""
        rows = self.division.row_tiles
        return lax.div(tile, rows) * self.blocks.output_tiles, lax.rem(tile, rows)

    @property
    def chunk(self) -> int:
        """Inputs that are multiplied at once."""
        return 2 * TILE if self.group % (2 * TILE) == 0 else min(self.group, TILE)

    @property
    def sums(self) -> bool:
        """Whether something is taken off products, by the sums of x."""
        return (self.zeros and not self.blocks.scale_first) or self.raw

    @property
    def raw(self) -> bool:
        return self.blocks.raw and self.bits == 4

    @property
    def form(self) -> tuple[float, tuple[float, float]]:
        """Offset and factors of weights as they are multiplied."""
        return mosaic_registers.raw_form(self.dtype) if self.raw else (0.0, (1.0, 1.0))

    def factors(self, like: Float[Array, "64 rows"]) -> Array | float:
        """By what a tile's products are multiplied in `form`, in the shape of `like`."""
        _, (first, second) = self.form
        if first == second:
            return first
        index = lax.broadcasted_iota(jnp.int32, (TILE,), 0)
        factors = jnp.where(lax.rem(index, 16) < 8, jnp.float32(first), jnp.float32(second))
        return lax.broadcast_in_dim(factors, like.shape, (0,))

    def pad(self, x: Float[Array, "rows inputs"]) -> Float[Array, "padded inputs"]:
        """Rows of zeros behind x, to whole tiles."""
        return jnp.pad(x, ((0, -len(x) % self.blocks.rows), (0, 0)))

    def sums_of(self, x: Float[Array, "rows inputs"]) -> Float[Array, "groups rows"]:
        """Return the sum of x over each group's inputs, in float32."""
        return x.astype(jnp.float32).reshape(len(x), -1, self.group).sum(-1).T

    def add_parts(self, parts: Float[Array, "parts outputs rows"]) -> Float[Array, "outputs rows"]:
        """Add what programs wrote of each tile, in one order.

        Args:
          parts: a tile has as many as programs worked on it; what lies behind those is not written.
        """
        blocks, division = self.blocks, self.division
        tiles = (division.output_tiles, 1, division.row_tiles, 1)
        written = jnp.array(division.parts()).reshape(tiles)
        by_tile = (division.output_tiles, blocks.outputs, division.row_tiles, blocks.rows)
        total = parts[0].reshape(by_tile)
        for index in range(1, len(parts)):
            total = total + jnp.where(index < written, parts[index].reshape(by_tile), 0)
        return total.reshape(parts.shape[1:])


def scales_of(weight: MosaicArray) -> dict[str, Float[Array, "groups outputs"]]:
    """Scales and, where there are some, zero points, as the kernels name them."""
    arrays = {"scales": weight.scales, "zeros": weight.zero_points}
    return {name: array for name, array in arrays.items() if array is not None}
