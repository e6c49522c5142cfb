"""Keys and values of the tokens already seen."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int32, Shaped

from glm_jax.config import GLMConfig
from glm_jax.sharding import activation_sharding, row_shards

CACHE_AXES = ("batch", "heads", "seq", "head_dim")


@struct.dataclass
class LayerCache:
    """Keys and values, with `layers` in front where layers are stacked.

    Attributes:
      keys, values: [batch, heads, length, head_dim], float or int8.
      key_scales, value_scales: float32 [batch, heads, length], what int8 is multiplied by;
        None for floats.
    """

    keys: Shaped[Any, "*layers batch heads length head_dim"]
    values: Shaped[Any, "*layers batch heads length head_dim"]
    key_scales: Float[Any, "*layers batch heads length"] | None = None
    value_scales: Float[Any, "*layers batch heads length"] | None = None

    def of_layer(self, index: Int[Array, ""] | int) -> "LayerCache":
        one = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
        taken: LayerCache = jax.tree.map(one, self)
        return taken

    def with_layer(self, index: Int[Array, ""] | int, written: "LayerCache") -> "LayerCache":
        put: LayerCache = jax.tree.map(lambda c, new: c.at[index].set(new), self, written)
        return put


KVCache = LayerCache | tuple[LayerCache, ...]


def init_cache(
    config: GLMConfig,
    batch_size: int,
    length: int,
    unstacked: bool,
    mesh: Mesh | None = None,
) -> KVCache:
    """An empty cache in the config's cache dtype, by default its compute dtype.

    Args:
      batch_size: rows.
      length: tokens a row can hold.
      unstacked: one `LayerCache` a layer, for parameters whose layers are a tuple;
        otherwise one with a leading layers axis.
      mesh: heads are split over tensor and rows over data and fsdp, where they divide.
    """
    shape: tuple[int, ...] = (batch_size, config.num_heads, length, config.head_dim)
    axes: tuple[str | None, ...] = CACHE_AXES
    if mesh is not None and batch_size % row_shards(mesh):
        axes = (None, *axes[1:])
    if not unstacked:
        shape, axes = (config.num_layers, *shape), ("layers", *axes)
    dtype = config.cache_dtype or config.activation_dtype

    def zeros(shape: tuple[int, ...], dtype: str) -> Array:
        device = None if mesh is None else activation_sharding(mesh, axes[: len(shape)])
        return jnp.zeros(shape, dtype, device=device)

    def layer() -> LayerCache:
        if dtype != "int8":
            return LayerCache(keys=zeros(shape, dtype), values=zeros(shape, dtype))
        return LayerCache(
            keys=zeros(shape, dtype),
            values=zeros(shape, dtype),
            key_scales=zeros(shape[:-1], "float32"),
            value_scales=zeros(shape[:-1], "float32"),
        )

    return tuple(layer() for _ in range(config.num_layers)) if unstacked else layer()


def write(
    cache: LayerCache,
    keys: Float[Array, "batch heads new head_dim"],
    values: Float[Array, "batch heads new head_dim"],
    start: Int32[Array, " batch"],
) -> LayerCache:
    """Puts new keys and values of one layer at `start` of each row, rounded as it stores."""

    def put(row: Array, new: Array, at: Array) -> Array:
        place = [jnp.zeros_like(at), at] + [jnp.zeros_like(at)] * (row.ndim - 2)
        return jax.lax.dynamic_update_slice(row, new.astype(row.dtype), place)

    new = LayerCache(keys=keys, values=values)
    if cache.key_scales is not None:
        new = LayerCache(*quantize_heads(keys, values))
    written: LayerCache = jax.tree.map(lambda old, x: jax.vmap(put)(old, x, start), cache, new)
    return written


def quantize_heads(*floats: Array) -> tuple[Array, ...]:
    """Integers of each array [.., head_dim], then the scales of the vectors of each."""
    wide = [x.astype(jnp.float32) for x in floats]
    scales = [jnp.max(jnp.abs(x), axis=-1) / 127 for x in wide]
    divisors = [jnp.where(scale == 0, 1, scale)[..., None] for scale in scales]
    integers = [jnp.round(x / d).astype(jnp.int8) for x, d in zip(wide, divisors, strict=True)]
    return (*integers, *scales)
