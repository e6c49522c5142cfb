"""Backends for weights in the layout of the kernel for compute capability 9.0.

On other devices, and for float32, the weight is restored first, whole: right, and slow.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import backend
from jaxtyping import Array

from glm_jax.kernels import target
from glm_jax.kernels.dispatch import BackendError, unmet
from glm_jax.kernels.quantized_matmul import xla
from glm_jax.kernels.quantized_matmul.arguments import INTEGERS, Arguments, add_bias
from glm_jax.kernels.quantized_matmul.mosaic_blocks import Blocks, Problem, candidates, supports
from glm_jax.kernels.quantized_matmul.mosaic_layout import restore
from glm_jax.quantization import QuantizedArray

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
        weight = arguments.weight
        inputs, outputs = weight.shape
        sizes = len(arguments.x), inputs, outputs, weight.bits, weight.group_size
        problem = Problem(*sizes, weight.zero_points is not None)
        for blocks in candidates(problem, backend.get_default_device().core_count):
            yield dataclasses.replace(self, blocks=blocks)

    def __call__(self, arguments: Arguments) -> Array:
        # Not before it is asked for: older JAX has no such kernels.
        from glm_jax.kernels.quantized_matmul import mosaic_gpu

        product = mosaic_gpu.matmul(arguments.x, arguments.weight, self.blocks)
        return add_bias(product, arguments.bias)


@dataclasses.dataclass(frozen=True)
class MosaicRestored:
    """A weight in the kernel's layout wherever the kernel does not run."""

    name: str = "mosaic"
    platform: str | None = None

    def supports(self, arguments: Arguments) -> str | None:
        return unmet((arguments.weight.layout == "mosaic", "a weight in its own layout"))

    def __call__(self, arguments: Arguments) -> Array:
        product = xla.matmul(arguments.x, restore(arguments.weight))
        return add_bias(product, arguments.bias)


class MosaicTransposed(MosaicRestored):
    """The product with the transpose."""

    def __call__(self, arguments: Arguments) -> Array:
        return xla.transposed_matmul(arguments.x, restore(arguments.weight))


def check_layout(layout: str, weight: Any) -> QuantizedArray:
    """Return the weight, or raise a BackendError where it cannot be laid out for the kernel."""
    if layout != "mosaic":
        raise BackendError(f"quantized_matmul: no layout is called {layout!r}; expected mosaic")
    if not isinstance(weight, QuantizedArray):
        raise BackendError(
            f"quantized_matmul: expected a quantised weight as it is stored to lay out for "
            f"mosaic, got {type(weight).__name__}"
        )
    is_integer = weight.stored_dtype in INTEGERS
    reason = supports(weight, jnp.float16) if is_integer else f"it is {weight.stored_dtype}"
    if reason is not None:
        raise BackendError(f"quantized_matmul: mosaic does not take the weight: {reason}")
    return weight
