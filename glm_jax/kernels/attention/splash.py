"""The call of JAX's splash attention that library_tpu.py makes.

Its masks are made before a program is compiled. But the kernel computes a mask in a block from a
number of each query, which a mask class gives as the query's position, and reads which blocks to
visit from an array. Here both are operands: the number is a query's range of keys, so that no
array of queries x keys exists, and blocks that no query sees are skipped.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array

from glm_jax.kernels.attention.arguments import SAVED, Arguments, padded

LANES = 128
_BLOCKS = (512, 256, LANES)


def attend(interpret: bool, arguments: Arguments) -> Array:
    """Compute attention on one device; `interpret` simulates the kernel on any."""
    a, (_, queries, _, head_dim) = arguments, arguments.query.shape
    query = jnp.swapaxes(a.query, 1, 2) * jnp.asarray(head_dim**-0.5, a.query.dtype)
    arrays = (query, a.key, a.value, a.visible)
    query, key, value, ranges = (padded(x, -2, LANES) for x in arrays)
    sizes = _block(query.shape[2]), _block(key.shape[2])
    run = functools.partial(_attend_in_row, interpret, sizes)
    out = jax.vmap(run)(query, key, value, ranges)
    sees_any = (a.visible[..., 0] < a.visible[..., 1])[..., None, None]
    return jnp.where(sees_any, jnp.swapaxes(out, 1, 2)[:, :queries], 0)


def _attend_in_row(
    interpret: bool, sizes: tuple[int, int], query: Array, key: Array, value: Array, ranges: Array
) -> Array:
    """Attention in one sequence: query, key, value [heads, length, head_dim]."""
    by_query, by_key = _visited(ranges, key.shape[1], *sizes)
    q, k = sizes
    blocks = splash.BlockSizes(
        block_q=q, block_kv=k, block_kv_compute=k, block_q_dkv=q, block_kv_dkv=k,
        block_kv_dkv_compute=k, block_q_dq=q, block_kv_dq=k,
    )  # fmt: skip
    kernel: Any = splash.SplashAttentionKernel(
        by_query,
        by_query,
        by_key,
        block_sizes=blocks,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=SAVED,
        mask_function=_is_visible,
        interpret=interpret,
    )
    attended: Array = kernel(query, key, value)
    return attended


def _is_visible(ranges: Array, keys: Array) -> Array:
    return (keys >= ranges >> 16) & (keys < ranges & 0xFFFF)  # as `packed` below


def _visited(ranges: Array, num_keys: int, q: int, k: int) -> tuple[MaskInfo, MaskInfo]:
    """Which blocks the kernels visit that go over keys for queries, and the reverse.

    Args:
      ranges: int32 [query, 2].
      q, k: sizes of blocks of queries and keys.
    """
    starts, ends = (ranges[:, i].reshape(-1, q, 1) for i in (0, 1))
    first_keys = jnp.arange(0, num_keys, k)
    is_seen = (starts < ends) & (starts < first_keys + k) & (ends > first_keys)
    is_seen = jnp.any(is_seen, axis=1)
    # Queries that see nothing have a block, too, and finite sums.
    is_seen = is_seen.at[:, 0].set(is_seen[:, 0] | ~jnp.any(is_seen, axis=1))
    packed: Any = (ranges[:, 0] << 16) | ranges[:, 1]

    def info(axis: int) -> MaskInfo:
        # A block that is not visited is not copied if it is the one before or the one after.
        numbers = jax.lax.broadcasted_iota(jnp.int32, is_seen.shape, axis)
        size = is_seen.shape[axis]
        last = jax.lax.cummax(jnp.where(is_seen, numbers, -1), axis=axis)
        after = jax.lax.cummin(jnp.where(is_seen, numbers, size), axis=axis, reverse=True)
        next_one = jnp.where(after < size, after, jnp.maximum(last, 0))
        visited: Any = is_seen.astype(jnp.int32)[None]
        return MaskInfo(next_one[None], None, visited, None, packed)

    return info(1), info(0)


def _block(length: int) -> int:
    return next(size for size in _BLOCKS if length % size == 0)
