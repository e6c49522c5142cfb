"""Keys and values of the tokens already seen."""

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32

from glm_jax.config import GLMConfig
from glm_jax.sharding import activation_sharding

CACHE_AXES = ("batch", "heads", "seq", "head_dim")


@struct.dataclass
class LayerCache:
    """keys, values: [batch, heads, length, head_dim], or that with `layers` in front."""

    keys: Float[Array, "*layers batch heads length head_dim"]
    values: Float[Array, "*layers batch heads length head_dim"]


KVCache = LayerCache | tuple[LayerCache, ...]


def init_cache(
    config: GLMConfig,
    batch_size: int,
    length: int,
    unstacked: bool,
    mesh: Mesh | None = None,
) -> KVCache:
    """An empty cache in the config's compute dtype.

    Args:
      batch_size: rows.
      length: tokens a row can hold.
      unstacked: one `LayerCache` a layer, for parameters whose layers are a tuple;
        otherwise one with a leading layers axis.
      mesh: heads are split over tensor and rows over data and fsdp, where they divide.
    """
    shape: tuple[int, ...] = (batch_size, config.num_heads, length, config.head_dim)
    axes: tuple[str | None, ...] = CACHE_AXES
    if mesh is not None and batch_size % (mesh.shape["data"] * mesh.shape["fsdp"]):
        axes = (None, *axes[1:])
    if not unstacked:
        shape, axes = (config.num_layers, *shape), ("layers", *axes)
    device = None if mesh is None else activation_sharding(mesh, axes)

    def layer() -> LayerCache:
        return LayerCache(
            keys=jnp.zeros(shape, config.compute_dtype, device=device),
            values=jnp.zeros(shape, config.compute_dtype, device=device),
        )

    return tuple(layer() for _ in range(config.num_layers)) if unstacked else layer()


def write(
    cache: LayerCache,
    keys: Float[Array, "batch heads new head_dim"],
    values: Float[Array, "batch heads new head_dim"],
    start: Int32[Array, " batch"],
) -> LayerCache:
    """Puts new keys and values of one layer at `start` of each row."""

    def put(row: Array, new: Array, at: Array) -> Array:
        return jax.lax.dynamic_update_slice(row, new.astype(row.dtype), (0, at, 0))

    return LayerCache(
        keys=jax.vmap(put)(cache.keys, keys, start),
        values=jax.vmap(put)(cache.values, values, start),
    )
