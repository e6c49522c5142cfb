"""Attention over pages on CPU: the C++ kernel beside that of attention over a cache."""

import dataclasses

from jaxtyping import Array

from glm_jax.kernels import cpu_library
from glm_jax.kernels.attention import cpu
from glm_jax.kernels.dispatch import unmet
from glm_jax.kernels.paged_attention.arguments import Arguments


@dataclasses.dataclass(frozen=True)
class CPUPages:
    """Takes whole vectors of a stored dtype, on one device.

    Attributes:
      widest: bits of the widest vectors to use (512, 256 or less), for tests.
    """

    widest: int = cpu_library.WIDEST
    name: str = "cpu"
    platform: str = "cpu"

    def supports(self, arguments: Arguments) -> str | None:
        is_float32 = arguments.softmax_dtype == "float32"
        return unmet((is_float32, "a softmax in float32")) or cpu.unsupported_storage(
            arguments.keys
        )

    def __call__(self, arguments: Arguments) -> Array:
        a = arguments
        operands = (a.query, a.keys, a.values, a.tables, a.lengths)
        return cpu.call(cpu.PAGED, operands, (a.key_scales, a.value_scales), self.widest)
