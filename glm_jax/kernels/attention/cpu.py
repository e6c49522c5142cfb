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
from glm_jax.kernels.attention.arguments import Arguments
from glm_jax.kernels.attention.dropout import WeightDropout
from glm_jax.kernels.dispatch import unmet
from glm_jax.sharding import surrounding_mesh

_LIBRARY = "libglm_jax_attention"
_LANES = 16
_FORWARD, _BACKWARD = "glm_jax_attention_forward", "glm_jax_attention_backward"


def is_available() -> bool:
    """Whether the kernel was built; warns once where not."""
    path = Path(__file__).with_name(_LIBRARY)
    return cpu_library.register(path, "GlmJaxAttentionForward", _FORWARD) and cpu_library.register(
        path, "GlmJaxAttentionBackward", _BACKWARD
    )


@dataclasses.dataclass(frozen=True)
class CPUBlocks:
    """Many queries block by block, all in float32, with a gradient: training and prefill.

    Attributes:
      widest: bits of the widest vectors to use (512, 256 or less), for tests.
    """

    widest: int = cpu_library.WIDEST
    name: str = "cpu"
    platform: str = "cpu"

    def supports(self, arguments: Arguments) -> str | None:
        query, key = arguments.query, arguments.key
        return unmet(
            (arguments.has_ranges, "ranges of keys, no mask"),
            (arguments.softmax_dtype == "float32", "a softmax in float32"),
            (query.dtype == key.dtype == jnp.float32, "float32"),
            (query.shape[3] % _LANES == 0, f"heads of a multiple of {_LANES} numbers"),
            (surrounding_mesh() is None, "one device, no mesh"),
        ) or (None if is_available() else cpu_library.NOT_BUILT)

    def __call__(self, arguments: Arguments) -> Array:
        a = arguments
        # As projections give them: the transpose that made them [heads, key] falls away.
        key, value = (jnp.swapaxes(x, 1, 2) for x in (a.key, a.value))
        return _blocks(a.query, key, value, a.visible, a.dropout, self.widest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blocks(
    query: Array,
    key: Array,
    value: Array,
    key_ranges: Array,
    dropout: WeightDropout | None,
    widest: int,
) -> Array:
    return _blocks_forward(query, key, value, key_ranges, dropout, widest)[0]


def _blocks_forward(
    query: Array,
    key: Array,
    value: Array,
    key_ranges: Array,
    dropout: WeightDropout | None,
    widest: int,
) -> tuple[Array, Any]:
    batch, queries, heads, _ = query.shape
    results = (
        jax.ShapeDtypeStruct(query.shape, jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    )
    call = jax.ffi.ffi_call(_FORWARD, results, vmap_method="sequential")
    dropping = dropout or WeightDropout(jnp.uint32(0), 0.0)
    inputs = (query, key, value, key_ranges, dropping.seed)
    out, log_sums = call(*inputs, **_attributes(dropping, widest))
    return out, (*inputs[:4], dropping, out, log_sums)


def _attributes(dropout: WeightDropout, widest: int) -> dict[str, Any]:
    return {
        "most_kept": np.int64(dropout.most),
        "kept_factor": np.float32(1 / (1 - dropout.rate)),
        "widest": np.int64(widest),
    }


def _blocks_backward(widest: int, saved: Any, gradient: Array) -> tuple[Any, ...]:
    *inputs, dropout, out, log_sums = saved
    results = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in inputs[:3]]
    call = jax.ffi.ffi_call(_BACKWARD, results, vmap_method="sequential")
    of_inputs = call(*inputs, dropout.seed, out, log_sums, gradient, **_attributes(dropout, widest))
    return (*of_inputs, None, None)


_blocks.defvjp(_blocks_forward, _blocks_backward)
