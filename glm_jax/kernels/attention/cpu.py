"""Attention on CPU: C++ kernels (`jax.ffi`).

`CPUCache` is for few queries over a key/value cache; one over pages is in paged_attention/.
XLA on CPU copies the cache for each reader of what was just written to it, and multiplies
single queries on one thread; the kernels read the visible part of the cache once, on all
threads, as it is stored.

`CPUBlocks` is for many queries, with a gradient: training and prefill in float32.
"""

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

LIBRARY = "libglm_jax_attention"
_TARGET, PAGED = "glm_jax_attention", "glm_jax_paged_attention"
_MAX_QUERIES = 8  # above it scores are products of matrices, which XLA is good at
_LANES = 16
_DTYPES = ("float32", "bfloat16", "int8")
_NOT_BUILT = "its library is not built: install the package where a C++ compiler is"
_FORWARD, _BACKWARD = "glm_jax_attention_forward", "glm_jax_attention_backward"


def is_available() -> bool:
    """Whether the kernels were built; warns once where not."""
    path = Path(__file__).with_name(LIBRARY)
    return (
        cpu_library.register(path, "GlmJaxAttention", _TARGET)
        and cpu_library.register(path, "GlmJaxPagedAttention", PAGED)
        and cpu_library.register(path, "GlmJaxAttentionForward", _FORWARD)
        and cpu_library.register(path, "GlmJaxAttentionBackward", _BACKWARD)
    )


@dataclasses.dataclass(frozen=True)
class CPUCache:
    """Few queries over a cache, one range of keys each, read as it is stored; no gradient.

    Attributes:
      widest: bits of the widest vectors to use (512, 256 or less), for tests.
    """

    widest: int = cpu_library.WIDEST
    name: str = "cpu"
    platform: str = "cpu"

    def supports(self, arguments: Arguments) -> str | None:
        query, key = arguments.query, arguments.key
        return unmet(
            (arguments.dropout is None, "no dropout"),
            (arguments.softmax_dtype == "float32", "a softmax in float32"),
            (query.shape[1] <= _MAX_QUERIES, f"up to {_MAX_QUERIES} queries"),
            # Without a cache there may be a gradient.
            (query.shape[1] < key.shape[2], "fewer queries than keys"),
            (arguments.has_one_range, "one range of keys a query"),
        ) or unsupported_storage(key)

    def __call__(self, arguments: Arguments) -> Array:
        a = arguments
        operands = (a.query, a.key, a.value, a.visible.astype(jnp.int32))
        return call(_TARGET, operands, (a.key_scales, a.value_scales), self.widest)


def unsupported_storage(keys: Array) -> str | None:
    """Return what the kernels over a cache take, where it is not keys such as these, here."""
    return unmet(
        (keys.shape[-1] % _LANES == 0, f"heads of a multiple of {_LANES} numbers"),
        (str(keys.dtype) in _DTYPES, f"keys in {', '.join(_DTYPES)}"),
        (surrounding_mesh() is None, "one device, no mesh"),
    ) or (None if is_available() else _NOT_BUILT)


def call(
    name: str, operands: tuple[Array, ...], scales: tuple[Array | None, ...], widest: int
) -> Array:
    """Call a kernel over a cache, which computes in float32.

    Args:
      operands: the query, the keys and values as they are stored, and what says which are seen.

    Returns:
      In the query's shape and dtype; zeros for queries that see nothing.
    """
    query, *stored = operands
    none = jnp.zeros((0,), jnp.float32)
    attended: Array = jax.ffi.ffi_call(
        name, jax.ShapeDtypeStruct(query.shape, jnp.float32), vmap_method="sequential"
    )(
        query.astype(jnp.float32),
        *stored,
        *(none if scale is None else scale for scale in scales),
        widest=np.int64(widest),
    )
    return attended.astype(query.dtype)


@dataclasses.dataclass(frozen=True)
class CPUBlocks:
    """Many queries block by block, all in float32, with a gradient: training and prefill.

    Attributes:
      widest: see `CPUCache`.
    """

    widest: int = cpu_library.WIDEST
    name: str = "cpu"
    platform: str = "cpu"

    def supports(self, arguments: Arguments) -> str | None:
        query, key = arguments.query, arguments.key
        return unmet(
            (arguments.has_ranges, "ranges of keys, no mask"),
            (arguments.softmax_dtype == "float32", "a softmax in float32"),
            (arguments.key_scales is None, "keys without scales"),
            (query.dtype == key.dtype == jnp.float32, "float32"),
            (query.shape[3] % _LANES == 0, f"heads of a multiple of {_LANES} numbers"),
            (surrounding_mesh() is None, "one device, no mesh"),
        ) or (None if is_available() else _NOT_BUILT)

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
