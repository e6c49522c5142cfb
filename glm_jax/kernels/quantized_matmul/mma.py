"""The backend of the kernel for compute capability 8.0 to 8.9, for weights in Mosaic's layout."""

import dataclasses
from collections.abc import Iterator

import jax
from jaxtyping import Array

from glm_jax.kernels import target
from glm_jax.kernels.dispatch import unmet
from glm_jax.kernels.quantized_matmul import mma_blocks, mosaic_blocks
from glm_jax.kernels.quantized_matmul.arguments import Arguments, add_bias
from glm_jax.kernels.quantized_matmul.mosaic_blocks import Blocks, Problem

_JAX = (0, 11)  # the oldest that has what the kernel is written in


def is_for(capability: float) -> bool:
    """Whether the kernel is that of GPUs of a compute capability; later ones have others."""
    return 8.0 <= capability < 9.0


@dataclasses.dataclass(frozen=True)
class Mma:
    """The kernel of warps' matrix instructions, for activations in 16 bits.

    Attributes:
      blocks: how a product is divided; None for what `mma_blocks.choose` finds.
    """

    blocks: Blocks | None = None
    name: str = "mosaic"
    platform: str = "cuda"

    def supports(self, arguments: Arguments) -> str | None:
        return unmet(
            (arguments.weight.layout == "mosaic", "a weight in its own layout"),
            (is_for(target.compute_capability()), "compute capability 8.0 to 8.9"),
            (jax.__version_info__ >= _JAX, "JAX {}.{} or newer".format(*_JAX)),
        ) or mosaic_blocks.supports(arguments.weight, arguments.x.dtype)

    def variants(self, arguments: Arguments) -> Iterator["Mma"]:
        """Yield this backend with each of the blocks that are worth measuring."""
        problem = Problem.of(arguments.x, arguments.weight)
        for blocks in mma_blocks.candidates(problem, *mma_blocks.device()):
            yield dataclasses.replace(self, blocks=blocks)

    def __call__(self, arguments: Arguments) -> Array:
        # Not before it is asked for: older JAX has no such kernels.
        from glm_jax.kernels.quantized_matmul import mma_gpu

        product = mma_gpu.matmul(arguments.x, arguments.weight, self.blocks)
        return add_bias(product, arguments.bias)
