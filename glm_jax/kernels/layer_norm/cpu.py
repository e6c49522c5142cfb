"""Layer normalisation on CPU in float32, with a gradient: a C++ kernel (`jax.ffi`).

XLA passes over memory for the mean, the variance and the result, and several times more for the
gradient. Here a row is read once, forward and backward.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from glm_jax.kernels import cpu_library
from glm_jax.kernels.layer_norm.arguments import Arguments

_LIBRARY = "libglm_jax_layer_norm"
_FORWARD, _BACKWARD = "glm_jax_layer_norm_forward", "glm_jax_layer_norm_backward"


def is_available() -> bool:
    """Whether the kernel was built; warns once where not."""
    return cpu_library.register(Path(__file__).with_name(_LIBRARY), _FORWARD, _BACKWARD)


@dataclasses.dataclass(frozen=True)
class CPURows(cpu_library.RowKernel):
    """Many rows in float32, with a gradient: training and prefill."""

    def supports(self, arguments: Arguments) -> str | None:
        a = arguments
        return self.unmet_rows(a.x, a.scale, a.bias) or (
            None if is_available() else cpu_library.NOT_BUILT
        )

    def __call__(self, arguments: Arguments) -> Array:
        a = arguments
        return _layer_norm(a.x, a.scale, a.bias, a.epsilon, self.max_vector_bits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(x: Array, scale: Array, bias: Array, epsilon: float, bits: int) -> Array:
    return _forward(x, scale, bias, epsilon, bits)[0]


def _forward(x: Array, scale: Array, bias: Array, epsilon: float, bits: int) -> tuple[Array, Any]:
    # Of each row its mean and 1 / sqrt(variance + epsilon).
    moments = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), 2), jnp.float32)
    results = (jax.ShapeDtypeStruct(x.shape, jnp.float32), moments)
    call = jax.ffi.ffi_call(_FORWARD, results, vmap_method="sequential")
    out, of_rows = call(x, scale, bias, epsilon=np.float32(epsilon), max_vector_bits=np.int64(bits))
    return out, (x, scale, of_rows)


def _backward(epsilon: float, bits: int, residuals: Any, gradient: Array) -> tuple[Array, ...]:
    x, scale, of_rows = residuals
    results = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (x.shape, scale.shape, scale.shape)]
    call = jax.ffi.ffi_call(_BACKWARD, results, vmap_method="sequential")
    of_x, of_scale, of_bias = call(x, scale, of_rows, gradient, max_vector_bits=np.int64(bits))
    return of_x, of_scale, of_bias


_layer_norm.defvjp(_forward, _backward)
