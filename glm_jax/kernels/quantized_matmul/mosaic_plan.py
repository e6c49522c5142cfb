"""What the parts of the kernel for compute capability 9.0 know when they are traced."""

import dataclasses
from typing import Any

from jax import lax
from jaxtyping import Array

from glm_jax.kernels.quantized_matmul import mosaic_registers
from glm_jax.kernels.quantized_matmul.mosaic_blocks import Blocks, Division
from glm_jax.kernels.quantized_matmul.mosaic_layout import TILE


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
