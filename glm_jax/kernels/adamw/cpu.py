"""AdamW on CPU in float32: a C++ kernel (`jax.ffi`) that changes a donated state where it lies.

XLA computes the parameter and each moment by a loop of its own. The second loop needs what the
first one overwrites, so that XLA copies the state first, and reads all of it three times.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.kernels import cpu_library
from glm_jax.kernels.adamw.arguments import Arguments

_LIBRARY, _TARGET = "libglm_jax_adamw", "glm_jax_adamw"


def is_available() -> bool:
    """Whether the kernel was built; warns once where not."""
    return cpu_library.register(Path(__file__).with_name(_LIBRARY), "GlmJaxAdamW", _TARGET)


@dataclasses.dataclass(frozen=True)
class CPUInPlace(cpu_library.RowKernel):
    """Many numbers in float32."""

    def supports(self, arguments: Arguments) -> str | None:
        a = arguments
        return self.unmet_rows(a.param, a.gradient, a.first, a.second) or (
            None if is_available() else cpu_library.NOT_BUILT
        )

    def __call__(self, arguments: Arguments) -> Any:
        a = arguments
        same = jax.ShapeDtypeStruct(a.param.shape, jnp.float32)
        results = (same, same, same, jax.ShapeDtypeStruct((), jnp.float32))
        call = jax.ffi.ffi_call(
            _TARGET,
            results,
            vmap_method="sequential",
            input_output_aliases={0: 0, 1: 1, 2: 2},
        )
        scalars = (a.factor, a.rate, *a.corrections, a.is_good)
        return call(
            a.param,
            a.first,
            a.second,
            a.gradient,
            jnp.stack([jnp.float32(x) for x in scalars]),
            beta1=np.float32(a.beta1),
            share1=np.float32(1 - a.beta1),
            beta2=np.float32(a.beta2),
            share2=np.float32(1 - a.beta2),
            epsilon=np.float32(a.epsilon),
            decay=np.float32(a.decay),
            max_vector_bits=np.int64(self.max_vector_bits),
        )
