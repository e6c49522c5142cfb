"""Attention on CPU in float32, with a gradient: a C++ kernel (`jax.ffi`)."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from glm_jax.kernels import cpu_library
from glm_jax.kernels.attention.arguments import Arguments, saved
from glm_jax.kernels.attention.dropout import WeightDropout

_LIBRARY = "libglm_jax_attention"
_FORWARD, _BACKWARD = "glm_jax_attention_forward", "glm_jax_attention_backward"


def is_available() -> bool:
    """Whether the kernel was built; warns once where not."""
    return cpu_library.register(Path(__file__).with_name(_LIBRARY), _FORWARD, _BACKWARD)


@dataclasses.dataclass(frozen=True)
class CPUBlocks(cpu_library.AttentionKernel):
    """Many queries block by block, all in float32, with a gradient: training and prefill."""

    def supports(self, arguments: Arguments) -> str | None:
        query, key = arguments.query, arguments.key
        return self.unmet(
            arguments.softmax_dtype,
            query.shape[3],
            (arguments.has_ranges, "ranges of keys, no mask"),
            (query.dtype == key.dtype == jnp.float32, "float32"),
        ) or (None if is_available() else cpu_library.NOT_BUILT)

    def __call__(self, arguments: Arguments) -> Array:
        # As projections give them: the transpose that made them [heads, key] falls away.
        key, value = (jnp.swapaxes(x, 1, 2) for x in (arguments.key, arguments.value))
        return _attention(arguments.replace(key=key, value=value), self.max_vector_bits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attention(arguments: Arguments, max_vector_bits: int) -> Array:
    """Return attention whose keys and values are [batch, key, heads, head_dim]."""
    return _forward(arguments, max_vector_bits)[0]


def _forward(arguments: Arguments, max_vector_bits: int) -> tuple[Array, Any]:
    query = arguments.query
    batch, queries, heads, _ = query.shape
    results = (
        jax.ShapeDtypeStruct(query.shape, jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    )
    call = jax.ffi.ffi_call(_FORWARD, results, vmap_method="sequential")
    attributes = _attributes(arguments.dropout, max_vector_bits)
    out, log_sums = saved(*call(*_inputs(arguments), **attributes))
    return out, (arguments, out, log_sums)


def _backward(max_vector_bits: int, residuals: Any, gradient: Array) -> tuple[Arguments]:
    arguments, out, log_sums = residuals
    inputs = _inputs(arguments)
    results = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in inputs[:3]]
    call = jax.ffi.ffi_call(_BACKWARD, results, vmap_method="sequential")
    of_query, of_key, of_value = call(
        *inputs, out, log_sums, gradient, **_attributes(arguments.dropout, max_vector_bits)
    )
    nothing = jax.tree.map(lambda _: None, arguments)
    return (nothing.replace(query=of_query, key=of_key, value=of_value),)


_attention.defvjp(_forward, _backward)


def _inputs(arguments: Arguments) -> tuple[Array, ...]:
    """Return what both kernels read first."""
    a, dropout = arguments, arguments.dropout
    return a.query, a.key, a.value, a.visible, jnp.uint32(0) if dropout is None else dropout.seed


def _attributes(dropout: WeightDropout | None, max_vector_bits: int) -> dict[str, Any]:
    dropout = dropout or WeightDropout(None, 0.0)
    return {
        "dropout_threshold": np.int64(dropout.threshold),
        "dropout_scale": np.float32(dropout.scale),
        "max_vector_bits": np.int64(max_vector_bits),
    }
