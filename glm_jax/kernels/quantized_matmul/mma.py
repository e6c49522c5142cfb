"""The backend of the kernel for compute capability 8.0 to 8.9, for weights in Mosaic's layout."""

import dataclasses
from collections.abc import Iterator

import jax
from jax.extend import backend
from jaxtyping import Array

from glm_jax.kernels import target
from glm_jax.kernels.dispatch import unmet
from glm_jax.kernels.quantized_matmul import mma_blocks, mosaic_blocks
from glm_jax.kernels.quantized_matmul.arguments import Arguments, add_bias
from glm_jax.kernels.quantized_matmul.mosaic_blocks import Blocks, Problem

FIRST, LATER = 8.0, 9.0  # compute capabilities: from the first, below the second
_JAX = (0, 11)  # the oldest that has what the kernel is written in


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
        capability = target.compute_capability()
        return unmet(
            (arguments.weight.layout == "mosaic", "a weight in its own layout"),
            (FIRST <= capability < LATER, f"compute capability {FIRST} and up, below {LATER}"),
            (jax.__version_info__ >= _JAX, "JAX {}.{} or newer".format(*_JAX)),
        ) or mosaic_blocks.supports(arguments.weight, arguments.x.dtype)

    def variants(self, arguments: Arguments) -> Iterator["Mma"]:
        """Yield this backend with each of the blocks that are worth measuring."""
        for blocks in mma_blocks.candidates(_problem(arguments), *_device()):
            yield dataclasses.replace(self, blocks=blocks)

    def __call__(self, arguments: Arguments) -> Array:
        # Not before it is asked for: older JAX has no such kernels.
        from glm_jax.kernels.quantized_matmul import mma_gpu

        blocks = self.blocks or mma_blocks.choose(_problem(arguments), *_device())
        product = mma_gpu.matmul(arguments.x, arguments.weight, blocks)
        return add_bias(product, arguments.bias)


def _problem(arguments: Arguments) -> Problem:
    weight = arguments.weight
    sizes = len(arguments.x), *weight.shape, weight.bits, weight.group_size
    return Problem(*sizes, weight.zero_points is not None)


def _device() -> tuple[float, int]:
    """Compute capability and multiprocessors of the device that is compiled for."""
    return target.compute_capability(), backend.get_default_device().core_count
