"""Attention on NVIDIA GPUs by tokamax's Triton kernel.

The library's public function takes no ranges of keys for each row; its kernel does, and
skips blocks that no row of a block sees. It is reached under the name that tokamax 0.0.12
has for it; where that is missing, `is_available` says so and plain XLA takes over.
"""

import functools
import importlib
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
    try:
        base = importlib.import_module("tokamax._src.ops.attention.base")
        kernel = importlib.import_module("tokamax._src.ops.attention.pallas_triton")
    except ImportError:
        return None
    return base.Mask, kernel.PallasTritonFlashAttention


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
    make_mask, make_kernel = modules
    # Heads count as batch: keys are then taken as they lie in the cache.
    start, end = (key_ranges[:, None, None, :, i] for i in (0, 1))
    out = make_kernel()(
        jnp.moveaxis(query, 2, 1)[..., None, :],
        key[..., None, :],
        value[..., None, :],
        mask=make_mask(k_start=start, k_end=end),
    )
    return jnp.moveaxis(out[..., 0, :], 1, 2)
