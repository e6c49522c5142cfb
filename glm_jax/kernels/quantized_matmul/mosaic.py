"""Backends for weights in the layout of the kernel for compute capability 9.0.

On other devices, and for float32, the weight is converted to floats tile by tile.
"""

import dataclasses
from collections.abc import Iterator

import jax
from jax.extend import backend
from jaxtyping import Array

from glm_jax.kernels import target
from glm_jax.kernels.dispatch import unmet
from glm_jax.kernels.quantized_matmul import mosaic_converted
from glm_jax.kernels.quantized_matmul.arguments import Arguments, add_bias
from glm_jax.kernels.quantized_matmul.mosaic_blocks import (
    Blocks,
    ConvertedTiles,
    Problem,
    candidates,
    converted_candidates,
    supports,
)
from glm_jax.kernels.quantized_matmul.mosaic_converted import Convert

CAPABILITY = 9.0  # the only one: later devices have other matrix instructions
_JAX = (0, 11)  # the oldest that has what the kernel is written in


@dataclasses.dataclass(frozen=True)
class Mosaic:
    """The kernel itself, for activations in 16 bits.

    Attributes:
      blocks: how a product is divided; None for what `choose` finds.
    """

    blocks: Blocks | None = None
    name: str = "mosaic"
    platform: str = "cuda"

    def supports(self, arguments: Arguments) -> str | None:
        return unmet(
            (arguments.weight.layout == "mosaic", "a weight in its own layout"),
            (target.compute_capability() == CAPABILITY, f"compute capability {CAPABILITY}"),
            (jax.__version_info__ >= _JAX, "JAX {}.{} or newer".format(*_JAX)),
        ) or supports(arguments.weight, arguments.x.dtype)

    def variants(self, arguments: Arguments) -> Iterator["Mosaic"]:
        """Yield this backend with each of the blocks that are worth measuring."""
        cores = backend.get_default_device().core_count
        for blocks in candidates(Problem.of(arguments.x, arguments.weight), cores):
            yield dataclasses.replace(self, blocks=blocks)

    def __call__(self, arguments: Arguments) -> Array:
        # Not before it is asked for: older JAX has no such kernels.
        from glm_jax.kernels.quantized_matmul import mosaic_gpu

        product = mosaic_gpu.matmul(arguments.x, arguments.weight, self.blocks)
        return add_bias(product, arguments.bias)


@dataclasses.dataclass(frozen=True)
class MosaicConverted:
    """A weight in the kernel's layout converted to floats tile by tile, on any device.

    Attributes:
      blocks: the tiles; None for those of `converted_tiles`.
    """

    blocks: ConvertedTiles | None = None
    name: str = "converted"
    platform: str | None = None

    def supports(self, arguments: Arguments) -> str | None:
        return unmet((arguments.weight.layout == "mosaic", "a weight in the layout of mosaic"))

    def variants(self, arguments: Arguments) -> Iterator["MosaicConverted"]:
        """Yield this backend with each of the tiles that are worth measuring."""
        for blocks in converted_candidates(Problem.of(arguments.x, arguments.weight)):
            yield dataclasses.replace(self, blocks=blocks)

    @property
    def convert(self) -> Convert:
        """What converts a tile."""
        return mosaic_converted.convert_by_xla

    def __call__(self, arguments: Arguments) -> Array:
        operands = arguments.x, arguments.weight, self.blocks, self.convert
        return add_bias(mosaic_converted.matmul(*operands), arguments.bias)


@dataclasses.dataclass(frozen=True)
class MosaicTiles(MosaicConverted):
    """Tiles converted by a kernel for compute capability 9.0, for activations in 16 bits."""

    name: str = "mosaic_tiles"
    platform: str | None = "cuda"

    def supports(self, arguments: Arguments) -> str | None:
        return Mosaic().supports(arguments)

    @property
    def convert(self) -> Convert:
        from glm_jax.kernels.quantized_matmul import mosaic_tiles

        return mosaic_tiles.convert


class MosaicConvertedTransposed(MosaicConverted):
    """The product with the transpose."""

    def __call__(self, arguments: Arguments) -> Array:
        operands = arguments.x, arguments.weight, self.blocks, self.convert
        return mosaic_converted.transposed_matmul(*operands)


class MosaicTilesTransposed(MosaicConvertedTransposed, MosaicTiles):
    """The product with the transpose, for activations in 16 bits on compute capability 9.0."""
