"""GeGLU on CPU in float32, with a gradient: a C++ kernel (`jax.ffi`).

The gradient is written as a whole, where XLA writes that of each half, pads both and adds them.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from glm_jax.kernels import cpu_library
from glm_jax.kernels.geglu.arguments import Arguments

_LIBRARY = "libglm_jax_geglu"
_FORWARD, _BACKWARD = "glm_jax_geglu_forward", "glm_jax_geglu_backward"


def is_available() -> bool:
    """Whether the kernel was built; warns once where not."""
    return cpu_library.register(Path(__file__).with_name(_LIBRARY), _FORWARD, _BACKWARD)


@dataclasses.dataclass(frozen=True)
class CPURows(cpu_library.RowKernel):
    """Many rows in float32, with a gradient: training and prefill."""

    def supports(self, arguments: Arguments) -> str | None:
        return self.unmet_rows(arguments.hidden) or (
            None if is_available() else cpu_library.NOT_BUILT
        )

    def __call__(self, arguments: Arguments) -> Array:
        return _geglu(arguments.hidden, self.max_vector_bits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _geglu(hidden: Array, max_vector_bits: int) -> Array:
    *batch, _, mlp = hidden.shape
    result = jax.ShapeDtypeStruct((*batch, mlp), jnp.float32)
    call = jax.ffi.ffi_call(_FORWARD, result, vmap_method="sequential")
    gated: Array = call(hidden, max_vector_bits=np.int64(max_vector_bits))
    return gated


def _backward(max_vector_bits: int, hidden: Array, gradient: Array) -> tuple[Array]:
    result = jax.ShapeDtypeStruct(hidden.shape, jnp.float32)
    call = jax.ffi.ffi_call(_BACKWARD, result, vmap_method="sequential")
    return (call(hidden, gradient, max_vector_bits=np.int64(max_vector_bits)),)


_geglu.defvjp(lambda hidden, bits: (_geglu(hidden, bits), hidden), _backward)
