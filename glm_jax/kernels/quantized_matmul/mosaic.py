"""Backends for weights in the layout of the kernels for compute capability 8.0 to 9.0.

On other devices, and for float32, the weight is converted to floats tile by tile.
"""

import dataclasses
import importlib
from collections.abc import Iterator

from jax.extend import backend
from jaxtyping import Array

from glm_jax.kernels import target
from glm_jax.kernels.dispatch import unmet
from glm_jax.kernels.quantized_matmul import mma_blocks, mosaic_blocks, mosaic_converted
from glm_jax.kernels.quantized_matmul.arguments import Arguments, Problem, add_bias
from glm_jax.kernels.quantized_matmul.mosaic_blocks import Blocks, ConvertedTiles
from glm_jax.kernels.quantized_matmul.mosaic_converted import Convert


@dataclasses.dataclass(frozen=True)
class Mosaic:
    """The kernel for compute capability 9.0, for activations in 16 bits.

    Attributes:
      blocks: how a product is divided; None for what the kernel's own rules choose.
    """

    blocks: Blocks | None = None
    name: str = "mosaic"
    platform: str = "cuda"

    kernel = "mosaic_gpu"  # a module, not imported before it is used: older JAX cannot

    def requires_gpu(self) -> tuple[bool, str]:
        """Whether the GPU is one of the kernel's, for `dispatch.unmet`."""
        return target.requires_wgmma()

    def supports(self, arguments: Arguments) -> str | None:
        return unmet(
            (arguments.weight.layout == "mosaic", "a weight in its own layout"),
            self.requires_gpu(),
            target.requires_mosaic_gpu(),
        ) or mosaic_blocks.supports(arguments.weight, arguments.x.dtype)

    def candidates(self, arguments: Arguments) -> Iterator[Blocks]:
        """Yield the blocks that are worth measuring."""
        cores = backend.get_default_device().core_count
        return mosaic_blocks.candidates(Problem.of(arguments.x, arguments.weight), cores)

    def __call__(self, arguments: Arguments) -> Array:
        module = importlib.import_module(f"{__package__}.{self.kernel}")
        product = module.matmul(arguments.x, arguments.weight, self.blocks)
        return add_bias(product, arguments.bias)


class Mma(Mosaic):
    """The kernel of warps' matrix instructions, for compute capability 8.0 to 8.9."""

    kernel = "mma_gpu"

    def requires_gpu(self) -> tuple[bool, str]:
        return mma_blocks.is_for(target.compute_capability()), "compute capability 8.0 to 8.9"

    def candidates(self, arguments: Arguments) -> Iterator[Blocks]:
        return mma_blocks.candidates(
            Problem.of(arguments.x, arguments.weight), *mma_blocks.device()
        )


@dataclasses.dataclass(frozen=True)
class MosaicConverted:
    """A weight in the kernel's layout converted to floats tile by tile, on any device.

    Attributes:
      blocks: the tiles; None for those of `converted_tiles`.
    """

    blocks: ConvertedTiles | None = None
    name: str = "converted"
    platform: str | None = None

    transposed = False  # multiplies with the transpose

    def supports(self, arguments: Arguments) -> str | None:
        return unmet((arguments.weight.layout == "mosaic", "a weight in the layout of mosaic"))

    def candidates(self, arguments: Arguments) -> Iterator[ConvertedTiles]:
        """Yield the tiles that are worth measuring."""
        problem = Problem.of(arguments.x, arguments.weight, self.transposed)
        return mosaic_blocks.converted_candidates(problem)

    @property
    def convert(self) -> Convert:
        """What converts a tile."""
        return mosaic_converted.convert_by_xla

    def __call__(self, arguments: Arguments) -> Array:
        module = mosaic_converted
        multiply = module.transposed_matmul if self.transposed else module.matmul
        product = multiply(arguments.x, arguments.weight, self.blocks, self.convert)
        return add_bias(product, arguments.bias)


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

    transposed = True


class MosaicTilesTransposed(MosaicConvertedTransposed, MosaicTiles):
    """The product with the transpose, for activations in 16 bits on compute capability 9.0."""
