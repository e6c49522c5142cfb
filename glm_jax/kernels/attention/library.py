"""Attention on NVIDIA GPUs by tokamax's Triton kernel.

The library's public function takes no ranges of keys for each row; its kernel does, and
skips blocks that no row of a block sees. It is reached under the private names that tokamax
0.0.12 and 0.0.17 have for it. They are tried by tracing a small call and its gradient; where
that fails, `supports` says so and plain XLA takes over.
"""

import dataclasses
import functools
import importlib
import logging
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from glm_jax.kernels import target
from glm_jax.kernels.attention.arguments import Arguments, on_each_device, saved
from glm_jax.kernels.dispatch import unmet

_HEAD_DIMS = (64, 128)


@dataclasses.dataclass(frozen=True)
class Library:
    """Takes one range of keys a query on GPUs that Triton compiles for, where tokamax is."""

    name: str = "library"
    platform: str = "cuda"

    def supports(self, arguments: Arguments) -> str | None:
        query = arguments.query
        return unmet(
            (arguments.has_one_range, "one range of keys a query"),
            (arguments.softmax_dtype == "float32", "a softmax in float32"),
            (arguments.dropout is None, "no dropout"),
            (query.dtype in (jnp.float16, jnp.bfloat16), "float16 or bfloat16"),
            (query.shape[-1] in _HEAD_DIMS, "heads of 64 or 128 numbers"),
            target.requires_triton(),
        ) or (None if _modules() else "it needs tokamax with the kernel of 0.0.12 or 0.0.17")

    def __call__(self, arguments: Arguments) -> Array:
        modules = _modules()
        assert modules is not None
        return on_each_device(functools.partial(_call, *modules), arguments)


@functools.cache
def _modules() -> tuple[Any, Any] | None:
    """Return the library's mask and kernel; None where it is absent, or no more what it was."""
    try:
        base = importlib.import_module("tokamax._src.ops.attention.base")
        kernel = importlib.import_module("tokamax._src.ops.attention.pallas_triton")
        # It warns of each shape that it has no tuning for, in a screen's length of text.
        logging.getLogger("absl").addFilter(_is_no_missing_tuning)
        modules = base.Mask, kernel.PallasTritonFlashAttention
        _trace_small_call(*modules)
    except Exception as error:  # private names, and packages behind them, fail in any way
        if not _is_missing(error):
            warnings.warn(
                "tokamax is installed, but its attention kernel cannot be used "
                f"({type(error).__name__}: {error}): plain XLA takes over, which is slower",
                stacklevel=2,
            )
        return None
    return modules


def _is_missing(error: Exception) -> bool:
    return isinstance(error, ModuleNotFoundError) and error.name == "tokamax"


def _is_no_missing_tuning(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Autotuning cache miss")


def _trace_small_call(make_mask: Any, make_kernel: Any) -> None:
    """Raise where the library does not take what `attention` gives it."""
    queries = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.float16)
    keys = jax.ShapeDtypeStruct((1, 1, 64, 64), jnp.float16)
    ranges = jax.ShapeDtypeStruct((1, 64, 2), jnp.int32)

    def loss(query: Array, key: Array, value: Array, key_ranges: Array) -> Array:
        out = _call(make_mask, make_kernel, Arguments(query, key, value, key_ranges))
        assert out.shape == query.shape
        return jnp.sum(out.astype(jnp.float32))

    jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), queries, keys, keys, ranges)


def _call(make_mask: Any, make_kernel: Any, arguments: Arguments) -> Array:
    query = arguments.query
    start, end = (arguments.visible[:, None, None, :, i] for i in (0, 1))
    attend = lambda start, end, *qkv: make_kernel()(*qkv, mask=make_mask(k_start=start, k_end=end))
    # Heads count as batch: keys are then taken as they lie.
    out = _with_saved_results(attend)(
        start,
        end,
        jnp.moveaxis(query, 2, 1)[..., None, :],
        arguments.key[..., None, :].astype(query.dtype),
        arguments.value[..., None, :].astype(query.dtype),
    )
    return jnp.moveaxis(out[..., 0, :], 1, 2)


def _with_saved_results(attend: Callable[..., Array]) -> Callable[..., Array]:
    """Return `attend(start, end, query, key, value)` whose forward rule names what it saves."""

    def forward(start: Array, end: Array, *qkv: Array) -> tuple[Array, Any]:
        out, pull_back = jax.vjp(functools.partial(attend, start, end), *qkv)
        leaves, structure = jax.tree.flatten((out, pull_back))
        return jax.tree.unflatten(structure, saved(*leaves))

    def backward(pull_back: Any, gradient: Array) -> tuple[Any, ...]:
        return (None, None, *pull_back(gradient))

    named = jax.custom_vjp(attend)
    named.defvjp(forward, backward)
    return named
