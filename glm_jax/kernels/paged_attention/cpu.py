"""Attention over pages on CPU: a C++ kernel (`jax.ffi`).

XLA on CPU copies pages for each reader of what was just written to them, and multiplies few
queries on one thread; the kernel reads a row's own pages once, on all threads, as they are stored.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from glm_jax.kernels import cpu_library
from glm_jax.kernels.paged_attention.arguments import Arguments

_LIBRARY, _TARGET = "libglm_jax_paged_attention", "glm_jax_paged_attention"
_DTYPES = ("float32", "bfloat16", "int8")


def is_available() -> bool:
    """Whether the kernel was built; warns once where not."""
    return cpu_library.register(Path(__file__).with_name(_LIBRARY), _TARGET)


@dataclasses.dataclass(frozen=True)
class CPUPages(cpu_library.AttentionKernel):
    """Takes whole vectors of a stored dtype, on one device; computes in float32."""

    def supports(self, arguments: Arguments) -> str | None:
        keys = arguments.keys
        return self.unmet(
            arguments.softmax_dtype,
            keys.shape[-1],
            (str(keys.dtype) in _DTYPES, f"keys in {', '.join(_DTYPES)}"),
        ) or (None if is_available() else cpu_library.NOT_BUILT)

    def __call__(self, arguments: Arguments) -> Array:
        a, none = arguments, jnp.zeros((0,), jnp.float32)
        attended: Array = jax.ffi.ffi_call(
            _TARGET,
            jax.ShapeDtypeStruct(a.query.shape, jnp.float32),
            vmap_method="sequential",
        )(
            a.query.astype(jnp.float32),
            a.keys,
            a.values,
            a.tables,
            a.lengths,
            *(none if scales is None else scales for scales in (a.key_scales, a.value_scales)),
            max_vector_bits=np.int64(self.max_vector_bits),
        )
        return attended.astype(a.query.dtype)
