"""Attention on NVIDIA GPUs by tokamax's Triton kernel.

The library's public function takes no ranges of keys for each row; its kernel does, and
skips blocks that no row of a block sees. It is reached under the private names that tokamax
0.0.12 and 0.0.17 have for it. They are tried by tracing a small call and its gradient; where
that fails, `is_available` says so and plain XLA takes over.
"""

import functools
import importlib
import logging
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from glm_jax.kernels import target
from glm_jax.sharding import fitting_activation_spec, mesh_to_divide

_HEAD_DIMS = (64, 128)


def is_available(query: Array, key_ranges: Array) -> bool:
    """Whether the kernel is installed and takes this GPU, these dtypes and ranges."""
    return (
        query.dtype in (jnp.float16, jnp.bfloat16)
        and query.shape[-1] in _HEAD_DIMS
        and key_ranges.shape[-1] == 2
        and target.compute_capability() >= target.TRITON_CAPABILITY
        and _modules() is not None
    )


@functools.cache
def _modules() -> tuple[Any, Any] | None:
    """The library's mask and kernel; None where it is not installed, or no more what it was."""
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
    """Raises where the library does not take what `attention` gives it."""
    queries = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.float16)
    keys = jax.ShapeDtypeStruct((1, 1, 64, 64), jnp.float16)
    ranges = jax.ShapeDtypeStruct((1, 64, 2), jnp.int32)

    def loss(query: Array, key: Array, value: Array, key_ranges: Array) -> Array:
        out = _call(make_mask, make_kernel, query, key, value, key_ranges)
        assert out.shape == query.shape
        return jnp.sum(out.astype(jnp.float32))

    jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), queries, keys, keys, ranges)


def attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch heads key head_dim"],
    value: Float[Array, "batch heads key head_dim"],
    key_ranges: Int32[Array, "batch query 2"],
) -> Float[Array, "batch query heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim)) value over each row's one range of keys.

    Under a mesh each device takes its own rows and heads.
    """
    if mesh_to_divide() is None:
        return _local(query, key, value, key_ranges)
    batch, _, heads, _ = fitting_activation_spec(query.shape, ("batch", "seq", "heads", "head_dim"))
    run: Any = functools.partial(jax.shard_map, check_vma=False)
    divided: Array = run(
        _local,
        in_specs=(
            PartitionSpec(batch, None, heads),
            PartitionSpec(batch, heads),
            PartitionSpec(batch, heads),
            PartitionSpec(batch),
        ),
        out_specs=PartitionSpec(batch, None, heads),
    )(query, key, value, key_ranges)
    return divided


def _local(query: Array, key: Array, value: Array, key_ranges: Array) -> Array:
    modules = _modules()
    assert modules is not None
    return _call(*modules, query, key, value, key_ranges)


def _call(
    make_mask: Any, make_kernel: Any, query: Array, key: Array, value: Array, key_ranges: Array
) -> Array:
    # Heads count as batch: keys are then taken as they lie in the cache.
    start, end = (key_ranges[:, None, None, :, i] for i in (0, 1))
    out = make_kernel()(
        jnp.moveaxis(query, 2, 1)[..., None, :],
        key[..., None, :],
        value[..., None, :],
        mask=make_mask(k_start=start, k_end=end),
    )
    return jnp.moveaxis(out[..., 0, :], 1, 2)
